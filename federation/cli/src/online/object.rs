//! `hanse apply|get|delete`: the objects of the federation.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use hanse_k8s_api::document::{self, Node};
use hanse_k8s_api::manifest::{Manifests, list, read_bytes, read_file};
use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::{call, with_client};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub struct Apply {
    /// A file or a directory of manifests; may be given several times.
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct Get {
    /// FederatedNetworkPolicy, Tier, FederatedNetworkSet or MemberCluster.
    kind: String,
    /// One object; without a name all of the kind.
    name: Option<String>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct Delete {
    /// The kind, with a name behind it.
    #[arg(requires = "name", required_unless_present = "files")]
    kind: Option<String>,
    name: Option<String>,
    /// A file or a directory of manifests that name the objects; may be given several times.
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with = "kind")]
    files: Vec<PathBuf>,
}

/// The kinds in the order in which they are applied: what others name comes first.
const KINDS: [(&str, pb::ObjectKind); 4] = [
    ("MemberCluster", pb::ObjectKind::MemberCluster),
    ("Tier", pb::ObjectKind::Tier),
    ("FederatedNetworkSet", pb::ObjectKind::FederatedNetworkSet),
    ("FederatedNetworkPolicy", pb::ObjectKind::FederatedNetworkPolicy),
];

fn kind_of(text: &str) -> anyhow::Result<pb::ObjectKind> {
    let plural = |name: &str| format!("{name}s");
    let found = KINDS.iter().find(|(name, _)| {
        name.eq_ignore_ascii_case(text)
            || plural(name).eq_ignore_ascii_case(text)
            || (*name == "FederatedNetworkPolicy" && ["fnp", "federatednetworkpolicies"].contains(&text))
    });
    let names = KINDS.map(|(name, _)| name).join(", ");
    found.map(|(_, kind)| *kind).with_context(|| format!("\"{text}\" is none of {names}"))
}

fn name_of(kind: i32) -> &'static str {
    KINDS.iter().find(|(_, known)| *known as i32 == kind).map_or("object", |(name, _)| name)
}

/// One object of the federation as it is written.
struct Written {
    order: usize,
    kind: pb::ObjectKind,
    name: String,
    json: Vec<u8>,
    place: String,
}

/// Reads everything, and refuses everything when anything is wrong: half of a change is none.
fn read(files: &[PathBuf]) -> anyhow::Result<Vec<Written>> {
    let mut written = Vec::new();
    let mut checked = Manifests::default();
    for path in files {
        for path in list(path)? {
            let bytes = read_file(&path).with_context(|| format!("read {}", path.display()))?;
            let name: Arc<str> = path.to_string_lossy().into();
            read_bytes(&name, &bytes, &mut checked);
            let text = std::str::from_utf8(&bytes).unwrap_or_default();
            for node in document::parse(text).into_iter().flatten() {
                written.extend(written_object(&name, &node));
            }
        }
    }
    for skipped in &checked.skipped {
        let (place, object) = (&skipped.place, &skipped.object);
        eprintln!("{}:{}: {} is no kind of the federation, skipped", place.file, place.line, object.kind);
    }
    if !checked.diagnostics.is_empty() {
        for it in &checked.diagnostics {
            let field = if it.field.is_empty() { String::new() } else { format!("{}: ", it.field) };
            eprintln!("{}:{}: {field}{}", it.place.file, it.place.line, it.message);
        }
        bail!("{} errors; nothing was changed", checked.diagnostics.len());
    }
    written.sort_by_key(|object| object.order);
    Ok(written)
}

fn written_object(file: &str, node: &Node) -> Option<Written> {
    let kind = node.child("kind")?.text()?;
    let order = KINDS.iter().position(|(name, _)| *name == kind)?;
    let group = node.child("apiVersion")?.text()?;
    (group == hanse_k8s_api::hanse::API_VERSION).then_some(())?;
    let name = node.child("metadata")?.child("name")?.text()?.to_owned();
    let json = serde_json::to_vec(&node.to_value()).ok()?;
    Some(Written { order, kind: KINDS[order].1, name, json, place: format!("{file}:{}", node.line) })
}

impl Apply {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let objects = read(&self.files)?;
        anyhow::ensure!(!objects.is_empty(), "there is no object of the federation in what was given");
        with_client(context, |mut client| async move {
            let mut failed = false;
            for object in objects {
                let request = pb::ApplyRequest { manifest: object.json.into(), precondition: None };
                match call(client.apply(request)).await {
                    Ok(done) => {
                        let what = match done.applied() {
                            pb::Applied::Created => "created",
                            pb::Applied::Configured => "configured",
                            pb::Applied::Unchanged | pb::Applied::Unspecified => "unchanged",
                        };
                        println!("{}/{} {what} at revision {}", name_of(done.kind), done.name, done.revision);
                        for warning in done.warnings {
                            eprintln!("{}: {warning}", object.place);
                        }
                    }
                    // One bad object does not keep the rest out.
                    Err(error) => {
                        failed = true;
                        eprintln!("{}: {error:#}", object.place);
                    }
                }
            }
            Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
        })
    }
}

#[derive(Debug, Serialize)]
struct Object {
    kind: &'static str,
    name: String,
    revision: u64,
    manifest: serde_json::Value,
}

impl Get {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let kind = kind_of(&self.kind)?;
        let request = pb::GetRequest { kind: kind.into(), name: self.name.clone().unwrap_or_default() };
        let found = with_client(context, |mut client| async move { call(client.get(request)).await })?;
        if let Some(name) = self.name.filter(|_| found.objects.is_empty()) {
            bail!("there is no {} {name}", self.kind);
        }
        let objects = found.objects.into_iter().map(|object| Object {
            kind: name_of(object.kind),
            name: object.name,
            revision: object.revision,
            manifest: serde_json::from_slice(&object.manifest).unwrap_or_default(),
        });
        let objects: Vec<Object> = objects.collect();
        if self.output != Format::Table {
            output::print(self.output, &objects)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut table = output::table(["KIND", "NAME", "REVISION"]);
        for object in objects {
            table.add_row([object.kind, &object.name, &object.revision.to_string()]);
        }
        println!("{table}");
        Ok(ExitCode::SUCCESS)
    }
}

impl Delete {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let mut objects: Vec<(pb::ObjectKind, String)> = Vec::new();
        if let (Some(kind), Some(name)) = (&self.kind, &self.name) {
            objects.push((kind_of(kind)?, name.clone()));
        }
        // Policies first, what they name last.
        objects.extend(read(&self.files)?.into_iter().rev().map(|object| (object.kind, object.name)));
        with_client(context, |mut client| async move {
            let mut failed = false;
            for (kind, name) in objects {
                let request = pb::DeleteRequest { kind: kind.into(), name: name.clone() };
                match call(client.delete(request)).await {
                    Ok(done) => println!("{}/{name} deleted at revision {}", name_of(kind.into()), done.revision),
                    Err(error) => {
                        failed = true;
                        eprintln!("{}/{name}: {error:#}", name_of(kind.into()));
                    }
                }
            }
            Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
        })
    }
}
