//! `hanse apply`, `get` and `delete`: objects of the federation.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use hanse_api::assemble::duplicates;
use hanse_api::diagnostic::{Diagnostic, Reference, SourceLocation};
use hanse_api::document::{self, Node};
use hanse_api::files::{MAX_FILE_BYTES, list, read_file};
use hanse_api::manifest::{Manifest, Manifests, items, read_bytes};
use hanse_proto::federation::v1 as pb;
use serde::Serialize;
use serde_json::Value;

use super::kind::{KINDS, kind_of, name_of, split};
use super::management::{self, Applied, Management};
use super::manifest::{REVISION, put_revision, summary, take_revision};
use super::{CallError, call, with_client};
use crate::completion;
use crate::output::{self, Format, ListFormat, UsageError};

/// Create or update objects at the hub.
///
/// The command validates all manifests first, and sends nothing if one is invalid. The hub applies each object separately: if it
/// refuses one, the others are applied and the exit code is 1. Applying the same manifest again changes nothing. A manifest from
/// `hanse get -o yaml` is applied only if the object has not changed since.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse apply -f policies/
  hanse apply -f policies/ --dry-run
  hanse policy scaffold deny-metadata | hanse apply -f -
  hanse get fnp web -o yaml > web.yaml; $EDITOR web.yaml; hanse apply -f web.yaml")]
pub struct Apply {
    /// File or directory of manifests, or `-` for standard input; repeatable.
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Check everything at the hub (roles, grants, preconditions), and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Accept policies whose tier does not exist. They take effect when the tier is created.
    #[arg(long)]
    allow_missing_tier: bool,
    #[command(flatten)]
    management: Management,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Show objects of the hub.
///
/// YAML and JSON contain the manifests, which can be edited and applied. With `--watch`, each change is printed as it occurs; in
/// YAML and JSON as `{type: ADDED|MODIFIED|DELETED, object: …}`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse get
  hanse get fnp
  hanse get tier platform -o yaml
  hanse get fnp -o wide
  hanse get fnp --watch
  hanse get -f policies/ -o json")]
pub struct Get {
    /// FederatedNetworkPolicy (fnp), StagedFederatedNetworkPolicy (sfnp), Tier, FederatedNetworkSet (fns) or MemberCluster (mc), or
    /// KIND/NAME. Default: all kinds.
    #[arg(conflicts_with = "files", add = completion::kinds())]
    kind: Option<String>,
    /// Name of one object. Default: all objects of the kind.
    #[arg(add = completion::names())]
    name: Option<String>,
    /// File or directory of manifests that name the objects, or `-` for standard input; repeatable.
    #[arg(short, long = "filename", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Print the objects, then each change, until interrupted.
    #[arg(short, long, conflicts_with_all = ["files", "kubeconfig"])]
    watch: bool,
    #[command(flatten)]
    management: Management,
    #[arg(short, long, value_enum, default_value_t)]
    output: ListFormat,
}

/// Delete objects from the hub. Policies are deleted before the tiers and sets that they refer to.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse delete fnp web
  hanse delete -f policies/ --ignore-not-found")]
pub struct Delete {
    /// Kind of the object, followed by its name, or KIND/NAME.
    #[arg(required_unless_present = "files", add = completion::kinds())]
    kind: Option<String>,
    #[arg(add = completion::names())]
    name: Option<String>,
    /// File or directory of manifests that name the objects, or `-` for standard input; repeatable.
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with = "kind")]
    files: Vec<PathBuf>,
    /// Treat absent objects as deleted.
    #[arg(long)]
    ignore_not_found: bool,
    #[command(flatten)]
    management: Management,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Up to this number, objects are read one by one; otherwise all objects are read at once.
const MANY: usize = 16;

/// One object of the federation, from a manifest.
pub(super) struct Written {
    order: usize,
    pub kind: pb::ObjectKind,
    pub name: String,
    json: Vec<u8>,
    /// The revision that it was read at.
    revision: Option<u64>,
    place: String,
}

/// Reads all manifests: all or nothing. Errors of manifests are lines of standard output for programs, by object, else notes.
pub(super) fn read(files: &[PathBuf], format: Format) -> anyhow::Result<Vec<Written>> {
    let mut written = Vec::new();
    let mut checked = Manifests::default();
    for path in files {
        let paths = match path.as_os_str() == "-" {
            true => vec![path.clone()],
            false => {
                let listing = list(path)?;
                if let Some(unread) = listing.unread.into_iter().next() {
                    return Err(unread.into());
                }
                listing.files
            }
        };
        for path in paths {
            let (name, bytes) = match path.as_os_str() == "-" {
                true => ("standard input".into(), standard_input()?),
                false => {
                    (path.to_string_lossy(), read_file(&path).with_context(|| format!("read {}", path.display()))?)
                }
            };
            let name: Arc<str> = name.into();
            read_bytes(&name, &bytes, &mut checked);
            let text = std::str::from_utf8(&bytes).unwrap_or_default();
            for document in document::documents(text).flatten() {
                collect(&name, document.root(), &mut written);
            }
        }
    }
    let skipped = checked.skipped.iter().map(|skipped| (&skipped.location, &skipped.object));
    let workloads = checked.workloads.iter().map(|workload| (&workload.location, &workload.reference));
    for (place, object) in skipped.chain(workloads) {
        output::note(format_args!(
            "{}:{}: {} {} skipped: not a kind of the federation",
            place.file, place.line, object.kind, object.name
        ));
    }
    // Kinds of a cluster are read by its member, not by the hub: they are skipped with a note.
    let (ours, others): (Vec<Manifest>, Vec<Manifest>) =
        checked.objects.into_iter().partition(|it| it.reference.api_version == hanse_api::hanse::API_VERSION);
    // Without an operator, nothing reads them.
    let (ours, of_operator): (Vec<Manifest>, Vec<Manifest>) =
        ours.into_iter().partition(|it| KINDS.iter().any(|(kind, ..)| *kind == it.reference.kind));
    for Manifest { location: SourceLocation { file, line }, reference, .. } in of_operator {
        let Reference { kind, name, .. } = &*reference;
        output::note(format_args!(
            "{file}:{line}: {kind} {name} skipped: it is for the operator; apply it with kubectl to the management cluster"
        ));
    }
    for manifest in others {
        let (SourceLocation { file, line }, Reference { kind, name, .. }) = (manifest.location, &*manifest.reference);
        output::note(format_args!(
            "{file}:{line}: {kind} {name} skipped: it belongs to a cluster, not to the federation"
        ));
    }
    checked.diagnostics.append(&mut checked.refused_workloads);
    // The last one would win at the hub; everywhere else the first one wins.
    checked.diagnostics.extend(duplicates(&ours));
    if !checked.diagnostics.is_empty() {
        if format != Format::Table {
            print_refused(format, &checked.diagnostics)?;
        }
        for it in checked.diagnostics.iter().filter(|_| format == Format::Table) {
            let field = if it.field.is_empty() { String::new() } else { format!("{}: ", it.field) };
            output::note(format_args!("{}:{}: {field}{}", it.location.file, it.location.line, it.message));
        }
        bail!("{}; nothing was applied", output::count(checked.diagnostics.len(), "error"));
    }
    anyhow::ensure!(
        written.len() == ours.len(),
        "{} of {} objects cannot be sent",
        ours.len() - written.len(),
        ours.len()
    );
    if let Some(large) = written.iter().find(|object| object.json.len() > MAX_MANIFEST_BYTES) {
        bail!("{}: the manifest is larger than 256 KiB; nothing was applied", large.place);
    }
    written.sort_by_key(|object| object.order);
    Ok(written)
}

/// Prints a line for each object that has errors.
fn print_refused(format: Format, diagnostics: &[Diagnostic]) -> anyhow::Result<()> {
    let mut refused: BTreeMap<(Arc<str>, u32, Option<Reference>), Refused> = BTreeMap::new();
    for it in diagnostics {
        let reference = it.object.clone();
        let object = refused.entry((it.location.file.clone(), it.start, reference)).or_insert_with(|| Refused {
            kind: it.object.as_ref().map(|it| it.kind.to_string()).unwrap_or_default(),
            name: it.object.as_ref().map(|it| it.name.to_string()).unwrap_or_default(),
            result: "failed",
            file: it.location.file.to_string(),
            line: it.start,
            errors: Vec::new(),
        });
        let (field, message) = (it.field.clone(), it.message.clone());
        object.errors.push(RefusedField { field, message, line: it.location.line });
    }
    refused.values().try_for_each(|object| output::print(format, object))
}

/// An object of a manifest that is not sent.
#[derive(Debug, Serialize)]
struct Refused {
    kind: String,
    name: String,
    result: &'static str,
    file: String,
    /// The first line of the object.
    line: u32,
    errors: Vec<RefusedField>,
}

#[derive(Debug, Serialize)]
struct RefusedField {
    field: String,
    message: String,
    line: u32,
}

fn standard_input() -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).context("read standard input")?;
    anyhow::ensure!(bytes.len() as u64 <= MAX_FILE_BYTES, "standard input is larger than {MAX_FILE_BYTES} bytes");
    Ok(bytes)
}

/// The objects of the federation in a document, which may be a list of them.
fn collect(file: &str, node: Node<'_>, written: &mut Vec<Written>) {
    match items(node) {
        Some(items) => items.into_iter().flatten().for_each(|item| collect(file, item, written)),
        None => written.extend(written_object(file, node)),
    }
}

fn written_object(file: &str, node: Node<'_>) -> Option<Written> {
    let kind = node.child("kind")?.text()?;
    let order = KINDS.iter().position(|(name, ..)| *name == kind)?;
    let group = node.child("apiVersion")?.text()?;
    (group == hanse_api::hanse::API_VERSION).then_some(())?;
    let name = node.child("metadata")?.child("name")?.text()?.to_owned();
    let mut value = node.to_value();
    let revision = take_revision(&mut value);
    let json = serde_json::to_vec(&value).ok()?;
    Some(Written { order, kind: KINDS[order].2, name, json, revision, place: format!("{file}:{}", node.line()) })
}

/// The result of one object.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    kind: &'static str,
    name: String,
    /// `created`, `configured`, `unchanged`, `pending`, `deleted`, `absent` or `failed`.
    result: &'static str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    #[serde(skip)]
    place: String,
}

impl Outcome {
    /// Prints the result at once, so that it is visible when a later object fails.
    fn report(&self, format: Format) -> anyhow::Result<()> {
        if format != Format::Table {
            return output::print(format, self);
        }
        let place = if self.place.is_empty() { String::new() } else { format!("{}: ", self.place) };
        let Self { kind, name, result, .. } = self;
        if let Some(error) = &self.error {
            output::note(format_args!("{place}{kind}/{name} {result}: {error}"));
            return Ok(());
        }
        let at = self.revision.map(|revision| format!(" at revision {revision}")).unwrap_or_default();
        let dry = if self.dry_run { " (dry run)" } else { "" };
        output::line(format_args!("{kind}/{name} {result}{}{dry}", if self.dry_run { "" } else { &at }))?;
        for warning in &self.warnings {
            output::note(format_args!("{place}warning: {warning}"));
        }
        Ok(())
    }
}

/// Reports failures, and returns whether there are any.
fn conclude(format: Format, outcomes: &[Outcome]) -> bool {
    let failed = outcomes.iter().filter(|outcome| outcome.error.is_some()).count();
    let error = match (failed, outcomes) {
        (0, _) => return false,
        (_, [only]) => anyhow::anyhow!("{}/{} failed", only.kind, only.name),
        (failed, all) => {
            anyhow::anyhow!("{failed} of {} failed; the others are done", output::count(all.len(), "object"))
        }
    };
    // In a table the line of the object is enough where there is one.
    if format != Format::Table || outcomes.len() > 1 {
        output::error(&error, 1);
    }
    failed > 0
}

/// A batch ends with the object that reaches this size. The hub accepts requests of 1 MiB, and a manifest has at most 256 KiB.
const BATCH_BYTES: usize = 512 << 10;
const BATCH_OBJECTS: usize = 500;
/// The largest manifest that the hub accepts, as JSON.
const MAX_MANIFEST_BYTES: usize = 256 << 10;

/// Requests in batches, by the bytes of each.
fn batches<T>(requests: impl IntoIterator<Item = T>, bytes: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let (mut batches, mut size) = (vec![Vec::new()], 0);
    for request in requests {
        if size >= BATCH_BYTES || batches.last().is_some_and(|batch| batch.len() >= BATCH_OBJECTS) {
            batches.push(Vec::new());
            size = 0;
        }
        size += bytes(&request);
        batches.last_mut().expect("never empty").push(request);
    }
    batches
}

/// An object whose result is expected from the hub.
struct Awaited {
    kind: &'static str,
    name: String,
    place: String,
    /// The revision that it was read at.
    revision: Option<u64>,
}

impl From<&Written> for Awaited {
    fn from(object: &Written) -> Self {
        let (name, place) = (object.name.clone(), object.place.clone());
        Self { kind: name_of(object.kind.into()), name, place, revision: object.revision }
    }
}

impl Awaited {
    fn done(self, result: &'static str, revision: Option<u64>, dry_run: bool) -> Outcome {
        let Self { kind, name, place, .. } = self;
        Outcome { kind, name, result, dry_run, revision, error: None, warnings: Vec::new(), place }
    }

    fn failed(self, error: &anyhow::Error) -> Outcome {
        let Self { kind, name, place, .. } = self;
        let error = Some(format!("{error:#}"));
        Outcome { kind, name, result: "failed", dry_run: false, revision: None, error, warnings: Vec::new(), place }
    }

    fn refused(self, pb::ObjectRefusal { code, message }: pb::ObjectRefusal) -> Outcome {
        let code = tonic::Code::from(i32::try_from(code).unwrap_or_default());
        let error = anyhow::Error::from(CallError::Refused { code, message });
        let error = match self.revision {
            Some(_) if CallError::is_conflict(&error) => {
                let advice = "read the object again with `hanse get`, or remove the annotation";
                error.context(format!("the manifest has the annotation {REVISION}: {advice}"))
            }
            _ => error,
        };
        self.failed(&error)
    }
}

/// Prints the result of each object as it arrives, and a summary at the end.
async fn follow<A>(
    format: Format,
    verb: &str,
    awaited: Vec<Awaited>,
    mut answers: tonic::Streaming<A>,
    outcomes_of: impl Fn(A, &mut dyn Iterator<Item = Awaited>) -> Vec<Outcome>,
) -> anyhow::Result<ExitCode> {
    let total = awaited.len();
    let mut awaited = awaited.into_iter();
    let mut outcomes = Vec::with_capacity(total);
    let mut next = async |done: usize| {
        let answer = call(async { answers.message().await.map(tonic::Response::new) }).await;
        // A refused object does not stop the others; a broken connection does.
        let context = || format!("{verb}: {done} of {} done, as listed", output::count(total, "object"));
        answer.with_context(context)
    };
    // A reader that closes the pipe (`| head`) does not change what is sent to the hub.
    let mut printed = Ok(());
    while let Some(answer) = next(outcomes.len()).await? {
        for outcome in outcomes_of(answer, &mut awaited) {
            if printed.is_ok() || outcome.error.is_some() {
                printed = printed.and(outcome.report(format));
            }
            outcomes.push(outcome);
        }
    }
    anyhow::ensure!(outcomes.len() == total, "{verb}: the hub answered for {} of {total} objects", outcomes.len());
    if format == Format::Table && total > 1 && printed.is_ok() {
        printed = output::line(summary_of(verb, &outcomes));
    }
    output::exit(printed, conclude(format, &outcomes))
}

/// `3000 applied: 2990 created, 8 configured, 2 unchanged`.
fn summary_of(verb: &str, outcomes: &[Outcome]) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for result in ["created", "configured", "unchanged", "pending", "deleted", "absent", "failed"] {
        let count = outcomes.iter().filter(|outcome| outcome.result == result).count();
        if count > 0 {
            counts.push((result, count));
        }
    }
    let done: usize = counts.iter().filter(|(result, _)| *result != "failed").map(|(_, count)| count).sum();
    let dry = if outcomes.iter().any(|outcome| outcome.dry_run) { " (dry run)" } else { "" };
    let words: Vec<String> = counts.iter().map(|(result, count)| format!("{count} {result}")).collect();
    match ["deleted", "absent"].iter().any(|deletion| counts.iter().any(|(result, _)| result == deletion)) {
        // "deleted" is among the results.
        true => words.join(", "),
        false => format!("{done} {verb}{dry}: {}", words.join(", ")),
    }
}

impl Apply {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let objects = read(&self.files, self.output)?;
        anyhow::ensure!(!objects.is_empty(), "no objects of the federation (hanse.dev) found in the manifests");
        let awaited = objects.iter().map(Awaited::from).collect();
        let dry_run = self.dry_run;
        if let Some(access) = self.management.access() {
            return self.apply_to(&access, objects);
        }
        let requests = objects.into_iter().map(|object| pb::ApplyRequest {
            manifest: object.json.into(),
            precondition: object.revision.map(pb::apply_request::Precondition::Revision),
            allow_missing_tier: self.allow_missing_tier,
        });
        let requests = batches(requests, |request| request.manifest.len());
        let requests = requests.into_iter().map(move |objects| pb::ApplyManyRequest { objects, dry_run });
        with_client(context, |mut client| async move {
            let answers = call(client.apply_many(futures::stream::iter(requests))).await?;
            follow(self.output, "applied", awaited, answers, |answer, awaited| {
                use pb::apply_result::Result as Wire;
                let outcome = |(result, object): (pb::ApplyResult, Awaited)| match result.result {
                    Some(Wire::Applied(done)) => Outcome {
                        kind: object.kind,
                        name: object.name,
                        result: match done.applied() {
                            pb::Applied::Created => "created",
                            pb::Applied::Configured => "configured",
                            pb::Applied::Unchanged | pb::Applied::Unspecified => "unchanged",
                            pb::Applied::Pending => "pending",
                        },
                        dry_run,
                        revision: Some(done.revision),
                        error: None,
                        warnings: done.warnings,
                        place: object.place,
                    },
                    Some(Wire::Refused(refusal)) => object.refused(refusal),
                    None => object.failed(&anyhow::anyhow!("unknown response: the hub is newer than this command")),
                };
                answer.results.into_iter().zip(awaited).map(outcome).collect()
            })
            .await
        })
    }
}

/// Reports the results of all objects, which `each` returns one by one.
fn report_all<T>(format: Format, verb: &str, objects: Vec<T>, each: impl Fn(T) -> Outcome) -> anyhow::Result<ExitCode> {
    let total = objects.len();
    let (mut outcomes, mut printed) = (Vec::with_capacity(total), Ok(()));
    for object in objects {
        let outcome = each(object);
        if printed.is_ok() || outcome.error.is_some() {
            printed = printed.and(outcome.report(format));
        }
        outcomes.push(outcome);
    }
    if format == Format::Table && total > 1 && printed.is_ok() {
        printed = output::line(summary_of(verb, &outcomes));
    }
    output::exit(printed, conclude(format, &outcomes))
}

impl Apply {
    /// To the management API server.
    fn apply_to(&self, access: &hanse_kubernetes::Access, objects: Vec<Written>) -> anyhow::Result<ExitCode> {
        management::with(access, async |server| {
            let mut results = Vec::with_capacity(objects.len());
            for object in objects {
                let applied =
                    server.apply(object.kind, &object.name, &object.json, object.revision, self.dry_run).await;
                results.push((Awaited::from(&object), applied));
            }
            report_all(self.output, "applied", results, |(object, applied)| match applied {
                Ok((applied, revision)) => {
                    let result = match applied {
                        Applied::Created => "created",
                        Applied::Configured => "configured",
                        Applied::Unchanged => "unchanged",
                    };
                    object.done(result, revision, self.dry_run)
                }
                Err(error) => object.failed(&error),
            })
        })
    }
}

impl Get {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let (kind_word, name) = match &self.kind {
            Some(kind) => split(kind, self.name.as_deref())?,
            None => ("", None),
        };
        let name = name.map(str::to_owned);
        let kind = if kind_word.is_empty() { None } else { Some(kind_of(kind_word)?) };
        if self.watch {
            let request = pb::GetRequest {
                kind: kind.unwrap_or(pb::ObjectKind::Unspecified).into(),
                name: name.unwrap_or_default(),
            };
            return super::watch::watch(context, &request, self.output);
        }
        let mut wanted: Vec<(Option<pb::ObjectKind>, Option<String>)> = Vec::new();
        if self.files.is_empty() {
            wanted.push((kind, name.clone()));
        } else {
            let named =
                read(&self.files, Format::Table)?.into_iter().map(|object| (Some(object.kind), Some(object.name)));
            wanted.extend(named);
            anyhow::ensure!(!wanted.is_empty(), "no objects of the federation (hanse.dev) found in the manifests");
        }
        let mut absent = Vec::new();
        let mut objects = if let Some(access) = self.management.access() {
            management::with(&access, async |server| {
                let mut objects = Vec::new();
                for (kind, name) in &wanted {
                    let found = server.get(*kind, name.as_deref()).await?;
                    if let (true, Some(kind), Some(name)) = (found.is_empty(), kind, name) {
                        absent.push(format!("{}/{name} not found", name_of((*kind).into())));
                    }
                    objects.extend(found);
                }
                Ok(objects)
            })?
        } else {
            self.read_from_hub(context, wanted, &mut absent)?
        };
        let one = name.is_some();
        if let ([only], true) = (&absent[..], one) {
            bail!("{only}; `hanse get {kind_word}` lists all");
        }
        objects.sort_by_cached_key(|object| {
            (KINDS.iter().position(|(.., kind)| *kind as i32 == object.kind), object.name.clone())
        });
        let found = objects.len();
        let printed = self.show(objects, one);
        absent.iter().for_each(output::note);
        if !absent.is_empty() {
            let total = output::count(found + absent.len(), "object");
            output::error(&anyhow::anyhow!("{} of {total} not found", absent.len()), 1);
        }
        output::exit(printed, !absent.is_empty())
    }

    fn read_from_hub(
        &self,
        context: Option<&Path>,
        wanted: Vec<(Option<pb::ObjectKind>, Option<String>)>,
        absent: &mut Vec<String>,
    ) -> anyhow::Result<Vec<pb::Object>> {
        with_client(context, async |mut client| {
            if wanted.len() > MANY {
                // One call for all objects is cheaper than a call for each.
                let found = call(client.get(pb::GetRequest::default())).await?.objects;
                let key = |object: &pb::Object| (object.kind(), object.name.clone());
                let mut found: HashMap<_, _> = found.into_iter().map(|object| (key(&object), object)).collect();
                let mut objects = Vec::with_capacity(wanted.len());
                for (kind, name) in wanted {
                    let key = (kind.unwrap_or_default(), name.unwrap_or_default());
                    match found.remove(&key) {
                        Some(object) => objects.push(object),
                        None => absent.push(format!("{}/{} not found", name_of(key.0.into()), key.1)),
                    }
                }
                return Ok(objects);
            }
            let mut objects = Vec::new();
            for (kind, name) in &wanted {
                let kind = kind.unwrap_or(pb::ObjectKind::Unspecified);
                let request = pb::GetRequest { kind: kind.into(), name: name.clone().unwrap_or_default() };
                let found = call(client.get(request)).await?.objects;
                if let (true, Some(name)) = (found.is_empty(), name) {
                    absent.push(format!("{}/{name} not found", name_of(kind.into())));
                }
                objects.extend(found);
            }
            Ok(objects)
        })
    }

    fn show(&self, objects: Vec<pb::Object>, one: bool) -> anyhow::Result<()> {
        let manifest = |object: &pb::Object| -> anyhow::Result<Value> {
            let context = || format!("read {}/{}", name_of(object.kind), object.name);
            serde_json::from_slice(&object.manifest).with_context(context)
        };
        if let Some(format) = self.output.data() {
            let mut manifests = Vec::new();
            for object in &objects {
                let mut manifest = manifest(object)?;
                put_revision(&mut manifest, object.revision);
                manifests.push(manifest);
            }
            return match (one, manifests.pop()) {
                (true, Some(manifest)) => output::print(format, &manifest),
                (_, last) => {
                    manifests.extend(last);
                    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": manifests});
                    output::print(format, &list)
                }
            };
        }
        if self.output == ListFormat::Name {
            let name = |it: &pb::Object| output::line(format_args!("{}/{}", name_of(it.kind), it.name));
            return objects.iter().try_for_each(name);
        }
        let wide = self.output == ListFormat::Wide;
        let mut headings = vec!["KIND", "NAME", "REVISION", "WHAT"];
        if wide {
            headings.extend(["NAMESPACES", "SELECTOR"]);
        }
        let mut table = output::table(headings);
        for object in &objects {
            let manifest = manifest(object).unwrap_or_default();
            let mut row = vec![
                name_of(object.kind).to_owned(),
                object.name.clone(),
                object.revision.to_string(),
                summary(&manifest),
            ];
            if wide {
                let selector = |field: &str| manifest["spec"][field].as_str().unwrap_or("-").to_owned();
                row.extend([selector("namespaceSelector"), selector("selector")]);
            }
            table.add_row(row);
        }
        match table.is_empty() {
            true => output::line("no objects found"),
            false => table.print(),
        }
    }
}

impl Delete {
    /// From the management API server.
    fn delete_from(
        &self,
        access: &hanse_kubernetes::Access,
        objects: Vec<(pb::ObjectKind, Awaited)>,
    ) -> anyhow::Result<ExitCode> {
        management::with(access, async |server| {
            let mut results = Vec::with_capacity(objects.len());
            for (kind, object) in objects {
                let deleted = server.delete(kind, &object.name).await;
                results.push((object, deleted));
            }
            report_all(self.output, "deleted", results, |(object, deleted)| match deleted {
                Ok(true) => object.done("deleted", None, false),
                Ok(false) if self.ignore_not_found => object.done("absent", None, false),
                Ok(false) => {
                    let error = anyhow::anyhow!("{}/{} not found", object.kind, object.name);
                    object.failed(&error)
                }
                Err(error) => object.failed(&error),
            })
        })
    }

    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let mut objects: Vec<(pb::ObjectKind, Awaited)> = Vec::new();
        if let Some(kind) = &self.kind {
            let (kind_word, name) = split(kind, self.name.as_deref())?;
            let kind = kind_of(kind_word)?;
            let missing = || UsageError(format!("the name is missing: `hanse delete {kind_word} NAME`"));
            let (name, place) = (name.ok_or_else(missing)?.to_owned(), String::new());
            objects.push((kind, Awaited { kind: name_of(kind.into()), name, place, revision: None }));
        } else {
            let named = read(&self.files, Format::Table)?.into_iter().rev();
            objects.extend(named.map(|object| (object.kind, Awaited { revision: None, ..Awaited::from(&object) })));
            anyhow::ensure!(!objects.is_empty(), "no objects of the federation (hanse.dev) found in the manifests");
        }
        if let Some(access) = self.management.access() {
            return self.delete_from(&access, objects);
        }
        let request = |(kind, object): &(pb::ObjectKind, Awaited)| pb::DeleteRequest {
            kind: (*kind).into(),
            name: object.name.clone(),
        };
        let requests = batches(objects.iter().map(request), |request| request.name.len());
        let requests = requests.into_iter().map(|objects| pb::DeleteManyRequest { objects });
        let awaited = objects.into_iter().map(|(_, object)| object).collect();
        with_client(context, |mut client| async move {
            let answers = call(client.delete_many(futures::stream::iter(requests))).await?;
            follow(self.output, "deleted", awaited, answers, |answer, awaited| {
                use pb::delete_result::Result as Wire;
                let outcome = |(result, object): (pb::DeleteResult, Awaited)| {
                    let (result, revision, warnings) = match result.result {
                        Some(Wire::Deleted(done)) if done.pending => ("pending", Some(done.revision), done.warnings),
                        Some(Wire::Deleted(done)) => ("deleted", Some(done.revision), done.warnings),
                        Some(Wire::Refused(refusal))
                            if self.ignore_not_found && refusal.code == tonic::Code::NotFound as u32 =>
                        {
                            ("absent", None, Vec::new())
                        }
                        Some(Wire::Refused(refusal)) => return object.refused(refusal),
                        None => {
                            let unknown = "unknown response: the hub is newer than this command";
                            return object.failed(&anyhow::anyhow!(unknown));
                        }
                    };
                    let Awaited { kind, name, place, .. } = object;
                    Outcome { kind, name, result, dry_run: false, revision, error: None, warnings, place }
                };
                answer.results.into_iter().zip(awaited).map(outcome).collect()
            })
            .await
        })
    }
}
