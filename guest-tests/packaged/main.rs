//! Tries the Debian package where systemd is the first process: what `scripts/try-package` runs in
//! each root. One step after the other, because each begins with what the one before has left; a
//! table of what held at the end.

mod host;
mod steps;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use steps::{STEPS, Stage};

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("scripts/try-package calls this");
        return ExitCode::from(2);
    };
    let mut stage = Stage::new(directory);
    let mut rows = Vec::new();
    for step in STEPS {
        if rows.last() == Some(&"did NOT") {
            rows.push("did NOT");
            println!("{:34} not tried", step.what);
            continue;
        }
        let since = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| (step.run)(&mut stage)));
        let (verdict, note) = match result {
            Ok(note) => ("held", note),
            // What is wrong was printed by the panic itself.
            Err(_) => ("did NOT", String::new()),
        };
        let seconds = since.elapsed().as_secs_f64();
        println!("{:34} {verdict:8} {seconds:5.1} s  {note}", step.what);
        rows.push(verdict);
    }
    let held = rows.iter().filter(|verdict| **verdict == "held").count();
    println!("{held} held, {} did not\n", rows.len() - held);
    if held == rows.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
