//! What every source has to be: comments that fit a screen, files that fit a head.
//!
//! The checkers are pure functions, and each has a test that shows it something forbidden.

mod workspace;

use workspace::{Source, comments, sources};

/// The widest that a line with a comment may be.
const WIDTH: usize = 100;

/// The longest that a file may be without a reason.
const LINES: usize = 500;

/// Longer files, and why they are one.
const LONG_FILES: &[(&str, &str)] = &[
    ("backend/srcu/src/models.rs", "the models: one for each case of the argument"),
    ("guest-tests/demo/main.rs", "the acts of the demo, in their order"),
    ("guest-tests/harness/client.rs", "the native client: its rings are argued for in one place"),
    ("guest-tests/tests/native_server.rs", "a supervisor, and one test for each thing it commands"),
    ("guest-tests/tests/native_storage.rs", "one test for each thing that storage does"),
    ("guest-tests/tests/native_wire.rs", "one test for each thing that a frontend says"),
];

/// The comments that are wider than they may be: file, line and width.
fn wide_comments(files: &[Source]) -> Vec<String> {
    let mut wide = Vec::new();
    for file in files {
        let mut note = |line: usize, width: usize| {
            if width > WIDTH {
                wide.push(format!("{}:{line}: {width} columns", file.path));
            }
        };
        if file.path.ends_with(".rs") {
            comments(&file.text).iter().for_each(|comment| note(comment.line, comment.width));
        } else {
            for (at, line) in file.text.lines().enumerate() {
                // In a shell script or a manifest, what looks like one.
                if line.trim_start().starts_with('#') || line.contains(" # ") {
                    note(at + 1, line.chars().count());
                }
            }
        }
    }
    wide
}

/// The files that are longer than they may be, and those that are listed and are not.
fn wrong_lengths(files: &[Source], listed: &[(&str, &str)]) -> Vec<String> {
    let is_listed = |path: &str| listed.iter().any(|(file, _)| *file == path);
    let is_long = |file: &Source| file.text.lines().count() > LINES;
    let mut wrong: Vec<String> = files
        .iter()
        .filter(|file| is_long(file) && !is_listed(&file.path))
        .map(|file| format!("{} has {} lines", file.path, file.text.lines().count()))
        .collect();
    for (path, _) in listed {
        if !files.iter().any(|file| file.path == *path && is_long(file)) {
            wrong.push(format!("{path} is no long file: it need not be listed"));
        }
    }
    wrong
}

#[test]
fn comments_fit_a_screen() {
    let wide = wide_comments(&sources());
    assert!(wide.is_empty(), "more than {WIDTH} columns:\n{}", wide.join("\n"));
}

#[test]
fn files_fit_a_head_or_say_why_not() {
    let wrong = wrong_lengths(&sources(), LONG_FILES);
    assert!(wrong.is_empty(), "more than {LINES} lines:\n{}", wrong.join("\n"));
}

fn source(path: &str, text: String) -> Source {
    Source { path: path.into(), text }
}

#[test]
fn a_wide_comment_is_found() {
    let long = "x".repeat(WIDTH);
    for (path, text) in [
        ("a.rs", format!("fn f() {{}}\n// {long}\n")),
        ("a.rs", format!("fn f() {{}}\n//! {long}\n")),
        ("a.rs", format!("fn f() {{}}\nlet x = 1; // {}\n", &long[..90])),
        ("a.rs", format!("/*\n{long}x\n*/")),
        ("a.sh", format!("#!/bin/sh\n# {long}\n")),
        ("a.toml", format!("[a]\nb = 1 # {long}\n")),
        ("scripts/a", format!("\n   # {long}")),
    ] {
        let found = wide_comments(&[source(path, text)]);
        assert_eq!(found.len(), 1, "{path}: {found:?}");
        assert!(found[0].starts_with(&format!("{path}:2: 1")), "{found:?}");
    }
    for (path, text) in [
        ("a.rs", format!("// {}\n", &long[3..])),
        ("a.rs", format!("let x = \"// {long}\";\n")),
        ("a.rs", format!("// \u{e4}{}\n", &long[4..])),
        ("a.sh", format!("echo {long}\n# short\n")),
    ] {
        let found = wide_comments(&[source(path, text)]);
        assert!(found.is_empty(), "{path}: {found:?}");
    }
}

#[test]
fn a_long_file_is_found_and_so_is_a_stale_reason() {
    let files = [source("long.rs", "\n".repeat(LINES + 1)), source("short.rs", "\n".repeat(LINES))];
    assert_eq!(wrong_lengths(&files, &[("long.rs", "why")]), Vec::<String>::new());
    assert_eq!(wrong_lengths(&files, &[]), ["long.rs has 501 lines"]);
    assert_eq!(wrong_lengths(&files, &[("long.rs", ""), ("short.rs", "")]).len(), 1);
    assert_eq!(wrong_lengths(&files, &[("long.rs", ""), ("gone.rs", "")]).len(), 1);
}
