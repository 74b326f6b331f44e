//! From a name to a file.
//!
//! A name without `/` is looked up as `libdomain_NAME.so` in each directory, in order; anything
//! with a `/` is a path and taken as it is. The first directory that has an entry of that name
//! decides: if the file there turns out to be unfit, that is the answer. Going on to the next
//! directory would be the fallback that a wrong name must never get.
//!
//! Deliberately absent: looking into files.

use crate::error::{Error, printable};
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

const PREFIX: &str = "libdomain_";
const SUFFIX: &str = ".so";

pub(crate) fn find(dirs: &[PathBuf], name: &str) -> Result<PathBuf, Error> {
    if name.contains('/') {
        return Ok(PathBuf::from(name));
    }
    // The empty name is none, whatever files there are.
    for dir in dirs.iter().filter(|_| !name.is_empty()) {
        let path = dir.join(format!("{PREFIX}{name}{SUFFIX}"));
        // Not `exists()`: a dangling link or a file that may not be looked at is there, and is the
        // answer.
        match path.symlink_metadata() {
            Ok(_) => return Ok(path),
            Err(e) if is_absence(&e) => {}
            Err(e) => return Err(Error::Unreadable(e)),
        }
    }
    Err(unknown(dirs))
}

/// The names in `dirs`, sorted, each once.
pub(crate) fn names(dirs: &[PathBuf]) -> Vec<String> {
    let names: BTreeSet<String> =
        dirs.iter().flat_map(|dir| names_in(dir).unwrap_or_default()).collect();
    names.into_iter().collect()
}

fn names_in(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in dir.read_dir()? {
        let file = entry?.file_name();
        let name =
            file.to_str().and_then(|f| f.strip_prefix(PREFIX)).and_then(|f| f.strip_suffix(SUFFIX));
        names.extend(name.filter(|n| !n.is_empty()).map(str::to_owned));
    }
    Ok(names)
}

/// Whether the error says that there is nothing; a name that no file can have is not there either.
fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::InvalidFilename
    )
}

fn unknown(dirs: &[PathBuf]) -> Error {
    let shown = |dir: &PathBuf| format!("`{}`", printable(&dir.to_string_lossy()));
    let listed = dirs.iter().map(shown).collect::<Vec<_>>().join(", ");
    let names = names(dirs);
    let choice = if names.is_empty() {
        "there are no modules at all: give a directory with libdomain_*.so files, or a path with a `/`"
            .to_owned()
    } else {
        let names: Vec<_> = names.iter().map(|n| printable(n)).collect();
        format!("use one of these, or a path with a `/`: {}", names.join(", "))
    };
    Error::UnknownName {
        dirs: if dirs.is_empty() { "no directory".to_owned() } else { listed },
        choice,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir_with(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            std::fs::write(dir.path().join(file), b"x").unwrap();
        }
        dir
    }

    #[test]
    fn the_first_directory_that_has_it_decides() {
        let first = dir_with(&["libdomain_a.so"]);
        let second = dir_with(&["libdomain_a.so", "libdomain_b.so"]);
        let dirs = [first.path().to_owned(), second.path().to_owned()];
        assert_eq!(find(&dirs, "a").unwrap(), first.path().join("libdomain_a.so"));
        assert_eq!(find(&dirs, "b").unwrap(), second.path().join("libdomain_b.so"));
        // Dangling: it is there, and it is what was asked for.
        std::os::unix::fs::symlink("nowhere", first.path().join("libdomain_b.so")).unwrap();
        assert_eq!(find(&dirs, "b").unwrap(), first.path().join("libdomain_b.so"));
    }

    #[test]
    fn a_wrong_name_lists_the_right_ones() {
        let dir = dir_with(&[
            "libdomain_zeta.so",
            "libdomain_alpha.so",
            "libdomain_.so",
            "libother.so",
            "x",
        ]);
        let dirs = [dir.path().to_owned(), PathBuf::from("/nonexistent")];
        let long = "x".repeat(5000);
        for wrong in ["ramdsk", "", ".", "..", "libdomain_alpha.so", "nul\0byte", long.as_str()] {
            let error = find(&dirs, wrong).unwrap_err();
            let Error::UnknownName { choice, .. } = error else { panic!("{wrong}: {error:?}") };
            assert!(choice.ends_with(": alpha, zeta"), "{choice}");
        }
    }

    #[test]
    fn a_slash_makes_it_a_path() {
        let dir = dir_with(&["libdomain_a.so"]);
        assert_eq!(find(&[dir.path().to_owned()], "./a").unwrap(), Path::new("./a"));
    }
}
