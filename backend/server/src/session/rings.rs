//! A ring as `vhost-user-backend` keeps it, with two things more: a driver that is given a call
//! descriptor is called, and the session hears of what the library does not tell it.
//!
//! A frontend that reconnects gives a new one, and the driver may be waiting for an interrupt that
//! the old one was to bring. With event indices it would wait for ever: `used_event` is behind, so
//! nothing that ends later calls it either. A call too many is one that drivers are used to.

use crate::log_limit;
use log::Level;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};
use virtqueue::GuestMemory;
use vm_memory::GuestMemoryAtomic;

type Memory = GuestMemoryAtomic<GuestMemory>;

/// What happens to a ring, on the thread of the frontend's messages and before its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// It is to have a size that it cannot have (SET_VRING_NUM). It does not start until it has
    /// another. If it runs, it goes on with the size that it has until the session ends.
    IsRefused(u16),
    /// It is given a size that it can have (SET_VRING_NUM).
    HasSize,
    /// It is given another size than it had when it ran before, as after RESET_DEVICE.
    IsResized,
    /// It is to go on at a position that is neither the beginning nor where it was left in this
    /// session (SET_VRING_BASE).
    ComesFromElsewhere,
    /// It starts: with the first SET_VRING_KICK or SET_VRING_CALL with a kick descriptor there, or
    /// when it is enabled after that. It may be told of one that runs already.
    Starts,
}

/// What hears of it.
struct Listener {
    /// The largest size that the ring can have.
    largest: u16,
    tell: Box<dyn Fn(Event) + Send + Sync>,
}

/// One ring.
#[derive(Clone)]
pub(crate) struct Vring {
    ring: VringMutex<Memory>,
    listener: Arc<OnceLock<Listener>>,
    is_refused: Arc<AtomicBool>,
    /// It runs and was told once more where it is, as when a migration's log is turned on and off
    /// (SET_VRING_ADDR); it goes on where its worker is.
    stays: Arc<AtomicBool>,
    /// It was reset, and not told since where it is. The library keeps it ready.
    was_reset: Arc<AtomicBool>,
}

impl Vring {
    /// The largest ring that there is (virtio 1.2, 2.7). The library is told that each may be so
    /// large, because it would refuse a larger one without saying what to do.
    pub(crate) const LARGEST: u16 = 1 << 15;

    /// Tells `tell` of every [`Event`] from now on, and refuses sizes above `largest`, which is the
    /// size until there is another. A second listener is not told.
    pub(crate) fn listen(&self, largest: u16, tell: impl Fn(Event) + Send + Sync + 'static) {
        self.listener.get_or_init(|| {
            self.ring.set_queue_size(largest);
            Listener { largest, tell: Box::new(tell) }
        });
    }

    /// The device is reset (RESET_DEVICE): what drives the ring from now on begins anew.
    pub(crate) fn reset(&self) {
        self.was_reset.store(true, Ordering::Relaxed);
    }

    fn tell(&self, event: Event) {
        if let Some(listener) = self.listener.get() {
            (listener.tell)(event);
        }
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = <VringMutex<Memory> as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = <VringMutex<Memory> as VringStateMutGuard<'a, Memory>>::G;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(memory, max_queue_size).map(|ring| Self {
            ring,
            listener: Arc::default(),
            is_refused: Arc::default(),
            stays: Arc::default(),
            was_reset: Arc::default(),
        })
    }

    fn set_call(&self, file: Option<File>) {
        self.ring.set_call(file);
        // It fails if there is no descriptor to write to, and then no driver waits for it.
        let _ = self.ring.signal_used_queue();
    }

    #[inline]
    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.ring.get_ref()
    }

    #[inline]
    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.ring.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.ring.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.ring.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.ring.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.ring.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.ring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        // RESET_DEVICE leaves a ring ready, so it starts again here and nowhere else.
        if enabled && self.ring.get_ref().get_queue().ready() {
            self.tell(Event::Starts);
        }
        self.ring.set_enabled(enabled);
    }

    fn set_queue_info(
        &self,
        desc_table: u64,
        avail_ring: u64,
        used_ring: u64,
    ) -> Result<(), Error> {
        if self.is_refused.load(Ordering::Relaxed) {
            // SET_VRING_NUM could not be refused.
            return Err(Error::InvalidSize);
        }
        let state = self.ring.get_ref();
        let queue = state.get_queue();
        let now = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
        let is_same = queue.ready() && now == (desc_table, avail_ring, used_ring);
        drop(state);
        // It is told where it is now, whatever it was before.
        let was_reset = self.was_reset.swap(false, Ordering::Relaxed);
        let stays = is_same && !was_reset;
        self.stays.store(stays, Ordering::Relaxed);
        if stays {
            return Ok(());
        }
        self.ring.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        if base != 0 && base != self.ring.queue_next_avail() {
            self.tell(Event::ComesFromElsewhere);
        }
        self.ring.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        // What the library found in the ring may be old by now.
        if self.stays.swap(false, Ordering::Relaxed) {
            return;
        }
        self.ring.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.ring.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        let largest = self.listener.get().map_or(Self::LARGEST, |listener| listener.largest);
        let is_refused = num > largest || !num.is_power_of_two();
        self.is_refused.store(is_refused, Ordering::Relaxed);
        if is_refused {
            self.tell(Event::IsRefused(num));
            return;
        }
        self.tell(Event::HasSize);
        let state = self.ring.get_ref();
        let (queue, is_enabled) = (state.get_queue(), state.is_enabled());
        let (is_set_up, is_other) = (queue.ready(), queue.size() != num);
        drop(state);
        if is_set_up && is_other && is_enabled {
            // The library has no error for it, and what is in flight goes by the size.
            log_limit::say(
                Level::Warn,
                "size of a running ring",
                format_args!("the frontend gives a running ring {num} entries; it keeps its size"),
            );
            return;
        }
        self.ring.set_queue_size(num);
        if is_set_up && is_other {
            self.tell(Event::IsResized);
        }
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.ring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        if ready {
            self.tell(Event::Starts);
        }
        self.ring.set_queue_ready(ready && !self.is_refused.load(Ordering::Relaxed));
    }

    fn set_kick(&self, file: Option<File>) {
        self.ring.set_kick(file);
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.ring.read_kick() {
            // A frontend that writes to the descriptor itself may read it, too, between the event
            // and this. An error would end the thread.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(self.ring.get_ref().is_enabled())
            }
            read => read,
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.ring.set_err(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw_fd;
    use std::sync::Mutex;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    const LARGEST: u16 = 64;

    /// A ring, and what has been told of it.
    fn ring() -> (Vring, Arc<Mutex<Vec<Event>>>) {
        let memory = GuestMemoryAtomic::new(crate::testing::map());
        let ring = Vring::new(memory, Vring::LARGEST).unwrap();
        let told = Arc::<Mutex<Vec<Event>>>::default();
        ring.listen(LARGEST, {
            let told = Arc::clone(&told);
            move |event| told.lock().unwrap().push(event)
        });
        (ring, told)
    }

    fn take(told: &Mutex<Vec<Event>>) -> Vec<Event> {
        std::mem::take(&mut told.lock().unwrap())
    }

    #[test]
    fn a_ring_has_the_largest_size_until_it_has_another() {
        let (ring, told) = ring();
        assert_eq!(ring.get_ref().get_queue().size(), LARGEST);
        ring.set_queue_size(16);
        assert_eq!((ring.get_ref().get_queue().size(), take(&told)), (16, vec![Event::HasSize]));
    }

    #[test]
    fn a_size_that_cannot_be_is_refused_until_there_is_another() {
        let (ring, told) = ring();
        for size in [0, 48, 2 * LARGEST] {
            ring.set_queue_size(size);
            assert_eq!(take(&told), [Event::IsRefused(size)]);
            assert!(ring.set_queue_info(0x1000, 0x2000, 0x3000).is_err(), "{size}");
            ring.set_queue_ready(true);
            assert!(!ring.get_ref().get_queue().ready(), "{size}");
            assert_eq!(ring.get_ref().get_queue().size(), LARGEST, "{size}");
            take(&told);
        }
        ring.set_queue_size(LARGEST);
        ring.set_queue_info(0x1000, 0x2000, 0x3000).unwrap();
        ring.set_queue_ready(true);
        assert!(ring.get_ref().get_queue().ready());
        assert_eq!(take(&told), [Event::HasSize, Event::Starts]);
    }

    #[test]
    fn a_ring_that_runs_keeps_its_size() {
        let (ring, told) = ring();
        ring.set_queue_size(16);
        ring.set_queue_info(0x1000, 0x2000, 0x3000).unwrap();
        ring.set_queue_ready(true);
        ring.set_enabled(true);
        take(&told);
        let size = || ring.get_ref().get_queue().size();
        for same_or_not in [16, 32, 8] {
            ring.set_queue_size(same_or_not);
            assert_eq!((size(), take(&told)), (16, vec![Event::HasSize]));
        }
        // As after RESET_DEVICE.
        ring.set_enabled(false);
        ring.set_queue_size(16);
        assert_eq!(take(&told), [Event::HasSize]);
        ring.set_queue_size(32);
        assert_eq!((size(), take(&told)), (32, vec![Event::HasSize, Event::IsResized]));
        ring.set_queue_ready(false);
        ring.set_queue_size(8);
        assert_eq!((size(), take(&told)), (8, vec![Event::HasSize]));
    }

    #[test]
    fn a_start_is_told_of_however_it_comes() {
        let (ring, told) = ring();
        ring.set_enabled(true);
        assert_eq!(take(&told), [], "it is not ready");
        ring.set_queue_ready(true);
        assert_eq!(take(&told), [Event::Starts]);
        ring.set_enabled(false);
        ring.set_enabled(true);
        assert_eq!(take(&told), [Event::Starts], "as after RESET_DEVICE");
        ring.set_queue_ready(false);
        assert_eq!(take(&told), []);
    }

    #[test]
    fn a_position_from_elsewhere_is_told_of() {
        let (ring, told) = ring();
        for (base, is_elsewhere) in [(0, false), (7, true), (7, false), (0, false), (9, true)] {
            ring.set_queue_next_avail(base);
            let expected: &[_] = if is_elsewhere { &[Event::ComesFromElsewhere] } else { &[] };
            assert_eq!(take(&told), expected, "{base}");
            assert_eq!(ring.queue_next_avail(), base);
        }
    }

    #[test]
    fn a_new_call_descriptor_is_called() {
        let (ring, _) = ring();
        ring.set_call(None);
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        ring.set_call(Some(File::from(raw_fd::dup(&call).unwrap())));
        assert_eq!(call.read().unwrap(), 1);
    }

    #[test]
    fn a_kick_that_another_has_read_is_one() {
        let (ring, _) = ring();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        ring.set_kick(Some(File::from(raw_fd::dup(&kick).unwrap())));
        assert!(!ring.read_kick().unwrap());
        ring.set_enabled(true);
        assert!(ring.read_kick().unwrap());
        kick.write(1).unwrap();
        assert!(ring.read_kick().unwrap() && kick.read().is_err());
    }

    #[test]
    fn a_second_listener_is_not_told() {
        let (ring, told) = ring();
        ring.listen(2 * LARGEST, |_| panic!("it is told"));
        ring.set_queue_size(2 * LARGEST);
        assert_eq!(take(&told), [Event::IsRefused(2 * LARGEST)]);
    }
}
