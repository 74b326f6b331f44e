//! The supervisor's program is exchanged in place: its state is packed, and the new program, in the
//! same process, unpacks it and goes on.
//!
//! A part of the supervisor that has something to keep makes a plain structure of it with `serde`,
//! in which descriptors stand as [`Slot`](crate::slots::Slot)s or as [`Descriptor`]s. They keep
//! their close-on-exec flag: they travel in a socket, not by number. Only its other end is
//! inherited.
//!
//! The new program is run first as a child, with the state but without its descriptors: [`Check`].
//! `backend/decisions/0055-the-supervisor-is-exchanged-in-place.md` says what releases owe each
//! other.

mod check;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use channel::Channel;
use rustix::io::{FdFlags, fcntl_setfd};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::descriptor::Descriptor;
use crate::process::Program;
use crate::slots::{Missing, Packing, Unpacking};

pub use check::{Check, CheckFailure, Willing, answer_check};

/// Of the state. A program goes on only with a state of its own version. Members can come without
/// another one: a program ignores what it does not know, and has a default for what it misses.
pub const VERSION: u32 = 1;

/// The option that has a program look at a state; a descriptor's number follows.
pub const CHECK_STATE: &str = "--check-state";
/// The option that has a program go on with a state; a descriptor's number follows, then
/// a separator and what the first program was called with, for people who look.
pub const RESUME_STATE: &str = "--resume-state";
/// Follows that number, before the number of a socket: [`go_back`] has it.
const WAY_BACK: &str = "--way-back";
/// Stands before the arguments of the first program.
const BEFORE_ARGUMENTS: &str = "--";

/// What a state begins with, whatever its version.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    version: u32,
    /// Which program has packed it.
    program: String,
    state: Value,
}

/// Why there is no going on with a state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Of another version.
    #[error(
        "the state is of version {found} (of program {program}), and this program's is {VERSION}"
    )]
    Version {
        /// Its version.
        found: u32,
        /// What has packed it.
        program: String,
    },
    /// Not understood.
    #[error("the state is not understood: {0}")]
    NotUnderstood(#[from] serde_json::Error),
    /// Not to be had.
    #[error("the state cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// A descriptor is not there.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// Another reason.
    #[error("{0}")]
    Other(String),
}

/// A state that is written down, and the descriptors that it refers to.
#[derive(Debug)]
pub struct Written<'a> {
    memfd: OwnedFd,
    slots: Vec<BorrowedFd<'a>>,
    descriptors: BTreeMap<RawFd, Descriptor>,
}

/// What goes over the socket: which numbers the descriptors of a packet had.
#[derive(Debug, Serialize, Deserialize)]
enum Packet {
    /// The program that has packed it, before all others; only on the way back.
    Program(PathBuf),
    /// The state itself.
    State,
    /// [`Slot`](crate::slots::Slot)s.
    Slots(Vec<RawFd>),
    /// [`Descriptor`]s.
    Descriptors(Vec<RawFd>),
}

impl<'a> Written<'a> {
    /// Writes a state down.
    ///
    /// # Errors
    /// There is no memory, or something in it cannot be said in JSON.
    pub fn write(state: &impl Serialize, packing: Packing<'a>) -> io::Result<Self> {
        let (state, descriptors) = Descriptor::written(|| serde_json::to_value(state));
        let program = env!("CARGO_PKG_VERSION").to_owned();
        let envelope = Envelope { version: VERSION, program, state: state? };
        let memfd = channel::memfd("hotswap-state")?;
        let mut file = std::fs::File::from(memfd);
        file.write_all(&serde_json::to_vec(&envelope)?)?;
        Ok(Self { memfd: file.into(), slots: packing.into_descriptors(), descriptors })
    }

    /// Puts all of it into a socket, from whose end a program can [`read`] it.
    pub(crate) fn send(&self) -> io::Result<OwnedFd> {
        self.send_with(None)
    }

    fn send_with(&self, program: Option<&Program>) -> io::Result<OwnedFd> {
        let (ours, theirs) = channel::pair()?;
        if let Some(program) = program {
            ours.send(&Packet::Program(program.path.clone()), &[program.file()])?;
        }
        ours.send(&Packet::State, &[self.memfd.as_fd()])?;
        for part in self.slots.chunks(channel::MAX_DESCRIPTORS) {
            let numbers = part.iter().map(AsRawFd::as_raw_fd).collect();
            ours.send(&Packet::Slots(numbers), part)?;
        }
        let descriptors: Vec<_> = self.descriptors.values().map(AsFd::as_fd).collect();
        for part in descriptors.chunks(channel::MAX_DESCRIPTORS) {
            let numbers = part.iter().map(AsRawFd::as_raw_fd).collect();
            ours.send(&Packet::Descriptors(numbers), part)?;
        }
        Ok(theirs)
    }

    /// Puts all of it into a socket with which another program of this process can [`go_back`] to
    /// `program`.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn way_back(&self, program: &Program) -> io::Result<OwnedFd> {
        self.send_with(Some(program))
    }

    /// Runs a program in place of this one, with the state, and with a way back. Comes back only if
    /// that fails; all is as before then.
    pub fn exec(&self, program: &Program, way_back: Option<&OwnedFd>) -> io::Error {
        match self.send() {
            Ok(socket) => run(program, socket.as_fd(), way_back),
            Err(error) => error,
        }
    }
}

/// Runs a program in place of this one, with the state in a socket. The sockets are closed on the
/// way back from a failure, so that their flags need no care.
fn run(program: &Program, socket: BorrowedFd<'_>, way_back: Option<&OwnedFd>) -> io::Error {
    let mut command = program.command();
    let mut pass = |option: &str, socket: BorrowedFd<'_>| {
        command.args([option, &socket.as_raw_fd().to_string()]);
        fcntl_setfd(socket, FdFlags::empty())
    };
    let mut passed = pass(RESUME_STATE, socket);
    if let Some(way_back) = way_back {
        passed = passed.and_then(|()| pass(WAY_BACK, way_back.as_fd()));
    }
    if let Err(error) = passed {
        return error.into();
    }
    command.arg(BEFORE_ARGUMENTS).args(first_arguments(std::env::args_os().skip(1)));
    command.exec()
}

/// Runs the program before in place of this one, which cannot go on. Comes back only if that fails.
pub fn go_back(way_back: OwnedFd) -> io::Error {
    let way_back = Channel::from_socket(way_back);
    let (path, file) = match way_back.receive::<Packet>() {
        Ok(Some((Packet::Program(path), files))) => (path, files.into_iter().next()),
        Ok(_) => return io::Error::other("the way back does not begin with a program"),
        Err(error) => return error,
    };
    match file {
        Some(file) => run(&Program::of_file(path, file), way_back.as_fd(), None),
        None => io::Error::other("the program before has not come with its path"),
    }
}

/// What the first program of this process was called with.
fn first_arguments(own: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let own: Vec<OsString> = own.collect();
    match own.first() {
        Some(first) if first == OsStr::new(RESUME_STATE) => {
            let rest = own.into_iter().skip_while(|word| word != OsStr::new(BEFORE_ARGUMENTS));
            rest.skip(1).collect()
        }
        _ => own,
    }
}

/// The descriptor's number behind `option`, if that is what this process is called with.
#[must_use]
pub fn asked(option: &str) -> Option<RawFd> {
    let mut arguments = std::env::args_os().skip(1);
    let is_it = arguments.next()? == OsStr::new(option);
    is_it.then(|| arguments.next()?.to_str()?.parse().ok()).flatten()
}

/// The number of the socket for [`go_back`], if this process was given one.
#[must_use]
pub fn way_back() -> Option<RawFd> {
    let mut arguments = std::env::args_os().skip(1);
    (arguments.next()? == OsStr::new(RESUME_STATE)).then_some(())?;
    (arguments.nth(1)? == OsStr::new(WAY_BACK)).then_some(())?;
    arguments.next()?.to_str()?.parse().ok()
}

/// Reads a state of this version out of a file.
pub(crate) fn read_state<T: DeserializeOwned>(file: OwnedFd) -> Result<T, StateError> {
    let mut file = std::fs::File::from(file);
    file.rewind()?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let envelope: Envelope = serde_json::from_slice(&text)?;
    if envelope.version != VERSION {
        let Envelope { version: found, program, .. } = envelope;
        return Err(StateError::Version { found, program });
    }
    Ok(serde_json::from_value(envelope.state)?)
}

/// Reads what another program of this process has put into a socket.
///
/// # Errors
/// It is of another version, or not understood.
pub fn read<T: DeserializeOwned>(socket: OwnedFd) -> Result<(T, Unpacking), StateError> {
    let socket = Channel::from_socket(socket);
    let mut state = None;
    let mut slots: BTreeMap<RawFd, OwnedFd> = BTreeMap::new();
    let mut names = BTreeMap::new();
    while let Some((packet, descriptors)) = socket.receive::<Packet>()? {
        let mut descriptors = descriptors.into_iter();
        match packet {
            Packet::Program(_) => {}
            Packet::State => state = descriptors.next(),
            Packet::Slots(numbers) => slots.extend(numbers.into_iter().zip(descriptors)),
            Packet::Descriptors(numbers) => {
                names.extend(numbers.into_iter().zip(descriptors.map(Descriptor::from)));
            }
        }
    }
    let state = state.ok_or_else(|| StateError::Other("there is no state".to_owned()))?;
    let state = Descriptor::named(names, || read_state(state))?;
    Ok((state, slots.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::Slot;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct State {
        slot: Slot,
        twice: [Descriptor; 2],
        text: String,
        #[serde(default)]
        later: u32,
    }

    fn file(text: &str) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.into()
    }

    fn text(file: OwnedFd) -> String {
        let mut file = std::fs::File::from(file);
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_state_comes_back_with_its_descriptors() {
        let many: Vec<_> = (0..300).map(|at| file(&at.to_string())).collect();
        let mut packing = Packing::default();
        let slots: Vec<_> = many.iter().map(|file| packing.put(file.as_fd())).collect();
        let shared = Descriptor::from(file("shared"));
        let twice = [shared.clone(), shared];
        let state = State { slot: slots[299], twice, text: "x".into(), later: 1 };
        let socket = Written::write(&state, packing).unwrap().send().unwrap();
        drop((many, state));
        let (state, mut unpacking) = read::<State>(socket).unwrap();
        assert_eq!((state.text.as_str(), state.later), ("x", 1));
        assert_eq!(text(unpacking.take(state.slot).unwrap()), "299");
        assert!(unpacking.take(state.slot).is_err());
        assert_eq!(text(unpacking.take(slots[0]).unwrap()), "0");
        let [one, other] = state.twice;
        assert_eq!(one, other);
        assert_eq!(text(one.as_fd().try_clone_to_owned().unwrap()), "shared");
    }

    #[test]
    fn what_is_not_known_is_ignored_what_is_missed_has_a_default_and_versions_are_told() {
        let any = Descriptor::from(file(""));
        let read = |version: u32, state: &str| {
            let state =
                format!(r#"{{"version":{version},"program":"9","more":1,"state":{state}}}"#);
            Descriptor::stand_in(any.clone(), || read_state::<State>(file(&state)))
        };
        let newer = r#"{"slot":3,"twice":[4,4],"text":"x","news":[]}"#;
        assert_eq!(read(VERSION, newer).unwrap().later, 0);
        let error = read(VERSION + 1, newer).unwrap_err().to_string();
        assert!(error.contains("version 2 (of program 9)"), "{error}");
        let error = read(VERSION, r#"{"slot":3}"#).unwrap_err().to_string();
        assert!(error.contains("not understood: missing field"), "{error}");
    }

    #[test]
    fn the_first_arguments_stay() {
        let of = |words: &[&str]| first_arguments(words.iter().map(Into::into));
        assert_eq!(of(&["--fd", "3"]), ["--fd", "3"]);
        assert_eq!(of(&[RESUME_STATE, "7", "--", "--fd", "3"]), ["--fd", "3"]);
        let with_a_way_back = [RESUME_STATE, "7", WAY_BACK, "8", "--", "--fd", "3"];
        assert_eq!(of(&with_a_way_back), ["--fd", "3"]);
    }
}
