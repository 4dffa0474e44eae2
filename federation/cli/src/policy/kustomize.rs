//! Folders for `kustomize`. Hanse does not apply kustomizations: it reports the command to run, and skips patches.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use hanse_api::assemble::rivals::build_with_kustomize;
use hanse_api::document::{self, Node};
use hanse_api::files::read_file;
use hanse_api::manifest::Manifests;
use hanse_api::{Diagnostic, NotObject};

const GROUP: &str = "kustomize.config.k8s.io";
/// The file names of kustomizations.
const NAMES: [&str; 3] = ["kustomization.yaml", "kustomization.yml", "Kustomization"];

/// The patches of the kustomizations beside `files`, each with its kustomization. Paths are canonical.
pub fn patches(files: &[PathBuf]) -> BTreeMap<PathBuf, PathBuf> {
    let folders: BTreeSet<&Path> = files.iter().filter_map(|file| file.parent()).collect();
    let mut patches = BTreeMap::new();
    for folder in folders {
        for kustomization in NAMES.map(|name| folder.join(name)) {
            if !kustomization.is_file() {
                continue;
            }
            // An unreadable kustomization is reported when its folder is read.
            let bytes = read_file(&kustomization).unwrap_or_default();
            let text = std::str::from_utf8(&bytes).unwrap_or_default();
            for document in document::documents(text).flatten() {
                for path in named(document.root()) {
                    if let Ok(path) = folder.join(path).canonicalize() {
                        patches.insert(path, kustomization.clone());
                    }
                }
            }
        }
    }
    patches
}

/// The patch files of a kustomization. Inline patches have several lines, and are not files.
fn named<'d>(kustomization: Node<'d>) -> Vec<&'d str> {
    let lists = ["patches", "patchesStrategicMerge", "patchesJson6902"].map(|name| kustomization.child(name));
    let items = lists.into_iter().flatten().flat_map(Node::items);
    let path = |item: Node<'d>| item.text().or_else(|| item.child("path")?.text());
    items.filter_map(path).filter(|path| !path.is_empty() && !path.contains('\n')).collect()
}

/// The command to run instead of reading the folder of a kustomization.
fn build(kustomization: &Path) -> String {
    let folder = kustomization.parent().filter(|folder| *folder != Path::new(""));
    build_with_kustomize(folder.map_or("DIR".into(), Path::to_string_lossy))
}

/// The diagnostic of a patch, which is not read.
pub fn patch(file: &Path, kustomization: &Path) -> Diagnostic {
    let message = format!("a patch of {}, not an object: run {}", kustomization.display(), build(kustomization));
    Diagnostic { not_object: Some(NotObject::Patch), ..Diagnostic::of_file(file, message) }
}

/// Adds the command to run to the diagnostics of kustomizations.
pub fn explain(read: &mut Manifests) {
    let message = |file: &str| format!("a kustomization, which Hanse does not apply: run {}", build(Path::new(file)));
    for diagnostic in &mut read.diagnostics {
        let name = Path::new(&*diagnostic.location.file).file_name().and_then(|name| name.to_str());
        let is_without_kind = diagnostic.not_object == Some(NotObject::WithoutKind);
        if is_without_kind && name.is_some_and(|name| NAMES.contains(&name)) {
            diagnostic.message = message(&diagnostic.location.file);
        }
    }
    let of_kustomize = |api_version: &str| api_version.split('/').next() == Some(GROUP);
    let (found, rest) =
        std::mem::take(&mut read.skipped).into_iter().partition(|it| of_kustomize(&it.object.api_version));
    read.skipped = rest;
    let found: Vec<hanse_api::Skipped> = found;
    read.diagnostics.extend(found.into_iter().map(|it| Diagnostic {
        start: it.location.line,
        message: message(&it.location.file),
        location: it.location,
        field: String::new(),
        object: Some(it.object),
        not_object: Some(NotObject::WithoutKind),
    }));
}
