//! The same ring without the checking: for benchmarks, in which the client must not be what is
//! measured.
//!
//! A [`FastQueue`] allocates nothing per request, touches no data, and reads no clock. Its user
//! names each request by the slot whose buffer it uses and keeps to one request per slot. Requests
//! have one buffer in one piece, as a guest's page-sized ones mostly do.
//!
//! While it polls, the device is told once that no wake-up is wanted. Before it sleeps it asks
//! to be woken for the next completion, and looks once more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{OFlags, fcntl_setfl};
use virtio_driver::virtqueue::Virtqueue;
use virtio_driver::{EventFd, QueueNotifier};

use super::{Queue, Session, UNWRITTEN, Wire, answer_all, header, piece};

/// No slot.
const NONE: u16 = u16::MAX;

/// A queue for requests that are not checked.
pub struct FastQueue {
    // As in `Queue`: the ring borrows from memory that `session` owns, and is dropped first.
    ring: Virtqueue<'static, Wire>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    /// Where in the buffer memory each slot begins.
    slots: Box<[usize]>,
    slot_bytes: usize,
    /// Which slot a chain uses, by its first descriptor.
    slot_of: Box<[u16]>,
    in_flight: usize,
    answered: u16,
    session: Arc<Session>,
}

/// Wakes a queue that sleeps in [`FastQueue::sleep`], from any thread.
#[derive(Clone)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// Does it.
    pub fn wake(&self) {
        // It fails only if the counter is full, and then the sleeper is awake.
        let _ = self.0.write(1);
    }
}

impl FastQueue {
    /// Takes over an idle queue, with its first `slots` buffers.
    ///
    /// # Errors
    /// The call descriptor is not one.
    ///
    /// # Panics
    /// If requests are in flight, or the queue has fewer buffers.
    pub fn new(queue: Queue, slots: usize) -> io::Result<FastQueue> {
        assert_eq!(queue.in_flight, 0, "the queue must be idle");
        assert!(
            slots <= queue.free_slots.len(),
            "the queue has only {} slots",
            queue.free_slots.len()
        );
        let mut ring = queue.ring;
        ring.set_used_notif_enabled(false);
        // QEMU's side makes the descriptor, which is shared, non-blocking. Here a read is the
        // sleep.
        fcntl_setfl(&queue.call, OFlags::empty())?;
        Ok(FastQueue {
            slot_of: vec![NONE; usize::from(ring.queue_size())].into(),
            ring,
            kick: queue.kick,
            call: queue.call,
            slots: queue.free_slots[..slots].into(),
            slot_bytes: queue.slot_bytes,
            in_flight: 0,
            answered: 0,
            session: queue.session,
        })
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Requests that were submitted and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// For other threads, to end a sleep.
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.call))
    }

    /// Puts a read or write of `len` bytes at sector `sector` into the ring.
    ///
    /// `slot` must not be in use. Fails when the ring is full.
    #[inline]
    pub fn submit(&mut self, slot: u16, write: bool, sector: u64, len: usize) -> io::Result<()> {
        debug_assert!(len <= self.slot_bytes);
        let start = self.session.buffers.as_mut_ptr().wrapping_add(self.slots[usize::from(slot)]);
        let id = self.ring.add_request(|wire, add| {
            wire.header = header(u32::from(write), sector);
            wire.status = UNWRITTEN;
            add(piece(wire.header.as_mut_ptr(), 16), false)?;
            add(piece(start, len), !write)?;
            add(piece(&raw mut wire.status, 1), true)
        })?;
        self.slot_of[usize::from(id)] = slot;
        self.in_flight += 1;
        Ok(())
    }

    /// Tells the device about submitted requests, if it wants to be told.
    #[inline]
    pub fn kick(&mut self) -> io::Result<()> {
        // As in `Queue::kick`.
        fence(Ordering::SeqCst);
        if self.ring.avail_notif_needed() { self.kick.notify() } else { Ok(()) }
    }

    /// Appends the slots of all answered requests to `done`, and says how many of them failed.
    /// Never waits.
    #[inline]
    pub fn reap(&mut self, done: &mut Vec<u16>) -> u64 {
        let mut failed = 0;
        while let Some(completed) = self.ring.completions().next() {
            let slot = std::mem::replace(&mut self.slot_of[usize::from(completed.id)], NONE);
            if slot == NONE {
                // It was not asked for.
                failed += 1;
                continue;
            }
            self.in_flight -= 1;
            failed += u64::from(completed.req.status != 0);
            done.push(slot);
        }
        failed
    }

    /// Sleeps until the device signals a completion, or a [`Waker`] calls. Returns at once if there
    /// is one already.
    pub fn sleep(&mut self) -> io::Result<()> {
        self.ring.set_used_notif_enabled(true);
        // As in `Queue::wait`.
        fence(Ordering::SeqCst);
        if !self.ring.completions().has_next() {
            self.call.read()?;
        }
        self.ring.set_used_notif_enabled(false);
        Ok(())
    }

    /// Answers everything that was submitted, in place of the device, which must not have been
    /// kicked: what is left of the time is the client's own.
    pub fn answer_ourselves(&mut self) {
        self.answered = answer_all(&self.ring, self.answered);
    }
}
