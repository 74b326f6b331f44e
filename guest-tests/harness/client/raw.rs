//! A ring written by hand: a guest that may break every rule.
//!
//! The rings and buffers live in a memfd that is shared with the backend and reached with `pread`
//! and `pwrite`, so any bytes can go anywhere at any time, and nothing here checks them. The
//! guest-physical and the frontend's addresses differ on purpose: a backend that mixes them up
//! fails at once.

use crate::PATIENCE;
use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Where the guest's only memory region starts, as the guest sees it.
pub const GUEST_BASE: u64 = 0x4000_0000;
/// Where the same region would be mapped in the frontend.
pub const USER_BASE: u64 = 0x7000_0000_0000;
/// Size of the region.
pub const MEMORY_BYTES: u64 = 1 << 20;
/// Where memory starts, as the guest sees it, that is plugged in and out later
/// ([`RawSession::plug`]).
pub const PLUGGED_BASE: u64 = 0x8000_0000;

pub(super) const DESCRIPTORS: u64 = 0;
pub(super) const AVAIL: u64 = 0x1_0000;
/// Offset in the region of the used ring.
pub const USED: u64 = 0x2_0000;
/// Offset in the region from where on it is free for headers and data.
pub const FREE: u64 = 0x4_0000;

/// Descriptor flags (virtio 1.2, section 2.7.5).
pub const NEXT: u16 = 1;
/// The device writes this buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next entry.
    pub next: u16,
}

impl Descriptor {
    /// As it lies in memory.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Guest memory beside the usual.
pub struct LargeMemory {
    /// Where it starts, as the guest sees it.
    pub base: u64,
    file: File,
}

impl LargeMemory {
    /// Writes from its start on.
    pub fn put(&self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, 0)
    }

    /// Reads from its start on.
    pub fn get(&self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, 0).map(|()| bytes)
    }
}

/// A vhost-user session with one hand-made queue, number 0.
pub struct RawSession {
    /// For messages of one's own.
    pub frontend: Frontend,
    /// The same connection.
    socket: UnixStream,
    memory: File,
    plugged: File,
    kick: EventFd,
    call: EventFd,
    /// What was negotiated.
    pub(super) features: u64,
    pub(super) size: u16,
    avail_index: u16,
    used_index: u16,
}

impl RawSession {
    /// Connects and negotiates `features`, but sets up neither memory nor ring.
    ///
    /// Like every wait on this session, a missing reply is an error after 10 s.
    pub fn connect(socket: &Path, features: u64) -> io::Result<RawSession> {
        RawSession::connect_with(socket, features, VhostUserProtocolFeatures::empty())
    }

    /// As [`connect`](Self::connect), with more protocol features.
    pub fn connect_with(
        socket: &Path,
        features: u64,
        more: VhostUserProtocolFeatures,
    ) -> io::Result<RawSession> {
        let mut session = RawSession::unnegotiated(socket)?;
        let frontend = &mut session.frontend;
        frontend.set_owner().map_err(other)?;
        let offered = frontend.get_features().map_err(other)?;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = offered & (features | protocol);
        frontend.set_features(features).map_err(other)?;
        let wanted = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | more;
        let offered = frontend.get_protocol_features().map_err(other)?;
        frontend.set_protocol_features(offered & wanted).map_err(other)?;
        if offered.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        session.features = features;
        Ok(session)
    }

    /// Connects, and says nothing.
    pub fn unnegotiated(socket: &Path) -> io::Result<RawSession> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let socket = stream.try_clone()?;
        // The queue number is checked on this side as well; a large maximum lets wrong ones
        // through.
        let frontend = Frontend::from_stream(stream, 64);
        let region = |name| -> io::Result<File> {
            let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
            ftruncate(&file, MEMORY_BYTES)?;
            Ok(file)
        };
        let (memory, plugged) = (region("raw-guest")?, region("raw-guest-plugged")?);
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        Ok(RawSession {
            frontend,
            socket,
            memory,
            plugged,
            kick,
            call,
            features: 0,
            size: 0,
            avail_index: 0,
            used_index: 0,
        })
    }

    /// Sends a message of any kind, with the wish for a reply; the flags and the body of that.
    pub fn ask(&self, request: u32, body: &[u8], fds: &[RawFd]) -> io::Result<(u32, Vec<u8>)> {
        let words = [request, 1 | 8, body.len() as u32];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend_from_slice(body);
        self.socket.send_with_fds(&[&bytes[..]], fds)?;
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header)?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        if word(0) != request {
            return Err(io::Error::other(format!("a reply to request {}", word(0))));
        }
        let mut body = vec![0; word(8) as usize];
        (&self.socket).read_exact(&mut body)?;
        Ok((word(4), body))
    }

    /// Connects, negotiates, and starts a ring of `size` descriptors.
    pub fn start(socket: &Path, features: u64, size: u16) -> io::Result<RawSession> {
        let mut session = RawSession::connect(socket, features)?;
        session.share_memory()?;
        session.start_ring(size)?;
        Ok(session)
    }

    /// Shares the memory region (SET_MEM_TABLE).
    pub fn share_memory(&self) -> io::Result<()> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: MEMORY_BYTES,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).map(drop).map_err(other)
    }

    /// Plugs a second region in, at [`PLUGGED_BASE`] plus `offset` (ADD_MEM_REG). Each such region
    /// shows the same memory.
    pub fn plug(&mut self, offset: u64) -> io::Result<()> {
        let region = self.plugged_region(offset);
        self.frontend.add_mem_region(&region).map(drop).map_err(other)
    }

    /// Plugs it out again (REM_MEM_REG).
    pub fn unplug(&mut self, offset: u64) -> io::Result<()> {
        let region = self.plugged_region(offset);
        self.frontend.remove_mem_region(&region).map_err(other)
    }

    fn plugged_region(&self, offset: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: PLUGGED_BASE + offset,
            memory_size: MEMORY_BYTES,
            userspace_addr: USER_BASE + PLUGGED_BASE + offset,
            mmap_offset: 0,
            mmap_handle: self.plugged.as_raw_fd(),
        }
    }

    /// Reads memory that can be plugged.
    pub fn get_plugged(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.plugged.read_exact_at(&mut bytes, offset).map(|()| bytes)
    }

    /// Writes memory that can be plugged.
    pub fn put_plugged(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.plugged.write_all_at(bytes, offset)
    }

    /// Ends the connection, from this side. Memory stays as it is, and can be looked at.
    pub fn hang_up(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Both)
    }

    /// Waits until the other side has ended the connection; `false` if it does not within `limit`.
    pub fn wait_for_end(&self, limit: Duration) -> io::Result<bool> {
        // Nothing is expected from there, so whatever comes is the end.
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let limit =
            Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        Ok(poll(&mut fds, Some(&limit))? > 0)
    }

    /// Plugs in as much memory as is wanted, at [`PLUGGED_BASE`] plus `offset`.
    pub fn plug_large(&mut self, offset: u64, len: u64) -> io::Result<LargeMemory> {
        let file = File::from(memfd_create("raw-guest-large", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, len)?;
        let handle = file.as_raw_fd();
        let region = VhostUserMemoryRegionInfo {
            memory_size: len,
            mmap_handle: handle,
            ..self.plugged_region(offset)
        };
        self.frontend.add_mem_region(&region).map(drop).map_err(other)?;
        Ok(LargeMemory { base: PLUGGED_BASE + offset, file })
    }

    /// Starts the ring, empty.
    pub fn start_ring(&mut self, size: u16) -> io::Result<()> {
        self.start_ring_at(size, 0)
    }

    /// Starts the ring, empty, for a driver that wants no interrupts: there is no call descriptor.
    pub fn start_polled_ring(&mut self, size: u16) -> io::Result<()> {
        self.set_up_ring(size, 0)?;
        self.frontend.set_vring_kick(0, &self.kick).map_err(other)?;
        self.frontend.set_vring_enable(0, true).map_err(other)
    }

    /// Reads the kick descriptor, as the device does.
    pub fn take_kicks(&self) {
        // Which may have been quicker.
        let _ = self.kick.read();
    }

    /// Starts the ring, empty, for a driver that has been running: everything up to `base` was
    /// answered somewhere else.
    pub fn start_ring_at(&mut self, size: u16, base: u16) -> io::Result<()> {
        self.set_up_ring(size, base)?;
        self.turn_on()
    }

    fn turn_on(&mut self) -> io::Result<()> {
        self.frontend.set_vring_call(0, &self.call).map_err(other)?;
        self.frontend.set_vring_kick(0, &self.kick).map_err(other)?;
        self.frontend.set_vring_enable(0, true).map_err(other)
    }

    fn set_up_ring(&mut self, size: u16, base: u16) -> io::Result<()> {
        for ring in [AVAIL, USED] {
            self.put(ring, &[0; 2])?;
            self.put(ring + 2, &base.to_le_bytes())?;
        }
        self.place_ring_at(size, base, base)
    }

    /// Starts the ring as it lies in memory, for a driver that has been running: it goes on at
    /// `base`, and has seen what was answered before `used`.
    pub fn resume_ring(&mut self, size: u16, base: u16, used: u16) -> io::Result<()> {
        self.place_ring_at(size, base, used)?;
        self.turn_on()
    }

    fn place_ring_at(&mut self, size: u16, base: u16, used: u16) -> io::Result<()> {
        let avail = self.get(AVAIL + 2, 2)?;
        self.avail_index = u16::from_le_bytes([avail[0], avail[1]]);
        (self.size, self.used_index) = (size, used);
        self.frontend.set_vring_num(0, size).map_err(other)?;
        self.frontend.set_vring_base(0, base).map_err(other)?;
        self.place_ring(DESCRIPTORS, AVAIL, USED)
    }

    /// Gives the device a new call descriptor (SET_VRING_CALL), as a frontend that reconnects does.
    pub fn renew_call(&mut self) -> io::Result<()> {
        self.call = EventFd::new(EFD_NONBLOCK)?;
        self.frontend.set_vring_call(0, &self.call).map_err(other)
    }

    /// Whether the device has called within `limit`, since it was asked last.
    pub fn was_called(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            match self.call.read() {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Err(_) if Instant::now() >= deadline => return Ok(false),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Says where the parts of the ring are, as offsets in the region; they may lie outside.
    pub fn place_ring(&self, descriptors: u64, avail: u64, used: u64) -> io::Result<()> {
        let ring = VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER_BASE.wrapping_add(descriptors),
            avail_ring_addr: USER_BASE.wrapping_add(avail),
            used_ring_addr: USER_BASE.wrapping_add(used),
            log_addr: None,
        };
        self.frontend.set_vring_addr(0, &ring).map_err(other)
    }

    /// Stops the ring; says the index of the next chain it would have taken.
    pub fn stop_ring(&self) -> io::Result<u32> {
        self.frontend.get_vring_base(0).map_err(other)
    }

    /// Writes guest memory; `offset` counts from the region's start.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, offset)
    }

    /// Reads guest memory.
    pub fn get(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, offset).map(|()| bytes)
    }

    /// Writes one entry of the ring's descriptor table.
    pub fn describe(&self, index: u16, descriptor: Descriptor) -> io::Result<()> {
        self.put(DESCRIPTORS + u64::from(index) * 16, &descriptor.bytes())
    }

    /// Writes a chain of descriptors, from table entry `head` on, linked in their order.
    pub fn chain(&self, head: u16, buffers: &[(u64, u32, u16)]) -> io::Result<()> {
        for (index, &(addr, len, flags)) in buffers.iter().enumerate() {
            let more = if index + 1 < buffers.len() { NEXT } else { 0 };
            let at = head + index as u16;
            self.describe(at, Descriptor { addr, len, flags: flags | more, next: at + 1 })?;
        }
        Ok(())
    }

    /// Offers the chain that starts at `head`, and kicks.
    pub fn offer(&mut self, head: u16) -> io::Result<()> {
        let place = u64::from(self.avail_index % self.size);
        self.put(AVAIL + 4 + place * 2, &head.to_le_bytes())?;
        self.jump(1)
    }

    /// Offers the chains that start at `heads`, all at once, and kicks.
    pub fn offer_all(&mut self, heads: &[u16]) -> io::Result<()> {
        for (index, head) in (self.avail_index..).zip(heads) {
            self.put(AVAIL + 4 + u64::from(index % self.size) * 2, &head.to_le_bytes())?;
        }
        self.jump(heads.len() as u16)
    }

    /// Moves the available index on by `count` entries, written or not, and kicks.
    pub fn jump(&mut self, count: u16) -> io::Result<()> {
        self.avail_index = self.avail_index.wrapping_add(count);
        self.put(AVAIL + 2, &self.avail_index.to_le_bytes())?;
        self.kick.write(1)
    }

    /// Reads one sector as the chain from head 0 on, which must be answered within `limit`; panics
    /// if it is not, or not well.
    pub fn assert_one_read(&mut self) {
        self.offer_read().expect("memory and a kick");
        assert_eq!(self.used(PATIENCE).expect("memory"), Some((0, 513)));
        assert_eq!(self.get(FREE + 0x1000, 1).expect("memory"), [0]);
    }

    /// Offers a read of one sector, as the chain from head 0 on.
    pub fn offer_read(&mut self) -> io::Result<()> {
        self.put(FREE, &[0; 16])?;
        self.put(FREE + 0x1000, &[0xee])?;
        let at = GUEST_BASE + FREE;
        self.chain(0, &[(at, 16, 0), (at + 0x2000, 512, WRITE), (at + 0x1000, 1, WRITE)])?;
        self.offer(0)
    }

    /// The next used entry, head and length; `None` when there is none within `limit`.
    pub fn used(&mut self, limit: Duration) -> io::Result<Option<(u32, u32)>> {
        let deadline = Instant::now() + limit;
        loop {
            let index = self.get(USED + 2, 2)?;
            if u16::from_le_bytes([index[0], index[1]]) != self.used_index {
                break;
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            thread::sleep(Duration::from_micros(200));
        }
        let place = u64::from(self.used_index % self.size);
        let entry = self.get(USED + 4 + place * 8, 8)?;
        self.used_index = self.used_index.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("4 bytes"));
        Ok(Some((word(0), word(4))))
    }
}

pub(super) fn other(error: vhost::Error) -> io::Error {
    io::Error::other(error.to_string())
}
