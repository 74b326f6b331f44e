//! How changes ended, and how long their phases took, counted from what is told of them.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Ends of the buckets for phases, in nanoseconds: from a microsecond to a minute, each four times
/// the one before.
pub const ENDS: [u64; 14] = {
    let mut ends = [1_000; 14];
    let mut at = 1;
    while at < ends.len() {
        ends[at] = 4 * ends[at - 1];
        at += 1;
    }
    ends
};

/// How long something took, again and again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// How often.
    pub count: u64,
    /// How long together, in nanoseconds.
    pub sum_ns: u64,
    /// How often how long, by [`ENDS`]; longer ones are in none.
    pub buckets: [u64; ENDS.len()],
}

impl Times {
    fn add(&mut self, ns: u64) {
        self.count += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
        if let Some(at) = ENDS.iter().position(|end| ns <= *end) {
            self.buckets[at] += 1;
        }
    }
}

/// Of these, what ends in one of the results; the others have phases of their own.
const ENDING: usize = 6;
/// What may be changed. As the other words here, all that are told apart: what a server says
/// otherwise is one of the [others](OTHER), so that there are never more series than these.
const CHANGES: [&str; 8] = [
    "upgrade",
    "rollback",
    "takeover",
    "resize",
    "recovery",
    "exchange",
    "server_exchange",
    "supervisor_exchange",
];
/// How a change may end.
const RESULTS: [&str; 2] = ["committed", "refused"];
/// How a trial of a new generation may end.
const VERDICTS: [&str; 5] = ["kept", "taken_back", "stuck", "faulted", "ended"];
/// What a trial is before that.
const NO_VERDICT: [&str; 2] = ["measuring", "running"];
/// What a change may consist of.
const PHASES: [&str; 12] = [
    "verify", "load", "prepare", "drain", "quiesce", "activate", "grace", "retire", "start",
    "stop", "replay", "pause",
];
/// Any other word.
const OTHER: &str = "other";

fn known(words: &[&'static str], word: &str) -> String {
    words.iter().find(|known| **known == word).unwrap_or(&OTHER).to_string()
}

/// By what was changed, and another word.
pub type Nested<T> = BTreeMap<String, BTreeMap<String, T>>;

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tally {
    /// By what was to be changed, and how that ended.
    pub results: Nested<u64>,
    /// By what was changed, and phase.
    pub phases: Nested<Times>,
    /// How long the guest had to wait, by what was changed.
    pub pauses: BTreeMap<String, Times>,
    /// Trials of new generations, by how they ended.
    pub canaries: BTreeMap<String, u64>,
}

impl Tally {
    /// How often each change has ended in each way. What never has is there as well: else a first
    /// time is no increase.
    #[must_use]
    pub fn all_results(&self) -> Nested<u64> {
        let mut all = self.results.clone();
        for change in &CHANGES[..ENDING] {
            let results = all.entry((*change).to_owned()).or_default();
            RESULTS.iter().for_each(|result| {
                results.entry((*result).to_owned()).or_default();
            });
        }
        all
    }

    /// How often trials have ended in each way; as with [`all_results`](Self::all_results).
    #[must_use]
    pub fn all_canaries(&self) -> BTreeMap<String, u64> {
        let mut all = self.canaries.clone();
        VERDICTS.iter().for_each(|verdict| {
            all.entry((*verdict).to_owned()).or_default();
        });
        all
    }

    /// A change ended so.
    pub fn ended(&mut self, change: &str, result: &str) {
        let results = self.results.entry(known(&CHANGES, change)).or_default();
        *results.entry(known(&RESULTS, result)).or_default() += 1;
    }

    /// Counts an event, if it is one of a change's end, or of a trial's.
    pub fn note(&mut self, event: &Value) {
        let word = |member: &str| event[member].as_str();
        match word("event") {
            Some("ended") => {
                let (Some(change), Some(outcome)) = (word("change"), word("outcome")) else {
                    return;
                };
                self.ended(change, outcome);
                self.took(change, event);
            }
            Some(name @ ("server_exchanged" | "supervisor_exchanged")) => {
                self.took(name.trim_end_matches('d'), event);
            }
            Some("recovered") => {
                self.ended("recovery", "committed");
                let ms = event["after_ms"].as_u64().unwrap_or(0);
                self.paused("recovery", ms.saturating_mul(1_000_000));
            }
            Some("canary") => {
                if let Some(state) = word("state").filter(|state| !NO_VERDICT.contains(state)) {
                    *self.canaries.entry(known(&VERDICTS, state)).or_default() += 1;
                }
            }
            _ => {}
        }
    }

    fn paused(&mut self, change: &str, ns: u64) {
        self.pauses.entry(known(&CHANGES, change)).or_default().add(ns);
    }

    fn took(&mut self, change: &str, event: &Value) {
        for (phase, us) in event["phases_us"].as_object().into_iter().flatten() {
            let Some(ns) = us.as_u64().map(|us| us.saturating_mul(1_000)) else { continue };
            if phase == "pause" {
                // What a microsecond is too coarse for.
                self.paused(change, event["pause_ns"].as_u64().unwrap_or(ns));
                continue;
            }
            let phases = self.phases.entry(known(&CHANGES, change)).or_default();
            phases.entry(known(&PHASES, phase)).or_default().add(ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ends_of_changes_are_counted_and_their_phases_timed() {
        let mut tally = Tally::default();
        let upgrade = json!({
            "event": "ended", "change": "upgrade", "outcome": "committed", "pause_ns": 7_400,
            "phases_us": {"verify": 700, "drain": 0, "pause": 7},
        });
        tally.note(&upgrade);
        tally.note(&upgrade);
        let refused =
            json!({"event": "ended", "change": "upgrade", "outcome": "refused", "error": {}});
        tally.note(&refused);
        tally.note(&json!({"event": "started", "change": "upgrade", "target": "x"}));
        tally.note(&json!({"event": "recovered", "after_ms": 6}));
        tally.note(
            &json!({"event": "server_exchanged", "phases_us": {"stop": 200, "pause": 1_600}}),
        );
        for odd in [json!(null), json!({"event": "ended"}), json!({"event": "ended", "change": 1})]
        {
            tally.note(&odd);
        }
        assert_eq!(tally.results["upgrade"]["committed"], 2);
        assert_eq!(tally.results["upgrade"]["refused"], 1);
        assert_eq!(tally.results["recovery"]["committed"], 1);
        let verify = &tally.phases["upgrade"]["verify"];
        assert_eq!((verify.count, verify.sum_ns, verify.buckets[5]), (2, 1_400_000, 2));
        assert_eq!(tally.phases["upgrade"]["drain"].buckets[0], 2);
        assert!(!tally.phases["upgrade"].contains_key("pause"));
        assert_eq!(tally.pauses["upgrade"].sum_ns, 14_800);
        assert_eq!(tally.pauses["recovery"].sum_ns, 6_000_000);
        assert_eq!(tally.phases["server_exchange"]["stop"].count, 1);
        let kept: Tally = serde_json::from_value(json!(tally)).unwrap();
        assert_eq!(kept, tally);
    }

    #[test]
    fn words_that_are_not_known_are_one() {
        let mut tally = Tally::default();
        for number in 0..100 {
            let word = format!("word{number}");
            tally.note(&json!({
                "event": "ended", "change": &word, "outcome": &word,
                "phases_us": {&word: 1, "drain": 2},
            }));
        }
        assert_eq!(
            tally.results,
            Nested::from([(OTHER.to_owned(), BTreeMap::from([(OTHER.to_owned(), 100)]),)])
        );
        assert_eq!(tally.phases[OTHER].keys().collect::<Vec<_>>(), ["drain", OTHER]);
    }

    #[test]
    fn trials_are_counted_by_their_verdict() {
        let mut tally = Tally::default();
        for state in ["measuring", "running", "kept", "running", "taken_back", "kept", "x", "y"] {
            tally.note(&json!({"event": "canary", "state": state}));
        }
        tally.note(&json!({"event": "canary"}));
        let counted = [("kept", 2), ("other", 2), ("taken_back", 1)];
        let counted = counted.map(|(verdict, count)| (verdict.to_owned(), count));
        assert_eq!(tally.canaries, BTreeMap::from(counted));
    }

    #[test]
    fn what_takes_longer_than_all_ends_is_counted_still() {
        let mut times = Times::default();
        times.add(u64::MAX);
        assert_eq!((times.count, times.buckets.iter().sum::<u64>()), (1, 0));
        assert_eq!(ENDS[13], 1_000 << 26);
    }
}
