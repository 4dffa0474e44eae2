//! `hanse policy selector`.

use serde_json::{Value, json};

use crate::offline::{hanse, text};

#[test]
fn selector_has_a_canonical_form_and_an_id() {
    let root = tempfile::tempdir().expect("temporary directory");
    let labels = root.path().join("labels.jsonl");
    std::fs::write(&labels, "{\"a\":\"b\"}\n{}\n{\"a\":\"c\",\"x\":\"\"}\n").expect("labels");
    let output = hanse(&["policy", "selector", "--labels", text(&labels), "-o", "json", "--", "! a=='b'"]);
    assert!(output.status.success(), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["canonical"], "!a == \"b\"");
    assert_eq!(answer["results"], json!([false, true, true]));
    assert!(answer["id"].as_str().is_some_and(|id| id.starts_with("s:") && id.len() == 40), "{answer}");
}

#[test]
fn results_have_the_order_of_the_lines() {
    let root = tempfile::tempdir().expect("temporary directory");
    let labels = root.path().join("labels.jsonl");
    let run = |content: &str| {
        std::fs::write(&labels, content).expect("labels");
        hanse(&["policy", "selector", "--labels", text(&labels), "-o", "json", "--", "has(a)"])
    };
    let output = run("\u{feff}{\"a\":\"b\"}\r\n {}\n\n \n");
    assert!(output.status.success(), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["results"], json!([true, false]));
    for (content, expected) in [
        ("{}\n\n \n{}\n", "labels.jsonl:2: blank line"),
        ("\u{feff}\n{}\n", "labels.jsonl:1: blank line"),
        ("{}\n{\"a\":1}\n", "labels.jsonl:2: column "),
    ] {
        let output = run(content);
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(expected) && !stderr.contains("at line"), "{stderr}");
    }
}

#[test]
fn an_empty_selector_is_all() {
    let output = hanse(&["policy", "selector", "-o", "json", "--", ""]);
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["id"], "s:5y5I3VdRZfDU01O--xXAPx2yxCQQqMf0M6IWug");
}

#[test]
fn a_malformed_selector_exits_2_and_names_the_column() {
    let output = hanse(&["policy", "selector", "-o", "json", "--", "a == 'b' &"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("column 10"), "{output:?}");
}

#[test]
fn a_long_selector_is_shown_around_its_error() {
    let deep = format!("{}has(a){}", "(".repeat(60_000), ")".repeat(60_000));
    let output = hanse(&["policy", "selector", "--", &deep]);
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.len() < 1_000, "{} bytes", stderr.len());
    let lines: Vec<&str> = stderr.lines().collect();
    let column = lines[2].chars().position(|it| it == '^').expect("a caret");
    assert!(lines[1].chars().nth(column) == Some('('), "{stderr}");
    let output = hanse(&["policy", "selector", "--", "a == 'b' &"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("\n  a == 'b' &\n           ^\n"), "{output:?}");
}
