//! A program says of a state whether it could go on with it, before it has to.

use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, pidfd_open, pidfd_send_signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{CHECK_STATE, StateError, VERSION, Written, read_state};
use crate::descriptor::Descriptor;
use crate::process::{Ended, Program, ended, reap};

/// How long a program may take to say so.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much of what it says is heard.
const MOST: u64 = 4096;

/// What a program says, on standard output.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    /// Of the states that it goes on with.
    check_state: u32,
    /// Its own version.
    program: String,
    /// Why not.
    #[serde(default)]
    refused: Option<String>,
    /// It gives the process back to the program before, if it cannot go on after all.
    #[serde(default)]
    goes_back: bool,
    /// It has its servers confine themselves, if the state says so.
    #[serde(default)]
    confines: bool,
}

/// A program that can go on with a state, as it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Willing {
    /// Its version.
    pub program: String,
    /// Whether it can be given a [way back](Written::way_back).
    pub goes_back: bool,
    /// Whether it knows that servers can be confined.
    pub confines: bool,
}

/// Why a program is not to be executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckFailure {
    /// It cannot be run, or is none of ours.
    Unusable(String),
    /// It has not answered in time.
    Silent,
    /// It says that it cannot go on with the state.
    Refused(String),
}

/// A program that looks at a state.
#[derive(Debug)]
pub struct Check {
    pidfd: OwnedFd,
    output: OwnedFd,
    deadline: Instant,
    is_killed: bool,
}

impl Check {
    /// Starts a program that looks at `state`.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn start(program: &Program, state: &Written<'_>) -> io::Result<Self> {
        // A program that is none of ours may say more than there is memory.
        let output = channel::memfd("hotswap-check")?;
        ftruncate(&output, MOST)?;
        fcntl_add_seals(&output, SealFlags::GROW | SealFlags::SHRINK)?;
        let memfd = state.memfd.try_clone()?;
        fcntl_setfd(&memfd, FdFlags::empty())?;
        let mut command = program.command();
        command.args([CHECK_STATE, &memfd.as_raw_fd().to_string()]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output.try_clone()?);
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("a process without a number"))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self { pidfd, output, deadline: Instant::now() + PATIENCE, is_killed: false })
    }

    /// Readable when it has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// When to look at it at the latest.
    #[must_use]
    pub const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// What the program says, or why it is not to be executed; `None`: it is still at it.
    pub fn result(&mut self) -> Option<Result<Willing, CheckFailure>> {
        let Some(ended) = ended(self.pidfd.as_fd()) else {
            if self.deadline <= Instant::now() {
                self.is_killed = true;
                // Once more after a while: it is a child, and has to be reaped.
                self.deadline = Instant::now() + PATIENCE;
                let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            }
            return None;
        };
        reap(WaitId::PidFd(self.pidfd.as_fd()));
        Some(if self.is_killed { Err(CheckFailure::Silent) } else { judge(ended, &self.said()) })
    }

    fn said(&self) -> String {
        let mut said = Vec::new();
        if let Ok(output) = self.output.try_clone() {
            let mut output = std::fs::File::from(output);
            let _ = output.rewind().and_then(|()| output.read_to_end(&mut said));
        }
        let said = String::from_utf8_lossy(&said);
        said.trim_matches(['\0', '\n', ' ']).to_owned()
    }
}

/// What it means that a program has ended in this way and said this.
fn judge(ended: Ended, said: &str) -> Result<Willing, CheckFailure> {
    // What it logs comes before.
    let verdict = said.lines().last().and_then(|line| serde_json::from_str::<Verdict>(line).ok());
    match verdict {
        Some(Verdict { refused: Some(why), .. }) => Err(CheckFailure::Refused(why)),
        Some(verdict) if ended == Ended::Exited(0) && verdict.check_state == VERSION => {
            let Verdict { program, goes_back, confines, .. } = verdict;
            Ok(Willing { program, goes_back, confines })
        }
        _ => {
            let said: String = said
                .lines()
                .next()
                .unwrap_or("")
                .chars()
                .take(200)
                .flat_map(char::escape_debug)
                .collect();
            let what = if said.is_empty() { "nothing".to_owned() } else { format!("`{said}`") };
            Err(CheckFailure::Unusable(format!(
                "it is no vhost-hotswap that can go on with the running one: asked, it said {what} \
                 and ended with {ended}"
            )))
        }
    }
}

/// Answers [`Check`]: this process looks at the state that descriptor `fd` has, as a `T`, of which
/// `find_fault` has more to say. The exit status.
pub fn answer_check<T: DeserializeOwned>(
    fd: RawFd,
    find_fault: impl FnOnce(&T) -> Result<(), String>,
) -> u8 {
    let looked = look(fd, find_fault);
    let status = u8::from(looked.is_err());
    let verdict = Verdict {
        check_state: VERSION,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        refused: looked.err().map(|error| error.to_string()),
        goes_back: true,
        confines: true,
    };
    let said = serde_json::to_string(&verdict).map_err(io::Error::from);
    match said.and_then(|said| writeln!(io::stdout(), "{said}")) {
        Ok(()) => status,
        Err(_) => 2,
    }
}

fn look<T: DeserializeOwned>(
    fd: RawFd,
    find_fault: impl FnOnce(&T) -> Result<(), String>,
) -> Result<(), StateError> {
    let file = std::fs::File::open(format!("/proc/self/fd/{fd}"))?;
    let any = Descriptor::from(OwnedFd::from(file.try_clone()?));
    let state = Descriptor::stand_in(any, || read_state(file.into()))?;
    find_fault(&state).map_err(StateError::Other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::Packing;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::path::Path;

    #[test]
    fn only_a_program_that_says_yes_is_believed() {
        let yes = format!(r#"{{"check_state":{VERSION},"program":"9"}}"#);
        let willing =
            |goes_back| Ok(Willing { program: "9".to_owned(), goes_back, confines: goes_back });
        assert_eq!(judge(Ended::Exited(0), &yes), willing(false));
        assert_eq!(judge(Ended::Exited(0), &format!("log\n{yes}")), willing(false));
        let back = yes.replace('}', r#","goes_back":true,"confines":true}"#);
        assert_eq!(judge(Ended::Exited(0), &back), willing(true));
        let no = r#"{"check_state":2,"program":"9","refused":"too old"}"#;
        let refused = Err(CheckFailure::Refused("too old".to_owned()));
        assert_eq!(judge(Ended::Exited(1), no), refused);
        for (ended, said) in [
            (Ended::Exited(1), yes.as_str()),
            (Ended::Signalled(11), &yes),
            (Ended::Exited(0), r#"{"check_state":2,"program":"9"}"#),
            (Ended::Exited(0), ""),
            (Ended::Exited(2), "error: unexpected argument '--check-state' found"),
        ] {
            let judged = judge(ended, said);
            assert!(matches!(judged, Err(CheckFailure::Unusable(_))), "{said} {judged:?}");
        }
    }

    fn result(mut check: Check) -> Result<Willing, CheckFailure> {
        loop {
            if let Some(result) = check.result() {
                return result;
            }
            let left = check.deadline().saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap();
            let mut fds = [PollFd::from_borrowed_fd(check.pidfd(), PollFlags::IN)];
            poll(&mut fds, Some(&left)).unwrap();
        }
    }

    #[test]
    fn other_programs_are_found_out() {
        let state = Written::write(&1, Packing::default()).unwrap();
        let check = |path: &str| {
            Program::open(Path::new(path)).and_then(|program| Check::start(&program, &state))
        };
        let unusable = |check: Check| match result(check) {
            Err(CheckFailure::Unusable(why)) => why,
            other => panic!("{other:?}"),
        };
        assert!(unusable(check("/bin/true").unwrap()).contains("it said nothing"));
        let why = unusable(check("/bin/echo").unwrap());
        assert!(why.contains("--check-state"), "{why}");
        assert!(check("/etc/passwd").is_err() && check("/nonexistent").is_err());
        // One that does not stop talking gets no memory; one that does not end is ended.
        assert!(unusable(check("/usr/bin/yes").unwrap()).contains("--check-state"));
        let program = Program::open(Path::new("/bin/sleep")).unwrap();
        let mut child = program.command().arg("100").spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let output = tempfile::tempfile().unwrap().into();
        let silent = Check { pidfd, output, deadline: Instant::now(), is_killed: false };
        assert_eq!(result(silent), Err(CheckFailure::Silent));
        assert!(child.wait().is_err(), "it is reaped");
    }
}
