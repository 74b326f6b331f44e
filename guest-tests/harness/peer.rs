//! `qemu-storage-daemon`: what a restart does elsewhere.

use crate::PATIENCE;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The peer's program.
pub const PEER: &str = "qemu-storage-daemon";

/// A running `qemu-storage-daemon` with one vhost-user-blk export of one queue.
pub struct Peer {
    child: Child,
    socket: PathBuf,
    blockdev: String,
    iothread: bool,
    directory: TempDir,
}

impl Peer {
    /// Starts it with this `--blockdev` (without its node name), in its main loop or in an I/O
    /// thread, and waits until it listens.
    pub fn start(blockdev: &str, iothread: bool) -> io::Result<Peer> {
        let directory = tempfile::Builder::new().prefix("hotswap-peer-").tempdir()?;
        let socket = directory.path().join("peer.sock");
        let child = spawn(blockdev, iothread, &socket, directory.path())?;
        let mut peer = Peer { child, socket, blockdev: blockdev.to_owned(), iothread, directory };
        peer.wait_for_the_socket()?;
        // It is there when it is bound, and takes connections a moment later.
        thread::sleep(Duration::from_millis(20));
        Ok(peer)
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as an operator would, and waits until it is gone.
    pub fn end(&mut self) -> io::Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        self.child.wait()?;
        let _ = fs::remove_file(&self.socket);
        Ok(())
    }

    /// Starts it again after its end.
    pub fn begin(&mut self) -> io::Result<()> {
        self.child = spawn(&self.blockdev, self.iothread, &self.socket, self.directory.path())?;
        self.wait_for_the_socket()
    }

    fn wait_for_the_socket(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.socket.exists() {
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
                return Err(io::Error::other(format!("{PEER} {}: {}", self.blockdev, log.trim())));
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

fn spawn(blockdev: &str, iothread: bool, socket: &Path, directory: &Path) -> io::Result<Child> {
    let mut command = Command::new(PEER);
    let mut export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=1,addr.type=unix,addr.path={}",
        socket.display()
    );
    if iothread {
        command.args(["--object", "iothread,id=thread"]);
        export.push_str(",iothread=thread");
    }
    command.arg("--blockdev").arg(format!("{blockdev},node-name=disk")).arg("--export").arg(export);
    let log = File::create(directory.join("log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
