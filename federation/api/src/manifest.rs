//! Files of manifests into typed, validated objects.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hanse_policy::model::Policy;

use crate::calico::{self, CalicoObject};
use crate::cluster_network_policy::ClusterNetworkPolicy;
use crate::decode::typed;
use crate::diagnostic::{Diagnostic, NotObject, Reference, SourceLocation};
use crate::document::{self, FaultKind, Locator, Node, Notes, SyntaxError};
use crate::field::FieldError;
use crate::files::{self, Listing, ReadError};
use crate::hanse::{self, FederatedNetworkPolicy, FederatedNetworkSet, MemberCluster, Tier};
use crate::kind;
use crate::kubernetes::{EndpointSlice, Namespace, Node as KubeNode, Pod, Service, ServiceAccount};
use crate::metadata::Metadata;
use crate::network_policy::NetworkPolicy;
use crate::strict;
use crate::workload::{self, Workload};

/// A document of a kind that Hanse does not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    pub location: SourceLocation,
    pub object: Reference,
}

#[derive(Debug, Clone)]
pub struct Manifest {
    pub location: SourceLocation,
    pub reference: Reference,
    pub object: Object,
    /// The paths of fields that are not known. Only what is in doubt has any.
    pub unknown: Vec<String>,
    /// How many fields its root, metadata and spec have: fewer than the whole object where it is a patch of it.
    pub fields: usize,
}

impl Manifest {
    /// Makes the rules of a policy unknown that have an unknown field, and all of them where the field is elsewhere.
    pub fn doubt(&self, policy: &mut Policy) {
        let place = |path: &str| {
            let (is_ingress, rest) = match path.strip_prefix("spec.ingress[") {
                Some(rest) => (true, rest),
                None => (false, path.strip_prefix("spec.egress[")?),
            };
            Some((is_ingress, rest.split_once(']')?.0.parse::<u32>().ok()?))
        };
        for path in &self.unknown {
            let place = place(path);
            for (is_ingress, rules) in [(true, &mut policy.ingress), (false, &mut policy.egress)] {
                let rules = rules.iter_mut().flatten();
                for rule in rules.filter(|rule| place.is_none_or(|place| place == (is_ingress, rule.index))) {
                    rule.not_understood = Some(format!("{path} is not known").into());
                }
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    Namespace(Namespace),
    Node(KubeNode),
    ServiceAccount(ServiceAccount),
    Pod(Box<Pod>),
    Service(Service),
    EndpointSlice(EndpointSlice),
    NetworkPolicy(Box<NetworkPolicy>),
    ClusterNetworkPolicy(Box<ClusterNetworkPolicy>),
    Calico(Box<CalicoObject>),
    FederatedNetworkPolicy(Box<FederatedNetworkPolicy>),
    Tier(Tier),
    FederatedNetworkSet(FederatedNetworkSet),
    MemberCluster(Box<MemberCluster>),
}

impl Object {
    pub(crate) fn metadata_mut(&mut self) -> &mut Metadata {
        match self {
            Self::Namespace(it) => &mut it.metadata,
            Self::Node(it) => &mut it.metadata,
            Self::ServiceAccount(it) => &mut it.metadata,
            Self::Pod(it) => &mut it.metadata,
            Self::Service(it) => &mut it.metadata,
            Self::EndpointSlice(it) => &mut it.metadata,
            Self::NetworkPolicy(it) => &mut it.metadata,
            Self::ClusterNetworkPolicy(it) => &mut it.metadata,
            Self::Calico(it) => it.metadata_mut(),
            Self::FederatedNetworkPolicy(it) => &mut it.metadata,
            Self::Tier(it) => &mut it.metadata,
            Self::FederatedNetworkSet(it) => &mut it.metadata,
            Self::MemberCluster(it) => &mut it.metadata,
        }
    }

    /// Whether its kind has a namespace; what another says of one is not looked at.
    pub(crate) fn is_namespaced(&self) -> bool {
        match self {
            Self::Namespace(_)
            | Self::Node(_)
            | Self::ClusterNetworkPolicy(_)
            | Self::FederatedNetworkPolicy(_)
            | Self::Tier(_)
            | Self::FederatedNetworkSet(_)
            | Self::MemberCluster(_) => false,
            Self::Calico(object) => object.is_namespaced(),
            Self::ServiceAccount(_)
            | Self::Pod(_)
            | Self::Service(_)
            | Self::EndpointSlice(_)
            | Self::NetworkPolicy(_) => true,
        }
    }

    pub(crate) fn is_policy(&self) -> bool {
        match self {
            Self::NetworkPolicy(_) | Self::ClusterNetworkPolicy(_) | Self::FederatedNetworkPolicy(_) => true,
            Self::Calico(object) => matches!(**object, CalicoObject::Policy(..)),
            _ => false,
        }
    }
}

/// What was read.
#[derive(Debug, Clone, Default)]
pub struct Manifests {
    pub objects: Vec<Manifest>,
    pub diagnostics: Vec<Diagnostic>,
    pub skipped: Vec<Skipped>,
    /// Objects that make pods: never part of a cluster's state, see [`crate::assemble::planned`].
    pub workloads: Vec<Workload>,
    /// What is wrong with those that are left out.
    pub refused_workloads: Vec<Diagnostic>,
    /// What API servers refuse of objects that are read all the same, see [`crate::strict`].
    pub not_storable: Vec<Diagnostic>,
    /// What is worth knowing of objects that are read.
    pub notes: Vec<Diagnostic>,
    /// Policies that are refused for nothing but fields that are not known, without those. Where no earlier version of one is
    /// in force, this closes what it may close.
    pub in_doubt: Vec<Manifest>,
    /// What paths of files are taken relative to where a name is generated from them.
    pub root: PathBuf,
    /// How many names were generated from a file and a prefix, and all of them.
    generated: (HashMap<String, u32>, HashSet<String>),
}

impl Manifests {
    /// Puts objects of namespaced kinds that name no namespace into this one, as `kubectl --namespace` does.
    pub fn set_default_namespace(&mut self, namespace: &str) {
        let set = |reference: &mut Reference, metadata: &mut Metadata| {
            if reference.namespace.is_none() {
                reference.namespace = Some(namespace.to_owned());
                metadata.namespace = Some(namespace.into());
            }
        };
        let objects = self.objects.iter_mut().chain(&mut self.in_doubt);
        for manifest in objects.filter(|manifest| manifest.object.is_namespaced()) {
            set(&mut manifest.reference, manifest.object.metadata_mut());
        }
        for workload in &mut self.workloads {
            set(&mut workload.reference, &mut workload.metadata);
        }
    }
}

/// Reads standard input, up to [`files::MAX_FILE_BYTES`], as a file named `-`.
///
/// # Errors
/// When it cannot be read, or is larger.
pub fn read_stdin() -> Result<Manifests, ReadError> {
    let mut read = Manifests::default();
    let bytes = files::read_stdin_bytes().map_err(|source| ReadError { path: "standard input".into(), source })?;
    read_bytes(&"-".into(), &bytes, &mut read);
    Ok(read)
}

/// Reads a file, or every `.yaml`, `.yml` and `.json` file below a directory, in the order of their paths. Hidden files
/// and folders are left out. What lies below and cannot be read is a diagnostic; a path that cannot be looked at itself is an
/// error, for it is not an empty directory.
pub fn read_dir(path: &Path) -> Result<Manifests, ReadError> {
    Ok(read_files(path, files::list(path)?))
}

/// Reads what [`files::list`] found below `path`.
pub fn read_files(path: &Path, listing: Listing) -> Manifests {
    let mut read = Manifests { root: path.to_owned(), ..Manifests::default() };
    for file in listing.files {
        match files::read_file(&file) {
            Ok(bytes) => read_bytes(&file.to_string_lossy().into(), &bytes, &mut read),
            Err(error) => read.diagnostics.push(Diagnostic::of_file(&file, error.to_string())),
        }
    }
    let unread = listing.unread.iter().map(|it| Diagnostic::of_file(&it.path, it.source.to_string()));
    read.diagnostics.extend(unread);
    read
}

/// Reads the documents of one file. What cannot be understood becomes a diagnostic; the rest is read all the same.
pub fn read_bytes(file: &Arc<str>, bytes: &[u8], read: &mut Manifests) {
    let location = |line| SourceLocation { file: Arc::clone(file), line };
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            let (field, message) = (String::new(), "not UTF-8".to_owned());
            let location = location(u32::try_from(line).unwrap_or(u32::MAX));
            let start = location.line;
            read.diagnostics.push(Diagnostic { location, field, message, object: None, start, not_object: None });
            return;
        }
    };
    let before = [read.diagnostics.len(), read.refused_workloads.len(), read.not_storable.len()];
    read_documents(file, text, read);
    if text.contains("{{") {
        mark_templates(text, before[0], &mut read.diagnostics);
        mark_templates(text, before[1], &mut read.refused_workloads);
        mark_templates(text, before[2], &mut read.not_storable);
    }
}

/// Marks what is refused because it is a template, one diagnostic a document: a document with an action that is not YAML, or
/// an object whose name, kind or refused field is on a line with one. An object that is wrong elsewhere stays refused,
/// whatever its annotations say. `first`: where the diagnostics of this text begin.
fn mark_templates(text: &str, first: usize, diagnostics: &mut Vec<Diagnostic>) {
    let is_cut = |line: &str| line.strip_prefix("---").is_some_and(|rest| rest.trim_start() != rest || rest.is_empty());
    // The first line of each document, and the first of its lines with an action.
    let mut documents: Vec<(u32, Option<u32>)> = vec![(1, None)];
    let mut actions = BTreeSet::new();
    for (number, line) in (1..).zip(text.lines()) {
        if is_cut(line) {
            documents.push((number, None));
        }
        if line.contains("{{") {
            actions.insert(number);
            documents.last_mut().expect("one at least").1.get_or_insert(number);
        }
    }
    let is_action = |reference: &Reference| {
        let Reference { api_version, kind, namespace, name } = reference;
        [api_version, kind, name].into_iter().chain(namespace).any(|it| it.contains("{{"))
    };
    let mut marked = BTreeSet::new();
    let rest = diagnostics.split_off(first);
    diagnostics.extend(rest.into_iter().filter_map(|mut diagnostic| {
        let document = documents.partition_point(|(start, _)| *start <= diagnostic.location.line).saturating_sub(1);
        let (start, action) = documents[document];
        let because = match &diagnostic.object {
            None => action.is_some(),
            Some(object) => actions.contains(&diagnostic.location.line) || is_action(object),
        };
        if !because {
            return Some(diagnostic);
        }
        let line = action.unwrap_or(start);
        diagnostic.location.line = line;
        diagnostic.start = line;
        diagnostic.not_object = Some(NotObject::Template);
        diagnostic.object = None;
        diagnostic.field = String::new();
        diagnostic.message =
            "a template: render it first, for example `helm template … | hanse policy check -`".to_owned();
        marked.insert(document).then_some(diagnostic)
    }));
}

fn read_documents(file: &Arc<str>, text: &str, read: &mut Manifests) {
    let location = |line| SourceLocation { file: Arc::clone(file), line };
    let refuse = |read: &mut Manifests, error: SyntaxError, object: Option<Node<'_>>| {
        let start = object.map_or(error.line, Node::line);
        let (field, message, object) = (String::new(), error.message, object.map(reference));
        read.diagnostics.push(Diagnostic {
            location: location(error.line),
            field,
            message,
            object,
            start,
            not_object: None,
        });
    };
    for document in document::documents(text) {
        let document = match document {
            Ok(document) => document,
            Err(error) => {
                refuse(read, error, None);
                continue;
            }
        };
        // What is wrong with an object that is not read otherwise is none of our business.
        let faults = document.faults.iter().map(|fault| (fault, at_line(document.root(), fault.line)));
        let mut faults =
            faults.filter(|(fault, object)| fault.kind == FaultKind::More || !kind::is_foreign(&reference(*object)));
        match faults.next() {
            Some((fault, object)) => {
                let (line, mut message) = (fault.line, fault.kind.to_string());
                if matches!(&fault.kind, FaultKind::Double(key) if ["apiVersion", "kind"].contains(&&**key)) {
                    message.push_str("; where two objects are meant, a line `---` is missing between them");
                }
                refuse(read, SyntaxError { line, message }, Some(object));
            }
            None => read_node(file, document.root(), read),
        }
    }
}

fn read_node(file: &Arc<str>, node: Node<'_>, read: &mut Manifests) {
    let location = SourceLocation { file: Arc::clone(file), line: node.line() };
    let mut locator = Locator::new(node);
    let mut refuse = |read: &mut Manifests, field: &str, message: String, object| {
        let location = SourceLocation { file: Arc::clone(file), line: locator.line_of(field) };
        let (field, not_object) = (field.to_owned(), None);
        read.diagnostics.push(Diagnostic { location, field, message, object, start: node.line(), not_object });
    };
    // A list of objects, as calicoctl reads it.
    if node.items().next().is_some() && node.items().all(|item| item.child("kind").is_some()) {
        return node.items().for_each(|item| read_node(file, item, read));
    }
    let mut reference = reference(node);
    // Chart.yaml has an apiVersion, but not of a group that is read.
    let claims = !reference.kind.is_empty() || kind::is_read_group(&reference.api_version);
    if !node.is_mapping() || !claims {
        refuse(read, "", "not an object: apiVersion, kind and metadata are missing".into(), None);
        if let Some(last) = read.diagnostics.last_mut() {
            last.not_object = Some(NotObject::WithoutKind);
        }
        return;
    }
    for (field, value) in [("apiVersion", &reference.api_version), ("kind", &reference.kind)] {
        if value.is_empty() {
            return refuse(
                read,
                field,
                "is missing: every object names its apiVersion and kind".into(),
                Some(reference.clone()),
            );
        }
    }
    match items(node) {
        Some(Ok(items)) => return items.for_each(|item| read_node(file, item, read)),
        Some(Err(error)) => return refuse(read, &error.path, error.message, Some(reference)),
        None => {}
    }
    if workload::is_workload(&reference) {
        let generated = generated_name(node, &reference, &location, read);
        let located = |errors| located(file, node, &reference, errors);
        match workload::read(location, &reference, node, generated) {
            Ok(mut workload) => {
                read.not_storable.extend(located(std::mem::take(&mut workload.not_storable)));
                read.notes.extend(located(workload.unread_policy.take().into_iter().collect()));
                read.workloads.push(workload);
            }
            Err(errors) => read.refused_workloads.extend(located(errors)),
        }
        return;
    }
    let generated = generated_name(node, &reference, &location, read);
    let fields = node.field_count();
    match read_object(&reference, node, generated.as_deref()) {
        Ok(Some(object)) => match generated {
            Some(_) if reference.api_version == hanse::API_VERSION => {
                let message = "cannot generate a name: objects of the federation are applied by their name".to_owned();
                refuse(read, "metadata.generateName", message, Some(reference));
            }
            None if reference.name.is_empty() => {
                refuse(read, "metadata.name", "is missing".into(), Some(reference));
            }
            generated => {
                reference.name = generated.unwrap_or(reference.name);
                read.not_storable.extend(located(file, node, &reference, strict::errors(&object)));
                read.objects.push(Manifest { location, reference, object, unknown: Vec::new(), fields });
            }
        },
        Ok(None) => match kind::mistaken(&reference) {
            Some(error) => refuse(read, &error.path, error.message, Some(reference)),
            None => read.skipped.push(Skipped { location, object: reference }),
        },
        Err(refused) => {
            let Refused { errors, in_doubt } = *refused;
            for error in errors {
                refuse(read, &error.path, error.message, Some(reference.clone()));
            }
            if let Some((object, unknown)) = in_doubt.filter(|_| generated.is_some() || !reference.name.is_empty()) {
                reference.name = generated.unwrap_or(reference.name);
                read.in_doubt.push(Manifest { location, reference, object, unknown, fields });
            }
        }
    }
}

/// What is said of fields of an object.
fn located(file: &Arc<str>, node: Node<'_>, reference: &Reference, errors: Vec<FieldError>) -> Vec<Diagnostic> {
    if errors.is_empty() {
        return Vec::new();
    }
    let mut locator = Locator::new(node);
    let diagnostic = |FieldError { path: field, message }: FieldError| {
        let location = SourceLocation { file: Arc::clone(file), line: locator.line_of(&field) };
        Diagnostic { location, field, message, object: Some(reference.clone()), start: node.line(), not_object: None }
    };
    errors.into_iter().map(diagnostic).collect()
}

/// What an API server would append to a `generateName`: five of these.
const GENERATED: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// A name for an object that has none but leaves it to the API server. It is made of the file below the root and of how many
/// such objects come before it there: it differs for each object, and is the same for each reading, also of another
/// checkout and after changes to the object.
fn generated_name(
    node: Node<'_>,
    reference: &Reference,
    location: &SourceLocation,
    read: &mut Manifests,
) -> Option<String> {
    let prefix = node.child("metadata")?.child("generateName")?.text()?;
    if !reference.name.is_empty() || prefix.is_empty() {
        return None;
    }
    let file = Path::new(&*location.file);
    let file = file.strip_prefix(&read.root).unwrap_or(file).to_string_lossy();
    let Reference { kind, namespace, .. } = reference;
    let owner = format!("{kind}/{}/{prefix}", namespace.as_deref().unwrap_or_default());
    let (counts, names) = &mut read.generated;
    let count = counts.entry(format!("{file}/{owner}")).or_default();
    loop {
        // FNV-1a.
        let bytes = file.bytes().chain(owner.bytes()).chain(count.to_le_bytes());
        let mut hash =
            bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        *count += 1;
        let mut name = prefix.to_owned();
        for _ in 0..5 {
            name.push(char::from(GENERATED[(hash % GENERATED.len() as u64) as usize]));
            hash /= GENERATED.len() as u64;
        }
        if names.insert(format!("{owner}{name}")) {
            return Some(name);
        }
    }
}

/// The objects of a list; `None` where the object is no list.
///
/// # Errors
/// When it is called a list of a kind that is read, and is none.
pub fn items(node: Node<'_>) -> Option<Result<impl Iterator<Item = Node<'_>>, FieldError>> {
    let kind = reference(node).kind;
    let item_kind = kind.strip_suffix("List")?;
    match node.child("items") {
        Some(items) if items.is_sequence() && (item_kind.is_empty() || items.items().all(Node::is_mapping)) => {
            Some(Ok(items.items()))
        }
        Some(items) if items.is_null() => Some(Ok(items.items())),
        // Other kinds end in List too: theirs are lists of something else.
        _ => (item_kind.is_empty() || kind::is_read(item_kind)).then(|| {
            let message = "is not a list of objects".to_owned();
            Err(FieldError { path: "items".to_owned(), message })
        }),
    }
}

/// What an object calls itself.
fn reference(node: Node<'_>) -> Reference {
    let text_at = |path: &[&str]| {
        let found = path.iter().try_fold(node, |node, name| node.child(name));
        found.and_then(Node::text).unwrap_or_default().to_owned()
    };
    Reference {
        api_version: text_at(&["apiVersion"]),
        kind: text_at(&["kind"]),
        namespace: Some(text_at(&["metadata", "namespace"])).filter(|namespace| !namespace.is_empty()),
        name: text_at(&["metadata", "name"]),
    }
}

/// The object of a document that has a line: of a list, the item.
fn at_line(node: Node<'_>, line: u32) -> Node<'_> {
    let items = items(node).and_then(Result::ok);
    match items.and_then(|items| items.take_while(|item| item.line() <= line).last()) {
        Some(item) => at_line(item, line),
        None => node,
    }
}

/// How many unknown fields of one object are reported.
const MAX_UNKNOWN_REPORTED: usize = 20;
/// How many a policy that is in doubt keeps; where there are more, all of its rules are in doubt.
const MAX_UNKNOWN_FIELDS: usize = 200;

/// Why an object is refused; and a policy without its unknown fields with their paths, where nothing else is wrong.
struct Refused {
    errors: Vec<FieldError>,
    in_doubt: Option<(Object, Vec<String>)>,
}

/// `None`: a kind that Hanse does not read. A field that is not known does not hide what else is wrong. `generated`: the name
/// of an object that has none itself.
fn read_object(reference: &Reference, node: Node<'_>, generated: Option<&str>) -> Result<Option<Object>, Box<Refused>> {
    let notes = Notes::default();
    let strict = kind::is_strict(reference);
    // Some conversions look for unknown fields themselves. They see all of them at once: the second time they find none.
    let mut not_known: Vec<FieldError> = Vec::new();
    loop {
        let read = read_known(reference, if strict { node.with_notes(&notes) } else { node }, generated);
        let unknown = notes.take_unknown(node).into_iter().filter(|field| !field.path.starts_with("metadata."));
        let unknown: Vec<FieldError> = unknown.map(|field| field.into()).collect();
        let (in_doubt, others) = match read {
            Ok(object) if unknown.is_empty() && not_known.is_empty() => return Ok(object),
            Ok(object) => (object.filter(Object::is_policy), Vec::new()),
            Err(errors) if not_known.is_empty() && errors.iter().all(FieldError::is_of_unknown_field) => {
                let mut locator = Locator::new(node);
                let places: Option<Vec<u32>> = errors.iter().map(|error| locator.place_of(&error.path)).collect();
                match places {
                    Some(places) => {
                        places.into_iter().for_each(|place| notes.leave_out(place));
                        not_known = errors;
                        continue;
                    }
                    None => (None, errors),
                }
            }
            Err(errors) => (None, errors),
        };
        let mut errors: Vec<FieldError> = unknown.into_iter().chain(not_known).collect();
        let in_doubt = in_doubt.map(|object| {
            let mut paths: Vec<String> = errors.iter().take(MAX_UNKNOWN_FIELDS).map(|it| it.path.clone()).collect();
            if errors.len() > MAX_UNKNOWN_FIELDS {
                paths.push(format!("one of {} fields", errors.len()));
            }
            (object, paths)
        });
        errors.truncate(MAX_UNKNOWN_REPORTED);
        errors.extend(others);
        return Err(Box::new(Refused { errors, in_doubt }));
    }
}

fn read_known(
    reference: &Reference,
    node: Node<'_>,
    generated: Option<&str>,
) -> Result<Option<Object>, Vec<FieldError>> {
    let mut object = match (reference.api_version.as_str(), reference.kind.as_str()) {
        ("v1", "Namespace") => Object::Namespace(typed(node)?),
        ("v1", "Node") => Object::Node(typed(node)?),
        ("v1", "ServiceAccount") => Object::ServiceAccount(typed(node)?),
        ("v1", "Pod") => Object::Pod(typed(node)?),
        ("v1", "Service") => Object::Service(typed(node)?),
        ("discovery.k8s.io/v1", "EndpointSlice") => Object::EndpointSlice(typed(node)?),
        ("networking.k8s.io/v1", "NetworkPolicy") => Object::NetworkPolicy(typed(node)?),
        ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy") => Object::ClusterNetworkPolicy(typed(node)?),
        (hanse::API_VERSION, "FederatedNetworkPolicy") => Object::FederatedNetworkPolicy(typed(node)?),
        (hanse::API_VERSION, "Tier") => Object::Tier(typed(node)?),
        (hanse::API_VERSION, "FederatedNetworkSet") => Object::FederatedNetworkSet(typed(node)?),
        (hanse::API_VERSION, "MemberCluster") => Object::MemberCluster(typed(node)?),
        (calico::API_VERSION | calico::CRD_API_VERSION, kind) => match calico::read(reference, kind, node)? {
            Some(object) => Object::Calico(Box::new(object)),
            None => return Ok(None),
        },
        _ => return Ok(None),
    };
    if let Some(name) = generated {
        object.metadata_mut().name = name.to_owned();
    }
    let errors = crate::assemble::validate(&object);
    if errors.is_empty() { Ok(Some(object)) } else { Err(errors) }
}
