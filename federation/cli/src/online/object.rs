//! `hanse apply|get|delete`: the objects of the federation.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use hanse_k8s_api::assemble::doubles;
use hanse_k8s_api::document::{self, Node};
use hanse_k8s_api::manifest::{
    MAX_FILE_BYTES, Manifest, Manifests, Place, Reference, items, list, read_bytes, read_file,
};
use hanse_proto::federation::v1 as pb;
use serde::Serialize;
use serde_json::Value;

use super::{CallError, Client, call, with_client};
use crate::output::{self, Format, ListFormat};

/// Where `get` says at which revision of the hub an object is. `apply` takes it off, and then changes the object only if it
/// is still at that revision: what was edited meanwhile by somebody else is not overwritten.
const REVISION: &str = "hanse.dev/revision";

/// Write objects of the federation to the hub.
///
/// All manifests are checked first, and nothing is written when one is wrong. Then each object is written by itself, what
/// others name first; one that the hub refuses does not keep the rest out, and makes the command exit 1. Applying the same
/// again changes nothing. A manifest from `hanse get -o yaml` is written only if nobody changed the object since.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse apply -f policies/
  hanse apply -f policies/ --dry-run
  hanse policy scaffold deny-metadata | hanse apply -f -
  hanse get fnp web -o yaml > web.yaml; $EDITOR web.yaml; hanse apply -f web.yaml")]
pub struct Apply {
    /// A file or a directory of manifests, or `-` for standard input; may be given several times.
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Let the hub check and judge everything (roles, grants, preconditions), and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Read objects of the federation from the hub.
///
/// As YAML or JSON these are the manifests, which can be edited and applied again. With `--watch` what changes is printed as it
/// changes; as YAML or JSON each change is `{type: ADDED|MODIFIED|DELETED, object: …}`.
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
    /// FederatedNetworkPolicy (fnp), Tier, FederatedNetworkSet (fns) or MemberCluster (mc); without it, every kind.
    #[arg(conflicts_with = "files")]
    kind: Option<String>,
    /// One object; without a name all of the kind.
    name: Option<String>,
    /// A file or a directory of manifests that name the objects, or `-`; may be given several times.
    #[arg(short, long = "filename", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Go on and print each change, until it is interrupted.
    #[arg(short, long, conflicts_with = "files")]
    watch: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: ListFormat,
}

/// Delete objects of the federation, policies first, what they name last.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse delete fnp web
  hanse delete -f policies/ --ignore-not-found")]
pub struct Delete {
    /// The kind, with a name behind it.
    #[arg(requires = "name", required_unless_present = "files")]
    kind: Option<String>,
    name: Option<String>,
    /// A file or a directory of manifests that name the objects, or `-`; may be given several times.
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with = "kind")]
    files: Vec<PathBuf>,
    /// What is not there counts as deleted.
    #[arg(long)]
    ignore_not_found: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// The kinds with their short names, in the order in which they are applied: what others name comes first.
pub(super) const KINDS: [(&str, &str, pb::ObjectKind); 4] = [
    ("MemberCluster", "mc", pb::ObjectKind::MemberCluster),
    ("Tier", "tier", pb::ObjectKind::Tier),
    ("FederatedNetworkSet", "fns", pb::ObjectKind::FederatedNetworkSet),
    ("FederatedNetworkPolicy", "fnp", pb::ObjectKind::FederatedNetworkPolicy),
];

pub(super) fn kind_of(text: &str) -> anyhow::Result<pb::ObjectKind> {
    let text = text.to_ascii_lowercase();
    let found = KINDS.iter().find(|(name, short, _)| {
        let name = name.to_ascii_lowercase();
        let plural = name.strip_suffix('y').map_or_else(|| format!("{name}s"), |stem| format!("{stem}ies"));
        [name.as_str(), &plural, short].contains(&text.as_str())
    });
    let names = KINDS.map(|(name, short, _)| format!("{name} ({short})")).join(", ");
    found.map(|(.., kind)| *kind).with_context(|| format!("\"{text}\" is none of {names}"))
}

pub(super) fn name_of(kind: i32) -> &'static str {
    KINDS.iter().find(|(.., known)| *known as i32 == kind).map_or("object", |(name, ..)| name)
}

/// One object of the federation as it is written.
pub(super) struct Written {
    order: usize,
    pub kind: pb::ObjectKind,
    pub name: String,
    json: Vec<u8>,
    /// The revision that it was read at.
    revision: Option<u64>,
    place: String,
}

/// Reads everything, and refuses everything when anything is wrong: half of a change is none.
pub(super) fn read(files: &[PathBuf]) -> anyhow::Result<Vec<Written>> {
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
    let skipped = checked.skipped.iter().map(|skipped| (&skipped.place, &skipped.object));
    let workloads = checked.workloads.iter().map(|workload| (&workload.place, &workload.reference));
    for (place, object) in skipped.chain(workloads) {
        output::note(format_args!(
            "{}:{}: {} {} is skipped: no kind of the federation",
            place.file, place.line, object.kind, object.name
        ));
    }
    // Kinds of a cluster are read by its member, not by the hub: they are passed over, but not in silence.
    let (ours, others): (Vec<Manifest>, Vec<Manifest>) =
        checked.objects.into_iter().partition(|it| it.reference.api_version == hanse_k8s_api::hanse::API_VERSION);
    for manifest in others {
        let (Place { file, line }, Reference { kind, name, .. }) = (manifest.place, manifest.reference);
        output::note(format_args!("{file}:{line}: {kind} {name} is skipped: it belongs into its cluster"));
    }
    checked.diagnostics.append(&mut checked.refused_workloads);
    // The last would win, where everywhere else the first counts.
    checked.diagnostics.extend(doubles(&ours));
    if !checked.diagnostics.is_empty() {
        for it in &checked.diagnostics {
            let field = if it.field.is_empty() { String::new() } else { format!("{}: ", it.field) };
            output::note(format_args!("{}:{}: {field}{}", it.place.file, it.place.line, it.message));
        }
        bail!("{}; nothing was changed", output::count(checked.diagnostics.len(), "error"));
    }
    anyhow::ensure!(
        written.len() == ours.len(),
        "{} of {} objects cannot be sent",
        ours.len() - written.len(),
        ours.len()
    );
    written.sort_by_key(|object| object.order);
    Ok(written)
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
    (group == hanse_k8s_api::hanse::API_VERSION).then_some(())?;
    let name = node.child("metadata")?.child("name")?.text()?.to_owned();
    let mut value = node.to_value();
    let revision = take_revision(&mut value);
    let json = serde_json::to_vec(&value).ok()?;
    Some(Written { order, kind: KINDS[order].2, name, json, revision, place: format!("{file}:{}", node.line()) })
}

fn take_revision(manifest: &mut Value) -> Option<u64> {
    let metadata = manifest.get_mut("metadata")?.as_object_mut()?;
    let annotations = metadata.get_mut("annotations")?.as_object_mut()?;
    let revision = annotations.shift_remove(REVISION)?;
    if annotations.is_empty() {
        metadata.shift_remove("annotations");
    }
    revision.as_str()?.parse().ok()
}

/// What became of one object.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    kind: &'static str,
    name: String,
    /// `created`, `configured`, `unchanged`, `deleted`, `absent` or `failed`.
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
    /// Says it at once: of a long list, what was done is known when the rest fails.
    fn tell(&self, format: Format) -> anyhow::Result<()> {
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

/// Fails when one failed.
fn conclude(outcomes: &[Outcome]) -> ExitCode {
    let failed = outcomes.iter().filter(|outcome| outcome.error.is_some()).count();
    if failed == 0 {
        return ExitCode::SUCCESS;
    }
    if outcomes.len() > 1 {
        output::note(format_args!(
            "hanse: {failed} of {} failed; the rest is done",
            output::count(outcomes.len(), "object")
        ));
    }
    ExitCode::FAILURE
}

impl Apply {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let objects = read(&self.files)?;
        anyhow::ensure!(!objects.is_empty(), "there is no object of the federation (hanse.dev) in what was given");
        with_client(context, |mut client| async move {
            let mut outcomes = Vec::new();
            for object in objects {
                let (kind, name, place) = (name_of(object.kind.into()), object.name.clone(), object.place.clone());
                let outcome = match self.write(&mut client, object).await {
                    Ok(done) => Outcome {
                        kind,
                        name,
                        result: match done.applied() {
                            pb::Applied::Created => "created",
                            pb::Applied::Configured => "configured",
                            pb::Applied::Unchanged | pb::Applied::Unspecified => "unchanged",
                        },
                        dry_run: self.dry_run,
                        revision: Some(done.revision),
                        error: None,
                        warnings: done.warnings,
                        place,
                    },
                    // One bad object does not keep the rest out; a hub that is gone does.
                    Err(error) if CallError::is_passing(&error) => {
                        return Err(error.context(format!("apply {kind}/{name}; what was told before is done")));
                    }
                    Err(error) => failed(kind, name, place, &error),
                };
                outcome.tell(self.output)?;
                outcomes.push(outcome);
            }
            Ok(conclude(&outcomes))
        })
    }

    async fn write(&self, client: &mut Client, object: Written) -> anyhow::Result<pb::ApplyResponse> {
        let precondition = object.revision.map(pb::apply_request::Precondition::Revision);
        let request = pb::ApplyRequest { manifest: object.json.into(), precondition };
        let done = match self.dry_run {
            true => call(client.dry_run(request)).await,
            false => call(client.apply(request)).await,
        };
        done.map_err(|error| match object.revision {
            Some(_) if CallError::is_conflict(&error) => {
                error.context(format!("it was read with {REVISION}: `hanse get` it again, or take that off"))
            }
            _ => error,
        })
    }
}

fn failed(kind: &'static str, name: String, place: String, error: &anyhow::Error) -> Outcome {
    let error = Some(format!("{error:#}"));
    Outcome { kind, name, result: "failed", dry_run: false, revision: None, error, warnings: Vec::new(), place }
}

impl Get {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        if self.watch {
            let kind = self.kind.as_deref().map(kind_of).transpose()?.unwrap_or(pb::ObjectKind::Unspecified);
            let request = pb::GetRequest { kind: kind.into(), name: self.name.unwrap_or_default() };
            return super::watch::watch(context, &request, self.output);
        }
        let mut wanted: Vec<(Option<pb::ObjectKind>, Option<String>)> = Vec::new();
        if self.files.is_empty() {
            wanted.push((self.kind.as_deref().map(kind_of).transpose()?, self.name.clone()));
        } else {
            let named = read(&self.files)?.into_iter().map(|object| (Some(object.kind), Some(object.name)));
            wanted.extend(named);
            anyhow::ensure!(!wanted.is_empty(), "there is no object of the federation (hanse.dev) in what was given");
        }
        let mut absent = Vec::new();
        let mut objects = with_client(context, async |mut client| {
            let mut objects = Vec::new();
            for (kind, name) in &wanted {
                let kind = kind.unwrap_or(pb::ObjectKind::Unspecified);
                let request = pb::GetRequest { kind: kind.into(), name: name.clone().unwrap_or_default() };
                let found = call(client.get(request)).await?.objects;
                if let (true, Some(name)) = (found.is_empty(), name) {
                    absent.push(format!("there is no {}/{name}", name_of(kind.into())));
                }
                objects.extend(found);
            }
            Ok(objects)
        })?;
        let one = self.name.is_some();
        if let ([only], true) = (&absent[..], one) {
            bail!("{only}; `hanse get {}` names all", self.kind.unwrap_or_default());
        }
        objects.sort_by_cached_key(|object| {
            (KINDS.iter().position(|(.., kind)| *kind as i32 == object.kind), object.name.clone())
        });
        self.show(objects, one)?;
        absent.iter().for_each(|text| output::note(format_args!("hanse: {text}")));
        Ok(if absent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn show(&self, objects: Vec<pb::Object>, one: bool) -> anyhow::Result<()> {
        let manifest = |object: &pb::Object| -> anyhow::Result<Value> {
            let context = || format!("understand {}/{}", name_of(object.kind), object.name);
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
            true => output::line("there is none"),
            false => table.print(),
        }
    }
}

pub(super) fn put_revision(manifest: &mut Value, revision: u64) {
    let Some(metadata) = manifest.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    let annotations = metadata.entry("annotations").or_insert_with(|| serde_json::json!({}));
    if let Some(annotations) = annotations.as_object_mut() {
        annotations.insert(REVISION.to_owned(), revision.to_string().into());
    }
}

/// What an object is about, in a few words.
pub(super) fn summary(manifest: &Value) -> String {
    let spec = &manifest["spec"];
    let text = |field: &str, otherwise: &str| match &spec[field] {
        Value::Null => otherwise.to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let items = |list: &Value| list.as_array().map_or(0, Vec::len);
    let joined = |list: &Value| {
        let texts = list.as_array().into_iter().flatten().filter_map(Value::as_str);
        texts.collect::<Vec<_>>().join(",")
    };
    match manifest["kind"].as_str().unwrap_or_default() {
        "FederatedNetworkPolicy" => {
            let rules = items(&spec["ingress"]) + items(&spec["egress"]);
            let (tier, order) = (text("tier", "-"), text("order", "last"));
            let clusters = text("clusterSelector", "all()");
            format!("tier {tier}, order {order}, {}, clusters {clusters}", output::count(rules, "rule"))
        }
        "Tier" => format!(
            "{}, order {}, ends in {}",
            text("phase", "Guard"),
            text("order", "last"),
            text("defaultAction", "Deny")
        ),
        "FederatedNetworkSet" => output::count(items(&spec["nets"]), "net"),
        "MemberCluster" => format!("cidrs {}", joined(&spec["grants"]["cidrs"])),
        _ => String::new(),
    }
}

impl Delete {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let mut objects: Vec<(pb::ObjectKind, String, String)> = Vec::new();
        if let (Some(kind), Some(name)) = (&self.kind, &self.name) {
            objects.push((kind_of(kind)?, name.clone(), String::new()));
        } else {
            let named = read(&self.files)?.into_iter().rev();
            objects.extend(named.map(|object| (object.kind, object.name, object.place)));
            anyhow::ensure!(!objects.is_empty(), "there is no object of the federation (hanse.dev) in what was given");
        }
        with_client(context, |mut client| async move {
            let mut outcomes = Vec::new();
            for (kind, name, place) in objects {
                let request = pb::DeleteRequest { kind: kind.into(), name: name.clone() };
                let kind = name_of(kind.into());
                let (result, revision, warnings) = match call(client.delete(request)).await {
                    Ok(done) => ("deleted", Some(done.revision), done.warnings),
                    Err(error) if self.ignore_not_found && CallError::is_not_found(&error) => {
                        ("absent", None, Vec::new())
                    }
                    Err(error) if CallError::is_passing(&error) => {
                        return Err(error.context(format!("delete {kind}/{name}; what was told before is done")));
                    }
                    Err(error) => {
                        let outcome = failed(kind, name, place, &error);
                        outcome.tell(self.output)?;
                        outcomes.push(outcome);
                        continue;
                    }
                };
                let outcome = Outcome { kind, name, result, dry_run: false, revision, error: None, warnings, place };
                outcome.tell(self.output)?;
                outcomes.push(outcome);
            }
            Ok(conclude(&outcomes))
        })
    }
}
