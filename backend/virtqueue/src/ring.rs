//! One side of a virtqueue, batch by batch: what has come, giving back what has ended, and
//! which side wakes the other.
//!
//! The queue's own `add_used` publishes every element by itself and counts for the notification
//! decision, and looks every address up anew; here a whole batch is written through a [`RingView`]
//! and then published with one store of the used index, so the decisions are made here too (virtio
//! 1.2, 2.7.7 to 2.7.10). The queue stays the owner of the positions.
//!
//! Deliberately absent: what is in a chain (`virtio-blk`), which domain serves it (`proxy`), and
//! the lock around the queue (the worker's).

use crate::inflight::Tracker;
use crate::view::{RingView, Used};
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Error, Queue, QueueT};

/// How many chains wait to be taken.
///
/// # Errors
/// More than the ring has room for: the driver's index makes no sense.
#[inline]
pub fn waiting(queue: &Queue, view: &RingView) -> Result<u16, Error> {
    let waiting = view.avail_idx().wrapping_sub(queue.next_avail());
    if waiting > view.size() { Err(Error::InvalidAvailRingIndex) } else { Ok(waiting) }
}

/// Writes `used` to the used ring and publishes them together. Returns whether the driver wants to
/// be told.
#[inline]
pub fn publish_used(queue: &mut Queue, view: &RingView, used: &[Used]) -> bool {
    let old = queue.next_used();
    let mut next = old;
    for &entry in used {
        view.set_used(next, entry);
        next = next.wrapping_add(1);
    }
    view.set_used_idx(next);
    told(queue, view, old, next)
}

/// As [`publish_used`], of a queue whose requests are tracked.
///
/// The order is that of the specification, and all that stands between a process that is killed
/// here and a request that is lost or done twice: which requests it is, then the used index, then
/// that they are in flight no more (`inflight/mod.rs`).
#[inline]
pub fn publish_tracked(
    queue: &mut Queue,
    view: &RingView,
    used: &[Used],
    tracker: &mut Tracker,
) -> bool {
    let old = queue.next_used();
    let mut next = old;
    if tracker.has_unmarked() {
        tracker.chain_marked(used, old);
        for &entry in used {
            view.set_used(next, entry);
            next = next.wrapping_add(1);
        }
    } else {
        let mut last = tracker.last_batch_head();
        for &entry in used {
            view.set_used(next, entry);
            last = tracker.chain(entry.head, last);
            next = next.wrapping_add(1);
        }
        tracker.chained(last);
    }
    view.set_used_idx(next);
    tracker.published(used, next);
    told(queue, view, old, next)
}

/// The used index went from `old` to `next`. Returns whether the driver wants to be told.
#[inline(always)]
fn told(queue: &mut Queue, view: &RingView, old: u16, next: u16) -> bool {
    queue.set_next_used(next);
    // The index is visible before we look whether the driver wants to know; the driver does it the
    // other way round.
    fence(Ordering::SeqCst);
    wants_interrupt(view, old, next)
}

#[inline]
fn wants_interrupt(view: &RingView, old: u16, new: u16) -> bool {
    if view.event_idx() {
        // Whether `used_event` is among `old..new`, as the reference implementation
        // `vring_need_event` computes it (2.7.10).
        return new.wrapping_sub(view.used_event()).wrapping_sub(1) < new.wrapping_sub(old);
    }
    view.avail_flags() & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
}

/// Asks the driver not to kick. With event indices that is so without saying it: a kick is due
/// once, when the index passes what [`enable_notification`] has said.
#[inline]
pub fn disable_notification(view: &RingView) {
    if !view.event_idx() {
        view.set_used_flags(VRING_USED_F_NO_NOTIFY as u16);
    }
}

/// Asks the driver to kick for the next chain. Returns whether one has come already, for which
/// there may be no kick.
#[inline]
pub fn enable_notification(queue: &Queue, view: &RingView) -> bool {
    if view.event_idx() {
        view.set_avail_event(queue.next_avail());
    } else {
        view.set_used_flags(0);
    }
    // What we ask for is visible before we look whether something has come; the driver does it the
    // other way round (2.7.10).
    fence(Ordering::SeqCst);
    view.avail_idx() != queue.next_avail()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::GuestMemory;
    use crate::memory::Snapshot;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;

    struct Fixture {
        memory: GuestMemoryAtomic<GuestMemory>,
        queue: Queue,
        view: RingView,
    }

    impl Fixture {
        fn new(event_idx: bool) -> Self {
            let map = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            let memory = GuestMemoryAtomic::new(map);
            let mut queue = Queue::new(8).unwrap();
            queue.set_avail_ring_address(Some(AVAIL as u32), None);
            queue.set_used_ring_address(Some(USED as u32), None);
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            let view = RingView::new(&Snapshot::take(&memory, 1), &queue).unwrap();
            Self { memory, queue, view }
        }

        fn publish(&mut self, heads: std::ops::Range<u16>) -> bool {
            let used: Vec<_> =
                heads.map(|head| Used { head, len: u32::from(head) + 100 }).collect();
            publish_used(&mut self.queue, &self.view, &used)
        }

        fn write(&self, at: u64, value: u16) {
            self.memory.memory().write_obj(value, GuestAddress(at)).unwrap();
        }

        fn read(&self, at: u64) -> u16 {
            self.memory.memory().read_obj(GuestAddress(at)).unwrap()
        }
    }

    #[test]
    fn a_batch_is_published_whole_and_wraps() {
        let mut ring = Fixture::new(false);
        ring.queue.set_next_used(65534);
        assert!(ring.publish(0..4));
        assert_eq!((ring.read(USED + 2), ring.queue.next_used()), (2, 2));
        for (position, head) in [(6u64, 0u32), (7, 1), (0, 2), (1, 3)] {
            let element = GuestAddress(USED + 4 + position * 8);
            let element = ring.memory.memory().read_obj::<[u32; 2]>(element).unwrap();
            assert_eq!(element, [head, head + 100]);
        }
    }

    #[test]
    fn without_event_idx_the_flag_decides() {
        let mut ring = Fixture::new(false);
        ring.write(AVAIL, 1);
        assert!(!ring.publish(0..1));
        ring.write(AVAIL, 0);
        assert!(ring.publish(1..2));
    }

    #[test]
    fn with_event_idx_a_batch_that_passes_the_event_interrupts_once() {
        let mut ring = Fixture::new(true);
        let event = AVAIL + 4 + 8 * 2;
        ring.write(event, 2);
        assert!(!ring.publish(0..2), "0 and 1 are before it");
        assert!(ring.publish(2..5), "2 is among 2 to 4");
        assert!(!ring.publish(5..7), "passed already");
        ring.write(event, 6);
        assert!(!ring.publish(7..8), "7 is behind it");
    }

    #[test]
    fn with_event_idx_the_event_is_found_across_the_wrap() {
        let mut ring = Fixture::new(true);
        ring.queue.set_next_used(65534);
        ring.write(AVAIL + 4 + 8 * 2, 1);
        assert!(!ring.publish(0..3), "65534, 65535 and 0 are before it");
        assert!(ring.publish(3..4));
    }

    #[test]
    fn what_waits_is_counted_across_the_wrap_and_no_more_than_fits() {
        let mut ring = Fixture::new(false);
        ring.queue.set_next_avail(65533);
        for (idx, expected) in
            [(65533, Some(0)), (0, Some(3)), (5, Some(8)), (6, None), (65532, None)]
        {
            ring.write(AVAIL + 2, idx);
            assert_eq!(waiting(&ring.queue, &ring.view).ok(), expected, "{idx}");
        }
    }

    #[test]
    fn kicks_are_refused_and_asked_for() {
        let mut ring = Fixture::new(false);
        disable_notification(&ring.view);
        assert_eq!(ring.read(USED), 1);
        assert!(!enable_notification(&ring.queue, &ring.view));
        assert_eq!(ring.read(USED), 0);
        ring.write(AVAIL + 2, 1);
        assert!(enable_notification(&ring.queue, &ring.view), "it has come before we asked");
        ring.queue.set_next_avail(1);
        assert!(!enable_notification(&ring.queue, &ring.view));

        let mut ring = Fixture::new(true);
        ring.queue.set_next_avail(65535);
        ring.write(AVAIL + 2, 65535);
        disable_notification(&ring.view);
        assert_eq!(ring.read(USED), 0, "the flag means nothing with event indices (2.7.10.1)");
        assert!(!enable_notification(&ring.queue, &ring.view));
        assert_eq!(ring.read(USED + 4 + 8 * 8), 65535);
    }
}
