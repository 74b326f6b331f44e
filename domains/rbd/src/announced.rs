//! What the guest was told of the disk. The first instance reads it off the image; it lies in
//! storage from then on, and the image is held against it.
//!
//! In storage it is text, one `key=value` a line. Keys that are not known are left alone.

use domain_api::{DomainError, Host, ImageInfo, Params};

/// Storage key.
const KEY: &str = "announced";
/// Storage key of the image's name.
const NAME: &str = "image";
/// Storage key of what it is reached with.
const WAY: &str = "way";
/// What requests are multiples of.
const SECTOR: u64 = 512;

/// What does not change while the disk lives, but for the capacity, by a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Announced {
    pub(crate) capacity: u64,
    pub(crate) read_only: bool,
    pub(crate) optimal_io_size: u32,
    pub(crate) discard_granularity: u32,
}

/// The name of an image, for people and to be compared.
pub(crate) fn name(params: &Params) -> String {
    let (image, namespace) = (params.get("image").unwrap_or(""), params.get("namespace"));
    match (image.split_once('/'), namespace) {
        (Some((pool, name)), Some(namespace)) if !namespace.is_empty() => {
            format!("{pool}/{namespace}/{name}")
        }
        _ => image.to_owned(),
    }
}

/// With which configuration and as which user an image is reached: another handle would be another
/// client, which has no lock.
pub(crate) fn way(params: &Params) -> String {
    let text = |key: &str| params.get(key).unwrap_or("");
    format!("conf={}\nid={}\n", text("conf"), text("id"))
}

/// Whether an image of this name, reached in this way, is the disk that there is, if there is one.
pub(crate) fn check_same(host: Host, name: &str, way: &str) -> Result<(), DomainError> {
    let differs = |key: &str, now: &str| {
        let kept = host.storage().bytes(key)?;
        (kept != now.as_bytes()).then(|| String::from_utf8_lossy(&kept).into_owned())
    };
    if let Some(kept) = differs(NAME, name) {
        return Err(DomainError::new(format!(
            "`{name}` is another image than the guest's disk, `{kept}`; an upgrade does not move a disk, leave `image` out"
        )));
    }
    if differs(WAY, way).is_some() {
        return Err(DomainError::new(
            "`conf` and `id` cannot be changed under the image, which is open and locked with the ones before; leave them out, or start the daemon anew",
        ));
    }
    Ok(())
}

impl Announced {
    /// Of a new disk.
    pub(crate) fn of(image: &ImageInfo) -> Result<Self, DomainError> {
        let capacity = image.capacity / SECTOR * SECTOR;
        if capacity == 0 {
            return Err(DomainError::new(format!(
                "the image has {} bytes, less than a sector; make it larger with `rbd resize`",
                image.capacity
            )));
        }
        Ok(Self {
            capacity,
            read_only: image.read_only,
            optimal_io_size: image.optimal_io_size,
            discard_granularity: image.discard_granularity,
        })
    }

    /// Whether an image can stand behind it.
    pub(crate) fn check(&self, name: &str, image: &ImageInfo) -> Result<(), DomainError> {
        if image.read_only != self.read_only {
            return Err(DomainError::new(format!(
                "`readonly` is {}, and the guest was told otherwise; leave it out",
                image.read_only
            )));
        }
        if image.capacity < self.capacity {
            return Err(DomainError::new(format!(
                "image {name} has {} bytes, and the guest was told of {}: it was made smaller; give it its size back with `rbd resize`",
                image.capacity, self.capacity
            )));
        }
        Ok(())
    }

    /// What is in storage; `None` for a new disk.
    pub(crate) fn inherited(host: Host) -> Option<Self> {
        Self::parse(&String::from_utf8(host.storage().bytes(KEY)?).ok()?)
    }

    /// Leaves it in storage.
    pub(crate) fn keep(&self, host: Host, name: &str, way: &str) -> Result<(), DomainError> {
        let storage = host.storage();
        for (key, text) in [(NAME, name), (WAY, way)] {
            if storage.bytes(key).as_deref() != Some(text.as_bytes()) {
                storage.set_bytes(key, text.as_bytes())?;
            }
        }
        if Self::inherited(host) == Some(*self) {
            return Ok(());
        }
        storage.set_bytes(KEY, self.text().as_bytes())
    }

    fn text(&self) -> String {
        let Self { capacity, read_only, optimal_io_size, discard_granularity } = self;
        format!(
            "capacity={capacity}\nread_only={}\noptimal_io_size={optimal_io_size}\n\
             discard_granularity={discard_granularity}\n",
            u8::from(*read_only)
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?.parse().ok()
        };
        Some(Self {
            capacity: value("capacity")?,
            read_only: value("read_only")? != 0,
            optimal_io_size: value("optimal_io_size")?.try_into().ok()?,
            discard_granularity: value("discard_granularity")?.try_into().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_half_of_it_is_not() {
        let image = ImageInfo { capacity: (1 << 20) + 100, ..ImageInfo::default() };
        let announced = Announced::of(&image).unwrap();
        assert_eq!(announced.capacity, 1 << 20, "the rest of a sector is left out");
        let text = announced.text();
        assert_eq!(Announced::parse(&text), Some(announced));
        for lines in 0..text.lines().count() {
            let half: String = text.lines().take(lines).map(|line| format!("{line}\n")).collect();
            assert_eq!(Announced::parse(&half), None, "{half:?}");
        }
        assert!(Announced::of(&ImageInfo { capacity: 511, ..image }).is_err());
    }

    #[test]
    fn an_image_is_called_by_pool_namespace_and_name() {
        let name = |pairs: &[&str]| name(&Params::from_pairs(pairs).unwrap());
        assert_eq!(name(&["image=rbd/a@s"]), "rbd/a@s");
        assert_eq!(name(&["image=rbd/a", "namespace=n"]), "rbd/n/a");
        assert_eq!(name(&["image=rbd/a", "namespace="]), "rbd/a");
    }
}
