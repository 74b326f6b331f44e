//! Landlock: which files can be opened, and which ports and processes reached.

use channel::Sandbox;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
    make_bitflags,
};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// Pinned: a newer one forbids more, which has to be tried first. From 9 on sockets with a path
/// are looked at, too.
const ABI_LEVEL: ABI = ABI::V6;
pub(super) const LEVEL: i32 = ABI_LEVEL as i32;

const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
const READ_IMAGE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | IoctlDev});
const USE_IMAGE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | IoctlDev});

/// What the process looks at of itself and of the processes that it talks to. What is secret there
/// is refused all the same: a confined process traces none that is not confined with it.
const PROC: &str = "/proc";

/// What the C library looks at to know how many processors there are.
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Where libraries come from which a module may need.
const LIBRARIES: [&str; 5] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"];

/// What the C library reads to find a host by its name.
const NAMES: [&str; 7] = [
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/run/systemd/resolve",
];

/// Restricts the calling thread, and those that it starts. Returns the level that holds.
pub(super) fn restrict(
    sandbox: &Sandbox,
    given: &[BorrowedFd<'_>],
) -> Result<Option<i32>, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI_LEVEL))?
        .handle_access(AccessNet::from_all(ABI_LEVEL))?
        .scope(Scope::from_all(ABI_LEVEL))?
        .create()?;
    let modules = sandbox.modules.iter().map(|path| path.as_path());
    let system = [PROC, PROCESSORS].into_iter().chain(LIBRARIES).map(Path::new);
    for folder in modules.chain(system) {
        allow(&mut rules, folder, READ)?;
    }
    let image = if sandbox.reads_only { READ_IMAGE } else { USE_IMAGE };
    for file in &sandbox.files {
        // Below a folder nothing is written.
        allow(&mut rules, file, if file.is_dir() { READ } else { image })?;
    }
    for file in given {
        allow_given(&mut rules, *file);
    }
    if !sandbox.ports.is_empty() {
        for path in NAMES {
            allow(&mut rules, Path::new(path), READ)?;
        }
    }
    for port in &sandbox.ports {
        (&mut rules).add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    let status = rules.restrict_self()?;
    let level = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi.min(ABI_LEVEL) as i32,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    };
    Ok((status.ruleset != RulesetStatus::NotEnforced && level > 0).then_some(level))
}

/// What is not there needs no rule.
fn allow(
    rules: &mut RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<(), RulesetError> {
    let Ok(file) = PathFd::new(path) else { return Ok(()) };
    let is_folder =
        fstat(&file).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
    // Rights that a file cannot have make a rule incomplete.
    let access = if is_folder { access } else { access & !make_bitflags!(AccessFs::{ReadDir}) };
    rules.add_rule(PathBeneath::new(file, access)).map(drop)
}

/// A file that the process has is opened anew by it, with another mode.
fn allow_given(rules: &mut RulesetCreated, file: BorrowedFd<'_>) {
    let kind = fstat(file).map(|stat| FileType::from_raw_mode(stat.st_mode));
    if !matches!(kind, Ok(FileType::RegularFile | FileType::BlockDevice)) {
        return;
    }
    let writes = fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::RDWR));
    let access = if writes { USE_IMAGE } else { READ_IMAGE };
    // Files in memory cannot be in a rule, and need none.
    if let Err(error) = rules.add_rule(PathBeneath::new(file.as_fd(), access)) {
        log::debug!("no rule for a file that was given: {error}");
    }
}
