//! Values into types, as Go's JSON decoder fills them: null is the zero value of whatever is wanted. What does not fit is
//! named in words of those who write manifests.

use std::borrow::Cow;
use std::fmt::Display;

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
};

use super::scalar::Scalar;
use super::tree::{ItemKind, Node};
use crate::field::unknown_field;

/// Why a value does not fit its type.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct DecodeError {
    pub message: String,
    /// The value that is not a number of 16 bits, which is a port wherever the field's name says so.
    number: Option<String>,
    /// The innermost value that is known to be wrong.
    at: Option<u32>,
}

impl DecodeError {
    /// The path of the value that is wrong; empty for the object itself.
    pub fn path(&self, object: Node<'_>) -> String {
        let places = [self.at.unwrap_or(object.at)];
        object.paths(&places).pop().unwrap_or_default()
    }

    /// What is wrong with the value at `path`.
    pub fn message_at(&self, path: &str) -> String {
        let field = path.rsplit('.').next().unwrap_or_default().split('[').next().unwrap_or_default();
        let field = field.to_ascii_lowercase();
        match &self.number {
            Some(written) if field.ends_with("port") || field.ends_with("ports") => {
                format!("{written} is not a port (1–65535)")
            }
            _ => self.message.clone(),
        }
    }

    fn at(mut self, node: Node<'_>) -> Self {
        self.at.get_or_insert(node.at);
        self
    }
}

impl serde::de::Error for DecodeError {
    fn custom<T: Display>(message: T) -> Self {
        Self { message: message.to_string(), number: None, at: None }
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let (written, expected) = (written(unexpected), expected.to_string());
        let quotes = if is_text(&expected) { "; text needs quotes where it looks like something else" } else { "" };
        let message = format!("{written}, where {} is expected{quotes}", in_words(&expected));
        Self { message, number: (expected == "u16").then_some(written), at: None }
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(unexpected, expected)
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        Self::custom(unknown_field(field, known))
    }
}

/// A value of the wrong type, as people call it.
fn written(unexpected: Unexpected<'_>) -> String {
    match unexpected {
        Unexpected::Bool(it) => it.to_string(),
        Unexpected::Unsigned(it) => it.to_string(),
        Unexpected::Signed(it) => it.to_string(),
        Unexpected::Float(it) => it.to_string(),
        Unexpected::Str(it) => format!("{it:?}"),
        Unexpected::Unit | Unexpected::Option => "null".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a mapping".to_owned(),
        other => other.to_string(),
    }
}

fn is_text(expected: &str) -> bool {
    expected.ends_with("string")
}

/// What a type expects, as people call it.
fn in_words(expected: &str) -> Cow<'_, str> {
    let range = |last: u64| format!("a whole number from 0 to {last}").into();
    match expected {
        "a sequence" => "a list".into(),
        "a map" => "a mapping".into(),
        "a boolean" => "true or false".into(),
        "u8" => range(u8::MAX.into()),
        "u16" => range(u16::MAX.into()),
        "u32" => range(u32::MAX.into()),
        "u64" | "i64" | "i32" | "i16" | "i8" | "usize" => "a whole number".into(),
        "f64" | "f32" => "a number".into(),
        it if is_text(it) => "text".into(),
        it if it.starts_with("struct ") => "a mapping".into(),
        it => it.into(),
    }
}

impl<'de> IntoDeserializer<'de, DecodeError> for Node<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'d> Node<'d> {
    fn visit<V: Visitor<'d>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        let visited = match self.scalar().map(Scalar::through_json) {
            Some(Scalar::Null) => visitor.visit_unit(),
            Some(Scalar::Bool(it)) => visitor.visit_bool(it),
            Some(Scalar::Int(it)) => visitor.visit_i64(it),
            Some(Scalar::UInt(it)) => visitor.visit_u64(it),
            Some(Scalar::Float(it)) => visitor.visit_f64(it),
            Some(Scalar::Text(it)) => visitor.visit_borrowed_str(it),
            None if self.is_sequence() => visitor.visit_seq(self.sequence()),
            None => visitor.visit_map(self.mapping(None)),
        };
        visited.map_err(|error| error.at(self))
    }

    fn sequence(self) -> Sequence<impl Iterator<Item = Node<'d>>> {
        Sequence { left: self.item().len as usize, items: self.items() }
    }

    fn mapping(
        self,
        fields: Option<&'static [&'static str]>,
    ) -> Mapping<'d, impl Iterator<Item = (Node<'d>, Node<'d>)>> {
        Mapping { pairs: self.pairs(), value: None, fields }
    }
}

/// A method that takes null for the zero value.
macro_rules! or_zero {
    ($($method:ident $visit:ident($zero:expr),)*) => {
        $(
            fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
                if self.is_null() { visitor.$visit($zero).map_err(|error: DecodeError| error.at(self)) } else { self.visit(visitor) }
            }
        )*
    };
}

impl<'de> Deserializer<'de> for Node<'de> {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        self.visit(visitor)
    }

    or_zero! {
        deserialize_bool visit_bool(false),
        deserialize_i8 visit_i64(0),
        deserialize_i16 visit_i64(0),
        deserialize_i32 visit_i64(0),
        deserialize_i64 visit_i64(0),
        deserialize_i128 visit_i64(0),
        deserialize_u8 visit_u64(0),
        deserialize_u16 visit_u64(0),
        deserialize_u32 visit_u64(0),
        deserialize_u64 visit_u64(0),
        deserialize_u128 visit_u64(0),
        deserialize_f32 visit_f64(0.0),
        deserialize_f64 visit_f64(0.0),
        deserialize_str visit_str(""),
        deserialize_string visit_str(""),
        deserialize_seq visit_seq(Sequence { left: 0, items: std::iter::empty::<Node<'de>>() }),
        deserialize_map visit_map(Mapping { pairs: std::iter::empty::<(Node<'de>, Node<'de>)>(), value: None, fields: None }),
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match self.item().kind {
            ItemKind::Mapping => visitor.visit_map(self.mapping(Some(fields))).map_err(|error| error.at(self)),
            // Where a type would take its fields in their order, JSON does not.
            ItemKind::Sequence => Err(DecodeError::invalid_type(Unexpected::Seq, &visitor).at(self)),
            _ => self.deserialize_map(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        if self.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        char bytes byte_buf unit unit_struct tuple tuple_struct enum identifier
    }
}

struct Sequence<I> {
    left: usize,
    items: I,
}

impl<'de, I: Iterator<Item = Node<'de>>> SeqAccess<'de> for Sequence<I> {
    type Error = DecodeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, DecodeError> {
        let Some(item) = self.items.next() else { return Ok(None) };
        self.left = self.left.saturating_sub(1);
        seed.deserialize(item).map(Some).map_err(|error| error.at(item))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left)
    }
}

struct Mapping<'d, I> {
    pairs: I,
    /// Of the key that was read last.
    value: Option<Node<'d>>,
    /// Those of the type; `None` where any is taken.
    fields: Option<&'static [&'static str]>,
}

impl<'de, I: Iterator<Item = (Node<'de>, Node<'de>)>> MapAccess<'de> for Mapping<'de, I> {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, DecodeError> {
        for (key, value) in self.pairs.by_ref() {
            if let Some(notes) = key.notes {
                if notes.left_out.borrow().contains(&key.at) {
                    continue;
                }
                if let Some(fields) = self.fields.filter(|fields| !fields.contains(&key.key())) {
                    notes.unknown.borrow_mut().insert(key.at, fields);
                    continue;
                }
            }
            self.value = Some(value);
            let name: StrDeserializer<'de, DecodeError> = key.key().into_deserializer();
            return seed.deserialize(name).map(Some).map_err(|error| error.at(key));
        }
        Ok(None)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, DecodeError> {
        let value = self.value.take().expect("each value comes after its key");
        seed.deserialize(value).map_err(|error| error.at(value))
    }
}
