//! A soak: everything that can happen to a device, in an order that a seed chooses, under a load
//! that checks each block which it reads.
//!
//! The load is a native client, whose ledger is the model of the disk's content, or `fio` in a
//! guest. The operator's books (generation, domain) are checked after each act. What the daemon or
//! the load does not offer (`status` has no `server`: there is no process beside it that could be
//! killed) is left out, and said.

mod act;
mod in_guest;
mod native;
mod options;
mod stage;
mod witness;

use act::Act;
use guest_tests::guest::{Guest, GuestOptions};
use in_guest::InGuest;
use native::Native;
use options::Options;
use stage::{Stage, start_daemon};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use witness::Witness;

fn main() -> ExitCode {
    let options = match Options::from_args(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(sentence) => {
            eprintln!("soak: {sentence}");
            return ExitCode::from(2);
        }
    };
    let is_in = if options.is_in_guest { " in a guest" } else { "" };
    println!(
        "soak: {}{is_in} for {} s, --seed {}",
        options.disk.name(),
        options.time.as_secs(),
        options.seed
    );
    let (daemon, _image) = start_daemon(&options);
    let guest = options.is_in_guest.then(|| {
        let with_disk = GuestOptions::with_disk(daemon.socket());
        Guest::boot(GuestOptions { reconnect: Some(1), ..with_disk })
            .unwrap_or_else(|error| panic!("{error}"))
    });
    let witness: Box<dyn Witness> = match &guest {
        Some(guest) => Box::new(InGuest::start(guest)),
        None => Box::new(Native::start(&daemon, &options)),
    };
    soak(&options, Stage::new(daemon, options.disk, witness));
    ExitCode::SUCCESS
}

fn soak(options: &Options, mut stage: Stage<'_>) {
    let mut random = Random(options.seed);
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
            if acts[chosen].is_slow() && random.below(4) != 0 {
                continue;
            }
            stage.perform(acts[chosen], &mut random);
            done[chosen] += 1;
        }
        if began.elapsed() > next_word {
            next_word += Duration::from_secs(10);
            println!("soak: {:.0?}: {}", began.elapsed(), stage.word());
        }
    }
    stage.say_waits();
    let daemon = stage.end();
    for (act, count) in acts.iter().zip(&done) {
        println!("soak: {count:6} x {}", act.name());
    }
    assert_eq!(daemon.terminate(), 0, "the end is clean");
    println!("soak: clean, {} acts in {:.0?}", done.iter().sum::<u64>(), began.elapsed());
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
