//! Who has an image's lock, written down in the image itself: so that a daemon which was killed is
//! known to be gone by the one that comes after it on this host, and its lock need not be waited
//! for.
//!
//! Ceph knows its clients by address, and a dead one for half a minute not at all. What is noted is
//! which process of which boot has that address; of any other host, or where it cannot be told,
//! nothing is known and the lock stays. To break a lock is no danger to the data: Ceph locks the
//! client out first, as `handle.rs` has it set.

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use std::fs;
use std::os::linux::fs::MetadataExt;

/// Under which key an image has the note.
pub(crate) const KEY: &str = "vhost-hotswap.client";

/// A client, as it is noted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Client {
    /// Its address in the cluster.
    address: String,
    process: Process,
}

/// A process, so that no other is taken for it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    /// Which boot of which host.
    boot: String,
    /// Which space of process numbers.
    space: u64,
    number: u32,
    /// When it began, in the kernel's ticks.
    start: u64,
}

impl Process {
    fn this() -> Option<Self> {
        let number = std::process::id();
        Some(Self { boot: boot()?, space: space()?, number, start: start(number)? })
    }

    /// Whether it is known to have ended.
    fn has_ended(&self) -> bool {
        if boot().as_ref() != Some(&self.boot) || space() != Some(self.space) {
            return false;
        }
        match start(self.number) {
            Some(start) => start != self.start,
            // `/proc` may hide what is there (`hidepid`).
            None => Pid::from_raw(self.number.cast_signed())
                .is_some_and(|pid| test_kill_process(pid) == Err(Errno::SRCH)),
        }
    }
}

/// When no process began.
const ENDED: u64 = u64::MAX;

fn boot() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(boot.trim().to_owned())
}

fn space() -> Option<u64> {
    Some(fs::metadata("/proc/self/ns/pid").ok()?.st_ino())
}

/// When a process began; `None` if there is none. One that has ended, and was not waited for by its
/// parent, is there no more when the last of its threads is gone.
fn start(number: u32) -> Option<u64> {
    let line = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    // The name may have anything in it, and ends with the last parenthesis (proc_pid_stat(5)).
    let (_, fields) = line.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let (state, threads, start) = (fields.first()?, fields.get(17)?, fields.get(19)?);
    if *state == "Z" && *threads == "1" { Some(ENDED) } else { start.parse().ok() }
}

impl Client {
    /// This process, with that address.
    pub(crate) fn this(address: &str) -> Option<Self> {
        Some(Self { address: address.to_owned(), process: Process::this()? })
    }

    /// Whether it has this address, and its process has ended.
    pub(crate) fn is_dead(&self, address: &str) -> bool {
        self.address == address && self.process.has_ended()
    }

    pub(crate) fn text(&self) -> String {
        let Self { address, process: Process { boot, space, number, start } } = self;
        format!("address={address} boot={boot} space={space} process={number} start={start}")
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let value =
            |key: &str| text.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        Some(Self {
            address: value("address")?.to_owned(),
            process: Process {
                boot: value("boot")?.to_owned(),
                space: value("space")?.parse().ok()?,
                number: value("process")?.parse().ok()?,
                start: value("start")?.parse().ok()?,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn what_is_noted_is_read() {
        let client = Client::this("127.0.0.1:0/42").unwrap();
        assert_eq!(Client::parse(&client.text()), Some(client));
        assert_eq!(Client::parse(""), None);
        assert_eq!(Client::parse("address=a boot=b space=c process=1 start=2"), None);
    }

    #[test]
    fn only_a_process_of_this_boot_that_has_ended_is_dead() {
        let this = Client::this("a").unwrap();
        assert!(!this.is_dead("a"), "it runs");
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut other = this.clone();
        other.process.number = child.id();
        other.process.start = start(child.id()).unwrap();
        assert!(!other.is_dead("a"), "it runs");
        child.kill().unwrap();
        // Not waited for: it is there as a zombie.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !other.is_dead("a") {
            assert!(Instant::now() < deadline, "it was killed");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.wait().unwrap();
        assert!(other.is_dead("a") && !other.is_dead("b"));
        let elsewhere = |change: fn(&mut Process)| {
            let mut client = other.clone();
            change(&mut client.process);
            client
        };
        assert!(!elsewhere(|process| process.boot += "x").is_dead("a"), "of another host");
        assert!(!elsewhere(|process| process.space += 1).is_dead("a"), "of another container");
        // Its number was given to another process.
        let mut again = this;
        again.process.start += 1;
        assert!(again.is_dead("a"));
    }
}
