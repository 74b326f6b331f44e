//! What breaks, how and when: `PHASE:KIND[:N]`.
//!
//! | kind | in prepare, quiesce, activate, resize | in a request | in its end |
//! |---|---|---|---|
//! | `fail` | fails | ends with an I/O error | nothing |
//! | `panic` | panics | panics | panics |
//! | `stall` | works 3 s late | stays in flight for 3 s; the worker goes on | ends 3 s late |
//! | `hang` | the same | blocks the calling thread for 3 s | the same |
//! | `reach` | reaches for what is outside, and goes on | the same | the same |

use domain_api::DomainError;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How late something is that comes late.
pub(crate) const LATE: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Prepare,
    Quiesce,
    Activate,
    Resize,
    Request,
    End,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Prepare => "prepare",
            Self::Quiesce => "quiesce",
            Self::Activate => "activate",
            Self::Resize => "resize",
            Self::Request => "request",
            Self::End => "end",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultKind {
    Fail,
    Panic,
    Stall,
    Hang,
    Reach,
}

/// One fault, which comes once.
#[derive(Debug)]
pub(crate) struct Fault {
    phase: Phase,
    kind: FaultKind,
    /// Times left until it comes; 0 when it has come.
    left: AtomicU64,
}

impl Fault {
    /// Counts one more time that `phase` is come to; returns what breaks now.
    pub(crate) fn comes(&self, phase: Phase) -> Option<FaultKind> {
        if phase != self.phase {
            return None;
        }
        // A counter by itself: Relaxed.
        let before = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        (before == Ok(1)).then_some(self.kind)
    }
}

impl FromStr for Fault {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        let parts: Vec<_> = text.split(':').collect();
        let phase = match parts.first() {
            Some(&"prepare") => Some(Phase::Prepare),
            Some(&"quiesce") => Some(Phase::Quiesce),
            Some(&"activate") => Some(Phase::Activate),
            Some(&"resize") => Some(Phase::Resize),
            Some(&"request") => Some(Phase::Request),
            Some(&"end") => Some(Phase::End),
            _ => None,
        };
        let kind = match parts.get(1) {
            Some(&"fail") => Some(FaultKind::Fail),
            Some(&"panic") => Some(FaultKind::Panic),
            Some(&"stall") => Some(FaultKind::Stall),
            Some(&"hang") => Some(FaultKind::Hang),
            Some(&"reach") => Some(FaultKind::Reach),
            _ => None,
        };
        let number = match parts.get(2) {
            None => Some(1),
            // `parse` alone would take a sign.
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok(),
            Some(_) => None,
        };
        match (phase, kind, number.filter(|&n| n > 0), parts.len()) {
            (Some(phase), Some(kind), Some(number), 2 | 3) => {
                Ok(Self { phase, kind, left: AtomicU64::new(number) })
            }
            _ => Err(DomainError::new(format!(
                "parameter `fault` is `{text}`; it must be PHASE:KIND or PHASE:KIND:N, with PHASE one of prepare, quiesce, activate, resize, request, end, \
                 KIND one of fail, panic, stall, hang, reach, and N a number from 1"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_once_at_its_time_and_in_its_phase() {
        let fault: Fault = "request:hang:3".parse().unwrap();
        let come: Vec<_> = (0..6).map(|_| fault.comes(Phase::Request).is_some()).collect();
        assert_eq!(come, [false, false, true, false, false, false]);
        let fault: Fault = "quiesce:fail".parse().unwrap();
        assert_eq!(fault.comes(Phase::Activate), None);
        assert_eq!(fault.comes(Phase::Quiesce), Some(FaultKind::Fail));
        assert_eq!(fault.comes(Phase::Quiesce), None);
    }

    #[test]
    fn nonsense_is_refused_with_what_is_possible() {
        for text in [
            "",
            ":",
            "request",
            "request:",
            "request:explode",
            "later:fail",
            "request:fail:0",
            "request:fail:+1",
            "request:fail:",
            "request:fail:1:2",
            "Request:fail",
            "request:fail:-1",
        ] {
            let error = text.parse::<Fault>().unwrap_err().to_string();
            assert!(
                ["fault", "prepare", "activate", "stall", "hang"].iter().all(|w| error.contains(w)),
                "{error}"
            );
        }
    }
}
