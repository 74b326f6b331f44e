//! The two sides: our daemon, and `qemu-storage-daemon` as the peer.
//!
//! Both are started anew for every run, so that no run lives on another one's luck with memory, and
//! the one that is not measured is not there.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::cpu;
use guest_tests::daemon::Daemon;

/// The peer's program.
pub(super) const PEER: &str = "qemu-storage-daemon";

/// How to start a server.
#[derive(Clone, Debug)]
pub(super) enum Recipe {
    /// `vhost-hotswap` with these arguments.
    Ours(Vec<String>),
    /// The peer with this `--blockdev` (without its node name), in its main loop or in an I/O
    /// thread.
    Peer {
        /// The block device.
        blockdev: String,
        /// Whether the export has a thread of its own.
        iothread: bool,
    },
}

impl Recipe {
    pub(super) fn is_ours(&self) -> bool {
        matches!(self, Recipe::Ours(_))
    }

    /// The command line, for the record.
    pub(super) fn describe(&self) -> String {
        match self {
            Recipe::Ours(args) => format!("vhost-hotswap {}", args.join(" ")),
            Recipe::Peer { blockdev, iothread } => {
                let thread = if *iothread { "--object iothread " } else { "" };
                format!("{PEER} {thread}--blockdev {blockdev} --export type=vhost-user-blk")
            }
        }
    }

    /// Starts it on a CPU, and waits until it listens.
    pub(super) fn start(&self, cpu: Option<usize>) -> io::Result<Server> {
        cpu::pinned(cpu, || match self {
            Recipe::Ours(args) => {
                let args: Vec<&str> = args.iter().map(String::as_str).collect();
                Ok(Server::Ours(Daemon::start(&args)))
            }
            Recipe::Peer { blockdev, iothread } => {
                Peer::start(blockdev, *iothread).map(Server::Peer)
            }
        })
    }
}

/// A running server; it ends with this.
pub(super) enum Server {
    Ours(Daemon),
    Peer(Peer),
}

impl Server {
    pub(super) fn socket(&self) -> &Path {
        match self {
            Server::Ours(daemon) => daemon.socket(),
            Server::Peer(peer) => &peer.socket,
        }
    }

    pub(super) fn pid(&self) -> u32 {
        match self {
            Server::Ours(daemon) => daemon.server_pid(),
            Server::Peer(peer) => peer.child.id(),
        }
    }
}

/// A running `qemu-storage-daemon` with one vhost-user-blk export of one queue.
pub(super) struct Peer {
    child: Child,
    pub(super) socket: PathBuf,
    blockdev: String,
    iothread: bool,
    directory: TempDir,
}

impl Peer {
    pub(super) fn start(blockdev: &str, iothread: bool) -> io::Result<Peer> {
        let directory = tempfile::Builder::new().prefix("hotswap-bench-").tempdir()?;
        let socket = directory.path().join("peer.sock");
        let child = spawn(blockdev, iothread, &socket, directory.path())?;
        let mut peer = Peer { child, socket, blockdev: blockdev.to_owned(), iothread, directory };
        peer.wait_for_the_socket()?;
        // It is there when it is bound, and takes connections a moment later.
        thread::sleep(Duration::from_millis(20));
        Ok(peer)
    }

    /// Ends it as an operator would, and waits until it is gone.
    pub(super) fn end(&mut self) -> io::Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        self.child.wait()?;
        let _ = fs::remove_file(&self.socket);
        Ok(())
    }

    /// Starts it again after its end.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        self.child = spawn(&self.blockdev, self.iothread, &self.socket, self.directory.path())?;
        self.wait_for_the_socket()
    }

    fn wait_for_the_socket(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
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
