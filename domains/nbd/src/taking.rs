//! How a disk gets from one instance to the next: its connections, at rest, with what was agreed on
//! them.
//!
//! An instance that hands its disk on has nothing in flight, so each connection is at a message's
//! boundary; it leaves the descriptors in storage, and says so. What it says is taken back by the
//! one that takes them up: an instance, or a process, that dies leaves connections that nothing is
//! known of, which are ended.

use crate::announced::{Announced, usable};
use crate::answers;
use crate::connect::{self, Connection};
use crate::keeper::{self, key};
use crate::link::Link;
use crate::marks::LINKS;
use crate::negotiate::{Export, Refusal};
use crate::pool::Pool;
use crate::server::Process;
use crate::uri::{Server, Target};
use domain_api::{DomainError, Host, Level};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Storage key of what was left of connections.
const CONNECTIONS: &str = "connections";
/// Storage key of the URI in use.
const URI: &str = "uri";
const IN_USE: &str = "in use\n";
const RESTING: &str = "resting\n";
/// A line of what was left, if something was changed and not flushed.
const UNFLUSHED: &str = "unflushed";

/// The connection of the first instance, until it is activated.
pub(crate) type First = Mutex<Option<Connection>>;

/// Connects for a new disk.
pub(crate) fn first(
    target: &Target,
    read_only: bool,
    no_flush: bool,
) -> Result<(Announced, First), DomainError> {
    let connection = connect::connect(target, None, &|| false)
        .map_err(|refusal| DomainError::new(sentence(target, &refusal)))?;
    let announced = Announced::of(&connection.export, read_only, no_flush)
        .map_err(|why| DomainError::new(format!("{target} cannot be the disk: {why}")))?;
    Ok((announced, Mutex::new(Some(connection))))
}

fn sentence(target: &Target, refusal: &Refusal) -> String {
    let advice = match (refusal, &target.server) {
        (Refusal::Io(error), server) => match (error.kind(), server) {
            (io::ErrorKind::NotFound, Server::Unix(_)) => {
                "; start the server, or correct the socket in `uri`"
            }
            (io::ErrorKind::ConnectionRefused, _) => "; start the server, or correct `uri`",
            (io::ErrorKind::PermissionDenied, _) => {
                "; let the daemon's user have the server's socket"
            }
            (io::ErrorKind::TimedOut, _) => {
                "; it may have its one client already (`qemu-nbd --shared=2` takes two)"
            }
            _ => "; see to the server, or correct `uri`",
        },
        (Refusal::Protocol(_), _) => "",
        (Refusal::Server(..), _) => "; correct `uri`, or the server's configuration",
    };
    format!("cannot use {target}: {refusal}{advice}")
}

/// Whether a successor serves the disk that the guest has.
pub(crate) fn check_same(
    host: Host,
    uri: &str,
    announced: &Announced,
    read_only: bool,
) -> Result<(), DomainError> {
    let served = host.storage().bytes(URI).unwrap_or_default();
    if served != uri.as_bytes() {
        return Err(DomainError::new(format!(
            "`{uri}` is another export than the guest's disk, `{}`; an upgrade does not move a disk, leave `uri` out",
            String::from_utf8_lossy(&served)
        )));
    }
    if read_only && !announced.read_only {
        return Err(DomainError::new(
            "`readonly` is true, and the guest was told that it can write; leave it out",
        ));
    }
    Ok(())
}

/// Takes up what is in storage, which is ours from now on.
pub(crate) fn take_up(pool: &Pool, uri: &str, first: &First) -> Result<(), DomainError> {
    let storage = pool.host.storage();
    let marks = pool.open_marks()?;
    let left = storage.bytes(CONNECTIONS).map(|text| String::from_utf8_lossy(&text).into_owned());
    let socket_at = |slot| {
        let socket = storage.file(&key(slot)).map_err(|error| {
            DomainError::new(format!("no descriptor for a connection that there is: {error}"))
        })?;
        Ok::<_, DomainError>(socket.map(OwnedFd::from))
    };
    // From here on a death leaves connections that nothing is known of.
    storage.set_bytes(CONNECTIONS, IN_USE.as_bytes())?;
    let mut taken = Vec::new();
    let mut server = Some(Process::from_numbers(marks.server()));
    let unflushed = match left.as_deref() {
        None => {
            server = None;
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            taken.extend(first.take().map(|connection| (0, connection)));
            false
        }
        Some(text) if text.starts_with(RESTING) => {
            for (slot, export) in text.lines().skip(1).filter_map(parse) {
                // It is made anew.
                let socket = socket_at(slot).unwrap_or_else(|error| {
                    pool.host.log(Level::Warn, &error.to_string());
                    None
                });
                let Some(socket) = socket else { continue };
                // One that has ended since is known from before.
                let known = || Process::from_numbers(marks.server());
                let server = Process::behind(socket.as_fd()).or_else(known);
                taken.push((slot, Connection { socket, export, server }));
            }
            text.lines().any(|line| line == UNFLUSHED)
        }
        Some(_) => {
            let mut sockets = Vec::new();
            for slot in 0..LINKS {
                sockets.extend(socket_at(slot)?.map(|socket| (slot, socket)));
            }
            if answers::take_in(&sockets, marks) {
                pool.flush_failed();
            }
            // Where the server's process is not known, one whose connection only we end stays.
            if server == Some(None) && sockets.iter().any(|(_, socket)| !connect::has_ended(socket))
            {
                server = None;
            }
            for (_, socket) in &sockets {
                // Whatever was half said.
                connect::end(socket);
            }
            // It may be so.
            !pool.told().read_only
        }
    };
    pool.set_unflushed(unflushed);
    let (in_flight, old) = marks.left();
    if !in_flight.is_empty() {
        pool.host.count("nbd_unknown_changes", in_flight.len() as u64);
    }
    let until = pool.host.clock() + pool.options.settle;
    pool.old.begin(in_flight, &old, until, Process::from_numbers(marks.server()), marks);
    let announced = Announced::inherited(pool.host).unwrap_or_else(|| pool.announced());
    announced.keep(pool.host)?;
    pool.announce(announced);
    if storage.bytes(URI).as_deref() != Some(uri.as_bytes()) {
        storage.set_bytes(URI, uri.as_bytes())?;
    }
    let mut slots = pool.slots();
    slots.wanted = slots.wanted.max(1);
    slots.server = server;
    for (slot, connection) in taken {
        let link = keeper::add(pool, &mut slots, slot, connection);
        if left.is_none() {
            keeper::keep_descriptor(pool, &link);
        }
    }
    pool.changed(&slots);
    pool.resting.store(false, Ordering::Relaxed);
    drop(slots);
    pool.wake_keeper();
    Ok(())
}

/// Leaves the connections in storage. No request is in flight.
pub(crate) fn hand_on(pool: &Pool) -> Result<(), DomainError> {
    let links = {
        let mut slots = pool.slots();
        pool.resting.store(true, Ordering::Relaxed);
        let links = std::mem::take(&mut slots.links);
        pool.changed(&slots);
        links
    };
    // A flush on its way ends with its connection; it is sent again if the disk comes back.
    pool.own_flush.undone();
    let storage = pool.host.storage();
    let mut text = RESTING.to_owned();
    for link in links.iter().flatten() {
        let can_go_on = link.is_at_rest() && !link.is_closing();
        let kept = can_go_on
            && link
                .socket()
                .try_clone_to_owned()
                .is_ok_and(|fd| storage.set_file(&key(link.slot), &File::from(fd)).is_ok());
        if kept {
            let Export { size, flags, minimum, preferred, maximum } = link.export;
            text += &format!("{} {size} {flags} {minimum} {preferred} {maximum}\n", link.slot);
        } else {
            end(pool, link);
        }
    }
    // From now on it is the one's that takes the disk up.
    if pool.takes_unflushed() {
        text += UNFLUSHED;
        text += "\n";
    }
    storage.set_bytes(CONNECTIONS, text.as_bytes())
}

/// Ends a connection that is not handed on. What it has in flight is no request: a flush of our
/// own, or what a queue has left that is gone. The marks of that are for the one that takes the
/// disk up.
fn end(pool: &Pool, link: &Link) {
    let Some(left) = link.break_off() else { return };
    if left.has_flush {
        pool.note_unflushed();
    }
    left.items.iter().for_each(|(_, item)| pool.answered(item.as_ref().map(|item| &item.job)));
}

/// A line of [`hand_on`]'s.
fn parse(line: &str) -> Option<(usize, Export)> {
    let mut numbers = line.split(' ').map(str::parse::<u64>);
    let mut next = || numbers.next()?.ok();
    let slot = usize::try_from(next()?).ok().filter(|slot| *slot < LINKS)?;
    let export = Export {
        size: next()?,
        flags: next()?.try_into().ok()?,
        minimum: next()?.try_into().ok()?,
        preferred: next()?.try_into().ok()?,
        maximum: next()?.try_into().ok()?,
    };
    Some((slot, export))
}

/// Serves `capacity` bytes from now on, if a new connection is told of as many.
pub(crate) fn resize(pool: &Arc<Pool>, capacity: u64) -> Result<(), DomainError> {
    let announced = pool.announced();
    let size = newest_size(pool, &announced, capacity).map_err(|why| {
        DomainError::new(format!("cannot ask for the size of {}: {why}", pool.target))
    })?;
    if size < capacity {
        return Err(DomainError::new(format!(
            "{} has {size} bytes; make it {capacity} bytes long first (qemu-nbd takes a new size when it is started anew)",
            pool.target
        )));
    }
    // Connections that know less are used no more, before the guest uses what is new.
    let links = pool.slots().links.clone();
    for link in links.iter().flatten() {
        if usable(&link.export, announced.block_size) < capacity {
            link.close_when_idle();
        }
    }
    pool.changed(&pool.slots());
    let resized = Announced { capacity, ..announced };
    resized.keep(pool.host)?;
    pool.announce(resized);
    pool.wake_keeper();
    Ok(())
}

/// The most that a connection says, or a new one.
fn newest_size(pool: &Pool, announced: &Announced, capacity: u64) -> Result<u64, String> {
    let size = |export: &Export| usable(export, announced.block_size);
    let (links, allowed, address) = {
        let slots = pool.slots();
        (slots.links.clone(), slots.allowed, slots.address)
    };
    let most = links.iter().flatten().map(|link| size(&link.export)).max().unwrap_or(0);
    if most >= capacity {
        return Ok(most);
    }
    if allowed > 1 {
        let connection =
            connect::connect(&pool.target, address, &|| false).map_err(|no| no.to_string())?;
        return Ok(size(&connection.export));
    }
    // The server may have one client only: its connection is made anew.
    let before: Vec<u32> = links.iter().flatten().map(|link| link.name).collect();
    links.iter().flatten().for_each(|link| link.close_when_idle());
    pool.changed(&pool.slots());
    pool.wake_keeper();
    let deadline = Instant::now() + connect::PATIENCE;
    while Instant::now() < deadline {
        let links = pool.slots().links.clone();
        if let Some(link) = links.iter().flatten().find(|link| !before.contains(&link.name)) {
            return Ok(size(&link.export));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err("the server does not let us in again".to_owned())
}
