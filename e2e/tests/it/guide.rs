//! The guide in `deploy/guide`: its recipes have the verdicts that it states, its commands and links exist, and its reference is
//! that of the code.

use std::path::{Path, PathBuf};

mod commands;
mod cookbook;
mod reference;
mod values;

fn guide() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/guide")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The pages, by file name.
fn pages() -> Vec<(String, String)> {
    let files = std::fs::read_dir(guide()).expect("the guide").map(|it| it.expect("an entry").path());
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    let mut pages: Vec<(String, String)> = files.map(|path| (name(&path), read(&path))).collect();
    pages.sort();
    pages
}

#[test]
fn links_of_the_guide_lead_to_files() {
    let mut links = 0;
    for (page, text) in pages() {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if link.starts_with("http") || file.is_empty() {
                continue;
            }
            links += 1;
            assert!(guide().join(file).exists(), "{page}: {link} does not exist");
        }
    }
    assert!(links > 8, "{links} links");
}

/// The last column of the table names the tests that show each row.
#[test]
fn failures_of_the_guide_have_tests() {
    let text = read(&guide().join("failures.md"));
    let rows =
        text.lines().skip_while(|line| !line.starts_with("|---")).skip(1).take_while(|line| line.starts_with('|'));
    let sources = sources(&guide().join("../.."));
    let mut count = 0;
    for row in rows {
        let column = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let names: Vec<&str> = column.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "no test: {row}");
        for name in names {
            let function = format!("fn {name}(");
            assert!(sources.iter().any(|source| source.contains(&function)), "test {name} does not exist: {row}");
        }
        count += 1;
    }
    assert!(count > 10, "{count} rows");
}

/// The text of the test files of all crates.
fn sources(folder: &Path) -> Vec<String> {
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").map(|it| it.expect("an entry")) {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let is_source = path.extension().is_some_and(|it| it == "rs");
        if entry.file_type().is_ok_and(|it| it.is_dir()) && name != "target" && !name.starts_with('.') {
            sources.extend(self::sources(&path));
        } else if is_source && (path.components().any(|it| it.as_os_str() == "tests") || name.contains("tests")) {
            sources.push(read(&path));
        }
    }
    sources
}
