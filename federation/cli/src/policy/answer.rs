//! Answers of the commands, in JSON and YAML.

use serde::Serialize;

use crate::output::{self, Format};

/// An answer that does not include refused objects.
#[derive(Serialize)]
struct Incomplete<'a, T> {
    #[serde(flatten)]
    answer: &'a T,
    incomplete: bool,
}

/// One answer as a line of JSON or a document of YAML, with `incomplete: true` if an object was refused.
pub fn write_answer(
    out: &mut impl std::io::Write,
    format: Format,
    incomplete: bool,
    answer: &impl Serialize,
) -> anyhow::Result<()> {
    match incomplete {
        true => output::write(out, format, &Incomplete { answer, incomplete }),
        false => output::write(out, format, answer),
    }
}
