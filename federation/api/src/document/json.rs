//! The quick way through JSON that is well formed. Whatever else it meets it leaves to the YAML parser, which reads JSON
//! too and says what is wrong.

use super::load::Keys;
use super::tree::{Document, Item, ItemKind, MAX_DEPTH};

/// `first_line`: the line of the text's first byte.
pub(super) fn parse(text: &str, first_line: u32) -> Option<Document<'_>> {
    let start = text.trim_start_matches(is_blank);
    if !start.starts_with('{') {
        return None;
    }
    let mut cursor = Cursor { text, at: 0, line: first_line, side: String::new(), items: Vec::new() };
    cursor.value(0)?;
    cursor.skip_blank();
    let Cursor { at, side, items, .. } = cursor;
    (at == text.len()).then_some(Document { text, side, items, faults: Vec::new() })
}

fn is_blank(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\r' | '\n')
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
    line: u32,
    side: String,
    items: Vec<Item>,
}

impl Cursor<'_> {
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

    fn value(&mut self, depth: usize) -> Option<()> {
        self.skip_blank();
        match self.peek()? {
            b'{' | b'[' if depth >= MAX_DEPTH => None,
            b'{' => self.mapping(depth),
            b'[' => self.sequence(depth),
            b'"' => {
                let text = self.string()?;
                self.items.push(text);
                Some(())
            }
            _ => self.literal(),
        }
    }

    fn start(&mut self, kind: ItemKind) -> usize {
        self.items.push(Item { start: 0, len: 0, line: self.line, kind });
        self.items.len() - 1
    }

    fn end(&mut self, header: usize, len: u32) {
        let size = (self.items.len() - header) as u32;
        self.items[header] = Item { start: size, len, ..self.items[header] };
    }

    fn mapping(&mut self, depth: usize) -> Option<()> {
        let header = self.start(ItemKind::Mapping);
        self.take(b'{')?;
        let (mut len, mut keys) = (0, Keys::default());
        self.skip_blank();
        if self.take(b'}').is_none() {
            loop {
                self.skip_blank();
                let key = self.string()?;
                if !keys.add(key, self.text, &self.side) {
                    return None;
                }
                self.items.push(key);
                self.skip_blank();
                self.take(b':')?;
                self.value(depth + 1)?;
                len += 1;
                self.skip_blank();
                if self.take(b',').is_none() {
                    self.take(b'}')?;
                    break;
                }
            }
        }
        self.end(header, len);
        Some(())
    }

    fn sequence(&mut self, depth: usize) -> Option<()> {
        let header = self.start(ItemKind::Sequence);
        self.take(b'[')?;
        let mut len = 0;
        self.skip_blank();
        if self.take(b']').is_none() {
            loop {
                self.value(depth + 1)?;
                len += 1;
                self.skip_blank();
                if self.take(b',').is_none() {
                    self.take(b']')?;
                    break;
                }
            }
        }
        self.end(header, len);
        Some(())
    }

    fn string(&mut self) -> Option<Item> {
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
        let line = self.line;
        if plain {
            return Some(Item { start: start as u32 + 1, len: quoted.len() as u32 - 2, line, kind: ItemKind::Text });
        }
        let start = self.side.len() as u32;
        self.side.push_str(&serde_json::from_str::<String>(quoted).ok()?);
        Some(Item { start, len: self.side.len() as u32 - start, line, kind: ItemKind::TextSide })
    }

    /// A number, `true`, `false` or `null`, as JSON spells them.
    fn literal(&mut self) -> Option<()> {
        let rest = &self.text[self.at..];
        let length = rest.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte)).count();
        serde_json::from_str::<serde::de::IgnoredAny>(&rest[..length]).ok()?;
        let (start, len, line) = (self.at as u32, length as u32, self.line);
        self.items.push(Item { start, len, line, kind: ItemKind::Plain });
        self.at += length;
        Some(())
    }
}
