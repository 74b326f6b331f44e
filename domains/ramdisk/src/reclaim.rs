//! The difference between the versions: what becomes of memory that the guest does not need.

use domain_api::Region;

/// What memory is given back in.
pub(crate) const PAGE_SIZE: u32 = 4096;

/// What becomes of memory that the guest does not need.
pub trait Reclaim: 'static {
    /// Version of a domain that does it this way.
    const VERSION: &'static str;

    /// The guest does not need the range any more.
    fn discard(region: &Region, offset: u64, len: u64);

    /// The range is to read as zeros; with `may_unmap` its memory may go.
    fn write_zeroes(region: &Region, offset: u64, len: u64, may_unmap: bool);
}

/// Version 1: memory that was ever written is kept.
#[derive(Debug)]
pub struct Keep;

impl Reclaim for Keep {
    const VERSION: &'static str = "1.0.0";

    /// A discard is a hint, and this version does not take it.
    fn discard(_: &Region, _: u64, _: u64) {}

    fn write_zeroes(region: &Region, offset: u64, len: u64, _: bool) {
        region.zero(offset, len);
    }
}

/// Version 2: whole pages go back to the host, by punching holes into the region's memfd.
///
/// A hole reads as zeros through every mapping, and the next write fills it again; so version 1 can
/// take over such a region as it is.
#[derive(Debug)]
pub struct GiveBack;

impl Reclaim for GiveBack {
    const VERSION: &'static str = "2.0.0";

    fn discard(region: &Region, offset: u64, len: u64) {
        let (first, end) = whole_pages(offset, len);
        if first < end {
            // Only a hint: where the kernel cannot, the data simply stays.
            let _ = region.punch_hole(first, end - first);
        }
    }

    fn write_zeroes(region: &Region, offset: u64, len: u64, may_unmap: bool) {
        let (first, end) = whole_pages(offset, len);
        // Where there is no whole page, or no way to punch, zeros are written as in version 1.
        if !may_unmap || first >= end || region.punch_hole(first, end - first).is_err() {
            region.zero(offset, len);
            return;
        }
        region.zero(offset, first - offset);
        region.zero(end, offset + len - end);
    }
}

/// First byte of the first whole page of a range, and end of the last one. There is none if the end
/// is not behind the first.
fn whole_pages(offset: u64, len: u64) -> (u64, u64) {
    let page = u64::from(PAGE_SIZE);
    (offset.next_multiple_of(page), (offset + len) / page * page)
}

#[cfg(test)]
mod tests {
    use super::whole_pages;

    #[test]
    fn only_whole_pages_are_given_back() {
        assert_eq!(whole_pages(0, 4096), (0, 4096));
        assert_eq!(whole_pages(512, 8192), (4096, 8192));
        assert_eq!(whole_pages(512, 16384), (4096, 16384));
        let (first, end) = whole_pages(512, 4096);
        assert!(first >= end);
    }
}
