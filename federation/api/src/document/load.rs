//! Events into a document: anchors, merge keys, tags, and duplicate keys.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use base64::Engine as _;

use super::events::{Event, Events, Properties};
use super::scalar::{Scalar, resolve};
use super::scan::Span;
use super::tree::{
    Document, Fault, FaultKind, Item, ItemKind, MAX_DEPTH, MAX_FAULTS, MAX_REPEATED_VALUES, SyntaxError,
};

const MERGES: &str = "\"<<\" takes a mapping, or a list of mappings";
/// Characters of a key in a message.
const MAX_KEY_SHOWN: usize = 64;
/// What the tags of YAML's own types start with.
const TAG_PREFIX: &str = "tag:yaml.org,2002:";

/// A document, or `None` where the text has none. `first_line`: the line of the first character.
pub(super) fn load(text: &str, first_line: u32) -> Result<Option<Document<'_>>, SyntaxError> {
    if let Some(at) = control_character(text) {
        let breaks = text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count();
        let line = first_line.saturating_add(u32::try_from(breaks).unwrap_or(u32::MAX));
        return Err(SyntaxError { line, message: "not valid YAML: a control character".to_owned() });
    }
    let mut events = Events::new(text, first_line);
    let mut loader = Loader { text, ..Loader::default() };
    let mut documents = 0;
    loop {
        let (line, event) = events.next()?;
        match event {
            Event::StreamEnd => break,
            Event::DocumentStart => {
                documents += 1;
                if documents > 1 {
                    let message = "a second document without a `---` line before it".to_owned();
                    return Err(SyntaxError { line, message });
                }
            }
            Event::DocumentEnd => {}
            event => loader.event(event, line, &mut events.scanner.side)?,
        }
    }
    let Loader { items, faults, .. } = loader;
    let document = Document { text, side: events.scanner.side, items, faults };
    Ok(Some(document).filter(|document| !document.items.is_empty() && !document.root().is_null()))
}

/// Where the first character is that no YAML may have.
fn control_character(text: &str) -> Option<usize> {
    let is_odd = |byte: &u8| matches!(byte, 0..0x20 | 0x7f | 0xc2 | 0xef) && !matches!(byte, b'\t' | b'\n' | b'\r');
    let is_control = |character: char| matches!(character, '\0'..'\t' | '\u{b}' | '\u{c}' | '\u{e}'..' ' | '\u{7f}'..='\u{84}' | '\u{86}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}');
    let mut from = 0;
    while let Some(at) = text.as_bytes()[from..].iter().position(is_odd).map(|at| from + at) {
        if text[at..].starts_with(is_control) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

#[derive(Default)]
struct Loader<'t> {
    text: &'t str,
    items: Vec<Item>,
    open: Vec<Open<'t>>,
    /// How many collections are open that lie too deep to be kept.
    too_deep: usize,
    anchors: HashMap<&'t str, Anchored>,
    repeated: usize,
    faults: Vec<Fault>,
}

/// What an alias repeats.
struct Anchored {
    items: Vec<Item>,
    height: usize,
}

/// A collection whose end was not read yet.
struct Open<'t> {
    at: usize,
    anchor: Option<&'t str>,
    /// Collections within each other below this one.
    height: usize,
    next: Next,
    keys: Keys,
    merges: bool,
}

#[derive(Clone, Copy)]
enum Next {
    Item,
    Key,
    Value,
    /// The value of a duplicate key, which is removed again.
    Double {
        from: usize,
    },
}

/// The keys of one mapping. A few are compared one by one; more are hashed, so that the time for a mapping of any size
/// grows with its size and not with the square of it.
#[derive(Default)]
pub(super) struct Keys {
    few: Vec<Item>,
    many: HashSet<Box<str>>,
}

impl Keys {
    const FEW: usize = 16;

    /// False where `key` was added before.
    pub fn add(&mut self, key: Item, text: &str, side: &str) -> bool {
        let new = key.text(text, side);
        if self.many.is_empty() {
            if self.few.iter().any(|known| known.text(text, side) == new) {
                return false;
            }
            self.few.push(key);
            if self.few.len() > Self::FEW {
                self.many.extend(self.few.drain(..).map(|known| known.text(text, side).into()));
            }
            return true;
        }
        !self.many.contains(new) && self.many.insert(new.into())
    }
}

fn fail<T>(line: u32, message: &str) -> Result<T, SyntaxError> {
    Err(SyntaxError { line, message: message.to_owned() })
}

impl<'t> Loader<'t> {
    fn event(&mut self, event: Event<'t>, line: u32, side: &mut String) -> Result<(), SyntaxError> {
        if self.too_deep > 0 {
            match event {
                Event::SequenceStart(_) | Event::MappingStart(_) => self.too_deep += 1,
                Event::SequenceEnd | Event::MappingEnd => self.too_deep -= 1,
                _ => {}
            }
            return Ok(());
        }
        match event {
            Event::SequenceStart(properties) => self.start(properties, line, false, side),
            Event::MappingStart(properties) => self.start(properties, line, true, side),
            Event::SequenceEnd | Event::MappingEnd => self.end(side),
            Event::Scalar { properties, span, plain } => {
                let anchor = properties.anchor;
                let is_merge = matches!(self.open.last(), Some(Open { next: Next::Key, .. }))
                    && span.is_some_and(|span| self.span(span, side) == "<<")
                    && match &properties.tag {
                        None => plain,
                        Some(tag) => tag.strip_prefix(TAG_PREFIX) == Some("merge"),
                    };
                let item = if is_merge {
                    let span = span.unwrap_or(Span { start: 0, len: 0, side: false });
                    Item { start: span.start, len: span.len, line, kind: ItemKind::Merge }
                } else {
                    self.scalar(&properties, span, plain, line, side)?
                };
                let at = self.items.len();
                self.items.push(item);
                self.placed(at, anchor, 0, side)
            }
            Event::Alias(name) => {
                let Some(anchored) = self.anchors.get(name) else {
                    return fail(line, "an alias without an anchor before it");
                };
                if self.open.len() + anchored.height > MAX_DEPTH {
                    return self.leave_out(line, side);
                }
                // A list of mappings may be merged where it is written, but not by its alias.
                let merges = self.items.last().is_some_and(|key| key.kind == ItemKind::Merge);
                if merges && anchored.items[0].kind != ItemKind::Mapping {
                    return fail(line, MERGES);
                }
                count(&mut self.repeated, anchored.items.len(), line)?;
                let (at, height) = (self.items.len(), anchored.height);
                self.items.extend_from_slice(&anchored.items);
                self.placed(at, None, height, side)
            }
            Event::StreamEnd | Event::DocumentStart | Event::DocumentEnd => Ok(()),
        }
    }

    fn span<'s>(&'s self, span: Span, side: &'s str) -> &'s str {
        let from = if span.side { side } else { self.text };
        &from[span.start as usize..(span.start + span.len) as usize]
    }

    fn fault(&mut self, line: u32, kind: FaultKind) {
        match self.faults.len() {
            MAX_FAULTS.. => {}
            last if last == MAX_FAULTS - 1 => self.faults.push(Fault { line, kind: FaultKind::More }),
            _ => self.faults.push(Fault { line, kind }),
        }
    }

    /// Null in the place of what lies too deep.
    fn leave_out(&mut self, line: u32, side: &mut String) -> Result<(), SyntaxError> {
        self.fault(line, FaultKind::TooDeep);
        let at = self.items.len();
        self.items.push(Item { start: 0, len: 0, line, kind: ItemKind::Plain });
        self.placed(at, None, 0, side)
    }

    fn start(
        &mut self,
        properties: Properties<'t>,
        line: u32,
        is_mapping: bool,
        side: &mut String,
    ) -> Result<(), SyntaxError> {
        if let Some(name) = properties.anchor {
            // It cannot repeat itself, nor what had its name before.
            self.anchors.remove(name);
        }
        if self.open.len() >= MAX_DEPTH {
            self.leave_out(line, side)?;
            self.too_deep = 1;
            return Ok(());
        }
        let (next, kind) = if is_mapping { (Next::Key, ItemKind::Mapping) } else { (Next::Item, ItemKind::Sequence) };
        if matches!(self.open.last(), Some(Open { next: Next::Key, .. })) {
            return fail(line, "a key must be a plain text");
        }
        let at = self.items.len();
        self.items.push(Item { start: 0, len: 0, line, kind });
        let anchor = properties.anchor;
        self.open.push(Open { at, anchor, height: 0, next, keys: Keys::default(), merges: false });
        Ok(())
    }

    fn end(&mut self, side: &mut String) -> Result<(), SyntaxError> {
        let open = self.open.pop().expect("each end has a start");
        if open.merges {
            self.merge(open.at, side)?;
        }
        self.items[open.at].start = (self.items.len() - open.at) as u32;
        self.placed(open.at, open.anchor, open.height + 1, side)
    }

    /// What starts at `at` is complete: a key, a value, an item, or the whole.
    fn placed(
        &mut self,
        at: usize,
        anchor: Option<&'t str>,
        height: usize,
        side: &mut String,
    ) -> Result<(), SyntaxError> {
        if let Some(name) = anchor {
            count(&mut self.repeated, self.items.len() - at, self.items[at].line)?;
            self.anchors.insert(name, Anchored { items: self.items[at..].to_vec(), height });
        }
        let Some(parent) = self.open.last_mut() else { return Ok(()) };
        parent.height = parent.height.max(height);
        let header = parent.at;
        match parent.next {
            Next::Item => self.items[header].len += 1,
            Next::Value => {
                self.items[header].len += 1;
                parent.next = Next::Key;
            }
            Next::Double { from } => {
                self.items.truncate(from);
                parent.next = Next::Key;
            }
            Next::Key => {
                parent.next = Next::Value;
                let key = self.items[at];
                if key.kind == ItemKind::Merge {
                    parent.merges = true;
                    return Ok(());
                }
                let key = match key.kind {
                    ItemKind::Text | ItemKind::TextSide => key,
                    ItemKind::Plain | ItemKind::PlainSide => match resolve(key.text(self.text, side)) {
                        Scalar::Text(_) => Item { kind: key.kind.quoted(), ..key },
                        other => {
                            let Some(written) = other.to_key() else {
                                return fail(key.line, "a key must be a plain text");
                            };
                            let start = side.len() as u32;
                            side.push_str(&written);
                            Item { start, len: written.len() as u32, line: key.line, kind: ItemKind::TextSide }
                        }
                    },
                    _ => return fail(key.line, "a key must be a plain text"),
                };
                self.items[at] = key;
                let parent = self.open.last_mut().expect("it is the parent");
                if !parent.keys.add(key, self.text, side) {
                    parent.next = Next::Double { from: at };
                    let name = key.text(self.text, side).chars().take(MAX_KEY_SHOWN).collect();
                    self.fault(key.line, FaultKind::DuplicateKey(name));
                }
            }
        }
        Ok(())
    }

    /// Puts what the merge keys of a mapping name in their places, as go-yaml does: in the order of the keys, the later one
    /// winning, and of several mappings that one key names the first.
    fn merge(&mut self, header: usize, side: &str) -> Result<(), SyntaxError> {
        let merged = self.items.split_off(header + 1);
        // Where the key is that counts, in the order in which they were met first.
        let mut keys: Vec<usize> = Vec::new();
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut set = |key: usize| match places.entry(merged[key].text(self.text, side)) {
            Entry::Occupied(place) => keys[*place.get()] = key,
            Entry::Vacant(place) => {
                place.insert(keys.len());
                keys.push(key);
            }
        };
        let mut at = 0;
        while at < merged.len() {
            match merged[at].kind {
                ItemKind::Merge => {
                    for source in merge_sources(&merged, at + 1)? {
                        keys_of(&merged, source).for_each(&mut set);
                    }
                }
                _ => set(at),
            }
            at += 1 + merged[at + 1].size();
        }
        self.items[header].len = keys.len() as u32;
        for key in keys {
            self.items.extend_from_slice(&merged[key..key + 1 + merged[key + 1].size()]);
        }
        Ok(())
    }

    fn scalar(
        &self,
        properties: &Properties<'t>,
        span: Option<Span>,
        plain: bool,
        line: u32,
        side: &mut String,
    ) -> Result<Item, SyntaxError> {
        let span = span.unwrap_or(Span { start: 0, len: 0, side: false });
        let text = self.span(span, side);
        let item = |kind| Item { start: span.start, len: span.len, line, kind };
        let plain = match properties.tag.as_deref() {
            None => plain,
            Some(tag) => match tag.strip_prefix(TAG_PREFIX) {
                Some(name @ ("int" | "float" | "bool" | "null")) => {
                    let fits = matches!(
                        (name, resolve(text)),
                        ("int", Scalar::Int(_) | Scalar::UInt(_))
                            | ("float", Scalar::Int(_) | Scalar::Float(_))
                            | ("bool", Scalar::Bool(_))
                            | ("null", Scalar::Null)
                    );
                    if !fits {
                        return fail(line, &format!("the value is not of its type !!{name}"));
                    }
                    true
                }
                Some("binary") => {
                    let encoded: String = text.chars().filter(|it| !matches!(it, '\r' | '\n')).collect();
                    let Ok(bytes) = base64::engine::general_purpose::STANDARD.decode(encoded) else {
                        return fail(line, "the value of a !!binary is not base64");
                    };
                    let start = side.len() as u32;
                    side.push_str(&String::from_utf8_lossy(&bytes));
                    return Ok(Item { start, len: side.len() as u32 - start, line, kind: ItemKind::TextSide });
                }
                _ => false,
            },
        };
        let is_key = matches!(self.open.last(), Some(Open { next: Next::Key, .. }));
        if plain && !is_key && matches!(resolve(text), Scalar::Float(number) if !number.is_finite()) {
            return fail(line, "the value is not a number that JSON has; text needs quotes");
        }
        Ok(item(match (plain, span.side) {
            (true, false) => ItemKind::Plain,
            (true, true) => ItemKind::PlainSide,
            (false, false) => ItemKind::Text,
            (false, true) => ItemKind::TextSide,
        }))
    }
}

fn count(repeated: &mut usize, values: usize, line: u32) -> Result<(), SyntaxError> {
    *repeated += values;
    if *repeated > MAX_REPEATED_VALUES {
        return fail(line, &format!("anchors and aliases repeat more than {MAX_REPEATED_VALUES} values"));
    }
    Ok(())
}

/// The mappings that the value of a merge key is or lists, those that count last first.
fn merge_sources(items: &[Item], value: usize) -> Result<Vec<usize>, SyntaxError> {
    let mut sources = vec![value];
    if items[value].kind == ItemKind::Sequence {
        sources.clear();
        let mut at = value + 1;
        while at < value + items[value].size() {
            sources.push(at);
            at += items[at].size();
        }
        sources.reverse();
    }
    match sources.iter().find(|source| items[**source].kind != ItemKind::Mapping) {
        Some(wrong) => fail(items[*wrong].line, MERGES),
        None => Ok(sources),
    }
}

/// Where the keys of a mapping are.
fn keys_of(items: &[Item], mapping: usize) -> impl Iterator<Item = usize> {
    let end = mapping + items[mapping].size();
    let next = move |key: &usize| Some(key + 1 + items[key + 1].size()).filter(|key| *key < end);
    std::iter::successors(Some(mapping + 1).filter(|key| *key < end), next)
}
