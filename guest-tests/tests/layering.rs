//! The walls between the rooms: which crate may know which, and where `unsafe` may stand.
//!
//! The arrows are those of the design. They are read from the manifests with `cargo metadata`, so
//! that an arrow which is not drawn here fails before code is built on it. The checkers are pure
//! functions over plain data, and each has a test that shows it something forbidden.

mod workspace;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use workspace::{Source, code_only, sources, workspace};

/// Who may depend on whom, in the product.
const ARROWS: &[(&str, &[&str])] = &[
    ("srcu", &[]),
    ("storage", &["domain-abi", "domain-host"]),
    ("domain-abi", &[]),
    ("domain-api", &["domain-abi"]),
    ("domain-host", &["domain-abi"]),
    ("domain-io", &["domain-abi", "domain-api"]),
    ("domain-conformance", &["domain-abi", "domain-api", "domain-host"]),
    ("virtio-blk", &["domain-abi"]),
    ("virtqueue", &["domain-abi", "virtio-blk"]),
    ("loader", &["domain-abi", "domain-host"]),
    ("ceph", &["domain-abi", "domain-host"]),
    ("proxy", &["srcu", "storage", "domain-abi", "domain-host"]),
    ("puppet", &["proxy", "domain-api", "domain-host", "domain-conformance"]),
    ("control", &["domain-abi"]),
    ("manual", &[]),
    ("channel", &[]),
    ("telemetry", &[]),
    ("supervisor", &["channel", "control", "telemetry"]),
    (
        "vhost-hotswap",
        &[
            "proxy",
            "loader",
            "ceph",
            "storage",
            "virtio-blk",
            "virtqueue",
            "control",
            "channel",
            "supervisor",
            "telemetry",
            "domain-abi",
        ],
    ),
    ("domain-empty", &["domain-api"]),
    ("domain-ramdisk", &["domain-api"]),
    ("domain-file", &["domain-api", "domain-io"]),
    ("domain-nbd", &["domain-api", "domain-io"]),
    ("domain-rbd", &["domain-api", "domain-io"]),
    ("domain-faulty", &["domain-api", "domain-io"]),
    ("guest-tests", &[]),
];

/// More arrows that tests, benchmarks and examples may have.
const ARROWS_OF_TESTS: &[(&str, &[&str])] = &[
    ("domain-api", &["domain-conformance"]),
    // The engine is driven with a backend of the test's own.
    ("domain-io", &["domain-conformance"]),
    ("domain-empty", SUITE),
    ("domain-ramdisk", SUITE),
    ("domain-file", SUITE),
    ("domain-nbd", SUITE),
    ("domain-rbd", SUITE),
    ("domain-faulty", SUITE),
    // A supervisor of the test's own speaks to the server's program.
    ("guest-tests", &["domain-empty", "domain-ramdisk", "domain-file", "domain-faulty", "channel"]),
    // What the proxy costs is measured against domains that are called without it.
    (
        "proxy",
        &[
            "domain-empty",
            "domain-ramdisk",
            "domain-file",
            "domain-api",
            "domain-conformance",
            "puppet",
        ],
    ),
    // Manuals are written by examples.
    ("control", &["manual"]),
    ("vhost-hotswap", &["puppet", "manual"]),
];

/// What a domain is checked with.
const SUITE: &[&str] = &["domain-abi", "domain-host", "domain-conformance"];

/// What a domain may use from the registry: nothing that starts threads, logs or knows virtio.
const CRATES_FOR_DOMAINS: &[&str] = &["rustix", "thiserror"];

/// What is called like a domain and is none.
const NO_DOMAINS: &[&str] =
    &["domain-abi", "domain-api", "domain-host", "domain-io", "domain-conformance"];

fn is_domain(name: &str) -> bool {
    name.starts_with("domain-") && !NO_DOMAINS.contains(&name)
}

/// Where `unsafe` may stand, and why.
const UNSAFE_ROOMS: &[(&str, &str)] = &[
    ("backend/srcu", "pointers that live until the last reader has left"),
    ("backend/loader", "mapping a module and calling into it"),
    ("backend/ceph", "calls into Ceph's C libraries, which are mapped at run time"),
    ("domains/abi", "tables of C functions and pointers, sent between threads"),
    ("domains/api", "the module's side of the C ABI, below the safe traits"),
    ("domains/host", "the host's side of the C ABI"),
    ("domains/io", "guest memory is handed to the kernel"),
    ("domains/conformance", "stands on both sides of the C ABI"),
    ("backend/control/src/credentials.rs", "a system call that says who has connected"),
    ("backend/virtio-blk", "guest memory is handed to the kernel as iovecs"),
    ("backend/virtqueue", "rings in guest memory, and what keeps guest addresses valid"),
    ("backend/telemetry/src/counters.rs", "counters in memory that another process reads"),
    ("backend/server/src/raw_fd.rs", "descriptors that come or go as numbers"),
    ("backend/server/src/sandbox/trap.rs", "a signal's handler ends what is refused"),
    ("backend/server/src/signals.rs", "a system call that sets what a signal does"),
    ("domains/ramdisk/tests", "looks at a region's memfd from outside"),
    ("domains/file/tests", "limits and mounts of the test's own process"),
    ("domains/file/benches", "reads its own CPU time"),
    ("guest-tests/harness/client.rs", "rings and buffers that another process shares"),
];

/// One dependency, as a manifest has it.
#[derive(Debug)]
struct Arrow {
    from: String,
    to: String,
    is_for_tests: bool,
}

fn arrow(from: &str, to: &str, is_for_tests: bool) -> Arrow {
    Arrow { from: from.into(), to: to.into(), is_for_tests }
}

fn allowed(table: &[(&str, &[&str])], arrow: &Arrow) -> bool {
    table.iter().any(|(from, to)| *from == arrow.from && to.contains(&arrow.to.as_str()))
}

/// Says which arrows are not in the tables. `rooms` are the names of our own crates.
fn wrong_arrows(rooms: &BTreeSet<String>, arrows: &[Arrow]) -> Vec<String> {
    let mut wrong = Vec::new();
    for room in rooms {
        if !ARROWS.iter().any(|(name, _)| name == room) {
            wrong.push(format!("`{room}` is a room that the design does not have"));
        }
    }
    for arrow in arrows {
        let Arrow { from, to, is_for_tests } = arrow;
        let is_domain = is_domain(from);
        if rooms.contains(to) {
            let also_for_tests = *is_for_tests && allowed(ARROWS_OF_TESTS, arrow);
            // A crate may take itself for its own tests, to switch on a feature.
            let is_itself = *is_for_tests && from == to;
            if !allowed(ARROWS, arrow) && !also_for_tests && !is_itself {
                wrong.push(format!("`{from}` must not depend on `{to}`"));
            }
        } else if is_domain && !is_for_tests && !CRATES_FOR_DOMAINS.contains(&to.as_str()) {
            wrong.push(format!("`{from}` is a domain and must not use `{to}`"));
        }
    }
    wrong
}

/// The members of the workspace: name, directory, dependencies.
fn members() -> Vec<(String, PathBuf, Vec<Arrow>)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(workspace())
        .output()
        .expect("cargo can be run");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let packages = metadata["packages"].as_array().expect("a list of packages");
    packages
        .iter()
        .map(|package| {
            let from = text(&package["name"]);
            let dependencies = package["dependencies"].as_array().expect("a list of dependencies");
            let arrows = dependencies
                .iter()
                .map(|d| arrow(&from, &text(&d["name"]), d["kind"] == "dev"))
                .collect();
            let manifest = PathBuf::from(text(&package["manifest_path"]));
            (from, manifest.parent().expect("a directory").to_owned(), arrows)
        })
        .collect()
}

#[test]
fn only_the_drawn_arrows_exist() {
    let members = members();
    let rooms = members.iter().map(|(name, ..)| name.clone()).collect();
    let arrows: Vec<Arrow> = members.into_iter().flat_map(|(_, _, arrows)| arrows).collect();
    assert!(arrows.len() > 10, "hardly any dependency was found: {arrows:?}");
    let wrong = wrong_arrows(&rooms, &arrows);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The crates of the table in a document, and what each may know of ours.
fn documented_arrows(document: &str) -> Vec<(String, BTreeSet<String>)> {
    let rows = document.lines().filter(|line| line.starts_with("| `"));
    let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let rows = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
    rows.filter(|cells| cells.len() == 4)
        .map(|cells| {
            let names: Vec<String> = quoted(cells[0]);
            (names.concat(), quoted(cells[3]).into_iter().collect())
        })
        .collect()
}

/// How a table of crates differs from the arrows. Its row `domain-*` stands for all domains.
fn wrong_table(table: &[(String, BTreeSet<String>)], arrows: &[(&str, &[&str])]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, known) in arrows.iter().filter(|(name, _)| !is_domain(name)) {
        let known: BTreeSet<String> = known.iter().map(|name| (*name).to_owned()).collect();
        match table.iter().find(|(row, _)| row == name) {
            None => wrong.push(format!("`{name}` is not in the table")),
            Some((_, written)) if *written != known => {
                wrong.push(format!("`{name}` knows {known:?}, and not {written:?}"));
            }
            Some(_) => {}
        }
    }
    for (row, _) in table.iter().filter(|(row, _)| row != "domain-*") {
        if !arrows.iter().any(|(name, _)| name == row) {
            wrong.push(format!("`{row}` is no crate"));
        }
    }
    wrong
}

#[test]
fn the_drawn_arrows_are_those_of_the_architecture() {
    let document = fs::read_to_string(workspace().join("backend/ARCHITECTURE.md")).unwrap();
    let rooms = document.split("## Rooms").nth(1).expect("a table of rooms");
    let rooms = rooms.split("\n## ").next().unwrap_or(rooms);
    let wrong = wrong_table(&documented_arrows(rooms), ARROWS);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_table_that_differs_is_found() {
    let table = "| crate | in | holds | knows |\n|---|---|---|---|\n\
                 | `a` | `x/a` | `stuff` | nothing |\n| `b` | `x/b` | x | `a`, `c` |\n\
                 | `c` | `x/c` | x | `a` |\n| `domain-*` | `y` | x | `a` |\n";
    let table = documented_arrows(table);
    let arrows: &[(&str, &[&str])] =
        &[("a", &[]), ("b", &["c", "a"]), ("c", &["a"]), ("domain-x", &["a"])];
    assert_eq!(wrong_table(&table, arrows), [""; 0]);
    let other: &[(&str, &[&str])] = &[("a", &[]), ("b", &["a"]), ("d", &[])];
    assert_eq!(wrong_table(&table, other).len(), 3, "{:?}", wrong_table(&table, other));
}

#[test]
fn a_made_up_arrow_is_found() {
    let rooms: BTreeSet<String> = ARROWS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let good = [
        arrow("proxy", "srcu", false),
        arrow("srcu", "loom", true),
        arrow("domain-file", "rustix", false),
        arrow("domain-file", "tempfile", true),
        arrow("domain-file", "domain-api", true),
        arrow("guest-tests", "domain-ramdisk", true),
        arrow("proxy", "domain-ramdisk", true),
        arrow("domain-file", "domain-conformance", true),
    ];
    assert_eq!(wrong_arrows(&rooms, &good), Vec::<String>::new());
    for bad in [
        arrow("srcu", "proxy", false),
        arrow("virtio-blk", "proxy", false),
        arrow("domain-api", "domain-host", false),
        arrow("domain-file", "domain-host", false),
        arrow("domain-ramdisk", "virtio-blk", false),
        arrow("domain-file", "domain-empty", false),
        arrow("domain-file", "domain-empty", true),
        arrow("domain-file", "vhost", false),
        arrow("guest-tests", "domain-ramdisk", false),
        arrow("proxy", "domain-ramdisk", false),
        arrow("guest-tests", "vhost-hotswap", true),
        arrow("loader", "domain-ramdisk", true),
    ] {
        assert_eq!(
            wrong_arrows(&rooms, std::slice::from_ref(&bad)).len(),
            1,
            "{bad:?} went through"
        );
    }
    let more: BTreeSet<String> = rooms.into_iter().chain(["attic".to_owned()]).collect();
    assert_eq!(wrong_arrows(&more, &[]).len(), 1, "a new room went through");
}

/// Whether the word `unsafe` stands in the code.
fn has_unsafe(source: &str) -> bool {
    let code = code_only(source);
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == "unsafe")
}

#[test]
fn the_word_is_found_in_code_and_only_there() {
    for code in [
        "unsafe { f() }",
        "unsafe fn f() {}",
        "x.map(|y| unsafe{y})",
        "#[unsafe(no_mangle)]",
        "'a' unsafe",
    ] {
        assert!(has_unsafe(code), "not found in: {code}");
    }
    let raw = "r##\"unsafe \"# unsafe\"##";
    for other in [
        "// unsafe",
        "/* /* unsafe */ unsafe */",
        "\"unsafe \\\" unsafe\"",
        raw,
        "#![forbid(unsafe_code)]",
        "fn is_unsafe<'a>(x: &'a str) {}",
        "'\"' // unsafe",
    ] {
        assert!(!has_unsafe(other), "found in: {other}");
    }
    assert!(has_unsafe(&format!("let x = {raw}; let y = '\\''; unsafe {{}}")));
}

/// The sources in which `unsafe` stands although their room is not listed.
fn wrong_unsafe<'a>(rooms: &[(&str, &str)], files: &'a [Source]) -> Vec<&'a str> {
    let is_listed = |path: &str| rooms.iter().any(|(room, _)| Path::new(path).starts_with(room));
    let wrong = files.iter().filter(|file| file.path.ends_with(".rs") && !is_listed(&file.path));
    wrong.filter(|file| has_unsafe(&file.text)).map(|file| file.path.as_str()).collect()
}

#[test]
fn unsafe_stands_only_where_it_is_needed() {
    let files = sources();
    let wrong = wrong_unsafe(UNSAFE_ROOMS, &files);
    assert!(wrong.is_empty(), "`unsafe` stands outside of its rooms, in {wrong:?}");
    for (room, _) in UNSAFE_ROOMS {
        let in_it = |file: &&Source| Path::new(&file.path).starts_with(room);
        let needs_it = files.iter().filter(in_it).any(|file| has_unsafe(&file.text));
        assert!(needs_it, "`{room}` has no `unsafe`: it need not be listed");
    }
}

#[test]
fn unsafe_in_another_room_is_found() {
    let file = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
    let files = [
        file("a/src/x.rs", "unsafe { f() }"),
        file("a/src/y.rs", "// unsafe"),
        file("ab/src/x.rs", "fn f() { unsafe { g() } }"),
    ];
    assert_eq!(wrong_unsafe(&[("a", "")], &files), ["ab/src/x.rs"]);
    assert_eq!(wrong_unsafe(&[("a/src/y.rs", "")], &files), ["a/src/x.rs", "ab/src/x.rs"]);
}

#[test]
fn every_domain_forbids_unsafe_code() {
    let mut domains = 0;
    for (name, directory, _) in members() {
        if is_domain(&name) {
            let source = fs::read_to_string(directory.join("src/lib.rs")).expect("a lib.rs");
            assert!(
                code_only(&source).contains("#![forbid(unsafe_code)]"),
                "`{name}` does not forbid it"
            );
            domains += 1;
        }
    }
    assert!(domains >= 4, "only {domains} domains were found");
}
