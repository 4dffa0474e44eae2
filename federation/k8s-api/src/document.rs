//! YAML (and so JSON) into values that remember their lines.
//!
//! A file is cut at its `---` lines first, so that one broken document leaves its neighbours whole. Scalars follow the
//! YAML 1.2 core schema. `kubectl` reads `yes`, `no`, `on` and `off` as booleans, as YAML 1.1 has them, and so are they here
//! where a boolean is wanted; elsewhere they are text, since tools that write YAML 1.2 write text so, while `kubectl` refuses
//! it. Numbers are those of `kubectl`: a leading zero means octal, and `80.0` and `8e1` are the integer 80.

use std::collections::{HashMap, HashSet};

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{Deserializer, IntoDeserializer, Visitor};
use serde_json::{Map, Number, Value};

mod json;

/// Deepest nesting of lists and mappings; the deepest field of any kind lies at about 12.
pub const MAX_DEPTH: usize = 64;
/// Values of one document that anchors keep and aliases repeat; at about 80 bytes each, 160 MiB. What is written out is
/// bounded by the size of the file alone: a list of a large cluster's pods is one document with tens of millions of values.
pub const MAX_REPEATED_VALUES: usize = 2 * 1024 * 1024;

/// A value with the line (one-based) on which it starts.
#[derive(Debug, Clone)]
pub struct Node {
    pub line: u32,
    /// A scalar in quotes, or in a block: text, whatever it says.
    pub quoted: bool,
    pub data: Data,
}

#[derive(Debug, Clone)]
pub enum Data {
    Scalar(Value),
    Sequence(Vec<Node>),
    /// Key, the key's line, value.
    Mapping(Vec<(String, u32, Node)>),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SyntaxError {
    pub line: u32,
    pub message: String,
}

/// What a document says, and the first of its keys that stands twice. In the node what such a key says first counts, so
/// that it can be told what the document is.
#[derive(Debug, Clone)]
pub struct Document {
    pub node: Node,
    pub doubled: Option<SyntaxError>,
}

/// The documents of a file. Empty ones are left out; one with a key that stands twice is an error.
pub fn parse(text: &str) -> Vec<Result<Node, SyntaxError>> {
    let whole = |document: Document| document.doubled.map_or(Ok(document.node), Err);
    documents(text).into_iter().map(|document| document.and_then(whole)).collect()
}

/// The same, with those in which a key stands twice.
pub fn documents(text: &str) -> Vec<Result<Document, SyntaxError>> {
    pieces(text).into_iter().filter_map(|(first_line, piece)| parse_one(piece, first_line).transpose()).collect()
}

/// JSON values one after another, as `kubectl` writes and reads them; `None` where the text is anything else.
fn json_pieces(text: &str) -> Option<Vec<(u32, &str)>> {
    let (mut pieces, mut start) = (Vec::new(), None);
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    let (mut line, mut start_line) = (0, 0);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' if depth > 0 => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => {
                if start.is_none() {
                    (start, start_line) = (Some(at), line);
                }
                depth += 1;
            }
            b'}' | b']' if depth > 0 => {
                depth -= 1;
                if depth == 0 {
                    pieces.push((start_line, &text[start.take()?..=at]));
                }
            }
            byte if depth == 0 && !byte.is_ascii_whitespace() => return None,
            _ => {}
        }
        line += u32::from(byte == b'\n');
    }
    (depth == 0).then_some(pieces)
}

/// Cuts at lines that start with `---`, which end a document wherever they stand. Each piece comes with the number of
/// lines before it.
fn pieces(text: &str) -> Vec<(u32, &str)> {
    if let Some(pieces) = json_pieces(text) {
        return pieces;
    }
    let mut pieces = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    for (number, line) in (0..).zip(text.split_inclusive('\n')) {
        let marks =
            line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marks && at > start {
            pieces.push((start_line, &text[start..at]));
            (start, start_line) = (at, number);
        }
        at += line.len();
    }
    pieces.push((start_line, &text[start..]));
    pieces
}

fn parse_one(text: &str, lines_before: u32) -> Result<Option<Document>, SyntaxError> {
    match json::parse(text, lines_before + 1) {
        Some(node) => Ok(Some(Document { node, doubled: None })),
        None => parse_yaml(text, lines_before),
    }
}

fn parse_yaml(text: &str, lines_before: u32) -> Result<Option<Document>, SyntaxError> {
    // Directives stand before the `---` at which the file was cut.
    if text.lines().all(|line| line.is_empty() || line.starts_with(['#', '%'])) {
        return Ok(None);
    }
    let mut loader = Loader { lines_before, ..Loader::default() };
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| SyntaxError {
            line: lines_before + line_of(error.marker().line()),
            message: format!("not valid YAML: {}", error.info()),
        })?;
        loader.event(event, line_of(span.start.line()))?;
    }
    let empty = |node: &Node| matches!(&node.data, Data::Scalar(Value::Null));
    let root = loader.root.filter(|node| !empty(node));
    Ok(root.map(|node| Document { node, doubled: loader.doubled }))
}

fn line_of(line: usize) -> u32 {
    u32::try_from(line.max(1)).unwrap_or(u32::MAX)
}

#[derive(Default)]
struct Loader {
    lines_before: u32,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    repeated: usize,
    root: Option<Node>,
    doubled: Option<SyntaxError>,
}

struct Open {
    anchor: usize,
    node: Node,
    /// In a mapping: the key that waits for its value; `None` inside where it stands twice.
    key: Option<Option<(String, u32)>>,
    keys: Keys,
}

/// The keys of one mapping. A few are compared one by one; more are hashed, so that the time for a mapping of any size
/// grows with its size and not with the square of it.
#[derive(Default)]
struct Keys(HashSet<String>);

impl Keys {
    const FEW: usize = 16;

    /// False where `key` stands among `entries`, which are all that were added before.
    fn add(&mut self, key: &str, entries: &[(String, u32, Node)]) -> bool {
        if entries.len() < Self::FEW {
            return !entries.iter().any(|(known, ..)| known == key);
        }
        if self.0.is_empty() {
            self.0.extend(entries.iter().map(|(known, ..)| known.clone()));
        }
        self.0.insert(key.to_owned())
    }
}

impl Loader {
    fn event(&mut self, event: Event<'_>, line: u32) -> Result<(), SyntaxError> {
        let line = self.lines_before + line;
        let fail = |message: &str| Err(SyntaxError { line, message: message.to_owned() });
        match event {
            Event::SequenceStart(anchor, _) => self.start(anchor, line, Data::Sequence(Vec::new())),
            Event::MappingStart(anchor, _) => self.start(anchor, line, Data::Mapping(Vec::new())),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(mut done) => {
                    merge(&mut done.node)?;
                    self.place(done.anchor, done.node)
                }
                None => fail("not valid YAML: an end without a start"),
            },
            Event::Scalar(text, style, anchor, tag) => {
                let quoted = style != ScalarStyle::Plain || tag.is_some_and(|tag| tag.suffix == "str");
                let data = Data::Scalar(if quoted { Value::String(text.into_owned()) } else { plain(&text) });
                self.place(anchor, Node { line, quoted, data })
            }
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => {
                    let node = repeat(node, &mut self.repeated)?;
                    self.place(0, node)
                }
                None => fail("an alias without an anchor before it"),
            },
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) | Event::DocumentEnd => {
                Ok(())
            }
        }
    }

    fn start(&mut self, anchor: usize, line: u32, data: Data) -> Result<(), SyntaxError> {
        if self.open.len() >= MAX_DEPTH {
            return Err(SyntaxError { line, message: format!("nested deeper than {MAX_DEPTH}") });
        }
        self.open.push(Open { anchor, node: Node { line, quoted: false, data }, key: None, keys: Keys::default() });
        Ok(())
    }

    fn place(&mut self, anchor: usize, node: Node) -> Result<(), SyntaxError> {
        let line = node.line;
        let fail = |message: String| Err(SyntaxError { line, message });
        if anchor != 0 {
            let kept = repeat(&node, &mut self.repeated)?;
            self.anchors.insert(anchor, kept);
        }
        let Some(parent) = self.open.last_mut() else {
            if self.root.is_some() {
                return fail("a second document without a `---` line before it".to_owned());
            }
            self.root = Some(node);
            return Ok(());
        };
        match &mut parent.node.data {
            Data::Sequence(items) => items.push(node),
            Data::Mapping(entries) => match parent.key.take() {
                None => {
                    let key = match node.data {
                        Data::Scalar(Value::String(key)) => key,
                        Data::Scalar(value @ (Value::Number(_) | Value::Bool(_))) => value.to_string(),
                        _ => return fail("a key must be a plain text".to_owned()),
                    };
                    let first = parent.keys.add(&key, entries);
                    if !first && self.doubled.is_none() {
                        let message = format!("the key \"{key}\" stands twice in one mapping");
                        self.doubled = Some(SyntaxError { line, message });
                    }
                    parent.key = Some(first.then_some((key, line)));
                }
                Some(Some((key, key_line))) => entries.push((key, key_line, node)),
                Some(None) => {}
            },
            Data::Scalar(_) => return fail("a value inside a scalar".to_owned()),
        }
        Ok(())
    }
}

/// A copy of `node`, counted.
fn repeat(node: &Node, repeated: &mut usize) -> Result<Node, SyntaxError> {
    *repeated += count(node);
    if *repeated > MAX_REPEATED_VALUES {
        let message = format!("anchors and aliases repeat more than {MAX_REPEATED_VALUES} values");
        return Err(SyntaxError { line: node.line, message });
    }
    Ok(node.clone())
}

/// Takes in what the key `<<` of a mapping names: a mapping, or several, of which the first counts. What the mapping says
/// itself counts before all of them.
fn merge(node: &mut Node) -> Result<(), SyntaxError> {
    let Data::Mapping(entries) = &mut node.data else { return Ok(()) };
    let Some(at) = entries.iter().position(|(key, ..)| key == "<<") else { return Ok(()) };
    let (.., merged) = entries.remove(at);
    let sources = match merged.data {
        Data::Sequence(sources) => sources,
        _ => vec![merged],
    };
    let mut keys = Keys::default();
    for source in sources {
        let Data::Mapping(more) = source.data else {
            let message = "\"<<\" takes a mapping, or a list of mappings".to_owned();
            return Err(SyntaxError { line: source.line, message });
        };
        for entry in more {
            if keys.add(&entry.0, entries) {
                entries.push(entry);
            }
        }
    }
    Ok(())
}

fn count(node: &Node) -> usize {
    match &node.data {
        Data::Scalar(_) => 1,
        Data::Sequence(items) => 1 + items.iter().map(count).sum::<usize>(),
        Data::Mapping(entries) => 1 + entries.iter().map(|(.., node)| count(node)).sum::<usize>(),
    }
}

/// A plain scalar by the core schema of YAML 1.2.2 (10.3.2), with the numbers of `kubectl`.
fn plain(text: &str) -> Value {
    /// Every integer up to here is a float of its own.
    const EXACT: f64 = (1_u64 << 53) as f64;
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let radix = |prefix, radix| text.strip_prefix(prefix).and_then(|digits| i64::from_str_radix(digits, radix).ok());
    if let Some(number) = radix("0x", 16).or_else(|| radix("0o", 8)) {
        return Value::from(number);
    }
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        if digits.len() > 1
            && digits.starts_with('0')
            && let Ok(number) = i64::from_str_radix(digits, 8)
        {
            return Value::from(if text.starts_with('-') { -number } else { number });
        }
        if let Ok(number) = text.parse::<i64>() {
            return Value::from(number);
        }
        if let Ok(number) = text.parse::<u64>() {
            return Value::from(number);
        }
    }
    let is_float = digits.bytes().any(|byte| byte.is_ascii_digit())
        && digits.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-'))
        && !digits.starts_with(['e', 'E', '+', '-']);
    if is_float && let Ok(number) = text.parse::<f64>() {
        if number.fract() == 0.0 && number.abs() < EXACT {
            return Value::from(number as i64);
        }
        if let Some(number) = Number::from_f64(number) {
            return Value::Number(number);
        }
    }
    Value::String(text.to_owned())
}

impl<'de> IntoDeserializer<'de, serde_json::Error> for &'de Node {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = serde_json::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match &self.data {
            Data::Scalar(value) => value.deserialize_any(visitor),
            Data::Sequence(items) => visitor.visit_seq(SeqDeserializer::new(items.iter())),
            Data::Mapping(entries) => {
                visitor.visit_map(MapDeserializer::new(entries.iter().map(|(key, _, node)| (key.as_str(), node))))
            }
        }
    }

    /// Also in the words of YAML 1.1.
    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.text().filter(|_| !self.quoted) {
            Some("yes" | "Yes" | "YES" | "on" | "On" | "ON") => visitor.visit_bool(true),
            Some("no" | "No" | "NO" | "off" | "Off" | "OFF") => visitor.visit_bool(false),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match &self.data {
            Data::Scalar(Value::Null) => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct enum identifier
    }
}

impl Node {
    /// The value without lines.
    pub fn to_value(&self) -> Value {
        match &self.data {
            Data::Scalar(value) => value.clone(),
            Data::Sequence(items) => Value::Array(items.iter().map(Node::to_value).collect()),
            Data::Mapping(entries) => {
                let pairs = entries.iter().map(|(key, _, node)| (key.clone(), node.to_value()));
                Value::Object(pairs.collect::<Map<_, _>>())
            }
        }
    }

    pub fn child(&self, name: &str) -> Option<&Node> {
        let Data::Mapping(entries) = &self.data else { return None };
        entries.iter().find(|(key, ..)| key == name).map(|(.., node)| node)
    }

    pub fn text(&self) -> Option<&str> {
        match &self.data {
            Data::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The same without the field of a path; `None` where there is no such field.
    pub fn without(&self, path: &str) -> Option<Node> {
        let mut whole = self.clone();
        let (mut node, mut parts) = (&mut whole, path.split(['.', '[']).filter(|part| !part.is_empty()).peekable());
        while let Some(part) = parts.next() {
            node = match &mut node.data {
                Data::Mapping(entries) => {
                    let at = entries.iter().position(|(key, ..)| key == part)?;
                    if parts.peek().is_none() {
                        entries.remove(at);
                        return Some(whole);
                    }
                    &mut entries[at].2
                }
                Data::Sequence(items) => items.get_mut(part.strip_suffix(']')?.parse::<usize>().ok()?)?,
                Data::Scalar(_) => return None,
            };
        }
        None
    }

    /// The line of a field path such as `spec.ingress[0].ports`, or of the deepest part of it that exists.
    pub fn line_of(&self, path: &str) -> u32 {
        let (mut node, mut line) = (self, self.line);
        for part in path.split(['.', '[']).filter(|part| !part.is_empty()) {
            let found = match &node.data {
                Data::Mapping(entries) => {
                    entries.iter().find(|(key, ..)| key == part).map(|(_, line, node)| (*line, node))
                }
                Data::Sequence(items) => part
                    .strip_suffix(']')
                    .and_then(|index| items.get(index.parse::<usize>().ok()?))
                    .map(|node| (node.line, node)),
                Data::Scalar(_) => None,
            };
            let Some((found_line, found_node)) = found else { break };
            (line, node) = (found_line, found_node);
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_json() -> impl Strategy<Value = Value> {
        let text = "[a-z<>{}:,#\\-\"\\\\\n é]{0,6}";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9..1e9).prop_filter("80.0 is read as 80", |it: &f64| it.fract() != 0.0).prop_map(Value::from),
            text.prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-z\"\\\\ ]{1,4}", inner, 0..5)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_quick_way_reads_what_yaml_reads(value in any_json(), pretty: bool) {
            let value = serde_json::json!({"it": value});
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let text = text.expect("JSON");
            let quick = json::parse(&text, 8).expect("well formed");
            let slow = parse_yaml(&text, 7).expect("YAML").expect("a document").node;
            prop_assert_eq!(format!("{quick:?}"), format!("{slow:?}"));
            prop_assert_eq!(quick.to_value(), value);
        }
    }

    fn one(text: &str) -> Node {
        parse(text).remove(0).expect("valid")
    }

    #[test]
    fn scalars_follow_the_core_schema() {
        let node = one(
            "a: 80\nb: '80'\nc: yes\nd: true\ne: 1.5\nf:\ng: 0x10\nh: 1e3\ni: 1.2.3\nj: -5\nk: 0o17\nl: e5\nm: 010\nn: 089\no: 80.0\np: -07",
        );
        let expected = serde_json::json!({
            "a": 80, "b": "80", "c": "yes", "d": true, "e": 1.5, "f": null, "g": 16, "h": 1000, "i": "1.2.3", "j": -5,
            "k": 15, "l": "e5", "m": 8, "n": 89, "o": 80, "p": -7,
        });
        assert_eq!(node.to_value(), expected);
    }

    #[test]
    fn a_broken_document_leaves_its_neighbours() {
        let documents = parse("a: 1\n---\nb: [\n---\nc: 3\n");
        assert_eq!(documents.len(), 3);
        assert_eq!(documents[0].as_ref().map(Node::to_value), Ok(serde_json::json!({"a": 1})));
        assert!(documents[1].as_ref().is_err_and(|error| error.line >= 3), "{:?}", documents[1]);
        assert_eq!(
            documents[2].as_ref().map(|node| (node.line, node.to_value())),
            Ok((5, serde_json::json!({"c": 3})))
        );
    }

    #[test]
    fn lines_lead_to_fields() {
        let node = one("\nspec:\n  ingress:\n  - from: []\n    ports:\n    - port: 80\n    - port: 81\n");
        assert_eq!(node.line_of("spec.ingress[0].ports[1].port"), 7);
        assert_eq!(node.line_of("spec.ingress[0].ports[1].endPort"), 7);
        assert_eq!(node.line_of("spec.ingress"), 3);
    }

    #[test]
    fn doubled_keys_deep_nesting_and_alias_bombs_are_refused() {
        for (text, wanted) in [
            ("a: 1\na: 2\n".to_owned(), "stands twice"),
            (format!("{}1{}", "[".repeat(100), "]".repeat(100)), "nested deeper"),
        ] {
            let error = parse(&text).remove(0).expect_err("refused");
            assert!(error.message.contains(wanted), "{error}");
        }
        let mut bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n".to_owned();
        for level in 1..10 {
            let before = level - 1;
            bomb.push_str(&format!("a{level}: &a{level} [{}]\n", vec![format!("*a{before}"); 10].join(",")));
        }
        assert!(parse(&bomb).remove(0).is_err());
        // Each anchor keeps what is below it.
        let mut nested = vec!["1"; 100_000].join(",");
        for level in 0..50 {
            nested = format!("&a{level} [{nested}]");
        }
        assert!(parse(&nested).remove(0).is_err_and(|error| error.message.contains("repeat")));
    }

    #[test]
    fn many_keys_are_told_apart_too() {
        let text: String = (0..200).map(|at| format!("k{at}: {at}\n")).collect();
        assert!(matches!(one(&text).data, Data::Mapping(entries) if entries.len() == 200));
        for doubled in [0, 15, 16, 17, 199] {
            let yaml = format!("{text}k{doubled}: 1\n");
            let error = parse(&yaml).remove(0).expect_err("refused");
            assert_eq!((error.line, error.message.contains("stands twice")), (201, true), "{error}");
            let json = format!(
                "{{{}}}",
                yaml.lines().map(|it| format!("\"{}", it.replace(": ", "\": "))).collect::<Vec<_>>().join(",")
            );
            assert!(parse(&json).remove(0).is_err_and(|error| error.message.contains("stands twice")), "{doubled}");
            let merged = format!(
                "base: &b {{k{doubled}: over, more: 1}}\nit:\n  <<: *b\n{}",
                text.lines().map(|it| format!("  {it}\n")).collect::<String>()
            );
            let value = one(&merged).to_value();
            assert_eq!(
                (&value["it"][format!("k{doubled}")], &value["it"]["more"]),
                (&Value::from(doubled), &Value::from(1))
            );
        }
    }

    #[test]
    fn a_merge_key_names_mappings() {
        for text in ["a: {<<: 5}", "a: {<<: [{b: 1}, c]}"] {
            assert!(parse(text).remove(0).is_err_and(|error| error.message.contains("<<")), "{text}");
        }
    }

    #[test]
    fn merge_keys_yield_to_what_is_written() {
        let node = one("a: &a {x: 1, y: 2}\nb: &b {x: 3, z: 4}\nc: {<<: [*a, *b], y: 5}\nd: {<<: *b}\n");
        let value = node.to_value();
        assert_eq!((&value["c"], &value["d"]), (&serde_json::json!({"x": 1, "y": 5, "z": 4}), &value["b"]));
    }

    #[test]
    fn directives_are_no_document() {
        let documents = parse("%YAML 1.2\n# about\n---\na: 1\n");
        assert_eq!(documents.len(), 1, "{documents:?}");
        assert_eq!(documents[0].as_ref().map(|node| node.line), Ok(4));
    }

    #[test]
    fn json_values_may_follow_each_other() {
        let documents = parse("{\"a\": \"}{\\\"\"}\n\n{\"b\":\n [1]} {\"c\": 2}\n");
        let read: Vec<_> = documents.iter().map(|it| it.as_ref().map(|it| (it.line, it.to_value()))).collect();
        assert_eq!(
            read,
            [
                Ok((1, serde_json::json!({"a": "}{\""}))),
                Ok((3, serde_json::json!({"b": [1]}))),
                Ok((4, serde_json::json!({"c": 2}))),
            ]
        );
        assert!(parse("{\"a\": 1}\n{\"b\"")[0].is_err(), "what does not end is no JSON");
    }

    #[test]
    fn json_is_read_too() {
        assert_eq!(
            one("{\n\t\"a\": [1, \"x\"],\n\t\"b\": {}\n}").to_value(),
            serde_json::json!({"a": [1, "x"], "b": {}})
        );
    }
}
