//! What the log is told of a queue.

use crate::log_limit;
use log::Level;
use std::io;
use virtio_blk::MalformedChain;
use virtio_queue::Error;
use virtqueue::NotLogged;
use virtqueue::inflight::{Contradiction, Marked, RegionError};

/// Says that the ring makes no sense, and is left alone.
#[cold]
pub(super) fn broken_ring(queue: usize, error: &Error) {
    let what_to_do = match error {
        Error::FindMemoryRegion => {
            ", nor is it in the memory that the frontend has shared (in QEMU share=on)"
        }
        _ => "",
    };
    log_limit::say(
        Level::Error,
        "ring makes no sense",
        format_args!(
            "queue {queue}: the ring makes no sense ({error}){what_to_do}; it is not served until the driver resets it"
        ),
    );
}

/// Says that the driver offers a chain which it has not been given back.
#[cold]
pub(super) fn head_in_use(queue: usize, head: u16) {
    log_limit::say(
        Level::Error,
        "ring makes no sense",
        format_args!(
            "queue {queue}: the driver offers chain {head} while it is in flight; the queue is not served until the driver resets it"
        ),
    );
}

/// Says that a migration is not complete.
#[cold]
pub(super) fn not_logged(queue: usize, error: NotLogged) {
    log_limit::say(
        Level::Error,
        "not logged",
        format_args!(
            "queue {queue}: {error}: what arrives where the guest is migrated to may be old. The session is ended; migrate again. The frontend has to send a log for all of the guest's memory (SET_LOG_BASE) before it turns the log on"
        ),
    );
}

/// Says that a request is answered with an error because memory is not shared.
#[cold]
pub(super) fn outside_of_memory(queue: usize, addr: u64) {
    log_limit::say(
        Level::Warn,
        "buffer outside",
        format_args!(
            "queue {queue}: a request has a buffer at guest address {addr:#x}, which is outside of the memory that the frontend has shared, and is answered with an I/O error. All of the guest's memory has to be shared (in QEMU share=on), that which is plugged in later too"
        ),
    );
}

/// Says why a chain cannot be answered.
#[cold]
pub(super) fn malformed_chain(
    queue: usize,
    head: u16,
    reason: MalformedChain,
    outside: Option<u64>,
) {
    let place = outside.map_or_else(String::new, |addr| {
        format!(
            " (guest address {addr:#x}; all of the guest's memory has to be shared: in QEMU with share=on, for the firmware of a microvm with aux-ram-share=on)"
        )
    });
    log_limit::say(
        Level::Warn,
        "malformed chain",
        format_args!(
            "queue {queue}: chain {head} is malformed and cannot be answered: {reason}{place}"
        ),
    );
}

/// Says that the domain breaks its contract.
#[cold]
pub(super) fn takes_no_request(queue: usize) {
    log_limit::say(
        Level::Error,
        "takes no request",
        format_args!("queue {queue}: the domain takes no request although it has none"),
    );
}

/// Says that the call descriptor cannot be written.
#[cold]
pub(super) fn not_notified(queue: usize, error: &io::Error) {
    log_limit::say(
        Level::Warn,
        "not notified",
        format_args!("queue {queue}: the frontend was not notified: {error}"),
    );
}

/// Says that the ring's region does not fit it, and that the ring is left alone: its requests could
/// be lost, or done twice, by the next process.
#[cold]
pub(super) fn untracked(queue: usize, error: &RegionError) {
    log_limit::say(
        Level::Error,
        "untracked",
        format_args!("queue {queue}: {error}; the queue is not served until it is set up anew"),
    );
}

/// Says that what the region says is in flight is not believed.
#[cold]
pub(super) fn contradictory_region(queue: usize, contradiction: Contradiction) {
    log_limit::say(
        Level::Error,
        "contradictory region",
        format_args!(
            "queue {queue}: the in-flight region contradicts itself: {contradiction}; that is left out"
        ),
    );
}

/// Says that requests of an earlier process run again.
#[cold]
pub(super) fn replays(queue: usize, requests: usize, cautious: bool) {
    let how = if cautious { ", one at a time" } else { "" };
    log::info!("queue {queue}: {requests} requests were in flight, and run again{how}");
}

/// Says that a request does not run again.
#[cold]
pub(super) fn quarantined(queue: usize, request: Marked) {
    let Marked { counter, head } = request;
    log::error!(
        "queue {queue}: the request at descriptor {head} (number {counter}) was in flight each time that the server died; it is answered with an I/O error"
    );
}
