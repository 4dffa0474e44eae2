//! `hanse policy check`: whether manifests would be accepted, offline.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use hanse_k8s_api::assemble::{doubles, without_tiers};
use hanse_k8s_api::kind::other_system;
use hanse_k8s_api::manifest::{Diagnostic, Manifest, NotObject, Object, Place, Reference, Skipped};
use serde::Serialize;

use super::reading;
use crate::output::{self, Format};

/// Say whether manifests would be accepted, and what is wrong with them by file and line.
///
/// Validates every object below a directory as an API server would, and says what is wrong by file and line. Kinds that
/// Hanse does not read are counted and skipped; those that look like a misspelt one that it reads are refused. Templates
/// (documents with `{{`) and documents without a kind, such as `kustomization.yaml` or `values.yaml`, are notes: render
/// them first. Of several objects of a cluster with one key the first counts; of the federation's they are refused.
///
/// With `-o json`, each line has a `result`: accepted, refused, skipped, template or notObject. Exits 1 when an object is
/// refused, or there is nothing to check.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy check manifests/
  helm template charts/app | hanse policy check -
  kustomize build overlays/prod | hanse policy check --strict -")]
pub struct Arguments {
    /// Directories or files; `-` is standard input.
    #[arg(value_name = "DIR", required = true)]
    directories: Vec<PathBuf>,
    /// Refuse templates and documents without a kind.
    #[arg(long)]
    strict: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// One object, or one document that is not an object. The JSON is a contract.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ObjectLine {
    file: String,
    /// Where the object starts.
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
    NotObject,
}

#[derive(Debug, Serialize)]
struct ErrorLine {
    field: String,
    message: String,
    /// Where the field stands.
    #[serde(skip)]
    line: u32,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (mut objects, mut notes, mut is_empty) = (Vec::new(), Vec::new(), false);
        let mut federated = Vec::new();
        for directory in &self.directories {
            let checked = check(directory, self.strict, &mut notes, &mut federated)?;
            if checked.is_empty() {
                output::note(format_args!("error: {}: no manifests (.yaml, .yml or .json)", directory.display()));
                is_empty = true;
            }
            objects.extend(checked);
        }
        notes.extend(without_tiers(&federated).into_iter().map(note));
        let mut out = std::io::BufWriter::new(output::stdout());
        for object in &objects {
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
                Format::Table => writeln!(out, "{}", output::one_line(&note))?,
                Format::Json | Format::Yaml => output::note(format_args!("{note}")),
            }
        }
        let count = |outcome| objects.iter().filter(|object| object.result == outcome).count();
        let refused = count(Outcome::Refused);
        if self.output == Format::Table {
            let (accepted, skipped) = (count(Outcome::Accepted), count(Outcome::Skipped));
            write!(out, "{accepted} accepted, {refused} refused, {skipped} skipped")?;
            for (outcome, noun) in [(Outcome::Template, "template"), (Outcome::NotObject, "document")] {
                match count(outcome) {
                    0 => {}
                    many => write!(
                        out,
                        ", {}{}",
                        output::count(many, noun),
                        if noun == "document" { " without a kind" } else { "" }
                    )?,
                }
            }
            writeln!(out)?;
        }
        out.flush()?;
        Ok(if refused == 0 && !is_empty { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// `Kind namespace/name: `, as far as it is known.
fn subject(object: &ObjectLine) -> String {
    match (&object.namespace, object.kind.is_empty()) {
        (_, true) => String::new(),
        (Some(namespace), _) => format!("{} {namespace}/{}: ", object.kind, object.name),
        (None, _) => format!("{} {}: ", object.kind, object.name),
    }
}

fn note(diagnostic: Diagnostic) -> String {
    let Reference { kind, name, .. } = diagnostic.object.unwrap_or_default();
    let field = if diagnostic.field == "spec.tier" { "spec.tier: " } else { "" };
    format!("{}:{}: note: {kind} {name} {field}{}", diagnostic.place.file, diagnostic.place.line, diagnostic.message)
}

/// Every object of a directory, in the order of files and lines. `notes`: what is to be said and refuses nothing.
/// `federated`: policies and tiers of the federation, which may be in several directories.
fn check(
    directory: &Path,
    strict: bool,
    notes: &mut Vec<String>,
    federated: &mut Vec<Manifest>,
) -> anyhow::Result<Vec<ObjectLine>> {
    let mut read = reading::read(directory)?;
    read.diagnostics.append(&mut read.refused_workloads);
    let (refused, noted): (Vec<Diagnostic>, Vec<Diagnostic>) = doubles(&read.objects).into_iter().partition(|double| {
        // `hanse apply` takes no two of them.
        double.object.as_ref().is_some_and(|object| object.api_version == hanse_k8s_api::hanse::API_VERSION)
    });
    read.diagnostics.extend(refused);
    notes.extend(noted.into_iter().map(note));
    let is_federated =
        |manifest: &&Manifest| matches!(manifest.object, Object::FederatedNetworkPolicy(_) | Object::Tier(_));
    federated.extend(read.objects.iter().filter(is_federated).cloned());
    notes.extend(reading::skipped_lines(read.skipped.iter()));
    // Several objects may start on one line.
    let mut objects: BTreeMap<(Arc<str>, u32, Reference), ObjectLine> = BTreeMap::new();
    let of_objects = read.objects.into_iter().map(|object| (object.place, object.reference, Outcome::Accepted));
    let of_workloads = read.workloads.into_iter().map(|it| (it.place, it.reference, Outcome::Accepted));
    let of_skipped = read.skipped.into_iter().map(|Skipped { place, object }| (place, object, Outcome::Skipped));
    for (place, reference, result) in of_objects.chain(of_workloads).chain(of_skipped) {
        let line = ObjectLine::new(&place, &reference, result);
        objects.insert((place.file, place.line, reference), line);
    }
    for diagnostic in read.diagnostics {
        let result = match diagnostic.not_object.filter(|_| !reading::refuses(&diagnostic, strict)) {
            Some(NotObject::Template) => Outcome::Template,
            Some(NotObject::WithoutKind) => Outcome::NotObject,
            None => Outcome::Refused,
        };
        let start = Place { file: diagnostic.place.file, line: diagnostic.start };
        let reference = diagnostic.object.unwrap_or_default();
        let line = ObjectLine::new(&start, &reference, result);
        let object = objects.entry((start.file, start.line, reference)).or_insert(line);
        (object.ok, object.result) = (result != Outcome::Refused, result);
        object.errors.push(ErrorLine {
            field: diagnostic.field,
            message: diagnostic.message,
            line: diagnostic.place.line,
        });
    }
    Ok(objects.into_values().collect())
}

impl ObjectLine {
    fn new(start: &Place, reference: &Reference, result: Outcome) -> Self {
        let Reference { api_version, kind, namespace, name } = reference.clone();
        let system = other_system(&api_version, &kind).filter(|_| result == Outcome::Skipped);
        let (file, line, errors) = (start.file.to_string(), start.line, Vec::new());
        Self { file, line, api_version, kind, namespace, name, ok: result != Outcome::Refused, result, system, errors }
    }
}
