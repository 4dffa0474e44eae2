//! The YAML file of settings. Scalars keep their text: `1e3` and `1.10` can be names.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The largest settings file: far above all options together.
const MAX_BYTES: u64 = 64 << 10;

/// What a setting takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    One,
    List,
}

/// Reads the settings of a file, each with its values. `takes`: what a setting takes, or why it is refused.
pub(super) fn read(
    path: &Path,
    takes: &dyn Fn(&str) -> Result<Takes, String>,
) -> Result<BTreeMap<String, Vec<String>>, String> {
    let failed = |error: std::io::Error| format!("read {}: {error}", path.display());
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > MAX_BYTES {
        return Err(format!("read {}: it has {size} bytes; a settings file has at most {MAX_BYTES}", path.display()));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(BTreeMap::new());
    }
    let settings = serde_yaml_ng::Deserializer::from_str(&text).deserialize_map(Settings(takes));
    settings.map_err(|error| format!("{}: {error}", path.display()))
}

struct Settings<'a>(&'a dyn Fn(&str) -> Result<Takes, String>);

impl<'de> Visitor<'de> for Settings<'_> {
    type Value = BTreeMap<String, Vec<String>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lines of the form KEY: VALUE")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut settings = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            let takes = match settings.contains_key(&name) {
                true => Err("duplicate setting".to_owned()),
                false => (self.0)(&name),
            };
            let values = map.next_value_seed(Values(takes))?;
            settings.insert(name, values);
        }
        Ok(settings)
    }
}

/// The values of one setting.
struct Values(Result<Takes, String>);

impl<'de> DeserializeSeed<'de> for Values {
    type Value = Vec<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<String>, D::Error> {
        match &self.0 {
            Ok(Takes::One) => One.deserialize(deserializer).map(|value| vec![value]),
            // The only way to accept both a list and one value.
            Ok(Takes::List) | Err(_) => deserializer.deserialize_any(self),
        }
    }
}

impl Values {
    fn check<E: Error>(&self) -> Result<(), E> {
        self.0.as_ref().map(drop).map_err(E::custom)
    }
}

impl<'de> Visitor<'de> for Values {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok(_) => f.write_str("a value or a list"),
            Err(why) => f.write_str(why),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<String>, E> {
        self.check()?;
        One.visit_str(text).map(|value| vec![value])
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<String>, E> {
        self.check()?;
        One.visit_str("").map(|value| vec![value])
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Vec<String>, E> {
        self.check()?;
        Ok(vec![value.to_string()])
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Vec<String>, E> {
        self.check()?;
        Ok(vec![value.to_string()])
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Vec<String>, E> {
        self.check()?;
        Ok(vec![value.to_string()])
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Vec<String>, E> {
        self.check()?;
        Err(E::custom(format!("{value} is a number: names that look like numbers are written in a list, or in quotes")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
        self.check()?;
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(One)? {
            values.push(value);
        }
        Ok(values)
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Vec<String>, A::Error> {
        self.check()?;
        Err(A::Error::custom("expected a value or a list, not a map"))
    }
}

/// One value, as its text.
struct One;

impl<'de> DeserializeSeed<'de> for One {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        // Not by its type, which would read a number.
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for One {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one value")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        match text {
            "" | "~" | "null" => Err(E::custom("expected a value: remove the setting, or set it")),
            text => Ok(text.to_owned()),
        }
    }
}
