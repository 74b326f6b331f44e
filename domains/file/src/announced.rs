//! What the guest was told of the disk. It belongs to the disk: the first instance reads it off the
//! host and leaves it in storage, and every successor announces the same.
//!
//! The host says something else after ordinary acts: an image grows, `cp --reflink` changes what
//! direct I/O must be aligned to, a remount changes the preferred size of an I/O. A guest need not
//! be told so: a successor is refused only if the file cannot stand behind the disk any more. The
//! capacity alone can become another, by a command, and then it is in storage as well.
//!
//! In storage it is text, one `key=value` a line. Keys that are not known are left alone.

use domain_api::{DomainError, Host};

/// Storage key.
const ANNOUNCED: &str = "announced";

/// What does not change while the disk lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Announced {
    /// Bytes, until it is resized.
    pub(crate) capacity: u64,
    /// Logical block size in bytes.
    pub(crate) block_size: u32,
    /// Physical block size in bytes.
    pub(crate) physical_block_size: u32,
    /// Whether it takes DISCARD, where it can be written.
    pub(crate) discard: bool,
    /// Device and inode; for a block device its number and 0, because the node in `/dev` is not the
    /// device.
    pub(crate) id: (u64, u64),
}

impl Announced {
    /// What is in storage; `None` for a new disk.
    pub(crate) fn inherited(host: Host) -> Option<Self> {
        Self::parse(&String::from_utf8(host.storage().bytes(ANNOUNCED)?).ok()?)
    }

    /// Leaves it in storage, where there is nothing yet.
    pub(crate) fn keep(&self, host: Host) -> Result<(), DomainError> {
        if Self::inherited(host).is_some() {
            return Ok(());
        }
        host.storage().set_bytes(ANNOUNCED, self.text().as_bytes())
    }

    /// Leaves it in storage with another capacity.
    pub(crate) fn resize(self, host: Host, capacity: u64) -> Result<(), DomainError> {
        let resized = Self { capacity, ..self };
        host.storage().set_bytes(ANNOUNCED, resized.text().as_bytes())
    }

    fn text(&self) -> String {
        let Self { capacity, block_size, physical_block_size, discard, id: (device, inode) } = self;
        format!(
            "capacity={capacity}\nblock_size={block_size}\nphysical_block_size={physical_block_size}\n\
             discard={}\ndevice={device}\ninode={inode}\n",
            u8::from(*discard)
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
            id: (value("device")?, value("inode")?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_half_of_it_is_not() {
        let announced = Announced {
            capacity: 3 << 40,
            block_size: 512,
            physical_block_size: 4096,
            discard: true,
            id: (u64::MAX, 7),
        };
        let text = announced.text();
        assert_eq!(Announced::parse(&text), Some(announced));
        assert_eq!(Announced::parse(&format!("new=1\n{text}later=2\n")), Some(announced));
        for lines in 0..text.lines().count() {
            let half: String = text.lines().take(lines).map(|line| format!("{line}\n")).collect();
            assert_eq!(Announced::parse(&half), None, "{half:?}");
        }
    }
}
