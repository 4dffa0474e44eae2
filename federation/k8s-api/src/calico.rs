//! Calico v3 kinds, `projectcalico.org/v3`, and the same as stored under `crd.projectcalico.org/v1`.

use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind};
use hanse_policy::model::{
    self, ClusterName, ClusterScope, Order, Phase, Policy, PolicyId, PolicyKind, StagedAction, TierDefault, TierId,
};
use hanse_policy::selector::{Selector, build};
use serde::Deserialize;

use crate::document::Node;
use crate::field::{Errors, FieldError, Path};
use crate::hanse::{TIER_NAME_RULE, check_order, check_part_name, convert_default_action};
use crate::kubernetes::{Metadata, null_as_default};
use crate::manifest::{Reference, typed};
use crate::metadata::{NAME_RULE, check_metadata};
use crate::network_policy::{self, EgressRule, IngressRule, LabelSelector, is_subdomain, peers_scope};
use crate::rule::{self, Context, RuleSpec, RulesOf};

pub const API_VERSION: &str = "projectcalico.org/v3";
pub const CRD_API_VERSION: &str = "crd.projectcalico.org/v1";

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Resource<S: Default> {
    #[serde(rename = "apiVersion")]
    pub _api_version: serde::de::IgnoredAny,
    #[serde(rename = "kind")]
    pub _kind: serde::de::IgnoredAny,
    #[serde(default)]
    pub metadata: Metadata,
    #[serde(default = "S::default")]
    pub spec: S,
    #[serde(default, rename = "status")]
    pub _status: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Clone)]
pub enum CalicoObject {
    Tier(Resource<TierSpec>),
    /// NetworkPolicy, GlobalNetworkPolicy and their staged kinds.
    Policy(PolicyKind, Box<Resource<PolicySpec>>),
    StagedKubernetes(Box<Resource<StagedKubernetesSpec>>),
    /// NetworkSet and GlobalNetworkSet.
    NetworkSet {
        global: bool,
        set: Resource<NetworkSetSpec>,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TierSpec {
    pub order: Option<f64>,
    pub default_action: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicySpec {
    #[serde(default, deserialize_with = "null_as_default")]
    pub tier: String,
    pub order: Option<f64>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ingress: Vec<RuleSpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub egress: Vec<RuleSpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub selector: String,
    pub types: Option<Vec<String>>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub service_account_selector: String,
    /// Hints to Calico's own dataplanes; without meaning for a verdict.
    #[serde(default, deserialize_with = "null_as_default")]
    pub performance_hints: Vec<String>,
    /// Staged kinds only.
    pub staged_action: Option<String>,
    /// The global kinds only, as the four below.
    #[serde(default, deserialize_with = "null_as_default")]
    pub namespace_selector: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub do_not_track: bool,
    #[serde(default, rename = "preDNAT", deserialize_with = "null_as_default")]
    pub pre_dnat: bool,
    #[serde(default, deserialize_with = "null_as_default")]
    pub apply_on_forward: bool,
}

/// What a Kubernetes NetworkPolicy says, and what is staged of it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StagedKubernetesSpec {
    pub staged_action: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub pod_selector: LabelSelector,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ingress: Vec<IngressRule>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub egress: Vec<EgressRule>,
    pub policy_types: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSetSpec {
    #[serde(default, deserialize_with = "null_as_default")]
    pub nets: Vec<String>,
}

/// `None`: a kind of Calico that says nothing about policy.
pub fn read(reference: &Reference, kind: &str, node: Node<'_>) -> Result<Option<CalicoObject>, Vec<FieldError>> {
    let mut object = read_kind(reference, kind, node)?;
    if object.is_some() && node.child("spec").is_none() {
        return Err(vec![FieldError { path: "spec".to_owned(), message: "is missing".to_owned() }]);
    }
    if let Some(object) = object.as_mut().filter(|_| reference.api_version == CRD_API_VERSION) {
        restore_metadata(object.metadata_mut()).map_err(|error| {
            let message = format!("{METADATA_ANNOTATION} does not hold metadata as JSON: {error}");
            vec![FieldError { path: "metadata.annotations".to_owned(), message }]
        })?;
    }
    Ok(object)
}

/// What Calico stores in its CRDs keeps there what the v3 object's metadata says.
const METADATA_ANNOTATION: &str = "projectcalico.org/metadata";

/// Puts the v3 object's metadata in the place of the stored one's: its name, and labels and annotations over those that
/// stand beside it (older versions store them there).
fn restore_metadata(metadata: &mut Metadata) -> Result<(), serde_json::Error> {
    let Some(text) = metadata.annotations.remove(METADATA_ANNOTATION) else { return Ok(()) };
    let v3: Metadata = serde_json::from_str::<Option<_>>(&text)?.unwrap_or_default();
    if !v3.name.is_empty() {
        metadata.name = v3.name;
    }
    metadata.labels.extend(v3.labels);
    metadata.annotations.extend(v3.annotations);
    metadata.creation_timestamp = v3.creation_timestamp.or(metadata.creation_timestamp.take());
    Ok(())
}

fn read_kind(reference: &Reference, kind: &str, node: Node<'_>) -> Result<Option<CalicoObject>, Vec<FieldError>> {
    let policy = |kind| Ok::<_, Vec<FieldError>>(CalicoObject::Policy(kind, typed(node)?));
    let object = match kind {
        "Tier" => CalicoObject::Tier(typed(node)?),
        // Older versions store Kubernetes' own policies under this kind too, with a prefix; they are read at their source.
        "NetworkPolicy" | "StagedNetworkPolicy"
            if reference.api_version == CRD_API_VERSION && reference.name.starts_with("knp.default.") =>
        {
            return Ok(None);
        }
        "NetworkPolicy" => policy(PolicyKind::CalicoNetworkPolicy)?,
        "GlobalNetworkPolicy" => policy(PolicyKind::CalicoGlobalNetworkPolicy)?,
        "StagedNetworkPolicy" => policy(PolicyKind::StagedNetworkPolicy)?,
        "StagedGlobalNetworkPolicy" => policy(PolicyKind::StagedGlobalNetworkPolicy)?,
        "StagedKubernetesNetworkPolicy" => CalicoObject::StagedKubernetes(typed(node)?),
        "NetworkSet" => CalicoObject::NetworkSet { global: false, set: typed(node)? },
        "GlobalNetworkSet" => CalicoObject::NetworkSet { global: true, set: typed(node)? },
        _ => return Ok(None),
    };
    Ok(Some(object))
}

/// What a Calico object is in the model.
#[derive(Debug, Clone)]
pub enum Converted {
    Tier(model::Tier),
    Policy(Box<Policy>),
    NetworkSet(EndpointId, Box<Endpoint>),
}

impl CalicoObject {
    /// As the v3 object has it.
    pub fn metadata(&self) -> &Metadata {
        match self {
            Self::Tier(tier) => &tier.metadata,
            Self::Policy(_, policy) => &policy.metadata,
            Self::StagedKubernetes(policy) => &policy.metadata,
            Self::NetworkSet { set, .. } => &set.metadata,
        }
    }

    pub fn metadata_mut(&mut self) -> &mut Metadata {
        match self {
            Self::Tier(tier) => &mut tier.metadata,
            Self::Policy(_, policy) => &mut policy.metadata,
            Self::StagedKubernetes(policy) => &mut policy.metadata,
            Self::NetworkSet { set, .. } => &mut set.metadata,
        }
    }

    /// Whether its kind has a namespace; what another says of one is not looked at.
    pub fn is_namespaced(&self) -> bool {
        match self {
            Self::Tier(_) => false,
            Self::Policy(kind, _) => {
                !matches!(kind, PolicyKind::CalicoGlobalNetworkPolicy | PolicyKind::StagedGlobalNetworkPolicy)
            }
            Self::StagedKubernetes(_) => true,
            Self::NetworkSet { global, .. } => !global,
        }
    }

    pub fn convert(&self, cluster: &ClusterName, errors: &mut Errors) -> Converted {
        match self {
            Self::Tier(tier) => Converted::Tier(convert_tier(tier, errors)),
            Self::Policy(kind, policy) => Converted::Policy(Box::new(convert_policy(*kind, policy, cluster, errors))),
            Self::StagedKubernetes(policy) => {
                Converted::Policy(Box::new(convert_staged_kubernetes(policy, cluster, errors)))
            }
            Self::NetworkSet { global, set } => {
                let path = Path::Root("spec");
                let nets = rule::convert_set(&set.spec.nets, &path.field("nets"), errors);
                check_metadata(&set.metadata, errors);
                if set.metadata.labels.contains_key(build::NAMESPACE) {
                    errors.add(&Path::Root("metadata.labels"), format!("\"{}\" may not be set", build::NAMESPACE));
                }
                let namespace = (!global).then(|| set.metadata.namespace());
                let labels = set.metadata.labels.clone();
                let id =
                    EndpointId { kind: EndpointKind::NetworkSet, namespace, name: set.metadata.name.as_str().into() };
                Converted::NetworkSet(id, Box::new(Endpoint { nets, labels, ..Endpoint::default() }))
            }
        }
    }
}

/// Tiers that always exist, with what an object of their name may say.
const FIXED_TIERS: [(&str, f64, TierDefault); 3] = [
    ("default", 1_000_000.0, TierDefault::Deny),
    ("kube-admin", 1_000.0, TierDefault::Pass),
    ("kube-baseline", 10_000_000.0, TierDefault::Pass),
];

fn convert_tier(tier: &Resource<TierSpec>, errors: &mut Errors) -> model::Tier {
    let path = Path::Root("spec");
    let name = tier.metadata.name.as_str();
    check_metadata(&tier.metadata, errors);
    check_part_name(name, TIER_NAME_RULE, errors);
    check_order(tier.spec.order, &path, errors);
    let mut default = convert_default_action(tier.spec.default_action.as_deref(), &path.field("defaultAction"), errors);
    let mut order = tier.spec.order;
    if let Some((_, fixed, action)) = FIXED_TIERS.iter().find(|(known, ..)| *known == name) {
        if order != Some(*fixed) {
            errors.add(&path.field("order"), format!("the tier {name} has the order {fixed}"));
        }
        if default != *action {
            errors.add(&path.field("defaultAction"), format!("the tier {name} has the default action {action:?}"));
        }
        (order, default) = (Some(*fixed), *action);
    }
    model::Tier { id: TierId { phase: Phase::Local, name: name.into() }, order: Order(order), default }
}

/// `types` with Calico's defaults where there is none: whether the policy is of ingress, and of egress.
pub fn convert_types(
    types: Option<&[String]>,
    has_ingress: bool,
    has_egress: bool,
    path: &Path<'_>,
    errors: &mut Errors,
) -> (bool, bool) {
    let Some(types) = types else {
        return (has_ingress || !has_egress, has_egress);
    };
    if types.is_empty() {
        errors.add(path, "is empty: name Ingress, Egress or both, or leave it out");
    }
    let mut of = (false, false);
    for (index, name) in types.iter().enumerate() {
        let seen = match name.as_str() {
            "Ingress" => &mut of.0,
            "Egress" => &mut of.1,
            other => {
                errors.add(&path.index(index), format!("\"{other}\" is neither Ingress nor Egress"));
                continue;
            }
        };
        if std::mem::replace(seen, true) {
            errors.add(&path.index(index), format!("{name} stands twice"));
        }
    }
    of
}

pub fn convert_staged_action(text: Option<&str>, path: &Path<'_>, errors: &mut Errors) -> StagedAction {
    match text {
        None | Some("Set") => StagedAction::Set,
        Some("Delete") => StagedAction::Delete,
        Some("Learn") => StagedAction::Learn,
        Some("Ignore") => StagedAction::Ignore,
        Some(other) => {
            errors.add(path, format!("\"{other}\" is none of Set, Delete, Learn, Ignore"));
            StagedAction::Ignore
        }
    }
}

fn convert_policy(
    kind: PolicyKind,
    policy: &Resource<PolicySpec>,
    cluster: &ClusterName,
    errors: &mut Errors,
) -> Policy {
    let path = Path::Root("spec");
    let spec = &policy.spec;
    let is_global = matches!(kind, PolicyKind::CalicoGlobalNetworkPolicy | PolicyKind::StagedGlobalNetworkPolicy);
    let is_staged = matches!(kind, PolicyKind::StagedNetworkPolicy | PolicyKind::StagedGlobalNetworkPolicy);
    let namespace = (!is_global).then(|| policy.metadata.namespace());
    for (given, name) in [
        (!spec.namespace_selector.is_empty(), "namespaceSelector"),
        (spec.do_not_track, "doNotTrack"),
        (spec.pre_dnat, "preDNAT"),
        (spec.apply_on_forward, "applyOnForward"),
    ] {
        if given && !is_global {
            errors.add(&path.field(name), "is a field of GlobalNetworkPolicy only");
        }
    }
    if spec.staged_action.is_some() && !is_staged {
        errors.add(&path.field("stagedAction"), "is a field of the staged kinds only");
    }
    check_metadata(&policy.metadata, errors);
    check_policy_name(policy.metadata.name.as_str(), is_global, errors);
    if is_staged && spec.staged_action.as_deref() == Some("Delete") {
        let empty =
            PolicySpec { tier: spec.tier.clone(), staged_action: spec.staged_action.clone(), ..Default::default() };
        if *spec != empty {
            errors.add(&path, "may hold nothing beside tier where stagedAction is Delete");
        }
    }
    if !spec.tier.is_empty() && !is_subdomain(&spec.tier) {
        errors.add(&path.field("tier"), format!("\"{}\" is no name: {NAME_RULE}", spec.tier));
    }
    let hints_path = path.field("performanceHints");
    for (index, hint) in spec.performance_hints.iter().enumerate() {
        if hint != "AssumeNeededOnEveryNode" {
            errors.add(&hints_path.index(index), format!("\"{hint}\" is not AssumeNeededOnEveryNode"));
        }
    }
    rule::refuse_twice(&spec.performance_hints, &hints_path, errors);
    for (text, name) in [
        (&spec.selector, "selector"),
        (&spec.namespace_selector, "namespaceSelector"),
        (&spec.service_account_selector, "serviceAccountSelector"),
    ] {
        rule::refuse_global(text, &path.field(name), errors);
    }
    let scope = peers_scope(&policy.metadata, errors);
    let resolve = |_: Option<&Selector>| scope.clone();
    let context = Context { namespace: namespace.as_deref(), clusters: &resolve, federated: false };
    let mut selector = |text: &str, name: &'static str| {
        let path = path.field(name);
        (!text.is_empty()).then(|| errors.note(&path, rule::parse_selector(text))).flatten()
    };
    let namespaces = selector(&spec.namespace_selector, "namespaceSelector");
    let accounts = selector(&spec.service_account_selector, "serviceAccountSelector");
    let own = selector(&spec.selector, "selector");
    let subject = [
        namespace.as_deref().map(build::in_namespace),
        namespaces.map(|selector| build::in_namespaces(&selector.expr)),
        accounts.map(|selector| build::with_service_account(&selector.expr)),
        own.map(|selector| selector.expr),
    ];
    let types_path = path.field("types");
    let has = (!spec.ingress.is_empty(), !spec.egress.is_empty());
    let (ingress, egress) = convert_types(spec.types.as_deref(), has.0, has.1, &types_path, errors);
    if spec.do_not_track && spec.pre_dnat {
        errors.add(&path.field("preDNAT"), "may not stand beside doNotTrack");
    }
    if (spec.do_not_track || spec.pre_dnat) && !spec.apply_on_forward {
        errors.add(&path.field("applyOnForward"), "must be true where doNotTrack or preDNAT is");
    }
    if spec.pre_dnat && (has.1 || spec.types.iter().flatten().any(|name| name == "Egress")) {
        errors.add(&path.field("preDNAT"), "is for ingress only");
    }
    check_order(spec.order, &path, errors);
    let (ingress_path, egress_path) = (path.field("ingress"), path.field("egress"));
    let ingress_rules = rule::convert_rules(&spec.ingress, RulesOf::Ingress, context, &ingress_path, errors);
    let egress_rules = rule::convert_rules(&spec.egress, RulesOf::Egress, context, &egress_path, errors);
    let staged_path = path.field("stagedAction");
    let tier = if spec.tier.is_empty() { "default" } else { spec.tier.as_str() };
    Policy {
        id: PolicyId { cluster: Some(cluster.clone()), kind, namespace, name: policy.metadata.name.as_str().into() },
        tier: TierId { phase: Phase::Local, name: tier.into() },
        order: Order(spec.order),
        enforcers: ClusterScope::Local,
        selector: Selector::from(build::all_of(subject.into_iter().flatten())),
        ingress: ingress.then_some(ingress_rules),
        egress: egress.then_some(egress_rules),
        staged: is_staged.then(|| convert_staged_action(spec.staged_action.as_deref(), &staged_path, errors)),
        host_only: spec.do_not_track || spec.pre_dnat,
    }
}

/// One part, or two with a dot between (a tier before the name), of any length that a name may have; a namespaced one also
/// what older versions made of other systems' policies.
fn check_policy_name(name: &str, is_global: bool, errors: &mut Errors) {
    let converted = || {
        let rest = ["knp.default.", "ossg.default."].iter().find_map(|prefix| name.strip_prefix(prefix));
        !is_global && rest.is_some_and(is_subdomain)
    };
    // What is no name at all is complained of with the other metadata.
    if is_subdomain(name) && name.matches('.').count() > 1 && !converted() {
        errors.add(&Path::Root("metadata.name"), "a policy is named by a-z 0-9 -, with a dot after the tier at most");
    }
}

fn convert_staged_kubernetes(
    policy: &Resource<StagedKubernetesSpec>,
    cluster: &ClusterName,
    errors: &mut Errors,
) -> Policy {
    let path = Path::Root("spec");
    let StagedKubernetesSpec { pod_selector, ingress, egress, policy_types, .. } = policy.spec.clone();
    let has_no_types = policy_types.as_ref().is_some_and(Vec::is_empty);
    let spec = network_policy::Spec { pod_selector, ingress, egress, policy_types: policy_types.unwrap_or_default() };
    check_metadata(&policy.metadata, errors);
    // What Kubernetes takes for its own kind, Calico's schema refuses for this one.
    let types_path = path.field("policyTypes");
    if has_no_types {
        errors.add(&types_path, "is empty: name Ingress, Egress or both, or leave it out");
    }
    rule::refuse_twice(&spec.policy_types, &types_path, errors);
    let staged_action = policy.spec.staged_action.as_deref();
    if staged_action == Some("Delete") && spec != network_policy::Spec::default() {
        errors.add(&path, "may hold nothing else where stagedAction is Delete");
    }
    let scope = peers_scope(&policy.metadata, errors);
    let id = PolicyId {
        cluster: Some(cluster.clone()),
        kind: PolicyKind::StagedKubernetesNetworkPolicy,
        namespace: Some(policy.metadata.namespace()),
        name: Arc::from(policy.metadata.name.as_str()),
    };
    let staged = convert_staged_action(staged_action, &path.field("stagedAction"), errors);
    Policy { staged: Some(staged), ..spec.convert(id, scope, errors) }
}
