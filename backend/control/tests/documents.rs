//! `backend/OPERATING.md` lists the commands and options that `hotswapctl` has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// What the rows of a table under a heading have in backticks, cell by cell.
fn rows(document: &str, heading: &str) -> Vec<Vec<Vec<String>>> {
    let mut rows = Vec::new();
    let mut here = "";
    for line in document.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            here = name;
        }
        if let Some(row) = line.strip_prefix("| ").filter(|_| here == heading) {
            let cells = row.replace("\\|", "/");
            let cells = cells.split(" | ").map(|cell| {
                let quoted = cell.split('`').skip(1).step_by(2);
                quoted.map(|text| text.split(' ').next().unwrap_or(text).to_owned()).collect()
            });
            rows.push(cells.collect());
        }
    }
    rows
}

fn help(args: &[&str]) -> String {
    let hotswapctl = env!("CARGO_BIN_EXE_hotswapctl");
    let output = Command::new(hotswapctl).args(args).arg("--help").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The commands in what `--help` prints.
fn commands(help: &str) -> BTreeSet<String> {
    let list = help.split("Commands:\n").nth(1).unwrap_or("");
    let lines = list.lines().take_while(|line| line.starts_with("  "));
    let names = lines.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

/// The long options in what `--help` prints.
fn options(help: &str) -> BTreeSet<String> {
    let words = help.lines().filter_map(|line| line.trim_start().strip_prefix("--"));
    words.filter_map(|line| line.split(' ').next()).map(|name| format!("--{name}")).collect()
}

/// Which commands have each option, as documented and as `hotswapctl` says.
type Table = BTreeMap<String, BTreeSet<String>>;

fn documented(document: &str, commands: &BTreeSet<String>) -> Table {
    let rows = rows(document, "Commands").into_iter().filter(|row| {
        row.first().is_some_and(|cell| cell.iter().any(|word| word.starts_with("--")))
    });
    rows.map(|row| {
        // A row that names no command is for all.
        let of: BTreeSet<String> = row[1].iter().cloned().collect();
        (row[0][0].clone(), if of.is_empty() { commands.clone() } else { of })
    })
    .collect()
}

fn real(commands: &BTreeSet<String>) -> Table {
    let mut table = Table::new();
    for option in options(&help(&[])) {
        table.insert(option, commands.clone());
    }
    for command in commands {
        for option in options(&help(&[command])) {
            table.entry(option).or_default().insert(command.clone());
        }
    }
    table
}

#[test]
fn every_command_and_option_is_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../OPERATING.md");
    let document = std::fs::read_to_string(path).unwrap();
    let commands = commands(&help(&[]));
    assert!(commands.contains("upgrade") && commands.len() > 4, "{commands:?}");
    let listed: BTreeSet<String> = rows(&document, "Commands")
        .into_iter()
        .filter_map(|row| row.first()?.first().cloned())
        .filter(|word| !word.starts_with("--"))
        .collect();
    assert_eq!(listed, commands);
    assert_eq!(documented(&document, &commands), real(&commands));
}

#[test]
fn a_table_is_read_as_it_is_written() {
    let text = "## Commands\n\n| command | |\n|---|---|\n| `go NAME\\|PATH` | goes |\n\n\
                | option | of | |\n| `--fast N` | `go`, `run` | `x` |\n| `--json` | all | |\n\
                ## Other\n| `no` | |\n";
    let all: BTreeSet<String> = ["go", "run"].map(str::to_owned).into();
    let table = documented(text, &all);
    assert_eq!(
        table,
        Table::from([("--fast".into(), all.clone()), ("--json".into(), all.clone())])
    );
    // A row that is missing, or says another command, is not what there is.
    let other = documented(&text.replace("`go`, `run`", "`run`"), &all);
    assert_ne!(table, other);
    assert_ne!(table, documented(&text.replace("--json", "--jsno"), &all));
    let help =
        "Usage: x\n\nCommands:\n  go    Goes\n  help  Print\n\nOptions:\n      --json  Text --no\n";
    assert_eq!(commands(help), ["go".to_owned()].into());
    assert_eq!(options(help), ["--json".to_owned()].into());
}
