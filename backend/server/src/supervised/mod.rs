//! The server of a supervisor: the other end of the private channel.
//!
//! ```text
//!   Start --> First, or Vault ----------------> Ready --> sessions, clients, ...
//!        \--> Vault, prepare_only -> Prepared --Activate--^        |
//!                                                                Stop
//!              Exit: it leaves <--- Stopped (workers at the gate) <+
//!                                      \--Resume--> Resumed --> ...
//! ```
//!
//! By file: `commands` (what the supervisor says, and what it does here), `vault` (what must
//! outlive this process), `told` (of it, what only servers understand), `events` (what has
//! happened).
//!
//! Invariants: the vault says at each moment what another server can go on with; once stopped,
//! nothing of the device is touched until the supervisor says so; when the supervisor is gone, the
//! frontend is told nothing more.
//!
//! Deliberately absent: when any of it happens. The supervisor decides, and signals are its own.

mod commands;
mod events;
mod told;
mod vault;
#[cfg(test)]
mod vault_tests;

use crate::cpus;
use crate::inflight::SharedInflight;
use crate::limiter::Limiter;
use crate::log_limit::how_to_have_more;
use crate::raw_fd::inherited_channel;
use crate::sandbox::{self, Enforced};
use crate::session::SessionConfig;
use crate::{signals, startup};
use channel::{Channel, RateLimits, Settings, Start, ToServer, ToSupervisor, VERSION, Vault};
use commands::Commands;
use loader::{FileLoader, Policy, TrustedKey};
use proxy::{DomainProxy, KeptModule, Refusal, Restoring};
use rustix::process::{Signal, getpid, kill_process};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use telemetry::Counters;
use told::Believed;

/// Of the program.
const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// What this process has of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Hold {
    /// Nothing yet.
    Starting = 0,
    /// It serves.
    Serving = 1,
    /// It is stopped, and another may serve.
    HandedOff = 2,
}

/// That, for all threads.
#[derive(Debug)]
struct HoldCell(AtomicU8);

impl HoldCell {
    fn set(&self, hold: Hold) {
        self.0.store(hold as u8, Ordering::Release);
    }

    fn get(&self) -> Hold {
        match self.0.load(Ordering::Acquire) {
            1 => Hold::Serving,
            2 => Hold::HandedOff,
            _ => Hold::Starting,
        }
    }
}

/// What comes from the supervisor.
// Few come, and each is taken at once.
#[allow(clippy::large_enum_variant)]
enum Said {
    Message(ToServer, Vec<OwnedFd>),
    /// It is gone.
    End,
}

/// Ends the process at once. Nothing is written, told or unlocked, and no code of a domain runs:
/// the device is another's, or there is none. By a signal, because an exit would run what modules
/// have registered for it. Images that are open elsewhere are closed, or others would wait for this
/// process.
fn leave_at_once() -> ! {
    ceph::close_all();
    let _ = kill_process(getpid(), Signal::KILL);
    // It cannot fail; and if it did, nothing is to go on.
    std::process::abort()
}

/// Why there is no device.
struct Unfit {
    code: &'static str,
    message: String,
}

impl From<Refusal> for Unfit {
    fn from(refusal: Refusal) -> Self {
        Self { code: refusal.code.as_str(), message: refusal.message }
    }
}

/// A code for what a supervisor has said that makes no sense.
const NOT_UNDERSTOOD: &str = "not_understood";

fn not_understood(message: impl Into<String>) -> Unfit {
    Unfit { code: NOT_UNDERSTOOD, message: message.into() }
}

/// A device that begins.
struct Begun {
    proxy: Arc<DomainProxy>,
    standby: Option<KeptModule>,
    believed: Believed,
    limits: RateLimits,
    hears: Hears,
}

/// What the supervisor understands, beside what all of them do.
#[derive(Debug, Clone, Copy)]
struct Hears {
    /// What is put aside.
    aside: bool,
    /// What has happened.
    events: bool,
}

/// Serves as the supervisor at descriptor `fd` says. Returns what had to be left.
///
/// # Errors
/// In a sentence: there was no device.
pub fn run(fd: RawFd) -> Result<Vec<String>, String> {
    // First of all that is opened, while no other descriptor can have the number.
    let channel = Arc::new(Channel::from_socket(inherited_channel(fd)?));
    signals::ignore_ending().map_err(|error| format!("cannot ignore signals: {error}"))?;
    signals::unblock();
    startup::check_proc()?;
    startup::raise_descriptor_limit();
    let hold = Arc::new(HoldCell(AtomicU8::new(Hold::Starting as u8)));
    let (mut first, mut descriptors) = first_of(&channel);
    let mut memory = None;
    if let ToServer::Counters { layout } = first {
        memory = descriptors.into_iter().next().filter(|_| layout == telemetry::counters::LAYOUT);
        (first, descriptors) = first_of(&channel);
    }
    // Before there is another thread, and before any code of a module.
    let enforced = confined(&first, &descriptors);
    let said = listen(&channel, &hold)?;
    let begun = enforced.and_then(|enforced| {
        begin(&channel, &said, first, descriptors, enforced.is_any())
            .map(|(begun, settings)| (begun, settings, enforced))
    });
    let (begun, settings, enforced) = begun.map_err(|Unfit { code, message }| {
        let failed = ToSupervisor::Failed { code: code.to_owned(), message: message.clone() };
        say(&channel, &failed);
        message
    })?;
    hold.set(Hold::Serving);
    let config = SessionConfig {
        queues: settings.queues,
        queue_size: settings.queue_size,
        poll: Duration::from_micros(settings.poll_us),
        worker_cpus: settings.worker_cpus,
        inflight: SharedInflight::default(),
        limiter: Arc::new(Limiter::new(begun.limits)),
        counters: memory.and_then(|memory| counters(memory, settings.queues)),
    };
    Commands::new(channel, hold, begun, config, enforced)?.carry_out(&said)
}

/// What the supervisor says first. If it is gone, or wants none, this process ends.
fn first_of(channel: &Channel) -> (ToServer, Vec<OwnedFd>) {
    loop {
        match channel.receive() {
            Ok(Some((ToServer::Exit, _)) | None) => leave_at_once(),
            Ok(Some(first)) => return first,
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                log::warn!("the supervisor says what is not understood: {error}");
            }
            Err(_) => leave_at_once(),
        }
    }
}

/// Confines the process, if it is told to.
fn confined(first: &ToServer, descriptors: &[OwnedFd]) -> Result<Enforced, Unfit> {
    let ToServer::Start { settings, start, .. } = first else { return Ok(Enforced::NOTHING) };
    let Some(sandbox) = &settings.sandbox else { return Ok(Enforced::NOTHING) };
    let files: Vec<BorrowedFd<'_>> = match start {
        Start::First { .. } => Vec::new(),
        Start::Vault(vault) => {
            let is_file = |object: &u64| vault.files.iter().any(|stored| stored.file == *object);
            let objects = vault.objects().into_iter().zip(descriptors);
            objects.filter(|(object, _)| is_file(object)).map(|(_, file)| file.as_fd()).collect()
        }
    };
    sandbox::enter(sandbox, &files).map_err(|message| Unfit { code: "sandbox", message })
}

/// Where requests are counted.
fn counters(memory: OwnedFd, queues: u16) -> Option<Counters> {
    Counters::map(&memory.into(), queues)
        .inspect_err(|error| log::warn!("requests are not counted: {error}"))
        .ok()
}

/// Tells the supervisor something, if it is there.
fn say(channel: &Channel, message: &ToSupervisor) {
    if let Err(error) = channel.send(message, &[]) {
        log::debug!("the supervisor is not told: {error}");
    }
}

/// Has a thread receive what the supervisor says. It ends the process where there is nothing to be
/// ended in order.
fn listen(channel: &Arc<Channel>, hold: &Arc<HoldCell>) -> Result<mpsc::Receiver<Said>, String> {
    let (sender, receiver) = mpsc::channel();
    let (channel, hold) = (Arc::clone(channel), Arc::clone(hold));
    let receive = move || {
        loop {
            match channel.receive() {
                Ok(Some((ToServer::Exit, _))) => leave_at_once(),
                Ok(Some((message, descriptors))) => {
                    if sender.send(Said::Message(message, descriptors)).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    log::warn!("the supervisor says what is not understood: {error}");
                }
                Ok(None) | Err(_) => {
                    if hold.get() != Hold::Serving {
                        leave_at_once();
                    }
                    let _ = sender.send(Said::End);
                    return;
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("supervisor".to_owned())
        .spawn(receive)
        .map_err(|error| how_to_have_more(&error).to_string())?;
    Ok(receiver)
}

/// Makes the device, as the first message says.
fn begin(
    channel: &Channel,
    said: &mpsc::Receiver<Said>,
    first: ToServer,
    descriptors: Vec<OwnedFd>,
    confined: bool,
) -> Result<(Begun, Settings), Unfit> {
    let ToServer::Start { version, settings, start, prepare_only, hears_aside, hears_events } =
        first
    else {
        return Err(not_understood("the first message is not `start`"));
    };
    if version != VERSION {
        return Err(not_understood(format!(
            "the supervisor speaks version {version} of the channel, this server {VERSION}"
        )));
    }
    let hears = Hears { aside: hears_aside, events: hears_events };
    cpus::check(&settings.worker_cpus).map_err(not_understood)?;
    let policy = policy(&settings)?;
    let loader = Box::new(FileLoader::with_policy(settings.domain_dirs.clone(), policy));
    let opener = Some(ceph::opener());
    let queues = usize::from(settings.queues);
    let begun = match start {
        Start::First { domain, params } => {
            if prepare_only {
                return Err(not_understood("there is nothing to prepare without a vault"));
            }
            let params = told::params(&params);
            let proxy = DomainProxy::start_with(loader, opener, &domain, params, queues)?;
            let (believed, limits) = (Believed::default(), settings.limits);
            Begun { proxy, standby: None, believed, limits, hears }
        }
        Start::Vault(vault) => {
            let (saved, mut believed, mut limits) = saved(&vault, descriptors)?;
            let mut restoring = Restoring::prepare(loader, opener, saved, queues, !prepare_only)?;
            if prepare_only {
                let program = PROGRAM.to_owned();
                say(channel, &ToSupervisor::Prepared { version: VERSION, program, confined });
                let (vault, descriptors) = wait_for_activate(said)?;
                let now = self::saved(&vault, descriptors)?;
                restoring.update(now.0)?;
                (believed, limits) = (now.1, now.2);
            }
            let (proxy, standby) = restoring.activate()?;
            let limits = limits.unwrap_or(settings.limits);
            Begun { proxy, standby, believed, limits, hears }
        }
    };
    Ok((begun, settings))
}

/// Which modules are loaded. A key that is not understood is no reason to do without.
fn policy(settings: &Settings) -> Result<Policy, Unfit> {
    let keys = settings.trusted_keys.iter().map(|key| TrustedKey::parse(key));
    let keys = keys.collect::<Option<Vec<_>>>();
    let trusted_keys = keys.ok_or_else(|| not_understood("a trusted key is no key of minisign"))?;
    Ok(Policy { trusted_keys, ..Policy::default() })
}

/// What another server has left, what its guest believes, and what it may do in a second.
type Left = (proxy::Saved, Believed, Option<RateLimits>);

fn saved(vault: &Vault, descriptors: Vec<OwnedFd>) -> Result<Left, Unfit> {
    vault::saved_of(vault, descriptors).map_err(not_understood)
}

fn wait_for_activate(said: &mpsc::Receiver<Said>) -> Result<(Box<Vault>, Vec<OwnedFd>), Unfit> {
    match said.recv() {
        Ok(Said::Message(ToServer::Activate { vault }, descriptors)) => Ok((vault, descriptors)),
        Ok(Said::Message(message, _)) => Err(not_understood(format!("not now: {message:?}"))),
        Ok(Said::End) | Err(_) => leave_at_once(),
    }
}
