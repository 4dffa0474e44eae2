//! The selector language, clause by clause and at random.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_policy::selector::{Expr, Label, LabelLookup, MAX_NESTING, Selector, property};
use hanse_policy::tri::Tri;
use proptest::prelude::*;

/// `(input, canonical form)`.
const CANONICAL: &[(&str, &str)] = &[
    ("", "all()"),
    (" \t ", "all()"),
    (" (all( ) )", "all()"),
    ("global()", "global()"),
    ("has( a )", "has(a)"),
    ("a=='b'", "a == \"b\""),
    ("a==\"b\"", "a == \"b\""),
    ("a == '\"'", "a == '\"'"),
    ("a == \"'\"", "a == \"'\""),
    ("a != ''", "a != \"\""),
    ("a contains'x'", "a contains \"x\""),
    ("a startswith 'x'", "a starts with \"x\""),
    ("a starts\t with 'x'", "a starts with \"x\""),
    ("a endswith 'x'", "a ends with \"x\""),
    ("a notin{'x'}", "a not in {\"x\"}"),
    ("a not in {'b', \"a\",'b' , }", "a not in {\"a\", \"b\"}"),
    ("a in {}", "a in {}"),
    ("a in{ }", "a in {}"),
    ("a in {'a\"', \"b'\"}", "a in {'a\"', \"b'\"}"),
    // Chains of one operator are one; parentheses keep their place.
    ("has(a) && has(b) && has(c)", "(has(a) && has(b) && has(c))"),
    ("(has(a) && has(b)) && has(c)", "((has(a) && has(b)) && has(c))"),
    ("has(a)&&has(b)||has(c)", "((has(a) && has(b)) || has(c))"),
    ("has(a) || has(b) && has(c)", "(has(a) || (has(b) && has(c)))"),
    ("((has(a)))", "has(a)"),
    // `!` takes the whole following operation, and repeated ones collapse.
    ("! a == 'b'", "!a == \"b\""),
    ("!!has(a)", "has(a)"),
    ("! ! !has(a)", "!has(a)"),
    ("!(has(a) || !has(b))", "!(has(a) || !has(b))"),
    ("!(has(a)) && has(b)", "(!has(a) && has(b))"),
    // Words are operators directly after a label only, and labels otherwise.
    ("in in {'in'}", "in in {\"in\"}"),
    ("not not in {'x'}", "not not in {\"x\"}"),
    ("contains contains 'x'", "contains contains \"x\""),
    ("has == 'x'", "has == \"x\""),
    ("all != 'x'", "all != \"x\""),
    ("global == 'x'", "global == \"x\""),
    ("has(has)", "has(has)"),
    ("has(all)", "has(all)"),
    ("starts starts with 'x'", "starts starts with \"x\""),
    ("projectcalico.org/a_b-c.d == 'x'", "projectcalico.org/a_b-c.d == \"x\""),
    ("-/. == 'x'", "-/. == \"x\""),
];

/// `(input, column)` of malformed expressions.
const MALFORMED: &[(&str, usize)] = &[
    ("a", 2),
    ("a b", 3),
    ("a = 'b'", 3),
    ("a == b", 6),
    ("a == 'b", 6),
    ("a == ", 6),
    ("'b' == a", 1),
    ("== 'b'", 1),
    ("!", 2),
    ("!= 'b'", 1),
    ("()", 2),
    ("(", 2),
    (")", 1),
    ("(has(a)", 8),
    ("has(a))", 7),
    ("has()", 5),
    ("has(a", 6),
    ("has(a b)", 7),
    ("has (a)", 5),
    ("all(", 5),
    ("all(x)", 5),
    ("all", 4),
    ("global(", 8),
    ("has(a) &", 8),
    ("has(a) & has(b)", 8),
    ("has(a) |", 8),
    ("has(a) &&", 10),
    ("has(a) || ", 11),
    ("has(a) has(b)", 8),
    ("a in 'b'", 6),
    ("a in {'b'", 10),
    ("a in {,}", 7),
    ("a in {'b',,}", 11),
    ("a in {b}", 7),
    ("a in {'b' 'c'}", 11),
    ("a not 'b'", 3),
    ("a starts 'b'", 3),
    ("a containsx 'b'", 3),
    ("a inx {'b'}", 3),
    ("a == 'b'\n", 9),
    ("a\u{a0}== 'b'", 2),
    ("%", 1),
    ("é == 'b'", 1),
    ("a == 'é' é", 11),
];

/// `(expression, labels, value)`; labels are `key=value` pairs.
const VALUES: &[(&str, &str, bool)] = &[
    ("all()", "", true),
    ("global()", "", true),
    ("!global()", "", false),
    ("a == 'b'", "a=b", true),
    ("a == 'b'", "a=c", false),
    ("a == 'b'", "", false),
    ("a == ''", "a=", true),
    ("a == ''", "", false),
    ("a != 'b'", "a=b", false),
    ("a != 'b'", "a=c", true),
    ("a != 'b'", "", true),
    ("!a == 'b'", "", true),
    ("a contains 'b'", "a=abc", true),
    ("a contains ''", "a=", true),
    ("a contains ''", "", false),
    ("a starts with 'ab'", "a=abc", true),
    ("a starts with 'bc'", "a=abc", false),
    ("a ends with 'bc'", "a=abc", true),
    ("a ends with 'bc'", "", false),
    ("a in {'x', 'y'}", "a=y", true),
    ("a in {'x', 'y'}", "a=z", false),
    ("a in {'x'}", "", false),
    ("a in {}", "a=x", false),
    ("a not in {'x'}", "a=x", false),
    ("a not in {'x'}", "a=y", true),
    ("a not in {'x'}", "", true),
    ("a not in {}", "", true),
    ("has(a)", "a=", true),
    ("has(a)", "b=", false),
    ("has(a) && !has(b) || has(c)", "a=", true),
    ("has(a) && !has(b) || has(c)", "a=,b=", false),
    ("has(a) && !has(b) || has(c)", "b=,c=", true),
    ("has(a) && (!has(b) || has(c))", "b=,c=", false),
];

#[test]
fn formats_selectors_in_canonical_form() {
    for (input, canonical) in CANONICAL {
        let selector = Selector::parse(input).unwrap_or_else(|error| panic!("{input:?}: {error}"));
        assert_eq!(&*selector.canonical, *canonical, "{input:?}");
    }
}

#[test]
fn syntax_errors_name_the_column() {
    for (input, column) in MALFORMED {
        match Selector::parse(input) {
            Ok(selector) => panic!("{input:?} was read as {selector}"),
            Err(error) => assert_eq!(error.column, *column, "{input:?}: {error}"),
        }
    }
}

#[test]
fn values() {
    for (expression, labels, value) in VALUES {
        let labels: BTreeMap<String, String> = labels
            .split(',')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let selector = Selector::parse(expression).expect(expression);
        assert_eq!(selector.evaluate(&labels), Tri::from(*value), "{expression} over {labels:?}");
    }
}

/// Identifiers from Calico's own tests.
#[test]
fn identifiers_are_those_of_calico() {
    for (input, id) in [
        ("", "s:5y5I3VdRZfDU01O--xXAPx2yxCQQqMf0M6IWug"),
        (" (all() )", "s:5y5I3VdRZfDU01O--xXAPx2yxCQQqMf0M6IWug"),
        ("! (has( b)||! has(a ))", "s:Iss0uCleLYv1GSv_pNm7hAO58kE9jAx1NKyG3Q"),
        ("! (a == \"b\"&&! c != \"d\")", "s:lh3haoY1ikTRkd4UZu0nWSaIBknYLPJLX16d-w"),
    ] {
        assert_eq!(Selector::parse(input).expect(input).id(), id, "{input:?}");
    }
}

#[test]
fn refuses_labels_above_512_bytes() {
    for (length, accepted) in [(512, true), (513, false)] {
        let label = "a".repeat(length);
        for text in [format!("has({label})"), format!("{label} == 'x'"), format!("{label} in {{'x'}}")] {
            assert_eq!(Selector::parse(&text).is_ok(), accepted, "{length}");
        }
    }
    // No shorter label is read in its place: not even where an operator would follow.
    assert!(Selector::parse(&format!("{}in{{'x'}}", "a".repeat(512))).is_err());
}

#[test]
fn deep_nesting_is_an_error() {
    for depth in [MAX_NESTING - 1, MAX_NESTING, MAX_NESTING + 1, 1_000_000] {
        for open in ["(", "!("] {
            let text = format!("{}has(a){}", open.repeat(depth), ")".repeat(depth));
            let parsed = Selector::parse(&text);
            assert_eq!(parsed.is_ok(), depth <= MAX_NESTING, "{depth} of {open}");
        }
    }
    // A canonical form puts every chain into parentheses: the whole, and two of one level where it has both operators.
    for (levels, part, accepted) in [
        (MAX_NESTING - 1, "has(a) && (", true),
        (MAX_NESTING, "has(a) && (", false),
        (MAX_NESTING / 2 - 1, "has(a) || has(b) && (", true),
        (MAX_NESTING / 2, "has(a) || has(b) && (", false),
    ] {
        let text = format!("{}has(c) && has(d){}", part.repeat(levels), ")".repeat(levels));
        assert_eq!(Selector::parse(&text).is_ok(), accepted, "{levels} of {part}");
        property::holds_of(&text);
    }
    let bangs = format!("{}has(a)", "!".repeat(1_000_001));
    assert_eq!(&*Selector::parse(&bangs).expect("bangs nest nothing").canonical, "!has(a)");
}

struct Partly(BTreeMap<&'static str, Option<&'static str>>);

impl LabelLookup for Partly {
    fn label(&self, key: &str) -> Label<'_> {
        match self.0.get(key) {
            None => Label::Absent,
            Some(None) => Label::Unknown,
            Some(Some(value)) => Label::Present(value),
        }
    }
}

#[test]
fn unknown_stays_unknown() {
    let labels = Partly(BTreeMap::from([("u", None), ("a", Some("b"))]));
    for (expression, value) in [
        ("has(u)", Tri::Unknown),
        ("!has(u)", Tri::Unknown),
        ("u == 'x'", Tri::Unknown),
        ("u != 'x'", Tri::Unknown),
        ("u not in {'x'}", Tri::Unknown),
        ("!(u contains 'x')", Tri::Unknown),
        ("has(u) && has(a)", Tri::Unknown),
        ("has(u) && has(missing)", Tri::No),
        ("has(u) || has(a)", Tri::Yes),
        ("has(u) || has(missing)", Tri::Unknown),
        ("!(has(u) && has(missing))", Tri::Yes),
        ("all()", Tri::Yes),
    ] {
        assert_eq!(Selector::parse(expression).expect(expression).evaluate(&labels), value, "{expression}");
    }
}

fn name() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![
        "[a-d]",
        "[A-Za-z0-9_./-]{1,8}",
        prop_oneof!["in", "not", "has", "all", "global", "contains", "starts", "ends", "with", "notin"]
    ]
    .prop_map(|text: String| text.into())
}

/// Contains one kind of quote at most: the language cannot express a string with both.
fn value() -> impl Strategy<Value = Arc<str>> {
    prop_oneof!["[a-d]", "[ -&(-~é]{0,6}", "[ !#-~]{0,6}"].prop_map(|text: String| text.into())
}

fn set() -> impl Strategy<Value = Arc<[Arc<str>]>> {
    prop::collection::btree_set(value(), 0..4).prop_map(|set| set.into_iter().collect())
}

/// What the parser can give: no `!` directly inside `!`, and chains of two or more.
fn expression() -> impl Strategy<Value = Expr> {
    let leaf = prop_oneof![
        Just(Expr::All),
        Just(Expr::Global),
        name().prop_map(Expr::Has),
        (name(), value()).prop_map(|(key, value)| Expr::Equal(key, value)),
        (name(), value()).prop_map(|(key, value)| Expr::NotEqual(key, value)),
        (name(), value()).prop_map(|(key, value)| Expr::Contains(key, value)),
        (name(), value()).prop_map(|(key, value)| Expr::StartsWith(key, value)),
        (name(), value()).prop_map(|(key, value)| Expr::EndsWith(key, value)),
        (name(), set()).prop_map(|(key, values)| Expr::In(key, values)),
        (name(), set()).prop_map(|(key, values)| Expr::NotIn(key, values)),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            inner.clone().prop_map(|inner| match inner {
                Expr::Not(inner) => (*inner).clone(),
                other => Expr::Not(Arc::new(other)),
            }),
            prop::collection::vec(inner.clone(), 2..4).prop_map(|parts| Expr::And(parts.into())),
            prop::collection::vec(inner, 2..4).prop_map(|parts| Expr::Or(parts.into())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// The canonical form reads back as the same tree, and so stays what it is.
    #[test]
    fn canonical_forms_read_back(expr in expression()) {
        let canonical = expr.to_string();
        let parsed = Selector::parse(&canonical).map_err(|error| TestCaseError::fail(format!("{canonical}: {error}")))?;
        prop_assert_eq!(&*parsed.canonical, &canonical);
        prop_assert_eq!(parsed.expr, expr);
    }

    #[test]
    fn canonical_forms_mean_the_same(
        expr in expression(),
        labels in prop::collection::btree_map(name(), value(), 0..6),
    ) {
        let parsed = Selector::parse(&expr.to_string()).expect("canonical forms parse");
        prop_assert_eq!(parsed.evaluate(&labels), expr.evaluate(&labels));
    }

    /// What is unknown may be anything: each way to know it agrees with what was certain.
    #[test]
    fn unknown_covers_every_way_to_know(expr in expression(), value in prop::option::of(value())) {
        struct Only(Label<'static>);
        impl LabelLookup for Only {
            fn label(&self, key: &str) -> Label<'_> {
                if key == "a" { self.0 } else { Label::Absent }
            }
        }
        let certain = expr.evaluate(&Only(Label::Unknown));
        let known: BTreeMap<Arc<str>, Arc<str>> = value.into_iter().map(|value| ("a".into(), value)).collect();
        let value = expr.evaluate(&known);
        prop_assert!(certain == Tri::Unknown || certain == value, "{} was {:?}, is {:?}", expr, certain, value);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in any::<String>()) {
        property::holds_of(&text);
    }

    /// Text of the language's own pieces gets further into the parser.
    #[test]
    fn no_pieces_make_the_parser_panic(
        pieces in prop::collection::vec(
            prop::sample::select(vec![
                "a", "has(", "all()", "global(", ")", "(", "!", "!=", "==", "=", "&&", "||", "&", "in", "not", " ", "\t",
                "{", "}", ",", "'x'", "\"y\"", "'", "contains", "starts", "with", "ends", "\n", "é",
            ]),
            0..12,
        ),
    ) {
        property::holds_of(&pieces.concat());
    }
}
