//! Selectors: what is accepted has a canonical form that reads back, says the same of every label set, and stays.

use hanse_policy::selector::{Expr, Label, LabelLookup, MAX_NESTING, Selector};

use super::{Outcome, Target};

pub struct Selectors;

/// Every label that is asked for has this value.
struct Everywhere(Label<'static>);

impl LabelLookup for Everywhere {
    fn label(&self, _: &str) -> Label<'_> {
        self.0
    }
}

impl Target for Selectors {
    const NAME: &'static str = "selectors";
    const RUNS: u64 = 60_000;
    const WORDS: &'static [&'static str] = &[
        "all()",
        "global()",
        "has(",
        ")",
        "(",
        "!",
        "&&",
        "||",
        "==",
        "!=",
        " in ",
        " not in ",
        "notin",
        "{",
        "}",
        ",",
        " contains ",
        " starts with ",
        "startswith",
        " ends with ",
        "endswith",
        "'",
        "\"",
        "\t",
        "a",
        "projectcalico.org/name",
        "''",
        "{'a', \"b\"}",
        "é",
        "\u{a0}",
        "\n",
    ];

    fn seeds() -> Vec<Vec<u8>> {
        let seeds = [
            "",
            "all()",
            "!global() || has(a.b/c_d-e)",
            "a == 'b' && c != \"d\" || !(e contains 'f' && g starts with 'h')",
            "role in {'db', \"cache\", 'db'} && tier not in {} && ! ! has(x)",
            "in in {'in'} && not notin {'x'} || has(has) || starts startswith 'x' && ends ends with ''",
            "((((a == '\"')))) && (b == \"'\" && c == 'd') && (e == 'f' || (g == 'h'))",
            "!(!(a == 'b'))",
        ];
        seeds.into_iter().map(|seed| seed.as_bytes().to_vec()).collect()
    }

    fn run(input: &[u8]) -> Outcome {
        let text = String::from_utf8_lossy(input);
        let selector = match Selector::parse(&text) {
            Ok(selector) => selector,
            Err(error) => {
                assert!((1..=text.len() + 1).contains(&error.column), "column {} of {}", error.column, text.len());
                return Outcome { accepted: false, how: error.message };
            }
        };
        let canonical = &*selector.canonical;
        let again = match Selector::parse(canonical) {
            Ok(again) => again,
            // Chains get parentheses, so that the deepest nesting may become one deeper.
            Err(error) if error.message.contains(&MAX_NESTING.to_string()) => {
                return Outcome { accepted: true, how: "deep".to_owned() };
            }
            Err(error) => panic!("{text:?} has the canonical form {canonical:?}, which does not read: {error}"),
        };
        for labels in [Label::Absent, Label::Unknown, Label::Present(""), Label::Present("a"), Label::Present("b'\"")] {
            let labels = Everywhere(labels);
            assert_eq!(selector.evaluate(&labels), again.evaluate(&labels), "{text:?} and {canonical:?}");
        }
        // Of `!(!a)` the form is `!!a`, which reads as `a`: so the language has it.
        if !canonical.contains("!!") {
            assert_eq!((&*again.canonical, again.id()), (canonical, selector.id()), "{text:?}");
        }
        let last = Selector::parse(&again.canonical).expect("a canonical form reads");
        assert!(last.canonical == again.canonical || again.canonical.contains("!!"), "{text:?}: {}", last.canonical);
        Outcome { accepted: true, how: shape(&selector.expr) }
    }
}

/// Which operators stand where, to a depth that tells kinds of expressions apart.
fn shape(expr: &Expr) -> String {
    let text = format!("{expr:?}");
    let kinds =
        ["All", "Global", "Has", "NotEqual", "Equal", "Contains", "Starts", "Ends", "NotIn", "In", "Not", "And", "Or"];
    kinds.iter().map(|kind| format!("{kind}{}", "+".repeat(text.matches(kind).count().min(4)))).collect()
}
