//! The configuration space: `struct virtio_blk_config` as bytes, and the one byte in it that the
//! driver may write.
//!
//! The bytes are made once from what the domain announces and do not change while the device lives,
//! except for `writeback`. A newer frontend knows fields that we do not, and gets zeros there. A
//! range that is elsewhere is refused: zeros in its place would be a disk of no size.
//!
//! Fields whose feature is not offered are zero. Deliberately absent: geometry, secure erase,
//! zones.

use crate::features::{self, CONFIG_WCE, FLUSH};
use crate::write_cache::{Belief, WriteCache};
use domain_abi::{Capabilities, DeviceInfo};

/// The unit of `sector` and of lengths, whatever the block size is (5.2.4, 5.2.6.1).
pub const SECTOR_SIZE: u64 = 512;
/// Size of `struct virtio_blk_config` (5.2.4).
pub const CONFIG_SIZE: usize = 72;

/// Most data segments that the driver is asked to put into a request: what Linux and its indirect
/// tables are comfortable with. A queue that is too short for it lowers it.
pub const SEG_MAX: u32 = 126;

/// Largest data segment that the driver is asked for, in bytes. Large enough that no driver splits
/// a page that it would not have split anyway.
pub const SIZE_MAX: u32 = 1 << 20;

/// Most sectors of a discard: 1 GiB, which only changes metadata.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// Most sectors of a write zeroes: 16 MiB, because where it is carried out by writing, an upgrade
/// waits for it.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;

/// Most bytes of a configuration space that vhost-user knows of. What is behind ours in it belongs
/// to fields that later versions of the specification may have.
const MAX_CONFIG_SIZE: u32 = 256;

/// Where virtio-mmio has the configuration space among its registers (4.2.2). Some frontends name
/// offsets from there: Cloud Hypervisor up to v50 reads at 0x100, and writes at the plain offset.
const MMIO_CONFIG: u32 = 0x100;

/// Offsets in `struct virtio_blk_config` (5.2.4).
mod at {
    pub const CAPACITY: usize = 0;
    pub const SIZE_MAX: usize = 8;
    pub const SEG_MAX: usize = 12;
    pub const BLK_SIZE: usize = 20;
    pub const PHYSICAL_BLOCK_EXP: usize = 24;
    pub const MIN_IO_SIZE: usize = 26;
    pub const OPT_IO_SIZE: usize = 28;
    pub const WRITEBACK: usize = 32;
    pub const NUM_QUEUES: usize = 34;
    pub const MAX_DISCARD_SECTORS: usize = 36;
    pub const MAX_DISCARD_SEG: usize = 40;
    pub const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// Why a read of the configuration space, or a write to it, is refused. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A range that begins or ends where there can be no field.
    #[error(
        "{len} bytes at {offset} of the configuration space, which has {CONFIG_SIZE} and is never larger than {MAX_CONFIG_SIZE}"
    )]
    OutOfBounds {
        /// Where it begins, as the frontend said it.
        offset: u32,
        /// How long it is.
        len: usize,
    },
    /// Only the byte `writeback` can be written (5.2.5).
    #[error(
        "the driver wrote {len} bytes at {offset} of the configuration space, where only the byte at 32 can be written"
    )]
    NotWritable {
        /// Where it wrote.
        offset: u32,
        /// How much.
        len: usize,
    },
    /// `writeback` belongs to a feature that was not negotiated (5.2.6.1).
    #[error(
        "the driver switched the write cache without having negotiated VIRTIO_BLK_F_CONFIG_WCE"
    )]
    NotNegotiated,
    /// `writeback` is 0 or 1 (5.2.5).
    #[error("the driver wrote {0} to the write cache's switch, which is 0 or 1")]
    NoSuchMode(u8),
}

/// The configuration space of one device.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    offered: u64,
    acked: u64,
    cache: WriteCache,
}

impl ConfigSpace {
    /// Lays it out for a device with `num_queues` queues of `queue_size` entries at most.
    #[must_use]
    pub fn new(info: &DeviceInfo, num_queues: u16, queue_size: u16) -> Self {
        let offered = features::offered(info);
        let block_size = info.block_size.max(SECTOR_SIZE as u32);
        // A chain must fit into the queue even where its table is indirect (2.7.5.3.1), and has a
        // header and a status.
        let seg_max = u32::from(queue_size).saturating_sub(2).clamp(1, SEG_MAX);
        let blocks_per_physical = (info.physical_block_size / block_size).max(1);

        let cache = WriteCache::new(offered & FLUSH != 0);
        let mut config = Self { bytes: [0; CONFIG_SIZE], offered, acked: 0, cache };
        config.put(at::SIZE_MAX, SIZE_MAX.to_le_bytes());
        config.put(at::SEG_MAX, seg_max.to_le_bytes());
        config.put(at::BLK_SIZE, block_size.to_le_bytes());
        config.put(at::PHYSICAL_BLOCK_EXP, [blocks_per_physical.ilog2() as u8]);
        let min_io_blocks = u16::try_from(blocks_per_physical).unwrap_or(u16::MAX);
        config.put(at::MIN_IO_SIZE, min_io_blocks.to_le_bytes());
        config.put(at::OPT_IO_SIZE, (info.optimal_io_size / block_size).to_le_bytes());
        config.put(at::NUM_QUEUES, num_queues.to_le_bytes());
        if offered & features::DISCARD != 0 {
            let granularity = info.discard_granularity.max(block_size);
            config.put(at::MAX_DISCARD_SEG, 1u32.to_le_bytes());
            config.put(
                at::DISCARD_SECTOR_ALIGNMENT,
                (granularity / SECTOR_SIZE as u32).to_le_bytes(),
            );
        }
        if offered & features::WRITE_ZEROES != 0 {
            config.put(at::MAX_WRITE_ZEROES_SEG, 1u32.to_le_bytes());
            // 5.2.6.2: clear only if a write zeroes can never deallocate, which is the domain's to
            // decide, request by request.
            config.put(at::WRITE_ZEROES_MAY_UNMAP, [1]);
        }
        config.set_capacity(info.capacity);
        config
    }

    /// The driver of a session that another process had goes on with this one, and believes this.
    pub const fn resume(&mut self, belief: Belief) {
        self.cache.resume(belief);
    }

    /// What its driver believes.
    #[must_use]
    pub const fn belief(&self) -> Belief {
        self.cache.belief()
    }

    /// The disk has `capacity` bytes from now on. Requests must be held against no less from before
    /// this is read.
    pub fn set_capacity(&mut self, capacity: u64) {
        let sectors = capacity / SECTOR_SIZE;
        let at_most_all = |limit: u32| u32::try_from(sectors).unwrap_or(u32::MAX).min(limit);
        self.put(at::CAPACITY, sectors.to_le_bytes());
        if self.offered & features::DISCARD != 0 {
            self.put(at::MAX_DISCARD_SECTORS, at_most_all(MAX_DISCARD_SECTORS).to_le_bytes());
        }
        if self.offered & features::WRITE_ZEROES != 0 {
            let most = at_most_all(MAX_WRITE_ZEROES_SECTORS);
            self.put(at::MAX_WRITE_ZEROES_SECTORS, most.to_le_bytes());
        }
    }

    fn put<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        self.bytes[at..at + N].copy_from_slice(&value);
    }

    /// Where a range of the space begins, however the frontend counts.
    ///
    /// No range that is counted from the beginning reaches [`MMIO_CONFIG`], so an offset from there
    /// on is one that is counted from there.
    fn place(offset: u32, len: usize) -> Result<usize, Error> {
        let at = offset.checked_sub(MMIO_CONFIG).unwrap_or(offset) as usize;
        let fits = at < CONFIG_SIZE && len <= MAX_CONFIG_SIZE as usize - at;
        if fits { Ok(at) } else { Err(Error::OutOfBounds { offset, len }) }
    }

    /// Exactly `size` bytes from `offset` on, with zeros behind the fields that we know. The
    /// frontend keeps what it reads: if `writeback` is in it, that may change the write cache's
    /// mode.
    ///
    /// # Errors
    /// The range begins behind the last field, or ends behind the largest space that there can be.
    pub fn read(&mut self, offset: u32, size: u32) -> Result<Vec<u8>, Error> {
        let at = Self::place(offset, size as usize)?;
        if (at..at + size as usize).contains(&at::WRITEBACK) {
            self.cache.read();
        }
        self.bytes[at::WRITEBACK] = u8::from(self.cache.is_on());
        let mut out = vec![0; size as usize];
        let from = &self.bytes[at..];
        let len = from.len().min(out.len());
        out[..len].copy_from_slice(&from[..len]);
        Ok(out)
    }

    /// The driver writes, which may change the write cache's mode.
    ///
    /// # Errors
    /// The driver wrote what it may not write ([`Error::NotWritable`] and the others), or the
    /// frontend let it write where there is nothing ([`Error::OutOfBounds`]). An empty write is no
    /// error.
    pub fn write(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        let at = Self::place(offset, data.len())?;
        let mode = match *data {
            [] => return Ok(()),
            [mode] if at == at::WRITEBACK => mode,
            _ => return Err(Error::NotWritable { offset, len: data.len() }),
        };
        if self.acked & CONFIG_WCE == 0 {
            return Err(Error::NotNegotiated);
        }
        if mode > 1 {
            return Err(Error::NoSuchMode(mode));
        }
        self.cache.wrote(mode == 1);
        Ok(())
    }

    /// The driver has acknowledged these features, which may change the write cache's mode, but not
    /// what the driver has chosen.
    pub const fn set_acked_features(&mut self, acked: u64) {
        self.acked = acked;
        self.cache.acked(acked);
    }

    /// A ring starts: from now on its driver relies on the write cache's mode. Returns `true` once,
    /// if the driver could have it on and has it off only because nothing is known of what it
    /// relies on.
    pub fn ring_starts(&mut self) -> bool {
        self.cache.ring_starts() && self.is_switchable()
    }

    /// A ring is to go on at a position that this session has not left it at, so that nothing is
    /// known of what its driver relies on. Returns as [`ring_starts`](Self::ring_starts).
    pub fn ring_comes_from_elsewhere(&mut self) -> bool {
        self.cache.ring_comes_from_elsewhere() && self.is_switchable()
    }

    const fn is_switchable(&self) -> bool {
        const SWITCH: u64 = FLUSH | CONFIG_WCE;
        self.offered & self.acked & SWITCH == SWITCH
    }

    /// The driver has reset the device, or is gone: no features are acknowledged. The write cache
    /// stays as it was chosen, because frontends show the next driver what they have read or been
    /// told before.
    pub const fn reset(&mut self) {
        self.acked = 0;
        self.cache.reset();
    }

    /// Whether the write cache is on: a completed write may be lost until it is flushed. To be
    /// asked after each of the calls above: the domain has to be told of each change
    /// (`set_write_cache`), and a successor of the mode as it is.
    #[must_use]
    pub fn write_cache(&self) -> bool {
        self.cache.is_on()
    }

    /// What a domain has to be able to do for the features that this device offers. See
    /// [`features::required_capabilities`].
    #[must_use]
    pub const fn required_capabilities(&self) -> Capabilities {
        features::required_capabilities(self.offered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_abi::Swap;

    const ALL: Capabilities = Capabilities(0b11110);

    fn info(capabilities: Capabilities) -> DeviceInfo {
        DeviceInfo {
            capacity: 3 << 30,
            block_size: 1024,
            physical_block_size: 4096,
            optimal_io_size: 65536,
            discard_granularity: 8192,
            capabilities,
            swap: Swap::No,
            backing_kind: "test".into(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: "disk".into(),
        }
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn layout_is_the_one_of_the_specification() {
        let bytes = ConfigSpace::new(&info(ALL), 4, 256).read(0, CONFIG_SIZE as u32).unwrap();
        assert_eq!(bytes[..8], ((3u64 << 30) / 512).to_le_bytes());
        assert_eq!(u32_at(&bytes, 8), SIZE_MAX);
        assert_eq!(u32_at(&bytes, 12), 126);
        assert_eq!(u32_at(&bytes, 16), 0, "geometry");
        assert_eq!(u32_at(&bytes, 20), 1024);
        assert_eq!(bytes[24..28], [2, 0, 4, 0], "4 blocks per physical block, aligned, at least 4");
        assert_eq!(u32_at(&bytes, 28), 64);
        assert_eq!(bytes[32..36], [1, 0, 4, 0], "writeback, unused0, num_queues");
        assert_eq!(u32_at(&bytes, 36), MAX_DISCARD_SECTORS);
        assert_eq!(u32_at(&bytes, 40), 1);
        assert_eq!(u32_at(&bytes, 44), 16);
        assert_eq!(u32_at(&bytes, 48), MAX_WRITE_ZEROES_SECTORS);
        assert_eq!(u32_at(&bytes, 52), 1);
        assert_eq!(bytes[56..60], [1, 0, 0, 0], "may unmap, unused1");
        assert_eq!(bytes[60..72], [0; 12], "secure erase");
    }

    #[test]
    fn fields_of_features_not_offered_are_zero() {
        let bytes =
            ConfigSpace::new(&info(Capabilities(0)), 1, 256).read(0, CONFIG_SIZE as u32).unwrap();
        assert_eq!(bytes[36..72], [0; 36]);
        assert_eq!(bytes[32], 0, "no flush, no cache");
    }

    #[test]
    fn seg_max_fits_into_the_queue() {
        for (queue_size, seg_max) in [(1, 1), (2, 1), (4, 2), (64, 62), (128, 126), (1024, 126)] {
            let mut config = ConfigSpace::new(&info(ALL), 1, queue_size);
            assert_eq!(u32_at(&config.read(12, 4).unwrap(), 0), seg_max, "queue of {queue_size}");
        }
    }

    #[test]
    fn a_small_disk_is_not_asked_for_more_than_it_has() {
        let small = DeviceInfo { capacity: 1 << 20, ..info(ALL) };
        let bytes = ConfigSpace::new(&small, 1, 256).read(0, 72).unwrap();
        assert_eq!((u32_at(&bytes, 36), u32_at(&bytes, 48)), (2048, 2048));
    }

    #[test]
    fn a_disk_that_grows_changes_its_capacity_and_what_follows_from_it() {
        let mut config = ConfigSpace::new(&DeviceInfo { capacity: 1 << 20, ..info(ALL) }, 4, 256);
        config.set_acked_features(FLUSH | CONFIG_WCE);
        config.write(32, &[0]).unwrap();
        config.set_capacity(3 << 30);
        let mut as_large = ConfigSpace::new(&info(ALL), 4, 256);
        as_large.set_acked_features(FLUSH | CONFIG_WCE);
        as_large.write(32, &[0]).unwrap();
        assert_eq!(config.read(0, 72), as_large.read(0, 72));
        assert!(!config.write_cache(), "the driver's choice stays");
        let mut without = ConfigSpace::new(&info(Capabilities(0)), 1, 256);
        without.set_capacity(4 << 30);
        assert_eq!(without.read(36, 36).unwrap(), [0; 36], "what is not offered stays zero");
    }

    #[test]
    fn a_range_is_answered_whole_or_refused() {
        let mut config = ConfigSpace::new(&info(ALL), 4, 256);
        let mut padded = config.read(0, 72).unwrap();
        padded.resize(256, 0);
        let mmio = MMIO_CONFIG;
        // Offset and size, and where that is. QEMU asks for 57 bytes, Cloud Hypervisor for 60.
        for (offset, size, at) in [
            (0, 57, Some(0)),
            (0, 60, Some(0)),
            (0, 72, Some(0)),
            (0, 256, Some(0)),
            (0, 257, None),
            (34, 2, Some(34)),
            (71, 1, Some(71)),
            (71, 5, Some(71)),
            (71, 185, Some(71)),
            (71, 186, None),
            (72, 1, None),
            (128, 4, None),
            (255, 1, None),
            (mmio, 60, Some(0)),
            (mmio, 256, Some(0)),
            (mmio, 257, None),
            (mmio + 32, 1, Some(32)),
            (mmio + 71, 5, Some(71)),
            (mmio + 72, 1, None),
            (2 * mmio, 1, None),
            (4000, 96, None),
            (u32::MAX, 1, None),
            (0, u32::MAX, None),
            (u32::MAX, u32::MAX, None),
        ] {
            let len = size as usize;
            let refusal = Error::OutOfBounds { offset, len };
            let expected = at.map(|at| padded[at..at + len].to_vec()).ok_or(refusal);
            assert_eq!(config.read(offset, size), expected, "{size} bytes at {offset}");
            if len <= 300 {
                let written = config.write(offset, &vec![0; len]);
                assert_eq!(written == Err(refusal), at.is_none(), "{size} bytes to {offset}");
            }
        }
    }

    #[test]
    fn only_a_negotiated_writeback_can_be_written() {
        let mut config = ConfigSpace::new(&info(ALL), 1, 256);
        let before = config.read(0, 72);
        assert_eq!(config.write(32, &[0]), Err(Error::NotNegotiated));
        config.set_acked_features(FLUSH);
        assert_eq!(config.write(32, &[0]), Err(Error::NotNegotiated));
        config.set_acked_features(FLUSH | CONFIG_WCE);
        for (offset, data) in
            [(0, &[0; 8][..]), (31, &[0, 0]), (32, &[0, 0]), (33, &[0]), (71, &[0])]
        {
            assert_eq!(
                config.write(offset, data),
                Err(Error::NotWritable { offset, len: data.len() })
            );
        }
        assert_eq!(config.write(32, &[2]), Err(Error::NoSuchMode(2)));
        assert_eq!(config.write(0, &[]), Ok(()));
        assert_eq!(config.read(0, 72), before);
        for (offset, mode) in [(32, 1), (32, 0), (MMIO_CONFIG + 32, 1)] {
            assert_eq!(config.write(offset, &[mode]), Ok(()));
            assert_eq!((config.read(32, 1), config.write_cache()), (Ok(vec![mode]), mode == 1));
        }
        config.reset();
        assert_eq!(config.write(32, &[0]), Err(Error::NotNegotiated), "reset forgets the features");
    }

    /// The rule itself is tested where it is, in `write_cache.rs`.
    #[test]
    fn the_byte_says_which_mode_the_cache_is_in() {
        let mut config = ConfigSpace::new(&info(ALL), 1, 256);
        assert!(!config.write_cache(), "nothing was read");
        let _ = (config.read(0, 32), config.read(33, 27), config.read(32, 300));
        assert!(!config.write_cache(), "the byte was not read");
        assert_eq!((config.read(0, 33).unwrap()[32], config.write_cache()), (1, true));
        config.set_acked_features(0);
        assert_eq!((config.read(32, 1), config.write_cache()), (Ok(vec![0]), false));
        let mut moved = ConfigSpace::new(&info(ALL), 1, 256);
        moved.set_acked_features(FLUSH | CONFIG_WCE);
        assert!(moved.ring_comes_from_elsewhere() && !moved.ring_starts(), "it is said once");
        assert_eq!((moved.read(32, 1), moved.write_cache()), (Ok(vec![0]), false));
        let mut without = ConfigSpace::new(&info(Capabilities::DISCARD), 1, 256);
        without.set_acked_features(FLUSH);
        assert_eq!(
            (without.read(32, 1), without.write_cache()),
            (Ok(vec![0]), false),
            "not offered"
        );
    }
}
