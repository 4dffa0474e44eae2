//! Files of manifests into typed, validated objects.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smol_str::SmolStr;

use crate::diagnostic::{Diagnostic, NotObject, Reference, SourceLocation};
use crate::document::{self, FaultKind, Locator, Node, Notes, SyntaxError};
use crate::field::FieldError;
use crate::files::{self, Listing, ReadError};
use crate::hanse;
use crate::kind;
use crate::object::{self, Converted, Object};
use crate::stored;
use crate::unreadable;
use crate::workload::{self, Workload};

/// A document of a kind that Hanse does not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    pub location: SourceLocation,
    pub object: Reference,
}

/// An object of a kind that is read, converted.
#[derive(Debug, Clone)]
pub struct Manifest {
    pub location: SourceLocation,
    pub reference: Arc<Reference>,
    pub object: Object,
    /// How many fields its root, metadata and spec have: fewer than the whole object where it is a patch of it.
    pub fields: usize,
}

/// What was read.
#[derive(Debug, Clone, Default)]
pub struct Manifests {
    pub objects: Vec<Manifest>,
    pub diagnostics: Vec<Diagnostic>,
    pub skipped: Vec<Skipped>,
    /// Objects that make pods: never part of a cluster's state, see [`crate::assemble::planned`].
    pub workloads: Vec<Workload>,
    /// Errors of workloads that are left out.
    pub refused_workloads: Vec<Diagnostic>,
    /// What API servers refuse in objects that are read nevertheless, see [`crate::strict`].
    pub not_storable: Vec<Diagnostic>,
    /// Notes about objects that are read.
    pub notes: Vec<Diagnostic>,
    /// Policies that are refused, with what cannot be read unknown. Where no earlier version of one is in force, this closes what it
    /// may close.
    pub partial: Vec<Manifest>,
    /// What paths of files are taken relative to where a name is generated from them.
    pub root: PathBuf,
    default_namespace: Option<Arc<str>>,
    /// An API server has accepted the objects.
    is_accepted: bool,
    /// The text of the last such object without the fields that are not read.
    used_fields: Option<String>,
    /// How many names were generated from a file and a prefix, and all of them.
    generated: (HashMap<String, u32>, HashSet<String>),
}

impl Manifests {
    /// Nothing yet. Objects of namespaced kinds that name no namespace are put into this one, as `kubectl --namespace` does.
    pub fn in_namespace(namespace: Option<&str>) -> Self {
        Self { default_namespace: namespace.map(Arc::from), ..Self::default() }
    }

    /// Nothing yet, of objects that an API server has accepted: the syntax of their names, labels and annotations refuses none of them.
    pub fn of_api_server() -> Self {
        Self { is_accepted: true, ..Self::default() }
    }

    /// Of the object of an API server that was read last: its JSON without the fields that are not read, from which it can be read again.
    /// `None` if there is none, it is of a kind that is not read, or it is not a policy and cannot be read.
    pub fn take_used_fields(&mut self) -> Option<String> {
        self.used_fields.take()
    }

    /// The reference of an object that is accepted, with its name and its namespace.
    fn completed(&self, reference: Reference, generated: Option<String>, is_namespaced: bool) -> Reference {
        let default = self.default_namespace.as_deref().filter(|_| is_namespaced).map(SmolStr::new);
        let (name, namespace) = (generated.map_or(reference.name, SmolStr::from), reference.namespace.or(default));
        Reference { name, namespace, ..reference }
    }
}

/// Reads standard input, up to [`files::MAX_FILE_BYTES`], as a file named `-`.
///
/// # Errors
/// When it cannot be read, or is larger.
pub fn read_stdin(namespace: Option<&str>) -> Result<Manifests, ReadError> {
    let mut read = Manifests::in_namespace(namespace);
    let bytes = files::read_stdin_bytes().map_err(|source| ReadError { path: "standard input".into(), source })?;
    read_bytes(&"-".into(), &bytes, &mut read);
    Ok(read)
}

/// Reads a file, or every `.yaml`, `.yml` and `.json` file below a directory, in the order of their paths. Hidden files
/// and folders are left out. What lies below and cannot be read is a diagnostic; a path that cannot be looked at itself is an
/// error, for it is not an empty directory.
pub fn read_dir(path: &Path) -> Result<Manifests, ReadError> {
    Ok(read_files(path, files::list(path)?, None))
}

/// Reads what [`files::list`] found below `path`. `namespace`: see [`Manifests::in_namespace`].
pub fn read_files(path: &Path, listing: Listing, namespace: Option<&str>) -> Manifests {
    let mut read = Manifests { root: path.to_owned(), ..Manifests::in_namespace(namespace) };
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
        // Errors in an object of a foreign kind do not matter.
        let faults = document.faults.iter().map(|fault| (fault, at_line(document.root(), fault.line)));
        let mut faults =
            faults.filter(|(fault, object)| fault.kind == FaultKind::More || !kind::is_foreign(&reference(*object)));
        match faults.next() {
            Some((fault, object)) => {
                let (line, mut message) = (fault.line, fault.kind.to_string());
                if matches!(&fault.kind, FaultKind::DuplicateKey(key) if ["apiVersion", "kind"].contains(&&**key)) {
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
                "is missing: every object has an apiVersion and a kind".into(),
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
                if let Some(namespace) =
                    read.default_namespace.clone().filter(|_| workload.reference.namespace.is_none())
                {
                    workload.reference.namespace = Some(SmolStr::new(&*namespace));
                    workload.metadata.namespace = Some(namespace);
                }
                read.workloads.push(workload);
            }
            Err(errors) => read.refused_workloads.extend(located(errors)),
        }
        return;
    }
    let generated = generated_name(node, &reference, &location, read);
    let fields = node.field_count();
    let namespace = read.default_namespace.clone();
    let defaults =
        object::Defaults { name: generated.as_deref(), namespace: namespace.as_ref(), is_accepted: read.is_accepted };
    let mut used_fields = None;
    let result = read_object(&reference, node, defaults, &mut used_fields);
    read.used_fields = used_fields;
    match result {
        Ok(Some(Converted { object, not_storable })) => match generated {
            Some(_) if reference.api_version == hanse::API_VERSION => {
                let message = "cannot generate a name: objects of the federation are applied by their name".to_owned();
                refuse(read, "metadata.generateName", message, Some(reference));
            }
            None if reference.name.is_empty() => {
                refuse(read, "metadata.name", "is missing".into(), Some(reference));
            }
            generated => {
                reference.name = generated.map_or(reference.name, SmolStr::from);
                read.not_storable.extend(located(file, node, &reference, not_storable));
                let reference = Arc::new(read.completed(reference, None, object.is_namespaced()));
                read.objects.push(Manifest { location, reference, object, fields });
            }
        },
        Ok(None) => match kind::mistaken(&reference) {
            Some(error) => refuse(read, &error.path, error.message, Some(reference)),
            None => read.skipped.push(Skipped { location, object: reference }),
        },
        Err(refused) => {
            let Refused { errors, partial } = *refused;
            for error in errors {
                refuse(read, &error.path, error.message, Some(reference.clone()));
            }
            if let Some(object) = partial.filter(|_| generated.is_some() || !reference.name.is_empty()) {
                let reference = Arc::new(read.completed(reference, generated, object.is_namespaced()));
                read.partial.push(Manifest { location, reference, object, fields });
            }
        }
    }
}

/// Diagnostics of the fields of an object.
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

/// The objects of a list; `None` where the object is not a list.
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
        SmolStr::new(found.and_then(Node::text).unwrap_or_default())
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

/// How many unknown fields of one object are reported, and how many other errors.
const MAX_REPORTED: usize = 20;
/// Of the message of an error, which repeats a value that may be as large as its object.
const MAX_MESSAGE_BYTES: usize = 500;
/// How many unknown fields of a policy are recorded; where there are more, all of its rules are unknown.
const MAX_UNKNOWN_FIELDS: usize = 200;
/// How many fields that cannot be decoded are left out of a policy, to find out what else it says. Each costs a reading.
const MAX_LEFT_OUT: usize = 8;

/// Why an object is refused; and a policy with what cannot be read unknown, see [`crate::unreadable`].
struct Refused {
    errors: Vec<FieldError>,
    partial: Option<Object>,
}

/// `None`: a kind that Hanse does not read. An unknown field does not hide other errors.
fn read_object(
    reference: &Reference,
    node: Node<'_>,
    defaults: object::Defaults<'_>,
    used_fields: &mut Option<String>,
) -> Result<Option<Converted>, Box<Refused>> {
    let notes = Notes::default();
    let strict = kind::is_strict(reference);
    // Some conversions look for unknown fields themselves. They see all of them at once: the second time they find none.
    let mut not_known: Vec<FieldError> = Vec::new();
    // Fields that cannot be decoded.
    let mut left_out: Vec<FieldError> = Vec::new();
    loop {
        let is_noted = strict || defaults.is_accepted;
        let read = object::read(reference, if is_noted { node.with_notes(&notes) } else { node }, defaults);
        if defaults.is_accepted && matches!(&read, Ok(Some(_)) | Err(_)) && (read.is_ok() || strict) {
            *used_fields = Some(stored::used_text(reference, node, &notes));
        }
        let unknown = if strict { notes.take_unknown(node) } else { Vec::new() };
        let unknown = unknown.into_iter().filter(|field| !field.path.starts_with("metadata."));
        let unknown: Vec<FieldError> = unknown.map(|field| field.into()).collect();
        let (object, others) = match read {
            Ok(object) if unknown.is_empty() && not_known.is_empty() && left_out.is_empty() => return Ok(object),
            Ok(read) => (read.map(|read| read.object), Vec::new()),
            Err(refused) => {
                let object::Refused { errors, object } = refused;
                let are_unknown = not_known.is_empty() && errors.iter().all(FieldError::is_of_unknown_field);
                let is_left_out =
                    object.is_none() && left_out.len() < MAX_LEFT_OUT && kind::enforced_policy(reference).is_some();
                let mut locator = Locator::new(node);
                let places = (are_unknown || is_left_out)
                    .then(|| errors.iter().map(|error| locator.place_of(&error.path)).collect::<Option<Vec<u32>>>());
                // What was left out before and is found again cannot be left out.
                let is_new = errors.iter().all(|error| left_out.iter().all(|it| it.path != error.path));
                match places.flatten().filter(|_| is_new) {
                    Some(places) => {
                        places.into_iter().for_each(|place| notes.leave_out(place));
                        if are_unknown {
                            not_known = errors
                        } else {
                            left_out.extend(errors)
                        }
                        continue;
                    }
                    None => (object, errors),
                }
            }
        };
        // What follows from a field that was left out is not an error of its own.
        let is_or_contains = |path: &str, left_out: &str| {
            left_out.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        let follows = |error: &FieldError| left_out.iter().any(|it| is_or_contains(&error.path, &it.path));
        let others = others.into_iter().filter(|error| !follows(error));
        let others: Vec<FieldError> = others.collect();
        let others: Vec<FieldError> = left_out.into_iter().chain(others).collect();
        let mut errors: Vec<FieldError> = unknown.into_iter().chain(not_known).collect();
        let partial = match object.filter(Object::is_policy) {
            Some(mut object) => {
                let mut paths: Vec<String> = errors.iter().take(MAX_UNKNOWN_FIELDS).map(|it| it.path.clone()).collect();
                if errors.len() > MAX_UNKNOWN_FIELDS {
                    paths.push(format!("one of {} fields", errors.len()));
                }
                object.mark_unknown(&paths);
                let of_subject = errors.iter().find(|error| unreadable::is_of_subject(&error.path));
                let restricting: Vec<FieldError> = others.iter().chain(of_subject).cloned().collect();
                object.restrict(&restricting);
                Some(object)
            }
            None => {
                let first = others.iter().chain(&errors).next();
                first.and_then(|error| Object::unread_policy(reference, node, defaults, error))
            }
        };
        let hidden = errors.len().saturating_sub(MAX_REPORTED) + others.len().saturating_sub(MAX_REPORTED);
        errors.truncate(MAX_REPORTED);
        errors.extend(others.into_iter().take(MAX_REPORTED));
        errors.iter_mut().for_each(|error| shorten(&mut error.message));
        if hidden > 0 {
            errors.push(FieldError { path: String::new(), message: format!("and {hidden} more errors") });
        }
        return Err(Box::new(Refused { errors, partial }));
    }
}

fn shorten(message: &mut String) {
    if message.len() > MAX_MESSAGE_BYTES {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        message.push('…');
    }
}
