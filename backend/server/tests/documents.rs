//! What the documents list is what there is: codes of refusals, and the daemon's options.
//!
//! The checkers are pure functions, and each has a test that shows it something forbidden.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn document(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What stands in backticks in the first column of the tables under a heading; the words of a cell
/// up to the first blank each.
fn first_column(document: &str, heading: &str) -> Vec<String> {
    let mut cells = Vec::new();
    let mut is_under = false;
    for line in document.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            is_under = name == heading;
        }
        if let Some(cell) = line.strip_prefix("| ").filter(|_| is_under) {
            let cell = cell.split(" | ").next().unwrap_or(cell);
            let quoted = cell.split('`').skip(1).step_by(2);
            cells.extend(quoted.map(|word| word.split(' ').next().unwrap_or(word).to_owned()));
        }
    }
    cells
}

/// The long options in what `--help` prints.
fn options_of_help(help: &str) -> Vec<String> {
    let begins = help.lines().map(str::trim_start).map(|line| {
        // With a short form before it, or without.
        line.strip_prefix('-').and_then(|rest| rest.split_once(", ")).map_or(line, |(_, long)| long)
    });
    let options = begins.filter(|line| line.starts_with("--"));
    let names = options.map(|line| line.split([' ', '=']).next().unwrap_or(line).to_owned());
    names.filter(|name| !["--help", "--version"].contains(&name.as_str())).collect()
}

/// How a document differs from what there is.
fn differences(documented: &[String], real: &[String]) -> Vec<String> {
    let set = |list: &[String]| list.iter().cloned().collect::<BTreeSet<_>>();
    let (written, there) = (set(documented), set(real));
    let missing = there.difference(&written).map(|word| format!("{word} is not documented"));
    let stale = written.difference(&there).map(|word| format!("{word} is documented and is not"));
    let twice = documented.len().saturating_sub(written.len());
    let twice = (twice > 0).then(|| format!("{twice} are documented twice"));
    missing.chain(stale).chain(twice).collect()
}

fn strings(list: impl IntoIterator<Item = &'static str>) -> Vec<String> {
    list.into_iter().map(str::to_owned).collect()
}

#[test]
fn every_code_is_documented() {
    let errors = document("backend/ERRORS.md");
    let modules = first_column(&errors, "The module");
    assert_eq!(differences(&modules, &strings(loader::CODES)), [""; 0], "of modules");
    let device = proxy::Code::ALL.iter().map(|code| code.as_str());
    let documented =
        [first_column(&errors, "The new domain"), first_column(&errors, "The change")].concat();
    assert_eq!(differences(&documented, &strings(device)), [""; 0], "of the device");
    let documented = ["The control socket", "The daemon's program", "`hotswapctl` itself"]
        .map(|heading| first_column(&errors, heading))
        .concat();
    let control = control::Code::ALL.iter().map(|code| code.as_str());
    assert_eq!(differences(&documented, &strings(control)), [""; 0], "of the control socket");
}

#[test]
fn every_option_is_documented() {
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-hotswap")).arg("--help").output().unwrap();
    let help = options_of_help(&String::from_utf8_lossy(&output.stdout));
    assert!(help.len() > 5, "{help:?}");
    let operating = document("backend/OPERATING.md");
    let documented = first_column(&operating, "Options of the daemon");
    assert_eq!(differences(&documented, &help), [""; 0]);
}

#[test]
fn a_difference_is_found() {
    let text =
        "## A\n\n| code | x |\n|---|---|\n| `a`, `b` | `c` |\n| `--d N` | |\n## B\n| `e` | |\n";
    let found = first_column(text, "A");
    assert_eq!(found, ["a", "b", "--d"]);
    let real = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    assert_eq!(differences(&found, &real(&["a", "b", "--d"])), [""; 0]);
    assert_eq!(differences(&found, &real(&["a", "b"])), ["--d is documented and is not"]);
    assert_eq!(differences(&found, &real(&["a", "b", "--d", "f"])), ["f is not documented"]);
    assert_eq!(differences(&real(&["a", "a"]), &real(&["a"])), ["1 are documented twice"]);
    let help = "Options:\n      --path <PATH>\n          Text --no-option\n  -q, --quiet  Text\n  \
                -h, --help  Print help\n  -V, --version\n";
    assert_eq!(options_of_help(help), ["--path", "--quiet"]);
}
