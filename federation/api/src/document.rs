//! YAML (and so JSON) into values that remember their lines, read as Kubernetes' decoder reads them.
//!
//! A file is cut at its `---` lines first, so that one broken document leaves its neighbours whole. Grammar and scalars are
//! those of go-yaml, which `kubectl` and API servers read with: a port of libyaml, with YAML 1.1's scalars. Where they would
//! silently ignore something, this reader refuses it: text after the end of a document, and duplicate keys.
//!
//! A document is one list of [`Item`]s of 16 bytes in the order of the text, which point into it; so that hundreds of megabytes
//! can be read in little more memory than they take themselves. A [`Node`] is a place in that list.

mod de;
mod events;
mod json;
mod load;
mod locator;
mod scalar;
mod scan;
mod tree;

pub use self::de::DecodeError;
pub use self::locator::Locator;
pub use self::scalar::Scalar;
pub use self::tree::{
    Document, Fault, FaultKind, MAX_DEPTH, MAX_FAULTS, MAX_REPEATED_VALUES, Node, Notes, SyntaxError,
};

/// The longest text that is read: positions in it have 32 bits, and a document's side text is at most as long as its own.
const MAX_TEXT_BYTES: usize = 1 << 30;

/// The documents of a file, one after another. Empty ones are left out.
pub fn documents(text: &str) -> impl Iterator<Item = Result<Document<'_>, SyntaxError>> {
    let too_long = (text.len() > MAX_TEXT_BYTES)
        .then(|| Err(SyntaxError { line: 1, message: format!("longer than {MAX_TEXT_BYTES} bytes") }));
    // One JSON value, which is what API servers send, is not looked at twice.
    let whole = if too_long.is_none() && text.starts_with('{') { json::parse(text, 1) } else { None };
    let pieces = if too_long.is_some() || whole.is_some() { Vec::new() } else { pieces(text) };
    let whole = whole.map(|document| Ok(document.with_typed_items()));
    too_long.into_iter().chain(whole).chain(pieces.into_iter().filter_map(|piece| parse_one(&piece).transpose()))
}

/// What lies between two `---` lines.
struct Piece<'t> {
    lines_before: u32,
    text: &'t str,
    /// A line that starts with `---` and text.
    wrong_marker: Option<u32>,
}

/// JSON values one after another, as `kubectl` writes and reads them; `None` where the text is anything else.
fn json_pieces(text: &str) -> Option<Vec<Piece<'_>>> {
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
                    pieces.push(Piece {
                        lines_before: start_line,
                        text: &text[start.take()?..=at],
                        wrong_marker: None,
                    });
                }
            }
            byte if depth == 0 && !byte.is_ascii_whitespace() => return None,
            _ => {}
        }
        line += u32::from(byte == b'\n');
    }
    (depth == 0).then_some(pieces)
}

/// Cuts at lines that start with `---`, which end a document wherever they occur.
fn pieces(text: &str) -> Vec<Piece<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some(pieces) = json_pieces(text) {
        return pieces;
    }
    let mut pieces = Vec::new();
    let (mut start, mut lines_before, mut at, mut wrong_marker) = (0, 0, 0, None);
    for (number, line) in (0..).zip(text.split_inclusive('\n')) {
        if let Some(rest) = line.strip_prefix("---") {
            let marks = rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']);
            if marks && at > start {
                pieces.push(Piece { lines_before, text: &text[start..at], wrong_marker: wrong_marker.take() });
                (start, lines_before) = (at, number);
            }
            if !marks {
                wrong_marker.get_or_insert(number + 1);
            }
        }
        at += line.len();
    }
    pieces.push(Piece { lines_before, text: &text[start..], wrong_marker });
    pieces
}

fn parse_one<'t>(piece: &Piece<'t>) -> Result<Option<Document<'t>>, SyntaxError> {
    let first_line = piece.lines_before + 1;
    let document = match json::parse(piece.text, first_line) {
        Some(document) => Some(document),
        // Directives precede the `---` at which the file was cut.
        None if piece.text.lines().all(|line| line.is_empty() || line.starts_with(['#', '%'])) => None,
        None => match piece.wrong_marker {
            Some(line) => {
                let message = "not valid YAML: `---` starts a document, and only a comment may follow it".to_owned();
                return Err(SyntaxError { line, message });
            }
            None => load::load(piece.text, first_line)?,
        },
    };
    Ok(document.map(Document::with_typed_items))
}

#[cfg(test)]
mod tests;
