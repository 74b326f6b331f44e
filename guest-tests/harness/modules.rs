//! Modules that only tests have: built when they are needed, because no installation should have
//! them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{fs, io};

use crate::daemon::binary;

/// The path of the module `pinned_module`, which leaves something behind; see its own page for
/// what. Built at the first call.
pub fn pinned_module() -> String {
    static BUILT: OnceLock<String> = OnceLock::new();
    BUILT.get_or_init(|| build("pinned_module")).clone()
}

/// The path of the module `fragile`: the domain `file`, which panics at a flush. Built at the first
/// call.
pub fn fragile() -> String {
    static BUILT: OnceLock<String> = OnceLock::new();
    BUILT.get_or_init(|| build("fragile")).clone()
}

/// The path of the module `tardy`: a disk in a file whose requests end out of order, 20 to 300 ms
/// late. Built at the first call.
pub fn tardy() -> String {
    static BUILT: OnceLock<String> = OnceLock::new();
    BUILT.get_or_init(|| build("tardy")).clone()
}

/// Puts `count` copies of a domain's module into `directory`, which the loader takes for different
/// ones. Their paths.
pub fn copies(domain: &str, count: usize, directory: &Path) -> io::Result<Vec<String>> {
    let mut bytes = fs::read(binary(&format!("libdomain_{domain}.so")))?;
    let copy = |index| {
        // What follows the last section belongs to none.
        bytes.push(0);
        let path = directory.join(format!("{domain}{index}.so"));
        fs::write(&path, &bytes)?;
        Ok(path.to_string_lossy().into_owned())
    };
    (0..count).map(copy).collect()
}

/// Builds a module, where `scripts/build-modules` has what it needs.
fn build(name: &str) -> String {
    let bin = binary("vhost-hotswap");
    let target = bin
        .parent()
        .and_then(|release| release.parent())
        .expect("TARGET/release/vhost-hotswap")
        .join("modules");
    let manifest =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("modules").join(name).join("Cargo.toml");
    let built = Command::new(env!("CARGO"))
        .args([
            "rustc",
            "--quiet",
            "--release",
            "--lib",
            "--features",
            "module",
            "--crate-type",
            "cdylib",
        ])
        .arg("--manifest-path")
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target)
        .args(["--", "-C", "strip=debuginfo"])
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo runs");
    assert!(built.success(), "the module `{name}` was not built");
    let file = target.join(format!("release/libdomain_{name}.so"));
    file.to_str().expect("a path in UTF-8").to_owned()
}
