//! Which kinds are read, and which look as if they were meant to be.

use hanse_policy::model::PolicyKind;

use crate::admin_network_policy;
use crate::calico;
use crate::diagnostic::Reference;
use crate::field::FieldError;
use crate::hanse;

/// Every kind that is read, but for Calico's.
const READ: [(&str, &str); 15] = [
    ("v1", "Namespace"),
    ("v1", "Node"),
    ("v1", "ServiceAccount"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy"),
    (hanse::API_VERSION, "FederatedNetworkPolicy"),
    (hanse::API_VERSION, "StagedFederatedNetworkPolicy"),
    (hanse::API_VERSION, "Tier"),
    (hanse::API_VERSION, "FederatedNetworkSet"),
    (hanse::API_VERSION, "MemberCluster"),
    (hanse::API_VERSION, "ClusterSet"),
    (hanse::API_VERSION, "ClusterJoinToken"),
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

/// Kinds that are policy by their name alone, in whatever group and version they are written: in another group than their
/// own they are refused, since skipping one would take its policy out of force. `Tier` is a word of other groups too.
const UNMISTAKABLE: [&str; 11] = [
    "NetworkPolicy",
    "ClusterNetworkPolicy",
    "FederatedNetworkPolicy",
    "StagedFederatedNetworkPolicy",
    "FederatedNetworkSet",
    "GlobalNetworkPolicy",
    "StagedNetworkPolicy",
    "StagedGlobalNetworkPolicy",
    "StagedKubernetesNetworkPolicy",
    "NetworkSet",
    "GlobalNetworkSet",
];

/// Systems that have network policy of their own, and the ends of their groups. Their kinds are skipped, also those that
/// share a name with one of Hanse, such as Antrea's `NetworkPolicy`.
const OTHER_SYSTEMS: [(&str, &str); 10] = [
    ("Cilium", "cilium.io"),
    ("Antrea", "antrea.io"),
    ("Antrea", "antrea.tanzu.vmware.com"),
    ("Istio", "istio.io"),
    ("Linkerd", "linkerd.io"),
    ("Kuma", "kuma.io"),
    ("OVN-Kubernetes", "k8s.ovn.org"),
    ("OpenShift", "network.openshift.io"),
    ("GKE", "networking.gke.io"),
    ("Amazon VPC CNI", "networking.k8s.aws"),
];

/// Ends of the names of kinds that are policy, in the groups of [`OTHER_SYSTEMS`].
const POLICY_ENDINGS: [&str; 4] = ["Policy", "Authentication", "Firewall", "Permission"];

/// The system whose network policy a skipped object is: what Hanse says of the cluster does not take it into account.
pub fn other_system(api_version: &str, kind: &str) -> Option<&'static str> {
    let group = group_and_version(api_version).0;
    let of = |end: &str| group == end || group.strip_suffix(end).is_some_and(|rest| rest.ends_with('.'));
    let single = kind.strip_suffix("List").unwrap_or(kind);
    let is_policy = POLICY_ENDINGS.iter().any(|end| single.ends_with(end));
    OTHER_SYSTEMS.iter().find(|(_, end)| is_policy && of(end)).map(|(system, _)| *system)
}

/// The group and the version of an `apiVersion`; the core group is empty. A group without a version has an empty one: no
/// version contains a dot.
fn group_and_version(api_version: &str) -> (&str, &str) {
    match api_version.rsplit_once('/') {
        Some(both) => both,
        None if api_version.contains('.') => (api_version, ""),
        None => ("", api_version),
    }
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

/// Whether objects of the group of `api_version` are read, the core group aside.
pub fn is_read_group(api_version: &str) -> bool {
    let group = group_and_version(api_version).0;
    !group.is_empty() && read().any(|(api, _)| group_and_version(api).0 == group)
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

/// The kind of an enforced policy; `None` for other kinds, and for staged policies, which are not in force.
pub fn enforced_policy(reference: &Reference) -> Option<PolicyKind> {
    match (reference.api_version.as_str(), reference.kind.as_str()) {
        ("networking.k8s.io/v1", "NetworkPolicy") => Some(PolicyKind::KubernetesNetworkPolicy),
        ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy") => Some(PolicyKind::ClusterNetworkPolicy),
        (calico::API_VERSION | calico::CRD_API_VERSION, "NetworkPolicy") => Some(PolicyKind::CalicoNetworkPolicy),
        (calico::API_VERSION | calico::CRD_API_VERSION, "GlobalNetworkPolicy") => {
            Some(PolicyKind::CalicoGlobalNetworkPolicy)
        }
        (hanse::API_VERSION, "FederatedNetworkPolicy") => Some(PolicyKind::FederatedNetworkPolicy),
        _ => None,
    }
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
        _ if admin_network_policy::is_convertible(&reference.api_version, single) => {
            let message = "is obsolete: `hanse policy convert` rewrites it as a ClusterNetworkPolicy";
            error("kind", format!("{kind} of {} {message}", reference.api_version))
        }
        _ if OWN_GROUPS.contains(&group) => {
            let others = read().filter(|(api, _)| group_and_version(api).0 == group);
            let others: Vec<String> = others.map(|(api, known)| format!("{known} of {api}")).collect();
            let others = others.join(", ");
            error("kind", format!("{kind} of {} is not read; of this group is {others}", reference.api_version))
        }
        _ if UNMISTAKABLE.contains(&single) && other_system(&reference.api_version, kind).is_none() => {
            let (api, _) = read().find(|(_, known)| single == *known)?;
            error(
                "apiVersion",
                format!("\"{}\" is not known for a {single}; did you mean {api}?", reference.api_version),
            )
        }
        _ => None,
    }
}
