//! Warnings that a frontend can bring about as often as it likes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a sentence is not said again.
const SILENCE: Duration = Duration::from_secs(10);
/// How many sentences are known at a time.
const SENTENCES: usize = 16;

/// What was said, and when.
#[derive(Debug, Default)]
pub struct Said(BTreeMap<String, Instant>);

impl Said {
    /// Warns, unless that was said just before.
    pub fn say(&mut self, sentence: &str) {
        if self.is_news(sentence, Instant::now()) {
            log::warn!("{sentence}");
        }
    }

    fn is_news(&mut self, sentence: &str, now: Instant) -> bool {
        self.0.retain(|_, at| now.saturating_duration_since(*at) < SILENCE);
        let is_news = !self.0.contains_key(sentence) && self.0.len() < SENTENCES;
        if is_news {
            self.0.insert(sentence.to_owned(), now);
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_in_a_while_and_not_too_much_at_all() {
        let (mut said, now) = (Said::default(), Instant::now());
        assert!(said.is_news("a", now) && !said.is_news("a", now) && said.is_news("b", now));
        assert!(said.is_news("a", now + SILENCE));
        let later = now + 10 * SILENCE;
        let count = (0..100).filter(|number| said.is_news(&number.to_string(), later)).count();
        assert_eq!(count, SENTENCES);
    }
}
