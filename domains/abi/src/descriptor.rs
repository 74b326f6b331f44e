//! The descriptor: what a module is, as fixed bytes in its file.
//!
//! It sits in an ELF section of its own ([`SECTION`]), has no pointers and needs no relocation, so
//! that the host can read and refuse a module without mapping it or running any of its code. All
//! integers are little-endian, as is every target this builds for; text is UTF-8, zero-padded.

use crate::ABI_VERSION;

/// Name of the ELF section.
pub const SECTION: &str = ".hotswap.domain";

/// The descriptor's first bytes.
pub const MAGIC: [u8; 16] = *b"vhost-hotswap\0\0\0";

/// Device class: a block device.
pub const CLASS_BLOCK: u32 = 1;

/// The module unwinds on panic, so that a panic can be caught at the ABI.
pub const PANIC_UNWIND: u32 = 1;
/// The module aborts on panic: refused, because its panic would end the daemon.
pub const PANIC_ABORT: u32 = 2;

/// How many schema numbers a domain can accept.
pub const MAX_SCHEMAS: usize = 8;

/// The fixed bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    magic: [u8; 16],
    size: u32,
    abi_version: u32,
    class: u32,
    panic_strategy: u32,
    name: [u8; 32],
    version: [u8; 32],
    schema_name: [u8; 32],
    schema: u32,
    accepted_count: u32,
    accepted: [u32; MAX_SCHEMAS],
    params: [u8; 160],
    inherited: [u8; 160],
}

/// Why bytes are no descriptor that this host can use. The sentences say what to do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DescriptorError {
    /// The magic is missing.
    #[error("its descriptor does not start with the magic bytes; build it with export_domain!")]
    Magic,
    /// The section is shorter than a descriptor.
    #[error(
        "its descriptor is {found} bytes long, {expected} are needed; build it against this host's domain-abi"
    )]
    Size {
        /// Bytes there are.
        found: usize,
        /// Bytes there should be.
        expected: usize,
    },
    /// Built for another ABI.
    #[error(
        "it was built for domain ABI {found}, this host speaks {ABI_VERSION}; rebuild it against this host's domain-abi"
    )]
    AbiVersion {
        /// The module's version.
        found: u32,
    },
    /// Not a block device.
    #[error("it is of device class {found}, this host serves block devices (class {CLASS_BLOCK})")]
    Class {
        /// The module's class.
        found: u32,
    },
    /// Aborts on panic.
    #[error(
        "it was built with panic=abort, so that its panic would end the daemon; build it with panic=unwind"
    )]
    PanicStrategy,
    /// A field is malformed.
    #[error("the field `{field}` of its descriptor is malformed; build it with export_domain!")]
    Field {
        /// Which one.
        field: &'static str,
    },
}

/// The descriptor's contents, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The domain's name, `[a-z0-9_-]+`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Name of the storage layout that it speaks.
    pub schema_name: String,
    /// Number of the layout that it writes.
    pub schema: u32,
    /// Numbers of the layouts that it can take over.
    pub accepted_schemas: Vec<u32>,
    /// Parameters that it takes.
    pub params: Vec<String>,
    /// Those of them that a successor takes over from its predecessor where they are not given.
    pub inherited: Vec<String>,
}

impl Descriptor {
    /// Makes a descriptor. Meant for `domain_api::export_domain!`; a text that is too
    /// long fails to compile.
    #[must_use]
    pub const fn new(
        name: &str,
        version: &str,
        schema_name: &str,
        schema: u32,
        accepted: &[u32],
        params: &[&str],
        inherited: &[&str],
    ) -> Self {
        assert!(accepted.len() <= MAX_SCHEMAS, "too many accepted schemas");
        let mut schemas = [0; MAX_SCHEMAS];
        let mut i = 0;
        while i < accepted.len() {
            schemas[i] = accepted[i];
            i += 1;
        }
        Self {
            magic: MAGIC,
            size: size_of::<Self>() as u32,
            abi_version: ABI_VERSION,
            class: CLASS_BLOCK,
            panic_strategy: if cfg!(panic = "unwind") { PANIC_UNWIND } else { PANIC_ABORT },
            name: padded(name),
            version: padded(version),
            schema_name: padded(schema_name),
            schema,
            accepted_count: accepted.len() as u32,
            accepted: schemas,
            params: padded_list(params),
            inherited: padded_list(inherited),
        }
    }
}

const fn padded<const N: usize>(text: &str) -> [u8; N] {
    let bytes = text.as_bytes();
    assert!(bytes.len() < N, "text too long for its field in the descriptor");
    let mut out = [0; N];
    let mut i = 0;
    while i < bytes.len() {
        out[i] = bytes[i];
        i += 1;
    }
    out
}

const fn padded_list<const N: usize>(names: &[&str]) -> [u8; N] {
    let mut out = [0; N];
    let mut at = 0;
    let mut i = 0;
    while i < names.len() {
        let bytes = names[i].as_bytes();
        assert!(at + bytes.len() + 1 < N, "too many parameters for the descriptor");
        let mut j = 0;
        while j < bytes.len() {
            out[at] = bytes[j];
            at += 1;
            j += 1;
        }
        out[at] = b' ';
        at += 1;
        i += 1;
    }
    out
}

impl Description {
    /// Reads and checks the bytes of the section.
    ///
    /// # Errors
    /// Any way in which they are not a descriptor of a block domain for this ABI. Never panics,
    /// whatever the bytes are.
    pub fn parse(section: &[u8]) -> Result<Self, DescriptorError> {
        let magic = section.get(..MAGIC.len()).ok_or(DescriptorError::Magic)?;
        if magic != MAGIC {
            return Err(DescriptorError::Magic);
        }
        let mut fields = Fields { bytes: section, at: MAGIC.len() };
        let expected = size_of::<Descriptor>();
        let short = DescriptorError::Size { found: section.len(), expected };
        let size =
            fields.u32().ok_or(DescriptorError::Size { found: section.len(), expected })? as usize;
        // The ABI version comes first: with another version the rest may be laid out otherwise.
        let abi_version =
            fields.u32().ok_or(DescriptorError::Size { found: section.len(), expected })?;
        if abi_version != ABI_VERSION {
            return Err(DescriptorError::AbiVersion { found: abi_version });
        }
        if size < expected || section.len() < expected {
            return Err(short);
        }
        let whole =
            |value: Option<u32>| value.ok_or(DescriptorError::Size { found: size, expected });
        let class = whole(fields.u32())?;
        if class != CLASS_BLOCK {
            return Err(DescriptorError::Class { found: class });
        }
        if whole(fields.u32())? != PANIC_UNWIND {
            return Err(DescriptorError::PanicStrategy);
        }
        let name = fields.text("name", 32)?;
        let version = fields.text("version", 32)?;
        let schema_name = fields.text("schema_name", 32)?;
        let schema = whole(fields.u32())?;
        let accepted_count = whole(fields.u32())? as usize;
        let mut accepted_schemas = Vec::new();
        for _ in 0..MAX_SCHEMAS {
            accepted_schemas.push(whole(fields.u32())?);
        }
        if accepted_count > MAX_SCHEMAS {
            return Err(DescriptorError::Field { field: "accepted_count" });
        }
        accepted_schemas.truncate(accepted_count);
        let params = fields.list("params", 160)?;
        let inherited = fields.list("inherited", 160)?;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(DescriptorError::Field { field: "name" });
        }
        if version.is_empty() {
            return Err(DescriptorError::Field { field: "version" });
        }
        Ok(Self { name, version, schema_name, schema, accepted_schemas, params, inherited })
    }
}

struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn text(&mut self, field: &'static str, len: usize) -> Result<String, DescriptorError> {
        let bytes = self.take(len).ok_or(DescriptorError::Field { field })?;
        let end = bytes.iter().position(|&b| b == 0).ok_or(DescriptorError::Field { field })?;
        let text =
            std::str::from_utf8(&bytes[..end]).map_err(|_| DescriptorError::Field { field })?;
        if text.chars().any(char::is_control) {
            return Err(DescriptorError::Field { field });
        }
        Ok(text.to_owned())
    }

    fn list(&mut self, field: &'static str, len: usize) -> Result<Vec<String>, DescriptorError> {
        Ok(self.text(field, len)?.split_ascii_whitespace().map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(descriptor: &Descriptor) -> Vec<u8> {
        // SAFETY: `Descriptor` is `repr(C)` of integers and byte arrays whose sizes are multiples
        // of 4: no padding.
        unsafe {
            std::slice::from_raw_parts(
                std::ptr::from_ref(descriptor).cast::<u8>(),
                size_of::<Descriptor>(),
            )
            .to_vec()
        }
    }

    fn sample() -> Vec<u8> {
        bytes(&Descriptor::new(
            "ramdisk",
            "1.2.3",
            "ramdisk",
            4,
            &[3, 4],
            &["size", "serial"],
            &["size"],
        ))
    }

    #[test]
    fn what_is_written_is_read() {
        let read = Description::parse(&sample()).unwrap();
        assert_eq!(read.name, "ramdisk");
        assert_eq!(read.version, "1.2.3");
        assert_eq!(read.schema, 4);
        assert_eq!(read.accepted_schemas, [3, 4]);
        assert_eq!(read.params, ["size", "serial"]);
        assert_eq!(read.inherited, ["size"]);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = sample();
        for len in 0..whole.len() {
            assert!(Description::parse(&whole[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn another_abi_class_or_panic_strategy_is_refused() {
        let patched = |at: usize, value: u32| {
            let mut whole = sample();
            whole[at..at + 4].copy_from_slice(&value.to_le_bytes());
            Description::parse(&whole).unwrap_err()
        };
        assert_eq!(patched(20, 7), DescriptorError::AbiVersion { found: 7 });
        assert_eq!(patched(24, 9), DescriptorError::Class { found: 9 });
        assert_eq!(patched(28, PANIC_ABORT), DescriptorError::PanicStrategy);
    }

    #[test]
    fn no_single_byte_makes_it_panic() {
        let whole = sample();
        for at in 0..whole.len() {
            for value in [0, 1, 0x2e, 0x7f, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = Description::parse(&bytes);
            }
        }
    }
}
