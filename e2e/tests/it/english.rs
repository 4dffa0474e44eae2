//! The words that `CONTRIBUTING.md` lists do not appear in texts that people read: help, messages, doc comments, documents.
//!
//! Checked are doc comments of all Rust files, string literals of several words outside tests, comments of `.proto` files,
//! Markdown, and the help of the four programs. Code spans and code blocks are not text.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::system::programs;

/// Programs whose help still contains listed words, each with the number of findings, which may only shrink.
const UNCLEAN_HELP: &[(&str, usize)] = &[];

/// Values of JSON that contain a listed word. Programs read them.
const VALUES: &[&str] = &["never heard"];

/// Words and phrases of the first column of the table in `CONTRIBUTING.md`.
fn words() -> Vec<String> {
    let text = read(&root().join("CONTRIBUTING.md"));
    let rows = text.lines().skip_while(|line| !line.starts_with("| do not write")).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|')).map(|line| line.split('|').nth(1).unwrap_or_default());
    let words: Vec<String> = rows.flat_map(|cell| cell.split(',')).map(|word| word.trim().to_owned()).collect();
    assert!(words.len() > 20 && words.iter().all(|word| !word.is_empty()), "{words:?}");
    words
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A piece of text, with the line on which it begins.
type Piece = (usize, String);

/// What is found, as `path:line: word: text`.
fn check(path: &str, pieces: &[Piece], words: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for (line, text) in pieces {
        let lower = text.to_lowercase();
        for word in words.iter().filter(|word| contains(&lower, word)) {
            found.push(format!("{path}:{line}: {word:?}: {}", text.trim()));
        }
    }
    found
}

/// Whether `text` has `word` as a word of its own, and not as part of a usual phrase.
fn contains(text: &str, word: &str) -> bool {
    let is_part = |it: Option<char>| it.is_some_and(|it| it.is_alphanumeric() || it == '_' || it == '-');
    text.match_indices(word).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + word.len()..]);
        let is_answer = || !after.starts_with(' ') || after.starts_with(" longer");
        let is_usual = word.ends_with(" no") && (before.ends_with("there ") || is_answer());
        !is_part(before.chars().next_back()) && !is_part(after.chars().next()) && !is_usual
    })
}

/// Text without code spans, and with one space between words.
fn prose(text: &str) -> String {
    let outside = text.split('`').step_by(2);
    outside.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ")
}

/// Text of a literal, without the arguments of a format string.
fn message(text: &str) -> String {
    let parts = text.split('{').enumerate();
    let parts = parts.map(|(at, part)| if at == 0 { part } else { part.split_once('}').map_or("", |(_, rest)| rest) });
    prose(&parts.collect::<Vec<_>>().join("…"))
}

/// Doc comments, and string literals outside test modules. `messages`: whether literals are wanted.
fn rust(source: &str, messages: bool) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut rest, mut line) = (source, 1);
    let mut before: Option<char> = None;
    let mut messages = messages;
    while let Some(next) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            let length = rest.find('\n').unwrap_or(rest.len());
            let comment = &rest[..length];
            if let Some(text) = comment.strip_prefix("///").or_else(|| comment.strip_prefix("//!")) {
                pieces.push((line, prose(text)));
            }
            length
        } else if rest.starts_with("#[cfg(test)]") {
            messages = false;
            1
        } else if let Some((hashes, open)) = raw_string(rest, before) {
            let end = format!("\"{}", "#".repeat(hashes));
            let length = rest[open..].find(&end).map_or(rest.len(), |at| open + at + end.len());
            if messages {
                pieces.push((line, message(&rest[open..length.saturating_sub(end.len())])));
            }
            length
        } else if next == '"' {
            let length = string(rest);
            if messages {
                let text = rest[1..length.saturating_sub(1)].replace("\\n", " ").replace('\\', " ");
                pieces.push((line, message(&text)));
            }
            length
        } else if let Some(length) = character(rest) {
            length
        } else {
            next.len_utf8()
        };
        line += rest[..length].matches('\n').count();
        before = rest[..length].chars().next_back();
        rest = &rest[length..];
    }
    // A single word is a key, a name or a value.
    pieces.retain(|(_, text)| text.contains(' ') && !VALUES.contains(&text.as_str()));
    pieces
}

/// The number of hashes of a raw string that begins here, and where its text begins.
fn raw_string(rest: &str, before: Option<char>) -> Option<(usize, usize)> {
    if before.is_some_and(|it| it.is_alphanumeric() || it == '_') {
        return None;
    }
    let after = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then(|| (hashes, rest.len() - after.len() + hashes + 1))
}

/// The length of the string literal that begins here, with its quotes.
fn string(rest: &str) -> usize {
    let mut escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The length of a character literal that begins here; a lifetime is none.
fn character(rest: &str) -> Option<usize> {
    let text = rest.strip_prefix('\'')?;
    if let Some(escape) = text.strip_prefix('\\') {
        // The escaped character itself may be a quote.
        let skipped = escape.chars().next()?.len_utf8();
        return Some(2 + skipped + escape[skipped..].find('\'')? + 1);
    }
    let length = text.chars().next()?.len_utf8();
    text[length..].starts_with('\'').then_some(length + 2)
}

/// Paragraphs of Markdown, without code blocks, and without the table of words itself.
fn markdown(source: &str) -> Vec<Piece> {
    let (mut fenced, mut listed) = (false, false);
    let mut pieces = Vec::new();
    for (at, line) in source.lines().enumerate() {
        fenced ^= line.trim_start().starts_with("```");
        listed = line.starts_with("| do not write") || listed && line.starts_with('|');
        if !fenced && !listed && !line.starts_with("    ") {
            pieces.push((at + 1, prose(line)));
        }
    }
    pieces
}

fn proto(source: &str) -> Vec<Piece> {
    let comments = source.lines().enumerate().filter_map(|(at, line)| Some((at + 1, prose(line.split_once("//")?.1))));
    comments.collect()
}

/// All files of the repository with text, by their paths in it.
fn files() -> Vec<(String, PathBuf)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for entry in entries.map(|entry| entry.expect("an entry")) {
            let (path, name) = (entry.path(), entry.file_name());
            // Build output, and files that are not part of the repository.
            if name == "target" || name.to_string_lossy().starts_with('.') {
                continue;
            }
            match entry.file_type().expect("a type").is_dir() {
                true => walk(&path, found),
                false => found.push(path),
            }
        }
    }
    let root = root();
    let mut found = Vec::new();
    walk(&root, &mut found);
    let relative = |path: PathBuf| {
        let name = path.strip_prefix(&root).expect("below the root").to_string_lossy().into_owned();
        (name, path)
    };
    let mut files: Vec<(String, PathBuf)> = found.into_iter().map(relative).collect();
    files.sort();
    files
}

/// Test code has strings that no user reads.
fn is_test(path: &str) -> bool {
    ["/tests/", "/benches/"].iter().any(|folder| path.contains(folder)) || path.ends_with("/tests.rs")
}

#[test]
fn texts_contain_no_listed_words() {
    let words = words();
    let mut found: Vec<String> = Vec::new();
    for (name, path) in files() {
        let extension = path.extension().and_then(|it| it.to_str()).unwrap_or_default();
        let pieces = match extension {
            "rs" => rust(&read(&path), !is_test(&name)),
            "md" => markdown(&read(&path)),
            "proto" => proto(&read(&path)),
            _ => continue,
        };
        found.extend(check(&name, &pieces, &words));
    }
    assert!(found.is_empty(), "see CONTRIBUTING.md for what to write instead:\n{}", found.join("\n"));
}

/// The help of a program and of all its subcommands.
pub fn help(program: &Path, arguments: &[String], texts: &mut Vec<(String, String)>) {
    let output = Command::new(program).args(arguments).arg("--help").output().expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("Usage:"), "{arguments:?}: {output:?}");
    let commands = text.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    for name in names.filter(|name| !name.is_empty() && *name != "help") {
        help(program, &[arguments, &[name.to_owned()]].concat(), texts);
    }
    let title = [&[program.file_name().expect("a name").to_string_lossy().into_owned()], arguments].concat();
    texts.push((title.join(" "), text));
}

#[test]
fn help_contains_no_listed_words() {
    let words = words();
    let mut commands = 0;
    for program in ["hanse", "hanse-hub", "hanse-member", "hanse-agent"] {
        let mut texts = Vec::new();
        help(&programs().join(program), &[], &mut texts);
        commands += texts.len();
        let found = texts.iter().flat_map(|(title, text)| check(title, &[(1, prose(text))], &words));
        let found: Vec<String> = found.collect();
        let most = UNCLEAN_HELP.iter().find(|(name, _)| *name == program).map_or(0, |(_, most)| *most);
        let text = found.join("\n");
        assert!(found.len() <= most, "{program}: see CONTRIBUTING.md for what to write instead:\n{text}");
    }
    assert!(commands > 40, "{commands} commands");
}

#[test]
fn only_texts_are_checked() {
    let words = ["told", "is no", "ask"].map(str::to_owned);
    let source = r##"
/// It is told `told`.
// A comment that is told.
fn told(told: &'static str) -> char {
    let _ = ("told", "x {told} y", 'a', '"', '\'', b'"');
    error!("the node is told");
    let _ = r#"a "raw" told string"#;
    format!("a line that \
             is told")
}
#[cfg(test)]
mod tests {
    /// Told as well.
    const TEXT: &str = "what a test told";
}
"##;
    let lines = |pieces: &[Piece]| check("x", pieces, &words).len();
    assert_eq!(
        check("x", &rust(source, true), &words),
        [
            r#"x:2: "told": It is told ."#,
            r#"x:6: "told": the node is told"#,
            r#"x:7: "told": a "raw" told string"#,
            r#"x:8: "told": a line that is told"#,
            r#"x:13: "told": Told as well."#,
        ]
    );
    assert_eq!(lines(&rust(source, false)), 2);
    assert_eq!(lines(&markdown("told\n    told\n```\ntold\n```\n`told` x\n| do not write |\n| told |\n")), 1);
    assert_eq!(lines(&proto("// told\nstring told = 1; // ask\n")), 2);
    for (text, expected) in [
        ("it is no file", true),
        ("there is no file", false),
        ("it is no longer there", false),
        ("the answer is no, or an error", false),
        ("task", false),
        ("untold", false),
        ("ask-hub", false),
        ("to ask.", true),
    ] {
        assert_eq!(words.iter().any(|word| contains(text, word)), expected, "{text}");
    }
}
