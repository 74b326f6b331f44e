//! A stand-in for Ceph's libraries, on files of a folder, which the daemon loads in their place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::daemon::{CtlOutput, Daemon, binary, run_for};

/// The libraries, built once; `stand-ins/ceph.c` says what they do.
fn libraries() -> &'static Path {
    static BUILT: OnceLock<TempDir> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("stand-ins/ceph.c");
        let output = Command::new("cc")
            .args(["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread", "-o"])
            .args([&folder.path().join("librbd.so.1"), &source])
            .output()
            .expect("cc, which builds Rust programs as well");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::hard_link(folder.path().join("librbd.so.1"), folder.path().join("librados.so.2"))
            .expect("a second name");
        folder
    });
    built.path()
}

/// A cluster that is a folder.
pub struct StandIn {
    folder: TempDir,
}

impl StandIn {
    /// One with an image `rbd/disk` of so many megabytes.
    pub fn new(megabytes: u64) -> StandIn {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let image = fs::File::create(folder.path().join("rbd.disk")).expect("an image");
        image.set_len(megabytes << 20).expect("its size");
        StandIn { folder }
    }

    /// A file of the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a file there, with this in it.
    pub fn put(&self, name: &str, content: &str) {
        fs::write(self.file(name), content).expect("written");
    }

    /// Removes it.
    pub fn remove(&self, name: &str) {
        fs::remove_file(self.file(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    /// Who has the image's lock.
    pub fn owner(&self) -> Option<String> {
        fs::read_to_string(self.file("rbd.disk.lock")).ok()
    }

    /// Who has the image open: the number of a process, a dash, and which of its clients.
    pub fn watchers(&self) -> Vec<String> {
        let files = fs::read_dir(self.folder.path()).expect("the folder");
        let names = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter_map(|name| Some(name.strip_prefix("rbd.disk.watch.")?.to_owned())).collect()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(binary("vhost-hotswap"));
        command.env("LD_LIBRARY_PATH", libraries()).env("FAKE_CEPH", self.folder.path());
        command
    }

    /// A daemon that serves the image, with more arguments.
    pub fn serve(&self, more: &[&str]) -> Daemon {
        Daemon::start_command(self.command(), &[&Self::ARGS, more].concat())
    }

    const ARGS: [&str; 4] = ["--domain", "rbd", "--param", "image=rbd/disk"];

    /// Starts it again after its end.
    pub fn serve_again(&self, daemon: &mut Daemon) {
        daemon.start_again_by(self.command());
    }

    /// A daemon that is to be refused with these parameters; what it leaves behind.
    pub fn refused(&self, params: &[&str]) -> CtlOutput {
        let mut command = self.command();
        command.arg("--socket-path").arg(self.file("v.sock")).args(["--domain", "rbd"]);
        for param in params {
            command.args(["--param", param]);
        }
        run_for(&mut command, std::time::Duration::from_secs(20)).expect("it ends")
    }
}
