//! For tests: a supervisor whose servers are processes that have ended, and say what a test has
//! them say.

use super::{ListenSocket, Options, Signals, Supervision, Supervisor, Which};
use crate::process::{Program, Server};
use channel::{Kept, Module, Settings, ToSupervisor, VERSION};
use control::SocketFile;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use telemetry::Book;

/// What it is started with, its sockets in `directory`; and what ends it.
pub(super) fn options(directory: &Path) -> (Options, UnixStream) {
    let disk = SocketFile::listen(&directory.join("disk"), 0o600).unwrap();
    let (end, end_writer) = UnixStream::pair().unwrap();
    let options = Options {
        frontends: ListenSocket::Path(disk),
        control_path: directory.join("control"),
        program: program(),
        settings: Settings {
            queues: 1,
            queue_size: 128,
            poll_us: 50,
            worker_cpus: vec![0],
            domain_dirs: vec!["/usr/lib".into()],
            trusted_keys: Vec::new(),
            sandbox: None,
            limits: channel::RateLimits::default(),
        },
        domain: "ramdisk".into(),
        params: BTreeMap::from([("size".into(), "1M".into())]),
        metrics: None,
        book: Book::default(),
        supervision: Supervision { has_spare: false, hang_timeout: None },
        ends: vec![("signal 15".into(), end.into())],
        signals: Signals { hold: || {}, release: || {} },
    };
    (options, end_writer)
}

/// What its servers run.
pub(super) fn program() -> Program {
    Program::open(Path::new("/bin/true")).unwrap()
}

pub(super) fn server() -> Server {
    Server::start(&program()).unwrap()
}

pub(super) fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

/// `ramdisk`, whose image has this number.
pub(super) fn module(image: Kept) -> Module {
    Module {
        name: "ramdisk".into(),
        version: "1.0.0".into(),
        path: "/x.so".into(),
        sha256: "ab".into(),
        signature: None,
        params: BTreeMap::new(),
        image,
    }
}

pub(super) fn ready() -> ToSupervisor {
    ToSupervisor::Ready {
        version: VERSION,
        program: "1.0.0".to_owned(),
        serves: "serving".to_owned(),
        tells_events: true,
        confined: false,
    }
}

/// One whose server serves a module of generation 3, whose image is object 1.
pub(super) fn serving(directory: &Path) -> Supervisor {
    let mut supervisor = Supervisor::new(options(directory).0);
    supervisor.start_at = None;
    supervisor.server = Some(server());
    supervisor.told_by(Which::Current, vault(3, 1), vec![file()]);
    supervisor.told_by(Which::Current, ready(), Vec::new());
    supervisor
}

/// What a server says of a generation whose image comes with it.
pub(super) fn vault(generation: u64, image: Kept) -> ToSupervisor {
    let vault =
        channel::Vault { generation, live: Some(module(image)), ..channel::Vault::default() };
    ToSupervisor::Vault { vault: Box::new(vault), new: vec![image] }
}
