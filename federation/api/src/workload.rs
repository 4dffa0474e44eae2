//! Objects that make pods: their pod templates, with what their controllers add to them.
//!
//! Nothing here runs: members never read these kinds as endpoints ([`crate::manifest::Manifests`] keeps them apart from
//! the objects that are assembled). The offline commands make planned endpoints of them, see [`crate::assemble::planned`].

mod kinds;

use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_policy::inventory::Stopped;
use serde::Deserialize;

use crate::document::Node;
use crate::field::{Errors, FieldError, Path};
use crate::kubernetes::{Map, Metadata, PodSpec, null_as_default};
use crate::manifest::{Place, Reference, field_count, typed};
use crate::metadata::{check_labels, check_metadata};
use crate::strict;

/// Templates of one object: a Ray cluster of 1,000 worker groups is far more than any that is known.
pub const MAX_TEMPLATES: usize = 1_024;

/// An object that makes pods, and where it is written.
#[derive(Debug, Clone)]
pub struct Workload {
    pub place: Place,
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

/// One kind of pod that a workload makes.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    /// What distinguishes it from the other templates of its object.
    pub part: Option<String>,
    /// The labels of its pods, as far as they are known before they run.
    pub labels: Map,
    /// Those of them that the controller sets, by which its pods are recognised.
    pub identity: Map,
    /// Keys of labels that the controller sets when the pods run.
    pub run_time_labels: BTreeSet<Arc<str>>,
    /// Those of them that it sets on every pod.
    pub certain_labels: BTreeSet<Arc<str>>,
    /// Its pods get ports that are not known before they run.
    pub run_time_ports: bool,
    pub spec: PodSpec,
    pub stopped: Option<Stopped>,
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
    labels: Map,
}

/// Whether objects of a kind make pods. Their versions do not matter: they differ in nothing that is read.
pub fn is_workload(reference: &Reference) -> bool {
    kinds::is_known(group(&reference.api_version), &reference.kind)
}

/// The group of an `apiVersion`; the core group is empty.
pub fn group(api_version: &str) -> &str {
    api_version.rsplit_once('/').map_or("", |(group, _)| group)
}

/// `Deployment.apps/web`: how owners are named.
pub fn owner_name(api_version: &str, kind: &str, name: &str) -> Arc<str> {
    format!("{kind}.{}/{name}", group(api_version)).into()
}

/// Reads an object of a kind that [`is_workload`].
///
/// # Errors
/// What an API server would refuse, as far as it is looked at.
pub fn read(
    place: Place,
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
    let (reference, fields, not_storable) = (reference.clone(), field_count(node), not_storable.0);
    let templates = read;
    Ok(Workload { place, reference, metadata, name, generated, fields, templates, not_storable, unread_policy })
}

/// A template as it is found in an object.
struct Found<'n> {
    part: Option<String>,
    node: Node<'n>,
    path: String,
    /// The node is the pod's spec, without metadata around it.
    bare: bool,
    /// What the workload gives to all its pods, and a template may replace.
    inherited: Map,
    identity: Map,
    run_time_labels: BTreeSet<Arc<str>>,
    certain_labels: BTreeSet<Arc<str>>,
    run_time_ports: bool,
    stopped: Option<Stopped>,
    /// Ports that the controller adds where no container has one of this name.
    ports: Vec<(Option<&'static str>, u16)>,
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
