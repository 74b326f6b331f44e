//! Opening files for a disk's sake: what a descriptor was opened for, and what direct I/O wants of
//! it.
//!
//! `O_DIRECT` and the access mode belong to the open file description, which a dup shares. So a
//! domain that wants other flags than the storage's descriptor has cannot change them on a dup (its
//! predecessor would feel it); it opens the same inode again with [`reopen`], which works whatever
//! happened to the file's name meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// What a descriptor is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenMode {
    /// Can be written, not only read.
    pub write: bool,
    /// Goes past the page cache (`O_DIRECT`).
    pub direct: bool,
}

/// What direct I/O must be aligned to, in bytes: powers of two, 512 or more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// Addresses.
    pub memory: u32,
    /// Offsets and lengths.
    pub offset: u32,
}

impl Alignment {
    /// What everything is aligned to that a disk is asked for.
    pub const SECTORS: Self = Self { memory: 512, offset: 512 };
}

/// Opens a file that exists.
///
/// # Errors
/// What `open` says; `EINVAL` for `direct` where the file system cannot do it.
pub fn open(path: &Path, mode: OpenMode) -> io::Result<File> {
    let flags = if mode.direct { libc::O_DIRECT } else { 0 };
    File::options().read(true).write(mode.write).custom_flags(flags).open(path)
}

/// Opens the very file behind `file` again: the same inode, another open file description.
///
/// # Errors
/// As for [`open`]; also where `/proc` is not mounted.
pub fn reopen(file: &File, mode: OpenMode) -> io::Result<File> {
    open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())), mode)
}

/// How `file` was opened.
///
/// # Errors
/// What `fcntl` says.
pub fn open_mode(file: &File) -> io::Result<OpenMode> {
    // SAFETY: no pointers; the descriptor is open because `file` is borrowed.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(OpenMode {
        write: flags & libc::O_ACCMODE == libc::O_RDWR,
        direct: flags & libc::O_DIRECT != 0,
    })
}

/// What direct I/O on `file` must be aligned to.
///
/// # Errors
/// `EINVAL` where it cannot do direct I/O with any alignment up to 4096.
pub fn direct_alignment(file: &File) -> io::Result<Alignment> {
    if let Some(align) = stated_alignment(file)? {
        return Ok(align);
    }
    // An older kernel or file system does not say. A read of one such block at the second such
    // offset shows it; reading at the end of the file gives 0 bytes, which is as good.
    const LARGEST: usize = 4096;
    let mut memory = vec![0u8; 3 * LARGEST];
    for align in [512, LARGEST] {
        // An address that is a multiple of `align` and of nothing larger.
        let start = memory.as_ptr().align_offset(LARGEST) + align % LARGEST;
        match file.read_at(&mut memory[start..start + align], align as u64) {
            Ok(_) => return Ok(Alignment { memory: align as u32, offset: align as u32 }),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

/// As [`direct_alignment`], as far as `statx` says it (`STATX_DIOALIGN`, Linux 6.1); `None` if it
/// says nothing. It may change while a file is open.
///
/// # Errors
/// `EINVAL` where it says that there is no direct I/O; what `statx` says.
pub fn stated_alignment(file: &File) -> io::Result<Option<Alignment>> {
    // SAFETY: a structure of integers: all zeros is one.
    let mut about: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string, `about` is valid for the call, the descriptor is open.
    let code = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut about,
        )
    };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    if about.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(None);
    }
    let (memory, offset) = (about.stx_dio_mem_align, about.stx_dio_offset_align);
    // 0 means: not on this file. So says open(2) too, where it was opened with O_DIRECT.
    if !memory.is_power_of_two() || !offset.is_power_of_two() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // Lengths of pieces are bound by either, and pieces are of whole sectors anyway.
    Ok(Some(Alignment { memory: memory.max(512), offset: offset.max(512) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_file_is_opened_again_after_its_name_is_gone() {
        let path = std::env::temp_dir().join(format!("hotswap-open-{}", std::process::id()));
        std::fs::write(&path, vec![7u8; 8192]).unwrap();
        let file = open(&path, OpenMode { write: false, direct: false }).unwrap();
        assert_eq!(open_mode(&file).unwrap(), OpenMode { write: false, direct: false });
        std::fs::remove_file(&path).unwrap();
        let again = reopen(&file, OpenMode { write: true, direct: false }).unwrap();
        assert_eq!(open_mode(&again).unwrap(), OpenMode { write: true, direct: false });
        assert_eq!(open_mode(&file).unwrap(), OpenMode { write: false, direct: false });
        let (one, two) = (file.metadata().unwrap(), again.metadata().unwrap());
        assert_eq!((one.dev(), one.ino()), (two.dev(), two.ino()));
    }

    #[test]
    fn direct_io_says_what_it_needs() {
        let path = std::env::temp_dir().join(format!("hotswap-direct-{}", std::process::id()));
        std::fs::write(&path, vec![7u8; 16384]).unwrap();
        let opened = open(&path, OpenMode { write: true, direct: true });
        std::fs::remove_file(&path).unwrap();
        let Ok(file) = opened else {
            eprintln!("skipped: no direct I/O in {}", std::env::temp_dir().display());
            return;
        };
        let Alignment { memory, offset } = direct_alignment(&file).unwrap();
        let align = memory.max(offset) as usize;
        assert!(align.is_power_of_two() && (512..=4096).contains(&align), "{align}");
        let mut memory = vec![0u8; 2 * align + 4096];
        let start = memory.as_ptr().align_offset(align.max(4096));
        assert_eq!(file.read_at(&mut memory[start..start + align], align as u64).unwrap(), align);
    }
}
