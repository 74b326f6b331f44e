//! Counting: each arm of each cell under callgrind, with `N` and with `2N` rounds.

use crate::arms::Cell;
use std::process::{Command, ExitCode};

/// Rounds of the shorter run.
const ROUNDS: u64 = 400;
/// Rounds of a run without valgrind, for CPU times that mean something.
const LONG: u64 = 60_000;
/// The same where each round waits for a device.
const LONG_WAITING: u64 = 2_000;

const CELLS: &[&str] = &[
    "empty/read/1",
    "empty/read/16",
    "empty/write/1",
    "empty/write/16",
    "ramdisk/read/1",
    "ramdisk/read/4",
    "ramdisk/read/16",
    "ramdisk/read/32",
    "ramdisk/write/16",
    "tmpfs/read/16",
    "tmpfs/write/16",
    "cached/read/1",
    "cached/read/16",
    "cached/write/16",
    "direct/read/16",
    "direct/write/16",
];

/// What callgrind says of one run.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    instructions: f64,
    cycles: f64,
}

fn run(program: &mut Command) -> Result<String, String> {
    let output = program.output().map_err(|error| format!("cannot run {program:?}: {error}"))?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if output.status.success() { Ok(said) } else { Err(format!("{program:?} failed:\n{said}")) }
}

fn arguments(arm: &str, cell: &str, rounds: u64) -> [String; 4] {
    ["run".to_owned(), arm.to_owned(), cell.to_owned(), rounds.to_string()]
}

fn me() -> Result<std::path::PathBuf, String> {
    std::env::current_exe().map_err(|error| error.to_string())
}

/// Runs one arm under callgrind.
fn count(arm: &str, cell: &str, rounds: u64) -> Result<Count, String> {
    let mut program = Command::new("valgrind");
    // Caches of fixed sizes, so that the numbers do not depend on the machine.
    program.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--cache-sim=yes"]);
    program.args(["--I1=32768,8,64", "--D1=32768,8,64", "--LL=8388608,16,64"]);
    let said = run(program.arg(me()?).args(arguments(arm, cell, rounds)))?;
    let sum = |what: &str| {
        let line = said.lines().find_map(|line| line.split_once(what));
        let number = line.map(|(_, after)| after.trim_start_matches([' ', ':']));
        let number: String =
            number?.chars().take_while(|c| !c.is_whitespace()).filter(|&c| c != ',').collect();
        number.parse::<f64>().ok()
    };
    let counted = || {
        let instructions = sum("I   refs")?;
        let first = sum("I1  misses")? + sum("D1  misses")?;
        Some(Count {
            instructions,
            cycles: instructions + 10.0 * first + 100.0 * sum("LL misses")?,
        })
    };
    counted().ok_or_else(|| format!("callgrind counted nothing:\n{said}"))
}

/// What one request costs in this arm.
fn per_request(arm: &str, name: &str) -> Result<Count, String> {
    let requests = (ROUNDS * Cell::parse(name).depth() as u64) as f64;
    let (once, twice) = (count(arm, name, ROUNDS)?, count(arm, name, 2 * ROUNDS)?);
    Ok(Count {
        instructions: (twice.instructions - once.instructions) / requests,
        cycles: (twice.cycles - once.cycles) / requests,
    })
}

/// How much system CPU time comes with each second of user CPU time, without valgrind.
fn kernel_ratio(cell: &str) -> Result<f64, String> {
    let rounds = if cell.starts_with("direct") { LONG_WAITING } else { LONG };
    let said = run(Command::new(me()?).args(arguments("direct", cell, rounds)))?;
    let ticks = said.lines().find_map(|line| line.strip_prefix("ticks "));
    let both = ticks.and_then(|both| both.split_once(' ')).ok_or("no CPU times")?;
    let number = |text: &str| text.trim().parse::<f64>().map_err(|error| error.to_string());
    Ok(number(both.1)? / number(both.0)?.max(1.0))
}

/// Tells the caller how much CPU time this process took, in ticks: in user space, and in the
/// kernel.
pub fn print_ticks() {
    let about = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name in parentheses the third field comes first; times are fields 14 and 15
    // (proc(5)).
    let fields: Vec<&str> =
        about.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    if let (Some(user), Some(system)) = (fields.get(11), fields.get(12)) {
        println!("ticks {user} {system}");
    }
}

fn line(name: &str) -> Result<String, String> {
    let (direct, proxy) = (per_request("direct", name)?, per_request("proxy", name)?);
    let pair = |direct: f64, proxy: f64| {
        let added = proxy - direct;
        format!("{direct:9.1} {proxy:9.1} {added:7.1} {:6.2}", 100.0 * added / direct)
    };
    let mut line = format!(
        "{name:16} {} | {}",
        pair(direct.instructions, proxy.instructions),
        pair(direct.cycles, proxy.cycles)
    );
    if ["tmpfs", "cached", "direct"].iter().any(|file| name.starts_with(file)) {
        let all = direct.instructions * (1.0 + kernel_ratio(name)?);
        let added = proxy.instructions - direct.instructions;
        line += &format!(" | {all:9.0} {:6.2}", 100.0 * added / all);
    }
    Ok(line)
}

/// Prints the cells whose names begin with `prefix`.
pub fn table(prefix: &str) -> ExitCode {
    println!(
        "per request      {:^34} | {:^34} | with the kernel,",
        "instructions", "estimated cycles"
    );
    let pair = format!("{:>9} {:>9} {:>7} {:>6}", "direct", "proxy", "added", "%");
    println!("{:16} {pair} | {pair} | ESTIMATED      %", "cell");
    let mut failed = false;
    for name in CELLS.iter().filter(|name| name.starts_with(prefix)) {
        match line(name) {
            Ok(line) => println!("{line}"),
            Err(error) => {
                println!("{name:16} {error}");
                failed = true;
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
