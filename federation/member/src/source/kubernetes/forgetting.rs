//! Kept objects are listed in one file of the state, and forgotten by a request in another one.
//!
//! The state also contains their texts: the caches of a process may be lost or damaged, another one may lead next, and none can read these
//! objects any more. It also contains the definitions under which objects are in force. If a definition is deleted while no process runs,
//! and the next one has no caches, this is the only trace of its objects: they are missing, and not deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::state::State;

/// The names of kept objects, for the command.
const KEPT: &str = "source/kept.json";
/// Their texts.
const TEXTS: &str = "source/texts.json";
/// The definitions of the objects in force.
const DEFINITIONS: &str = "source/definitions.json";
const REQUEST: &str = "source/forget.json";
/// The longest time until a running member takes a request. After an outage of the API server, the member follows its Secrets again within
/// 10 s, or with the next attempt.
const TAKEN_WITHIN: Duration = Duration::from_secs(30);
/// Names in one request.
const MAX_NAMES: usize = 10_000;
/// Of the texts in a Secret with their origins, as they are stored, with room for the names: see [`crate::state::MAX_SECRET_BYTES`]. At 2 KB
/// each, they are some 300.
const MAX_TEXT_BYTES: usize = 700 << 10;
/// The bytes of the names in the list.
const MAX_NAME_BYTES: usize = 200 << 10;
/// The interval between attempts to write the list.
const WRITE_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Objects that are in force although their kind was deleted, each as `COLLECTION/NAMESPACE/NAME` or `COLLECTION/NAME`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Names {
    objects: Vec<String>,
    /// Of a request: all of them, also those that the list does not contain.
    #[serde(default)]
    all: bool,
}

/// The texts of kept objects, by origin.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Texts {
    texts: BTreeMap<String, String>,
    /// The number of further ones, for which there was no room.
    omitted: usize,
}

/// What an earlier process had in force, of kinds that may have been deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Earlier {
    /// The texts of objects, by origin.
    pub texts: BTreeMap<String, String>,
    pub missing: Missing,
}

/// What an earlier process had in force, and the state does not contain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing {
    /// The number of kept objects for which there was no room.
    pub kept: usize,
    /// The definitions of other objects, each as `COLLECTION/UID`. The objects of those that exist can be read.
    pub definitions: BTreeSet<PathBuf>,
}

impl Missing {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The name of an object that is kept in force although its kind was deleted.
pub type KeptObject = String;

fn read<T: serde::de::DeserializeOwned>(state: &State, file: &str) -> io::Result<Option<T>> {
    let context = |error: &dyn std::fmt::Display| io::Error::other(format!("{file}: {error}"));
    let text = state.read(file).map_err(|error| context(&error))?;
    text.map(|text| serde_json::from_slice(&text)).transpose().map_err(|error| context(&error))
}

/// The kept objects of the member with this state.
///
/// # Errors
/// When the file of the member cannot be read.
pub fn kept_objects(state: impl Into<State>) -> io::Result<Vec<KeptObject>> {
    Ok(read::<Names>(&state.into(), KEPT)?.unwrap_or_default().objects)
}

/// Requests that the running member forgets kept objects, and waits until it has. `all`: also those that it could not list.
///
/// # Errors
/// `TimedOut` when no member takes the request; when the request cannot be written.
pub fn forget(state: impl Into<State>, objects: Vec<KeptObject>, all: bool) -> io::Result<()> {
    let state = state.into();
    state.write(REQUEST, &serde_json::to_vec(&Names { objects, all })?)?;
    let start = Instant::now();
    while state.version(REQUEST)?.is_some() {
        if start.elapsed() > TAKEN_WITHIN {
            state.remove(REQUEST)?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(if state.is_in_secrets() { 200 } else { 50 }));
        state.refresh()?;
    }
    Ok(())
}

/// What an earlier process had in force, from its state.
///
/// # Errors
/// When a file cannot be read.
pub fn earlier(state: &State) -> io::Result<Earlier> {
    let Texts { texts, omitted } = read(state, TEXTS)?.unwrap_or_default();
    let mut definitions: BTreeSet<PathBuf> = read(state, DEFINITIONS)?.unwrap_or_default();
    // All objects of a definition are kept, or none.
    definitions.retain(|definition| !texts.keys().any(|origin| Path::new(origin).starts_with(definition)));
    Ok(Earlier { texts, missing: Missing { kept: omitted, definitions } })
}

/// Objects to forget.
#[derive(Debug)]
pub(super) struct Request(Names);

impl Request {
    pub fn matches(&self, object: &str) -> bool {
        self.0.all || self.0.objects.iter().any(|it| it == object)
    }

    pub fn is_of_all(&self) -> bool {
        self.0.all
    }
}

/// The files of a running member.
#[derive(Debug)]
pub(super) struct Requests {
    state: State,
    /// The origins whose list was written.
    written: Option<Vec<Arc<Path>>>,
    /// The definitions that the state contains; `None`: not read yet.
    definitions: Option<BTreeSet<PathBuf>>,
    /// When the next attempt to write the list is due, and the definitions: kept objects never wait for definitions.
    write_at: Instant,
    write_definitions_at: Instant,
}

impl Requests {
    pub fn new(state: State) -> Self {
        let now = Instant::now();
        Self { state, written: None, definitions: None, write_at: now, write_definitions_at: now }
    }

    /// A request that was written since the last call.
    pub fn take(&self) -> Option<Request> {
        let request = read::<Names>(&self.state, REQUEST).transpose()?;
        let removed = self.state.remove(REQUEST);
        match (request, removed) {
            (Ok(mut names), Ok(_)) => {
                names.objects.truncate(MAX_NAMES);
                Some(Request(names))
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, file = REQUEST, "request to forget kept objects ignored");
                None
            }
        }
    }

    /// Lists the kept objects for `hanse-member forget`, and stores their texts in Secrets. `name_of`: of an origin; `text_of`: likewise.
    /// Returns whether the list is current.
    pub fn write_kept(
        &mut self,
        kept: Vec<Arc<Path>>,
        name_of: impl Fn(&Path) -> KeptObject,
        text_of: impl Fn(&Path) -> Option<Vec<u8>>,
    ) -> bool {
        if self.written.as_ref() == Some(&kept) {
            return true;
        }
        if Instant::now() < self.write_at {
            return false;
        }
        let mut bytes = 0;
        let mut fits = |length: usize, limit: usize| {
            bytes += length;
            bytes <= limit
        };
        let names = kept.iter().map(|origin| name_of(origin)).take_while(|name| fits(name.len() + 4, MAX_NAME_BYTES));
        let names = Names { objects: names.collect(), all: false };
        let mut texts = Texts::default();
        let mut bytes = 0;
        for origin in &kept {
            let text = text_of(origin).and_then(|text| String::from_utf8(text).ok());
            let (Some(origin), Some(text)) = (origin.to_str(), text) else {
                texts.omitted += 1;
                continue;
            };
            let length = stored_length(origin) + stored_length(&text);
            if bytes + length > MAX_TEXT_BYTES {
                texts.omitted += 1;
                continue;
            }
            bytes += length;
            texts.texts.insert(origin.to_owned(), text);
        }
        match self.write(&names, &texts) {
            Ok(()) => self.written = Some(kept),
            Err(error) => {
                tracing::warn!(%error, "the list of kept objects cannot be written");
                self.write_at = Instant::now() + WRITE_AGAIN_AFTER;
                return false;
            }
        }
        true
    }

    /// Records the definitions of the objects in force.
    pub fn write_definitions(&mut self, now: BTreeSet<PathBuf>) {
        let is_due = Instant::now() >= self.write_definitions_at;
        if self.definitions.as_ref() == Some(&now) || !is_due {
            return;
        }
        let written = || -> io::Result<()> {
            if read::<BTreeSet<PathBuf>>(&self.state, DEFINITIONS)?.unwrap_or_default() == now {
                return Ok(());
            }
            self.state.write(DEFINITIONS, &serde_json::to_vec(&now)?)
        };
        match written() {
            Ok(()) => self.definitions = Some(now),
            Err(error) => tracing::warn!(%error, "the definitions of the objects in force cannot be written"),
        }
        // A kind whose only object comes and goes is not written each time.
        self.write_definitions_at = Instant::now() + WRITE_AGAIN_AFTER;
    }

    fn write(&self, names: &Names, texts: &Texts) -> io::Result<()> {
        if read::<Texts>(&self.state, TEXTS)?.unwrap_or_default() != *texts {
            self.state.write(TEXTS, &serde_json::to_vec(texts)?)?;
        }
        if read::<Names>(&self.state, KEPT)?.unwrap_or_default() == *names {
            return Ok(());
        }
        self.state.write(KEPT, &serde_json::to_vec(names)?)
    }
}

/// The bytes of a text in JSON, with a separator. Quotes and backslashes take two.
fn stored_length(text: &str) -> usize {
    let escaped = |byte| match byte {
        b'"' | b'\\' => 2,
        0..0x20 => 6,
        _ => 1,
    };
    text.bytes().map(escaped).sum::<usize>() + 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_counted_as_they_are_stored() {
        for text in ["a", r#"{"metadata":{"name":"a\\b"}}"#, "{\n\t\"é\": \"\u{1}\"}", ""] {
            let stored = serde_json::to_string(text).expect("JSON").len() + 1;
            assert!((stored..stored + 20).contains(&stored_length(text)), "{text:?}");
        }
        assert_eq!(stored_length(r#""\""#), serde_json::to_string(r#""\""#).expect("JSON").len() + 1);
    }
}
