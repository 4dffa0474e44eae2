//! Reading folders from Git: what is beside manifests there, and what is skipped.

use std::collections::BTreeMap;
use std::path::Path;

use hanse_k8s_api::kind::other_system;
use hanse_k8s_api::manifest::{Diagnostic, Manifests, Skipped, read_dir, read_stdin};

/// Reads a directory, a file, or standard input where `path` is `-`.
pub fn read(path: &Path) -> anyhow::Result<Manifests> {
    Ok(if path == Path::new("-") { read_stdin()? } else { read_dir(path)? })
}

/// Whether a diagnostic refuses an object. Documents that are not objects are notes, unless `strict`.
pub fn refuses(diagnostic: &Diagnostic, strict: bool) -> bool {
    strict || diagnostic.not_object.is_none()
}

/// Lines that say which kinds are skipped, and how many objects of each. Network policy of other systems comes first: the
/// cluster enforces it, and no answer takes it into account.
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
            format!("warning: skipped {count} {kind} ({api}): network policy of {system}, which no answer here takes into account")
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
        lines.push(format!("skipped, not kinds that Hanse reads: {}", rest.join(", ")));
    }
    lines
}
