//! Characters into tokens, as go-yaml's scanner (a port of libyaml's) cuts them: YAML 1.1 with its liberties.
//!
//! A key without `?` is recognised only at its `:`, so that tokens wait in a queue while the first of them may still turn
//! out to be a key. Such a key ends within its line and within 1,024 characters. No text is copied that is in the source as it
//! is meant: a [`Span`] points into the source, or into `side` where lines were folded or escapes resolved.

use std::borrow::Cow;
use std::collections::VecDeque;

use super::tree::SyntaxError;

mod text;

/// Flow collections, and indented blocks, within each other. It bounds the memory of what is open, as in go-yaml.
const MAX_OPEN: usize = 10_000;
/// Characters from the start of a key to its `:`.
const MAX_KEY_CHARACTERS: usize = 1024;

/// A piece of text: of the source, or of the side text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub start: u32,
    pub len: u32,
    pub side: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind<'t> {
    StreamEnd,
    /// `%YAML 1.1`.
    Version,
    TagDirective {
        handle: &'t str,
        prefix: Cow<'t, str>,
    },
    DocumentStart,
    DocumentEnd,
    BlockSequenceStart,
    BlockMappingStart,
    BlockEnd,
    FlowSequenceStart,
    FlowSequenceEnd,
    FlowMappingStart,
    FlowMappingEnd,
    BlockEntry,
    FlowEntry,
    Key,
    Value,
    Alias(&'t str),
    Anchor(&'t str),
    /// The handle is empty where the suffix is the whole tag.
    Tag {
        handle: &'t str,
        suffix: Cow<'t, str>,
    },
    Scalar {
        span: Span,
        plain: bool,
    },
}

#[derive(Debug)]
pub(super) struct Token<'t> {
    pub line: u32,
    pub kind: Kind<'t>,
}

/// Where a key without `?` may have started.
#[derive(Debug, Clone, Copy, Default)]
struct SimpleKey {
    possible: bool,
    /// Only a key is valid there.
    required: bool,
    /// The number of its first token.
    token: usize,
    pos: usize,
    row: u32,
    line: u32,
    column: isize,
}

#[derive(Debug)]
pub(super) struct Scanner<'t> {
    text: &'t str,
    bytes: &'t [u8],
    /// Folded and unescaped text.
    pub side: String,
    pos: usize,
    /// Where the current row starts.
    row_start: usize,
    /// One more for every break that YAML knows.
    row: u32,
    /// As editors count: one more for every `\n`, `\r\n` and `\r`. One-based.
    line: u32,
    /// How many flow collections are open.
    flow: usize,
    indent: isize,
    indents: Vec<isize>,
    /// One for the block context, and one for each open flow collection.
    keys: Vec<SimpleKey>,
    /// The first tokens of possible keys in their order, with their level.
    candidates: VecDeque<(usize, usize)>,
    key_allowed: bool,
    queue: VecDeque<Token<'t>>,
    /// How many tokens were taken out of the queue.
    taken: usize,
    /// The front of the queue is known to be no key.
    ready: bool,
}

type Scanned<T> = Result<T, SyntaxError>;

impl<'t> Scanner<'t> {
    /// `first_line`: the line of the first character. Control characters must have been refused.
    pub fn new(text: &'t str, first_line: u32) -> Self {
        Self {
            text,
            bytes: text.as_bytes(),
            side: String::new(),
            pos: 0,
            row_start: 0,
            row: 0,
            line: first_line,
            flow: 0,
            indent: -1,
            indents: Vec::new(),
            keys: vec![SimpleKey::default()],
            candidates: VecDeque::new(),
            key_allowed: true,
            queue: VecDeque::new(),
            taken: 0,
            ready: false,
        }
    }

    /// The next token. After the end of the stream there is none: it must not be taken.
    pub fn peek(&mut self) -> Scanned<&Token<'t>> {
        if !self.ready {
            while self.needs_more()? {
                self.fetch()?;
            }
            self.ready = true;
        }
        Ok(self.queue.front().expect("the loop above leaves a token"))
    }

    pub fn take(&mut self) -> Scanned<Token<'t>> {
        self.peek()?;
        self.ready = false;
        self.taken += 1;
        Ok(self.queue.pop_front().expect("it was looked at"))
    }

    /// The line of the next character that is read.
    pub fn line(&self) -> u32 {
        self.line
    }

    /// Whether the queue is empty, or its front may still become a key.
    fn needs_more(&mut self) -> Scanned<bool> {
        if self.queue.is_empty() {
            return Ok(true);
        }
        while let Some(&(token, level)) = self.candidates.front() {
            let live =
                token >= self.taken && self.keys.get(level).is_some_and(|key| key.possible && key.token == token);
            if live {
                return Ok(token == self.taken && self.is_possible(level)?);
            }
            self.candidates.pop_front();
        }
        Ok(false)
    }

    // Characters.

    /// The byte `ahead` of the current one; 0 past the end.
    fn at(&self, ahead: usize) -> u8 {
        self.bytes.get(self.pos + ahead).copied().unwrap_or(0)
    }

    fn column(&self) -> isize {
        (self.pos - self.row_start) as isize
    }

    fn is_end(&self) -> bool {
        self.pos >= self.bytes.len()
    }

    fn is_blank(&self, ahead: usize) -> bool {
        matches!(self.at(ahead), b' ' | b'\t')
    }

    /// The bytes of the line break `ahead`; 0 where there is none.
    fn break_len(&self, ahead: usize) -> usize {
        match self.at(ahead) {
            b'\n' => 1,
            b'\r' => 1 + usize::from(self.at(ahead + 1) == b'\n'),
            // NEL.
            0xc2 if self.at(ahead + 1) == 0x85 => 2,
            // LS and PS.
            0xe2 if self.at(ahead + 1) == 0x80 && matches!(self.at(ahead + 2), 0xa8 | 0xa9) => 3,
            _ => 0,
        }
    }

    /// A blank, a break, or the end.
    fn is_blank_or_break(&self, ahead: usize) -> bool {
        self.is_blank(ahead) || self.pos + ahead >= self.bytes.len() || self.break_len(ahead) > 0
    }

    /// Goes past a break of `len` bytes; what it is in folded text.
    fn skip_break(&mut self, len: usize) -> &'t str {
        let text = &self.text[self.pos..self.pos + len];
        self.pos += len;
        self.row_start = self.pos;
        self.row += 1;
        match text {
            "\u{2028}" | "\u{2029}" => text,
            "\u{85}" => "\n",
            _ => {
                self.line += 1;
                "\n"
            }
        }
    }

    fn skip_to_break(&mut self) {
        while !self.is_end() && self.break_len(0) == 0 {
            self.pos += 1;
        }
    }

    /// `---` or `...` at the start of a row.
    fn is_marker(&self) -> bool {
        self.pos == self.row_start
            && (self.bytes[self.pos..].starts_with(b"---") || self.bytes[self.pos..].starts_with(b"..."))
            && self.is_blank_or_break(3)
    }

    fn error<T>(&self, message: &str) -> Scanned<T> {
        self.error_at(self.line, message)
    }

    fn error_at<T>(&self, line: u32, message: &str) -> Scanned<T> {
        Err(SyntaxError { line, message: format!("not valid YAML: {message}") })
    }

    // Keys and indentation.

    fn is_possible(&mut self, level: usize) -> Scanned<bool> {
        let key = self.keys[level];
        if !key.possible {
            return Ok(false);
        }
        let bytes = &self.bytes[key.pos.min(self.pos)..self.pos];
        let is_far = bytes.len() > MAX_KEY_CHARACTERS
            && (bytes.len() > 4 * MAX_KEY_CHARACTERS
                || bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count() > MAX_KEY_CHARACTERS);
        if key.row < self.row || is_far {
            self.keys[level].possible = false;
            if key.required {
                return self.error_at(key.line, "a \":\" is missing after a key");
            }
            return Ok(false);
        }
        Ok(true)
    }

    /// A key may start here.
    fn save_key(&mut self) -> Scanned<()> {
        if !self.key_allowed {
            return Ok(());
        }
        self.drop_key()?;
        let token = self.taken + self.queue.len();
        let level = self.keys.len() - 1;
        self.keys[level] = SimpleKey {
            possible: true,
            required: self.flow == 0 && self.indent == self.column(),
            token,
            pos: self.pos,
            row: self.row,
            line: self.line,
            column: self.column(),
        };
        self.candidates.push_back((token, level));
        Ok(())
    }

    /// What may have been a key at this level is none.
    fn drop_key(&mut self) -> Scanned<()> {
        let key = self.keys.last_mut().expect("the block context has one");
        if std::mem::take(&mut key.possible) && key.required {
            let line = key.line;
            return self.error_at(line, "a \":\" is missing after a key");
        }
        Ok(())
    }

    /// Opens a block at `column` where it lies deeper than the current one; `token`: where its start belongs.
    fn roll(&mut self, column: isize, token: Option<usize>, kind: Kind<'t>, line: u32) -> Scanned<()> {
        if self.flow > 0 || self.indent >= column {
            return Ok(());
        }
        if self.indents.len() >= MAX_OPEN {
            return self.error(&format!("nested deeper than {MAX_OPEN}"));
        }
        self.indents.push(self.indent);
        self.indent = column;
        let at = token.map_or(self.queue.len(), |token| token - self.taken);
        self.queue.insert(at, Token { line, kind });
        Ok(())
    }

    /// Ends the blocks that lie deeper than `column`.
    fn unroll(&mut self, column: isize) {
        if self.flow > 0 {
            return;
        }
        while self.indent > column {
            self.push(self.line, Kind::BlockEnd);
            self.indent = self.indents.pop().unwrap_or(-1);
        }
    }

    fn push(&mut self, line: u32, kind: Kind<'t>) {
        self.queue.push_back(Token { line, kind });
    }

    /// An indicator of `len` bytes.
    fn indicator(&mut self, len: usize, kind: Kind<'t>) {
        self.push(self.line, kind);
        self.pos += len;
    }

    // Tokens.

    fn fetch(&mut self) -> Scanned<()> {
        self.skip_to_token();
        self.unroll(self.column());
        if self.is_end() {
            // As a break would: no key of any level is possible any more.
            self.row += 1;
            self.unroll(-1);
            self.drop_key()?;
            self.key_allowed = false;
            self.push(self.line, Kind::StreamEnd);
            return Ok(());
        }
        let in_flow = self.flow > 0;
        let first = self.at(0);
        if self.pos == self.row_start && first == b'%' {
            return self.directive();
        }
        if self.is_marker() {
            self.unroll(-1);
            self.drop_key()?;
            self.key_allowed = false;
            self.indicator(3, if first == b'-' { Kind::DocumentStart } else { Kind::DocumentEnd });
            return Ok(());
        }
        match first {
            b'[' => self.flow_start(Kind::FlowSequenceStart),
            b'{' => self.flow_start(Kind::FlowMappingStart),
            b']' => self.flow_end(Kind::FlowSequenceEnd),
            b'}' => self.flow_end(Kind::FlowMappingEnd),
            b',' => {
                self.drop_key()?;
                self.key_allowed = true;
                self.indicator(1, Kind::FlowEntry);
                Ok(())
            }
            b'-' if self.is_blank_or_break(1) => self.block_entry(),
            b'?' if in_flow || self.is_blank_or_break(1) => self.key(),
            b':' if in_flow || self.is_blank_or_break(1) => self.value(),
            b'*' | b'&' => self.anchor(first == b'*'),
            b'!' => self.tag(),
            b'|' | b'>' if !in_flow => self.block_scalar(first == b'|'),
            b'\'' | b'"' => self.quoted(first),
            b'-' => self.plain(),
            b'?' | b':' if !in_flow => self.plain(),
            b'?' | b':' | b'#' | b'|' | b'>' | b'%' | b'@' | b'`' | b'\t' => self.error(&format!(
                "{} cannot start a value",
                if first == b'\t' { "a tab".to_owned() } else { format!("\"{}\"", char::from(first)) }
            )),
            _ => self.plain(),
        }
    }

    /// Blanks, comments and breaks. A tab does not indent.
    fn skip_to_token(&mut self) {
        loop {
            // A byte order mark may start a line; it has no width.
            if self.pos == self.row_start && self.text[self.pos..].starts_with('\u{feff}') {
                self.pos += '\u{feff}'.len_utf8();
                self.row_start = self.pos;
            }
            while self.at(0) == b' ' || (self.flow > 0 || !self.key_allowed) && self.at(0) == b'\t' {
                self.pos += 1;
            }
            if self.at(0) == b'#' {
                self.skip_to_break();
            }
            match self.break_len(0) {
                0 => return,
                len => self.skip_break(len),
            };
            if self.flow == 0 {
                self.key_allowed = true;
            }
        }
    }

    fn flow_start(&mut self, kind: Kind<'t>) -> Scanned<()> {
        self.save_key()?;
        if self.flow >= MAX_OPEN {
            return self.error(&format!("nested deeper than {MAX_OPEN}"));
        }
        self.keys.push(SimpleKey::default());
        self.flow += 1;
        self.key_allowed = true;
        self.indicator(1, kind);
        Ok(())
    }

    fn flow_end(&mut self, kind: Kind<'t>) -> Scanned<()> {
        self.drop_key()?;
        if self.flow > 0 {
            self.flow -= 1;
            self.keys.pop();
        }
        self.key_allowed = false;
        self.indicator(1, kind);
        Ok(())
    }

    fn block_entry(&mut self) -> Scanned<()> {
        // In a flow collection the parser complains.
        if self.flow == 0 {
            if !self.key_allowed {
                return self.error("a list's \"-\" is not allowed here");
            }
            self.roll(self.column(), None, Kind::BlockSequenceStart, self.line)?;
        }
        self.drop_key()?;
        self.key_allowed = true;
        self.indicator(1, Kind::BlockEntry);
        Ok(())
    }

    fn key(&mut self) -> Scanned<()> {
        if self.flow == 0 {
            if !self.key_allowed {
                return self.error("a key is not allowed here");
            }
            self.roll(self.column(), None, Kind::BlockMappingStart, self.line)?;
        }
        self.drop_key()?;
        self.key_allowed = self.flow == 0;
        self.indicator(1, Kind::Key);
        Ok(())
    }

    fn value(&mut self) -> Scanned<()> {
        let level = self.keys.len() - 1;
        if self.is_possible(level)? {
            let key = self.keys[level];
            self.queue.insert(key.token - self.taken, Token { line: key.line, kind: Kind::Key });
            self.roll(key.column, Some(key.token), Kind::BlockMappingStart, key.line)?;
            self.keys[level].possible = false;
            self.key_allowed = false;
        } else {
            if self.flow == 0 {
                if !self.key_allowed {
                    return self.error("a \": \" is not allowed here; text that contains one needs quotes");
                }
                self.roll(self.column(), None, Kind::BlockMappingStart, self.line)?;
            }
            self.key_allowed = self.flow == 0;
        }
        self.indicator(1, Kind::Value);
        Ok(())
    }

    /// Letters, digits, `-` and `_`.
    fn word(&mut self) -> &'t str {
        let start = self.pos;
        while self.at(0).is_ascii_alphanumeric() || matches!(self.at(0), b'-' | b'_') {
            self.pos += 1;
        }
        &self.text[start..self.pos]
    }

    fn anchor(&mut self, is_alias: bool) -> Scanned<()> {
        self.save_key()?;
        self.key_allowed = false;
        self.pos += 1;
        let name = self.word();
        let ends =
            self.is_blank_or_break(0) || matches!(self.at(0), b'?' | b':' | b',' | b']' | b'}' | b'%' | b'@' | b'`');
        if name.is_empty() || !ends {
            let message = match is_alias {
                true => "\"*\" takes the name of an anchor: letters and digits",
                false => "\"&\" takes the name of an anchor: letters and digits",
            };
            return self.error(message);
        }
        self.push(self.line, if is_alias { Kind::Alias(name) } else { Kind::Anchor(name) });
        Ok(())
    }

    fn tag(&mut self) -> Scanned<()> {
        self.save_key()?;
        self.key_allowed = false;
        let line = self.line;
        let kind = if self.at(1) == b'<' {
            self.pos += 2;
            let suffix = self.uri()?;
            if self.at(0) != b'>' || suffix.is_empty() {
                return self.error("a tag that starts with \"!<\" ends with \">\"");
            }
            self.pos += 1;
            Kind::Tag { handle: "", suffix }
        } else {
            let start = self.pos;
            let handle = self.handle();
            if handle.len() > 1 && handle.ends_with('!') {
                let suffix = self.uri()?;
                if suffix.is_empty() {
                    return self.error("a tag's name is missing");
                }
                Kind::Tag { handle, suffix }
            } else {
                // It was no handle: all that follows the "!" is the name.
                self.pos = start + 1;
                match self.uri()? {
                    suffix if suffix.is_empty() => Kind::Tag { handle: "", suffix: Cow::Borrowed("!") },
                    suffix => Kind::Tag { handle: "!", suffix },
                }
            }
        };
        if !self.is_blank_or_break(0) {
            return self.error("a tag must be followed by a blank");
        }
        self.push(line, kind);
        Ok(())
    }

    /// `!`, `!!` or `!word!`; without its end where it is none.
    fn handle(&mut self) -> &'t str {
        let start = self.pos;
        self.pos += 1;
        self.word();
        self.pos += usize::from(self.at(0) == b'!');
        &self.text[start..self.pos]
    }

    fn uri(&mut self) -> Scanned<Cow<'t, str>> {
        let start = self.pos;
        let mut escaped = false;
        while self.at(0).is_ascii_alphanumeric() || b"-_;/?:@&=+$,.!~*'()[]%".contains(&self.at(0)) {
            escaped |= self.at(0) == b'%';
            self.pos += 1;
        }
        let text = &self.text[start..self.pos];
        if !escaped {
            return Ok(Cow::Borrowed(text));
        }
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let [first, tail @ ..] = rest {
            let hex = |at: usize| char::from(*tail.get(at)?).to_digit(16);
            match (first, hex(0).zip(hex(1))) {
                (b'%', Some((high, low))) => {
                    bytes.push((high * 16 + low) as u8);
                    rest = &tail[2..];
                }
                (b'%', None) => return self.error("\"%\" in a tag takes two hexadecimal digits"),
                _ => {
                    bytes.push(*first);
                    rest = tail;
                }
            }
        }
        String::from_utf8(bytes).map(Cow::Owned).or_else(|_| self.error("a tag is not UTF-8"))
    }

    fn directive(&mut self) -> Scanned<()> {
        self.unroll(-1);
        self.drop_key()?;
        self.key_allowed = false;
        let line = self.line;
        self.pos += 1;
        let kind = match self.word() {
            "YAML" => {
                self.skip_blanks();
                let number = |this: &mut Self| {
                    let start = this.pos;
                    while this.at(0).is_ascii_digit() {
                        this.pos += 1;
                    }
                    this.text[start..this.pos].to_owned()
                };
                let major = number(self);
                let has_point = self.at(0) == b'.';
                self.pos += usize::from(has_point);
                let minor = number(self);
                if major != "1" || !has_point || minor.is_empty() || minor.len() > 2 {
                    return self.error("only versions 1.1 and 1.2 of YAML are read");
                }
                Kind::Version
            }
            "TAG" => {
                self.skip_blanks();
                let handle = if self.at(0) == b'!' { self.handle() } else { "" };
                let is_handle = handle == "!" || handle.len() > 1 && handle.ends_with('!');
                let has_blank = self.is_blank(0);
                self.skip_blanks();
                let prefix = self.uri()?;
                if !is_handle || !has_blank || prefix.is_empty() || !self.is_blank_or_break(0) {
                    return self.error("%TAG takes a handle and a prefix");
                }
                Kind::TagDirective { handle, prefix }
            }
            _ => return self.error("a line that starts with \"%\" is a directive; only %YAML and %TAG are known"),
        };
        self.skip_blanks();
        self.end_line("a directive")?;
        self.push(line, kind);
        Ok(())
    }

    fn skip_blanks(&mut self) {
        while self.is_blank(0) {
            self.pos += 1;
        }
    }

    /// A comment, and the break.
    fn end_line(&mut self, after: &str) -> Scanned<()> {
        if self.at(0) == b'#' {
            self.skip_to_break();
        }
        match self.break_len(0) {
            0 if self.is_end() => {}
            0 => return self.error(&format!("only a comment may follow {after} on its line")),
            len => drop(self.skip_break(len)),
        }
        Ok(())
    }
}
