//! Whose QEMU and kernel a guest runs with: those of this system, or of another Debian that was
//! unpacked in a directory (`scripts/try-frontends` does that).
//!
//! A program of the other Debian is started by its own dynamic loader with its own libraries. So it
//! needs neither root's rights nor a `chroot`, sees the same paths as everything else here, and is
//! a child like any other.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The variable with the directory of another Debian.
pub const QEMU_ROOT: &str = "HOTSWAP_QEMU_ROOT";

/// Where Debian has the libraries of x86-64, below `/usr/lib`.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// Its dynamic loader.
const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";
/// Where its QEMU looks for firmware.
const FIRMWARE: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];

/// QEMU has `reconnect-ms` since then, and only that since 10.2.
const RECONNECT_MS: (u32, u32) = (9, 2);

/// A Debian: this system, or a directory that another one was unpacked in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Debian {
    root: Option<PathBuf>,
}

impl Debian {
    /// The one that the environment names, or this system.
    pub fn chosen() -> Self {
        Debian { root: std::env::var_os(QEMU_ROOT).filter(|v| !v.is_empty()).map(PathBuf::from) }
    }

    /// This system.
    pub fn here() -> Self {
        Debian { root: None }
    }

    /// One in a directory.
    pub fn at(root: &Path) -> Self {
        Debian { root: Some(root.to_owned()) }
    }

    /// Whether it is another than this system.
    pub fn is_elsewhere(&self) -> bool {
        self.root.is_some()
    }

    /// Where a path of it is, given without the leading slash.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.as_deref().unwrap_or(Path::new("/")).join(path)
    }

    /// A program of it, to which arguments can be added.
    pub fn program(&self, name: &str) -> Command {
        let Some(root) = &self.root else { return Command::new(name) };
        let mut command = Command::new(root.join(LOADER));
        // Some libraries lie one level deeper, where the packages' own search paths name them
        // from `/`.
        let libraries = [LIBRARIES.to_owned(), format!("{LIBRARIES}/pulseaudio")];
        let libraries = libraries.map(|path| root.join(path).display().to_string()).join(":");
        command.args(["--argv0", name, "--library-path", &libraries]);
        command.arg(root.join("usr/bin").join(name));
        command
    }

    /// Its `qemu-system-x86_64`, which finds its firmware and its modules.
    pub fn qemu(&self) -> Command {
        let mut command = self.program("qemu-system-x86_64");
        if let Some(root) = &self.root {
            for directory in FIRMWARE {
                command.arg("-L").arg(root.join(directory));
            }
            command.env("QEMU_MODULE_DIR", root.join(LIBRARIES).join("qemu"));
        }
        command
    }

    /// The version of its QEMU, as that says it: major and minor.
    ///
    /// # Panics
    ///
    /// Panics if there is none, or it says nothing of a version.
    pub fn qemu_version(&self) -> (u32, u32) {
        static KNOWN: Mutex<Vec<(Debian, (u32, u32))>> = Mutex::new(Vec::new());
        let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, version)) = known.iter().find(|(debian, _)| debian == self) {
            return *version;
        }
        let said = self.qemu_says();
        let version = parse_version(&said).unwrap_or_else(|| panic!("no version of QEMU: {said}"));
        known.push((self.clone(), version));
        version
    }

    /// What its QEMU says of its version, in one line.
    ///
    /// # Panics
    ///
    /// Panics if it cannot be started.
    pub fn qemu_says(&self) -> String {
        let mut command = self.qemu();
        let output = command.arg("--version").output();
        let output = output.unwrap_or_else(|e| panic!("{command:?}: {e}: run scripts/setup"));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        said.lines().next().unwrap_or_default().to_owned()
    }

    /// The option of a socket that QEMU is to connect to again, `seconds` after it was closed, with
    /// a comma before it.
    pub fn reconnect(&self, seconds: u32) -> String {
        if self.qemu_version() >= RECONNECT_MS {
            format!(",reconnect-ms={}", seconds * 1000)
        } else {
            format!(",reconnect={seconds}")
        }
    }
}

/// `QEMU emulator version 7.2.22 (Debian ...)`.
fn parse_version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.split_once(" version ")?.1.split(['.', ' ']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared_as_numbers() {
        let say = |version: &str| parse_version(&format!("QEMU emulator version {version}"));
        assert_eq!(say("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"), Some((7, 2)));
        assert_eq!(say("11.1.3"), Some((11, 1)));
        assert!(say("10.0.1") >= Some(RECONNECT_MS));
        assert_eq!(parse_version("what?"), None);
    }
}
