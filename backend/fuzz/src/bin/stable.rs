//! `stable TARGET (--runs N | --seconds N | --script HEX) [--seed S]`: a target on the stable
//! toolchain.

use fuzz::TARGETS;
use fuzz::random::{Until, run, run_one};
use std::time::{Duration, Instant};

const USAGE: &str = "usage: stable TARGET (--runs N | --seconds N | --script HEX) [--seed S]";

fn main() -> Result<(), String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (name, options) = arguments.split_first().ok_or(USAGE)?;
    let target = TARGETS.iter().find(|target| target.name == name).ok_or(USAGE)?;
    let (mut until, mut seed) = (Until::Time(Duration::from_secs(10)), 0);
    for option in options.chunks(2) {
        let [name, value] = option else { return Err(USAGE.to_owned()) };
        let number = || value.parse().map_err(|_| USAGE.to_owned());
        match name.as_str() {
            "--runs" => until = Until::Runs(number()?),
            "--seconds" => until = Until::Time(Duration::from_secs(number()?)),
            "--seed" => seed = number()?,
            "--script" => {
                let bytes = (0..value.len() / 2).map(|at| value.get(2 * at..2 * at + 2));
                let bytes: Option<Vec<u8>> =
                    bytes.map(|pair| u8::from_str_radix(pair?, 16).ok()).collect();
                run_one(target, &bytes.ok_or(USAGE)?);
                return Ok(());
            }
            _ => return Err(USAGE.to_owned()),
        }
    }
    let began = Instant::now();
    let runs = run(target, seed, until);
    let seconds = began.elapsed().as_secs_f64();
    let speed = runs as f64 / seconds;
    println!(
        "{name}: {runs} scripts in {seconds:.0} s, {speed:.0} a second, seed {seed}: no fault"
    );
    Ok(())
}
