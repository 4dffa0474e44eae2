//! Prints untrusted text on a terminal and in a log.
//!
//! A member, an agent or the author of a manifest chooses names and messages that an administrator reads. A control
//! character in them moves the cursor, recolours or rewrites what was printed before; a line break forges a row; a bidirectional
//! override shows words in another order. Everything that Hanse prints goes through this module, which prints such
//! characters as JSON escapes (`\u001b`, `\n`), so that JSON stays JSON.

use std::borrow::Cow;
use std::fmt::{Display, Write as _};
use std::io::{self, Write};

use serde::Serialize;

/// Whether a character acts on what is shown around it, or is not shown at all: controls of ASCII and of ISO 6429, Unicode's
/// line and paragraph separators, bidirectional marks, overrides and isolates, and characters without width.
fn acts(character: char) -> bool {
    matches!(character,
        '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}'
        | '\u{ad}' | '\u{61c}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// `text` in one line, whatever it is.
pub fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, acts)
}

/// `text` with its line breaks: of text whose parts went through [`one_line`].
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |character| character != '\n' && acts(character))
}

fn escaped(text: &str, acts: impl Fn(char) -> bool) -> Cow<'_, str> {
    let Some(first) = text.find(&acts) else { return Cow::Borrowed(text) };
    let mut escaped = String::with_capacity(text.len() + 16);
    escaped.push_str(&text[..first]);
    for character in text[first..].chars() {
        match character {
            _ if !acts(character) => escaped.push(character),
            '\n' => escaped.push_str("\\n"),
            '\r' => escaped.push_str("\\r"),
            '\t' => escaped.push_str("\\t"),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // Writing to a string does not fail.
                    let _ = write!(escaped, "\\u{unit:04x}");
                }
            }
        }
    }
    Cow::Owned(escaped)
}

/// The version of the objects that commands print for programs. It changes when a key is removed or changes its meaning; keys may
/// be added at any time.
pub const API_VERSION: &str = "cli.hanse.dev/v1";

/// An object with its version and kind.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Versioned<T> {
    api_version: &'static str,
    kind: &'static str,
    #[serde(flatten)]
    object: T,
}

impl<T> Versioned<T> {
    pub fn new(kind: &'static str, object: T) -> Self {
        Self { api_version: API_VERSION, kind, object }
    }
}

/// A list, as the object of a [`Versioned`].
#[derive(Debug, Serialize)]
pub struct Items<T> {
    pub items: T,
}

/// A YAML document. Plain text of YAML has no escapes; where some is needed the document is JSON, which is YAML.
///
/// # Errors
/// When `value` cannot be serialised.
pub fn yaml<T: Serialize + ?Sized>(value: &T) -> Result<String, serde_yaml_ng::Error> {
    let text = serde_yaml_ng::to_string(value)?;
    if let Cow::Borrowed(_) = lines(&text) {
        return Ok(format!("---\n{text}"));
    }
    let json = serde_json::to_string_pretty(value).map_err(<serde_yaml_ng::Error as serde::ser::Error>::custom)?;
    Ok(format!("---\n{}\n", lines(&json)))
}

/// Prints one line to standard output.
///
/// # Errors
/// When standard output cannot be written to; the reader may have gone away.
pub fn line(text: impl Display) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{}", one_line(&text.to_string()))
}

/// Writes one line to standard error. A closed standard error is ignored.
pub fn note(text: impl Display) {
    // One write, so that the lines of several processes do not mix.
    let line = format!("{}\n", one_line(&text.to_string()));
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// Standard output, for text with line breaks of its own.
pub fn stdout() -> Stdout {
    Escaping(io::stdout().lock())
}

pub type Stdout = Escaping<io::StdoutLock<'static>>;

/// Escapes what is written, but for line breaks. Each write is of whole characters, as formatting does it.
#[derive(Debug)]
pub struct Escaping<W>(W);

impl<W: Write> Write for Escaping<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Nearly everything is plain, and answers may be large.
        match bytes.iter().all(|byte| matches!(byte, b'\n' | b' '..=b'~')) {
            true => self.0.write_all(bytes)?,
            false => self.0.write_all(lines(&String::from_utf8_lossy(bytes)).as_bytes())?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Writes log events to standard error, one line each: line breaks in fields are escaped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogWriter;

impl Write for LogWriter {
    /// An event is formatted into memory, and then written by one call. Where standard error is closed or full, the event is
    /// dropped: the subscriber would report an error there, and panic.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().lock().write_all(&log_line(event));
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log_line(event: &[u8]) -> Vec<u8> {
    let event = String::from_utf8_lossy(event);
    let mut line = one_line(event.strip_suffix('\n').unwrap_or(&event)).into_owned().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_acts_on_a_terminal_is_escaped() {
        for (text, expected) in [
            ("plain: é 漢 ✔ \\n", "plain: é 漢 ✔ \\n"),
            ("\u{1b}[2J\u{1b}[31mgone", "\\u001b[2J\\u001b[31mgone"),
            ("\u{9b}2J\u{90}q\u{7f}\u{8}\0", "\\u009b2J\\u0090q\\u007f\\u0008\\u0000"),
            ("a\nforged  row\r\tx", "a\\nforged  row\\r\\tx"),
            ("\u{85}\u{2028}\u{2029}", "\\u0085\\u2028\\u2029"),
            (
                "\u{202e}live\u{202c} \u{2066}x\u{2069}\u{200f}\u{61c}",
                "\\u202elive\\u202c \\u2066x\\u2069\\u200f\\u061c",
            ),
            ("ad\u{200b}a \u{feff}\u{2060}\u{ad}", "ad\\u200ba \\ufeff\\u2060\\u00ad"),
            ("\u{e0041}", "\\udb40\\udc41"),
        ] {
            assert_eq!(one_line(text), expected, "{text:?}");
        }
        assert!(matches!(one_line("plain"), Cow::Borrowed(_)));
        assert_eq!(lines("a\n\u{1b}b\n"), "a\n\\u001bb\n");
    }

    /// Escaping a document of JSON changes how it is written and not what it says.
    #[test]
    fn json_stays_json() {
        let hostile: String = (0..=0x10ffff).filter_map(char::from_u32).filter(|it| acts(*it)).collect();
        let value = serde_json::json!({ "a\u{202e}": hostile, "b": "é\n" });
        let mut written = Escaping(Vec::new());
        serde_json::to_writer_pretty(&mut written, &value).expect("written");
        let text = String::from_utf8(written.0).expect("UTF-8");
        assert!(text.contains('\n') && !text.chars().any(|it| it != '\n' && acts(it)), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), value);
    }

    #[test]
    fn an_event_of_a_log_is_one_line() {
        use std::sync::{Arc, Mutex};
        #[derive(Clone, Default)]
        struct Kept(Arc<Mutex<Vec<u8>>>);
        impl Write for Kept {
            fn write(&mut self, event: &[u8]) -> io::Result<usize> {
                self.0.lock().expect("not poisoned").extend(log_line(event));
                Ok(event.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let hostile = "x\n2026-01-01T00:00:00Z  INFO forged\u{1b}[2K\u{9b}1A\u{202e}";
        for json in [false, true] {
            let kept = Kept::default();
            let writer = kept.clone();
            let builder = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false);
            let log = || {
                let error = io::Error::other(hostile);
                tracing::info!(cluster = hostile, %error, debug = ?hostile, "{hostile}");
            };
            match json {
                true => tracing::subscriber::with_default(builder.json().flatten_event(true).finish(), log),
                false => tracing::subscriber::with_default(builder.finish(), log),
            }
            let text = String::from_utf8(kept.0.lock().expect("not poisoned").clone()).expect("UTF-8");
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            assert!(text.ends_with('\n') && !text.trim_end().chars().any(acts), "{text:?}");
            if json {
                let event: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                assert_eq!(event["cluster"], hostile);
            }
        }
    }
}
