//! Who can put another module into the place of one: owner and mode of its file and its folders.
//!
//! What any user can write to is never loaded. If signatures are asked for, what another user than
//! root and the daemon's own has, or what a group can write to, is not, either.
//!
//! In a folder with the sticky bit, as `/tmp`, others cannot replace what is not theirs.

use crate::error::Error;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const BY_OTHERS: u32 = 0o002;
const BY_GROUP: u32 = 0o020;
const STICKY: u32 = 0o1000;

/// Checks the file at `path`, of which `metadata` is, and all folders above it. `is_strict` is with
/// signatures.
pub(crate) fn check(path: &Path, metadata: &Metadata, is_strict: bool) -> Result<(), Error> {
    let real = path.canonicalize().map_err(Error::Unreadable)?;
    entry(&real, metadata, is_strict)?;
    for folder in real.ancestors().skip(1) {
        let metadata = folder.symlink_metadata().map_err(Error::Unreadable)?;
        entry(folder, &metadata, is_strict)?;
    }
    Ok(())
}

fn entry(path: &Path, metadata: &Metadata, is_strict: bool) -> Result<(), Error> {
    let (mode, owner) = (metadata.mode(), metadata.uid());
    let own = rustix::process::geteuid().as_raw();
    let exposed = |why: String| {
        Err(Error::Exposed { what: crate::error::printable(&path.to_string_lossy()), why })
    };
    if is_strict && owner != 0 && owner != own {
        return exposed(format!("belongs to user {owner}, neither root nor the daemon's"));
    }
    if metadata.is_dir() && mode & STICKY != 0 {
        return Ok(());
    }
    match mode {
        _ if mode & BY_OTHERS != 0 => exposed("can be written to by all users".to_owned()),
        _ if is_strict && mode & BY_GROUP != 0 => {
            exposed(format!("can be written to by group {}", metadata.gid()))
        }
        _ => Ok(()),
    }
}

/// A file as it is when it is opened.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    file: (u64, u64),
    len: u64,
    changed: (i64, i64),
}

impl Seen {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            file: (metadata.dev(), metadata.ino()),
            len: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether `file`, and what is at `path` now, are that still.
    pub(crate) fn is_still(&self, file: &File, path: &Path) -> io::Result<bool> {
        let there = match path.metadata() {
            Ok(metadata) => Some(Self::of(&metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(there.as_ref() == Some(self) && Self::of(&file.metadata()?) == *self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    fn refusal(path: &Path, is_strict: bool) -> Option<String> {
        let metadata = fs::metadata(path).unwrap();
        match check(path, &metadata, is_strict) {
            Ok(()) => None,
            Err(Error::Exposed { what, why }) => Some(format!("{what} {why}")),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn what_others_can_write_to_is_found_in_all_folders() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let file = inner.join("m");
        fs::write(&file, b"x").unwrap();
        let mode =
            |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        for path in [dir.path(), &inner, &file] {
            let before = fs::metadata(path).unwrap().mode();
            assert_eq!((refusal(&file, false), refusal(&file, true)), (None, None));
            mode(path, before | BY_GROUP);
            assert_eq!(refusal(&file, false), None, "{path:?}");
            let why = refusal(&file, true).expect("a group can write to it");
            assert!(why.starts_with(&*path.to_string_lossy()) && why.contains("by group"), "{why}");
            mode(path, before | BY_OTHERS);
            for is_strict in [false, true] {
                let why = refusal(&file, is_strict).expect("all can write to it");
                assert!(why.contains("by all users"), "{why}");
            }
            if path != file {
                mode(path, before | BY_OTHERS | BY_GROUP | STICKY);
                assert_eq!(refusal(&file, true), None, "{path:?}");
            }
            mode(path, before);
        }
        // By way of a link it is the same file.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        mode(&inner, 0o777);
        assert!(refusal(&link, false).is_some());
    }

    #[test]
    fn another_users_file_is_refused_with_signatures() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m");
        fs::write(&file, b"x").unwrap();
        if chown(&file, Some(12345), None).is_err() {
            // Only root can give a file away.
            return;
        }
        assert_eq!(refusal(&file, false), None);
        assert!(refusal(&file, true).unwrap().contains("user 12345"));
    }

    #[test]
    fn a_file_that_is_exchanged_or_changed_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("m"), dir.path().join("n"));
        fs::write(&path, b"x").unwrap();
        let file = File::open(&path).unwrap();
        let seen = Seen::of(&file.metadata().unwrap());
        assert!(seen.is_still(&file, &path).unwrap());
        fs::write(&other, b"y").unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(!seen.is_still(&file, &path).unwrap());
        fs::remove_file(&path).unwrap();
        assert!(!seen.is_still(&file, &path).unwrap());
    }
}
