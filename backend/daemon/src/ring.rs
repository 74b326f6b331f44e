//! One side of a virtqueue, batch by batch: taking chains, and giving back what has ended.
//!
//! The queue's own `add_used` publishes every element by itself and counts for the notification decision; here a whole batch is written and then
//! published with one store of the used index, so the decision is made here too (virtio 1.2, 2.7.7.2 and 2.7.8).
//!
//! Deliberately absent: what is in a chain (`virtio-blk`), who serves it (`proxy`), and the lock around the queue (the worker's).

use std::sync::atomic::{Ordering, fence};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes before the first element of either ring: `flags`, `idx` (2.7.6, 2.7.8).
const RING_HEADER: u64 = 4;
/// Bytes of an element of the used ring: `id`, `len` (2.7.8).
const USED_ELEMENT: u64 = 8;
/// Bytes of an element of the available ring (2.7.6).
const AVAIL_ELEMENT: u64 = 2;

/// A chain that goes back to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Used {
    /// The chain's first descriptor.
    pub(crate) head: u16,
    /// Bytes that the device wrote.
    pub(crate) len: u32,
}

/// Writes `used` to the used ring and publishes them together. Returns whether the driver wants to be told.
///
/// # Errors
/// The ring is outside of guest memory.
pub(crate) fn publish(queue: &mut Queue, memory: &GuestMemoryMmap, used: &[Used]) -> Result<bool, Error> {
    let ring = GuestAddress(queue.used_ring());
    let size = u64::from(queue.size());
    let old = queue.next_used();
    let mut next = old;
    for entry in used {
        let at = at(ring, RING_HEADER + u64::from(next) % size * USED_ELEMENT)?;
        let element = u64::from(entry.head) | u64::from(entry.len) << 32;
        memory.write_obj(element.to_le(), at).map_err(Error::GuestMemory)?;
        next = next.wrapping_add(1);
    }
    // Release: the driver that sees the index sees the elements, the data and the status bytes (2.7.8.2).
    memory.store(next.to_le(), at(ring, 2)?, Ordering::Release).map_err(Error::GuestMemory)?;
    queue.set_next_used(next);
    // The index is visible before we look whether the driver wants to know; the driver does it the other way round.
    fence(Ordering::SeqCst);
    wants_interrupt(queue, memory, old, next)
}

fn wants_interrupt(queue: &Queue, memory: &GuestMemoryMmap, old: u16, new: u16) -> Result<bool, Error> {
    let ring = GuestAddress(queue.avail_ring());
    if queue.event_idx_enabled() {
        // 2.7.7.2: `used_event` lies behind the available ring's elements.
        let event = at(ring, RING_HEADER + u64::from(queue.size()) * AVAIL_ELEMENT)?;
        let event = u16::from_le(memory.load(event, Ordering::Relaxed).map_err(Error::GuestMemory)?);
        // Whether `event` is among `old..new`, as the reference implementation `vring_need_event` computes it (2.7.10).
        return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
    }
    let flags = u16::from_le(memory.load(ring, Ordering::Relaxed).map_err(Error::GuestMemory)?);
    Ok(flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
}

fn at(base: GuestAddress, offset: u64) -> Result<GuestAddress, Error> {
    base.checked_add(offset).ok_or(Error::AddressOverflow)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;

    fn ring(event_idx: bool) -> (GuestMemoryMmap, Queue) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = Queue::new(8).unwrap();
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        (memory, queue)
    }

    fn used(heads: std::ops::Range<u16>) -> Vec<Used> {
        heads.map(|head| Used { head, len: u32::from(head) + 100 }).collect()
    }

    #[test]
    fn a_batch_is_published_whole_and_wraps() {
        let (memory, mut queue) = ring(false);
        queue.set_next_used(65534);
        assert!(publish(&mut queue, &memory, &used(0..4)).unwrap());
        assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 2);
        for (position, head) in [(6u64, 0u32), (7, 1), (0, 2), (1, 3)] {
            let element = GuestAddress(USED + 4 + position * 8);
            assert_eq!(memory.read_obj::<[u32; 2]>(element).unwrap(), [head, head + 100]);
        }
    }

    #[test]
    fn without_event_idx_the_flag_decides() {
        let (memory, mut queue) = ring(false);
        memory.write_obj(1u16, GuestAddress(AVAIL)).unwrap();
        assert!(!publish(&mut queue, &memory, &used(0..1)).unwrap());
        memory.write_obj(0u16, GuestAddress(AVAIL)).unwrap();
        assert!(publish(&mut queue, &memory, &used(1..2)).unwrap());
    }

    #[test]
    fn with_event_idx_a_batch_that_passes_the_event_interrupts_once() {
        let (memory, mut queue) = ring(true);
        let event = GuestAddress(AVAIL + 4 + 8 * 2);
        memory.write_obj(2u16, event).unwrap();
        assert!(!publish(&mut queue, &memory, &used(0..2)).unwrap(), "0 and 1 are before it");
        assert!(publish(&mut queue, &memory, &used(2..5)).unwrap(), "2 is among 2 to 4");
        assert!(!publish(&mut queue, &memory, &used(5..7)).unwrap(), "passed already");
        memory.write_obj(6u16, event).unwrap();
        assert!(!publish(&mut queue, &memory, &used(7..8)).unwrap(), "7 is behind it");
    }

    #[test]
    fn a_ring_outside_of_memory_is_an_error() {
        let (memory, mut queue) = ring(false);
        queue.set_used_ring_address(Some(0x20000), None);
        assert!(publish(&mut queue, &memory, &used(0..1)).is_err());
    }
}
