//! The reference: the fields of the custom resources, from the CustomResourceDefinitions, and the commands, from their help.
//!
//! `cargo xtask guide` writes it: it runs this test with `HANSE_UPDATE_GUIDE` set.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Map, Value};

use super::{guide, read};
use crate::english;
use crate::system::programs;

const UPDATE: &str = "HANSE_UPDATE_GUIDE";
const NOTE: &str = "<!-- Written by `cargo xtask guide`. -->\n\n";

/// The kinds, in the order in which a reader needs them.
const KINDS: [&str; 8] = [
    "clustersets",
    "memberclusters",
    "clusterjointokens",
    "tiers",
    "federatednetworkpolicies",
    "stagedfederatednetworkpolicies",
    "federatednetworksets",
    "policyapprovals",
];

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// One line of a table: `|` ends a cell, and is written otherwise.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|").replace('<', "&lt;")
}

/// The type of a field, and the constraints that a reader must know.
fn kind(schema: &Value) -> String {
    if let Some(values) = schema["enum"].as_array() {
        return values
            .iter()
            .map(|it| format!("`{}`", it.to_string().trim_matches('"')))
            .collect::<Vec<_>>()
            .join(", ");
    }
    let name = match text(schema, "type") {
        "array" => format!("list of {}", kind(&schema["items"])),
        "object" if schema["additionalProperties"].is_object() => {
            format!("map of {}", kind(&schema["additionalProperties"]))
        }
        "" if schema["x-kubernetes-int-or-string"] == true => "integer or string".to_owned(),
        other => other.to_owned(),
    };
    match (schema["minimum"].as_f64(), schema["maximum"].as_f64()) {
        // The largest number that JSON can have is not a limit of the field.
        (Some(least), Some(most)) if most < 1e12 => format!("{name}, {least} to {most}"),
        _ => name,
    }
}

/// A row for each field, below `path`, with those of objects and of lists of objects.
fn fields(rows: &mut String, path: &str, schema: &Value) {
    let empty = Map::new();
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, field) in schema["properties"].as_object().unwrap_or(&empty) {
        let below = format!("{path}{name}");
        let mark = if required.contains(&name.as_str()) { " (required)" } else { "" };
        let description = cell(text(field, "description"));
        writeln!(rows, "| `{below}`{mark} | {} | {description} |", kind(field)).expect("text");
        let (inner, below) = match text(field, "type") {
            "array" => (&field["items"], format!("{below}[].")),
            "object" if field["additionalProperties"].is_object() => {
                (&field["additionalProperties"], format!("{below}.*."))
            }
            _ => (field, format!("{below}.")),
        };
        fields(rows, &below, inner);
    }
}

fn resources() -> String {
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    assert_eq!(
        std::fs::read_dir(&crds).expect("the definitions").count(),
        KINDS.len(),
        "each kind is in the reference"
    );
    let mut page = format!(
        "{NOTE}# Reference: custom resources\n\nThe kinds of `hanse.dev/v1alpha1`. All of them are cluster-scoped. `kubectl explain` shows the same \
         descriptions.\n"
    );
    for plural in KINDS {
        let definition: Value =
            serde_yaml_ng::from_str(&read(&crds.join(format!("{plural}.hanse.dev.yaml")))).expect("YAML");
        let names = &definition["spec"]["names"];
        let version = &definition["spec"]["versions"][0];
        let schema = &version["schema"]["openAPIV3Schema"];
        let short: Vec<String> = names["shortNames"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|it| format!("`{}`", it.as_str().unwrap_or_default()))
            .collect();
        let short = if short.is_empty() { String::new() } else { format!(" Short name: {}.", short.join(", ")) };
        write!(page, "\n## {}\n\n{}{short}\n", text(names, "kind"), text(schema, "description")).expect("text");
        // The rules of the two kinds of policy are the same.
        for part in ["spec", "status"] {
            let mut rows = String::new();
            fields(&mut rows, &format!("{part}."), &schema["properties"][part]);
            if !rows.is_empty() {
                write!(page, "\n| field | type | meaning |\n|---|---|---|\n{rows}").expect("text");
            }
        }
        let columns = version["additionalPrinterColumns"].as_array().into_iter().flatten();
        let columns: Vec<String> =
            columns.map(|it| format!("`{}` ({})", text(it, "name"), text(it, "jsonPath"))).collect();
        if !columns.is_empty() {
            write!(page, "\nColumns of `kubectl get`: {}.\n", cell(&columns.join(", "))).expect("text");
        }
    }
    page
}

fn commands() -> String {
    let mut page = format!("{NOTE}# Reference: commands\n\nThe help of the four programs and of their commands.\n");
    for program in ["hanse", "hanse-hub", "hanse-member", "hanse-agent"] {
        let mut texts = Vec::new();
        english::help(&programs().join(program), &[], &mut texts);
        texts.sort();
        for (title, text) in texts {
            let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
            write!(page, "\n## {title}\n\n```text\n{}\n```\n", lines.join("\n").trim_end()).expect("text");
        }
    }
    page
}

#[test]
fn reference_is_that_of_the_code() {
    for (name, page) in [("reference-resources.md", resources()), ("reference-commands.md", commands())] {
        let path = guide().join(name);
        if std::env::var_os(UPDATE).is_some() {
            std::fs::write(&path, &page).expect("room");
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        let different = written.lines().zip(page.lines()).position(|(a, b)| a != b);
        assert!(written == page, "{name} differs from the code at line {different:?}: run cargo xtask guide");
    }
}
