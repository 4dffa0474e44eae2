//! Scalars: blocks, quoted and plain text, with their folding and escapes.

use super::{Kind, Scanned, Scanner, Span};

impl<'t> Scanner<'t> {
    fn scalar(&mut self, line: u32, span: Span, plain: bool) {
        self.push(line, Kind::Scalar { span, plain });
    }

    fn source(&self, range: std::ops::Range<usize>) -> Span {
        Span { start: range.start as u32, len: range.len() as u32, side: false }
    }

    /// What was written to the side text from `start`.
    fn side_from(&self, start: usize) -> Span {
        Span { start: start as u32, len: (self.side.len() - start) as u32, side: true }
    }

    pub(super) fn block_scalar(&mut self, literal: bool) -> Scanned<()> {
        self.drop_key()?;
        self.key_allowed = true;
        let line = self.line;
        self.pos += 1;
        // Either may come first.
        let (mut chomp, mut increment) = (None, None);
        for _ in 0..2 {
            match self.at(0) {
                sign @ (b'+' | b'-') if chomp.is_none() => chomp = Some(sign),
                b'0' if increment.is_none() => return self.error("a block cannot be indented by 0"),
                digit @ b'1'..=b'9' if increment.is_none() => increment = Some(isize::from(digit - b'0')),
                _ => break,
            }
            self.pos += 1;
        }
        self.skip_blanks();
        self.end_line("\"|\" or \">\"")?;
        let mut indent = increment.map(|increment| self.indent.max(0) + increment);
        let start = self.side.len();
        let mut folded = Folded::default();
        self.block_breaks(&mut indent, &mut folded, line)?;
        let indent = indent.unwrap_or(1);
        let mut after_blank = false;
        while self.column() == indent && !self.is_end() {
            let starts_blank = self.is_blank(0);
            folded.write(&mut self.side, literal || after_blank || starts_blank);
            after_blank = starts_blank;
            let from = self.pos;
            self.skip_to_break();
            self.side.push_str(&self.text[from..self.pos]);
            let len = self.break_len(0);
            if len > 0 {
                folded.first = Some(self.skip_break(len));
            }
            self.block_breaks(&mut Some(indent), &mut folded, line)?;
        }
        if chomp != Some(b'-') {
            self.side.push_str(folded.first.unwrap_or(""));
        }
        if chomp == Some(b'+') {
            self.side.push_str(&folded.more);
        }
        let span = self.side_from(start);
        self.scalar(line, span, false);
        Ok(())
    }

    /// Empty lines of a block, and the indentation of the next one; where it is not known yet, the deepest of them has it.
    fn block_breaks(&mut self, indent: &mut Option<isize>, folded: &mut Folded<'t>, line: u32) -> Scanned<()> {
        let mut deepest = 0;
        loop {
            while indent.is_none_or(|indent| self.column() < indent) && self.at(0) == b' ' {
                self.pos += 1;
            }
            deepest = deepest.max(self.column());
            if indent.is_none_or(|indent| self.column() < indent) && self.at(0) == b'\t' {
                return self.error_at(line, "a tab cannot indent a block");
            }
            match self.break_len(0) {
                0 => break,
                len => {
                    let text = self.skip_break(len);
                    folded.more.push_str(text);
                }
            }
        }
        indent.get_or_insert(deepest.max(self.indent + 1).max(1));
        Ok(())
    }

    pub(super) fn quoted(&mut self, quote: u8) -> Scanned<()> {
        self.save_key()?;
        self.key_allowed = false;
        let line = self.line;
        self.pos += 1;
        let from = self.pos;
        // Most are written as they are meant, on one line.
        while !matches!(self.at(0), 0 | b'"' | b'\'' | b'\\' | b'\n' | b'\r' | 0xc2 | 0xe2) {
            self.pos += 1;
        }
        if self.at(0) == quote && self.at(1) != b'\'' {
            let span = self.source(from..self.pos);
            self.pos += 1;
            self.scalar(line, span, false);
            return Ok(());
        }
        self.pos = from;
        let start = self.side.len();
        let mut folded = Folded::default();
        loop {
            if self.is_marker() {
                return self.error_at(line, "quoted text ends where a document does; its end quote is missing");
            }
            if self.is_end() {
                return self.error_at(line, "quoted text without an end quote");
            }
            let mut folds = false;
            while !self.is_blank_or_break(0) {
                match self.at(0) {
                    b'\'' if quote == b'\'' && self.at(1) == b'\'' => {
                        self.side.push('\'');
                        self.pos += 2;
                    }
                    byte if byte == quote => break,
                    b'\\' if quote == b'"' => {
                        let len = self.break_len(1);
                        if len > 0 {
                            self.pos += 1;
                            self.skip_break(len);
                            folds = true;
                            break;
                        }
                        self.escape(line)?;
                    }
                    _ => {
                        let from = self.pos;
                        while !self.is_blank_or_break(0) && !matches!(self.at(0), b'"' | b'\'' | b'\\') {
                            self.pos += 1;
                        }
                        // A quote of the other sort, or a backslash in single quotes.
                        self.pos += usize::from(self.pos == from);
                        self.side.push_str(&self.text[from..self.pos]);
                    }
                }
            }
            if self.at(0) == quote {
                break;
            }
            let from = self.pos;
            let mut blanks = from..from;
            while !self.is_end() {
                let len = self.break_len(0);
                if len > 0 {
                    let text = self.skip_break(len);
                    match folds {
                        false => folded.first = Some(text),
                        true => folded.more.push_str(text),
                    }
                    folds = true;
                } else if self.is_blank(0) {
                    self.pos += 1;
                    if !folds {
                        blanks.end = self.pos;
                    }
                } else {
                    break;
                }
            }
            match folds {
                true => folded.write(&mut self.side, false),
                false => self.side.push_str(&self.text[blanks]),
            }
        }
        self.pos += 1;
        let span = self.side_from(start);
        self.scalar(line, span, false);
        Ok(())
    }

    /// A backslash and its meaning.
    fn escape(&mut self, line: u32) -> Scanned<()> {
        let (character, digits) = match self.at(1) {
            b'0' => ('\0', 0),
            b'a' => ('\u{7}', 0),
            b'b' => ('\u{8}', 0),
            b't' | b'\t' => ('\t', 0),
            b'n' => ('\n', 0),
            b'v' => ('\u{b}', 0),
            b'f' => ('\u{c}', 0),
            b'r' => ('\r', 0),
            b'e' => ('\u{1b}', 0),
            b' ' => (' ', 0),
            b'"' => ('"', 0),
            b'\'' => ('\'', 0),
            b'\\' => ('\\', 0),
            b'N' => ('\u{85}', 0),
            b'_' => ('\u{a0}', 0),
            b'L' => ('\u{2028}', 0),
            b'P' => ('\u{2029}', 0),
            b'x' => (' ', 2),
            b'u' => (' ', 4),
            b'U' => (' ', 8),
            _ => return self.error_at(line, "unknown escape sequence in quoted text"),
        };
        self.pos += 2;
        if digits == 0 {
            self.side.push(character);
            return Ok(());
        }
        let hex = self.bytes.get(self.pos..self.pos + digits).filter(|hex| hex.iter().all(u8::is_ascii_hexdigit));
        let hex = hex.and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32) {
            Some(character) => self.side.push(character),
            None => return self.error_at(line, "an escape sequence in quoted text is not a character"),
        }
        self.pos += digits;
        Ok(())
    }

    pub(super) fn plain(&mut self) -> Scanned<()> {
        self.save_key()?;
        self.key_allowed = false;
        let line = self.line;
        let indent = self.indent + 1;
        let (mut from, mut end) = (self.pos, self.pos);
        // Where the text starts in the side text, once it is folded.
        let mut side = None;
        let mut folded = Folded::default();
        let mut folds = false;
        while !self.is_marker() && self.at(0) != b'#' {
            let word = self.pos;
            while !self.is_blank_or_break(0) && !self.ends_plain() {
                self.pos += 1;
            }
            if self.pos > word {
                if folds {
                    let start = *side.get_or_insert(self.side.len());
                    self.side.push_str(&self.text[from..end]);
                    debug_assert!(start <= self.side.len());
                    folded.write(&mut self.side, false);
                    from = word;
                    folds = false;
                }
                end = self.pos;
            }
            if !self.is_blank(0) && self.break_len(0) == 0 {
                break;
            }
            loop {
                let len = self.break_len(0);
                if len > 0 {
                    let text = self.skip_break(len);
                    match folds {
                        false => folded.first = Some(text),
                        true => folded.more.push_str(text),
                    }
                    folds = true;
                } else if self.is_blank(0) {
                    if folds && self.column() < indent && self.at(0) == b'\t' {
                        return self.error("a tab cannot indent a line of text");
                    }
                    self.pos += 1;
                } else {
                    break;
                }
            }
            if self.flow == 0 && self.column() < indent {
                break;
            }
        }
        let span = match side {
            None => self.source(from..end),
            Some(start) => {
                self.side.push_str(&self.text[from..end]);
                self.side_from(start)
            }
        };
        self.scalar(line, span, true);
        self.key_allowed |= folds;
        Ok(())
    }

    fn ends_plain(&self) -> bool {
        match self.at(0) {
            b':' => self.is_blank_or_break(1),
            b',' | b'?' | b'[' | b']' | b'{' | b'}' => self.flow > 0,
            _ => false,
        }
    }
}

/// Line breaks that wait to be folded.
#[derive(Debug, Default)]
struct Folded<'t> {
    first: Option<&'t str>,
    more: String,
}

impl Folded<'_> {
    /// One break is a blank, more are one fewer; all of them stay where `kept`, and where the first is LS or PS.
    fn write(&mut self, text: &mut String, kept: bool) {
        match self.first.take() {
            Some("\n") if !kept => text.push_str(if self.more.is_empty() { " " } else { "" }),
            first => text.push_str(first.unwrap_or("")),
        }
        text.push_str(&self.more);
        self.more.clear();
    }
}
