//! Calico v3 kinds, `projectcalico.org/v3`, and the same as stored under `crd.projectcalico.org/v1`.

use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind};
use hanse_policy::model::{self, ClusterScope, Order, Phase, Policy, PolicyId, PolicyKind, TierDefault, TierId};
use hanse_policy::selector::{Selector, build};
use serde::Deserialize;

use crate::decode::{null_as_default, typed};
use crate::diagnostic::Reference;
use crate::document::Node;
use crate::field::{Errors, FieldError, Path};
use crate::label_selector::LabelSelector;
use crate::metadata::{Metadata, check_metadata};
use crate::names::{NAME_RULE, is_subdomain};
use crate::network_policy::{self, EgressRule, IngressRule};
use crate::policy::LocalPolicy;
use crate::policy_fields::{
    TIER_NAME_RULE, check_order, check_part_name, convert_default_action, convert_staged_action, convert_types,
    peers_scope,
};
use crate::rule::{self, Context, RuleSpec, RulesOf};

pub const API_VERSION: &str = "projectcalico.org/v3";
pub const CRD_API_VERSION: &str = "crd.projectcalico.org/v1";

#[derive(Debug, Clone, PartialEq, Deserialize)]
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
    pub _status: serde::de::IgnoredAny,
    /// It is written as Calico stores it.
    #[serde(skip)]
    pub stored: bool,
}

#[derive(Debug, Clone, PartialEq)]
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
/// `has_accepted_metadata`: see [`Errors::with_accepted_metadata`].
pub fn read(
    reference: &Reference,
    kind: &str,
    node: Node<'_>,
    has_accepted_metadata: bool,
) -> Result<Option<CalicoObject>, Vec<FieldError>> {
    let Some(mut object) = read_kind(reference, kind, node)? else { return Ok(None) };
    if reference.api_version == CRD_API_VERSION {
        object.mark_as_stored().or_else(|error| {
            if has_accepted_metadata {
                return Ok(());
            }
            let message = format!("{METADATA_ANNOTATION} is not metadata in JSON: {error}");
            Err(vec![FieldError { path: "metadata.annotations".to_owned(), message }])
        })?;
        return Ok(Some(object));
    }
    let Some(spec) = node.child("spec") else {
        return Err(vec![FieldError { path: "spec".to_owned(), message: "is missing".to_owned() }]);
    };
    let rest = fields_beside_delete(&object, spec);
    if rest.is_empty() { Ok(Some(object)) } else { Err(rest) }
}

/// A staged deletion names what it deletes: a spec says nothing beside its tier.
fn fields_beside_delete(object: &CalicoObject, spec: Node<'_>) -> Vec<FieldError> {
    let (action, known): (_, &[&str]) = match object {
        CalicoObject::Policy(_, policy) => (&policy.spec.staged_action, &["stagedAction", "tier"]),
        CalicoObject::StagedKubernetes(policy) => (&policy.spec.staged_action, &["stagedAction"]),
        CalicoObject::Tier(_) | CalicoObject::NetworkSet { .. } => return Vec::new(),
    };
    if action.as_deref() != Some("Delete") {
        return Vec::new();
    }
    let given = spec.fields().filter(|(name, value)| !known.contains(name) && !is_zero(name, *value));
    let error = |(name, _): (&str, Node<'_>)| FieldError {
        path: format!("spec.{name}"),
        message: "must be left out where stagedAction is Delete".to_owned(),
    };
    given.map(error).collect()
}

/// Whether a field of a spec has its zero value: the type has it too where nothing is written.
fn is_zero(name: &str, value: Node<'_>) -> bool {
    match value.to_value() {
        serde_json::Value::Null | serde_json::Value::Bool(false) => true,
        serde_json::Value::String(text) => text.is_empty(),
        serde_json::Value::Object(fields) => name == "podSelector" && fields.is_empty(),
        _ => false,
    }
}

/// What Calico stores in its CRDs keeps there what the v3 object's metadata says.
const METADATA_ANNOTATION: &str = "projectcalico.org/metadata";
/// What the name of a policy of the tier `default` starts with where Calico stores it.
const DEFAULT_TIER_PREFIX: &str = "default.";

/// The v3 name of a stored policy whose annotation has no name.
pub fn name_of_stored(name: &str) -> &str {
    name.strip_prefix(DEFAULT_TIER_PREFIX).unwrap_or(name)
}

/// Puts the v3 object's metadata in the place of the stored one's: its name, and labels and annotations over those that
/// are beside it (older versions store them there). Of a policy whose annotation has no name, the name is the stored
/// one without its tier `default`.
fn restore_metadata(metadata: &mut Metadata, is_policy: bool) -> Result<(), serde_json::Error> {
    let Some(text) = metadata.annotations.remove(METADATA_ANNOTATION) else { return Ok(()) };
    let v3: Metadata = serde_json::from_str::<Option<_>>(&text)?.unwrap_or_default();
    if is_subdomain(&v3.name) {
        metadata.name = v3.name;
    } else if let Some(name) =
        metadata.name.strip_prefix(DEFAULT_TIER_PREFIX).filter(|_| is_policy && v3.name.is_empty())
    {
        metadata.name = name.to_owned();
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
    Policy(Box<LocalPolicy>),
    NetworkSet(EndpointId, Box<Endpoint>),
}

impl CalicoObject {
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        match self {
            Self::Tier(tier) => &mut tier.metadata,
            Self::Policy(_, policy) => &mut policy.metadata,
            Self::StagedKubernetes(policy) => &mut policy.metadata,
            Self::NetworkSet { set, .. } => &mut set.metadata,
        }
    }

    /// Reads its metadata as Calico stores it, and its spec from now on.
    fn mark_as_stored(&mut self) -> Result<(), serde_json::Error> {
        let (metadata, stored, is_policy) = match self {
            Self::Tier(it) => (&mut it.metadata, &mut it.stored, false),
            Self::Policy(_, it) => (&mut it.metadata, &mut it.stored, true),
            Self::StagedKubernetes(it) => (&mut it.metadata, &mut it.stored, false),
            Self::NetworkSet { set: it, .. } => (&mut it.metadata, &mut it.stored, false),
        };
        *stored = true;
        restore_metadata(metadata, is_policy)
    }

    fn is_stored(&self) -> bool {
        match self {
            Self::Tier(it) => it.stored,
            Self::Policy(_, it) => it.stored,
            Self::StagedKubernetes(it) => it.stored,
            Self::NetworkSet { set: it, .. } => it.stored,
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

    /// What Calico enforces of a stored object is not judged as an author's is: `errors` has only what has no meaning.
    pub fn convert(&self, errors: &mut Errors) -> Converted {
        if !self.is_stored() {
            return self.convert_by(errors);
        }
        let mut of_stored = Errors::of_stored().with_accepted_metadata(errors.has_accepted_metadata());
        let converted = self.convert_by(&mut of_stored);
        errors.0.append(&mut of_stored.0);
        converted
    }

    fn convert_by(&self, errors: &mut Errors) -> Converted {
        match self {
            Self::Tier(tier) => Converted::Tier(convert_tier(tier, errors)),
            Self::Policy(kind, policy) => Converted::Policy(Box::new(convert_policy(*kind, policy, errors))),
            Self::StagedKubernetes(policy) => Converted::Policy(Box::new(convert_staged_kubernetes(policy, errors))),
            Self::NetworkSet { global, set } => {
                let path = Path::Root("spec");
                let nets = rule::convert_set(&set.spec.nets, &path.field("nets"), errors);
                check_metadata(&set.metadata, errors);
                if set.metadata.labels.contains_key(build::NAMESPACE) && !errors.has_accepted_metadata() {
                    errors.refuse(&Path::Root("metadata.labels"), format!("\"{}\" may not be set", build::NAMESPACE));
                }
                let namespace = (!global).then(|| set.metadata.namespace());
                let labels = set.metadata.labels.clone();
                let id =
                    EndpointId { kind: EndpointKind::NetworkSet, namespace, name: set.metadata.name.as_str().into() };
                Converted::NetworkSet(id, Box::new(Endpoint { nets, labels: labels.into(), ..Endpoint::default() }))
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
    check_order(tier.spec.order, &path, errors);
    let id = TierId { phase: Phase::Local, name: name.into() };
    if errors.is_stored() {
        // Whatever is not Pass denies.
        let default = match tier.spec.default_action.as_deref() {
            Some("Pass") => TierDefault::Pass,
            _ => TierDefault::Deny,
        };
        return model::Tier { id, order: Order(tier.spec.order), default };
    }
    check_part_name(name, TIER_NAME_RULE, errors);
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
    model::Tier { id, order: Order(order), default }
}

fn convert_policy(kind: PolicyKind, policy: &Resource<PolicySpec>, errors: &mut Errors) -> LocalPolicy {
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
            errors.refuse(&path.field(name), "is a field of GlobalNetworkPolicy only");
        }
    }
    if spec.staged_action.is_some() && !is_staged {
        errors.refuse(&path.field("stagedAction"), "is a field of the staged kinds only");
    }
    check_metadata(&policy.metadata, errors);
    check_policy_name(policy.metadata.name.as_str(), is_global, errors);
    if !spec.tier.is_empty() && !is_subdomain(&spec.tier) {
        errors.refuse(&path.field("tier"), format!("\"{}\" is not a name: {NAME_RULE}", spec.tier));
    }
    let hints_path = path.field("performanceHints");
    for (index, hint) in spec.performance_hints.iter().enumerate() {
        if hint != "AssumeNeededOnEveryNode" {
            errors.refuse(&hints_path.index(index), format!("\"{hint}\" is not AssumeNeededOnEveryNode"));
        }
    }
    rule::refuse_duplicates(&spec.performance_hints, &hints_path, errors);
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
        rule::note_selector(text, &path, errors)
    };
    let namespaces = selector(&spec.namespace_selector, "namespaceSelector");
    let accounts = selector(&spec.service_account_selector, "serviceAccountSelector");
    let own = selector(&spec.selector, "selector");
    let subject = [
        namespace.as_deref().map(build::in_namespace),
        namespaces.filter(|_| is_global).map(|selector| build::subject_in_namespaces(&selector.expr)),
        accounts.map(|selector| build::with_service_account(&selector.expr)),
        own.map(|selector| selector.expr),
    ];
    let types_path = path.field("types");
    let has = (!spec.ingress.is_empty(), !spec.egress.is_empty());
    let (ingress, egress) = convert_types(spec.types.as_deref(), has.0, has.1, &types_path, errors);
    if spec.do_not_track && spec.pre_dnat {
        errors.refuse(&path.field("preDNAT"), "is not allowed beside doNotTrack");
    }
    if (spec.do_not_track || spec.pre_dnat) && !spec.apply_on_forward {
        errors.refuse(&path.field("applyOnForward"), "must be true where doNotTrack or preDNAT is");
    }
    if spec.pre_dnat && (has.1 || spec.types.iter().flatten().any(|name| name == "Egress")) {
        errors.refuse(&path.field("preDNAT"), "is for ingress only");
    }
    check_order(spec.order, &path, errors);
    let (ingress_path, egress_path) = (path.field("ingress"), path.field("egress"));
    let ingress_rules = rule::convert_rules(&spec.ingress, RulesOf::Ingress, context, &ingress_path, errors);
    let egress_rules = rule::convert_rules(&spec.egress, RulesOf::Egress, context, &egress_path, errors);
    let staged_path = path.field("stagedAction");
    let tier = if spec.tier.is_empty() { "default" } else { spec.tier.as_str() };
    let policy = Policy {
        id: PolicyId { cluster: None, kind, namespace, name: policy.metadata.name.as_str().into() },
        tier: TierId { phase: Phase::Local, name: tier.into() },
        order: Order(spec.order),
        enforcers: ClusterScope::Local,
        selector: Selector::from(build::all_of(subject.into_iter().flatten())).with_written(rule::written_subject([
            ("selector", &spec.selector),
            ("namespaceSelector", &spec.namespace_selector),
            ("serviceAccountSelector", &spec.service_account_selector),
        ])),
        ingress: ingress.then_some(ingress_rules),
        egress: egress.then_some(egress_rules),
        staged: is_staged.then(|| convert_staged_action(spec.staged_action.as_deref(), &staged_path, errors)),
        host_only: is_global && (spec.do_not_track || spec.pre_dnat),
    };
    LocalPolicy::new(policy).with_types([has.0, has.1], "types")
}

/// One part, or two with a dot between (a tier before the name), of any length that a name may have; a namespaced one also
/// what older versions made of other systems' policies.
fn check_policy_name(name: &str, is_global: bool, errors: &mut Errors) {
    let converted = || {
        let rest = ["knp.default.", "ossg.default."].iter().find_map(|prefix| name.strip_prefix(prefix));
        !is_global && rest.is_some_and(is_subdomain)
    };
    // An invalid name is reported with the other metadata.
    if !errors.has_accepted_metadata() && is_subdomain(name) && name.matches('.').count() > 1 && !converted() {
        errors
            .refuse(&Path::Root("metadata.name"), "a policy is named by a-z 0-9 -, with a dot after the tier at most");
    }
}

fn convert_staged_kubernetes(policy: &Resource<StagedKubernetesSpec>, errors: &mut Errors) -> LocalPolicy {
    let path = Path::Root("spec");
    let StagedKubernetesSpec { pod_selector, ingress, egress, policy_types, .. } = policy.spec.clone();
    let has_no_types = policy_types.as_ref().is_some_and(Vec::is_empty);
    let spec = network_policy::Spec { pod_selector, ingress, egress, policy_types: policy_types.unwrap_or_default() };
    check_metadata(&policy.metadata, errors);
    // What Kubernetes takes for its own kind, Calico's schema refuses for this one.
    let types_path = path.field("policyTypes");
    if has_no_types {
        errors.refuse(&types_path, "is empty: name Ingress, Egress or both, or leave it out");
    }
    rule::refuse_duplicates(&spec.policy_types, &types_path, errors);
    let staged_action = policy.spec.staged_action.as_deref();
    let scope = peers_scope(&policy.metadata, errors);
    let id = PolicyId {
        cluster: None,
        kind: PolicyKind::StagedKubernetesNetworkPolicy,
        namespace: Some(policy.metadata.namespace()),
        name: Arc::from(policy.metadata.name.as_str()),
    };
    let staged = convert_staged_action(staged_action, &path.field("stagedAction"), errors);
    let converted = Policy { staged: Some(staged), ..spec.convert(id, scope, errors) };
    LocalPolicy::new(converted).with_types(spec.has_rules(), "policyTypes")
}
