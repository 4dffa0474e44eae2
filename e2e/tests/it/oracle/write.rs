//! Random documents, in every style that YAML has.

use serde_json::{Value, json};

use crate::worlds::Random;

/// Plain scalars that mean something, or nearly.
const PLAIN: &[&str] = &[
    "~",
    "null",
    "Null",
    "NULL",
    "nULL",
    "true",
    "True",
    "yes",
    "Yes",
    "no",
    "on",
    "On",
    "off",
    "OFF",
    "y",
    "N",
    "yEs",
    "0",
    "-0",
    "+0",
    "7",
    "-7",
    "+7",
    "007",
    "-010",
    "08",
    "0o17",
    "0O7",
    "0x1F",
    "0XfF",
    "-0x10",
    "0b101",
    "-0b11",
    "0B1",
    "1_000",
    "1__0",
    "1_",
    "_1",
    "0x_f",
    "0b1_0",
    "1e3",
    "1E3",
    "1e+3",
    "1e-3",
    "8e1",
    "80.0",
    ".5",
    "5.",
    "-.5",
    "+.5e1",
    ".",
    "..",
    "+",
    "1.2.3",
    "1.5",
    "-0.0",
    "1e400",
    "1e-400",
    "1e21",
    "1e20",
    "123456789012345678901234567890",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775809",
    "190:20:30",
    "1:30",
    "2001-12-14",
    "2001-12-14t21:59:43.10-05:00",
    "2001-1-1 1:1:1",
    "0x",
    "0b",
    "0b2",
    "0xg",
    "1e",
    "e1",
    "0.1e1_0",
    "._5",
    "1._5",
    "=",
    "a",
    "b c",
    "a#b",
    "-a",
    "a'b",
    "é",
    "",
    "-",
    ".inf",
    "-.INF",
    ".nan",
    "+.inf",
    "<<",
    "a:b",
    "http://x/y#z",
    "a #b",
    "?a",
    ":a",
    "a, b",
    "[a",
    "a]",
    "{a",
    "'a",
    "\"a",
    "%a",
    "@a",
    "`a",
    "!a",
    "&a",
    "*a",
    "|",
    ">",
    "a: b",
    "a:",
    "\u{1f600}",
    "a\tb",
];

/// How many of them are a value of their own wherever they are written.
const WRITTEN_ANYWHERE: usize = 87;

const TAGS: &[&str] = &["!!str ", "!!int ", "!!float ", "!!bool ", "!!null ", "!x ", "! ", "!<tag:yaml.org,2002:str> "];

/// Words with blanks, breaks and indicators.
fn any_text(random: &mut Random) -> String {
    let parts =
        ["a", "b", " ", "  ", "\n", "\n\n", ":", ": ", "#", " #", "-", "- ", "'", "\"", "\\", "\t", "é", "{", ",", "]"];
    (0..random.below(8)).map(|_| random.pick(&parts)).collect()
}

/// A document of any value.
pub fn document(random: &mut Random) -> String {
    let mut writer = Writer { anchors: 0, random };
    let mut text = String::new();
    for number in 0..1 + writer.random.below(4) {
        let key = match writer.random.below(6) {
            0 => writer.plain(),
            1 => writer.quoted(),
            2 => "<<".to_owned(),
            _ => format!("k{number}"),
        };
        text.push_str(&key);
        text.push_str(writer.random.pick(&[":", ":", ":", ":", " :", ":\t"]));
        text.push_str(&writer.value(0));
    }
    if random.once_in(12) {
        text = text.replace('\n', "\r\n");
    }
    text
}

struct Writer<'r> {
    random: &'r mut Random,
    anchors: usize,
}

impl Writer<'_> {
    fn plain(&mut self) -> String {
        // What cannot be written everywhere comes last.
        let from = if self.random.once_in(12) { PLAIN } else { &PLAIN[..WRITTEN_ANYWHERE] };
        self.random.pick(from).to_owned()
    }

    fn quoted(&mut self) -> String {
        let text = any_text(self.random);
        match self.random.once_in(2) {
            true => format!("'{}'", text.replace('\'', "''")),
            false => {
                let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
                let escapes = ["", "", "\\x41", "\\u00e9", "\\n", "\\\n  ", "\\t", "\\_", "\\0"];
                format!("\"{escaped}{}\"", self.random.pick(&escapes))
            }
        }
    }

    fn properties(&mut self) -> String {
        let mut text = String::new();
        if self.random.once_in(10) {
            self.anchors += 1;
            text.push_str(&format!("&a{} ", self.anchors));
        }
        if self.random.once_in(12) {
            text.push_str(self.random.pick(TAGS));
        }
        text
    }

    /// What comes after `key:` or `-`, its line break included.
    fn value(&mut self, depth: usize) -> String {
        let indent = " ".repeat(2 * (depth + 1));
        let properties = self.properties();
        let choices = if depth > 3 { 5 } else { 9 };
        match self.random.below(choices) {
            0 | 1 => format!(" {properties}{}{}\n", self.plain(), self.random.pick(&["", "", " # c", "\t# c", " "])),
            2 => format!(" {properties}{}\n", self.quoted()),
            3 if self.anchors > 0 => format!(" *a{}\n", 1 + self.random.below(self.anchors)),
            3 => format!(" {properties}a\n{indent}b\n\n{indent}c\n"),
            4 => {
                let header = self.random.pick(&["|", ">", "|-", ">-", "|+", ">+", "|2", ">1-", "| # c"]);
                let lines = any_text(self.random);
                let lines: String = lines.lines().map(|line| format!("{indent}{line}\n")).collect();
                format!(" {properties}{header}\n{lines}")
            }
            5 => format!(" {properties}{}\n", self.flow(depth)),
            6 => {
                let own = if self.random.once_in(3) { " ".repeat(2 * depth) } else { indent };
                let items = 1 + self.random.below(3);
                let items: String = (0..items).map(|_| format!("{own}-{}", self.value(depth + 1))).collect();
                format!(" {properties}\n{items}")
            }
            _ => {
                let entries = 1 + self.random.below(3);
                let entries: String = (0..entries)
                    .map(|number| {
                        let key = if self.random.once_in(5) { self.plain() } else { format!("k{number}") };
                        let (mark, colon) =
                            if self.random.once_in(15) { ("? ", format!("\n{indent}:")) } else { ("", ":".to_owned()) };
                        format!("{indent}{mark}{key}{colon}{}", self.value(depth + 1))
                    })
                    .collect();
                format!(" {properties}\n{entries}")
            }
        }
    }

    fn flow(&mut self, depth: usize) -> String {
        let blank = |random: &mut Random| random.pick(&["", " ", "\n    ", "\t", "\n\t", " # c\n  ", "\n"]);
        let parts: Vec<String> = (0..self.random.below(4))
            .map(|_| {
                let value = match self.random.below(if depth > 3 { 2 } else { 4 }) {
                    0 => self.plain(),
                    1 => self.quoted(),
                    _ => self.flow(depth + 1),
                };
                let properties = self.properties();
                match self.random.below(3) {
                    0 => format!("{properties}{value}"),
                    1 => {
                        format!("k{}:{}{value}", self.random.below(9), self.random.pick(&[" ", " ", "\t", "\n  ", ""]))
                    }
                    _ => format!("\"k{}\":{}{properties}{value}", self.random.below(9), self.random.pick(&["", " "])),
                }
            })
            .collect();
        let (start, end) = if self.random.once_in(2) { ('[', ']') } else { ('{', '}') };
        let mut text = String::from(start);
        for (number, part) in parts.iter().enumerate() {
            text.push_str(blank(self.random));
            text.push_str(part);
            text.push_str(blank(self.random));
            if number + 1 < parts.len() || self.random.once_in(6) {
                text.push(',');
            }
        }
        text.push(end);
        text
    }
}

/// With a few characters taken out, put in or repeated.
pub fn damaged(random: &mut Random, text: String) -> String {
    let mut characters: Vec<char> = text.chars().collect();
    for _ in 0..1 + random.below(3) {
        let at = random.below(characters.len() + 1);
        match random.below(3) {
            0 if at < characters.len() => drop(characters.remove(at)),
            1 if at < characters.len() => characters.insert(at, characters[at]),
            _ => {
                let words = [
                    ":", ": ", "- ", "\n", " ", "\t", "#", "?", "? ", ",", "[", "]", "{", "}", "'", "\"", "&", "*",
                    "!", "|", ">", "\\", "\u{85}", "\u{2028}", "\r", "\u{7f}", "...\n",
                ];
                let word = random.pick(&words);
                characters.splice(at..at, word.chars());
            }
        }
    }
    characters.into_iter().collect()
}

/// One of Kubernetes' objects, in which some values are spelled unusually, null, of a wrong type, or unknown.
pub fn object(random: &mut Random) -> String {
    let mut value = match random.below(5) {
        0 => json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "namespace": "a", "labels": {"app": "web", "tier": "one"}, "creationTimestamp": null},
            "spec": {"nodeName": "n", "hostNetwork": false, "serviceAccountName": "s", "containers": [
                {"ports": [{"name": "http", "containerPort": 80, "protocol": "TCP"}, {"containerPort": 53}]},
            ]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]},
        }),
        1 => {
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a", "labels": {"team": "red"}, "annotations": {"note": "x"}}})
        }
        _ => json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "p", "namespace": "a", "labels": {"x": "y"}},
            "spec": {
                "podSelector": {"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "tier", "operator": "In", "values": ["one", "two"]}]},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [
                    {"from": [{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}], "ports": [{"port": 80}, {"port": "http", "protocol": "TCP"}]},
                    {"ports": [{"port": 8000, "endPort": 9000, "protocol": "UDP"}]},
                ],
                "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"team": "red"}}}]}],
            },
        }),
    };
    let is_policy = value["kind"] == "NetworkPolicy";
    for _ in 0..random.below(4) {
        change(random, &mut value, 0, is_policy);
    }
    let mut text = String::new();
    block(random, &value, 0, &mut text);
    text
}

/// Values whose spelling is that of plain YAML.
const SPELLED: &[&str] = &[
    "1_000",
    "0b1010000",
    "0x50",
    "0120",
    "80.0",
    "8e1",
    "80",
    "yes",
    "on",
    "~",
    "",
    "80.5",
    "x",
    "TCP",
    "1e9",
    "7_0000",
    "-1",
    "10.0.0.0/8",
    "null",
];
/// Marks a text that is written verbatim.
const RAW: char = '\u{1}';

fn change(random: &mut Random, value: &mut Value, depth: usize, is_policy: bool) {
    let goes_down = depth < 2 || !random.once_in(4);
    match value {
        Value::Object(fields) if goes_down && !fields.is_empty() => {
            let keys: Vec<String> = fields
                .keys()
                .filter(|key| !["apiVersion", "kind", "creationTimestamp"].contains(&key.as_str()))
                .cloned()
                .collect();
            if keys.is_empty() {
                return;
            }
            let key = &keys[random.below(keys.len())];
            match random.below(12) {
                // The inventory is read for some of its fields only.
                0 if is_policy && depth > 0 && key != "labels" => drop(fields.insert("unknown".to_owned(), json!(1))),
                1 if depth > 0 => drop(fields.shift_remove(key)),
                _ => change(random, &mut fields[key.as_str()], depth + 1, is_policy && key != "metadata"),
            }
        }
        Value::Array(items) if goes_down && !items.is_empty() => {
            let at = random.below(items.len());
            match random.below(8) {
                0 => items.push(Value::Null),
                1 => drop(items.remove(at)),
                _ => change(random, &mut items[at], depth + 1, is_policy),
            }
        }
        _ if depth < 2 => {}
        Value::Object(_) | Value::Array(_) => {
            *value = [Value::Null, json!({}), json!([]), json!("x"), json!(1)][random.below(5)].clone();
        }
        value => *value = format!("{RAW}{}", random.pick(SPELLED)).into(),
    }
}

fn block(random: &mut Random, value: &Value, indent: usize, text: &mut String) {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                text.push_str(&format!("{pad}{key}:"));
                after(random, value, indent + 2, text);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                text.push_str(&format!("{pad}-"));
                after(random, item, indent + 2, text);
            }
        }
        value => text.push_str(&format!("{pad}{}\n", flow(value))),
    }
}

fn after(random: &mut Random, value: &Value, indent: usize, text: &mut String) {
    let is_block = matches!(value, Value::Object(fields) if !fields.is_empty())
        || matches!(value, Value::Array(items) if !items.is_empty());
    if is_block && !random.once_in(3) {
        text.push('\n');
        block(random, value, indent, text);
    } else {
        text.push_str(&format!(" {}{}\n", flow(value), random.pick(&["", "", " # c"])));
    }
}

fn flow(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let fields: Vec<String> = fields.iter().map(|(key, value)| format!("{key}: {}", flow(value))).collect();
            format!("{{{}}}", fields.join(", "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::String(text) => match text.strip_prefix(RAW) {
            Some("") => "~".to_owned(),
            Some(raw) => raw.to_owned(),
            None => value.to_string(),
        },
        other => other.to_string(),
    }
}
