//! What comments name in backticks exists: paths, and items of our own types; and what documents
//! link to.
//!
//! A comment that cites a file or a method is an argument that rests on it, and code moves. What is
//! checked is what can be told apart from other things in backticks: paths that begin with a
//! directory of the workspace, names of source files, and items of types and of modules. The
//! checkers are pure functions, and a test shows each something forbidden.

mod workspace;

use std::collections::{BTreeMap, BTreeSet};

use workspace::{Comment, Source, code_only, comments, sources, walk, workspace};

/// Types of crates that only comments name.
const FOREIGN_TYPES: &[&str] = &["VringEpollHandler"];

/// What stands in backticks in a comment.
fn cited(comment: &str) -> impl Iterator<Item = &str> {
    comment.split('`').skip(1).step_by(2)
}

/// Whether something in backticks is a path in the workspace, or the name of a source file.
fn is_path(cited: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    let tops = ["backend/", "domains/", "guest-tests/", "scripts/", "findings/"];
    let is_rust = cited.ends_with(".rs") && cited.len() > ".rs".len();
    cited.chars().all(plain) && (is_rust || tops.iter().any(|top| cited.starts_with(top)))
}

/// Whether there is a path that ends so, in whole names.
fn has_path(paths: &[String], cited: &str) -> bool {
    let cited = cited.trim_end_matches('/');
    let ends_so = |path: &str| path == cited || path.ends_with(&format!("/{cited}"));
    let is_directory = |path: &str| path.starts_with(&format!("{cited}/"));
    paths.iter().any(|path| ends_so(path) || is_directory(path))
}

/// A type and its item, if that is what stands in backticks; generics and calls are left out.
fn type_and_item(cited: &str) -> Option<(&str, &str)> {
    let cited = cited.strip_suffix("()").unwrap_or(cited);
    let (path, item) = cited.rsplit_once("::")?;
    let of = path.rsplit("::").next()?;
    let is_word = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let is_type = of.starts_with(|c: char| c.is_ascii_uppercase())
        && of.contains(|c: char| c.is_ascii_lowercase());
    (is_type && is_word(of) && is_word(item)).then_some((of, item))
}

/// The module and its item, if that is what stands in backticks: two names, of which the first is
/// that of a source file of ours.
fn module_and_item<'a>(cited: &'a str, items: &Items) -> Option<(&'a str, &'a str)> {
    let (module, item) = cited.strip_suffix("()").unwrap_or(cited).split_once("::")?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (items.of_module.contains_key(module) && item.chars().all(is_name)).then_some((module, item))
}

/// The words of code.
fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

/// What the sources say: for each type that they define or implement all words of those files, for
/// each file its words, and all words of all of them.
#[derive(Default)]
struct Items {
    of_type: BTreeMap<String, BTreeSet<String>>,
    /// By the names of files.
    of_module: BTreeMap<String, BTreeSet<String>>,
    words: BTreeSet<String>,
}

impl Items {
    fn of(files: &[Source]) -> Items {
        let mut items = Items::default();
        for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
            let code = code_only(&file.text);
            let here: BTreeSet<String> = words(&code).map(str::to_owned).collect();
            let mut before = "";
            for word in words(&code) {
                let defines = ["struct", "enum", "trait", "union", "type"].contains(&before);
                if defines && word.starts_with(|c: char| c.is_uppercase()) {
                    items.of_type.entry(word.to_owned()).or_default();
                }
                before = word;
            }
            let name = file.path.rsplit('/').next().unwrap_or("").trim_end_matches(".rs");
            items.of_module.entry(name.to_owned()).or_default().extend(here.clone());
            items.words.extend(here);
        }
        for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
            let code = code_only(&file.text);
            let here: BTreeSet<String> = words(&code).map(str::to_owned).collect();
            for of in types_of(&code).intersection(&items.of_type.keys().cloned().collect()) {
                items.of_type.get_mut(of).expect("a key").extend(here.clone());
            }
        }
        items
    }

    /// Whether `of` has an item of that name, as far as words tell. A type that is not ours must at
    /// least be used somewhere.
    fn has(&self, of: &str, item: &str) -> bool {
        match self.of_type.get(of) {
            Some(words) => words.contains(item),
            None => of == "Self" || self.words.contains(of) || FOREIGN_TYPES.contains(&of),
        }
    }
}

/// The types that code defines, or has implementations of.
fn types_of(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut before = "";
    for word in words(code) {
        if ["struct", "enum", "trait", "union", "type"].contains(&before) {
            found.insert(word.to_owned());
        }
        before = word;
    }
    for (at, _) in code.match_indices("impl") {
        let head = &code[at..];
        let head = &head[..head.find('{').unwrap_or(head.len())];
        found.extend(words(head).map(str::to_owned));
    }
    found
}

/// What comments cite and is not there.
fn wrong_citations(files: &[Source], paths: &[String]) -> Vec<String> {
    let items = Items::of(files);
    let mut wrong = Vec::new();
    // Of scripts and manifests only paths are checked.
    for file in files.iter().filter(|file| !file.path.ends_with(".rs")) {
        for (at, line) in file.text.lines().enumerate().filter(|(_, line)| line.starts_with('#')) {
            for cited in cited(line).filter(|cited| is_path(cited) && !has_path(paths, cited)) {
                wrong.push(format!("{}:{}: `{cited}`", file.path, at + 1));
            }
        }
    }
    for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
        for Comment { line, text, .. } in comments(&file.text) {
            for cited in cited(&text) {
                let is_wrong = if is_path(cited) {
                    !has_path(paths, cited)
                } else if let Some((of, item)) = type_and_item(cited) {
                    !items.has(of, item)
                } else if let Some((module, item)) = module_and_item(cited, &items) {
                    !items.of_module[module].contains(item)
                } else {
                    false
                };
                if is_wrong {
                    wrong.push(format!("{}:{line}: `{cited}`", file.path));
                }
            }
        }
    }
    wrong
}

/// Where a link of a document leads, from the workspace; nothing if it leads elsewhere.
fn target_of(document: &str, link: &str) -> Option<String> {
    let link = link.split('#').next().unwrap_or(link);
    if link.is_empty() || link.contains("://") {
        return None;
    }
    let mut parts: Vec<&str> = document.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            ".." => _ = parts.pop(),
            "." => {}
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// What a document links to, or names as a path in backticks, and is not there.
fn wrong_links(document: &Source, paths: &[String]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (at, line) in document.text.lines().enumerate() {
        let mut note = |what: &str| wrong.push(format!("{}:{}: {what}", document.path, at + 1));
        let links = line.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
        for (link, _) in links {
            let is_there = |target: String| {
                let below = format!("{target}/");
                paths.iter().any(|path| *path == target || path.starts_with(&below))
            };
            if target_of(&document.path, link).is_some_and(|target| !is_there(target)) {
                note(link);
            }
        }
        for cited in cited(line).filter(|cited| is_path(cited) && !has_path(paths, cited)) {
            note(cited);
        }
    }
    wrong
}

/// The items of types that a document names in backticks and that are not there.
fn wrong_items(document: &Source, items: &Items) -> Vec<String> {
    let lines = document.text.lines().enumerate();
    let cited = lines.flat_map(|(at, line)| cited(line).map(move |cited| (at + 1, cited)));
    let is_wrong =
        |cited: &str| type_and_item(cited).is_some_and(|(of, item)| !items.has(of, item));
    cited
        .filter(|(_, cited)| is_wrong(cited))
        .map(|(line, cited)| format!("{}:{line}: `{cited}`", document.path))
        .collect()
}

/// The paths of all files, from the workspace.
fn all_paths() -> Vec<String> {
    let root = workspace();
    let mut paths = Vec::new();
    for directory in ["backend", "domains", "guest-tests", "scripts", "findings"] {
        walk(&root.join(directory), &mut paths);
    }
    for entry in std::fs::read_dir(&root).expect("the workspace") {
        paths.extend(entry.map(|entry| entry.path()).ok().filter(|path| path.is_file()));
    }
    let relative = |path: &std::path::PathBuf| {
        path.strip_prefix(&root).expect("in the workspace").display().to_string()
    };
    paths.iter().map(relative).collect()
}

#[test]
fn what_documents_link_to_exists() {
    let paths = all_paths();
    let documents: Vec<_> = paths.iter().filter(|path| path.ends_with(".md")).collect();
    assert!(documents.len() > 30, "hardly any document was found: {documents:?}");
    let read = |path: &String| {
        std::fs::read_to_string(workspace().join(path)).expect("a document in UTF-8")
    };
    let items = Items::of(&sources());
    let wrong = documents
        .into_iter()
        .flat_map(|path| {
            let document = Source { path: path.clone(), text: read(path) };
            let mut wrong = wrong_links(&document, &paths);
            // What was decided once names what was there then.
            if !path.contains("/decisions/") {
                wrong.extend(wrong_items(&document, &items));
            }
            wrong
        })
        .collect::<Vec<_>>();
    assert!(wrong.is_empty(), "documents name what is not there:\n{}", wrong.join("\n"));
}

#[test]
fn a_link_to_nothing_is_found() {
    let paths = ["backend/A.md", "backend/a/b.rs", "README.md"].map(str::to_owned);
    let wrong = |text: &str| {
        wrong_links(&Source { path: "backend/A.md".into(), text: text.into() }, &paths)
    };
    for good in [
        "[x](../README.md), [y](a/b.rs#L1) and [z](a), [here](#there), [there](https://x.y/z)",
        "`backend/a/b.rs`, `b.rs`, `backend/a/` and `/etc/x`",
    ] {
        assert_eq!(wrong(good), Vec::<String>::new(), "{good}");
    }
    let code = Source { path: "a.rs".into(), text: "struct Thing { field: u8 }".into() };
    let document = |text: &str| Source { path: "A.md".into(), text: text.into() };
    let items = Items::of(&[code]);
    assert_eq!(wrong_items(&document("`Thing::field`, `a::b`"), &items), [""; 0]);
    assert_eq!(wrong_items(&document("`Thing::gone`"), &items).len(), 1);
    for bad in ["[x](README.md)", "[x](../a/b.rs)", "see `backend/b`", "`a/c.rs`", "[x](c.md#d)"] {
        assert_eq!(wrong(bad).len(), 1, "{bad}");
    }
}

#[test]
fn what_comments_cite_exists() {
    let paths = all_paths();
    let wrong = wrong_citations(&sources(), &paths);
    assert!(wrong.is_empty(), "comments name what is not there:\n{}", wrong.join("\n"));
}

#[test]
fn a_citation_of_nothing_is_found() {
    let code = "/// A thing.\npub struct Thing { field: u8 }\n\
                impl Thing { fn make(x: std::sync::Arc<u8>) {} const LIMIT: u8 = 1; }\n";
    let paths = ["backend/a/src/thing.rs".to_owned(), "scripts/run".to_owned()];
    let wrong = |comment: &str| {
        let text = format!("{comment}\n{code}");
        wrong_citations(&[Source { path: "backend/a/src/thing.rs".into(), text }], &paths)
    };
    for good in [
        "// See `thing.rs`, `a/src/thing.rs`, `backend/a`, `backend/a/src/` and `scripts/run`.",
        "// See `Thing::make`, `Thing::make()`, `crate::Thing::LIMIT`, `Thing::field`.",
        "// See `Arc::strong_count` and `virtio-blk`, `a/b`, `std::mem::forget`, `u64::MAX`.",
        "/* `Thing::make` and `thing::Thing` */",
        "const X: &str = \"// `Thing::gone`\";",
    ] {
        assert_eq!(wrong(good), Vec::<String>::new(), "{good}");
    }
    for bad in [
        "// See `gone.rs`.",
        "// See `b/thing.rs`.",
        "//! See `backend/b`.",
        "// See `scripts/walk`.",
        "/// See `Thing::gone`.",
        "/// See [`Thing::gone`] here.",
        "// See `Thing::gone()`.",
        "/* See `Gone::make`. */",
        "// See `thing::Other`.",
        "// See `thing::other()`.",
    ] {
        assert_eq!(wrong(bad).len(), 1, "{bad}");
    }
    let script = |text: &str| Source { path: "scripts/run".into(), text: text.into() };
    assert_eq!(wrong_citations(&[script("# See `scripts/run`.")], &paths), [""; 0]);
    assert_eq!(wrong_citations(&[script("echo `scripts/walk`")], &paths), [""; 0]);
    assert_eq!(wrong_citations(&[script("# See `scripts/walk`.")], &paths).len(), 1);
}
