//! The command line of `bench`.

use std::path::PathBuf;

use crate::cells;
use guest_tests::daemon::binary;

pub(super) const USAGE: &str = "\
usage: scripts/bench data [--quick] [--cells GLOB] [--pairs N] [--seconds S] [--idle-seconds S] [--guest] [--awake] [--no-pin]
                          [--against BUILD] [--against-args ARGS] [--disk-dir DIR] [--json FILE] [--svg FILE]
       scripts/bench upgrade [--quick] [--cells GLOB] [--pairs N] [--seconds S] [--upgrades N] [--guest] [--no-pin]
                          [--disk-dir DIR] [--json FILE] [--svg FILE]
       scripts/bench cost [PREFIX]

  data       requests per second, latency and CPU time, beside qemu-storage-daemon, in turn
  upgrade    what an upgrade costs those who do I/O, beside doing nothing, a bare rendezvous, and a restart
  cost       instructions per request that the proxy adds to a domain called directly; counted, so that nothing disturbs it

  --quick          what matters, in minutes
  --cells GLOB     only these, e.g. 'null/d1/*', '*/4k/read', 'sectors/*', 'nbd/*', queues, idle, ceiling; of upgrade: 'swap/empty/d1', handover, restart
  --pairs N        how many times both sides are measured (5)
  --seconds S      length of each run (data 2, upgrade 3)
  --idle-seconds S how long an idle daemon is watched (10)
  --upgrades N     handovers of each kind (200)
  --guest          also (upgrade) or only (data) with fio in a guest; slow
  --awake          keep idle CPUs looking for work, so that to be woken costs what it does on a machine of one's own; parts
                   that compare what sleeps with itself (swap, queues) always do
  --against BUILD  beside another build of the daemon instead of the peer: a directory with its binaries and modules, or a
                   revision, which is built first
  --against-args ARGS   beside the same build, or that of --against, with these arguments as well, e.g. --no-supervisor
  --no-pin         let client and server (in `upgrade`: its workers) not have a CPU each
  --disk-dir DIR   where image files on a disk are put (the target directory)
  --json FILE, --svg FILE   where results go (bench/NAME.json and .svg in the target directory)";

/// Which benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Data,
    Upgrade,
}

/// What the daemon is measured beside, if not beside the peer.
#[derive(Clone, Debug)]
pub(super) struct Against {
    /// Where the build is.
    pub directory: PathBuf,
    /// What it is started with, after what the cell says.
    pub args: Vec<String>,
}

fn against(options: &mut Options) -> &mut Against {
    let own = || Against { directory: binary_directory(), args: Vec::new() };
    options.against.get_or_insert_with(own)
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Options {
    pub kind: Kind,
    pub quick: bool,
    pub guest: bool,
    pub awake: bool,
    pub pin: bool,
    pub cells: Option<String>,
    pub pairs: usize,
    pub seconds: f64,
    pub idle_seconds: f64,
    pub upgrades: usize,
    pub against: Option<Against>,
    pub disk_dir: PathBuf,
    pub json: PathBuf,
    pub svg: PathBuf,
}

impl Options {
    /// Reads the arguments after the program's name. `target` is where files go if no option says
    /// anything.
    pub(super) fn parse(args: &[String], target: &std::path::Path) -> Result<Options, String> {
        let (kind, name) = match args.first().map(String::as_str) {
            Some("data") => (Kind::Data, "data"),
            Some("upgrade") => (Kind::Upgrade, "upgrade"),
            _ => return Err("say `data`, `upgrade` or `cost`".to_owned()),
        };
        let data = kind == Kind::Data;
        let mut options = Options {
            kind,
            quick: false,
            guest: false,
            awake: false,
            pin: true,
            cells: None,
            pairs: 0,
            seconds: 0.0,
            idle_seconds: 10.0,
            upgrades: 200,
            against: None,
            disk_dir: target.to_owned(),
            json: target.join("bench").join(format!("{name}.json")),
            svg: target.join("bench").join(format!("{name}.svg")),
        };
        let mut rest = args[1..].iter();
        while let Some(option) = rest.next() {
            let mut value = || rest.next().ok_or_else(|| format!("{option} wants a value"));
            match option.as_str() {
                "--quick" => options.quick = true,
                "--guest" => options.guest = true,
                "--awake" if data => options.awake = true,
                "--no-pin" => options.pin = false,
                "--cells" => options.cells = Some(value()?.clone()),
                "--idle-seconds" if data => options.idle_seconds = positive(option, value()?)?,
                "--upgrades" if !data => {
                    options.upgrades = positive(option, value()?)?.ceil() as usize
                }
                "--pairs" => options.pairs = positive(option, value()?)?.ceil() as usize,
                "--seconds" => options.seconds = positive(option, value()?)?,
                "--against" if data => against(&mut options).directory = value()?.into(),
                "--against-args" if data => {
                    let words = value()?.split_whitespace().map(str::to_owned).collect();
                    against(&mut options).args = words;
                }
                "--disk-dir" => options.disk_dir = value()?.into(),
                "--json" => options.json = value()?.into(),
                "--svg" => options.svg = value()?.into(),
                other => return Err(format!("`bench {name}` has no option `{other}`")),
            }
        }
        if options.pairs == 0 {
            options.pairs = 5;
        }
        if options.seconds == 0.0 {
            options.seconds = if data { 2.0 } else { 3.0 };
        }
        Ok(options)
    }
}

impl Options {
    /// Whether a cell is asked for, by its name.
    pub(super) fn wants(&self, name: &str) -> bool {
        self.cells.as_deref().is_none_or(|glob| cells::matches(glob, name))
    }
}

fn binary_directory() -> PathBuf {
    let daemon = binary("vhost-hotswap");
    daemon.parent().expect("a file in a directory").to_owned()
}

fn positive(option: &str, text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number < 1e6 => Ok(number),
        _ => Err(format!("{option} wants a positive number, not `{text}`")),
    }
}
