//! The private copy of a module: a memfd that cannot be changed any more.
//!
//! Why: overwriting a mapped file in place changes or kills the running code, and a file
//! that is checked and then opened again may be another one. So the file is copied, and everything
//! after that, the hash too, is of the sealed copy.
//!
//! All that goes piece by piece, through a buffer that stays in the processor's cache: a fresh page
//! costs 2 us here, so that a buffer for the whole file would take half a millisecond for half a
//! megabyte, more than reading, hashing and writing it.
//!
//! Invariant: a [`Sealed`] that exists carries all four seals; its bytes and its size never change
//! again, by no process, through no descriptor. Its name is unique in this process, so that its
//! mappings can be recognised in `/proc/self/maps`.

use crate::error::Error;
use memmap2::{Mmap, MmapOptions};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use sha2::{Digest, Sha256};
use std::fs::{File, FileType};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest module that is read.
const LIMIT: u64 = 64 << 20;

/// Number of the next copy. Only uniqueness matters, so nothing is ordered by it.
static NEXT: AtomicU64 = AtomicU64::new(1);

const PIECE: usize = 32 << 10;

/// What is copied at a time. Aligned as pages are: where the target of a copy lies up to 31 bytes
/// behind its source, as seen within a page, AMD's `rep movsb`, which the kernel copies with, is
/// ten times slower. Large allocations of glibc's lie just so, 16 bytes into a page.
#[repr(align(4096))]
struct Piece([u8; PIECE]);

/// A sealed copy of a file.
#[derive(Debug)]
pub(crate) struct Sealed {
    memfd: File,
    name: String,
    number: u64,
    len: u64,
    sha256: [u8; 32],
}

impl Sealed {
    /// Reads `file`, once, from where it is; `path` is for its name.
    pub(crate) fn copy_of(file: &mut File, path: &Path) -> Result<Self, Error> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hotswap-module-{number}-{}", label(path));
        let mut memfd = create(&name).map_err(Error::NotSealed)?;
        copy(file, &mut memfd)?;
        let all = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&memfd, all).map_err(|e| Error::NotSealed(e.into()))?;
        // Both of what is sealed, and not of what went into it: others could change the copy until
        // now.
        let len = memfd.metadata().map_err(Error::NotSealed)?.len();
        let sha256 = hash(&memfd, len).map_err(Error::NotSealed)?;
        Ok(Self { memfd, name, number, len, sha256 })
    }

    /// Whether `file`, from where it is, has the same bytes.
    pub(crate) fn is_copy_of(&self, file: &mut File) -> io::Result<bool> {
        let (mut piece, mut copied) = (Piece([0; _]), Piece([0; _]));
        let mut at = 0;
        loop {
            let len = read(file, &mut piece)?;
            if len == 0 {
                return Ok(at == self.len);
            }
            if len as u64 > self.len - at {
                return Ok(false);
            }
            self.memfd.read_exact_at(&mut copied.0[..len], at)?;
            if piece.0[..len] != copied.0[..len] {
                return Ok(false);
            }
            at += len as u64;
        }
    }

    /// How many bytes it has.
    pub(crate) const fn len(&self) -> u64 {
        self.len
    }

    /// SHA-256 of the copy's bytes.
    pub(crate) const fn sha256(&self) -> &[u8; 32] {
        &self.sha256
    }

    /// The copy's bytes.
    pub(crate) fn bytes(&self) -> Result<Mmap, Error> {
        // SAFETY: a mapped file may be used as bytes if it is neither changed nor shortened while
        // it is mapped; the seals forbid both to every process (`copy_of`, the only place where
        // `memfd` comes from).
        unsafe { MmapOptions::new().map_copy_read_only(&self.memfd) }.map_err(Error::NotSealed)
    }

    /// Number of the copy, never used twice in this process.
    pub(crate) const fn number(&self) -> u64 {
        self.number
    }

    /// Another descriptor of it.
    pub(crate) fn dup(&self) -> io::Result<OwnedFd> {
        self.memfd.try_clone().map(OwnedFd::from)
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

/// Opens what may be a module, and says how long it is.
pub(crate) fn open(path: &Path) -> Result<(File, u64), Error> {
    // NONBLOCK: opening a FIFO without a writer must fail the check below, not wait. Regular files
    // do not care.
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
    Ok((file, metadata.len()))
}

/// As `Read::read`, through interruptions.
fn read(file: &mut File, piece: &mut Piece) -> io::Result<usize> {
    loop {
        match file.read(&mut piece.0) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// SHA-256 of the first `len` bytes of `file`.
fn hash(file: &File, len: u64) -> io::Result<[u8; 32]> {
    let mut piece = Piece([0; _]);
    let mut hash = Sha256::new();
    let mut at = 0;
    while at < len {
        let part = &mut piece.0[..(len - at).min(PIECE as u64) as usize];
        file.read_exact_at(part, at)?;
        hash.update(&*part);
        at += part.len() as u64;
    }
    Ok(hash.finalize().into())
}

/// Copies all of `from`.
fn copy(from: &mut File, to: &mut File) -> Result<(), Error> {
    let mut piece = Piece([0; _]);
    let mut total = 0;
    loop {
        let len = read(from, &mut piece).map_err(Error::Unreadable)?;
        if len == 0 {
            break;
        }
        total += len as u64;
        // The file may grow while it is read, without end.
        if total > LIMIT {
            return Err(Error::TooLarge { len: total, limit: LIMIT });
        }
        to.write_all(&piece.0[..len]).map_err(Error::NotSealed)?;
    }
    if total == 0 { Err(Error::Empty) } else { Ok(()) }
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

/// Not to be executed as a program: mapping it as code does not need that, and where
/// `vm.memfd_noexec` is 2 there are no others.
fn create(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not know the flag.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        other => other?,
    };
    Ok(File::from(fd))
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

    fn copied(path: &Path) -> Sealed {
        Sealed::copy_of(&mut open(path).unwrap().0, path).unwrap()
    }

    #[test]
    fn a_copy_cannot_be_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libdomain_x y.so");
        std::fs::write(&path, b"contents").unwrap();
        let sealed = copied(&path);
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
    fn a_copy_knows_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        // More than one piece, and not a whole number of them.
        let contents: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &contents).unwrap();
        let copy = copied(&path);
        assert_eq!(copy.sha256(), &<[u8; 32]>::from(Sha256::digest(&contents)));
        assert_eq!((&copy.bytes().unwrap()[..], copy.len()), (&contents[..], 100_000));
        let is_same = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut changed = contents.clone();
            change(&mut changed);
            std::fs::write(&path, &changed).unwrap();
            copy.is_copy_of(&mut open(&path).unwrap().0).unwrap()
        };
        assert!(is_same(&|_| ()));
        assert!(!is_same(&|bytes| bytes[0] ^= 1));
        assert!(!is_same(&|bytes| bytes[99_999] ^= 1));
        assert!(!is_same(&|bytes| bytes.push(0)));
        assert!(!is_same(&|bytes| bytes.truncate(99_999)));
        assert!(!is_same(&|bytes| bytes.truncate(PIECE)));
    }

    #[test]
    fn a_mapping_is_recognised_by_its_whole_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        std::fs::write(&path, b"contents").unwrap();
        let (mapped, other) = (copied(&path), copied(&path));
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
        assert!(matches!(open(&path), Err(Error::TooLarge { .. })));
    }
}
