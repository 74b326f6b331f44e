//! The workspace's files, and Rust sources taken apart into code and comments.
#![allow(dead_code, unreachable_pub)]

use std::fs;
use std::path::{Path, PathBuf};

/// The workspace's directory.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace")
}

/// A file of the workspace.
#[derive(Debug, Clone)]
pub struct Source {
    /// Relative to the workspace.
    pub path: String,
    pub text: String,
}

/// All files that are ours to write: Rust, shell, TOML, and what is in `scripts`.
pub fn sources() -> Vec<Source> {
    let root = workspace();
    let mut found = Vec::new();
    for directory in ["backend", "domains", "guest-tests", "scripts", "findings"] {
        walk(&root.join(directory), &mut found);
    }
    found.push(root.join("Cargo.toml"));
    let is_ours = |path: &Path| {
        let known = ["rs", "sh", "toml"].iter().any(|end| path.extension() == Some(end.as_ref()));
        known || path.parent() == Some(&root.join("scripts"))
    };
    let mut sources: Vec<Source> = found
        .into_iter()
        .filter(|path| is_ours(path))
        .map(|path| Source {
            text: fs::read_to_string(&path).expect("a source in UTF-8"),
            path: path.strip_prefix(&root).expect("in the workspace").display().to_string(),
        })
        .collect();
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(sources.len() > 100, "hardly any source was found");
    sources
}

/// All files below a directory, but not what was built.
pub fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if !path.is_dir() {
            found.push(path);
        } else if path.file_name() != Some("target".as_ref()) {
            walk(&path, found);
        }
    }
}

/// A comment of one line, or a line of one that is longer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comment {
    /// Counted from 1.
    pub line: usize,
    /// With its marks.
    pub text: String,
    /// The column in which it ends: how wide the line is.
    pub width: usize,
}

/// Rust code without its comments, strings and characters.
pub fn code_only(source: &str) -> String {
    take_apart(source).0
}

/// The comments of a Rust source.
pub fn comments(source: &str) -> Vec<Comment> {
    take_apart(source).1
}

/// Rust code with a space for each comment, string and character; and the comments.
fn take_apart(source: &str) -> (String, Vec<Comment>) {
    let mut code = String::with_capacity(source.len());
    let mut comments = Vec::new();
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let after_word = code.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let comment = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else {
            0
        };
        if comment > 0 {
            add_comment(source, source.len() - rest.len(), comment, &mut comments);
        }
        let skip = if comment > 0 {
            comment
        } else if let Some(length) = raw_string(rest).filter(|_| !after_word) {
            length
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' {
            character(rest)
        } else {
            0
        };
        if skip == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.push(' ');
            rest = &rest[skip..];
        }
    }
    (code, comments)
}

/// Notes the comment of `length` bytes at `at`, line by line.
fn add_comment(source: &str, at: usize, length: usize, comments: &mut Vec<Comment>) {
    let mut line = source[..at].matches('\n').count() + 1;
    let begin = source[..at].rfind('\n').map_or(0, |end| end + 1);
    let mut before = source[begin..at].chars().count();
    for text in source[at..at + length].split('\n') {
        comments.push(Comment { line, text: text.into(), width: before + text.chars().count() });
        (line, before) = (line + 1, 0);
    }
}

/// Length of a block comment; they nest.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let here = &text.as_bytes()[at..];
        let step = match here {
            [b'/', b'*', ..] => 1,
            [b'*', b'/', ..] => -1,
            _ => 0,
        };
        depth += step;
        at += if step == 0 { 1 } else { 2 };
        if depth == 0 {
            break;
        }
    }
    at
}

/// Length of a raw string (`r"`, `r#"`, `br"`), when one starts here.
fn raw_string(text: &str) -> Option<usize> {
    let body = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let inner = body[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = inner.find(&end).map_or(inner.len(), |at| at + end.len());
    Some(text.len() - inner.len() + length)
}

/// Length of a text in quotes with escapes.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Length of a character, or 0 when the quote starts a lifetime.
fn character(text: &str) -> usize {
    let mut following = text.chars().skip(1);
    match (following.next(), following.next()) {
        (Some('\\'), _) | (Some(_), Some('\'')) => quoted(text, '\''),
        _ => 0,
    }
}
