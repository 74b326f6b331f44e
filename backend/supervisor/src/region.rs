//! In-flight regions, from outside: how large one is, what is marked in it.
//!
//! The server writes them, through a mapping. What is looked at here is looked at after the
//! server's death, with `pread`: nothing writes it then, and a file that is too short is an error
//! and no signal.

use crate::descriptor::Descriptor;
use channel::{InflightRegion, Quarantined, memfd};
use rustix::fs::{SealFlags, fcntl_add_seals, fstat, ftruncate};
use serde::{Deserialize, Serialize};
use std::io;

/// Bytes before a queue's entries: features, version, number of entries, last batch, used index.
const HEADER: u64 = 16;
/// Bytes of an entry: the mark, padding, the next of the batch, the counter.
const ENTRY: u64 = 16;
/// What a queue's part begins at.
const ALIGN: u64 = 64;
/// The largest size of a ring.
const LARGEST: u16 = 1024;
/// More queues than any device of ours has are not looked at.
const QUEUES: u16 = 64;

/// Bytes of one queue's part.
const fn part(queue_size: u16) -> u64 {
    (HEADER + queue_size as u64 * ENTRY).next_multiple_of(ALIGN)
}

/// A region and its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Where it lies.
    pub place: InflightRegion,
    /// In what.
    pub memfd: Descriptor,
}

impl Region {
    /// A new one, with nothing in it.
    ///
    /// # Errors
    /// There is no memory, or no descriptor.
    pub fn new(queues: u16, queue_size: u16) -> io::Result<Self> {
        let queue_size = queue_size.clamp(1, 32768);
        let len = u64::from(queues.max(1)) * part(queue_size);
        let memfd = memfd("hotswap-inflight")?;
        ftruncate(&memfd, len)?;
        // A frontend that made it shorter would end the server that has it mapped.
        fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let place = InflightRegion { offset: 0, len, queues, queue_size, leaves: false };
        Ok(Self { place, memfd: memfd.into() })
    }

    /// One for a frontend that does not bring any.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn own(queues: u16) -> io::Result<Self> {
        Self::new(queues, LARGEST)
    }

    /// The same, in which a ring that is stopped leaves what is in flight, or does not.
    #[must_use]
    pub fn leaving(mut self, leaves: bool) -> Self {
        self.place.leaves = leaves;
        self
    }

    /// One that a frontend brings. It is sealed against being cut short, if it can be: all that
    /// QEMU brings can, or is. One that cannot be is [looked at](Self::is_cut_short) when a server
    /// has died.
    ///
    /// # Errors
    /// It is not where the frontend says, or has no room for what it is to hold.
    pub fn given(place: InflightRegion, memfd: Descriptor) -> Result<Self, String> {
        // Before its length is looked at.
        let _ = fcntl_add_seals(&memfd, SealFlags::SHRINK);
        let stat = fstat(&memfd).map_err(|error| format!("it cannot be looked at: {error}"))?;
        let end = place.offset.checked_add(place.len);
        if end.is_none_or(|end| end > stat.st_size as u64) {
            return Err(format!(
                "it ends at {} + {}, and its file at {}",
                place.offset, place.len, stat.st_size
            ));
        }
        let needed = u64::from(place.queues) * part(place.queue_size);
        if place.queues == 0 || place.queue_size == 0 || place.len < needed {
            return Err(format!(
                "it has {} bytes for {} queues of {}, which take {needed}",
                place.len, place.queues, place.queue_size
            ));
        }
        Ok(Self { place, memfd })
    }

    /// Whether its file ends before it does.
    #[must_use]
    pub fn is_cut_short(&self) -> bool {
        let end = self.place.offset + u64::from(self.place.queues) * part(self.place.queue_size);
        fstat(&self.memfd).map_or(true, |stat| (stat.st_size as u64) < end)
    }

    /// The request of each queue that has been in flight for the longest time.
    #[must_use]
    pub fn oldest(&self) -> Vec<Quarantined> {
        (0..self.place.queues.min(QUEUES)).filter_map(|queue| self.oldest_of(queue)).collect()
    }

    /// The frontend was told where a ring has stopped. If nothing of it is in flight, what the
    /// region has of it is forgotten: the ring may start anew anywhere.
    pub fn ring_has_stopped(&self, queue: u32) {
        let Ok(queue) = u16::try_from(queue) else { return };
        if queue < self.place.queues && self.oldest_of(queue).is_none() {
            let at = self.place.offset + u64::from(queue) * part(self.place.queue_size);
            // What fails here was no region.
            let _ = rustix::io::pwrite(&self.memfd, &[0; HEADER as usize], at);
        }
    }

    /// A queue's ring is on, and no server has it. To be called while nothing writes the region.
    pub fn give(&self, queue: u32) {
        self.write_features(queue, 1);
    }

    /// Whether no server has taken anything from a queue's ring since that was set up with nothing
    /// in flight: where it begins is what the frontend says.
    #[must_use]
    pub fn is_fresh(&self, queue: u32) -> bool {
        let mut version = [0; 2];
        let Some(at) = self.part_at(queue) else { return true };
        !matches!(rustix::io::pread(&self.memfd, &mut version, at + 8), Ok(2) if version != [0; 2])
    }

    /// Whether the server has looked at what a queue has in flight, since it was
    /// [given](Self::give) the region.
    #[must_use]
    pub fn is_taken_up(&self, queue: u32) -> bool {
        let mut features = [0; 8];
        let Some(at) = self.part_at(queue) else { return true };
        !matches!(rustix::io::pread(&self.memfd, &mut features, at), Ok(8) if features != [0; 8])
    }

    fn write_features(&self, queue: u32, features: u64) {
        if let Some(at) = self.part_at(queue) {
            // What fails here was no region.
            let _ = rustix::io::pwrite(&self.memfd, &features.to_le_bytes(), at);
        }
    }

    fn part_at(&self, queue: u32) -> Option<u64> {
        let is_there = queue < u32::from(self.place.queues);
        is_there.then(|| self.place.offset + u64::from(queue) * part(self.place.queue_size))
    }

    fn oldest_of(&self, queue: u16) -> Option<Quarantined> {
        let at = self.place.offset + u64::from(queue) * part(self.place.queue_size);
        let mut header = [0; HEADER as usize];
        self.read(at, &mut header)?;
        let version = u16::from_le_bytes([header[8], header[9]]);
        let count = u16::from_le_bytes([header[10], header[11]]).min(self.place.queue_size);
        if version == 0 {
            return None;
        }
        let mut entries = vec![0; usize::from(count) * ENTRY as usize];
        self.read(at + HEADER, &mut entries)?;
        let entries = entries.chunks_exact(ENTRY as usize).enumerate();
        let marked = entries.filter(|(_, entry)| entry[0] != 0);
        let oldest = marked.map(|(head, entry)| {
            (u64::from_le_bytes(entry[8..].try_into().unwrap_or_default()), head as u16)
        });
        oldest.min().map(|(counter, head)| Quarantined { queue, head, counter })
    }

    /// Reads from the region's file; none if it has not as much.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Option<()> {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pread(&self.memfd, &mut bytes[done..], at + done as u64) {
                Ok(0) => return None,
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return None,
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(region: &Region, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&region.memfd, bytes, at).unwrap(), bytes.len());
    }

    #[test]
    fn a_region_is_as_large_as_its_queues_take() {
        for (queues, size, len) in [(1, 128, 2112), (1, 256, 4160), (2, 128, 4224)] {
            assert_eq!(Region::new(queues, size).unwrap().place.len, len);
        }
    }

    #[test]
    fn the_oldest_of_each_queue_is_found() {
        let region = Region::new(2, 4).unwrap();
        assert_eq!(region.oldest(), []);
        let (second, entry) = (part(4), |head: u64| HEADER + head * ENTRY);
        // Not initialized: whatever it holds.
        write(&region, entry(0), &[1]);
        assert_eq!(region.oldest(), []);
        write(&region, 8, &[1, 0, 4, 0]);
        write(&region, second + 8, &[1, 0, 4, 0]);
        for (head, counter) in [(0, 9_u64), (2, 7), (3, 8)] {
            write(&region, second + entry(head), &[1]);
            write(&region, second + entry(head) + 8, &counter.to_le_bytes());
        }
        let of = |queue, head, counter| Quarantined { queue, head, counter };
        assert_eq!(region.oldest(), [of(0, 0, 0), of(1, 2, 7)]);
    }

    #[test]
    fn a_queue_that_is_given_is_taken_up_when_its_features_are_written() {
        let region = Region::new(2, 4).unwrap();
        assert!(region.is_taken_up(1));
        region.give(1);
        assert_eq!([0, 1, 2].map(|queue| region.is_taken_up(queue)), [true, false, true]);
        write(&region, part(4), &[0; 8]);
        assert!(region.is_taken_up(1));
        assert!(region.is_fresh(1));
        write(&region, part(4) + 8, &[1, 0]);
        assert_eq!([0, 1, 2].map(|queue| region.is_fresh(queue)), [true, false, true]);
    }

    #[test]
    fn what_a_frontend_brings_is_not_cut_short_or_that_is_seen() {
        let place = Region::new(2, 128).unwrap().place;
        // As QEMU's and libvhost-user's, and as others'.
        let memfd = Descriptor::from(channel::memfd("inflight").unwrap());
        let file = Descriptor::from(std::os::fd::OwnedFd::from(tempfile::tempfile().unwrap()));
        for (file, is_sealed) in [(memfd, true), (file, false)] {
            ftruncate(&file, place.len).unwrap();
            let region = Region::given(place, file.clone()).unwrap();
            assert!(!region.is_cut_short());
            assert_eq!(ftruncate(&file, 4096).is_err(), is_sealed);
            assert_eq!(region.is_cut_short(), !is_sealed);
        }
    }

    #[test]
    fn a_region_that_is_not_there_is_refused() {
        let own = Region::new(2, 128).unwrap();
        let given = |place| Region::given(place, own.memfd.clone());
        assert!(given(own.place).is_ok());
        let good = own.place;
        for bad in [
            InflightRegion { len: good.len + 1, ..good },
            InflightRegion { offset: 1, ..good },
            InflightRegion { offset: u64::MAX, ..good },
            InflightRegion { queues: 3, ..good },
            InflightRegion { queue_size: 256, ..good },
            InflightRegion { queues: 0, ..good },
        ] {
            assert!(given(bad).is_err(), "{bad:?}");
        }
    }
}
