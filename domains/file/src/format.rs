//! Images that are no raw disks: refused, because their bytes are not the guest's.
//!
//! What an image begins with says which format it has, but its guest writes there, too. A guest
//! that puts such a header on its own raw disk must not have that disk refused at the next start.
//! So an image is looked at once: it is noted at the file itself that it is raw (an extended
//! attribute), and one with that note, or `format=raw`, is never looked at again. Where no note can
//! be kept, as for a block device, nothing is refused that the guest may have written; a line says
//! what it looks like.

use domain_api::{DomainError, Host, Level};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// Where it is noted that an image is raw.
const NOTE: &str = "user.vhost-hotswap.format";
const RAW: &[u8] = b"raw";

/// What a format begins with, and where.
const FORMATS: &[(&str, u64, &[u8])] = &[
    ("qcow2", 0, b"QFI\xfb\0\0\0\x02"),
    ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
];

/// Looks at a new disk's image, unless it is known to be raw; notes that it is.
pub(crate) fn check(
    host: Host,
    file: &File,
    path: &str,
    writable: bool,
) -> Result<(), DomainError> {
    let mut note = [0; 16];
    let can_note = match rustix::fs::fgetxattr(file, NOTE, &mut note[..]) {
        Ok(len) if note[..len] == *RAW => return Ok(()),
        Ok(_) | Err(Errno::NODATA | Errno::RANGE) => true,
        Err(_) => false,
    };
    match format_of(file) {
        // What cannot be written was not written by the guest.
        Some(format) if can_note || !writable => Err(DomainError::new(sentence(path, format))),
        Some(format) => {
            let line = format!(
                "`{path}` begins like a {format} image, and is served as a raw disk; if it is one, its guest has written that"
            );
            host.log(Level::Warn, &line);
            Ok(())
        }
        None => {
            if can_note && writable {
                note_raw(host, file, path);
            }
            Ok(())
        }
    }
}

fn note_raw(host: Host, file: &File, path: &str) {
    if let Err(error) = rustix::fs::fsetxattr(file, NOTE, RAW, XattrFlags::empty()) {
        let line = format!(
            "it cannot be noted that `{path}` is raw ({error}); give format=raw, or a guest can have its disk refused by writing the header of another format"
        );
        host.log(Level::Warn, &line);
    }
}

/// The format that an image has by its first bytes, if that is not raw.
fn format_of(file: &File) -> Option<&'static str> {
    let mut head = [0; 128];
    let mut have = 0;
    while have < head.len() {
        // What cannot be read is found out when it is served.
        match file.read_at(&mut head[have..], have as u64) {
            Ok(0) | Err(_) => break,
            Ok(read) => have += read,
        }
    }
    let begins = |at: u64, magic: &[u8]| {
        head[..have].get(at as usize..).is_some_and(|bytes| bytes.starts_with(magic))
    };
    FORMATS.iter().find(|(_, at, magic)| begins(*at, magic)).map(|(format, ..)| *format)
}

fn sentence(path: &str, format: &str) -> String {
    format!(
        "`{path}` is a {format} image, and its bytes are not the disk's; let QEMU read it with \
         `qemu-nbd --persistent --shared=4 --discard=unmap --format={format} --socket={path}.nbd {path}`, \
         and serve that with --domain nbd --param uri=nbd+unix:///?socket={path}.nbd; \
         or give --param format=raw if the guest is to have these very bytes"
    )
}
