//! Reading folders of a repository: other files beside manifests, and skipped kinds.

use std::collections::BTreeMap;
use std::path::Path;

use hanse_api::diagnostic::Diagnostic;
use hanse_api::files::list;
use hanse_api::kind::other_system;
use hanse_api::manifest::{Manifests, Skipped, read_files, read_stdin};
use hanse_api::names::is_dns_label;

use super::kustomize;

/// The namespace of objects without one.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct DefaultNamespace {
    /// Namespace of objects without one, such as those of `helm template`. Default: `default`.
    #[arg(short, long = "namespace", value_name = "NAME", value_parser = namespace)]
    namespace: Option<String>,
}

fn namespace(text: &str) -> Result<String, &'static str> {
    match is_dns_label(text) {
        true => Ok(text.to_owned()),
        false => Err("a namespace has at most 63 of a-z 0-9 -, and starts and ends with a letter or digit"),
    }
}

/// Reads a directory, a file, or standard input where `path` is `-`. Patches of kustomizations are not read.
pub fn read(path: &Path, DefaultNamespace { namespace }: &DefaultNamespace) -> anyhow::Result<Manifests> {
    let mut read = match path == Path::new("-") {
        true => read_stdin(namespace.as_deref())?,
        false => {
            let mut listing = list(path)?;
            // A file that is given by name is read, even if it is a patch.
            let patches = if path.is_dir() { kustomize::patches(&listing.files) } else { BTreeMap::new() };
            let mut skipped = Vec::new();
            listing.files.retain(|file| {
                let canonical = (!patches.is_empty()).then(|| file.canonicalize().ok()).flatten();
                let kustomization = canonical.and_then(|file| patches.get(&file));
                skipped.extend(kustomization.map(|kustomization| kustomize::patch(file, kustomization)));
                kustomization.is_none()
            });
            let mut read = read_files(path, listing, namespace.as_deref());
            read.diagnostics.extend(skipped);
            read
        }
    };
    kustomize::explain(&mut read);
    Ok(read)
}

/// The message for a source without manifests.
pub fn no_manifests(path: &Path) -> String {
    match path == Path::new("-") {
        true => "standard input: no objects found".to_owned(),
        false => format!("{}: no manifests (.yaml, .yml or .json) found", path.display()),
    }
}

/// Whether a diagnostic refuses an object. Documents that are not objects are notes, unless `strict`.
pub fn refuses(diagnostic: &Diagnostic, strict: bool) -> bool {
    strict || diagnostic.not_object.is_none()
}

/// Lines with the skipped kinds and the number of their objects. Network policy of other systems comes first: the cluster
/// enforces it, and the answers do not include it.
pub fn skipped_lines<'s>(skipped: impl Iterator<Item = &'s Skipped>) -> Vec<String> {
    let mut counts: BTreeMap<(Option<&'static str>, &str, &str), usize> = BTreeMap::new();
    for Skipped { object, .. } in skipped {
        let (api, kind) = (object.api_version.as_str(), object.kind.as_str());
        *counts.entry((other_system(api, kind), api, kind)).or_default() += 1;
    }
    let (others, rest): (Vec<_>, Vec<_>) = counts.into_iter().partition(|((system, ..), _)| system.is_some());
    let mut lines: Vec<String> = others
        .iter()
        .map(|((system, api, kind), count)| {
            let system = system.unwrap_or_default();
            format!(
                "warning: skipped {count} {kind} ({api}): network policy of {system}, which the answers do not include"
            )
        })
        .collect();
    let rest: Vec<String> = rest
        .iter()
        .map(|((_, api, kind), count)| match api.is_empty() {
            true => format!("{count} {kind}"),
            false => format!("{count} {kind} ({api})"),
        })
        .collect();
    if !rest.is_empty() {
        lines.push(format!("skipped, of kinds that Hanse does not read: {}", rest.join(", ")));
    }
    lines
}
