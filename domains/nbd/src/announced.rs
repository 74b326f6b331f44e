//! What the guest was told of the disk. The first instance reads it off the server; it lies in
//! storage from then on, and each connection is held against it.
//!
//! In storage it is text, one `key=value` a line. Keys that are not known are left alone.

use crate::marks::LARGEST;
use crate::negotiate::{Export, flags};
use domain_api::{DomainError, Host};

/// Storage key.
const KEY: &str = "announced";
/// Blocks that a guest is told at most: what its page is.
const LARGEST_BLOCK: u32 = 4096;

/// What does not change while the disk lives, but for the capacity, by a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Announced {
    /// Bytes.
    pub(crate) capacity: u64,
    /// Logical block size in bytes.
    pub(crate) block_size: u32,
    /// Physical block size in bytes.
    pub(crate) physical_block_size: u32,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
    /// Whether there is a flush.
    pub(crate) flush: bool,
    pub(crate) read_only: bool,
}

impl Announced {
    /// Of a new disk.
    pub(crate) fn of(export: &Export, read_only: bool, no_flush: bool) -> Result<Self, String> {
        let block_size = export.minimum.max(512);
        if block_size > LARGEST_BLOCK {
            return Err(format!(
                "the server takes blocks of {block_size} bytes and no smaller ones, and a guest's have {LARGEST_BLOCK} at most; \
                 put `nbdkit --filter=blocksize` or the like between"
            ));
        }
        let read_only = read_only || export.has(flags::READ_ONLY);
        let flush = export.has(flags::FLUSH);
        if !flush && !read_only && !no_flush {
            return Err(
                "the server does not announce FLUSH, so nothing that the guest writes could be made durable; \
                 turn it on (nbd-server: `flush = true` in the export's section), or serve it with readonly=true, \
                 or give no_flush=true if the data may be lost"
                    .to_owned(),
            );
        }
        let capacity = usable(export, block_size);
        if capacity == 0 {
            return Err(format!("the export has {} bytes, less than a block", export.size));
        }
        if capacity >= LARGEST {
            return Err(format!("the export has {capacity} bytes; the largest has 512T"));
        }
        Ok(Self {
            capacity,
            block_size,
            physical_block_size: export.preferred.clamp(block_size, 64 << 10),
            discard: !read_only && export.has(flags::TRIM),
            write_zeroes: !read_only && export.has(flags::WRITE_ZEROES),
            flush,
            read_only,
        })
    }

    /// Whether an export can stand behind it; if not, what is in the way.
    pub(crate) fn fits(&self, export: &Export) -> Result<(), String> {
        let size = usable(export, self.block_size);
        let lacks = |needed: bool, flag: u16| needed && !export.has(flag);
        if size < self.capacity {
            Err(format!("its size is {size}, and the guest was told {}", self.capacity))
        } else if export.minimum > self.block_size {
            Err(format!(
                "it takes blocks of {} bytes, and the guest was told {}",
                export.minimum, self.block_size
            ))
        } else if !self.read_only && export.has(flags::READ_ONLY) {
            Err("it cannot be written any more".to_owned())
        } else if lacks(self.flush, flags::FLUSH) {
            Err("it takes no FLUSH any more".to_owned())
        } else if lacks(self.discard, flags::TRIM) || lacks(self.write_zeroes, flags::WRITE_ZEROES)
        {
            Err("it takes no TRIM or WRITE_ZEROES any more".to_owned())
        } else {
            Ok(())
        }
    }

    /// What is in storage; `None` for a new disk.
    pub(crate) fn inherited(host: Host) -> Option<Self> {
        Self::parse(&String::from_utf8(host.storage().bytes(KEY)?).ok()?)
    }

    /// Leaves it in storage.
    pub(crate) fn keep(&self, host: Host) -> Result<(), DomainError> {
        if Self::inherited(host) == Some(*self) {
            return Ok(());
        }
        host.storage().set_bytes(KEY, self.text().as_bytes())
    }

    fn text(&self) -> String {
        let Self { capacity, block_size, physical_block_size, .. } = self;
        let flag = u8::from;
        format!(
            "capacity={capacity}\nblock_size={block_size}\nphysical_block_size={physical_block_size}\n\
             discard={}\nwrite_zeroes={}\nflush={}\nread_only={}\n",
            flag(self.discard),
            flag(self.write_zeroes),
            flag(self.flush),
            flag(self.read_only)
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?.parse().ok()
        };
        Some(Self {
            capacity: value("capacity")?,
            block_size: value("block_size")?.try_into().ok()?,
            physical_block_size: value("physical_block_size")?.try_into().ok()?,
            discard: value("discard")? != 0,
            write_zeroes: value("write_zeroes")? != 0,
            flush: value("flush")? != 0,
            read_only: value("read_only")? != 0,
        })
    }
}

/// The bytes that whole blocks have: what is behind the last one is rounded differently by each
/// server.
pub(crate) fn usable(export: &Export, block_size: u32) -> u64 {
    export.size / u64::from(block_size) * u64::from(block_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(size: u64, flags: u16) -> Export {
        Export {
            size,
            flags: flags | flags::HAS_FLAGS,
            minimum: 1,
            preferred: 4096,
            maximum: 1 << 25,
        }
    }

    #[test]
    fn what_is_written_is_read_and_half_of_it_is_not() {
        let announced = Announced::of(&export(1 << 20, flags::FLUSH | flags::TRIM), false, false);
        let announced = announced.unwrap();
        let text = announced.text();
        assert_eq!(Announced::parse(&text), Some(announced));
        for lines in 0..text.lines().count() {
            let half: String = text.lines().take(lines).map(|line| format!("{line}\n")).collect();
            assert_eq!(Announced::parse(&half), None, "{half:?}");
        }
    }

    #[test]
    fn an_export_without_flush_is_refused_with_its_cure() {
        let sentence = Announced::of(&export(1 << 20, 0), false, false).unwrap_err();
        assert!(sentence.contains("flush = true"), "{sentence}");
        assert!(Announced::of(&export(1 << 20, 0), true, false).unwrap().read_only);
        assert!(!Announced::of(&export(1 << 20, 0), false, true).unwrap().flush);
    }

    #[test]
    fn the_rest_of_a_block_is_left_out_and_a_smaller_export_does_not_fit() {
        let announced =
            Announced::of(&export((64 << 20) + 100, flags::FLUSH), false, false).unwrap();
        assert_eq!(announced.capacity, 64 << 20);
        assert_eq!(announced.fits(&export(64 << 20, flags::FLUSH)), Ok(()));
        assert!(announced.fits(&export((64 << 20) - 1, flags::FLUSH)).is_err());
        assert!(announced.fits(&export(64 << 20, 0)).is_err());
        assert!(announced.fits(&export(64 << 20, flags::FLUSH | flags::READ_ONLY)).is_err());
        assert!(Announced::of(&export(511, flags::FLUSH), false, false).is_err());
    }
}
