//! Storage of the host's, made of files: loop devices with sectors of any size, and file systems on
//! them.
//!
//! Both take root, and a kernel that has them. Where they cannot be had, what makes them says why
//! on standard error and gives `None`, and a test that needs them passes without.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Runs a program of the host's; what it printed, or `None` after saying what went wrong.
pub fn host(program: &str, args: &[&str]) -> Option<String> {
    let output = match Command::new(program).args(args).output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("skipped: {program}: {error}");
            return None;
        }
    };
    if !output.status.success() {
        eprintln!(
            "skipped: {program} {args:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A loop device; it is detached when this is dropped.
pub struct LoopDevice {
    path: PathBuf,
    file: PathBuf,
    _directory: TempDir,
}

impl LoopDevice {
    /// A device of `len` zero bytes with sectors of `sector` bytes, on a file in a directory under
    /// `place`. `more` are further options of losetup(8).
    pub fn new(place: &Path, len: u64, sector: u32, more: &[&str]) -> Option<LoopDevice> {
        let directory = tempfile::tempdir_in(place).expect("a temporary directory");
        let file = directory.path().join("disk.img");
        File::create(&file).and_then(|file| file.set_len(len)).expect("an image");
        let sector = sector.to_string();
        let args = [&["--show", "--find", "--sector-size", &sector], more, &[text(&file)]].concat();
        let path = PathBuf::from(host("losetup", &args)?);
        Some(LoopDevice { path, file, _directory: directory })
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file behind it.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = host("losetup", &["--detach", text(&self.path)]);
    }
}

/// A file system, mounted; it is unmounted when this is dropped.
pub struct Mounted {
    point: TempDir,
    device: LoopDevice,
}

impl Mounted {
    /// An empty file system of kind `kind` on a loop device of `len` bytes.
    pub fn new(place: &Path, kind: &str, len: u64) -> Option<Mounted> {
        let device = LoopDevice::new(place, len, 512, &[])?;
        host(&format!("mkfs.{kind}"), &["-q", text(device.path())])?;
        let point = tempfile::tempdir_in(place).expect("a temporary directory");
        host("mount", &["-t", kind, text(device.path()), text(point.path())])?;
        Some(Mounted { point, device })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.point.path()
    }

    /// The device that it is on.
    pub fn device(&self) -> &LoopDevice {
        &self.device
    }

    /// Unmounts it, once and without waiting for what still uses it. Whether that worked.
    pub fn unmount(&self) -> bool {
        host("umount", &[text(self.path())]).is_some()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Fails if it has been unmounted already.
        let _ = Command::new("umount").args(["--lazy", text(self.path())]).output();
    }
}
