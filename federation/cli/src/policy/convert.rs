//! `hanse policy convert`: from obsolete kinds of policy to their replacement.

use std::collections::{HashMap, HashSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::ValueEnum;
use hanse_api::Diagnostic;
use hanse_api::admin_network_policy::{BASELINE_KIND, Unconvertible, is_convertible, to_cluster_network_policy};
use hanse_api::cluster_network_policy::{API_VERSION as CLUSTER_API_VERSION, KIND as CLUSTER_KIND};
use hanse_api::document::{self, Locator, Node};
use hanse_api::field::FieldError;
use hanse_api::files::{list, read_file};
use hanse_api::manifest::{Manifests, items, read_bytes};
use serde_json::Value;

use crate::output;

/// Convert AdminNetworkPolicy and BaselineAdminNetworkPolicy to ClusterNetworkPolicy.
///
/// Reads objects of `policy.networking.k8s.io/v1alpha1` and prints equivalent ClusterNetworkPolicies of v1alpha2. An object that
/// is malformed, or that has a field without an equivalent, is not converted: the error names the field, and the exit code is 1.
/// Objects of other kinds are counted and omitted.
///
/// ClusterNetworkPolicies have one namespace of names for both kinds. If a BaselineAdminNetworkPolicy has the name of an
/// AdminNetworkPolicy, `-baseline` is appended, with a note. An object is not converted if its name is in use by another one of
/// its kind or by an existing ClusterNetworkPolicy.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy convert policies/anp.yaml > policies/cnp.yaml
  kubectl get adminnetworkpolicies -o yaml |
    hanse policy convert - | hanse policy check -")]
pub struct Arguments {
    /// Directories or files; `-` is standard input.
    #[arg(value_name = "DIR", required = true)]
    paths: Vec<PathBuf>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Default)]
enum Format {
    #[default]
    Yaml,
    Json,
}

/// The objects that were read.
#[derive(Default)]
struct Read {
    converted: Vec<Converted>,
    refused: usize,
    /// Number of objects of other kinds.
    others: usize,
    /// Existing ClusterNetworkPolicies, by name.
    present: HashMap<String, String>,
}

struct Converted {
    /// File and line.
    place: String,
    kind: String,
    object: Value,
}

impl Converted {
    /// `None` if an API server generates the name.
    fn name(&self) -> Option<&str> {
        self.object["metadata"]["name"].as_str()
    }

    fn is_baseline(&self) -> bool {
        self.kind == BASELINE_KIND
    }
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        // Printed at the end, so that a closed pipe does not hide errors.
        let mut out = Vec::new();
        let mut read = Read::default();
        for path in &self.paths {
            let files = if path == Path::new("-") { vec![path.clone()] } else { listed(path)? };
            for file in files {
                let bytes = match file == Path::new("-") {
                    true => hanse_api::files::read_stdin_bytes().context("read standard input")?,
                    false => read_file(&file).with_context(|| format!("read {}", file.display()))?,
                };
                convert(&file.to_string_lossy(), &bytes, &mut read);
            }
        }
        let format = match self.output {
            Format::Yaml => output::Format::Yaml,
            Format::Json => output::Format::Json,
        };
        let mut converted = 0;
        for object in with_own_names(&mut read) {
            converted += 1;
            output::write(&mut out, format, &object)?;
        }
        let Read { refused, others, .. } = read;
        output::note(format_args!(
            "{converted} converted, {refused} refused, {} of other kinds omitted",
            output::count(others, "object")
        ));
        if converted + refused == 0 {
            output::error(&anyhow::anyhow!("no AdminNetworkPolicy or BaselineAdminNetworkPolicy found"), 1);
        }
        let printed = output::stdout().write_all(&out).map_err(anyhow::Error::from);
        output::exit(printed, converted == 0 || refused > 0)
    }
}

fn convert(file: &str, bytes: &[u8], read: &mut Read) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        read.refused += 1;
        output::note(format_args!("{file}:1: not UTF-8"));
        return;
    };
    for document in document::documents(text) {
        match document {
            Ok(document) => convert_node(file, document.root(), read),
            Err(error) => {
                read.refused += 1;
                let template = if text.contains("{{") { "; a template is to be rendered first" } else { "" };
                output::note(format_args!("{file}:{}: {error}{template}", error.line));
            }
        }
    }
}

fn convert_node(file: &str, node: Node<'_>, read: &mut Read) {
    if let Some(items) = items(node) {
        match items {
            Ok(items) => items.for_each(|item| convert_node(file, item, read)),
            Err(error) => {
                read.refused += 1;
                output::note(format_args!("{file}:{}: malformed: {error}", node.line()));
            }
        }
        return;
    }
    let field = |name: &str| node.child(name).and_then(Node::text).unwrap_or_default();
    let (api_version, kind) = (field("apiVersion"), field("kind"));
    let name = node.child("metadata").and_then(|it| it.child("name")).and_then(Node::text).unwrap_or_default();
    let place = format!("{file}:{}", node.line());
    if !is_convertible(api_version, kind) {
        read.others += 1;
        if (api_version, kind) == (CLUSTER_API_VERSION, CLUSTER_KIND) {
            read.present.entry(name.to_owned()).or_insert(place);
        }
        return;
    }
    let converted = to_cluster_network_policy(node).and_then(|object| {
        // The result must pass `hanse policy check`.
        let mut checked = Manifests::default();
        read_bytes(&Arc::from(file), object.to_string().as_bytes(), &mut checked);
        let errors: Vec<Unconvertible> = checked.diagnostics.into_iter().map(as_written).collect();
        if errors.is_empty() { Ok(object) } else { Err(errors) }
    });
    match converted {
        Ok(object) => read.converted.push(Converted { place, kind: kind.to_owned(), object }),
        Err(errors) => {
            read.refused += 1;
            let mut locator = Locator::new(node);
            for error in errors {
                let line = locator.line_of(&error.field().path);
                output::note(format_args!("{file}:{line}: {kind} {name}: {error}"));
            }
        }
    }
}

/// The objects with unique names. The others are counted as refused.
fn with_own_names(read: &mut Read) -> Vec<Value> {
    let all = std::mem::take(&mut read.converted);
    let of_admins = all.iter().filter(|it| !it.is_baseline()).filter_map(Converted::name);
    let admins: HashSet<String> = of_admins.map(str::to_owned).collect();
    let mut taken: HashMap<String, String> =
        read.present.drain().map(|(name, place)| (name, format!("{CLUSTER_KIND} at {place}"))).collect();
    let mut written = Vec::new();
    for mut converted in all {
        let Converted { place, kind, .. } = &converted;
        let (place, kind) = (place.clone(), kind.clone());
        if let Some(name) = converted.name().map(str::to_owned) {
            let renamed = converted.is_baseline() && admins.contains(&name);
            let new = if renamed { format!("{name}-baseline") } else { name.clone() };
            if let Some(other) = taken.get(&new) {
                read.refused += 1;
                output::note(format_args!(
                    "{place}: {kind} {name}: not written: ClusterNetworkPolicy {new} would replace the {other}; rename one \
                     of them"
                ));
                continue;
            }
            if renamed {
                output::note(format_args!(
                    "{place}: note: {kind} {name} is written as ClusterNetworkPolicy {new}: an AdminNetworkPolicy has its name"
                ));
                converted.object["metadata"]["name"] = new.as_str().into();
            }
            taken.insert(new, format!("{kind} at {place}"));
        }
        written.push(converted.object);
    }
    written
}

/// The error of a converted object, at the field of the original: its `protocols` were `ports`, with other parts. A
/// ClusterNetworkPolicy may have fewer of them.
fn as_written(diagnostic: Diagnostic) -> Unconvertible {
    let Diagnostic { field: path, message, .. } = diagnostic;
    match path.split_once(".protocols") {
        None => Unconvertible::Malformed(FieldError { path, message }),
        Some((rule, "")) => Unconvertible::NoEquivalent(FieldError { path: format!("{rule}.ports"), message }),
        Some((rule, protocol)) => {
            let index = protocol.split_inclusive(']').next().unwrap_or_default();
            Unconvertible::Malformed(FieldError { path: format!("{rule}.ports{index}"), message })
        }
    }
}

/// # Errors
/// When the path, or something below it, cannot be read.
fn listed(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let listing = list(path)?;
    match listing.unread.into_iter().next() {
        Some(unread) => Err(unread.into()),
        None => Ok(listing.files),
    }
}
