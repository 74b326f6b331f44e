//! The private copy of a module: a memfd that nobody can change any more.
//!
//! Why: whoever overwrites a mapped file in place changes or kills the running code, and a file that is checked and then
//! opened again may be another one. So the file is read once, and everything after that sees the copy.
//!
//! Invariant: a [`Sealed`] that exists carries all four seals; its bytes and its size never change again, for nobody, through no
//! descriptor. Its name is unique in this process, so that its mappings can be recognised in `/proc/self/maps`.

use crate::error::Error;
use memmap2::{Mmap, MmapOptions};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use std::fs::{File, FileType};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest module that is read.
const LIMIT: u64 = 64 << 20;

/// Number of the next copy. Only uniqueness matters, so nothing is ordered by it.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A sealed copy of a file.
#[derive(Debug)]
pub(crate) struct Sealed {
    memfd: File,
    name: String,
    number: u64,
}

impl Sealed {
    /// Reads the file at `path`, once.
    pub(crate) fn copy_of(path: &Path) -> Result<Self, Error> {
        let contents = read(path)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hotswap-module-{number}-{}", label(path));
        let memfd = seal(&name, &contents).map_err(Error::NotSealed)?;
        Ok(Self { memfd, name, number })
    }

    /// The copy's bytes.
    pub(crate) fn bytes(&self) -> Result<Mmap, Error> {
        // SAFETY: a mapped file may be used as bytes if nobody changes or shortens it while it is mapped; the seals forbid both to
        // everybody (`seal`, the only place where `memfd` comes from).
        unsafe { MmapOptions::new().map_copy_read_only(&self.memfd) }.map_err(Error::NotSealed)
    }

    /// Number of the copy, never used twice in this process.
    pub(crate) const fn number(&self) -> u64 {
        self.number
    }

    /// The descriptor, as long as the copy exists.
    pub(crate) fn raw_fd(&self) -> i32 {
        self.memfd.as_raw_fd()
    }

    /// Whether `maps`, the text of a `/proc/PID/maps`, has a mapping of this copy.
    pub(crate) fn is_in(&self, maps: &[u8]) -> bool {
        let ending = format!("/memfd:{} (deleted)", self.name);
        maps.split(|&b| b == b'\n').any(|line| line.ends_with(ending.as_bytes()))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    // NONBLOCK: opening a FIFO without a writer must fail the check below, not wait. Regular files do not care.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Err(Error::NoFile),
        // What open says about a socket.
        Err(rustix::io::Errno::NXIO) => return Err(Error::NotAFile("a socket or a device")),
        Err(e) => return Err(Error::Unreadable(e.into())),
    };
    let metadata = file.metadata().map_err(Error::Unreadable)?;
    if !metadata.is_file() {
        return Err(Error::NotAFile(kind(metadata.file_type())));
    }
    if metadata.len() > LIMIT {
        return Err(Error::TooLarge { len: metadata.len(), limit: LIMIT });
    }
    let mut contents = Vec::with_capacity(metadata.len() as usize);
    // The file may grow while it is read, without end.
    file.take(LIMIT + 1).read_to_end(&mut contents).map_err(Error::Unreadable)?;
    match contents.len() as u64 {
        0 => Err(Error::Empty),
        len if len > LIMIT => Err(Error::TooLarge { len, limit: LIMIT }),
        _ => Ok(contents),
    }
}

fn kind(file_type: FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else {
        "a device"
    }
}

fn seal(name: &str, contents: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        // Linux before 6.3 does not know the flag; there every memfd is executable.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        other => other?,
    };
    let mut memfd = File::from(fd);
    memfd.write_all(contents)?;
    let all = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memfd, all)?;
    Ok(memfd)
}

/// A short, harmless form of the file's name, for people who read `/proc/PID/maps`.
fn label(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "_-.".contains(c) { c } else { '_' };
    stem.trim_start_matches("libdomain_").chars().take(64).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_copy_cannot_be_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libdomain_x y.so");
        std::fs::write(&path, b"contents").unwrap();
        let sealed = Sealed::copy_of(&path).unwrap();
        std::fs::write(&path, b"other contents").unwrap();
        assert!(sealed.name.ends_with("-x_y"), "{}", sealed.name);
        let again = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", sealed.raw_fd()))
            .unwrap();
        for file in [&sealed.memfd, &again] {
            assert!(file.write_at(b"X", 0).is_err());
            assert!(file.set_len(1).is_err());
            assert!(file.set_len(1 << 20).is_err());
            assert!(rustix::fs::fcntl_add_seals(file, SealFlags::FUTURE_WRITE).is_err());
        }
        assert_eq!(&sealed.bytes().unwrap()[..], b"contents");
    }

    #[test]
    fn a_mapping_is_recognised_by_its_whole_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        std::fs::write(&path, b"contents").unwrap();
        let (mapped, other) = (Sealed::copy_of(&path).unwrap(), Sealed::copy_of(&path).unwrap());
        let maps = || std::fs::read("/proc/self/maps").unwrap();
        let bytes = mapped.bytes().unwrap();
        assert!(mapped.is_in(&maps()));
        assert!(!other.is_in(&maps()));
        drop(bytes);
        assert!(!mapped.is_in(&maps()));
    }

    #[test]
    fn a_file_that_is_just_too_large_is_refused_without_reading() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        File::create(&path).unwrap().set_len(LIMIT + 1).unwrap();
        assert!(matches!(read(&path), Err(Error::TooLarge { .. })));
    }
}
