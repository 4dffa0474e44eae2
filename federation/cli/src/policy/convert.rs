//! `hanse policy convert`: obsolete kinds of policy into what replaced them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::ValueEnum;
use hanse_k8s_api::admin_network_policy::{Unconvertible, is_convertible, to_cluster_network_policy};
use hanse_k8s_api::document::{self, Locator, Node};
use hanse_k8s_api::field::FieldError;
use hanse_k8s_api::manifest::{self, Manifests, items, list, read_bytes, read_file};

use crate::output;

/// Rewrite AdminNetworkPolicy and BaselineAdminNetworkPolicy as ClusterNetworkPolicy.
///
/// Reads `policy.networking.k8s.io/v1alpha1` objects and prints, for each, the v1alpha2 ClusterNetworkPolicy that means
/// the same. An object that is malformed, or has a part without an equivalent, is not written: the field is named, and the
/// exit code is 1.
/// Objects of other kinds are left out and counted.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy convert policies/anp.yaml > policies/cnp.yaml
  kubectl get adminnetworkpolicies -o yaml | hanse policy convert - | hanse policy check -")]
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

/// How many objects were what.
#[derive(Default)]
struct Counts {
    converted: usize,
    refused: usize,
    others: usize,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        // Printed at the end, so that a closed pipe does not hide what was refused.
        let mut out = Vec::new();
        let mut counts = Counts::default();
        for path in &self.paths {
            let files = if path == Path::new("-") { vec![path.clone()] } else { listed(path)? };
            for file in files {
                let bytes = match file == Path::new("-") {
                    true => manifest::read_stdin_bytes().context("read standard input")?,
                    false => read_file(&file).with_context(|| format!("read {}", file.display()))?,
                };
                self.convert(&file.to_string_lossy(), &bytes, &mut counts, &mut out)?;
            }
        }
        let Counts { converted, refused, others } = counts;
        output::note(format_args!(
            "{converted} converted, {refused} refused, {} of other kinds left out",
            output::count(others, "object")
        ));
        if converted + refused == 0 {
            output::note(format_args!("error: no AdminNetworkPolicy and no BaselineAdminNetworkPolicy was found"));
        }
        let printed = output::stdout().write_all(&out).map_err(anyhow::Error::from);
        output::exit(printed, converted == 0 || refused > 0)
    }

    fn convert(
        &self,
        file: &str,
        bytes: &[u8],
        counts: &mut Counts,
        out: &mut impl std::io::Write,
    ) -> anyhow::Result<()> {
        let Ok(text) = std::str::from_utf8(bytes) else {
            counts.refused += 1;
            output::note(format_args!("{file}:1: not UTF-8"));
            return Ok(());
        };
        for document in document::documents(text) {
            match document {
                Ok(document) => self.convert_node(file, document.root(), counts, out)?,
                Err(error) => {
                    counts.refused += 1;
                    let template = if text.contains("{{") { "; a template is to be rendered first" } else { "" };
                    output::note(format_args!("{file}:{}: {error}{template}", error.line));
                }
            }
        }
        Ok(())
    }

    fn convert_node(
        &self,
        file: &str,
        node: Node<'_>,
        counts: &mut Counts,
        out: &mut impl std::io::Write,
    ) -> anyhow::Result<()> {
        if let Some(items) = items(node) {
            return match items {
                Ok(mut items) => items.try_for_each(|item| self.convert_node(file, item, counts, out)),
                Err(error) => {
                    counts.refused += 1;
                    output::note(format_args!("{file}:{}: malformed: {error}", node.line()));
                    Ok(())
                }
            };
        }
        let field = |name: &str| node.child(name).and_then(Node::text).unwrap_or_default();
        if !is_convertible(field("apiVersion"), field("kind")) {
            counts.others += 1;
            return Ok(());
        }
        let converted = to_cluster_network_policy(node).and_then(|object| {
            // What is written is what `hanse policy check` accepts.
            let mut read = Manifests::default();
            read_bytes(&Arc::from(file), object.to_string().as_bytes(), &mut read);
            let errors = read.diagnostics.into_iter().map(|it| FieldError { path: it.field, message: it.message });
            let errors: Vec<Unconvertible> = errors.map(Unconvertible::Malformed).collect();
            if errors.is_empty() { Ok(object) } else { Err(errors) }
        });
        match converted {
            Ok(object) => {
                counts.converted += 1;
                let format = match self.output {
                    Format::Yaml => output::Format::Yaml,
                    Format::Json => output::Format::Json,
                };
                output::write(out, format, &object)
            }
            Err(errors) => {
                counts.refused += 1;
                let name = node.child("metadata").and_then(|it| it.child("name")).and_then(Node::text);
                let mut locator = Locator::new(node);
                for error in errors {
                    let line = locator.line_of(&error.field().path);
                    let (kind, name) = (field("kind"), name.unwrap_or_default());
                    output::note(format_args!("{file}:{line}: {kind} {name}: {error}"));
                }
                Ok(())
            }
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
