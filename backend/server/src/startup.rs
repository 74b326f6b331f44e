//! What a process that serves needs, whatever it is told to serve.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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
