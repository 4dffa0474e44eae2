//! Several objects with one key in a folder, where the order of files means nothing: copies, patches, and the same object
//! of several environments.
//!
//! Copies that say the same to policy are one object. Of objects that differ none can be what the cluster has for certain:
//! that is a conflict, and answers without knowing which one counts are incomplete. Until it is resolved the fuller one
//! counts, since the other may be a patch of it.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::hash::Hash;

use super::duplicates::{diagnostic_of, key_of};
use crate::diagnostic::{Diagnostic, Reference, SourceLocation};
use crate::inventory::Pod;
use crate::manifest::{Manifest, Manifests};
use crate::names::owner_name;
use crate::object::Object;
use crate::workload::Workload;

/// The objects that are not used, by their positions in the list, each with a diagnostic.
#[derive(Debug, Clone, Default)]
pub struct Rivals {
    pub left_out: BTreeSet<usize>,
    /// They say the same as the one that counts.
    pub duplicates: Vec<Diagnostic>,
    /// They say something else.
    pub conflicts: Vec<Diagnostic>,
}

/// Leaves one object of each key. Returns a diagnostic of each of the others: of duplicates, and of conflicts.
pub fn settle(read: &mut Manifests) -> [Vec<Diagnostic>; 2] {
    fn retain<T>(objects: &mut Vec<T>, left_out: &BTreeSet<usize>) {
        let mut at = 0..;
        objects.retain(|_| at.next().is_some_and(|at| !left_out.contains(&at)));
    }
    let [mut objects, mut workloads] = [of_objects(&read.objects), of_workloads(&read.workloads)];
    retain(&mut read.objects, &objects.left_out);
    retain(&mut read.workloads, &workloads.left_out);
    objects.duplicates.append(&mut workloads.duplicates);
    objects.conflicts.append(&mut workloads.conflicts);
    [objects.duplicates, objects.conflicts]
}

/// Rivals among the objects of one cluster, or of the federation.
pub fn of_objects(objects: &[Manifest]) -> Rivals {
    rivals(
        objects,
        |manifest| (&manifest.location, &manifest.reference),
        |manifest| Some(key_of(manifest)),
        |manifest| manifest.fields,
        says_the_same,
    )
}

/// Rivals among the objects that make pods. One without a pod template never counts before one that has it.
pub fn of_workloads(workloads: &[Workload]) -> Rivals {
    let key = |workload: &Workload| {
        let (of, metadata) = (&workload.reference, &workload.metadata);
        let is_named = !metadata.name.is_empty();
        is_named.then(|| (metadata.namespace(), owner_name(&of.api_version, &of.kind, &metadata.name)))
    };
    let has_template = |it: &Workload| it.templates.iter().any(|template| !template.spec.containers.is_empty());
    let same =
        |a: &Workload, b: &Workload| a.templates == b.templates && a.metadata.controller == b.metadata.controller;
    rivals(workloads, |it| (&it.location, &it.reference), key, |it| (has_template(it), it.fields), same)
}

/// `key`: none of an object that has no rival.
fn rivals<T, K: Eq + Hash, R: Ord>(
    objects: &[T],
    written: impl Fn(&T) -> (&SourceLocation, &Reference),
    key: impl Fn(&T) -> Option<K>,
    fullness: impl Fn(&T) -> R,
    same: impl Fn(&T, &T) -> bool,
) -> Rivals {
    let mut rivals = Rivals::default();
    let mut counting: HashMap<K, usize> = HashMap::new();
    for (at, object) in objects.iter().enumerate() {
        let Some(key) = key(object) else { continue };
        let Some(first) = counting.get(&key).copied() else {
            counting.insert(key, at);
            continue;
        };
        let about = |at: usize, message: String| {
            let (place, reference) = written(&objects[at]);
            diagnostic_of(place, reference, "metadata.name", message)
        };
        let place = |at: usize| {
            let SourceLocation { file, line } = written(&objects[at]).0;
            format!("{file}:{line}")
        };
        if same(&objects[first], object) {
            rivals.left_out.insert(at);
            rivals.duplicates.push(about(at, format!("duplicate of {}; the first one wins", place(first))));
            continue;
        }
        let (counts, out) = match fullness(object) > fullness(&objects[first]) {
            true => (at, first),
            false => (first, at),
        };
        counting.insert(key, counts);
        rivals.left_out.insert(out);
        let message = format!(
            "conflicts with {}, a different object with the same key, which is used instead. If one is a patch, run {}",
            place(counts),
            build_with_kustomize("DIR")
        );
        rivals.conflicts.push(about(out, message));
    }
    rivals
}

/// What to run where `kustomize` makes objects of the files of a directory.
pub fn build_with_kustomize(directory: impl Display) -> String {
    format!("`kustomize build {directory} | hanse policy …` with `-` in place of the directory")
}

/// Whether two objects mean the same to policy. The time of creation does not matter.
fn says_the_same(a: &Manifest, b: &Manifest) -> bool {
    match (&a.object, &b.object) {
        (Object::Pod(a), Object::Pod(b)) => **a == Pod { created: a.created.clone(), ..Pod::clone(b) },
        (a, b) => a == b,
    }
}
