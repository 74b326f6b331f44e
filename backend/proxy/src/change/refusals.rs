//! Refusals that more than one way of a change ends in.

use crate::change::starved::say;
use crate::record::code::Code;
use crate::record::report::{Refusal, Starved};
use std::time::Duration;

/// No change is begun any more.
pub(crate) fn stopping() -> Refusal {
    Refusal::new(Code::Stopping, "the daemon is stopping; start it again first")
}

/// Not now: the change waits for the takeover, and is tried again.
pub(crate) fn preempted() -> Refusal {
    Refusal::new(Code::Preempted, "the live domain has died meanwhile, and a takeover comes first")
}

/// Nothing hangs, but the workers were not given a CPU for too long.
pub(crate) fn starved(what: &str, pause: Duration, starved: Vec<Starved>) -> Refusal {
    let why = say(&starved);
    let message = format!(
        "{what}: starved: {why}. It is the machine that is busy, and not the domain; the guest was paused for {} ms; try later, or give --starved-timeout-ms",
        pause.as_millis()
    );
    Refusal { starved, ..Refusal::new(Code::Starved, message) }
}

/// The storage is of a schema that a domain does not take.
pub(crate) fn schema(label: &str, accepted: &[u32], schema: u32) -> Refusal {
    Refusal::new(
        Code::SchemaNotAccepted,
        format!(
            "{label} takes over storage of schema {accepted:?}, this disk has schema {schema}; use a version that accepts it"
        ),
    )
}
