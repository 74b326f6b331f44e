//! Who can put another module into the place of one: owner and mode of its file, and of all folders
//! that are looked into on the way to it.
//!
//! The way is walked as the kernel walks it: a link is an entry of the folder that it is in, and
//! leads on from there, so that folder counts as much as those above the file.
//!
//! What any user can write to is never loaded. If signatures are asked for, what another user than
//! root and the daemon's own has, or what a group can write to, is not, either.
//!
//! In a folder with the sticky bit, as `/tmp`, others cannot replace what is not theirs, but they
//! can add to it: what is in one that all can write to has to be root's or the daemon's own.

use crate::error::Error;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

const BY_OTHERS: u32 = 0o002;
const BY_GROUP: u32 = 0o020;
const STICKY: u32 = 0o1000;

/// Links that are followed, as many as the kernel follows.
const LINKS: usize = 40;

/// Checks the file that was opened at `path`, of which `metadata` is, and all that leads there.
/// `is_strict` is with signatures. Returns where the file is, with no link on the way.
pub(crate) fn check(path: &Path, metadata: &Metadata, is_strict: bool) -> Result<PathBuf, Error> {
    let path = std::path::absolute(path).map_err(Error::Unreadable)?;
    let (mut here, mut links) = (PathBuf::from("/"), 0);
    let mut folder = look(&here)?;
    entry(&here, &folder, is_strict, false)?;
    let mut ahead = steps(&path);
    while let Some(step) = ahead.pop_front() {
        if step == ".." {
            here.pop();
            folder = look(&here)?;
            continue;
        }
        let at = here.join(&step);
        let found = look(&at)?;
        let is_shared = folder.mode() & (STICKY | BY_OTHERS) == STICKY | BY_OTHERS;
        entry(&at, &found, is_strict, is_shared)?;
        if found.is_symlink() {
            links += 1;
            if links > LINKS {
                return Err(Error::Unreadable(rustix::io::Errno::LOOP.into()));
            }
            let target = at.read_link().map_err(Error::Unreadable)?;
            if target.has_root() {
                here = PathBuf::from("/");
                folder = look(&here)?;
            }
            let mut rest = steps(&target);
            rest.append(&mut ahead);
            ahead = rest;
        } else {
            (here, folder) = (at, found);
        }
    }
    // Else what leads to the file that is open has not been looked at.
    if (folder.dev(), folder.ino()) != (metadata.dev(), metadata.ino()) {
        return Err(Error::Swapped);
    }
    Ok(here)
}

fn look(path: &Path) -> Result<Metadata, Error> {
    path.symlink_metadata().map_err(Error::Unreadable)
}

/// Names, and `..`, of a path.
fn steps(path: &Path) -> VecDeque<OsString> {
    let is_step =
        |step: &Component<'_>| matches!(step, Component::Normal(_) | Component::ParentDir);
    path.components().filter(is_step).map(|step| step.as_os_str().to_owned()).collect()
}

/// Checks a file, a folder or a link. `is_shared` is what is in a folder that all can add to.
fn entry(path: &Path, metadata: &Metadata, is_strict: bool, is_shared: bool) -> Result<(), Error> {
    let (mode, owner) = (metadata.mode(), metadata.uid());
    let own = rustix::process::geteuid().as_raw();
    let exposed = |why: String| {
        Err(Error::Exposed { what: crate::error::printable(&path.to_string_lossy()), why })
    };
    if (is_strict || is_shared) && owner != 0 && owner != own {
        let place = if is_shared { ", in a folder that all users can add to" } else { "" };
        return exposed(format!("belongs to user {owner}, neither root nor the daemon's{place}"));
    }
    // Nothing is written to a link: its folder's mode says who can make another.
    if metadata.is_symlink() || metadata.is_dir() && mode & STICKY != 0 {
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
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};

    fn refusal(path: &Path, is_strict: bool) -> Option<String> {
        let metadata = fs::metadata(path).unwrap();
        match check(path, &metadata, is_strict) {
            Ok(_) => None,
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
        symlink(&file, &link).unwrap();
        mode(&inner, 0o777);
        assert!(refusal(&link, false).is_some());
    }

    /// A folder with these mode bits in another one.
    fn folder(dir: &Path, name: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn the_folders_that_links_are_in_count_as_those_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let [closed, other] = ["closed", "other"].map(|name| folder(dir.path(), name, 0o755));
        let file = closed.join("m");
        fs::write(&file, b"x").unwrap();
        let open = folder(dir.path(), "open", 0o777);
        // The last piece of the way, one in the middle, and one that another link leads to.
        symlink("../closed/m", open.join("m")).unwrap();
        symlink("../closed", open.join("current")).unwrap();
        symlink("../open/m", other.join("first")).unwrap();
        symlink(open.join("current"), other.join("second")).unwrap();
        let ways = [
            open.join("m"),
            open.join("current/m"),
            other.join("first"),
            other.join("second/m"),
            open.join("../closed/m"),
        ];
        for way in &ways {
            let why = refusal(way, false).expect("all can write to where a link is");
            assert!(why.starts_with(&*open.to_string_lossy()), "{why}");
        }
        fs::set_permissions(&open, Permissions::from_mode(0o755)).unwrap();
        let real = file.canonicalize().unwrap();
        for way in &ways {
            let metadata = fs::metadata(way).unwrap();
            assert_eq!(check(way, &metadata, true).unwrap(), real, "{way:?}");
        }
    }

    #[test]
    fn another_file_than_the_one_that_is_open_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let [open, there] = ["open", "there"].map(|name| dir.path().join(name));
        fs::write(&open, b"x").unwrap();
        fs::write(&there, b"x").unwrap();
        let metadata = fs::metadata(&open).unwrap();
        assert!(matches!(check(&there, &metadata, false), Err(Error::Swapped)));
        symlink("loop", dir.path().join("loop")).unwrap();
        let looped = check(&dir.path().join("loop"), &metadata, false);
        assert!(matches!(looped, Err(Error::Unreadable(_))), "{looped:?}");
    }

    #[test]
    fn what_others_have_added_to_a_sticky_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let closed = folder(dir.path(), "closed", 0o755);
        let sticky = folder(dir.path(), "sticky", 0o1777);
        let [own, file, link] = ["own", "file", "link"].map(|name| sticky.join(name));
        for file in [&own, &file, &closed.join("m")] {
            fs::write(file, b"x").unwrap();
        }
        let inner = folder(&sticky, "inner", 0o755);
        fs::write(inner.join("m"), b"x").unwrap();
        symlink("../closed", &link).unwrap();
        let ways = [file.clone(), link.join("m"), inner.join("m")];
        for way in ways.iter().chain([&own]) {
            assert_eq!(refusal(way, false), None, "{way:?}");
        }
        for given in [&file, &link, &inner] {
            if lchown(given, Some(12345), None).is_err() {
                // Only root can give a file away.
                return;
            }
        }
        for (way, given) in ways.iter().zip([&file, &link, &inner]) {
            let why = refusal(way, false).expect("another user has added it");
            assert!(why.starts_with(&*given.to_string_lossy()) && why.contains("12345"), "{why}");
        }
        assert_eq!(refusal(&own, false), None);
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
