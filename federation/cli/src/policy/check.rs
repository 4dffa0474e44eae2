//! `hanse policy check`: validates manifests without a hub or an API server.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use hanse_api::Object;
use hanse_api::assemble::rivals::{self, Rivals};
use hanse_api::assemble::{overlapping_grants, without_tiers};
use hanse_api::diagnostic::{Diagnostic, NotObject, Reference, SourceLocation};
use hanse_api::hanse::API_VERSION;
use hanse_api::kind::other_system;
use hanse_api::manifest::{Manifest, Skipped};
use serde::Serialize;

use super::reading::{self, DefaultNamespace};
use crate::output::{self, Format};

/// Validate manifests, and report errors by file and line.
///
/// Policies, tiers, network sets and the kinds of Hanse are validated completely, as by an API server. Namespaces,
/// ServiceAccounts, Nodes, Pods, Services, EndpointSlices and kinds with pod templates (Deployment, Job and others) are validated
/// as far as verdicts depend on them: metadata, addresses, and the names, numbers and protocols of ports. Other kinds are counted
/// and skipped, but kinds that look like a misspelling of a known one are refused.
///
/// Templates (documents with `{{`), patches of a kustomization, and documents without a kind, such as `kustomization.yaml` or
/// `values.yaml`, give a note: render them first. For duplicate objects of a cluster, the first one wins, with a note; different
/// objects with the same key are a conflict, which makes the answers of other commands incomplete. Duplicates of objects of the
/// federation are refused.
///
/// With `-o json`, each line has a `result`: accepted, refused, skipped, template, patch or notObject.
///
/// Exits 1 if an object is refused, or a directory has no manifests. If nothing could be validated, a note reports this, and the
/// exit code is 0, or 1 with --strict.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy check manifests/
  helm template charts/app | hanse policy check --namespace shop -
  kustomize build overlays/prod | hanse policy check --strict -")]
pub struct Arguments {
    /// Directories or files; `-` is standard input.
    #[arg(value_name = "DIR", required = true)]
    directories: Vec<PathBuf>,
    /// Refuse templates, patches, documents without a kind, and conflicts.
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    namespace: DefaultNamespace,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// One object, or one document that is not an object. The JSON keys are a contract.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ObjectLine {
    file: String,
    /// The first line of the object.
    line: u32,
    api_version: String,
    kind: String,
    namespace: Option<String>,
    name: String,
    /// Not refused.
    ok: bool,
    result: Outcome,
    /// The system whose network policy a skipped object is.
    #[serde(skip_serializing_if = "Option::is_none")]
    system: Option<&'static str>,
    errors: Vec<ErrorLine>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Outcome {
    Accepted,
    Refused,
    /// A kind that Hanse does not read.
    Skipped,
    Template,
    Patch,
    NotObject,
}

/// The results of all directories.
#[derive(Debug, Default)]
struct Checked {
    objects: Vec<ObjectLine>,
    /// Notes, which refuse nothing.
    notes: Vec<String>,
    /// Policies and tiers of the federation, of all directories.
    federated: Vec<Manifest>,
}

#[derive(Debug, Serialize)]
struct ErrorLine {
    field: String,
    message: String,
    /// The line of the field.
    #[serde(skip)]
    line: u32,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if self.directories.iter().filter(|path| *path == Path::new("-")).count() > 1 {
            anyhow::bail!("standard input (`-`) can be used once");
        }
        let mut checked = Checked::default();
        let mut is_empty = false;
        for directory in &self.directories {
            let before = checked.objects.len();
            self.check(directory, &mut checked)?;
            if checked.objects.len() == before {
                output::error(&anyhow::anyhow!(reading::no_manifests(directory)), 1);
                is_empty = true;
            }
        }
        checked.notes.extend(without_tiers(&checked.federated).into_iter().map(note));
        let count = |outcome| checked.objects.iter().filter(|object| object.result == outcome).count();
        let refused = count(Outcome::Refused);
        let nothing = refused + count(Outcome::Accepted) == 0 && !is_empty;
        if nothing {
            checked
                .notes
                .push("note: nothing was validated: no document is an object of a kind that Hanse reads".to_owned());
        }
        let failed = refused > 0 || is_empty || nothing && self.strict;
        output::exit(self.print(&checked), failed)
    }

    fn print(&self, Checked { objects, notes, .. }: &Checked) -> anyhow::Result<()> {
        let mut out = std::io::BufWriter::new(output::stdout());
        for object in objects {
            if self.output != Format::Table {
                output::write(&mut out, self.output, object)?;
                continue;
            }
            let note = if object.ok { "note: " } else { "" };
            for error in &object.errors {
                let field = if error.field.is_empty() { String::new() } else { format!("{}: ", error.field) };
                let subject = subject(object);
                let line = format!("{}:{}: {note}{subject}{field}{}", object.file, error.line, error.message);
                writeln!(out, "{}", output::one_line(&line))?;
            }
        }
        for note in notes {
            match self.output {
                Format::Table => writeln!(out, "{}", output::one_line(note))?,
                Format::Json | Format::Yaml => output::note(format_args!("{note}")),
            }
        }
        if self.output == Format::Table {
            let count = |outcome| objects.iter().filter(|object| object.result == outcome).count();
            let [accepted, refused, skipped] = [Outcome::Accepted, Outcome::Refused, Outcome::Skipped].map(count);
            write!(out, "{accepted} accepted, {refused} refused, {skipped} skipped")?;
            for (outcome, noun, rest) in [
                (Outcome::Template, "template", ""),
                (Outcome::Patch, "patch file", ""),
                (Outcome::NotObject, "document", " not read"),
            ] {
                match count(outcome) {
                    0 => {}
                    many => write!(out, ", {}{rest}", output::count(many, noun))?,
                }
            }
            writeln!(out)?;
        }
        Ok(out.flush()?)
    }

    /// Adds every object of a directory, in the order of files and lines.
    fn check(&self, directory: &Path, checked: &mut Checked) -> anyhow::Result<()> {
        let mut read = reading::read(directory, &self.namespace)?;
        read.diagnostics.append(&mut read.refused_workloads);
        read.diagnostics.append(&mut read.not_storable);
        // The hub refuses them.
        read.diagnostics.extend(overlapping_grants(&read.objects));
        checked.notes.extend(std::mem::take(&mut read.notes).into_iter().map(note));
        for Rivals { duplicates, conflicts, .. } in
            [rivals::of_objects(&read.objects), rivals::of_workloads(&read.workloads)]
        {
            let of_federation = |it: &Diagnostic| it.object.as_ref().is_some_and(|it| it.api_version == API_VERSION);
            // `hanse apply` refuses both.
            let (refused, noted): (Vec<Diagnostic>, Vec<Diagnostic>) = duplicates.into_iter().partition(of_federation);
            let (conflicting, rest): (Vec<Diagnostic>, Vec<Diagnostic>) =
                conflicts.into_iter().partition(|it| self.strict || of_federation(it));
            read.diagnostics.extend(refused.into_iter().chain(conflicting));
            checked.notes.extend(noted.into_iter().chain(rest).map(note));
        }
        let is_federated =
            |manifest: &&Manifest| matches!(manifest.object, Object::FederatedPolicy(_) | Object::FederatedTier(_));
        checked.federated.extend(read.objects.iter().filter(is_federated).cloned());
        checked.notes.extend(reading::skipped_lines(read.skipped.iter()));
        // Several objects may start on one line.
        let mut objects: BTreeMap<(Arc<str>, u32, Arc<Reference>), ObjectLine> = BTreeMap::new();
        let of_objects = read.objects.into_iter().map(|object| (object.location, object.reference, Outcome::Accepted));
        let of_workloads = read.workloads.into_iter().map(|it| (it.location, it.reference.into(), Outcome::Accepted));
        let of_skipped =
            read.skipped.into_iter().map(|Skipped { location, object }| (location, object.into(), Outcome::Skipped));
        for (place, reference, result) in of_objects.chain(of_workloads).chain(of_skipped) {
            let line = ObjectLine::new(&place, &reference, result);
            objects.insert((place.file, place.line, reference), line);
        }
        for diagnostic in read.diagnostics {
            let result = match diagnostic.not_object.filter(|_| !reading::refuses(&diagnostic, self.strict)) {
                Some(NotObject::Template) => Outcome::Template,
                Some(NotObject::Patch) => Outcome::Patch,
                Some(NotObject::WithoutKind) => Outcome::NotObject,
                None => Outcome::Refused,
            };
            let start = SourceLocation { file: diagnostic.location.file, line: diagnostic.start };
            let reference = diagnostic.object.unwrap_or_default();
            let line = ObjectLine::new(&start, &reference, result);
            let object = objects.entry((start.file, start.line, reference.into())).or_insert(line);
            (object.ok, object.result) = (result != Outcome::Refused, result);
            object.errors.push(ErrorLine {
                field: diagnostic.field,
                message: diagnostic.message,
                line: diagnostic.location.line,
            });
        }
        checked.objects.extend(objects.into_values());
        Ok(())
    }
}

/// `Kind namespace/name: `, as far as the document has them.
fn subject(object: &ObjectLine) -> String {
    match (&object.namespace, object.kind.is_empty()) {
        (_, true) => String::new(),
        _ if object.name.is_empty() => format!("{}: ", object.kind),
        (Some(namespace), _) => format!("{} {namespace}/{}: ", object.kind, object.name),
        (None, _) => format!("{} {}: ", object.kind, object.name),
    }
}

fn note(diagnostic: Diagnostic) -> String {
    let Reference { kind, name, .. } = diagnostic.object.unwrap_or_default();
    let field = match &*diagnostic.field {
        "" | "metadata.name" | "kind" => String::new(),
        field => format!("{field}: "),
    };
    format!(
        "{}:{}: note: {kind} {name} {field}{}",
        diagnostic.location.file, diagnostic.location.line, diagnostic.message
    )
}

impl ObjectLine {
    fn new(start: &SourceLocation, reference: &Reference, result: Outcome) -> Self {
        let Reference { api_version, kind, namespace, name } = reference;
        let system = other_system(api_version, kind).filter(|_| result == Outcome::Skipped);
        let (file, line, errors) = (start.file.to_string(), start.line, Vec::new());
        let (api_version, kind, name) = (api_version.to_string(), kind.to_string(), name.to_string());
        let namespace = namespace.as_ref().map(ToString::to_string);
        Self { file, line, api_version, kind, namespace, name, ok: result != Outcome::Refused, result, system, errors }
    }
}
