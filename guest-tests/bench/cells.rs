//! What is measured: every cell is a load, and those who take it in turn.
//!
//! A cell's name is its coordinates, `BACKING/dDEPTH/WAIT/SIZE/MIX`, and `--cells` selects by it.
//! In each cell the peer may come in several configurations; we are compared with the best of them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::drive::{Load, Mix, Wait};
use crate::options::Against;
use crate::server::Recipe;
use guest_tests::loopback::LoopDevice;
use guest_tests::nbd::NbdServer;

/// Size of all disks but the direct one.
const DISK_BYTES: u64 = 256 << 20;
/// Larger, because nothing caches it.
const DIRECT_BYTES: u64 = 1 << 30;

/// Before the process id in the name of a directory with images.
const PREFIX: &str = "hotswap-bench-";

/// Where the data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// Nowhere: `empty` against `null-co`.
    Null,
    /// `ramdisk` against `null-co`, which moves no data: the peer has nothing like it.
    Memory,
    /// A file on tmpfs.
    Tmpfs,
    /// A file on disk, all of it in the page cache.
    Cached,
    /// A file on disk, past the page cache.
    Direct,
    /// A device with sectors of 4096 bytes, past the page cache, and requests of 512 bytes. A loop
    /// device on tmpfs, which takes root.
    Sectors,
    /// `nbdkit memory` behind a Unix socket.
    Nbd,
}

impl Backing {
    const ALL: [Backing; 7] = [
        Backing::Null,
        Backing::Memory,
        Backing::Tmpfs,
        Backing::Cached,
        Backing::Direct,
        Backing::Sectors,
        Backing::Nbd,
    ];

    /// How long requests are.
    fn sizes(self) -> &'static [usize] {
        if self == Backing::Sectors { &[512] } else { &[4 << 10, 128 << 10] }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Backing::Null => "null",
            Backing::Memory => "ramdisk",
            Backing::Tmpfs => "tmpfs",
            Backing::Cached => "cached",
            Backing::Direct => "direct",
            Backing::Sectors => "sectors",
            Backing::Nbd => "nbd",
        }
    }
}

/// One who takes a load.
#[derive(Clone, Debug)]
pub(super) struct Contender {
    pub label: String,
    pub recipe: Recipe,
}

/// One row of the results.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    pub name: String,
    pub load: Load,
    /// The first is our daemon as it comes; the others of ours are columns of their own.
    pub contenders: Vec<Contender>,
}

/// The disk images, made when the first cell asks for them; removed in the end.
pub(super) struct Images {
    disk_dir: PathBuf,
    memory: Option<(TempDir, PathBuf)>,
    disk: Option<(TempDir, PathBuf)>,
    direct: Option<(TempDir, PathBuf)>,
    sectors: Option<LoopDevice>,
    nbd: Option<NbdServer>,
}

impl Images {
    /// `disk_dir` is on a real disk.
    pub(super) fn new(disk_dir: PathBuf) -> Images {
        Images { disk_dir, memory: None, disk: None, direct: None, sectors: None, nbd: None }
    }

    /// The socket of an NBD server.
    fn socket(&mut self) -> PathBuf {
        let bytes = DISK_BYTES.to_string();
        self.nbd.get_or_insert_with(|| NbdServer::nbdkit(&["memory", &bytes])).socket()
    }

    pub(super) fn path(&mut self, backing: Backing) -> io::Result<&Path> {
        if backing == Backing::Sectors {
            if self.sectors.is_none() {
                self.sectors = LoopDevice::new(Path::new("/dev/shm"), DISK_BYTES, 4096, &[]);
            }
            let missing =
                || io::Error::new(io::ErrorKind::PermissionDenied, "no loop device can be made");
            return self.sectors.as_ref().map(LoopDevice::path).ok_or_else(missing);
        }
        let (place, directory, bytes) = match backing {
            Backing::Tmpfs => (&mut self.memory, Path::new("/dev/shm"), DISK_BYTES),
            Backing::Cached => (&mut self.disk, self.disk_dir.as_path(), DISK_BYTES),
            Backing::Direct => (&mut self.direct, self.disk_dir.as_path(), DIRECT_BYTES),
            Backing::Null | Backing::Memory | Backing::Sectors | Backing::Nbd => {
                return Err(io::ErrorKind::Unsupported.into());
            }
        };
        if place.is_none() {
            *place = Some(image(directory, bytes)?);
        }
        let path = &place.as_ref().expect("just made").1;
        if backing == Backing::Cached {
            // Whatever has happened to the cache since.
            io::copy(&mut File::open(path)?, &mut io::sink())?;
        }
        Ok(path)
    }
}

/// A file without holes, written through to the disk.
pub(super) fn image(directory: &Path, bytes: u64) -> io::Result<(TempDir, PathBuf)> {
    fs::create_dir_all(directory)?;
    sweep(directory);
    let prefix = format!("{PREFIX}{}-", std::process::id());
    let directory = tempfile::Builder::new().prefix(&prefix).tempdir_in(directory)?;
    let path = directory.path().join("disk.img");
    let mut file = File::create(&path)?;
    let piece = vec![0xa5; 1 << 20];
    for _ in 0..bytes >> 20 {
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    Ok((directory, path))
}

/// Removes what benchmarks have left that were killed: on tmpfs it would take up memory until
/// it is noticed.
fn sweep(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split_once('-')?.0.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // A user that may not remove it did not leave it either.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// What to select from.
pub(super) struct Selection<'a> {
    pub quick: bool,
    pub glob: Option<&'a str>,
    /// What the daemon polls by default, if it is a number.
    pub default_poll_us: Option<u32>,
    /// What the daemon is measured beside, if not beside the peer.
    pub against: Option<&'a Against>,
}

/// The cells of a selection, without contenders, which need images.
pub(super) fn list(selection: &Selection<'_>) -> Vec<(Backing, String, Load)> {
    let mut cells = Vec::new();
    for backing in Backing::ALL {
        for &bytes in backing.sizes() {
            for mix in [Mix::Read, Mix::Write, Mix::Mixed] {
                for depth in [1, 4, 32, 128] {
                    for wait in [Wait::Polled, Wait::Sleeping] {
                        let load = Load { depth, wait, bytes, mix };
                        let name = name(backing, load);
                        let wanted = match selection.glob {
                            Some(glob) => matches(glob, &name),
                            None if selection.quick => is_quick(backing, load),
                            // It takes a right that the others do not.
                            None if backing == Backing::Sectors => false,
                            // It takes a server that the others do not.
                            None if backing == Backing::Nbd => false,
                            // Depths in between say little where a system call dominates.
                            None => matches!(backing, Backing::Null) || matches!(depth, 1 | 32),
                        };
                        if wanted {
                            cells.push((backing, name, load));
                        }
                    }
                }
            }
        }
    }
    cells
}

fn name(backing: Backing, load: Load) -> String {
    let wait = match load.wait {
        Wait::Polled => "polled",
        Wait::Sleeping => "sleeping",
    };
    let mix = match load.mix {
        Mix::Read => "read",
        Mix::Write => "write",
        Mix::Mixed => "mixed",
    };
    let size = if load.bytes < 1024 {
        format!("{}b", load.bytes)
    } else {
        format!("{}k", load.bytes >> 10)
    };
    format!("{}/d{}/{wait}/{size}/{mix}", backing.name(), load.depth)
}

/// The cells that matter most.
fn is_quick(backing: Backing, load: Load) -> bool {
    if load.bytes != 4096 || !matches!(load.depth, 1 | 32) {
        return false;
    }
    match backing {
        Backing::Null => load.mix == Mix::Read,
        Backing::Memory => false,
        Backing::Tmpfs | Backing::Cached => load.wait == Wait::Sleeping && load.mix != Mix::Mixed,
        Backing::Direct => load.wait == Wait::Sleeping && load.mix == Mix::Read,
        Backing::Sectors | Backing::Nbd => false,
    }
}

/// Who takes part where.
pub(super) fn contenders(
    backing: Backing,
    images: &mut Images,
    selection: &Selection<'_>,
) -> io::Result<Vec<Contender>> {
    let ours = |args: &[String]| Contender {
        label: "daemon".to_owned(),
        recipe: Recipe::Ours(args.to_vec()),
    };
    let (daemon, peers) = match backing {
        Backing::Null | Backing::Memory => {
            let domain = if backing == Backing::Null { "empty" } else { "ramdisk" };
            let size = format!("size={DISK_BYTES}");
            let args =
                ["--domain", domain, "--param", &size, "--queue-size", "512"].map(str::to_owned);
            let label = if backing == Backing::Null { "null-co" } else { "null-co (no data)" };
            let null = format!("driver=null-co,size={DISK_BYTES},read-zeroes=on,latency-ns=0");
            (
                ours(&args),
                vec![peer(label, &null, false), peer(&format!("{label}, iothread"), &null, true)],
            )
        }
        Backing::Nbd => {
            let path = images.socket().display().to_string();
            let uri = format!("uri=nbd+unix:///?socket={path}");
            let args = ["--domain", "nbd", "--param", &uri, "--queue-size", "512"];
            let disk = format!("driver=nbd,server.type=unix,server.path={path}");
            (
                ours(&args.map(str::to_owned)),
                vec![peer("nbd", &disk, false), peer("nbd, iothread", &disk, true)],
            )
        }
        Backing::Tmpfs | Backing::Cached | Backing::Direct | Backing::Sectors => {
            let path = images.path(backing)?.display().to_string();
            let mut args: Vec<String> =
                ["--blk-file", &path, "--queue-size", "512"].map(str::to_owned).to_vec();
            let driver = if backing == Backing::Sectors { "host_device" } else { "file" };
            let file = |more: &str| format!("driver={driver},filename={path},{more}");
            let peers = if matches!(backing, Backing::Direct | Backing::Sectors) {
                args.extend(["--param".to_owned(), "direct=true".to_owned()]);
                vec![
                    peer("io_uring, direct", &file("aio=io_uring,cache.direct=on"), false),
                    peer("native, direct", &file("aio=native,cache.direct=on"), false),
                ]
            } else {
                vec![
                    peer("threads", &file("aio=threads"), false),
                    peer("io_uring", &file("aio=io_uring"), false),
                    peer("native, direct", &file("aio=native,cache.direct=on"), false),
                ]
            };
            (ours(&args), peers)
        }
    };
    if let Some(Against { directory, args }) = selection.against
        && let Recipe::Ours(own) = &daemon.recipe
    {
        let recipe =
            Recipe::Build { directory: directory.clone(), args: [&own[..], args].concat() };
        let label = format!("other build {}", args.join(" "));
        let other = Contender { label: label.trim_end().to_owned(), recipe };
        return Ok(vec![daemon, other]);
    }
    let polls = [0, 50];
    let more = polls.iter().filter(|&&us| Some(us) != selection.default_poll_us).map(|us| {
        let mut contender = daemon.clone();
        contender.label = format!("daemon, poll {us}");
        if let Recipe::Ours(args) = &mut contender.recipe {
            args.extend(["--poll-us".to_owned(), us.to_string()]);
        }
        contender
    });
    Ok([vec![daemon.clone()], more.collect(), peers].concat())
}

fn peer(label: &str, blockdev: &str, iothread: bool) -> Contender {
    let recipe = Recipe::Peer { blockdev: blockdev.to_owned(), iothread };
    Contender { label: label.to_owned(), recipe }
}

/// Whether a name fits a pattern in which `*` stands for anything.
pub(super) fn matches(glob: &str, name: &str) -> bool {
    match glob.split_once('*') {
        None => glob == name,
        Some((head, rest)) => name.strip_prefix(head).is_some_and(|left| {
            (0..=left.len()).any(|at| left.is_char_boundary(at) && matches(rest, &left[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        for (glob, name) in
            [("*", ""), ("null/*", "null/d1"), ("*/d1/*/4k/*", "null/d1/polled/4k/read")]
        {
            assert!(matches(glob, name), "{glob} {name}");
        }
        for (glob, name) in
            [("", "a"), ("null", "null/d1"), ("*/d1/*", "null/d128/polled"), ("a*c", "ab")]
        {
            assert!(!matches(glob, name), "{glob} {name}");
        }
    }

    #[test]
    fn names_are_unique_and_the_quick_cells_are_few() {
        let selection =
            |quick| Selection { quick, glob: None, default_poll_us: None, against: None };
        let quick = list(&selection(true));
        assert_eq!(quick.len(), 4 + 4 + 4 + 2);
        let all = list(&Selection { glob: Some("*"), ..selection(false) });
        let names: std::collections::BTreeSet<_> = all.iter().map(|(_, name, _)| name).collect();
        assert_eq!(names.len(), all.len());
        assert!(quick.iter().all(|(_, name, _)| names.contains(name)));
    }
}
