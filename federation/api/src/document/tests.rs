use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::tree::*;
use super::*;

/// What a file says, document by document: the first fault of one that has any.
fn read(text: &str) -> Vec<Result<Value, SyntaxError>> {
    let whole = |document: Document<'_>| match document.faults.first() {
        None => Ok(document.root().to_value()),
        Some(fault) => Err(SyntaxError { line: fault.line, message: fault.to_string() }),
    };
    documents(text).map(|document| document.and_then(whole)).collect()
}

fn one(text: &str) -> Value {
    match <[_; 1]>::try_from(read(text)) {
        Ok([read]) => read.unwrap_or_else(|error| panic!("{text}: {error} on line {}", error.line)),
        Err(many) => panic!("{text}: {many:?}"),
    }
}

fn refused(text: &str) -> SyntaxError {
    let read = read(text);
    read.into_iter().next().expect("a document").expect_err(text)
}

/// Every line and value below a node.
fn places(node: Node<'_>) -> Vec<(u32, Value)> {
    let mut places = vec![(node.line(), node.to_value())];
    for (key, value) in node.pairs() {
        places.push((key.line(), key.key().into()));
        places.extend(self::places(value));
    }
    node.items().for_each(|item| places.extend(self::places(item)));
    places
}

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
        let value = json!({"it": value});
        let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
        let text = text.expect("JSON");
        let quick = json::parse(&text, 8).expect("well formed");
        let slow = load::load(&text, 8).expect("YAML").expect("a document");
        prop_assert_eq!(places(quick.root()), places(slow.root()));
        prop_assert_eq!(quick.root().to_value(), value);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[-?:,\\[\\]{}#&*!|>'\"%@`a-c<0-2.~\\\\ \t\n\r\u{feff}\u{85}\u{2028}é]{0,60}") {
        for document in documents(&text).flatten() {
            places(document.root());
        }
    }
}

/// Each was refused by a parser of YAML 1.2, or read otherwise.
#[test]
fn the_grammar_is_that_of_go_yaml() {
    for (text, expected) in [
        // Closing brackets in the column of their key.
        ("a: {\n  b: 1\n}\nc: [\n  1,\n]\n", json!({"a": {"b": 1}, "c": [1]})),
        // Quoted text over lines, less indented than its key.
        ("a:\n  b: \"one\ntwo\n\n  three \\\n  four\"\n", json!({"a": {"b": "one two\nthree four"}})),
        ("a: 'it''s\n\n\n one'\n", json!({"a": "it's\n\none"})),
        // What only looks like a marker.
        ("a: b --- c\nd: --- e\n", json!({"a": "b --- c", "d": "--- e"})),
        ("a: |\n  ---\n  b\n", json!({"a": "---\nb\n"})),
        // Tabs.
        ("a:\t1\nb:\t\t[\t1,\t2\t]\t# c\n-\t3: x\n", json!(null)),
        ("a:\t1\nb: [\n\t1,\n\t{c:\t2}\n]\n", json!({"a": 1, "b": [1, {"c": 2}]})),
        ("a: 1\t# c\nb: c\td\n", json!({"a": 1, "b": "c\td"})),
        // Lists in the column of their key, and left out values.
        ("a:\n- 1\n-\n- - 2\n  -\nb:\n", json!({"a": [1, null, [2, null]], "b": null})),
        // Pairs in flow lists, and keys without values.
        ("a: [b: 1, {c, d: , \"e\":2}]\n", json!({"a": [{"b": 1}, {"c": null, "d": null, "e": 2}]})),
        ("a: {b:1, c: d:e, f: http://x}\n", json!({"a": {"b:1": null, "c": "d:e", "f": "http://x"}})),
        ("? a\n: b\n? c\n", json!({"a": "b", "c": null})),
        ("? |\n  a\n: - 1\n", json!({"a\n": [1]})),
        // Plain text over lines, comments, and indicators within it.
        ("a: one\n  two\n\n  three # no\nb: x#y\n", json!({"a": "one two\nthree", "b": "x#y"})),
        ("a: -x\nb: ?x\nc: :x\nd: a, [b] {c}\n", json!({"a": "-x", "b": "?x", "c": ":x", "d": "a, [b] {c}"})),
        // Blocks.
        ("a: >-\n  one\n  two\n\n    three\n  four\n\n", json!({"a": "one two\n\n  three\nfour"})),
        ("a: |2+\n    one\n\n\nb: |-\n  x\n", json!({"a": "  one\n\n\n", "b": "x"})),
        ("a: |  # comment\n  b\n", json!({"a": "b\n"})),
        ("- |\n a\n- >\n b\n", json!(["a\n", "b\n"])),
        // Other breaks.
        ("a: 1\r\nb: 'x\r\n  y'\rc: 2\n", json!({"a": 1, "b": "x y", "c": 2})),
        ("a: 1\u{85}b: 2\n", json!({"a": 1, "b": 2})),
        // Tags.
        (
            "a: !!str 1\nb: !!int '0x10'\nc: !!float 1\nd: ! 5\ne: !x 6\nf: !!null\n",
            json!({"a": "1", "b": 16, "c": 1, "d": "5", "e": "6", "f": null}),
        ),
        (
            "a: !!binary |\n  aGVs\n  bG8=\nb: !<tag:yaml.org,2002:str> 1\nc: !!str\n",
            json!({"a": "hello", "b": "1", "c": ""}),
        ),
        ("%TAG !y! tag:yaml.org,2002:\n---\na: 1\n", json!({"a": 1})),
        // Byte order marks at the start of lines.
        ("\u{feff}a: 1\n", json!({"a": 1})),
        ("---\n\u{feff}a: 1\nb: 2\n", json!({"a": 1, "b": 2})),
        // Escapes.
        (r#"a: "\x41\u00e9\U0001F600\t\_\/""#, json!(null)),
        (r#"a: "\x41\u00e9\U0001F600\t\0\e\'""#, json!({"a": "Aé😀\t\0\u{1b}'"})),
    ] {
        if expected.is_null() {
            assert!(read(text)[0].is_err(), "{text}");
        } else {
            assert_eq!(one(text), expected, "{text}");
        }
    }
}

#[test]
fn keys_are_what_kubernetes_makes_of_them() {
    let value = one("on: 1\n0x10: 2\n1.5: 3\n'y': 4\nno: 5\n1_0: 6\n.inf: 7\n");
    assert_eq!(value, json!({"true": 1, "16": 2, "1.5": 3, "y": 4, "false": 5, "10": 6, ".inf": 7}));
}

#[test]
fn what_is_no_yaml_is_refused_where_it_is_wrong() {
    for (text, line, wanted) in [
        ("a: b: c\n", 1, "quotes"),
        ("a: 1\n\tb: 2\n", 2, "a tab"),
        ("a:\n  - 1\n  b: 2\n", 3, "\"-\""),
        ("a: 1\nb\nc: 2\n", 2, "missing after a key"),
        ("a: [1\nb: 2\n", 2, "\"]\""),
        ("a: {b: 1]\n", 1, "\"}\""),
        ("a: 'x\n", 1, "end quote"),
        ("a: \"\\q\"\n", 1, "escape"),
        ("a: @x\n", 1, "\"@\""),
        ("a: |0\n  x\n", 1, "0"),
        ("a: *b\n", 1, "anchor"),
        ("a: &x [*x]\n", 1, "anchor"),
        ("[!,", 1, ""),
        ("a: ''|\n 0", 1, ""),
        ("a: {? : x}\n", 1, "key"),
        ("b: [? : x]\n", 1, "key"),
        ("a: \u{1}\n", 1, "control"),
        ("a: 1\nb: \u{7f}\n", 2, "control"),
        ("a: 1\n---b: 2\n", 2, "`---`"),
        ("a: 1\n...\nb: 2\n", 3, "after the end"),
        ("{a: 1} b\n", 1, "after the end"),
        ("a: .inf\n", 1, "JSON"),
        ("a: !!int x\n", 1, "!!int"),
        ("a: !!binary '***'\n", 1, "base64"),
        ("~: 1\n", 1, "key"),
        ("[a]: 1\n", 1, "key"),
        ("%YAML 2.0\n---\na: 1\n%X\n", 4, "directive"),
        ("a: <<\n<<: 5\n", 2, "<<"),
    ] {
        let error = read(text).into_iter().find_map(Result::err).unwrap_or_else(|| panic!("{text} is read"));
        assert!(error.line == line && error.message.contains(wanted), "{text}: {error} on line {}", error.line);
    }
}

/// A key without `?` ends within its line, and within 1,024 characters.
#[test]
fn keys_have_an_end() {
    let key = "é".repeat(1020);
    assert_eq!(one(&format!("{key}: 1\n")), json!({key: 1}));
    assert!(refused(&format!("{}: 1\n", "é".repeat(1100))).message.contains("quotes"));
    assert!(read("\"a\nb\": 1\n")[0].is_err());
}

#[test]
fn deep_flow_collections_are_read_in_linear_time() {
    // Each of the inner keys might still be one of an outer collection.
    let text = format!("a: {}{}{}", "[".repeat(9_000), "1,".repeat(200_000), "]".repeat(9_000));
    let start = std::time::Instant::now();
    assert!(refused(&text).message.contains("nested deeper"));
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(refused(&"[".repeat(20_000)).message.contains("nested deeper than 10000"));
    assert!(refused(&"- ".repeat(20_000)).message.contains("nested deeper than 10000"));
}

#[test]
fn a_broken_document_leaves_its_neighbours() {
    let read = read("a: 1\n---\nb: [\n---\nc: 3\n");
    assert_eq!(read.len(), 3);
    assert_eq!(read[0], Ok(json!({"a": 1})));
    assert!(read[1].as_ref().is_err_and(|error| error.line >= 3), "{:?}", read[1]);
    assert_eq!(read[2], Ok(json!({"c": 3})));
    let last = documents("a: 1\n---\nb: [\n---\nc: 3\n").last().expect("a document").expect("valid");
    assert_eq!(last.root().line(), 5);
}

#[test]
fn paths_lead_to_lines_and_back() {
    let text = "\nspec:\n  ingress:\n  - from: []\n    ports:\n    - port: 80\n    - port: 81\n";
    let document = documents(text).next().expect("a document").expect("valid");
    let mut locator = Locator::new(document.root());
    assert_eq!(locator.line_of("spec.ingress[0].ports[1].port"), 7);
    assert_eq!(locator.line_of("spec.ingress[0].ports[1].endPort"), 7);
    assert_eq!(locator.line_of("spec.ingress"), 3);
    assert_eq!(locator.place_of("spec.ingress[0].ports[1].endPort"), None);
    let paths = ["spec", "spec.ingress[0]", "spec.ingress[0].from", "spec.ingress[0].ports[1].port"];
    let places: Vec<u32> = paths.iter().map(|path| locator.place_of(path).expect(path)).collect();
    assert_eq!(document.root().paths(&places), paths);
}

#[test]
fn doubled_keys_deep_nesting_and_alias_bombs_are_refused() {
    for (text, wanted) in [
        ("a: 1\na: 2\n".to_owned(), "duplicate key"),
        ("on: 1\ntrue: 2\n".to_owned(), "duplicate key"),
        (format!("{}1{}", "[".repeat(100), "]".repeat(100)), "nested deeper"),
        (format!("{}1{}\n", "{a: ".repeat(100), "}".repeat(100)), "nested deeper"),
    ] {
        let error = refused(&text);
        assert!(error.message.contains(wanted), "{error}");
    }
    let mut bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n".to_owned();
    for level in 1..10 {
        let before = level - 1;
        bomb.push_str(&format!("a{level}: &a{level} [{}]\n", vec![format!("*a{before}"); 10].join(",")));
    }
    assert!(refused(&bomb).message.contains("repeat"));
    // Each anchor keeps what is below it.
    let mut nested = vec!["1"; 100_000].join(",");
    for level in 0..50 {
        nested = format!("&a{level} [{nested}]");
    }
    assert!(refused(&nested).message.contains("repeat"));
    // Each alias adds a level.
    let chain: String = (1..1000).map(|level| format!("a{level}: &a{level} [*a{}]\n", level - 1)).collect();
    assert!(refused(&format!("a0: &a0 [1]\n{chain}")).message.contains("nested deeper"));
}

#[test]
fn what_lies_too_deep_is_null_and_the_rest_is_read() {
    let text = format!("a: {}1{}\nb: 2\n", "[".repeat(100), "]".repeat(100));
    let document = documents(&text).next().expect("a document").expect("valid");
    assert_eq!(document.root().child("b").map(Node::to_value), Some(json!(2)));
    assert_eq!(document.faults, [Fault { line: 1, kind: FaultKind::TooDeep }]);
}

#[test]
fn many_keys_are_told_apart_too() {
    let text: String = (0..200).map(|at| format!("k{at}: {at}\n")).collect();
    assert_eq!(one(&text).as_object().map(Map::len), Some(200));
    for doubled in [0, 15, 16, 17, 199] {
        let yaml = format!("{text}k{doubled}: [1]\n");
        let error = refused(&yaml);
        assert_eq!((error.line, error.message.contains("duplicate key")), (201, true), "{error}");
        let document = documents(&yaml).next().expect("a document").expect("valid");
        assert_eq!(document.root().fields().count(), 200, "the first counts");
        let json = format!(
            "{{{}}}",
            yaml.lines().map(|it| format!("\"{}", it.replace(": ", "\": "))).collect::<Vec<_>>().join(",")
        );
        assert!(refused(&json).message.contains("duplicate key"), "{doubled}");
        let merged = format!(
            "base: &b {{k{doubled}: over, more: 1}}\nit:\n  <<: *b\n{}",
            text.lines().map(|it| format!("  {it}\n")).collect::<String>()
        );
        let value = one(&merged);
        assert_eq!((&value["it"][format!("k{doubled}")], &value["it"]["more"]), (&json!(doubled), &json!(1)));
    }
}

#[test]
fn a_merge_key_names_mappings() {
    for text in ["a: {<<: 5}", "a: {<<: [{b: 1}, c]}", "a: {<<: }", "a: &a [{b: 1}]\nb: {<<: *a}"] {
        assert!(refused(text).message.contains("<<"), "{text}");
    }
    assert_eq!(one("a: {'<<': 5}"), json!({"a": {"<<": 5}}), "in quotes it is a key as others");
}

/// As go-yaml does, in the order of the text.
#[test]
fn of_merged_and_written_keys_the_later_wins() {
    let value = one(
        "a: &a {p: 1, q: 2}\nb: &b {p: 3, r: 4}\nc: {<<: [*a, *b], q: 5}\nd: {<<: *b}\ne: {q: 5, <<: *a}\nf: {<<: *a, <<: *b}\n",
    );
    assert_eq!(value["c"], json!({"p": 1, "r": 4, "q": 5}));
    assert_eq!(value["d"], value["b"]);
    assert_eq!(value["e"], json!({"q": 2, "p": 1}));
    assert_eq!(value["f"], json!({"p": 3, "q": 2, "r": 4}));
}

#[test]
fn directives_are_no_document() {
    let documents: Vec<_> = documents("%YAML 1.2\n# about\n---\na: 1\n").collect();
    assert_eq!(documents.len(), 1, "{documents:?}");
    assert_eq!(documents[0].as_ref().map(|it| it.root().line()), Ok(4));
}

#[test]
fn json_values_may_follow_each_other() {
    let text = "{\"a\": \"}{\\\"\"}\n\n{\"b\":\n [1]} {\"c\": 2}\n";
    let read_all: Vec<_> = documents(text).map(|it| it.map(|it| (it.root().line(), it.root().to_value()))).collect();
    assert_eq!(read_all, [Ok((1, json!({"a": "}{\""}))), Ok((3, json!({"b": [1]}))), Ok((4, json!({"c": 2})))]);
    assert!(read("{\"a\": 1}\n{\"b\"")[0].is_err(), "what does not end is no JSON");
}

#[test]
fn json_is_read_too() {
    assert_eq!(one("{\n\t\"a\": [1, \"x\"],\n\t\"b\": {}\n}"), json!({"a": [1, "x"], "b": {}}));
}

#[test]
fn items_of_typed_lists_say_what_they_are() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  items:\n  - a: [1]\n  - kind: Other\n    b: 2\n  kind: PodList\n  c: d\n- e: 5\n";
    let document = documents(text).next().expect("a document").expect("valid");
    let expected = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "items": [
            {"a": [1], "apiVersion": "v1", "kind": "Pod"}, {"kind": "Other", "b": 2, "apiVersion": "v1"},
        ], "kind": "PodList", "c": "d"},
        {"e": 5},
    ]});
    assert_eq!(document.root().to_value(), expected);
    let lines: Vec<u32> = places(document.root()).iter().map(|(line, _)| *line).collect();
    assert!(lines.iter().all(|line| (1..=11).contains(line)), "{lines:?}");
}
