//! Warnings that a frontend can bring about as often as it likes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a sentence is not said again.
const SILENCE: Duration = Duration::from_secs(10);
/// How many sentences are known at a time.
const SENTENCES: usize = 16;

/// What was said, without its numbers, which a frontend chooses; and when.
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
        let kind: String = sentence.chars().filter(|letter| !letter.is_ascii_digit()).collect();
        self.0.retain(|_, at| now.saturating_duration_since(*at) < SILENCE);
        let is_news = !self.0.contains_key(&kind) && self.0.len() < SENTENCES;
        if is_news {
            self.0.insert(kind, now);
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
        assert!(said.is_news("1 byte at 200", later) && !said.is_news("8 byte at 3", later));
        let words = (1..100).map(|length| "x".repeat(length));
        assert_eq!(words.filter(|word| said.is_news(word, later)).count(), SENTENCES - 1);
    }
}
