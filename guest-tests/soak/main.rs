//! A soak: everything that can happen to a device, in an order that a seed chooses, under a load
//! that checks each block which it reads.
//!
//! The load's ledger is the model of the disk's content; the operator's books (generation, domain)
//! are checked after each act. What the daemon does not offer (`status` has no `server`: there is
//! no process beside it that could be killed) is left out, and said.

mod act;
mod options;
mod stage;

use act::Act;
use guest_tests::stamp::assert_intact;
use options::Options;
use stage::Stage;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let options = match Options::from_args(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(sentence) => {
            eprintln!("soak: {sentence}");
            return ExitCode::from(2);
        }
    };
    println!(
        "soak: {} for {} s, --seed {}",
        options.disk.name(),
        options.time.as_secs(),
        options.seed
    );
    let mut random = Random(options.seed);
    let mut stage = Stage::new(&options);
    let acts: Vec<Act> = options.acts.iter().copied().filter(|act| stage.offers(*act)).collect();
    for missing in options.acts.iter().filter(|act| !acts.contains(act)) {
        println!("soak: not offered, left out: {}", missing.name());
    }
    let (began, mut next_word) = (Instant::now(), Duration::from_secs(10));
    let mut done = vec![0u64; acts.len()];
    while began.elapsed() < options.time
        && options.count.is_none_or(|most| done.iter().sum::<u64>() < most)
    {
        stage.breathe(&mut random);
        if !acts.is_empty() {
            let chosen = random.below(acts.len() as u64) as usize;
            stage.perform(acts[chosen], &mut random);
            done[chosen] += 1;
        }
        if began.elapsed() > next_word {
            next_word += Duration::from_secs(10);
            println!("soak: {:.0?}: {}", began.elapsed(), stage.word());
        }
    }
    stage.say_waits();
    let (daemon, report) = stage.end();
    for (act, count) in acts.iter().zip(&done) {
        println!("soak: {count:6} x {}", act.name());
    }
    println!("soak: {report:?}");
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.terminate(), 0, "the end is clean");
    println!("soak: clean, {} acts in {:.0?}", done.iter().sum::<u64>(), began.elapsed());
    ExitCode::SUCCESS
}

/// Numbers that follow from a seed (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        let mut x = self.0.max(1);
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0 = x;
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One of `0..end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
