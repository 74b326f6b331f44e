//! Telling other programs that an image is in use, and being told.
//!
//! The language is QEMU's (its documentation, "Disk image file locking"; the numbers can be seen in
//! `/proc/locks`), so that QEMU, `qemu-img` and `qemu-storage-daemon` understand it, too. A program
//! that uses an image holds a shared lock on a byte for each thing that it does, and on another
//! byte for each thing that no other may do; then it looks whether another program has locked the
//! counterpart of one of these. No data is meant by the bytes. The locks are of the open file
//! description (`F_OFD_SETLK`): a dup has them, too, and the kernel lets go of them when the last
//! one is closed, however the process ends.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;

/// Byte for the first thing that is done.
const DONE: i64 = 100;
/// Byte for the first thing that no other program may do.
const FORBIDDEN: i64 = 200;

/// Byte that says that it was looked, and the image was free. QEMU knows none there. What holds the
/// others alone may be a process that has died before it looked.
const FREE: i64 = 300;

/// To read and rely on it.
const READ: i64 = 0;
/// To write.
const WRITE: i64 = 1;
/// To change the size.
const RESIZE: i64 = 3;

/// Whether an image may be used.
#[derive(Debug)]
pub enum ImageLock {
    /// Others can see that it is in use, as long as this open file description lives.
    Ours,
    /// Another program uses it in a way that does not go together with ours. Nothing is locked.
    Taken,
    /// Its file system has no such locks.
    Impossible(io::Error),
}

/// The bytes of what is done to an image, and of what no other program may do.
fn bytes(writes: bool) -> (impl Iterator<Item = i64> + Clone, impl Iterator<Item = i64>) {
    let does: &[i64] = if writes { &[READ, WRITE] } else { &[READ] };
    let forbids = &[WRITE, RESIZE];
    let of = |done: i64, forbidden: i64| {
        does.iter().map(move |what| done + what).chain(forbids.iter().map(move |w| forbidden + w))
    };
    (of(DONE, FORBIDDEN), of(FORBIDDEN, DONE))
}

/// Locks the image `file`: to read it while no other program writes, or, if `writes`, to write it
/// while no other does. Does not wait.
#[must_use]
pub fn lock_image(file: &File, writes: bool) -> ImageLock {
    let (ours, mut counterparts) = bytes(writes);
    let locked = ours.clone().try_for_each(|byte| lock(file, libc::F_RDLCK, byte));
    // First lock, then look: of two that come at once at least one sees the other.
    let is_free = locked.and_then(|()| {
        counterparts.try_fold(true, |free, byte| Ok(free & !is_locked(file, byte)?))
    });
    let refused = match is_free.and_then(|free| {
        if free {
            lock(file, libc::F_RDLCK, FREE)?;
        }
        Ok(free)
    }) {
        Ok(true) => return ImageLock::Ours,
        Ok(false) => ImageLock::Taken,
        // A lock of another kind that covers one of the bytes (fcntl(2)).
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            ImageLock::Taken
        }
        Err(error) => ImageLock::Impossible(error),
    };
    unlock_image(file, writes);
    refused
}

/// Whether this open file description has the image locked like this. The kernel lists its locks;
/// to ask for one says what others have, and not which of them.
///
/// # Errors
/// `/proc` does not say.
pub fn has_locked(file: &File, writes: bool) -> io::Result<bool> {
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let locks: Vec<RangeInclusive<i64>> = about.lines().filter_map(listed).collect();
    let mut needed = bytes(writes).0.chain([FREE]);
    Ok(needed.all(|byte| locks.iter().any(|lock| lock.contains(&byte))))
}

/// The bytes of a lock as `fdinfo` has it:
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:42 100 100`.
fn listed(line: &str) -> Option<RangeInclusive<i64>> {
    let words: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let [_, "OFDLCK", .., start, end] = words[..] else { return None };
    let end = if end == "EOF" { i64::MAX } else { end.parse().ok()? };
    Some(start.parse().ok()?..=end)
}

/// Lets others use an image that was locked like this. One that was not stays as it is.
pub fn unlock_image(file: &File, writes: bool) {
    // It cannot fail where it could be locked.
    let unlock = |byte| drop(lock(file, libc::F_UNLCK, byte));
    unlock(FREE);
    bytes(writes).0.for_each(unlock);
}

fn flock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn lock(file: &File, kind: libc::c_int, byte: i64) -> io::Result<()> {
    let about = flock(kind, byte);
    // SAFETY: the structure is valid for the call, and only read; the descriptor is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const about) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether another open file description has a lock on `byte`.
fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let mut about = flock(libc::F_WRLCK, byte);
    // SAFETY: the structure is valid for the call, which writes to it; the descriptor is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut about) } {
        0 => Ok(libc::c_int::from(about.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `lockf` does, but of the open file description.
    fn lock_all(file: &File) {
        let about = libc::flock { l_len: 0, ..flock(libc::F_WRLCK, 0) };
        // SAFETY: as in `lock`.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const about) };
        assert_eq!(result, 0);
    }

    #[test]
    fn one_may_write_or_many_may_read() {
        let path = std::env::temp_dir().join(format!("hotswap-lock-{}", std::process::id()));
        std::fs::write(&path, b"image").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let [first, second, third] = [open(), open(), open()];
        let is_ours = |file: &File, writes| match lock_image(file, writes) {
            ImageLock::Ours => true,
            ImageLock::Taken => false,
            ImageLock::Impossible(error) => panic!("{error}"),
        };
        assert!(is_ours(&first, true));
        assert!(is_ours(&first, true), "locked twice is locked");
        let has = |file: &File, writes| has_locked(file, writes).unwrap();
        assert!(has(&first, true) && has(&first.try_clone().unwrap(), true));
        assert!(!has(&second, false), "of others' locks nothing is said");
        bytes(false).0.for_each(|byte| lock(&second, libc::F_RDLCK, byte).unwrap());
        assert!(!has(&second, false), "it has not looked yet");
        unlock_image(&second, false);
        assert!(!is_ours(&second, true));
        assert!(!is_ours(&second, false));
        let dup = first.try_clone().unwrap();
        drop(first);
        assert!(!is_ours(&second, true), "a dup holds it, too");
        drop(dup);
        assert!(is_ours(&second, false), "nothing is left of one that was refused");
        assert!(is_ours(&third, false));
        let writer = open();
        assert!(!is_ours(&writer, true));
        unlock_image(&second, false);
        assert!(!is_ours(&writer, true), "the third reads it still");
        drop((second, third));
        assert!(is_ours(&writer, true));
        let other = open();
        unlock_image(&writer, true);
        assert!(!has(&writer, true));
        assert!(is_ours(&other, true), "what was given back is free");
        assert!(!is_ours(&writer, true));
        drop((other, writer));
        let other = open();
        lock_all(&other);
        assert!(!is_ours(&open(), false), "a lock of another kind is a lock");
        std::fs::remove_file(&path).unwrap();
    }
}
