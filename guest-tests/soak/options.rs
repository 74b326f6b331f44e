//! The command line.

use crate::act::Act;
use std::time::{Duration, SystemTime};

/// What the disk is kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// The host's memory: handovers.
    Ramdisk,
    /// An image, through the page cache: swaps.
    File,
    /// An image, past the page cache.
    Direct,
}

impl Disk {
    /// As `--disk` has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ramdisk => "ramdisk",
            Self::File => "file",
            Self::Direct => "direct",
        }
    }
}

/// What to do.
pub struct Options {
    pub time: Duration,
    /// As many acts at most.
    pub count: Option<u64>,
    pub seed: u64,
    pub disk: Disk,
    pub acts: Vec<Act>,
    pub queues: usize,
    pub depth: usize,
    /// The load is `fio` in a guest, and not a native client.
    pub is_in_guest: bool,
}

const USAGE: &str = "usage: scripts/soak MINUTES [--seed N] [--disk ramdisk|file|direct] [--only ACT,ACT... | --only none]
       [--count ACTS] [--guest | [--queues N] [--depth N]]
acts: upgrade rollback refusal panic reconnect abandon resize kill exchange re-exec whole-kill reset";

impl Options {
    pub fn from_args(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let usage = |what: &str| format!("{what}\n{USAGE}");
        let clock = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(1, |since| since.as_nanos() as u64);
        let mut options = Self {
            time: Duration::ZERO,
            count: None,
            seed: clock,
            disk: Disk::Ramdisk,
            acts: Act::ALL.to_vec(),
            queues: 2,
            depth: 32,
            is_in_guest: false,
        };
        let mut args = args.peekable();
        let minutes = args.next().ok_or_else(|| usage("how many minutes?"))?;
        let minutes: f64 = minutes
            .parse()
            .ok()
            .filter(|minutes| (0.0..=100_000.0).contains(minutes))
            .ok_or_else(|| usage(&format!("`{minutes}` is no number of minutes")))?;
        options.time = Duration::from_secs_f64(minutes * 60.0);
        let mut is_of_clients = false;
        while let Some(option) = args.next() {
            if option == "--guest" {
                options.is_in_guest = true;
                continue;
            }
            is_of_clients |= matches!(option.as_str(), "--queues" | "--depth");
            let value = args.next().ok_or_else(|| usage(&format!("{option} has no value")))?;
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| usage(&format!("{option}: `{value}` is no number")))
            };
            match option.as_str() {
                "--seed" => options.seed = number()?,
                "--count" => options.count = Some(number()?),
                "--queues" => options.queues = number()?.clamp(1, 64) as usize,
                "--depth" => options.depth = number()?.clamp(1, 256) as usize,
                "--disk" => {
                    options.disk = [Disk::Ramdisk, Disk::File, Disk::Direct]
                        .into_iter()
                        .find(|disk| disk.name() == value)
                        .ok_or_else(|| usage(&format!("there is no disk `{value}`")))?;
                }
                "--only" if value == "none" => options.acts.clear(),
                "--only" => {
                    let act = |name: &str| {
                        let act = Act::ALL.into_iter().find(|act| act.name() == name);
                        act.ok_or_else(|| usage(&format!("there is no act `{name}`")))
                    };
                    options.acts = value.split(',').map(act).collect::<Result<_, _>>()?;
                }
                _ => return Err(usage(&format!("there is no option `{option}`"))),
            }
        }
        if options.is_in_guest && is_of_clients {
            return Err(usage("a guest has two queues, and its fio is 16 deep on each"));
        }
        Ok(options)
    }
}
