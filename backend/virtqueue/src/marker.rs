//! Marks what a worker has written into guest memory in a migration's log (`dirty.rs`).

use crate::dirty::{Bits, DirtyLog, LogSlot, mark};
use crate::memory::Snapshot;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// A region as a marker knows it.
#[derive(Clone)]
struct Known {
    /// Where it is mapped.
    host: usize,
    len: usize,
    guest: u64,
    /// None if its bits are not in the bitmap, or if there is none.
    bits: Option<Arc<dyn Bits>>,
}

/// Something was written where the bitmap has no bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the page at {0:#x} was written, and the migration's log has no bit for it")]
pub struct NotLogged(pub u64);

/// Marks what one worker has written.
#[derive(Default)]
pub struct Marker {
    /// Of the log, when its regions were looked up.
    version: u64,
    /// Of the memory map.
    map: u64,
    regions: Vec<Known>,
    /// The region that was found last.
    last: usize,
    missed: Option<NotLogged>,
}

impl Marker {
    /// Begins to mark what was written until now in `snapshot`.
    pub fn begin(&mut self, log: &DirtyLog, snapshot: &Snapshot) -> Marking<'_> {
        let version = log.version();
        if (version, snapshot.version()) != (self.version, self.map) {
            self.look_up(log, snapshot);
            (self.version, self.map) = (version, snapshot.version());
        }
        // Between what was written and the look at the bits.
        fence(Ordering::SeqCst);
        Marking(self)
    }

    #[cold]
    fn look_up(&mut self, log: &DirtyLog, snapshot: &Snapshot) {
        self.last = 0;
        self.regions.clear();
        self.regions.extend(snapshot.memory().iter().map(|region: &GuestRegionMmap<LogSlot>| {
            let host = region.get_host_address(MemoryRegionAddress(0)).map_or(0, |at| at as usize);
            Known {
                host,
                len: region.len() as usize,
                guest: region.start_addr().0,
                bits: log.bits_of(region),
            }
        }));
    }
}

/// What was written is being marked. All of it was written before this began.
pub struct Marking<'m>(&'m mut Marker);

impl Marking<'_> {
    /// So many bytes at this place were written.
    pub fn host(&mut self, at: *const u8, len: usize) {
        let at = at as usize;
        let is_in = |known: &Known| at.wrapping_sub(known.host) < known.len;
        self.find(is_in, |known| known.guest + (at - known.host) as u64, at as u64, len);
    }

    /// So many bytes at this guest address were written.
    pub fn guest(&mut self, at: u64, len: usize) {
        let is_in = |known: &Known| at.wrapping_sub(known.guest) < known.len as u64;
        self.find(is_in, |_| at, at, len);
    }

    fn find(
        &mut self,
        is_in: impl Fn(&Known) -> bool,
        guest: impl Fn(&Known) -> u64,
        at: u64,
        len: usize,
    ) {
        let Marker { regions, last, missed, .. } = &mut *self.0;
        if !regions.get(*last).is_some_and(&is_in) {
            match regions.iter().position(&is_in) {
                Some(index) => *last = index,
                None => {
                    missed.get_or_insert(NotLogged(at));
                    return;
                }
            }
        }
        let known = &regions[*last];
        match &known.bits {
            Some(bits) => mark(&**bits, guest(known), len),
            None => _ = missed.get_or_insert(NotLogged(guest(known))),
        }
    }

    /// Ends it.
    ///
    /// # Errors
    /// Some of it could not be marked.
    pub fn end(self) -> Result<(), NotLogged> {
        self.0.missed.take().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::GuestMemory;
    use std::sync::atomic::AtomicU8;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

    /// Two regions that adjoin, and one that is elsewhere.
    const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (0x4000, 0x4000), (0x10_0000, 0x2000)];

    /// A bitmap that has bits up to a guest address.
    #[derive(Debug)]
    struct Bitmap {
        bits: Vec<AtomicU8>,
        end: u64,
    }

    impl Bitmap {
        fn up_to(end: u64) -> Arc<Self> {
            Arc::new(Self { bits: (0..64).map(|_| AtomicU8::new(0)).collect(), end })
        }

        /// The pages that are marked; they are not any more.
        fn take(&self) -> Vec<u64> {
            let mut marked = Vec::new();
            for (byte, bits) in (0..).zip(&self.bits) {
                let bits = bits.swap(0, Ordering::SeqCst);
                marked.extend((0..8).filter(|bit| bits & 1 << bit != 0).map(|bit| byte * 8 + bit));
            }
            marked
        }
    }

    impl Bits for Bitmap {
        fn byte(&self, index: usize) -> &AtomicU8 {
            &self.bits[index]
        }

        fn has_room_for(&self, region: &GuestRegionMmap<LogSlot>) -> bool {
            region.start_addr().0 + region.len() <= self.end
        }
    }

    struct Fixture {
        log: Arc<DirtyLog>,
        memory: GuestMemoryAtomic<GuestMemory>,
        bits: Arc<Bitmap>,
        marker: Marker,
    }

    /// A memory map as all have it here, whose regions are new.
    fn map() -> GuestMemory {
        GuestMemory::from_ranges(&REGIONS.map(|(start, len)| (GuestAddress(start), len))).unwrap()
    }

    impl Fixture {
        fn new() -> Self {
            let (memory, log) = (map(), Arc::<DirtyLog>::default());
            log.bind(&memory);
            let memory = GuestMemoryAtomic::new(memory);
            Self { log, memory, bits: Bitmap::up_to(0), marker: Marker::default() }
        }

        /// As SET_LOG_BASE, of a bitmap that has bits for the first regions.
        fn give(&mut self, regions: usize) {
            let end = REGIONS[..regions].iter().map(|&(start, len)| start + len as u64).max();
            self.bits = Bitmap::up_to(end.unwrap());
            let bits = Arc::clone(&self.bits) as Arc<dyn Bits>;
            for region in self.memory.memory().iter().take(regions) {
                region.bitmap().set_bits(Arc::clone(&bits));
            }
            self.log.replace(bits);
            self.log.turn(true);
        }

        fn mark(&mut self, each: impl FnOnce(&mut Marking<'_>)) -> Result<(), NotLogged> {
            let snapshot = Snapshot::take(&self.memory, 1);
            let mut marking = self.marker.begin(&self.log, &snapshot);
            each(&mut marking);
            marking.end()
        }

        /// The pages that are marked; they are not any more.
        fn take(&self) -> Vec<u64> {
            self.bits.take()
        }
    }

    #[test]
    fn each_page_that_is_touched_is_marked_and_no_other() {
        let mut fixture = Fixture::new();
        fixture.give(3);
        for (at, len, pages) in [
            (0_u64, 1_usize, &[0_u64][..]),
            (0xfff, 1, &[0]),
            (0xfff, 2, &[0, 1]),
            (0x1000, 0x1000, &[1]),
            (0x1001, 0x1000, &[1, 2]),
            (0x4000, 0x3fff, &[4, 5, 6, 7]),
            (0x10_0fff, 2, &[0x100, 0x101]),
            (0x2000, 0, &[]),
        ] {
            assert_eq!(fixture.mark(|marking| marking.guest(at, len)), Ok(()));
            assert_eq!(fixture.take(), pages, "{len} at {at:#x}");
            let memory = fixture.memory.memory();
            let place = memory.get_host_address(GuestAddress(at)).unwrap();
            assert_eq!(fixture.mark(|marking| marking.host(place, len)), Ok(()));
            assert_eq!(fixture.take(), pages, "{len} at {at:#x}, where it is mapped");
        }
    }

    #[test]
    fn what_has_no_bit_is_told_of_once() {
        let mut fixture = Fixture::new();
        fixture.give(2);
        let missed = fixture.mark(|marking| {
            marking.guest(0x10_0800, 1);
            marking.guest(0x4000, 1);
            marking.guest(0x20_0000, 1);
        });
        assert_eq!((missed, fixture.take()), (Err(NotLogged(0x10_0800)), vec![4]));
        assert_eq!(fixture.mark(|marking| marking.guest(0, 1)), Ok(()));
        // A larger one comes.
        fixture.give(3);
        assert_eq!(fixture.mark(|marking| marking.guest(0x10_0800, 1)), Ok(()));
    }

    #[test]
    fn regions_of_an_earlier_map_are_marked_in_the_newest_bitmap() {
        for had_one in [false, true] {
            let mut fixture = Fixture::new();
            if had_one {
                fixture.give(3);
            }
            let before = Arc::clone(&fixture.bits);
            // A request is in flight with this.
            let snapshot = Snapshot::take(&fixture.memory, 1);
            let memory = map();
            fixture.log.bind(&memory);
            fixture.memory.lock().unwrap().replace(memory);
            fixture.give(3);
            let mut marking = fixture.marker.begin(&fixture.log, &snapshot);
            marking.guest(0x4000, 1);
            assert_eq!(marking.end(), Ok(()));
            assert_eq!((fixture.take(), before.take()), (vec![4], vec![]));
        }
    }

    #[test]
    fn another_bitmap_is_told_of_once_if_writes_are_marked() {
        let mut fixture = Fixture::new();
        let told = Arc::new(AtomicU8::new(0));
        fixture.log.on_replaced({
            let (told, log) = (Arc::clone(&told), Arc::downgrade(&fixture.log));
            move || {
                // It may look at what there is.
                assert_ne!(log.upgrade().unwrap().version(), 0);
                told.fetch_add(1, Ordering::Relaxed);
            }
        });
        fixture.give(2);
        assert_eq!(told.load(Ordering::Relaxed), 0, "nothing was marked when it came");
        fixture.give(3);
        assert_eq!(told.load(Ordering::Relaxed), 1);
        fixture.log.replace(Arc::clone(&fixture.bits) as Arc<dyn Bits>);
        assert_eq!(told.load(Ordering::Relaxed), 1, "for the next region");
        fixture.log.turn(false);
        fixture.give(3);
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_bit_that_is_cleared_is_set_again() {
        let mut fixture = Fixture::new();
        fixture.give(3);
        for _ in 0..3 {
            fixture.mark(|marking| marking.guest(0x1000, 1)).unwrap();
            fixture.mark(|marking| marking.guest(0x1800, 1)).unwrap();
            assert_eq!(fixture.take(), [1]);
        }
    }

    #[test]
    fn what_is_written_through_the_library_is_marked_while_the_log_is_on() {
        let mut fixture = Fixture::new();
        let memory = fixture.memory.clone();
        let write = |at| memory.memory().write_obj(7_u64, GuestAddress(at)).unwrap();
        write(0x1000);
        fixture.give(3);
        write(0x4ffc);
        assert_eq!(fixture.take(), [4, 5]);
        fixture.log.turn(false);
        write(0x4ffc);
        assert_eq!(fixture.take(), [0; 0]);
    }
}
