//! Objects that make pods: their pod templates, with what their controllers add to them.
//!
//! Nothing here runs: members never read these kinds as endpoints ([`crate::manifest::Manifests`] keeps them apart from
//! the objects that are assembled). The offline commands make planned endpoints of them, see [`crate::assemble::planned`].

mod kinds;
mod template;

use std::sync::Arc;

use hanse_policy::inventory::Labels;
use serde::Deserialize;

use self::template::Found;
pub use self::template::Template;
use crate::decode::{null_as_default, typed};
use crate::diagnostic::{Reference, SourceLocation};
use crate::document::Node;
use crate::field::{Errors, FieldError, Path};
use crate::kubernetes::PodSpec;
use crate::metadata::{Metadata, check_labels, check_metadata};
use crate::names::group;
use crate::strict;

/// Templates of one object: a Ray cluster of 1,000 worker groups is far more than any that is known.
pub const MAX_TEMPLATES: usize = 1_024;

/// An object that makes pods, and where it is written.
#[derive(Debug, Clone)]
pub struct Workload {
    pub location: SourceLocation,
    pub reference: Reference,
    pub metadata: Metadata,
    /// Its own, or what its name is to begin with.
    pub name: String,
    /// The whole name of one that an API server would generate.
    pub generated: Option<String>,
    /// How many fields its root, metadata and spec have.
    pub fields: usize,
    pub templates: Vec<Template>,
    /// What API servers refuse of its pods, see [`crate::strict`].
    pub not_storable: Vec<FieldError>,
    /// Policy that its controller makes of it, which no answer takes into account.
    pub unread_policy: Option<FieldError>,
}

#[derive(Debug, Default, Deserialize)]
struct PodTemplate {
    #[serde(default, deserialize_with = "null_as_default")]
    metadata: TemplateMetadata,
    #[serde(default, deserialize_with = "null_as_default")]
    spec: PodSpec,
}

#[derive(Debug, Default, Deserialize)]
struct TemplateMetadata {
    #[serde(default, deserialize_with = "null_as_default")]
    labels: Labels,
}

/// Whether objects of a kind make pods. Their versions do not matter: they differ in nothing that is read.
pub fn is_workload(reference: &Reference) -> bool {
    kinds::is_known(group(&reference.api_version), &reference.kind)
}

/// Reads an object of a kind that [`is_workload`].
///
/// # Errors
/// What an API server would refuse, as far as it is looked at.
pub fn read(
    location: SourceLocation,
    reference: &Reference,
    node: Node<'_>,
    generated: Option<String>,
) -> Result<Workload, Vec<FieldError>> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(default)]
        metadata: Metadata,
    }
    let Header { metadata } = typed(node)?;
    let mut errors = Errors::default();
    check_metadata(&metadata, &mut errors);
    let prefix = || node.child("metadata")?.child("generateName")?.text();
    let name = if metadata.name.is_empty() { prefix().unwrap_or_default() } else { &*metadata.name }.to_owned();
    if name.is_empty() {
        errors.add(&Path::Root("metadata.name"), "is missing");
    }
    let mut templates = kinds::templates(group(&reference.api_version), &reference.kind, &metadata, node);
    if metadata.name.is_empty() {
        // What its pods are labelled with is generated too.
        for template in &mut templates {
            let identity = std::mem::take(&mut template.identity);
            template.certain_labels.extend(identity.keys().cloned());
            template.run_time_labels.extend(identity.into_keys());
        }
    }
    if templates.len() > MAX_TEMPLATES {
        errors.add(&Path::Root("spec"), format!("{} pod templates; {MAX_TEMPLATES} are allowed", templates.len()));
    }
    let (mut read, mut not_storable) = (Vec::new(), Errors::default());
    for template in templates.into_iter().take(MAX_TEMPLATES) {
        match template.read(&mut errors, &mut not_storable) {
            Ok(template) => read.push(template),
            Err(wrong) => errors.0.extend(wrong),
        }
    }
    if !errors.0.is_empty() {
        return Err(errors.0);
    }
    let unread_policy = kinds::unread_policy(group(&reference.api_version), &reference.kind, node);
    let (reference, fields, not_storable) = (reference.clone(), node.field_count(), not_storable.0);
    let templates = read;
    Ok(Workload { location, reference, metadata, name, generated, fields, templates, not_storable, unread_policy })
}

impl Found<'_> {
    fn read(self, errors: &mut Errors, not_storable: &mut Errors) -> Result<Template, Vec<FieldError>> {
        let below = |wrong: Vec<FieldError>| -> Vec<FieldError> {
            let path = |path: &str| if path.is_empty() { self.path.clone() } else { format!("{}.{path}", self.path) };
            wrong.into_iter().map(|error| FieldError { path: path(&error.path), message: error.message }).collect()
        };
        let PodTemplate { metadata, mut spec } = match self.bare {
            true => PodTemplate { spec: typed(self.node).map_err(below)?, ..PodTemplate::default() },
            false => typed(self.node).map_err(below)?,
        };
        let root = Path::Root(&self.path);
        let under = root.field("spec");
        strict::check_pod(&spec, if self.bare { &root } else { &under }, not_storable);
        check_labels(&metadata.labels, &root.field("metadata").field("labels"), errors);
        for (name, port) in self.ports {
            spec.add_port(name, port);
        }
        let mut labels = self.inherited;
        labels.extend(metadata.labels);
        labels.extend(self.identity.iter().map(|(key, value)| (Arc::clone(key), Arc::clone(value))));
        let mut run_time_labels = self.run_time_labels;
        run_time_labels.retain(|key| !kinds::is_default_only(key) || !labels.contains_key(key));
        labels.retain(|key, _| !run_time_labels.contains(key));
        let Self { part, identity, mut certain_labels, run_time_ports, stopped, .. } = self;
        certain_labels.retain(|key| run_time_labels.contains(key));
        Ok(Template { part, labels, identity, run_time_labels, certain_labels, run_time_ports, spec, stopped })
    }
}
