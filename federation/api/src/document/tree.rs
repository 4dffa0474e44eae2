//! A document as a list of values in the order of the text.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value};

use super::scalar::{self, Scalar};
use crate::field::UnknownField;

/// Deepest nesting of lists and mappings; the deepest field of any kind lies at about 12.
pub const MAX_DEPTH: usize = 64;

/// Values of one document that anchors keep and aliases repeat; at 16 bytes each, 32 MiB. What is written out is bounded by the
/// size of the file alone: a list of a large cluster's pods is one document with tens of millions of values.
pub const MAX_REPEATED_VALUES: usize = 2 * 1024 * 1024;

/// Faults of one document that are kept; at about 100 bytes each, 100 KiB.
pub const MAX_FAULTS: usize = 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SyntaxError {
    pub line: u32,
    pub message: String,
}

/// An error in one part of a document. The other parts can be read, so that the object, and whether the error matters, is known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind}")]
pub struct Fault {
    pub line: u32,
    pub kind: FaultKind,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FaultKind {
    /// The first one wins.
    #[error("duplicate key \"{0}\"; the first one wins")]
    DuplicateKey(String),
    /// Null in the document.
    #[error("nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// The rest was not checked.
    #[error("more than {MAX_FAULTS} errors in one document")]
    More,
}

/// One value or key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item {
    /// Of a text, where it starts; of a collection, how many items it takes with itself.
    pub start: u32,
    /// Of a text, its bytes; of a collection, its entries.
    pub len: u32,
    pub line: u32,
    pub kind: ItemKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ItemKind {
    /// Written without quotes: a number, a boolean, null or text.
    Plain,
    /// The same in the side text.
    PlainSide,
    Text,
    TextSide,
    Sequence,
    /// Keys, each before its value.
    Mapping,
    /// The key `<<`; only while its mapping is loaded.
    Merge,
}

impl ItemKind {
    pub fn quoted(self) -> Self {
        match self {
            Self::Plain => Self::Text,
            Self::PlainSide => Self::TextSide,
            other => other,
        }
    }
}

impl Item {
    pub fn text<'a>(&self, text: &'a str, side: &'a str) -> &'a str {
        let from = match self.kind {
            ItemKind::Plain | ItemKind::Text | ItemKind::Merge => text,
            ItemKind::PlainSide | ItemKind::TextSide => side,
            ItemKind::Sequence | ItemKind::Mapping => return "",
        };
        &from[self.start as usize..(self.start + self.len) as usize]
    }

    pub fn is_collection(&self) -> bool {
        matches!(self.kind, ItemKind::Sequence | ItemKind::Mapping)
    }

    /// How many items it takes, those within it included.
    pub fn size(&self) -> usize {
        if self.is_collection() { self.start as usize } else { 1 }
    }
}

/// A document that has a value.
#[derive(Debug, Clone)]
pub struct Document<'t> {
    pub(super) text: &'t str,
    /// What was folded or escaped in the source.
    pub(super) side: String,
    pub(super) items: Vec<Item>,
    pub faults: Vec<Fault>,
}

/// A value in a document.
#[derive(Clone, Copy)]
pub struct Node<'d> {
    document: &'d Document<'d>,
    pub(super) at: u32,
    pub(super) notes: Option<&'d Notes>,
}

/// Findings about the fields of an object while it is decoded.
#[derive(Debug, Default)]
pub struct Notes {
    /// Fields that the type does not have: the place of each, and the fields it has.
    pub(super) unknown: RefCell<BTreeMap<u32, &'static [&'static str]>>,
    /// Fields that are not decoded.
    pub(super) left_out: RefCell<HashSet<u32>>,
}

/// The kind of a list of anything, and how the kinds of typed lists end.
const LIST: &str = "List";

impl<'t> Document<'t> {
    pub fn root(&self) -> Node<'_> {
        Node { document: self, at: 0, notes: None }
    }

    /// Items of a typed list (`PodList`) may leave out what the list says. Here they say it themselves.
    pub(super) fn with_typed_items(mut self) -> Self {
        if self.root().lacks_types() {
            let mut typed = Vec::with_capacity(self.items.len());
            self.root().copy_typed(&[], &mut typed);
            self.items = typed;
        }
        self
    }
}

impl<'d> Node<'d> {
    pub(super) fn item(self) -> &'d Item {
        &self.document.items[self.at as usize]
    }

    pub(super) fn to(self, at: u32) -> Self {
        Self { at, ..self }
    }

    /// Where the next value starts.
    pub(super) fn end(self) -> u32 {
        self.at + self.item().size() as u32
    }

    /// The line on which it starts; one-based.
    pub fn line(self) -> u32 {
        self.item().line
    }

    pub fn is_mapping(self) -> bool {
        self.item().kind == ItemKind::Mapping
    }

    pub fn is_sequence(self) -> bool {
        self.item().kind == ItemKind::Sequence
    }

    pub fn is_null(self) -> bool {
        self.scalar() == Some(Scalar::Null)
    }

    /// `None` for a list or a mapping.
    pub fn scalar(self) -> Option<Scalar<'d>> {
        let item = self.item();
        let text = item.text(self.document.text, &self.document.side);
        match item.kind {
            ItemKind::Plain | ItemKind::PlainSide => Some(scalar::resolve(text)),
            ItemKind::Text | ItemKind::TextSide | ItemKind::Merge => Some(Scalar::Text(text)),
            ItemKind::Sequence | ItemKind::Mapping => None,
        }
    }

    pub fn text(self) -> Option<&'d str> {
        match self.scalar()? {
            Scalar::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The values of a list; none of anything else.
    pub fn items(self) -> impl Iterator<Item = Node<'d>> {
        let end = if self.is_sequence() { self.end() } else { self.at };
        let next = move |node: &Node<'d>| Some(self.to(node.end())).filter(|node| node.at < end);
        std::iter::successors(Some(self.at + 1).filter(|at| *at < end).map(|at| self.to(at)), next)
    }

    /// The key and the value of each entry of a mapping; none of anything else.
    pub(super) fn pairs(self) -> impl Iterator<Item = (Node<'d>, Node<'d>)> {
        let end = if self.is_mapping() { self.end() } else { self.at };
        let next = move |key: &Node<'d>| Some(self.to(self.to(key.at + 1).end())).filter(|key| key.at < end);
        let keys = std::iter::successors(Some(self.at + 1).filter(|at| *at < end).map(|at| self.to(at)), next);
        keys.map(move |key| (key, self.to(key.at + 1)))
    }

    /// The name and the value of each field.
    pub fn fields(self) -> impl Iterator<Item = (&'d str, Node<'d>)> {
        self.pairs().map(|(key, value)| (key.key(), value))
    }

    pub(super) fn key(self) -> &'d str {
        self.item().text(self.document.text, &self.document.side)
    }

    pub fn child(self, name: &str) -> Option<Node<'d>> {
        self.fields().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    /// How many fields the root, the metadata and the spec of an object have.
    pub fn field_count(self) -> usize {
        let below = |name| self.child(name).map_or(0, |child| child.fields().count());
        self.fields().count() + below("metadata") + below("spec")
    }

    /// The value without lines, as JSON has it.
    pub fn to_value(self) -> Value {
        match self.scalar() {
            Some(scalar) => scalar.to_value(),
            None if self.is_sequence() => Value::Array(self.items().map(Node::to_value).collect()),
            None => Value::Object(
                self.fields().map(|(key, value)| (key.to_owned(), value.to_value())).collect::<Map<_, _>>(),
            ),
        }
    }

    /// The same, with what is found about its fields written to `notes`.
    pub fn with_notes(self, notes: &'d Notes) -> Self {
        Self { notes: Some(notes), ..self }
    }

    /// Items of a list that calls them by its own kind.
    fn typed_items(self) -> Option<(Node<'d>, Item)> {
        let kind = self.child("kind")?;
        let single = kind.text()?.strip_suffix(LIST)?;
        let items = self.child("items")?;
        let len = u32::try_from(single.len()).ok()?;
        (items.is_sequence() && items.items().all(Node::is_mapping)).then_some((items, Item { len, ..*kind.item() }))
    }

    fn lacks_types(self) -> bool {
        let lacks = |item: Node<'_>| item.child("kind").is_none() || item.child("apiVersion").is_none();
        self.typed_items()
            .is_some_and(|(items, kind)| items.items().any(|item| kind.len > 0 && lacks(item) || item.lacks_types()))
    }

    /// Copies the value; `types` are the `apiVersion` and the `kind`, each key with its value, of the list in which it is an item.
    fn copy_typed(self, types: &[(Item, Item)], copy: &mut Vec<Item>) {
        let header = copy.len();
        copy.push(*self.item());
        let typed = self.typed_items();
        for (key, value) in self.pairs() {
            copy.push(*key.item());
            match typed {
                Some((items, kind)) if items.at == value.at => {
                    let types = self.pairs().filter_map(|(key, value)| match key.key() {
                        "apiVersion" => Some((*key.item(), *value.item())),
                        "kind" => Some((*key.item(), kind)),
                        _ => None,
                    });
                    let types: Vec<(Item, Item)> = types.filter(|_| kind.len > 0).collect();
                    let header = copy.len();
                    copy.push(*items.item());
                    items.items().for_each(|item| item.copy_typed(&types, copy));
                    copy[header].start = (copy.len() - header) as u32;
                }
                _ => copy.extend_from_slice(&self.document.items[value.at as usize..value.end() as usize]),
            }
        }
        for (key, value) in types {
            let name = key.text(self.document.text, &self.document.side);
            if self.is_mapping() && self.child(name).is_none() {
                copy.extend([Item { line: self.line(), ..*key }, Item { line: self.line(), ..*value }]);
                copy[header].len += 1;
            }
        }
        if self.item().is_collection() {
            copy[header].start = (copy.len() - header) as u32;
        }
    }
}

impl std::fmt::Debug for Node<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("line", &self.line()).field("value", &self.to_value()).finish()
    }
}

impl Notes {
    /// Leaves a field out the next time that the object is decoded.
    pub fn leave_out(&self, place: u32) {
        self.left_out.borrow_mut().insert(place);
    }

    /// The name and the value of each field of a mapping that was not met as an unknown one.
    pub fn known_fields<'d>(&self, node: Node<'d>) -> impl Iterator<Item = (&'d str, Node<'d>)> {
        let known = node.pairs().filter(|(key, _)| !self.unknown.borrow().contains_key(&key.at));
        known.map(|(key, value)| (key.key(), value))
    }

    /// Writes the JSON of a value without the unknown fields that were met in it. `is_read`: whether the field at a path of two names at
    /// most is written.
    pub fn write_known(&self, node: Node<'_>, is_read: &dyn Fn(&[&str]) -> bool, text: &mut String) {
        self.write(node, &mut Vec::new(), is_read, &self.unknown.borrow(), text);
    }

    fn write<'d>(
        &self,
        node: Node<'d>,
        path: &mut Vec<&'d str>,
        is_read: &dyn Fn(&[&str]) -> bool,
        unknown: &BTreeMap<u32, &'static [&'static str]>,
        text: &mut String,
    ) {
        if let Some(scalar) = node.scalar() {
            text.push_str(&scalar.to_value().to_string());
            return;
        }
        let (open, close) = if node.is_sequence() { ('[', ']') } else { ('{', '}') };
        text.push(open);
        let mut separator = "";
        for item in node.items() {
            text.push_str(separator);
            separator = ",";
            // Of no interest below lists.
            self.write(item, &mut vec![""; 2], is_read, unknown, text);
        }
        for (key, value) in node.pairs().filter(|(key, _)| !unknown.contains_key(&key.at)) {
            let is_shallow = path.len() < 2;
            if is_shallow {
                path.push(key.key());
                if !is_read(path) {
                    path.pop();
                    continue;
                }
            }
            text.push_str(separator);
            separator = ",";
            text.push_str(&Value::from(key.key()).to_string());
            text.push(':');
            self.write(value, path, is_read, unknown, text);
            if is_shallow {
                path.pop();
            }
        }
        text.push(close);
    }

    /// The unknown fields that were met, in the order of the text; they are forgotten.
    pub fn take_unknown(&self, object: Node<'_>) -> Vec<UnknownField> {
        let unknown = std::mem::take(&mut *self.unknown.borrow_mut());
        let places: Vec<u32> = unknown.keys().copied().collect();
        let paths = object.paths(&places);
        let field = |(path, (place, known)): (String, (u32, &'static [&'static str]))| UnknownField {
            path,
            name: object.to(place).key().to_owned(),
            known,
        };
        paths.into_iter().zip(unknown).map(field).collect()
    }
}

impl<'d> Node<'d> {
    /// The path of each place within the object, which are in their order; as an API server writes it.
    pub(super) fn paths(self, places: &[u32]) -> Vec<String> {
        let mut paths = Vec::with_capacity(places.len());
        self.walk_to(&mut places.iter().copied().peekable(), &mut String::new(), &mut paths);
        paths
    }

    fn walk_to(
        self,
        places: &mut std::iter::Peekable<impl Iterator<Item = u32>>,
        path: &mut String,
        paths: &mut Vec<String>,
    ) {
        let is_here = |place: Option<&u32>, end: u32| place.is_some_and(|place| *place < end);
        while places.next_if_eq(&self.at).is_some() {
            paths.push(path.clone());
        }
        let len = path.len();
        for (key, value) in self.pairs() {
            if !is_here(places.peek(), self.end()) {
                return;
            }
            if is_here(places.peek(), value.end()) {
                if len > 0 {
                    path.push('.');
                }
                path.push_str(key.key());
                while places.next_if_eq(&key.at).is_some() {
                    paths.push(path.clone());
                }
                value.walk_to(places, path, paths);
                path.truncate(len);
            }
        }
        for (index, item) in self.items().enumerate() {
            if !is_here(places.peek(), self.end()) {
                return;
            }
            if is_here(places.peek(), item.end()) {
                path.push_str(&format!("[{index}]"));
                item.walk_to(places, path, paths);
                path.truncate(len);
            }
        }
    }
}
