//! Whether the server that serves moves: it is asked, and says which of its workers have not come
//! by since it was asked last, though they could have.
//!
//! One that does not is named in the log and in `status`. It is ended if that is wished for
//! (`--hang-timeout-ms`).

use super::Supervisor;
use channel::ToServer;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What is a standstill worth a word, if nothing is to be done about it.
const WORTH_A_WORD: Duration = Duration::from_secs(10);

/// A standstill is known after so many timeouts, at most, since the server moved last: one until it
/// is asked, less than one until the answer names a worker, and one until that is enough.
const TIMEOUTS: u32 = 3;

/// How a server is asked, and what it has said.
#[derive(Debug)]
pub(super) struct Pulse {
    /// How long a standstill lasts until something comes of it.
    timeout: Duration,
    /// What comes of it is the server's end.
    ends: bool,
    number: u64,
    /// When it was asked what it has not answered.
    asked: Option<Instant>,
    next: Instant,
    /// Since when each queue's worker has been named each time.
    stuck: BTreeMap<u16, Instant>,
    /// Those that the log and the front were told of.
    told: Vec<u16>,
    /// The log was told that the server does not answer.
    is_told_silent: bool,
}

impl Pulse {
    pub(super) fn new(hang_timeout: Option<Duration>) -> Self {
        let timeout = hang_timeout.unwrap_or(WORTH_A_WORD);
        Self {
            timeout,
            ends: hang_timeout.is_some(),
            number: 0,
            asked: None,
            next: Instant::now() + timeout,
            stuck: BTreeMap::new(),
            told: Vec::new(),
            is_told_silent: false,
        }
    }

    /// When the server is to be asked.
    pub(super) const fn next(&self) -> Instant {
        self.next
    }

    /// The queues whose worker is known to stand still.
    pub(super) fn stuck(&self) -> &[u16] {
        &self.told
    }

    /// Another server serves.
    pub(super) fn begin_anew(&mut self, now: Instant) {
        (self.asked, self.next) = (None, now + self.timeout);
        self.stuck.clear();
        self.told.clear();
        self.is_told_silent = false;
    }

    /// The server has answered. A worker is named at the second time: the first may be long ago.
    fn answered(&mut self, number: u64, named: &[u16], now: Instant) {
        if self.number != number {
            return;
        }
        self.asked = None;
        self.is_told_silent = false;
        self.stuck.retain(|queue, _| named.contains(queue));
        for &queue in named {
            self.stuck.entry(queue).or_insert(now);
        }
    }

    /// Whether a worker has stood still for long enough that the server is to be ended.
    fn is_over(&self, now: Instant) -> bool {
        self.ends && self.stuck.values().any(|since| now - *since >= self.timeout)
    }

    /// Whether nothing was heard of the server for so long, and nothing has come of that yet.
    fn is_silent(&mut self, now: Instant) -> bool {
        let is_silent = self.asked.is_some_and(|asked| now - asked >= self.timeout);
        is_silent && !std::mem::replace(&mut self.is_told_silent, true)
    }

    /// The queues that stand still since this was asked last, and those that move again.
    fn news(&mut self, now: Instant) -> (Vec<u16>, Vec<u16>) {
        // They had stood still before they were named, between two questions.
        let long = |since: &Instant| now - *since >= self.timeout / 2;
        let named = self.stuck.iter().filter(|(_, since)| long(since));
        let named: Vec<u16> = named.map(|(queue, _)| *queue).collect();
        let begun = named.iter().copied().filter(|queue| !self.told.contains(queue)).collect();
        let over = self.told.iter().copied().filter(|queue| !named.contains(queue)).collect();
        self.told = named;
        (begun, over)
    }

    /// The number of the question that is due, if one is.
    fn question(&mut self, now: Instant) -> Option<u64> {
        self.next = now + self.timeout / 2;
        if self.asked.is_some() {
            return None;
        }
        self.number += 1;
        self.asked = Some(now);
        Some(self.number)
    }
}

impl Supervisor {
    /// When the server is asked next. One that ends is not: it hears no commands any more, and its
    /// requests have their time.
    pub(super) fn next_question(&self) -> Option<Instant> {
        let is_asked = self.serving().is_some() && self.ending.is_none();
        is_asked.then(|| self.pulse.next())
    }

    pub(super) fn settle_pulse(&mut self, now: Instant) {
        if self.next_question().is_none() {
            return;
        }
        let pulse = &mut self.pulse;
        let Some(server) = &self.server else { return };
        if pulse.next > now {
            return;
        }
        let pid = server.pid.as_raw_nonzero();
        let is_silent = pulse.is_silent(now);
        if let Some(number) = pulse.question(now) {
            let _ = server.channel.try_send(&ToServer::Ping { number }, &[]);
        }
        if is_silent && pulse.ends {
            self.end_what_stands_still(now);
        } else if is_silent {
            log::error!(
                "the server, process {pid}, has not answered for {:?}; if it is not stopped on \
                 purpose, ending it (SIGKILL) has another one go on",
                pulse.timeout
            );
        }
    }

    fn end_what_stands_still(&mut self, now: Instant) {
        if let Some(server) = &self.server {
            let timeout = self.pulse.timeout;
            log::error!("the server has not moved for {timeout:?}, and is ended");
            server.kill();
            let served = server.ready.map(|ready| now.saturating_duration_since(ready));
            let stood = timeout.saturating_mul(TIMEOUTS);
            self.deaths.blame_the_next(served.unwrap_or_default().saturating_sub(stood));
        }
    }

    /// The server says which of its workers stand still.
    pub(super) fn pong(&mut self, number: u64, stuck: &[u16]) {
        if self.ending.is_some() {
            return;
        }
        let now = Instant::now();
        self.pulse.answered(number, stuck, now);
        if self.pulse.is_over(now) {
            return self.end_what_stands_still(now);
        }
        let (begun, over) = self.pulse.news(now);
        if begun.is_empty() && over.is_empty() {
            return;
        }
        let pid = self.server.as_ref().map_or(0, |server| server.pid.as_raw_nonzero().get());
        for queue in begun {
            log::error!(
                "the worker of queue {queue} has not moved for {:?}: it is inside of the domain, \
                 or of its storage. Ending the server, process {pid}, with SIGKILL has another one \
                 go on; --hang-timeout-ms does that",
                self.pulse.timeout
            );
        }
        for queue in over {
            log::info!("the worker of queue {queue} moves again");
        }
        self.tell_facts();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Asks and answers every half a timeout; what is named each time, and what comes of it.
    fn rounds(pulse: &mut Pulse, named: &[&[u16]]) -> Vec<(Vec<u16>, Vec<u16>, bool)> {
        let start = Instant::now();
        let mut said = Vec::new();
        for (round, named) in (1..).zip(named) {
            let now = start + round * pulse.timeout / 2;
            let number = pulse.question(now).expect("it has answered");
            pulse.answered(number, named, now);
            let is_over = pulse.is_over(now);
            let (begun, over) = pulse.news(now);
            said.push((begun, over, is_over));
        }
        said
    }

    #[test]
    fn a_standstill_is_told_once_and_so_is_its_end() {
        let named: [&[u16]; 6] = [&[1], &[1], &[1, 2], &[2], &[2], &[]];
        let told = |begun: &[u16], over: &[u16]| (begun.to_vec(), over.to_vec(), false);
        let said = rounds(&mut Pulse::new(None), &named);
        let expected = [
            told(&[], &[]),
            told(&[1], &[]),
            told(&[], &[]),
            told(&[2], &[1]),
            told(&[], &[]),
            told(&[], &[2]),
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn only_who_is_told_to_ends_a_server_and_not_one_that_has_moved() {
        let ends = |hang_timeout, named: &[&[u16]]| {
            let said = rounds(&mut Pulse::new(hang_timeout), named);
            said.iter().position(|(.., is_over)| *is_over)
        };
        let stands: [&[u16]; 5] = [&[1]; 5];
        assert_eq!(ends(None, &stands), None);
        assert_eq!(ends(Some(SECOND), &stands), Some(2));
        // Once may be a long request, and another queue is another standstill.
        assert_eq!(ends(Some(SECOND), &[&[1], &[], &[1], &[1], &[2], &[2]]), None);
    }

    #[test]
    fn a_server_that_does_not_answer_is_told_of_once() {
        for hang_timeout in [None, Some(SECOND)] {
            let mut pulse = Pulse::new(hang_timeout);
            let start = Instant::now();
            let number = pulse.question(start).expect("the first");
            assert_eq!(pulse.question(start + SECOND / 2), None, "it is asked one thing at a time");
            assert!(!pulse.is_silent(start + pulse.timeout / 2));
            let late = start + pulse.timeout;
            assert!(pulse.is_silent(late) && !pulse.is_silent(late));
            pulse.answered(number, &[], late);
            assert!(!pulse.is_silent(late + pulse.timeout));
        }
    }

    #[test]
    fn only_the_server_that_was_asked_answers() {
        use super::super::{Which, scripted};
        let directory = tempfile::tempdir().unwrap();
        let mut supervisor = scripted::serving(directory.path());
        let number = supervisor.pulse.question(Instant::now()).unwrap();
        let pong = || channel::ToSupervisor::Pong { number, stuck: vec![0] };
        supervisor.told_by(Which::Leaving(0), pong(), Vec::new());
        supervisor.told_by(Which::Stopped, pong(), Vec::new());
        assert!(supervisor.pulse.stuck.is_empty());
        supervisor.told_by(Which::Current, pong(), Vec::new());
        assert_eq!(supervisor.pulse.stuck.keys().collect::<Vec<_>>(), [&0]);
    }
}
