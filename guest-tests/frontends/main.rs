//! Tries the daemon behind another Debian's QEMU, libvirt, firmware and kernel: one case after the
//! other, each with checked I/O and upgrades, and a table of what held.
//!
//! `scripts/try-frontends` makes that Debian and calls this. Each case runs in a process of its
//! own: what hangs is ended with all that it has started, and what fails takes nothing along.

mod cases;
mod devices;
mod firmware;
mod libvirt;
mod moves;
mod stage;

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cases::{CASES, Case};
use guest_tests::debian::Debian;
use rustix::process::{Pid, Signal, kill_process_group};
use stage::NotHere;

/// How many seconds a case may take; emulated, on two idle CPUs, it takes a quarter of that.
const BOUND: u64 = 120;
/// The variable with another number, for a busy machine.
const BOUND_VARIABLE: &str = "HOTSWAP_CASE_SECONDS";

/// A case that cannot be tried says so with this.
const NOT_HERE: u8 = 77;

/// How the process of one case is called.
const ONE: &str = "--one";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [ONE, name] => run_here(name),
        ["list"] => {
            for case in CASES {
                println!("{:16} {}", case.name, case.what);
            }
            ExitCode::SUCCESS
        }
        names => {
            if let Some(wrong) = names.iter().find(|name| find(name).is_none()) {
                eprintln!("there is no case `{wrong}`; `list` says which there are");
                return ExitCode::from(2);
            }
            try_all(names)
        }
    }
}

fn find(name: &str) -> Option<&'static Case> {
    CASES.iter().find(|case| case.name == name)
}

/// In the process of the case: what it has to say goes to standard output, what is wrong to
/// standard error.
fn run_here(name: &str) -> ExitCode {
    let Some(case) = find(name) else { return ExitCode::from(2) };
    match catch_unwind(AssertUnwindSafe(case.run)) {
        Ok(Ok(note)) => {
            println!("{note}");
            ExitCode::SUCCESS
        }
        Ok(Err(NotHere(why))) => {
            println!("{why}");
            ExitCode::from(NOT_HERE)
        }
        // Said by the panic itself.
        Err(_) => ExitCode::FAILURE,
    }
}

/// What became of a case.
struct Row {
    case: &'static Case,
    verdict: &'static str,
    took: Duration,
    note: String,
}

fn try_all(names: &[&str]) -> ExitCode {
    let debian = Debian::chosen();
    println!("{}", debian.qemu_says());
    let mut rows = Vec::new();
    let started = Instant::now();
    for case in CASES.iter().filter(|case| names.is_empty() || names.contains(&case.name)) {
        print!("{:16} {} ... ", case.name, case.what);
        let _ = std::io::stdout().flush();
        let row = try_one(case);
        println!("{} ({:.0} s): {}", row.verdict, row.took.as_secs_f64(), row.note);
        rows.push(row);
    }
    println!("\n{:16} {:10} {:>5}  what it says", "case", "verdict", "s");
    for row in &rows {
        let seconds = row.took.as_secs_f64();
        println!("{:16} {:10} {seconds:5.0}  {}", row.case.name, row.verdict, row.note);
    }
    let count = |verdict: &str| rows.iter().filter(|row| row.verdict == verdict).count();
    let (held, failed) = (count(HELD), count(DID_NOT));
    println!(
        "{held} held, {failed} did not, {} could not be tried; {:.0} s",
        rows.len() - held - failed,
        started.elapsed().as_secs_f64()
    );
    if failed == 0 && held > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

const HELD: &str = "held";
const DID_NOT: &str = "did NOT";

/// Runs a case in a process group of its own, which ends with it.
fn try_one(case: &'static Case) -> Row {
    let started = Instant::now();
    let (verdict, note) = match watch(case, started) {
        Ok(found) => found,
        Err(error) => (DID_NOT, format!("it could not be started: {error}")),
    };
    Row { case, verdict, took: started.elapsed(), note }
}

fn watch(case: &'static Case, started: Instant) -> std::io::Result<(&'static str, String)> {
    let seconds = std::env::var(BOUND_VARIABLE).ok().and_then(|text| text.parse().ok());
    let bound = Duration::from_secs(seconds.unwrap_or(BOUND));
    let mut log = tempfile::tempfile()?;
    let mut said = tempfile::tempfile()?;
    let mut child = Command::new(std::env::current_exe()?)
        .args([ONE, case.name])
        // What failed says so in its sentence, and the harness with logs.
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(said.try_clone()?)
        .stderr(log.try_clone()?)
        .process_group(0)
        .spawn()?;
    let group = Pid::from_child(&child);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if started.elapsed() > bound {
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    // Nothing is left of it when all is well.
    let _ = kill_process_group(group, Signal::KILL);
    let _ = child.wait();
    let text = |file: &mut std::fs::File| -> std::io::Result<String> {
        use std::io::Seek;
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let (log, said) = (text(&mut log)?, text(&mut said)?);
    let last = said.lines().last().unwrap_or_default().to_owned();
    let code = status.map(|status| status.code());
    Ok(match code {
        Some(Some(0)) => (HELD, last),
        Some(Some(code)) if code == i32::from(NOT_HERE) => ("not tried", last),
        _ => {
            eprintln!("\n--- {} says ---\n{log}---", case.name);
            let why = reason(&log);
            let late = format!("no end within {} s; ", bound.as_secs());
            (DID_NOT, if code.is_none() { late + &why } else { why })
        }
    })
}

/// The sentence of a panic: what stands between the line that says where, and the next part.
fn reason(log: &str) -> String {
    let is_part = |line: &str| line.starts_with("---") || line.starts_with("stack backtrace");
    let mut lines = log.lines().skip_while(|line| !line.contains("panicked at")).skip(1);
    let said = lines.by_ref().take_while(|line| !is_part(line) && !line.starts_with("note:"));
    let said = said.collect::<Vec<_>>().join(" ");
    let why = if said.is_empty() { log.lines().last().unwrap_or("it said nothing") } else { &said };
    why.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_first_panics_sentence() {
        let log = "noise\nthread 'main' panicked at a.rs:1:2:\nfio failed:\nx\n--- more ---\nyes\n";
        assert_eq!(reason(log), "fio failed: x");
        assert_eq!(reason("only this\n"), "only this");
        assert_eq!(reason(""), "it said nothing");
    }

    #[test]
    fn no_two_cases_have_one_name() {
        for case in CASES {
            assert_eq!(CASES.iter().filter(|other| other.name == case.name).count(), 1);
        }
    }
}
