//! Lines of the log that would repeat themselves: each kind is logged once, and again after ten
//! seconds at the earliest, with how many like it there were.
//!
//! That holds as long as there are no more kinds than are remembered. So the kinds are constants of
//! the program: a number in one that a frontend or a guest can choose would make kinds without end,
//! and each would take the place of another. What differs from line to line is in the line only.
//!
//! What a frontend or a guest does can be done ten thousand times a second, and what is missing (a
//! descriptor, say) is missing until an operator does something. One line says so; more of them
//! hide it. The lines that are left out are there at `debug`.

pub use control::how_to_have_more;
use log::Level;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines of a kind are at least so far apart.
const APART: Duration = Duration::from_secs(10);

/// So many kinds are remembered. One more takes the place of the one that was said longest ago.
const KINDS: usize = 64;

/// The name that `RUST_LOG` selects these lines by.
const TARGET: &str = "vhost_hotswap";

/// What was said, and when.
struct Kind {
    name: String,
    said: Instant,
    /// How many more there were since.
    more: u64,
}

/// Remembers what was said.
struct LogLimit {
    kinds: Mutex<Vec<Kind>>,
}

/// What this process has said.
static LIMIT: LogLimit = LogLimit::new();

impl LogLimit {
    const fn new() -> Self {
        Self { kinds: Mutex::new(Vec::new()) }
    }

    /// Whether a line of this kind is to be said now. Returns how many like it were not.
    fn admit(&self, name: &str, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kind) = kinds.iter_mut().find(|kind| kind.name == name) {
            if now.saturating_duration_since(kind.said) < APART {
                kind.more += 1;
                return None;
            }
            kind.said = now;
            return Some(std::mem::take(&mut kind.more));
        }
        if kinds.len() == KINDS {
            let oldest = (0..KINDS).min_by_key(|&at| kinds[at].said);
            kinds.swap_remove(oldest.unwrap_or(0));
        }
        kinds.push(Kind { name: name.to_owned(), said: now, more: 0 });
        Some(0)
    }
}

/// Says a line of a kind at `level`, unless one of that kind was said in the last ten seconds.
#[cold]
pub fn say(level: Level, kind: &'static str, line: fmt::Arguments<'_>) {
    match LIMIT.admit(kind, Instant::now()) {
        None => log::debug!(target: TARGET, "{line}"),
        Some(0) => log::log!(target: TARGET, level, "{line}"),
        Some(more) => log::log!(target: TARGET, level, "{line} ({more} more like it)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_said_once_in_ten_seconds_and_its_like_are_counted() {
        let limit = LogLimit::new();
        let start = Instant::now();
        let table = [
            (0, "a", Some(0)),
            (0, "a", None),
            (1, "b", Some(0)),
            (9_999, "a", None),
            (10_000, "a", Some(2)),
            (10_001, "a", None),
            (10_001, "b", Some(0)),
            (30_000, "a", Some(1)),
            (40_000, "a", Some(0)),
            // A clock that two threads have looked at in the other order.
            (39_000, "a", None),
        ];
        for (at, kind, expected) in table {
            let now = start + Duration::from_millis(at);
            assert_eq!(limit.admit(kind, now), expected, "{kind} after {at} ms");
        }
    }

    #[test]
    fn kinds_without_end_do_not_fill_the_memory() {
        let limit = LogLimit::new();
        let start = Instant::now();
        for number in 0..1000 {
            let now = start + Duration::from_millis(number);
            assert_eq!(limit.admit(&format!("kind {number}"), now), Some(0));
        }
        let kinds = limit.kinds.lock().unwrap();
        assert_eq!(kinds.len(), KINDS);
        let newest = |kind: &Kind| kind.said >= start + Duration::from_millis(1000 - KINDS as u64);
        assert!(kinds.iter().all(newest), "the oldest go first");
    }
}
