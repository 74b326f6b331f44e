//! The two sides: our daemon, and `qemu-storage-daemon` or another build of ours as the peer.
//!
//! Both are started anew for every run, so that no run lives on another one's luck with memory, and
//! the one that is not measured is not there.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpu;
use guest_tests::daemon::Daemon;
use guest_tests::peer::{PEER, Peer};

const DAEMON: &str = "vhost-hotswap";

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
    /// Another build of `vhost-hotswap`, or the same, as the peer.
    Build {
        /// Where it is with its modules.
        directory: PathBuf,
        /// Its arguments.
        args: Vec<String>,
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
            Recipe::Build { directory, args } => {
                format!("{} {}", directory.join(DAEMON).display(), args.join(" "))
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
            Recipe::Build { directory, args } => {
                let command = Command::new(directory.join(DAEMON));
                let args: Vec<&str> = args.iter().map(String::as_str).collect();
                Ok(Server::Ours(Daemon::start_command(command, &args)))
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
            Server::Peer(peer) => peer.socket(),
        }
    }

    pub(super) fn pid(&self) -> u32 {
        match self {
            Server::Ours(daemon) => daemon.server_pid(),
            Server::Peer(peer) => peer.pid(),
        }
    }
}
