//! Feature bits: what a domain can do, in the words of virtio, and back.
//!
//! The way back is for upgrades: the driver was told once what the device can do, and a successor
//! has to keep that word. Not in here: `VHOST_USER_F_PROTOCOL_FEATURES`, which is no feature of the
//! device, and everything that the device does not do (geometry, secure erase, lifetime, zones,
//! packed rings).

use domain_abi::{Capabilities, DeviceInfo};
use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

/// Largest segment in `size_max` (5.2.3).
pub const SIZE_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SIZE_MAX;
/// Most segments of a request in `seg_max` (5.2.3).
pub const SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
/// The device is read-only (5.2.3).
pub const RO: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
/// Block size in `blk_size` (5.2.3).
pub const BLK_SIZE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE;
/// The flush command (5.2.3).
pub const FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
/// Alignments and preferred sizes in `topology` (5.2.3).
pub const TOPOLOGY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY;
/// The driver can switch the write cache in `writeback` (5.2.3).
pub const CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
/// Number of queues in `num_queues` (5.2.3).
pub const MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
/// The discard command (5.2.3).
pub const DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
/// The write zeroes command (5.2.3).
pub const WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;
/// Indirect descriptor tables (6, 2.7.5.3).
pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// `used_event` and `avail_event` (6, 2.7.7).
pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// Not a legacy device (6).
pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;

/// Offered whatever the domain is.
const ALWAYS: u64 =
    VERSION_1 | INDIRECT_DESC | EVENT_IDX | MQ | SEG_MAX | SIZE_MAX | BLK_SIZE | TOPOLOGY;

/// The feature bits that a device with such a domain offers.
///
/// `MQ` is among them even with one queue: `num_queues` is then 1, which says the same as its
/// absence (5.2.2), and the offer does not change with the number of queues. A device that cannot
/// be written offers neither `DISCARD` nor `WRITE_ZEROES`, which would all fail (5.2.6.2).
#[must_use]
pub const fn offered(info: &DeviceInfo) -> u64 {
    let can = info.capabilities;
    let mut features = ALWAYS;
    if can.contains(Capabilities::FLUSH) {
        features |= FLUSH;
        // 5.2.5.2: a device that offers CONFIG_WCE must offer FLUSH.
        if can.contains(Capabilities::WRITE_CACHE) {
            features |= CONFIG_WCE;
        }
    }
    if can.contains(Capabilities::READ_ONLY) {
        return features | RO;
    }
    if can.contains(Capabilities::DISCARD) {
        features |= DISCARD;
    }
    if can.contains(Capabilities::WRITE_ZEROES) {
        features |= WRITE_ZEROES;
    }
    features
}

/// What a domain must be able to do if it is to stand behind these features, offered or
/// acknowledged.
#[must_use]
pub const fn required_capabilities(features: u64) -> Capabilities {
    let mut needed = Capabilities(0);
    if features & RO != 0 {
        needed = needed.with(Capabilities::READ_ONLY);
    }
    if features & FLUSH != 0 {
        needed = needed.with(Capabilities::FLUSH);
    }
    if features & CONFIG_WCE != 0 {
        needed = needed.with(Capabilities::WRITE_CACHE);
    }
    if features & DISCARD != 0 {
        needed = needed.with(Capabilities::DISCARD);
    }
    if features & WRITE_ZEROES != 0 {
        needed = needed.with(Capabilities::WRITE_ZEROES);
    }
    needed
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_abi::Swap;

    fn info(capabilities: Capabilities) -> DeviceInfo {
        DeviceInfo {
            capacity: 1 << 20,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 0,
            discard_granularity: 0,
            capabilities,
            swap: Swap::No,
            backing_kind: "test".into(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: String::new(),
        }
    }

    #[test]
    fn bits_are_the_ones_of_the_specification() {
        let bits = [
            (SIZE_MAX, 1),
            (SEG_MAX, 2),
            (RO, 5),
            (BLK_SIZE, 6),
            (FLUSH, 9),
            (TOPOLOGY, 10),
            (CONFIG_WCE, 11),
            (MQ, 12),
            (DISCARD, 13),
            (WRITE_ZEROES, 14),
            (INDIRECT_DESC, 28),
            (EVENT_IDX, 29),
            (VERSION_1, 32),
        ];
        for (bit, number) in bits {
            assert_eq!(bit, 1 << number);
        }
    }

    #[test]
    fn each_capability_brings_its_bit_and_no_other() {
        assert_eq!(offered(&info(Capabilities(0))), ALWAYS);
        assert_eq!(offered(&info(Capabilities::READ_ONLY)), ALWAYS | RO);
        assert_eq!(offered(&info(Capabilities::FLUSH)), ALWAYS | FLUSH);
        assert_eq!(offered(&info(Capabilities::DISCARD)), ALWAYS | DISCARD);
        assert_eq!(offered(&info(Capabilities::WRITE_ZEROES)), ALWAYS | WRITE_ZEROES);
        let cached = Capabilities::FLUSH.with(Capabilities::WRITE_CACHE);
        assert_eq!(offered(&info(cached)), ALWAYS | FLUSH | CONFIG_WCE);
    }

    #[test]
    fn a_switchable_cache_is_not_offered_without_flush() {
        assert_eq!(offered(&info(Capabilities::WRITE_CACHE)), ALWAYS);
    }

    #[test]
    fn a_read_only_device_offers_nothing_that_writes() {
        let all = Capabilities(0b11111);
        assert_eq!(offered(&info(all)), ALWAYS | RO | FLUSH | CONFIG_WCE);
    }

    #[test]
    fn a_domain_satisfies_what_it_made_us_offer() {
        for bits in 0..32 {
            let capabilities = Capabilities(bits);
            let features = offered(&info(capabilities));
            assert!(capabilities.contains(required_capabilities(features)), "{bits:05b}");
        }
    }

    #[test]
    fn each_promise_needs_its_capability() {
        assert_eq!(required_capabilities(ALWAYS), Capabilities(0));
        assert_eq!(required_capabilities(RO), Capabilities::READ_ONLY);
        assert_eq!(required_capabilities(FLUSH), Capabilities::FLUSH);
        assert_eq!(required_capabilities(CONFIG_WCE), Capabilities::WRITE_CACHE);
        assert_eq!(required_capabilities(DISCARD), Capabilities::DISCARD);
        assert_eq!(required_capabilities(WRITE_ZEROES), Capabilities::WRITE_ZEROES);
    }
}
