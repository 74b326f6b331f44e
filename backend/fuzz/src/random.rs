//! The stable toolchain's way: scripts of a corpus, mutated at random. Seeded, so that a failure
//! comes again.

use crate::Target;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest script.
const LONGEST: usize = 2048;

/// splitmix64.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn fresh(&mut self, most: usize) -> Vec<u8> {
        let count = self.below(most) + 1;
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// A script: a new one, or one of the corpus with some changes.
    fn script(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        if corpus.is_empty() || self.below(3) == 0 {
            return self.fresh(400);
        }
        let mut script = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(6) {
            let at = self.below(script.len() + 1);
            match self.below(6) {
                0 => script.truncate(at),
                1 => {
                    let more = self.fresh(16);
                    script.splice(at..at, more);
                }
                2 => {
                    let other = &corpus[self.below(corpus.len())];
                    let from = self.below(other.len() + 1);
                    script.truncate(at);
                    script.extend_from_slice(&other[from..]);
                }
                3 => {
                    let end = (at + self.below(16)).min(script.len());
                    script.drain(at..end);
                }
                4 => {
                    if let Some(byte) = script.get_mut(at) {
                        *byte ^= 1 << self.below(8);
                    }
                }
                _ => {
                    if let Some(byte) = script.get_mut(at) {
                        *byte = self.next() as u8;
                    }
                }
            }
        }
        script.truncate(LONGEST);
        script
    }
}

/// The scripts that are kept of a target.
#[must_use]
pub fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a script")).collect()
}

/// When to end.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After so many scripts.
    Runs(u64),
    /// After so long.
    Time(Duration),
}

/// Says which script has failed, in hexadecimal.
struct Failed<'a>(&'a Target, &'a [u8]);

impl Drop for Failed<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("{} has failed with {hex}", self.0.name);
        }
    }
}

/// Carries one script out.
pub fn run_one(target: &Target, script: &[u8]) {
    let failed = Failed(target, script);
    (target.one_input)(script);
    drop(failed);
}

/// Runs the corpus, and then what is made of it. Returns how many scripts were run.
pub fn run(target: &Target, seed: u64, until: Until) -> u64 {
    let corpus = corpus(target);
    corpus.iter().for_each(|script| run_one(target, script));
    let mut random = Random(seed);
    let (began, mut runs) = (Instant::now(), 0);
    let is_over = |runs: u64| match until {
        Until::Runs(most) => runs >= most,
        Until::Time(time) => runs.is_multiple_of(64) && began.elapsed() >= time,
    };
    while !is_over(runs) {
        run_one(target, &random.script(&corpus));
        runs += 1;
    }
    runs + corpus.len() as u64
}
