//! The process as a supervisor: what it is given, and what asks for its end.
//!
//! It serves nothing itself. What it does is in the crate `supervisor`.

use crate::args::{Config, Listen};
use crate::logging;
use crate::raw_fd::{ListenVariables, inherited_channel, passed};
use crate::sandbox::{self, Mode};
use crate::signals;
use crate::startup::{frontends_access, given_listener, trusted_keys};
use crate::watching::Watching;
use channel::Settings;
use control::SocketFile;
use signal_hook::consts::SIGCHLD;
use signal_hook::low_level::pipe;
use std::ffi::{CString, OsStr};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use supervisor::pages::Pages;
use supervisor::process::Program;
use supervisor::reexec;
use supervisor::store::Store;
use supervisor::supervisor::{
    ListenSocket, Metrics, Options, Resumed, Signals, Supervision, check_state, run,
};
use telemetry::Book;

/// Supervises servers until told to stop. Returns the exit status.
///
/// # Errors
/// There is no device: a sentence that says why.
pub fn supervise(config: Config, supervision: Supervision) -> Result<i32, String> {
    // First of all that is opened, while no other descriptor can have the number.
    let mut passed = passed(&ListenVariables::of_environment())?;
    let given = given_listener(&config.listen, &mut passed)?;
    let access = frontends_access(&config)?;
    let keys = trusted_keys(&config)?;
    let sandbox = (config.sandbox != Mode::Off).then(|| sandbox::grants(&config));
    let mut store = Store::from_environment();
    let kept = store.take_back(passed.into_values().collect())?;
    let program = Program::own().map_err(|error| format!("cannot read this program: {error}"))?;
    let ends = signal_ends().map_err(|error| format!("cannot handle signals: {error}"))?;
    // Children of a process that ignores this signal, as it may have been told to, leave no status.
    signal_hook::flag::register(SIGCHLD, Arc::default())
        .map_err(|error| format!("cannot hear of servers that end: {error}"))?;
    signals::unblock();
    // A process that sees the socket may end this one, so signals are handled by then.
    let frontends = match (given, config.listen) {
        (Some(listener), _) => ListenSocket::Inherited(listener),
        (None, Listen::Path(path)) => ListenSocket::Path(
            SocketFile::listen(&path, access).map_err(|error| error.to_string())?,
        ),
        (None, Listen::Fd(_) | Listen::Activated) => {
            return Err("there is no listening socket".to_owned());
        }
    };
    let Watching { metrics, state_dir, .. } = config.watching;
    let book = state_dir.map_or_else(|| Ok(Book::default()), |directory| Book::open(&directory))?;
    let metrics = metrics.map(|address| {
        Metrics::new(Pages::listen(&address)?, config.queues)
            .map_err(|error| format!("no memory for counters: {error}"))
    });
    let metrics = metrics.transpose()?;
    let poll_us = u64::try_from(config.poll.as_micros()).unwrap_or(u64::MAX);
    let options = Options {
        frontends,
        control_path: config.control_path,
        program,
        settings: Settings {
            queues: config.queues,
            queue_size: config.queue_size,
            poll_us,
            worker_cpus: config.worker_cpus,
            domain_dirs: config.domain_dirs,
            sandbox,
            trusted_keys: keys.iter().map(|key| key.text().to_owned()).collect(),
            limits: config.limits,
        },
        domain: config.domain,
        params: config
            .params
            .iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect(),
        metrics,
        book,
        supervision,
        ends,
        signals: SIGNALS,
    };
    run(options, store, kept)
}

/// How signals are kept while the program is exchanged.
const SIGNALS: Signals = Signals {
    hold: signals::block_ending,
    release: || {
        // An exec that fails has set SIGPIPE back to what ends the process.
        signals::ignore_strays();
        signals::unblock();
    },
};

/// Gives the process the name, in lists of processes, that the file has which it is called by: it
/// was executed by way of a descriptor, whose number is its name so far.
pub fn take_name() {
    let called = std::env::args_os().next().map(PathBuf::from);
    let name = called.as_deref().and_then(Path::file_name).map(OsStr::as_bytes);
    if let Some(name) = name.and_then(|name| CString::new(name).ok()) {
        // It is for people only.
        let _ = rustix::thread::set_name(&name);
    }
}

/// If this process is called by a supervisor that may become this program, or just has: does what
/// it is called for, and returns the exit status.
#[must_use]
pub fn of_another_program() -> Option<u8> {
    if let Some(fd) = reexec::asked(reexec::CHECK_STATE) {
        return Some(check_state(fd));
    }
    let fd = reexec::asked(reexec::RESUME_STATE)?;
    take_name();
    logging::start(None);
    Some(match go_on(fd) {
        Ok(status) => u8::try_from(status).unwrap_or(1),
        Err(sentence) => {
            log::error!("the supervisor cannot go on: {sentence}");
            1
        }
    })
}

fn go_on(fd: RawFd) -> Result<i32, String> {
    let way_back = reexec::way_back().map(inherited_channel).transpose()?;
    let resumed = catch_unwind(|| {
        let socket = inherited_channel(fd)?;
        let ends = signal_ends().map_err(|error| format!("cannot handle signals: {error}"))?;
        Resumed::read(socket, ends, SIGNALS)
    });
    match (resumed.unwrap_or_else(|_| Err("it panicked".to_owned())), way_back) {
        (Ok(resumed), way_back) => {
            drop(way_back);
            // What has come since the program before held them is in `ends` now.
            signals::unblock();
            resumed.run()
        }
        (Err(sentence), None) => Err(sentence),
        (Err(sentence), Some(way_back)) => {
            log::error!("the supervisor cannot go on, and the program before is run: {sentence}");
            Err(format!("the program before cannot be run: {}", reexec::go_back(way_back)))
        }
    }
}

/// For each signal that ends the daemon, what is readable once it has come.
fn signal_ends() -> std::io::Result<Vec<(String, OwnedFd)>> {
    let end = |signal| {
        let (ours, theirs) = UnixStream::pair()?;
        pipe::register(signal, theirs)?;
        Ok((format!("signal {signal}"), ours.into()))
    };
    signals::ending().map(end).collect()
}
