//! What every source has to be: comments that fit a screen, files that fit a head, tests that are
//! built and run.
//!
//! The checkers are pure functions, and each has a test that shows it something forbidden.

mod workspace;

use workspace::{Source, code_only, comments, sources};

/// The widest that a line with a comment may be.
const WIDTH: usize = 100;

/// The longest that a file may be without a reason.
const LINES: usize = 500;

/// Longer files, and why they are one.
const LONG_FILES: &[(&str, &str)] = &[
    ("backend/srcu/src/models.rs", "the models: one for each case of the argument"),
    ("guest-tests/demo/main.rs", "the acts of the demo, in their order"),
    ("guest-tests/harness/client.rs", "the native client: its rings are argued for in one place"),
    ("guest-tests/tests/native/server.rs", "a supervisor, and one test for each thing it commands"),
    ("guest-tests/tests/native/storage.rs", "one test for each thing that storage does"),
    ("guest-tests/tests/native/wire.rs", "one test for each thing that a frontend says"),
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

/// The files below `tests` that no program of tests has as a module, so that what they test is not
/// run. Cargo makes a program of each file there, and of each directory with a `main.rs`; another
/// directory is shared by programs.
fn orphans(files: &[Source]) -> Vec<String> {
    let mut orphans = Vec::new();
    for file in files {
        let Some((crate_, inner)) = file.path.split_once("/tests/") else { continue };
        let Some((directory, name)) = inner.rsplit_once('/') else { continue };
        let name = name.trim_end_matches(".rs");
        if crate_.contains("/src") || !file.path.ends_with(".rs") || name == "main" {
            continue;
        }
        // Of a directory's own file, the directory is the module, and the program may be beside it.
        let (name, above) = match (name, directory.rsplit_once('/')) {
            ("mod", Some((above, directory))) => (directory, above),
            ("mod", None) => (directory, ""),
            _ => (name, directory),
        };
        let above = format!("{crate_}/tests/{above}");
        let says_where = format!("#[path = \"../{directory}/mod.rs\"]");
        let declares = |file: &&Source| {
            let beside = file.path.rsplit_once('/').map(|(directory, _)| directory);
            (beside == Some(above.trim_end_matches('/')) || file.text.contains(&says_where))
                && code_only(&file.text)
                    .split(|c: char| !c.is_alphanumeric() && c != '_')
                    .collect::<Vec<_>>()
                    .windows(2)
                    .any(|pair| pair == ["mod", name])
        };
        if !files.iter().any(|file| declares(&file)) {
            orphans.push(file.path.clone());
        }
    }
    orphans
}

#[test]
fn each_file_of_tests_is_in_a_program() {
    let orphans = orphans(&sources());
    assert!(orphans.is_empty(), "no `main.rs` has them as modules:\n{}", orphans.join("\n"));
}

#[test]
fn a_file_that_no_program_has_is_found() {
    let files = |more: &[(&str, &str)]| -> Vec<Source> {
        let all = [("a/tests/b/main.rs", "mod c;"), ("a/tests/d.rs", "mod shared;")];
        all.iter().chain(more).map(|(path, text)| source(path, (*text).to_owned())).collect()
    };
    for good in ["a/tests/b/c.rs", "a/tests/shared/mod.rs", "a/src/tests/x.rs", "a/tests/e.rs"] {
        assert_eq!(orphans(&files(&[(good, "")])), [""; 0], "{good}");
    }
    for bad in ["a/tests/b/d.rs", "a/tests/c.rs/e.rs", "a/tests/other/mod.rs", "a/tests/f/x.rs"] {
        assert_eq!(orphans(&files(&[(bad, "")])), [bad], "{bad}");
    }
    let comment = source("a/tests/b/main.rs", "// mod c;".into());
    let files = [comment, source("a/tests/b/c.rs", String::new())];
    assert_eq!(orphans(&files), ["a/tests/b/c.rs"]);
}

/// The targets whose manifest says that there are no tests in them, and the files of each that have
/// some: all that are beside its root, which is a directory of its own unless it is `src/main.rs`.
fn tests_that_are_not_built(files: &[Source]) -> Vec<String> {
    let mut wrong = Vec::new();
    for manifest in files.iter().filter(|file| file.path.ends_with("/Cargo.toml")) {
        let directory = manifest.path.trim_end_matches("Cargo.toml");
        for section in manifest.text.split("\n[").filter(|text| text.contains("\ntest = false")) {
            let path = section.lines().find_map(|line| line.strip_prefix("path = "));
            let root =
                directory.to_owned() + path.map_or("src/lib.rs", |path| path.trim_matches('"'));
            let beside = root.rsplit_once('/').map_or("", |(directory, _)| directory);
            let belongs = |path: &str| match root.ends_with("/src/main.rs") {
                true => path == root,
                false => path.starts_with(&format!("{beside}/")),
            };
            let with_tests = |file: &&Source| {
                belongs(&file.path) && file.path.ends_with(".rs") && has_tests(&file.text)
            };
            wrong.extend(files.iter().filter(with_tests).map(|file| file.path.clone()));
        }
    }
    wrong
}

fn has_tests(source: &str) -> bool {
    code_only(source).contains("#[test]")
}

#[test]
fn what_is_said_to_have_no_tests_has_none() {
    let sources = sources();
    let said = |file: &&Source| file.text.contains("\ntest = false");
    assert!(sources.iter().filter(said).count() > 3, "hardly any manifest was found");
    let wrong = tests_that_are_not_built(&sources);
    assert!(wrong.is_empty(), "`test = false`, and yet there are tests:\n{}", wrong.join("\n"));
}

#[test]
fn a_test_that_is_not_built_is_found() {
    let manifest = "[package]\nname = \"a\"\n\n[lib]\ntest = false\n\n[[bin]]\nname = \"b\"\n\
                    path = \"b/main.rs\"\ntest = false\n\n[[bin]]\npath = \"c/main.rs\"\n";
    let files = |path: &str, text: &str| {
        [source("x/a/Cargo.toml", manifest.into()), source(path, text.into())]
    };
    for bad in ["x/a/src/lib.rs", "x/a/src/y/z.rs", "x/a/b/main.rs", "x/a/b/y.rs"] {
        assert_eq!(tests_that_are_not_built(&files(bad, "#[test]\nfn f() {}")), [bad]);
        assert_eq!(tests_that_are_not_built(&files(bad, "// #[test]\nfn f() {}")), [""; 0]);
    }
    for good in ["x/a/c/main.rs", "x/a/tests/t.rs", "x/b/src/lib.rs"] {
        assert_eq!(tests_that_are_not_built(&files(good, "#[test]\nfn f() {}")), [""; 0]);
    }
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
