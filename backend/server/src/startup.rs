//! What a process that serves needs, whatever it is told to serve.

use crate::args::{Config, Listen};
use crate::group;
use crate::raw_fd::{Passed, activated, inherited};
use control::Access;
use loader::TrustedKey;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::os::unix::net::UnixListener;

/// As many descriptors as are allowed: a queue takes up to 22 in an upgrade, and what many systems
/// begin with is 1024, for the sake of programs that use `select`.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::warn!("the limit of open descriptors stays {:?}: {error}", limit.current);
    }
}

/// Descriptors are opened by their names in `/proc`: each module, and an image once more.
///
/// # Errors
/// It is not there, or another process's.
pub fn check_proc() -> Result<(), String> {
    std::fs::symlink_metadata("/proc/self/fd").map(drop).map_err(|error| {
        format!(
            "/proc is not that of this process, and modules are loaded by it: mount it ({error})"
        )
    })
}

/// The listening socket that this process is given, if it is to be given one; it may be among those
/// that a service manager has passed. To be called before anything is opened.
///
/// # Errors
/// It is not there, or no such thing.
pub fn given_listener(
    listen: &Listen,
    passed: &mut Passed,
) -> Result<Option<UnixListener>, String> {
    match listen {
        Listen::Fd(fd) => inherited(*fd, passed).map(Some),
        Listen::Activated => activated(passed).map(Some),
        Listen::Path(_) => Ok(None),
    }
}

/// Which frontends may connect to a socket of our own.
///
/// # Errors
/// There is no such group.
pub fn frontends_access(config: &Config) -> Result<Access, String> {
    let group = config.socket_group.as_deref().map(group::number_of).transpose()?;
    Ok(Access { mode: config.socket_mode, group })
}

/// The keys of which one has to have signed a module; none if that is not asked for.
///
/// # Errors
/// One is no key, and no file that has one.
pub fn trusted_keys(config: &Config) -> Result<Vec<TrustedKey>, String> {
    config.trusted_keys.iter().map(|text| TrustedKey::read(text)).collect()
}
