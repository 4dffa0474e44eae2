//! The quick way through JSON that is well formed. Whatever else it meets it leaves to the YAML parser, which reads JSON
//! too and says what is wrong.

use serde_json::Value;

use super::{Data, Keys, MAX_DEPTH, Node, plain};

/// `first_line`: the line of the text's first byte.
pub(super) fn parse(text: &str, first_line: u32) -> Option<Node> {
    let start = text.trim_start_matches(is_blank);
    if !start.starts_with('{') {
        return None;
    }
    let mut cursor = Cursor { text, at: 0, line: first_line };
    let node = cursor.value(0)?;
    cursor.skip_blank();
    (cursor.at == text.len()).then_some(node)
}

fn is_blank(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\r' | '\n')
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
    line: u32,
}

impl<'a> Cursor<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn skip_blank(&mut self) {
        while let Some(byte @ (b' ' | b'\t' | b'\r' | b'\n')) = self.peek() {
            self.line += u32::from(byte == b'\n');
            self.at += 1;
        }
    }

    fn value(&mut self, depth: usize) -> Option<Node> {
        self.skip_blank();
        let line = self.line;
        let quoted = self.peek()? == b'"';
        let data = match self.peek()? {
            b'{' | b'[' if depth >= MAX_DEPTH => return None,
            b'{' => Data::Mapping(self.mapping(depth)?),
            b'[' => Data::Sequence(self.sequence(depth)?),
            b'"' => Data::Scalar(Value::String(self.string()?)),
            _ => Data::Scalar(self.literal()?),
        };
        Some(Node { line, quoted, data })
    }

    fn mapping(&mut self, depth: usize) -> Option<Vec<(String, u32, Node)>> {
        self.take(b'{')?;
        let (mut entries, mut keys) = (Vec::new(), Keys::default());
        self.skip_blank();
        if self.take(b'}').is_some() {
            return Some(entries);
        }
        loop {
            self.skip_blank();
            let line = self.line;
            let key = self.string()?;
            if !keys.add(&key, &entries) {
                return None;
            }
            self.skip_blank();
            self.take(b':')?;
            let value = self.value(depth + 1)?;
            entries.push((key, line, value));
            self.skip_blank();
            if self.take(b',').is_none() {
                self.take(b'}')?;
                entries.shrink_to_fit();
                return Some(entries);
            }
        }
    }

    fn sequence(&mut self, depth: usize) -> Option<Vec<Node>> {
        self.take(b'[')?;
        let mut items = Vec::new();
        self.skip_blank();
        if self.take(b']').is_some() {
            return Some(items);
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.skip_blank();
            if self.take(b',').is_none() {
                self.take(b']')?;
                items.shrink_to_fit();
                return Some(items);
            }
        }
    }

    fn string(&mut self) -> Option<String> {
        let start = self.at;
        self.take(b'"')?;
        let mut plain = true;
        loop {
            match self.peek()? {
                b'"' => break,
                b'\\' => {
                    plain = false;
                    self.at += 2;
                }
                0..0x20 => return None,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        let quoted = self.text.get(start..self.at)?;
        match plain {
            true => Some(quoted[1..quoted.len() - 1].to_owned()),
            false => serde_json::from_str(quoted).ok(),
        }
    }

    /// A number, `true`, `false` or `null`, as JSON spells them.
    fn literal(&mut self) -> Option<Value> {
        let rest = &self.text[self.at..];
        let length = rest.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte)).count();
        let text = &rest[..length];
        serde_json::from_str::<serde::de::IgnoredAny>(text).ok()?;
        self.at += length;
        Some(plain(text))
    }
}
