//! `hanse policy check`: whether manifests would be accepted, offline.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use hanse_k8s_api::assemble::{doubles, without_tiers};
use hanse_k8s_api::manifest::{
    Diagnostic, MAX_FILE_BYTES, Manifest, Manifests, Object, Reference, read_bytes, read_dir,
};
use serde::Serialize;

use crate::output::{self, Format};

/// Say whether manifests would be accepted, and what is wrong with them by file and line.
///
/// Validates every object below a directory as an API server would, and says what is wrong by file and line. Kinds that
/// Hanse does not read are listed and skipped; those that look like a misspelt one that it reads are refused. Of several
/// objects of a cluster with one key the first counts; of the federation's they are refused. Exits 1 when an object is
/// refused.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directories or files; `-` is standard input.
    #[arg(value_name = "DIR", required = true)]
    directories: Vec<PathBuf>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// One object, or one document that is none. The JSON is a contract.
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
    ok: bool,
    /// A kind that Hanse does not read.
    #[serde(skip)]
    skipped: bool,
    errors: Vec<ErrorLine>,
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
        let (mut objects, mut notes, mut federated) = (Vec::new(), Vec::new(), Vec::new());
        for directory in &self.directories {
            objects.extend(check(directory, &mut notes, &mut federated)?);
        }
        notes.extend(without_tiers(&federated).into_iter().map(note));
        let refused = objects.iter().filter(|object| !object.ok).count();
        let mut out = std::io::BufWriter::new(output::stdout());
        for object in &objects {
            if object.skipped {
                let subject = subject(object);
                notes.push(format!("{}:{}: {subject}skipped: not a kind that Hanse reads", object.file, object.line));
            }
            if self.output != Format::Table {
                output::write(&mut out, self.output, object)?;
                continue;
            }
            for error in &object.errors {
                let field = if error.field.is_empty() { String::new() } else { format!("{}: ", error.field) };
                let line = format!("{}:{}: {}{field}{}", object.file, error.line, subject(object), error.message);
                writeln!(out, "{}", output::one_line(&line))?;
            }
        }
        for note in notes {
            match self.output {
                Format::Table => writeln!(out, "{}", output::one_line(&note))?,
                Format::Json | Format::Yaml => output::note(format_args!("{note}")),
            }
        }
        if self.output == Format::Table {
            let skipped = objects.iter().filter(|object| object.skipped).count();
            let accepted = objects.len() - refused - skipped;
            writeln!(out, "{accepted} accepted, {refused} refused, {skipped} skipped")?;
        }
        out.flush()?;
        Ok(if refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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

/// Every object of a directory, in the order of files and lines. `notes`: what is to be said and is no refusal.
/// `federated`: policies and tiers of the federation, which may be in several directories.
fn check(
    directory: &std::path::Path,
    notes: &mut Vec<String>,
    federated: &mut Vec<Manifest>,
) -> anyhow::Result<Vec<ObjectLine>> {
    let mut read = match directory == std::path::Path::new("-") {
        true => {
            let (mut bytes, mut read) = (Vec::new(), Manifests::default());
            std::io::stdin().lock().take(MAX_FILE_BYTES).read_to_end(&mut bytes).context("read standard input")?;
            read_bytes(&"-".into(), &bytes, &mut read);
            read
        }
        false => read_dir(directory)?,
    };
    read.diagnostics.append(&mut read.refused_workloads);
    let nothing = [read.objects.is_empty(), read.workloads.is_empty(), read.skipped.is_empty()];
    if nothing == [true; 3] && read.diagnostics.is_empty() {
        output::note(format_args!("{}: no manifests", directory.display()));
    }
    let (refused, noted): (Vec<Diagnostic>, Vec<Diagnostic>) = doubles(&read.objects).into_iter().partition(|double| {
        // `hanse apply` takes no two of them.
        double.object.as_ref().is_some_and(|object| object.api_version == hanse_k8s_api::hanse::API_VERSION)
    });
    read.diagnostics.extend(refused);
    notes.extend(noted.into_iter().map(note));
    let is_federated =
        |manifest: &&Manifest| matches!(manifest.object, Object::FederatedNetworkPolicy(_) | Object::Tier(_));
    federated.extend(read.objects.iter().filter(is_federated).cloned());
    let line = |file: &str, line, reference: Reference, skipped| ObjectLine {
        file: file.to_owned(),
        line,
        api_version: reference.api_version,
        kind: reference.kind,
        namespace: reference.namespace,
        name: reference.name,
        ok: true,
        skipped,
        errors: Vec::new(),
    };
    // Several objects may start on one line.
    let mut objects: BTreeMap<(Arc<str>, u32, Reference), ObjectLine> = BTreeMap::new();
    let of_objects = read.objects.into_iter().map(|object| (object.place, object.reference, false));
    let of_workloads = read.workloads.into_iter().map(|workload| (workload.place, workload.reference, false));
    let of_skipped = read.skipped.into_iter().map(|skipped| (skipped.place, skipped.object, true));
    for (place, reference, skipped) in of_objects.chain(of_workloads).chain(of_skipped) {
        let key = (place.file.clone(), place.line, reference.clone());
        objects.insert(key, line(&place.file, place.line, reference, skipped));
    }
    for diagnostic in read.diagnostics {
        let (file, start) = (diagnostic.place.file, diagnostic.start);
        let reference = diagnostic.object.unwrap_or_default();
        let key = (file.clone(), start, reference.clone());
        let object = objects.entry(key).or_insert_with(|| line(&file, start, reference, false));
        object.ok = false;
        object.errors.push(ErrorLine {
            field: diagnostic.field,
            message: diagnostic.message,
            line: diagnostic.place.line,
        });
    }
    Ok(objects.into_values().collect())
}
