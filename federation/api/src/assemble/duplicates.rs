//! Objects with one key: the first one in the order of the files wins.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use smol_str::SmolStr;

use crate::calico;
use crate::diagnostic::{Diagnostic, Reference, SourceLocation};
use crate::manifest::Manifest;

/// The diagnostics of all objects whose key another one had before them, in their order.
pub fn duplicates(objects: &[Manifest]) -> Vec<Diagnostic> {
    let mut seen = Seen::default();
    objects.iter().filter_map(|manifest| seen.twice(manifest)).collect()
}

/// The key that an API server has an object under.
pub fn key_of(manifest: &Manifest) -> Arc<Reference> {
    let reference = &manifest.reference;
    let api_version = match reference.api_version.as_str() {
        // The two API groups of Calico name the same objects.
        calico::CRD_API_VERSION => calico::API_VERSION,
        other => other,
    };
    let is_namespaced = manifest.object.is_namespaced();
    let namespace = is_namespaced.then(|| reference.namespace.clone().unwrap_or_else(|| "default".into()));
    // And one may store them under another name.
    let name = manifest.object.own_name().map_or_else(|| reference.name.clone(), SmolStr::new);
    let key = Reference { api_version: api_version.into(), kind: reference.kind.clone(), namespace, name };
    // Most objects are called what they are stored as.
    if key == **reference { Arc::clone(reference) } else { Arc::new(key) }
}

/// The diagnostic of an object whose key another one had before it.
pub(super) fn duplicate(manifest: &Manifest, first: &SourceLocation) -> Diagnostic {
    let message = format!("duplicate of {}:{}; the first one wins", first.file, first.line);
    diagnostic(manifest, "metadata.name", message)
}

/// Where each key was met first.
#[derive(Debug, Default)]
pub(super) struct Seen<'m>(HashMap<Arc<Reference>, &'m SourceLocation>);

impl<'m> Seen<'m> {
    pub fn twice(&mut self, manifest: &'m Manifest) -> Option<Diagnostic> {
        match self.0.entry(key_of(manifest)) {
            Entry::Vacant(entry) => {
                entry.insert(&manifest.location);
                None
            }
            Entry::Occupied(first) => Some(duplicate(manifest, first.get())),
        }
    }
}

pub(super) fn diagnostic(manifest: &Manifest, field: &str, message: String) -> Diagnostic {
    diagnostic_of(&manifest.location, &manifest.reference, field, message)
}

pub(super) fn diagnostic_of(location: &SourceLocation, object: &Reference, field: &str, message: String) -> Diagnostic {
    Diagnostic {
        location: location.clone(),
        field: field.to_owned(),
        message,
        object: Some(object.clone()),
        start: location.line,
        not_object: None,
    }
}
