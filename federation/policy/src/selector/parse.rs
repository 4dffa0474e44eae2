//! The parser: one pass over the bytes, with an explicit stack, so that deep nesting causes an error and not a stack overflow.

use std::sync::Arc;

use super::expr::Expr;

/// The longest label key, in bytes (Calico's limit).
pub const MAX_LABEL_BYTES: usize = 512;

/// The maximum nesting of parentheses, as written and in the canonical form, which adds parentheses around each chain: every accepted
/// selector has a canonical form that is accepted as well. Selectors in Calico policies have at most 1024 characters, so valid ones
/// are far below. Evaluation recurses at most three frames per level.
pub const MAX_NESTING: usize = 512;

/// A malformed expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("column {column}: {message}")]
pub struct SyntaxError {
    /// The byte at which parsing failed, counted from 1; one past the end if something is missing.
    pub column: usize,
    pub message: String,
}

/// The number of characters of a malformed expression that an error shows on each side of the column.
const SHOWN_CHARACTERS: usize = 40;

impl SyntaxError {
    /// The part of `text` around the column, and the number of its characters before the column.
    pub fn excerpt(&self, text: &str) -> (String, usize) {
        let at = text.floor_char_boundary(self.column - 1);
        let (before, after) = text.split_at(at);
        let start = before.char_indices().rev().nth(SHOWN_CHARACTERS).map(|(at, it)| at + it.len_utf8());
        let end = after.char_indices().nth(SHOWN_CHARACTERS).map_or(after.len(), |(at, _)| at);
        let before = format!("{}{}", if start.is_some() { "…" } else { "" }, &before[start.unwrap_or_default()..]);
        let cut = if end < after.len() { "…" } else { "" };
        (format!("{before}{}{cut}", &after[..end]), before.chars().count())
    }
}

pub(super) fn parse(text: &str) -> Result<Expr, SyntaxError> {
    let mut cursor = Cursor { text, at: 0 };
    cursor.skip_blank();
    if cursor.rest().is_empty() {
        return Ok(Expr::All);
    }
    // The innermost parenthesis is last; the first is the whole expression.
    let mut open = vec![Level::default()];
    loop {
        let mut negated = false;
        let operand = loop {
            cursor.skip_blank();
            if cursor.rest().starts_with("!=") {
                return Err(cursor.error("expected an operation"));
            }
            if cursor.take("!") {
                negated = !negated;
            } else if cursor.take("(") {
                if open.len() > MAX_NESTING {
                    return Err(cursor.error_before("(", &format!("nested deeper than {MAX_NESTING}")));
                }
                open.push(Level { negated, ..Level::default() });
                negated = false;
            } else {
                break cursor.operation()?;
            }
        };
        let mut operand = negate_if(negated, operand);
        // How deeply chains are nested in it.
        let mut chains = 0;
        // What follows an operand: an operator, or the end of one or more levels.
        loop {
            cursor.skip_blank();
            let depth = open.len();
            let Some(level) = open.last_mut() else {
                return Err(cursor.error("expected the end"));
            };
            level.conjuncts.push(operand);
            level.chains_in_conjuncts = level.chains_in_conjuncts.max(chains);
            if cursor.take("&&") {
                break;
            }
            level.end_conjunction();
            if cursor.take("||") {
                break;
            }
            if cursor.rest().is_empty() {
                if depth > 1 {
                    return Err(cursor.error("expected )"));
                }
                level.end(&cursor)?;
                return Ok(chain(std::mem::take(&mut level.disjuncts), Expr::Or));
            }
            if depth == 1 || !cursor.take(")") {
                return Err(cursor.error(match cursor.rest().as_bytes()[0] {
                    b'&' => "expected &&",
                    b'|' => "expected ||",
                    _ if depth > 1 => "expected &&, || or )",
                    _ => "expected &&, || or the end",
                }));
            }
            chains = level.end(&cursor)?;
            operand = negate_if(level.negated, chain(std::mem::take(&mut level.disjuncts), Expr::Or));
            open.pop();
        }
    }
}

/// One parenthesis that is still open.
#[derive(Default)]
struct Level {
    negated: bool,
    disjuncts: Vec<Expr>,
    conjuncts: Vec<Expr>,
    chains_in_disjuncts: usize,
    chains_in_conjuncts: usize,
}

impl Level {
    /// How deeply chains are nested, this level's own included.
    fn end(&self, cursor: &Cursor<'_>) -> Result<usize, SyntaxError> {
        let chains = self.chains_in_disjuncts + usize::from(self.disjuncts.len() > 1);
        if chains > MAX_NESTING {
            return Err(cursor.error(&format!("nested deeper than {MAX_NESTING}")));
        }
        Ok(chains)
    }

    fn end_conjunction(&mut self) {
        let conjuncts = std::mem::take(&mut self.conjuncts);
        let chains = std::mem::take(&mut self.chains_in_conjuncts) + usize::from(conjuncts.len() > 1);
        self.chains_in_disjuncts = self.chains_in_disjuncts.max(chains);
        self.disjuncts.push(chain(conjuncts, Expr::And));
    }
}

/// A chain of one part is that part.
fn chain(mut parts: Vec<Expr>, join: fn(Arc<[Expr]>) -> Expr) -> Expr {
    if parts.len() == 1 { parts.remove(0) } else { join(parts.into()) }
}

fn negate_if(negated: bool, expr: Expr) -> Expr {
    if negated { Expr::Not(Arc::new(expr)) } else { expr }
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn error(&self, message: &str) -> SyntaxError {
        SyntaxError { column: self.at + 1, message: message.to_owned() }
    }

    /// An error at `taken`, which was just read.
    fn error_before(&self, taken: &str, message: &str) -> SyntaxError {
        SyntaxError { column: self.at - taken.len() + 1, message: message.to_owned() }
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// Only space and tab are white space.
    fn skip_blank(&mut self) {
        self.at += self.rest().bytes().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    }

    fn identifier(&mut self) -> Result<Arc<str>, SyntaxError> {
        let length = self.rest().bytes().take_while(|byte| is_label_byte(*byte)).count();
        if length == 0 {
            return Err(self.error("expected a label"));
        }
        if length > MAX_LABEL_BYTES {
            return Err(self.error(&format!("a label has at most {MAX_LABEL_BYTES} bytes")));
        }
        let label = &self.rest()[..length];
        self.at += length;
        Ok(label.into())
    }

    /// `has(label)`, `all()`, `global()` or a comparison. Words are keywords by position only: `has(`, `all(` and
    /// `global(` at the start of an operation, without a space, and operators directly after a label.
    fn operation(&mut self) -> Result<Expr, SyntaxError> {
        if self.take("has(") {
            self.skip_blank();
            let key = self.identifier()?;
            self.close()?;
            return Ok(Expr::Has(key));
        }
        for (word, expr) in [("all(", Expr::All), ("global(", Expr::Global)] {
            if self.take(word) {
                self.close()?;
                return Ok(expr);
            }
        }
        if !self.rest().bytes().next().is_some_and(is_label_byte) {
            return Err(self.error("expected an operation"));
        }
        let key = self.identifier()?;
        self.comparison(key)
    }

    fn close(&mut self) -> Result<(), SyntaxError> {
        self.skip_blank();
        if self.take(")") { Ok(()) } else { Err(self.error("expected )")) }
    }

    fn comparison(&mut self, key: Arc<str>) -> Result<Expr, SyntaxError> {
        self.skip_blank();
        if self.take("==") {
            return Ok(Expr::Equal(key, self.string()?));
        }
        if self.take("!=") {
            return Ok(Expr::NotEqual(key, self.string()?));
        }
        if self.take_words(&["contains"]) {
            return Ok(Expr::Contains(key, self.string()?));
        }
        if self.take_words(&["starts", "with"]) {
            return Ok(Expr::StartsWith(key, self.string()?));
        }
        if self.take_words(&["ends", "with"]) {
            return Ok(Expr::EndsWith(key, self.string()?));
        }
        if self.take_words(&["not", "in"]) {
            return Ok(Expr::NotIn(key, self.set()?));
        }
        if self.take_words(&["in"]) {
            return Ok(Expr::In(key, self.set()?));
        }
        Err(self.error(match self.rest().as_bytes().first() {
            Some(b'=') => "expected an operator after the label: write == for equality",
            _ => "expected an operator after the label",
        }))
    }

    /// Takes words with or without white space between them, when no label byte follows the last.
    fn take_words(&mut self, words: &[&str]) -> bool {
        let start = self.at;
        let found = words.iter().all(|word| {
            self.skip_blank();
            self.take(word)
        }) && !self.rest().bytes().next().is_some_and(is_label_byte);
        if !found {
            self.at = start;
        }
        found
    }

    fn string(&mut self) -> Result<Arc<str>, SyntaxError> {
        self.skip_blank();
        let quote = match self.rest().as_bytes().first() {
            Some(quote @ (b'"' | b'\'')) => *quote as char,
            _ => return Err(self.error("expected a string")),
        };
        let inner = &self.rest()[1..];
        let Some(length) = inner.find(quote) else {
            return Err(self.error("the string does not end"));
        };
        self.at += length + 2;
        Ok(inner[..length].into())
    }

    fn set(&mut self) -> Result<Arc<[Arc<str>]>, SyntaxError> {
        self.skip_blank();
        if !self.take("{") {
            return Err(self.error("expected a set: {"));
        }
        let mut values = Vec::new();
        loop {
            self.skip_blank();
            if self.take("}") {
                break;
            }
            values.push(self.string()?);
            self.skip_blank();
            if !self.take(",") {
                if self.take("}") {
                    break;
                }
                return Err(self.error("expected , or }"));
            }
        }
        values.sort();
        values.dedup();
        Ok(values.into())
    }
}

fn is_label_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'/' | b'-')
}
