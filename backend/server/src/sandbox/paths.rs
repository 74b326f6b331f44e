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

/// Pinned: a newer one forbids more, which has to be tried first.
const ABI_LEVEL: ABI = ABI::V9;
/// From here on signals to other processes are looked at.
pub(super) const SIGNALS_LEVEL: i32 = ABI::V6 as i32;
/// From here on it is looked at which sockets with a path are connected to.
pub(super) const SOCKETS_LEVEL: i32 = ABI::V9 as i32;

const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
const READ_IMAGE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | IoctlDev});
const WRITE_IMAGE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{WriteFile | Truncate | IoctlDev});
const USE_IMAGE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | IoctlDev});
const CONNECT: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ResolveUnix});

/// What the process looks at of itself and of the processes that it talks to. Of others it sees
/// what any user does, command lines among that. Their memory, environment and descriptors are
/// behind ptrace's check, which Landlock refuses for a process that is not confined with this one.
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
    if sandbox.looks_names_up() {
        for path in NAMES {
            allow(&mut rules, Path::new(path), READ)?;
        }
    }
    for socket in &sandbox.sockets {
        // A server that is started again makes another one of this name.
        let folder = socket.parent().filter(|folder| !folder.as_os_str().is_empty());
        allow(&mut rules, folder.unwrap_or(Path::new(".")), CONNECT)?;
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

/// A file that the process has is opened anew by it, in the mode that it has.
fn allow_given(rules: &mut RulesetCreated, file: BorrowedFd<'_>) {
    let Some(access) = access_of(file) else { return };
    // Files in memory cannot be in a rule, and need none.
    if let Err(error) = rules.add_rule(PathBeneath::new(file.as_fd(), access)) {
        log::debug!("no rule for a file that was given: {error}");
    }
}

/// What a descriptor lets its owner do with its file. Landlock lets any file be opened so that it
/// can be neither read nor written (`O_PATH`, and both bits of the mode): that is nothing.
fn access_of(file: BorrowedFd<'_>) -> Option<BitFlags<AccessFs>> {
    let kind = FileType::from_raw_mode(fstat(file).ok()?.st_mode);
    let flags = fcntl_getfl(file).ok()?;
    if !matches!(kind, FileType::RegularFile | FileType::BlockDevice)
        || flags.contains(OFlags::PATH)
    {
        return None;
    }
    let mode = flags & OFlags::RWMODE;
    [(OFlags::RDONLY, READ_IMAGE), (OFlags::WRONLY, WRITE_IMAGE), (OFlags::RDWR, USE_IMAGE)]
        .into_iter()
        .find_map(|(one, access)| (one == mode).then_some(access))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, open};
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    use rustix::thread::set_no_new_privs;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixListener;

    /// By bits of the mode: `open` of the standard library knows not all of them.
    fn opened(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        open(path, flags | OFlags::CLOEXEC, Mode::empty())
    }

    /// Does something in a thread that is confined so, to what is given and to nothing else.
    /// Nothing if this kernel has no Landlock.
    fn confined<T: Send>(
        sandbox: &Sandbox,
        given: &[BorrowedFd<'_>],
        act: impl FnOnce(i32) -> T + Send,
    ) -> Option<T> {
        std::thread::scope(|scope| {
            let act = scope.spawn(|| {
                set_no_new_privs(true).unwrap();
                let level = restrict(sandbox, given).unwrap();
                if level.is_none() {
                    println!("skipped: this kernel has no Landlock");
                }
                level.map(act)
            });
            act.join().unwrap()
        })
    }

    const BOTH_BITS: OFlags = OFlags::RWMODE;

    #[test]
    fn a_descriptor_is_worth_the_mode_that_it_has() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of = |flags| access_of(opened(file.path(), flags).unwrap().as_fd());
        assert_eq!(of(OFlags::RDONLY), Some(READ_IMAGE));
        assert_eq!(of(OFlags::WRONLY), Some(WRITE_IMAGE));
        assert_eq!(of(OFlags::WRONLY | OFlags::APPEND), Some(WRITE_IMAGE));
        assert_eq!(of(OFlags::RDWR), Some(USE_IMAGE));
        assert_eq!(of(OFlags::PATH), None);
        assert_eq!(of(BOTH_BITS), None, "it can neither be read nor written");
        let folder = tempfile::tempdir().unwrap();
        let folder = opened(folder.path(), OFlags::RDONLY).unwrap();
        assert_eq!(access_of(folder.as_fd()), None);
    }

    /// What a confined server can make of a file that is not for it, and have kept for the next
    /// one.
    #[test]
    fn a_descriptor_that_reads_nothing_opens_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path();
        let reads = |given: &[BorrowedFd<'_>]| {
            confined(&Sandbox::default(), given, |_| {
                // Landlock itself looks at neither.
                for flags in [OFlags::PATH, BOTH_BITS] {
                    opened(path, flags).unwrap();
                }
                opened(path, OFlags::RDONLY).map(drop)
            })
        };
        for flags in [OFlags::PATH, BOTH_BITS, OFlags::WRONLY] {
            let given = opened(path, flags).unwrap();
            let Some(read) = reads(&[given.as_fd()]) else { return };
            assert_eq!(read, Err(Errno::ACCESS), "{flags:?}");
        }
        let given = opened(path, OFlags::RDONLY).unwrap();
        assert_eq!(reads(&[given.as_fd()]), Some(Ok(())));
    }

    /// From level 9 on, where it matters whose socket it is.
    #[test]
    fn sockets_are_those_beside_the_given_one() {
        let (given, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        // One that is started again has another inode.
        let (beside, elsewhere) = (given.path().join("anew"), other.path().join("socket"));
        let _listening = [&beside, &elsewhere].map(|path| UnixListener::bind(path).unwrap());
        let connects = |path: &Path| {
            let socket = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
            connect(&socket, &SocketAddrUnix::new(path)?)
        };
        let sandbox = Sandbox { sockets: vec![given.path().join("socket")], ..Sandbox::default() };
        let Some((level, beside, elsewhere)) =
            confined(&sandbox, &[], |level| (level, connects(&beside), connects(&elsewhere)))
        else {
            return;
        };
        assert_eq!(beside, Ok(()), "level {level}");
        let expected = if level < SOCKETS_LEVEL { Ok(()) } else { Err(Errno::ACCESS) };
        assert_eq!(elsewhere, expected, "level {level}");
    }
}
