//! What is done about a server that died: pure arithmetic.
//!
//! A server is started again at once. One that dies soon after its start is given more and more
//! time; a program that never gets to serve is replaced by the one before, a domain that has ended
//! its process twice by the standby's module, and a request that was the oldest of its queue at
//! three such ends is not run again. What was killed from outside (SIGKILL) was not the fault of
//! a domain or of a request, unless the supervisor has killed it, because it stood still.

use channel::Quarantined;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long a server must have served for the deaths before it not to matter any more.
const CALM: Duration = Duration::from_secs(10);
/// What is not waited for after: a server that served for so long.
const SERVED: Duration = Duration::from_millis(10);
/// The first wait, which is doubled.
const FIRST_WAIT: Duration = Duration::from_millis(10);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// After so many crashes of the same module, the standby's is taken.
const CRASHES_OF_A_MODULE: u32 = 2;
/// After so many deaths before serving, the program before is taken.
const DEATHS_OF_A_PROGRAM: u32 = 2;
/// At so many crashes a request that was the oldest each time is not run again.
const CRASHES_OF_A_REQUEST: u32 = 3;
/// After so many deaths before serving there is no more use in it.
const STARTS: u32 = 5;
/// After so many crashes, too.
const CRASHES: u32 = 10;

/// How a server has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// How long it has served; none if it never did.
    pub served: Option<Duration>,
    /// It has ended itself, or was ended for what it did; not by a signal that others send.
    pub is_crash: bool,
    /// The module that it served with.
    pub module: Option<String>,
    /// The oldest request in flight of each queue.
    pub oldest: Vec<Quarantined>,
}

/// What there is to fall back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choices {
    /// A program that has served before.
    pub has_program: bool,
    /// The standby's module.
    pub has_standby: bool,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another server.
    Start {
        /// Not before this has passed.
        after: Duration,
        /// Of the program before.
        falls_back: bool,
        /// With the standby's module.
        takes_standby: bool,
    },
    /// None, until a command says otherwise.
    GiveUp,
}

/// The deaths of a device's servers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Deaths {
    /// All of them.
    pub count: u64,
    soon: u32,
    starts: u32,
    crashes: u32,
    of_module: Option<(String, u32)>,
    suspects: Vec<(Quarantined, u32)>,
    quarantined: Vec<Quarantined>,
    /// The next death is a crash, whatever it looks like.
    is_blamed: bool,
    /// How many requests were not run again, of all times.
    pub quarantined_count: u64,
}

impl Deaths {
    /// A server has died.
    pub fn died(&mut self, death: &Death, choices: Choices) -> Next {
        self.count += 1;
        let is_blamed = std::mem::take(&mut self.is_blamed);
        // Of one that has stood still, it was said before how long it had moved.
        if !is_blamed && death.served.is_some_and(|served| served >= CALM) {
            self.forgive();
        }
        self.soon =
            if death.served.is_some_and(|served| served >= SERVED) { 0 } else { self.soon + 1 };
        self.starts = if death.served.is_some() { 0 } else { self.starts + 1 };
        let is_crash = is_blamed || death.is_crash;
        if is_crash {
            self.crashes += 1;
            self.suspect(&death.oldest);
        }
        let takes_standby = is_crash && self.blame(death) && choices.has_standby;
        if takes_standby {
            self.of_module = None;
        }
        let falls_back = self.starts >= DEATHS_OF_A_PROGRAM && choices.has_program;
        if falls_back {
            self.starts = 0;
        }
        if self.starts >= STARTS || self.crashes >= CRASHES {
            return Next::GiveUp;
        }
        Next::Start { after: self.wait(), falls_back, takes_standby }
    }

    fn wait(&self) -> Duration {
        match self.soon {
            0 | 1 => Duration::ZERO,
            more => FIRST_WAIT.saturating_mul(1 << (more - 2).min(16)).min(LONGEST_WAIT),
        }
    }

    fn blame(&mut self, death: &Death) -> bool {
        let Some(module) = &death.module else { return false };
        let before = match &self.of_module {
            Some((name, count)) if name == module => *count,
            _ => 0,
        };
        self.of_module = Some((module.clone(), before + 1));
        before + 1 >= CRASHES_OF_A_MODULE
    }

    fn suspect(&mut self, oldest: &[Quarantined]) {
        let before = std::mem::take(&mut self.suspects);
        for &request in oldest {
            let count =
                before.iter().find(|(one, _)| *one == request).map_or(0, |(_, count)| *count);
            if count + 1 >= CRASHES_OF_A_REQUEST && !self.quarantined.contains(&request) {
                self.quarantined.push(request);
                self.quarantined_count += 1;
            }
            self.suspects.push((request, count + 1));
        }
    }

    /// Whether what is in flight is to be run one at a time.
    #[must_use]
    pub const fn is_cautious(&self) -> bool {
        self.crashes >= 2
    }

    /// The requests that are not to be run again.
    #[must_use]
    pub fn quarantined(&self) -> &[Quarantined] {
        &self.quarantined
    }

    /// The server is about to be ended because it stands still. It has `moved` for so long before:
    /// a standstill is no calm, however long it takes to be noticed.
    pub fn blame_the_next(&mut self, moved: Duration) {
        if moved >= CALM {
            self.forgive();
        }
        self.is_blamed = true;
    }

    /// Servers are of another program from now on: what has died before it served was not that one.
    pub const fn another_program(&mut self) {
        (self.soon, self.starts) = (0, 0);
    }

    /// The frontend is another, or the module is: what was blamed was not its doing.
    pub fn forgive(&mut self) {
        let (count, quarantined_count) = (self.count, self.quarantined_count);
        *self = Self { count, quarantined_count, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Choices = Choices { has_program: false, has_standby: false };
    const ALL: Choices = Choices { has_program: true, has_standby: true };

    fn killed(served: u64) -> Death {
        let served = Some(Duration::from_millis(served));
        Death { served, is_crash: false, module: Some("a".to_owned()), oldest: Vec::new() }
    }

    fn crashed(counter: u64) -> Death {
        let oldest = vec![Quarantined { queue: 0, head: 1, counter }];
        Death { is_crash: true, oldest, ..killed(200) }
    }

    fn after(next: Next) -> Duration {
        match next {
            Next::Start { after, .. } => after,
            Next::GiveUp => panic!("given up"),
        }
    }

    #[test]
    fn what_is_killed_again_and_again_after_it_served_comes_back_at_once_for_ever() {
        let mut deaths = Deaths::default();
        for _ in 0..1000 {
            let next = deaths.died(&killed(150), ALL);
            let expected =
                Next::Start { after: Duration::ZERO, falls_back: false, takes_standby: false };
            assert_eq!(next, expected);
        }
        assert!(!deaths.is_cautious() && deaths.count == 1000);
    }

    #[test]
    fn what_dies_soon_waits_longer_and_longer_until_it_has_been_calm() {
        let mut deaths = Deaths::default();
        let waits: Vec<u128> =
            (0..12).map(|_| after(deaths.died(&killed(1), ALL)).as_millis()).collect();
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000, 1000]);
        assert_eq!(after(deaths.died(&killed(10_000), ALL)), Duration::ZERO);
    }

    #[test]
    fn a_program_that_never_serves_is_replaced_and_in_the_end_given_up() {
        let death = Death { served: None, ..crashed(1) };
        let death = Death { module: None, oldest: Vec::new(), ..death };
        let fallbacks = |choices| {
            let mut deaths = Deaths::default();
            [(); 6].map(|()| match deaths.died(&death, choices) {
                Next::Start { falls_back, .. } => Some(falls_back),
                Next::GiveUp => None,
            })
        };
        let with = Choices { has_program: true, ..NOTHING };
        assert_eq!(fallbacks(with)[..2], [Some(false), Some(true)]);
        let never = Some(false);
        assert_eq!(fallbacks(NOTHING), [never, never, never, never, None, None]);
    }

    #[test]
    fn the_second_crash_of_a_module_is_its_last_and_the_third_of_a_request() {
        let mut deaths = Deaths::default();
        let takes = |next| matches!(next, Next::Start { takes_standby: true, .. });
        assert!(!takes(deaths.died(&crashed(7), ALL)) && !deaths.is_cautious());
        assert!(takes(deaths.died(&crashed(7), ALL)) && deaths.is_cautious());
        assert_eq!(deaths.quarantined(), []);
        let other = Death { module: Some("b".to_owned()), ..crashed(7) };
        assert!(!takes(deaths.died(&other, NOTHING)));
        assert_eq!(deaths.quarantined(), crashed(7).oldest);
    }

    #[test]
    fn a_request_that_was_not_the_oldest_each_time_is_run_again() {
        let mut deaths = Deaths::default();
        for counter in [1, 1, 2, 1, 1] {
            deaths.died(&crashed(counter), NOTHING);
        }
        assert_eq!(deaths.quarantined(), []);
    }

    #[test]
    fn a_standstill_is_no_calm_however_long_it_takes_to_be_noticed() {
        let stood_still = Death { is_crash: false, oldest: crashed(7).oldest, ..killed(30_000) };
        let dies = |deaths: &mut Deaths, moved| {
            deaths.blame_the_next(Duration::from_secs(moved));
            deaths.died(&stood_still, ALL)
        };
        let takes = |next| matches!(next, Next::Start { takes_standby: true, .. });
        let mut deaths = Deaths::default();
        assert!(!takes(dies(&mut deaths, 0)) && !deaths.is_cautious());
        assert!(takes(dies(&mut deaths, 9)) && deaths.is_cautious());
        dies(&mut deaths, 0);
        assert_eq!(deaths.quarantined(), stood_still.oldest);
        // One that has moved for long is the first again, and is one.
        assert!(!takes(dies(&mut deaths, 10)) && !deaths.is_cautious());
        assert!(takes(dies(&mut deaths, 0)) && deaths.is_cautious());
        // The next death has reasons of its own.
        deaths.died(&killed(30_000), ALL);
        assert!(!deaths.is_cautious() && deaths.count == 6);
    }

    #[test]
    fn crashes_have_an_end() {
        let mut deaths = Deaths::default();
        let nexts = (0..).map(|counter| deaths.died(&crashed(counter), NOTHING));
        let starts = nexts.take_while(|next| *next != Next::GiveUp).count();
        assert_eq!(starts, CRASHES as usize - 1);
    }
}
