//! Selectors: [`property::holds_of`] every text.

use hanse_policy::selector::{Expr, Selector, property};

use super::{Outcome, Target};

pub struct Selectors;

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
        property::holds_of(&text);
        match Selector::parse(&text) {
            Ok(selector) => Outcome { accepted: true, how: shape(&selector.expr) },
            Err(error) => Outcome { accepted: false, how: error.message },
        }
    }
}

/// The operators and their positions, to a depth that distinguishes kinds of expressions.
fn shape(expr: &Expr) -> String {
    let text = format!("{expr:?}");
    let kinds =
        ["All", "Global", "Has", "NotEqual", "Equal", "Contains", "Starts", "Ends", "NotIn", "In", "Not", "And", "Or"];
    kinds.iter().map(|kind| format!("{kind}{}", "+".repeat(text.matches(kind).count().min(4)))).collect()
}
