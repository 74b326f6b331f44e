//! What a socket is called before it has its own name.

use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The longest path that fits `sockaddr_un`, whose last byte is the terminating NUL.
pub const SOCKET_PATH_MAX: usize = 107;

/// The names under which a socket is bound before it gets its own: `NAME~` and random letters, in
/// the same directory. Where that would be too long for a socket there is less of either.
#[derive(Debug)]
pub(super) struct DraftForm {
    /// With the slash at its end.
    directory: Vec<u8>,
    /// All of the name but the letters.
    stem: Vec<u8>,
    letters: usize,
}

/// What the random part of a draft's name is made of.
const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

impl DraftForm {
    /// That of `path`, unless it ends like a directory or is too long.
    pub(super) fn of(path: &Path) -> Option<DraftForm> {
        let path = path.as_os_str().as_bytes();
        let begin = path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
        let (directory, name) = path.split_at(begin);
        // For what is not the mark.
        let room = SOCKET_PATH_MAX.checked_sub(directory.len() + 1).filter(|_| !name.is_empty())?;
        let letters = room.min(8);
        // It must differ from the name even if there is room for nothing else.
        let mark: &[u8] = if name == b"~" { b"-" } else { b"~" };
        let stem = [&name[..name.len().min(room - letters)], mark].concat();
        Some(DraftForm { directory: directory.to_owned(), stem, letters })
    }

    pub(super) fn path(&self, name: &[u8]) -> PathBuf {
        OsString::from_vec([&self.directory, name].concat()).into()
    }

    pub(super) fn new_path(&self) -> PathBuf {
        let mut random = RandomState::new().build_hasher().finish();
        let mut name = self.stem.clone();
        for _ in 0..self.letters {
            name.push(LETTERS[(random % 32) as usize]);
            random /= 32;
        }
        self.path(&name)
    }

    pub(super) fn fits(&self, name: &[u8]) -> bool {
        let letters = name.strip_prefix(self.stem.as_slice());
        letters.is_some_and(|letters| {
            letters.len() == self.letters && letters.iter().all(|letter| LETTERS.contains(letter))
        })
    }

    /// The directory that the names are in.
    pub(super) fn directory(&self) -> &Path {
        let directory = if self.directory.is_empty() { b"." } else { self.directory.as_slice() };
        Path::new(OsStr::from_bytes(directory))
    }
}
