//! No files of a crate import each other: what two need is in a third.
//!
//! Read from the sources: what `use` names, resolved to the file that it leads to. The checker is a
//! pure function over plain data, and a test shows it circles.

mod workspace;

use std::collections::{BTreeMap, BTreeSet};

use workspace::{code_only, sources};

/// A crate's files as modules: the path in the crate (`""` for its root) and the source.
type Modules = BTreeMap<String, String>;

/// The module that a file below `src` is, by its name or as the `mod` of a directory.
fn module_of(file: &str) -> String {
    let path = file.strip_suffix(".rs").unwrap_or(file);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if ["lib", "main", "mod"].contains(&path) { String::new() } else { path.replace('/', "::") }
}

/// Code without its unit tests: what stands in a module under `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        let (before, tests) = rest.split_at(at);
        kept.push_str(before);
        let item = tests["#[cfg(test)]".len()..].trim_start();
        let end = match (item.find('{'), item.find(';')) {
            (Some(open), semicolon) if semicolon.is_none_or(|at| open < at) => {
                open + block(&item[open..])
            }
            (_, Some(semicolon)) => semicolon + 1,
            _ => item.len(),
        };
        rest = &item[end..];
    }
    kept + rest
}

/// Length of a block in braces.
fn block(code: &str) -> usize {
    let mut depth = 0;
    for (at, c) in code.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    code.len()
}

/// All paths that a `use` names, its groups taken apart.
fn paths_of_use(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        return vec![tree.split(" as ").next().unwrap_or(tree).trim().to_owned()];
    };
    let (prefix, group) = tree.split_at(open);
    let group = group.trim_start_matches('{').trim_end().trim_end_matches('}');
    let mut depth = 0;
    let parts = group.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    let parts = parts.filter(|part| !part.trim().is_empty());
    parts.flat_map(paths_of_use).map(|path| format!("{}{path}", prefix.trim())).collect()
}

/// What the code of a file imports: each path, from the crate's root.
fn imported(module: &str, code: &str) -> Vec<Vec<String>> {
    let code = without_tests(&code_only(code));
    let mut found = Vec::new();
    let starts = code
        .match_indices("use ")
        .filter(|(at, _)| !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'));
    for (at, word) in starts {
        let tree = &code[at + word.len()..];
        let tree = &tree[..tree.find(';').unwrap_or(tree.len())];
        for path in paths_of_use(&tree.split_whitespace().collect::<Vec<_>>().join(" ")) {
            let mut from: Vec<&str> = module.split("::").filter(|part| !part.is_empty()).collect();
            let mut names = path.split("::").map(str::trim).peekable();
            match names.peek() {
                Some(&"crate") => from.clear(),
                Some(&"self") => {}
                Some(&"super") => {
                    from.pop();
                }
                _ => continue,
            }
            names.next();
            while names.next_if(|name| *name == "super").is_some() {
                from.pop();
            }
            found.push(from.into_iter().chain(names).map(str::to_owned).collect());
        }
    }
    found
}

/// The modules of its crate that a module imports, where they are files of their own. Of what the
/// root has, only names count that it has from a module: the root knows its modules, and they share
/// its types.
fn imports(module: &str, code: &str, modules: &Modules) -> BTreeSet<String> {
    let file_of = |path: &[String]| {
        // The longest beginning that is a file is what is imported.
        let mut beginnings = (1..=path.len()).rev().map(|length| path[..length].join("::"));
        beginnings.find(|beginning| modules.contains_key(beginning))
    };
    let root = modules.get("").map_or(Vec::new(), |code| {
        // There, `a::A` is a path as `self::a::A` is one.
        imported("", &code.replace(" use ", " use self::"))
    });
    let from_root = |name: &String| {
        let named = root.iter().find(|path| path.len() > 1 && path.last() == Some(name));
        named.and_then(|path| file_of(path))
    };
    let paths = imported(module, code).into_iter();
    let targets =
        paths.filter_map(|path| file_of(&path).or_else(|| path.first().and_then(from_root)));
    targets.filter(|target| target != module).collect()
}

/// The circles of modules that import each other, each sorted.
fn circles(modules: &Modules) -> Vec<Vec<String>> {
    let direct: BTreeMap<&String, BTreeSet<String>> =
        modules.iter().map(|(name, code)| (name, imports(name, code, modules))).collect();
    let reach = |from: &String| {
        let mut seen = BTreeSet::new();
        let mut next = vec![from.clone()];
        while let Some(module) = next.pop() {
            next.extend(direct[&module].iter().filter(|to| seen.insert((*to).clone())).cloned());
        }
        seen
    };
    let reached: BTreeMap<&String, BTreeSet<String>> =
        modules.keys().map(|name| (name, reach(name))).collect();
    let circle_of = |name: &String| {
        let others = modules
            .keys()
            .filter(|other| reached[name].contains(*other) && reached[*other].contains(name));
        others.cloned().collect::<Vec<_>>()
    };
    let found: BTreeSet<_> = modules.keys().map(circle_of).filter(|c| !c.is_empty()).collect();
    found.into_iter().collect()
}

#[test]
fn no_files_import_each_other() {
    let mut crates: BTreeMap<String, Modules> = BTreeMap::new();
    for file in sources() {
        let product = ["backend/", "domains/"].iter().any(|top| file.path.starts_with(top));
        let is_test = file.path.ends_with("/tests.rs") || file.path.contains("/tests/");
        if let Some((room, path)) = file.path.split_once("/src/")
            && product
            && !is_test
        {
            let modules = crates.entry(room.to_owned()).or_default();
            let text = file.text;
            modules.entry(module_of(path)).and_modify(|code| code.push_str(&text)).or_insert(text);
        }
    }
    assert!(crates.len() > 10, "hardly any crate was found");
    let wrong: Vec<String> = crates
        .iter()
        .flat_map(|(room, modules)| {
            circles(modules).into_iter().map(move |circle| format!("{room}: {}", circle.join(", ")))
        })
        .collect();
    assert!(wrong.is_empty(), "files that import each other:\n{}", wrong.join("\n"));
}

#[test]
fn a_circle_is_found() {
    let of = |files: &[(&str, &str)]| {
        circles(&files.iter().map(|(file, code)| (module_of(file), (*code).into())).collect())
    };
    let nothing: Vec<Vec<String>> = Vec::new();
    let one = ("a.rs", "use crate::b::B;");
    assert_eq!(of(&[("lib.rs", "mod a; mod b;"), one, ("b.rs", "")]), nothing);
    for back in [
        "use crate::a::A;",
        "use super::a;",
        "pub(crate) use crate::{c::C, a::{self, A}};",
        "fn f() { use crate::a::A as X; }",
        "#[cfg(test)] mod tests { use super::*; } use crate::a::A;",
    ] {
        let found = of(&[("lib.rs", ""), one, ("b.rs", back), ("c.rs", "")]);
        assert_eq!(found, [["a", "b"]], "{back}");
    }
    for other in [
        "// use crate::a::A;",
        "use crate::A;",
        "use a::A;",
        "use crate::c::a;",
        "const X: &str = \"use crate::a::A;\";",
        "#[cfg(test)] mod tests { use crate::a::A; }",
        "#[cfg(test)] use crate::a::A;",
    ] {
        assert_eq!(of(&[("lib.rs", ""), one, ("b.rs", other), ("c.rs", "")]), nothing, "{other}");
    }
    let three =
        [("a.rs", "use crate::b::x;"), ("b.rs", "use crate::c::x;"), ("c.rs", "use crate::a;")];
    assert_eq!(of(&three), [["a", "b", "c"]]);
    // A parent in a file of its own, and its child.
    let family = [("a/mod.rs", "mod b; use self::b::x;"), ("a/b.rs", "use super::Y;")];
    assert_eq!(of(&family), [["a", "a::b"]]);
}
