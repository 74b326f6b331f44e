//! A vhost-user-blk driver in user space: what a guest's driver does, without the guest.
//!
//! It sits on `virtio-driver`'s transport and split ring and adds what a test needs:
//!
//! - The status byte is poisoned before every request, so "answered, but nothing written" shows.
//! - A completion of no request is counted ([`Queue::spurious`]), never swallowed.
//! - Every wait has a deadline: a request that stays unanswered is a result, not a hanging test.
//!
//! Each [`Queue`] owns its ring and its part of the buffer memory and can move to a thread of its
//! own. The connection closes when the [`Client`] and all of its queues are gone, requests in
//! flight or not; that is how a killed frontend looks from the other side.
//!
//! The only `unsafe` of this crate is here: `virtio-driver` wants a ring that borrows from memory
//! it owns itself, and the buffers are shared with another process, so they are reached through
//! raw pointers and copies, never through references.

pub mod dirty;
pub mod fast;
pub mod raw;
mod wire;

use std::ffi::c_void;
use std::io;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::AsRawFd;
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioFeatureFlags, VirtioTransport, iovec,
};

pub use wire::{Request, Status, features};
use wire::{header, range, sector};

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// Feature bits to accept, of those that are offered.
    pub features: u64,
    /// Number of queues to set up.
    pub queues: usize,
    /// Descriptors per queue; a quarter as many requests can be in flight.
    pub queue_size: u16,
    /// The largest transfer of one request, in bytes.
    pub slot_bytes: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { features: features::USUAL, queues: 1, queue_size: 128, slot_bytes: 64 << 10 }
    }
}

/// How long connecting and setting up may take before it counts as failed.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// Descriptors of the longest chain: header, two pieces of data, status.
const CHAIN: usize = 4;

/// The status byte before the device has written one; no status of the specification.
const UNWRITTEN: u8 = 0xee;

/// The part of a request that lives in ring memory: header, range and status.
#[derive(Clone, Copy)]
#[repr(C)]
struct Wire {
    header: [u8; 16],
    range: [u8; 16],
    status: u8,
}

type Transport = VhostUser<VirtioBlkConfig, Wire>;

/// What is shared by all queues of a connection and ends with the last of them.
struct Session {
    transport: Mutex<Transport>,
    buffers: MmapRaw,
}

/// One connection to a vhost-user-blk backend.
pub struct Client {
    session: Arc<Session>,
    features: u64,
    capacity: u64,
    max_queues: usize,
    queues: Vec<Queue>,
}

impl Client {
    /// Connects, negotiates, shares the buffer memory and starts the queues.
    ///
    /// Fails when the backend does not do all of that within [`CONNECT_LIMIT`].
    pub fn connect(socket: &Path, options: &Options) -> io::Result<Client> {
        let (sender, receiver) = mpsc::channel();
        let (socket, options) = (socket.to_owned(), options.clone());
        // virtio-driver's socket has no timeout; a backend that never answers must not hang the
        // test.
        std::thread::spawn(move || sender.send(Client::connect_now(&socket, &options)));
        receiver.recv_timeout(CONNECT_LIMIT).unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::TimedOut, "the backend did not finish the set-up"))
        })
    }

    fn connect_now(socket: &Path, options: &Options) -> io::Result<Client> {
        let path = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let mut transport = Transport::new(path, options.features)?;
        let max_queues = transport.max_queues().unwrap_or(1);
        if options.queues > max_queues {
            return Err(io::Error::other(format!("the backend has only {max_queues} queues")));
        }
        let capacity = u64::from(transport.get_config()?.capacity) * 512;
        let features = transport.get_features();

        let slots = usize::from(options.queue_size) / CHAIN;
        let bytes = options.queues * slots * options.slot_bytes;
        let memory = memfd_create("test-buffers", MemfdFlags::CLOEXEC)?;
        ftruncate(&memory, bytes as u64)?;
        let buffers = MmapOptions::new().len(bytes).map_raw(&memory)?;
        transport.map_mem_region(buffers.as_mut_ptr() as usize, bytes, memory.as_raw_fd(), 0)?;

        let rings = start_rings(&mut transport, options)?;
        let notify: Vec<_> = (0..options.queues)
            .map(|i| (transport.get_submission_notifier(i), transport.get_completion_fd(i)))
            .collect();
        let session = Arc::new(Session { transport: Mutex::new(transport), buffers });
        let queues = rings
            .into_iter()
            .zip(notify)
            .enumerate()
            .map(|(index, (ring, (kick, call)))| {
                let first = index * slots * options.slot_bytes;
                let free = (0..slots).map(|slot| first + slot * options.slot_bytes).collect();
                Queue::new(ring, kick, call, free, options, Arc::clone(&session))
            })
            .collect();
        Ok(Client { session, features, capacity, max_queues, queues })
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The size of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// How many queues the backend has.
    pub fn max_queues(&self) -> usize {
        self.max_queues
    }

    /// Asks for the configuration space again; says the disk's size in bytes.
    pub fn read_capacity(&self) -> io::Result<u64> {
        let transport = self.session.transport.lock().expect("no panic while connected");
        Ok(u64::from(transport.get_config()?.capacity) * 512)
    }

    /// Queue number `index`.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// All queues, to be moved to threads. The connection lasts as long as any of them.
    pub fn into_queues(self) -> Vec<Queue> {
        self.queues
    }
}

/// Places the rings in memory that the transport owns, and starts them.
fn start_rings(
    transport: &mut Transport,
    options: &Options,
) -> io::Result<Vec<Virtqueue<'static, Wire>>> {
    let negotiated = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
    let layout =
        VirtqueueLayout::new::<Wire>(options.queues, options.queue_size.into(), negotiated)?;
    let memory = transport.alloc_queue_mem(&layout)?;
    assert!(
        memory.len() >= options.queues * layout.end_offset,
        "virtio-driver allocated too little"
    );
    let base = memory.as_mut_ptr();
    let rings = (0..options.queues)
        .map(|index| {
            // SAFETY: the range is inside the mapping just made (asserted above) and disjoint from
            // the other queues' ranges. The transport never unmaps it before it is dropped, and
            // `Session`, which owns the transport, outlives the ring in `Queue` (see the order of
            // its fields). On the error paths of this function the rings are dropped before the
            // caller's transport.
            let part = unsafe {
                std::slice::from_raw_parts_mut(
                    base.add(index * layout.end_offset),
                    layout.end_offset,
                )
            };
            Virtqueue::new(transport.iova_translator(), part, options.queue_size, negotiated)
        })
        .collect::<io::Result<Vec<_>>>()?;
    transport.setup_queues(&rings)?;
    Ok(rings)
}

/// One answered request.
#[derive(Debug)]
pub struct Completion<'a> {
    /// What was given to [`Queue::submit`].
    pub context: u64,
    /// The device's answer.
    pub status: Status,
    /// What was read; empty for requests that read nothing.
    pub data: &'a [u8],
    /// From the call of `submit` until the answer was seen.
    pub latency: Duration,
}

struct Pending {
    context: u64,
    slot: Option<usize>,
    read_len: usize,
    submitted: Instant,
}

/// One request queue.
pub struct Queue {
    // The ring borrows from memory that `session` owns: it must be dropped first, so it is declared
    // first.
    ring: Virtqueue<'static, Wire>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    free_slots: Vec<usize>,
    slot_bytes: usize,
    pending: Vec<Option<Pending>>,
    in_flight: usize,
    spurious: u64,
    copy: Box<[u8]>,
    session: Arc<Session>,
}

impl Queue {
    fn new(
        ring: Virtqueue<'static, Wire>,
        kick: Box<dyn QueueNotifier>,
        call: Arc<EventFd>,
        free_slots: Vec<usize>,
        options: &Options,
        session: Arc<Session>,
    ) -> Queue {
        Queue {
            ring,
            kick,
            call,
            free_slots,
            slot_bytes: options.slot_bytes,
            pending: std::iter::repeat_with(|| None).take(options.queue_size.into()).collect(),
            in_flight: 0,
            spurious: 0,
            copy: vec![0; options.slot_bytes].into_boxed_slice(),
            session,
        }
    }

    /// Requests that were submitted and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Completions for requests that were not in flight: each one is a fault of the device.
    pub fn spurious(&self) -> u64 {
        self.spurious
    }

    /// Puts a request into the ring; the device sees it, but may be asleep until [`Queue::kick`].
    ///
    /// Fails when the ring is full. Reads find their buffer filled with a pattern that is no stamp,
    /// so that a device which answers without reading is found out.
    pub fn submit(&mut self, request: Request<'_>, context: u64) -> io::Result<()> {
        let (kind, sector, range, transfer) = match request {
            Request::Read { offset, len } => (0, sector(offset)?, None, Some((len, None))),
            Request::Write { offset, data } => {
                (1, sector(offset)?, None, Some((data.len(), Some(data))))
            }
            Request::Flush => (4, 0, None, None),
            Request::Identify => (8, 0, None, Some((20, None))),
            Request::Discard { offset, len } => (11, 0, Some(range(offset, len, false)?), None),
            Request::WriteZeroes { offset, len, unmap } => {
                (13, 0, Some(range(offset, len, unmap)?), None)
            }
        };
        let mut pending = Pending { context, slot: None, read_len: 0, submitted: Instant::now() };
        let mut pieces = [None, None];
        if let Some((len, data)) = transfer {
            if len > self.slot_bytes {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "longer than a slot"));
            }
            let slot =
                self.free_slots.pop().ok_or_else(|| io::Error::other("the queue is full"))?;
            self.fill(slot, len, data);
            pending.slot = Some(slot);
            pending.read_len = if data.is_none() { len } else { 0 };
            pieces = self.pieces(slot, len);
        }
        let from_device = pending.read_len > 0;
        let added = self.ring.add_request(|wire, add| {
            *wire = Wire {
                header: header(kind, sector),
                range: range.unwrap_or_default(),
                status: UNWRITTEN,
            };
            add(piece(wire.header.as_mut_ptr(), 16), false)?;
            if range.is_some() {
                add(piece(wire.range.as_mut_ptr(), 16), false)?;
            }
            for buffer in pieces.into_iter().flatten() {
                add(buffer, from_device)?;
            }
            add(piece(&raw mut wire.status, 1), true)
        });
        match added {
            Ok(id) => {
                assert!(
                    self.pending[usize::from(id)].replace(pending).is_none(),
                    "descriptor used twice"
                );
                self.in_flight += 1;
                Ok(())
            }
            Err(error) => {
                self.free_slots.extend(pending.slot);
                Err(error)
            }
        }
    }

    /// Tells the device about submitted requests, if it wants to be told.
    pub fn kick(&mut self) -> io::Result<()> {
        // virtio-driver reads the used flags without a barrier after its store to avail.idx; the
        // device stores the flags, fences, and reads avail.idx. Without a fence here both could
        // miss the other.
        fence(Ordering::SeqCst);
        if self.ring.avail_notif_needed() {
            self.kick.notify()?;
        }
        Ok(())
    }

    /// Hands every answered request to `done` and says how many there were. Never waits.
    pub fn reap(&mut self, mut done: impl FnMut(Completion<'_>)) -> usize {
        let mut count = 0;
        while self.ring.completions().has_next() {
            let Some(completed) = self.ring.completions().next() else { break };
            let Some(pending) = self.pending[usize::from(completed.id)].take() else {
                self.spurious += 1;
                continue;
            };
            let latency = pending.submitted.elapsed();
            if let Some(slot) = pending.slot {
                self.copy_out(slot, pending.read_len);
                self.free_slots.push(slot);
            }
            self.in_flight -= 1;
            count += 1;
            let status = match completed.req.status {
                0 => Status::Ok,
                1 => Status::IoError,
                2 => Status::Unsupported,
                other => Status::Garbage(other),
            };
            done(Completion {
                context: pending.context,
                status,
                data: &self.copy[..pending.read_len],
                latency,
            });
        }
        count
    }

    /// Sleeps until the device signals a completion, at most for `limit`.
    pub fn wait(&mut self, limit: Duration) -> io::Result<()> {
        self.ring.set_used_notif_enabled(true);
        // Pairs with the device's fence between its store to used.idx and its look at our wish.
        fence(Ordering::SeqCst);
        if !self.ring.completions().has_next() {
            let mut fds = [PollFd::new(&self.call, PollFlags::IN)];
            let limit =
                Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
            match poll(&mut fds, Some(&limit)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => drop(self.call.read()?),
                Err(error) => return Err(error.into()),
            }
        }
        self.ring.set_used_notif_enabled(false);
        Ok(())
    }

    /// Contexts of the requests that have waited for longer than `limit`.
    pub fn overdue(&self, limit: Duration) -> Vec<u64> {
        let late = self.pending.iter().flatten().filter(|p| p.submitted.elapsed() > limit);
        late.map(|pending| pending.context).collect()
    }

    /// Submits one request and waits for its answer; the queue must be idle.
    ///
    /// Fails with `TimedOut` when the device does not answer within `limit`.
    pub fn execute(
        &mut self,
        request: Request<'_>,
        limit: Duration,
    ) -> io::Result<(Status, Vec<u8>)> {
        assert_eq!(self.in_flight, 0, "`execute` is for an idle queue");
        self.submit(request, 0)?;
        self.kick()?;
        let deadline = Instant::now() + limit;
        let mut answer = None;
        loop {
            self.reap(|done| answer = Some((done.status, done.data.to_vec())));
            match (answer.take(), deadline.checked_duration_since(Instant::now())) {
                (Some(answer), _) => return Ok(answer),
                (None, Some(left)) => self.wait(left.min(Duration::from_millis(100)))?,
                (None, None) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "unanswered request"));
                }
            }
        }
    }

    /// Puts `data`, or a pattern, into a slot.
    fn fill(&mut self, slot: usize, len: usize, data: Option<&[u8]>) {
        let target = self.session.buffers.as_mut_ptr();
        // SAFETY: `slot` came from `free_slots`, so `slot..slot + slot_bytes` is inside the
        // mapping, which `session` keeps, and belongs to this queue alone; `len <= slot_bytes`. No
        // reference to it exists.
        unsafe {
            match data {
                Some(data) => std::ptr::copy_nonoverlapping(data.as_ptr(), target.add(slot), len),
                None => std::ptr::write_bytes(target.add(slot), UNWRITTEN, len),
            }
        }
    }

    /// Copies the first `len` bytes of a slot into `self.copy`.
    fn copy_out(&mut self, slot: usize, len: usize) {
        let source = self.session.buffers.as_ptr();
        // SAFETY: as in `fill`; `copy` is `slot_bytes` long and private. The bytes may still change
        // when the device misbehaves; they are plain data and only ever copied.
        unsafe { std::ptr::copy_nonoverlapping(source.add(slot), self.copy.as_mut_ptr(), len) }
    }

    /// The buffers of one transfer: two, cut at a sector, when it is long enough, else one.
    fn pieces(&self, slot: usize, len: usize) -> [Option<iovec>; 2] {
        let start = self.session.buffers.as_mut_ptr().wrapping_add(slot);
        match len / 512 {
            0 | 1 => [Some(piece(start, len)), None],
            sectors => {
                let cut = (sectors / 3).max(1) * 512;
                [Some(piece(start, cut)), Some(piece(start.wrapping_add(cut), len - cut))]
            }
        }
    }
}

fn piece(start: *mut u8, len: usize) -> iovec {
    iovec { iov_base: start.cast::<c_void>(), iov_len: len }
}

/// Plays the device: answers every request that is in the ring from number `taken` on, with success
/// and without moving data. Says the number after the last.
fn answer_all(ring: &Virtqueue<'static, Wire>, mut taken: u16) -> u16 {
    let size = ring.queue_size();
    let (table, avail, used) =
        (ring.desc_table_ptr(), ring.driver_area_ptr(), ring.device_area_ptr());
    // SAFETY: the pointers are those of a live split ring of `size` entries (virtio 1.2, 2.7.5,
    // 2.7.6, 2.7.8), which only this thread uses; indices are taken modulo `size`, and the last
    // buffer of each chain is the `status` of a `Wire` in the same mapping, because `fast` makes no
    // other chains.
    unsafe {
        let published = avail.add(2).cast::<u16>().read_volatile();
        while taken != published {
            let place = usize::from(taken % size);
            let head = avail.add(4 + place * 2).cast::<u16>().read_volatile();
            let mut at = table.add(usize::from(head % size) * 16);
            while at.add(12).cast::<u16>().read_volatile() & raw::NEXT != 0 {
                at = table.add(usize::from(at.add(14).cast::<u16>().read_volatile() % size) * 16);
            }
            (at.cast::<u64>().read_volatile() as *mut u8).write_volatile(0);
            used.add(4 + place * 8).cast::<[u32; 2]>().cast_mut().write_volatile([head.into(), 1]);
            taken = taken.wrapping_add(1);
        }
        fence(Ordering::Release);
        used.add(2).cast::<u16>().cast_mut().write_volatile(taken);
    }
    taken
}
