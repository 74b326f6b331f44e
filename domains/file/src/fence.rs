//! What a process that died has left with the kernel.
//!
//! The end of a process does not wait for direct I/O that is on its way to a device. A write of a
//! dead server would land when the next server has run it again, answered it, and written something
//! newer there; a read would overwrite guest memory that the guest has put to another use. So no
//! request is run by a process before the kernel has ended those of the process before.
//!
//! Each process has a pipe, whose reading end lies in storage, and whose writing ends are held by
//! its rings alone ([`EndWatch`]). The next process puts that reading end aside, and the disk is
//! not claimed before nothing holds the pipe any more. One that has ended in its order, or has
//! handed the device over, has left nothing, and says so.
//!
//! Only rings for direct I/O hold it: what goes through the page cache is copied by the process
//! itself, or by threads of the kernel whose end the process's end waits for. The kernel takes some
//! 20 ms to let go of a ring that is idle.

use crate::image::kept;
use domain_api::{DomainError, Host};
use domain_io::uring::EndWatch;
use std::fs::File;
use std::io;

/// Storage key of the reading end of the process's pipe.
const RINGS: &str = "rings";
/// Storage key of that of the process before.
const BEFORE: &str = "rings.before";
/// Storage key of which process's the first one is.
const OWNER: &str = "rings.process";
/// Behind that: it has left nothing with the kernel.
const AT_REST: &[u8] = b" at rest";

/// The calling process, apart from others that had its number.
fn process() -> Vec<u8> {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The 22nd field, proc_pid_stat(5); the second one may have spaces and ends with a parenthesis.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let started = after_name.split_whitespace().nth(19).unwrap_or_default();
    format!("{} {started}", std::process::id()).into_bytes()
}

fn owner(host: Host) -> Vec<u8> {
    host.storage().bytes(OWNER).unwrap_or_default()
}

/// The storage is this process's from now on.
pub(crate) fn begin(host: Host) -> Result<(), DomainError> {
    let (storage, process) = (host.storage(), process());
    let owner = owner(host);
    if owner == process {
        return Ok(());
    }
    if owner.strip_suffix(AT_REST) == Some(&process) {
        // An instance that it has replaced may have something still.
        return storage.set_bytes(OWNER, &process);
    }
    if !owner.is_empty()
        && !owner.ends_with(AT_REST)
        && let Some(rings) = kept(host, RINGS)?
        // If one before it has left something still, it has never come to claim the disk, and its
        // rings to a request.
        && is_over(host)?
    {
        storage.set_file(BEFORE, &rings)?;
    }
    let (watch, _) = EndWatch::new()
        .map_err(|error| DomainError::new(format!("no pipe for the rings' end: {error}")))?;
    storage.set_file(RINGS, watch.reading())?;
    storage.set_bytes(OWNER, &process)
}

/// Nothing is in flight, and the storage is about to be another's.
pub(crate) fn end(host: Host) -> Result<(), DomainError> {
    host.storage().set_bytes(OWNER, &[&process()[..], AT_REST].concat())
}

/// The storage is this one's again.
pub(crate) fn resume(host: Host) -> Result<(), DomainError> {
    host.storage().set_bytes(OWNER, &process())
}

/// What a ring of this process is to hold.
pub(crate) fn hold(host: Host) -> io::Result<File> {
    let rings = host.storage().file(RINGS)?;
    let rings = rings.ok_or_else(|| io::Error::other("the rings' end cannot be watched"))?;
    EndWatch::from(rings).hold()
}

/// Whether the kernel has ended all requests of the process before.
fn is_over(host: Host) -> Result<bool, DomainError> {
    Ok(kept(host, BEFORE)?.is_none_or(|before| EndWatch::from(before).is_over()))
}

/// The same.
///
/// # Errors
/// It has not, or there is no descriptor left to look with.
pub(crate) fn check(host: Host) -> Result<(), DomainError> {
    if is_over(host)? {
        return Ok(());
    }
    Err(DomainError::new("the kernel has requests still of the process before, which is dead"))
}
