//! Which kinds are read, and which look as if they were meant to be.

use crate::calico;
use crate::field::FieldError;
use crate::hanse;
use crate::manifest::Reference;

/// Every kind that is read, but for Calico's.
const READ: [(&str, &str); 12] = [
    ("v1", "Namespace"),
    ("v1", "Node"),
    ("v1", "ServiceAccount"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy"),
    (hanse::API_VERSION, "FederatedNetworkPolicy"),
    (hanse::API_VERSION, "Tier"),
    (hanse::API_VERSION, "FederatedNetworkSet"),
    (hanse::API_VERSION, "MemberCluster"),
];

/// Those of Calico, under either of its groups.
const READ_OF_CALICO: [&str; 8] = [
    "Tier",
    "NetworkPolicy",
    "GlobalNetworkPolicy",
    "StagedNetworkPolicy",
    "StagedGlobalNetworkPolicy",
    "StagedKubernetesNetworkPolicy",
    "NetworkSet",
    "GlobalNetworkSet",
];

fn read() -> impl Iterator<Item = (&'static str, &'static str)> {
    let of_calico = |api| READ_OF_CALICO.into_iter().map(move |kind| (api, kind));
    READ.into_iter().chain([calico::API_VERSION, calico::CRD_API_VERSION].into_iter().flat_map(of_calico))
}

/// Groups whose every kind is about policy: none is passed over.
const OWN_GROUPS: [&str; 2] = ["hanse.dev", "policy.networking.k8s.io"];

/// The group and the version of an `apiVersion`; the core group is empty.
fn group_and_version(api_version: &str) -> (&str, &str) {
    api_version.rsplit_once('/').unwrap_or(("", api_version))
}

/// Few letters apart, whatever their case.
fn alike(given: &str, known: &str) -> bool {
    let distance = strsim::damerau_levenshtein(&given.to_ascii_lowercase(), &known.to_ascii_lowercase());
    distance <= known.len().div_ceil(6)
}

/// Whether lists of `kind` are lists of something that is read.
pub fn is_read(kind: &str) -> bool {
    read().any(|(_, known)| known == kind)
}

/// Whether an object is of a kind that is neither read nor taken for one that is.
pub fn is_foreign(reference: &Reference) -> bool {
    let is_named = !reference.api_version.is_empty() && !reference.kind.is_empty();
    let kind = reference.kind.strip_suffix("List").filter(|kind| kind.is_empty() || is_read(kind));
    let is_read = read().any(|(api, known)| api == reference.api_version && known == reference.kind);
    is_named && kind.is_none() && !is_read && mistaken(reference).is_none()
}

/// Whether a field that is not known refuses the object: policy, and what is Hanse's own. The objects of the inventory are read
/// for the fields that policy needs.
pub fn is_strict(reference: &Reference) -> bool {
    let (group, _) = group_and_version(&reference.api_version);
    matches!(group, "networking.k8s.io" | "policy.networking.k8s.io" | "hanse.dev")
        || [calico::API_VERSION, calico::CRD_API_VERSION].contains(&reference.api_version.as_str())
}

/// What is wrong with an object of a kind that is not read, where it seems to mean one that is: to pass it over would take
/// its policy out of force. Objects of other kinds are none of our business.
pub fn mistaken(reference: &Reference) -> Option<FieldError> {
    let (group, version) = group_and_version(&reference.api_version);
    let kind = reference.kind.as_str();
    let single = kind.strip_suffix("List").unwrap_or(kind);
    let meant = read().find(|(api, known)| {
        let known_group = group_and_version(api).0;
        // The core group has no name to misspell, and kinds of every sort.
        let same_group = group == known_group || !known_group.is_empty() && alike(group, known_group);
        same_group && (single == *known || alike(single, known))
    });
    let error = |path: &str, message| Some(FieldError { path: path.to_owned(), message });
    match meant {
        Some((api, known)) if single != known => {
            error("kind", format!("\"{kind}\" is not known; did you mean {known} of {api}?"))
        }
        Some((api, _)) if group_and_version(api).0 != group => {
            error("apiVersion", format!("\"{}\" is not known; did you mean {api}?", reference.api_version))
        }
        Some((api, _)) if group_and_version(api).1 != version => {
            error("apiVersion", format!("\"{}\" is not read: write the object at {api}", reference.api_version))
        }
        _ if OWN_GROUPS.contains(&group) => {
            let others = read().filter(|(api, _)| group_and_version(api).0 == group);
            let others: Vec<String> = others.map(|(api, known)| format!("{known} of {api}")).collect();
            let others = others.join(", ");
            error("kind", format!("{kind} of {} is not read; of this group is {others}", reference.api_version))
        }
        _ => None,
    }
}
