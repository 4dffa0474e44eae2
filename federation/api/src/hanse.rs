//! The federation's own kinds, `hanse.dev/v1alpha1`.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_policy::evaluate::Direction;
use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind, LabelGrant, Labels};
use hanse_policy::model::{
    self, ClusterName, ClusterScope, Order, Phase, Policy, PolicyId, PolicyKind, StagedAction, TierId,
};
use hanse_policy::selector::{Selector, build};
use ipnet::IpNet;
use serde::Deserialize;

use crate::address::parse_net;
use crate::clusters::ClusterSelector;
use crate::decode::null_as_default;
use crate::field::{Errors, Path};
use crate::limits::{LEASE_SECONDS, MAX_MEMBER_ENTRIES, TOKEN_SECONDS};
use crate::metadata::{Metadata, check_labels, check_metadata};
use crate::names::{NAME_RULE, is_dns_label, is_subdomain};
use crate::policy::{FederatedPolicy, PeerClusters};
use crate::policy_fields::{
    TIER_NAME_RULE, check_order, check_part_name, convert_default_action, convert_staged_action, convert_types,
};
use crate::rule::{self, Context, RulesOf};

mod spec;

pub use spec::*;

pub const GROUP: &str = "hanse.dev";
pub const VERSION: &str = "v1alpha1";
pub const API_VERSION: &str = "hanse.dev/v1alpha1";

macro_rules! object {
    ($(#[$doc:meta])* $name:ident, $spec:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        pub struct $name {
            #[serde(rename = "apiVersion")]
            pub _api_version: serde::de::IgnoredAny,
            #[serde(rename = "kind")]
            pub _kind: serde::de::IgnoredAny,
            #[serde(default)]
            pub metadata: Metadata,
            #[serde(default, deserialize_with = "null_as_default")]
            pub spec: $spec,
            #[serde(default, rename = "status")]
            pub _status: serde::de::IgnoredAny,
        }
    };
}

object!(
    /// Cluster-scoped; fields mean what they mean in Calico's GlobalNetworkPolicy.
    FederatedNetworkPolicy,
    PolicySpec
);
object!(
    /// The same, not enforced: flows and commands show the verdicts as if `stagedAction` were carried out for the
    /// FederatedNetworkPolicy of the same name.
    StagedFederatedNetworkPolicy,
    PolicySpec
);
object!(
    /// A tier of the federation.
    Tier,
    TierSpec
);
object!(
    /// Nets with labels, matched by the selectors of federated policies.
    FederatedNetworkSet,
    NetworkSetSpec
);
object!(
    /// One cluster of the ClusterSet: its labels and its grants.
    MemberCluster,
    MemberClusterSpec
);
object!(
    /// The ClusterSet, for the operator: a hub without an operator has its settings from its command line.
    ClusterSet,
    ClusterSetSpec
);
object!(
    /// A request for a join token, for the operator.
    ClusterJoinToken,
    ClusterJoinTokenSpec
);

/// Label key to permitted values; `None`: any value.
pub type LabelKeys = BTreeMap<Arc<str>, Option<BTreeSet<Arc<str>>>>;

/// A cluster's grants, parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Grants {
    /// `None`: every namespace.
    pub namespaces: Option<BTreeSet<Arc<str>>>,
    pub cidrs: Vec<IpNet>,
    /// `None`: every key.
    pub labels: Option<LabelKeys>,
    pub visible_to: Option<Selector>,
    pub max_endpoints: u64,
    pub max_label_sets: u64,
    pub max_updates_per_second: u64,
}

/// Limits where a MemberCluster names none: a large cluster of 5,000 nodes with 30 pods each.
pub const DEFAULT_MAX_ENDPOINTS: u64 = 150_000;
pub const DEFAULT_MAX_LABEL_SETS: u64 = 50_000;
pub const DEFAULT_MAX_UPDATES_PER_SECOND: u64 = 10_000;

/// A MemberCluster, parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    pub name: ClusterName,
    pub labels: Labels,
    pub grants: Grants,
    pub federated_allow_final: bool,
    /// `None`: as the join token of the cluster states.
    pub acceptance: Option<ClusterAcceptance>,
}

/// Whether a cluster takes part in the ClusterSet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterAcceptance {
    /// Not yet, also when it has joined.
    Pending,
    Accepted,
    Revoked,
}

/// Label keys with this prefix are the hub's own.
pub const RESERVED_PREFIX: &str = "hanse.dev/";

/// Whether two nets have an address in common.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

impl FederatedNetworkPolicy {
    pub fn convert(&self, errors: &mut Errors) -> FederatedPolicy {
        if self.spec.staged_action.is_some() {
            errors.add(&Path::Root("spec.stagedAction"), "is a field of StagedFederatedNetworkPolicy only");
        }
        self.spec.convert(PolicyKind::FederatedNetworkPolicy, &self.metadata, None, errors)
    }
}

impl StagedFederatedNetworkPolicy {
    pub fn convert(&self, errors: &mut Errors) -> FederatedPolicy {
        let action =
            convert_staged_action(self.spec.staged_action.as_deref(), &Path::Root("spec.stagedAction"), errors);
        self.spec.convert(PolicyKind::StagedFederatedNetworkPolicy, &self.metadata, Some(action), errors)
    }
}

impl PolicySpec {
    fn convert(
        &self,
        kind: PolicyKind,
        metadata: &Metadata,
        staged: Option<StagedAction>,
        errors: &mut Errors,
    ) -> FederatedPolicy {
        check_global_metadata(metadata, errors);
        let path = Path::Root("spec");
        let spec = self;
        // Of each end of each rule, in their order.
        let selectors: RefCell<Vec<Option<Selector>>> = RefCell::default();
        let resolve = |selector: Option<&Selector>| {
            selectors.borrow_mut().push(selector.cloned());
            ClusterScope::All
        };
        let context = Context { namespace: None, clusters: &resolve, federated: true };
        for (text, name) in [
            (&spec.cluster_selector, "clusterSelector"),
            (&spec.namespace_selector, "namespaceSelector"),
            (&spec.selector, "selector"),
            (&spec.service_account_selector, "serviceAccountSelector"),
        ] {
            rule::refuse_global(text, &path.field(name), errors);
        }
        let mut selector = |text: &str, name: &'static str| {
            let path = path.field(name);
            (!text.is_empty()).then(|| errors.note(&path, rule::parse_selector(text))).flatten()
        };
        let cluster_selector = selector(&spec.cluster_selector, "clusterSelector");
        let namespaces = selector(&spec.namespace_selector, "namespaceSelector");
        let accounts = selector(&spec.service_account_selector, "serviceAccountSelector");
        let own = selector(&spec.selector, "selector");
        let subject = build::all_of(
            [
                namespaces.map(|selector| build::in_namespaces(&selector.expr)),
                accounts.map(|selector| build::with_service_account(&selector.expr)),
                own.map(|selector| selector.expr),
            ]
            .into_iter()
            .flatten(),
        );
        let (ingress, egress) = convert_types(
            spec.types.as_deref(),
            !spec.ingress.is_empty(),
            !spec.egress.is_empty(),
            &path.field("types"),
            errors,
        );
        let ingress_rules =
            rule::convert_rules(&spec.ingress, RulesOf::Ingress, context, &path.field("ingress"), errors);
        let egress_rules = rule::convert_rules(&spec.egress, RulesOf::Egress, context, &path.field("egress"), errors);
        check_order(spec.order, &path, errors);
        if spec.tier.is_empty() {
            errors.add(&path.field("tier"), "is missing: name a Tier of the federation");
        } else if !is_dns_label(&spec.tier) {
            errors.add(&path.field("tier"), format!("\"{}\" is not a tier's name: {TIER_NAME_RULE}", spec.tier));
        }
        let policy = Policy {
            id: PolicyId { cluster: None, kind, namespace: None, name: metadata.name.as_str().into() },
            tier: TierId { phase: Phase::Guard, name: spec.tier.as_str().into() },
            order: Order(spec.order),
            enforcers: ClusterScope::All,
            selector: Selector::from(subject).with_written(rule::written_subject([
                ("selector", &spec.selector),
                ("namespaceSelector", &spec.namespace_selector),
                ("serviceAccountSelector", &spec.service_account_selector),
            ])),
            ingress: ingress.then_some(ingress_rules),
            egress: egress.then_some(egress_rules),
            staged,
            host_only: false,
        };
        let text = |text: &str| Arc::from(text);
        let enforcers =
            cluster_selector.map(|selector| ClusterSelector { text: text(&spec.cluster_selector), selector });
        let peers = spec.peers(selectors.into_inner());
        let has_rules = [!spec.ingress.is_empty(), !spec.egress.is_empty()];
        FederatedPolicy::new(policy, enforcers, peers).with_types(has_rules, "types")
    }

    /// The peers that are limited to some clusters. `selectors`: of each end of each rule.
    fn peers(&self, selectors: Vec<Option<Selector>>) -> Vec<PeerClusters> {
        let mut selectors = selectors.into_iter();
        let mut peers = Vec::new();
        for (direction, rules) in [(Direction::Ingress, &self.ingress), (Direction::Egress, &self.egress)] {
            for (rule, spec) in rules.iter().enumerate() {
                for (is_source, end) in [(true, &spec.source), (false, &spec.destination)] {
                    if let Some(selector) = selectors.next().flatten() {
                        let text = end.cluster_selector.as_deref().unwrap_or_default().into();
                        let clusters = ClusterSelector { text, selector };
                        peers.push(PeerClusters { direction, rule, is_source, clusters });
                    }
                }
            }
        }
        peers
    }
}

/// The federation has no namespaces.
fn check_global_metadata(metadata: &Metadata, errors: &mut Errors) {
    check_metadata(metadata, errors);
    if metadata.namespace.as_deref().is_some_and(|namespace| !namespace.is_empty()) {
        errors.add(&Path::Root("metadata.namespace"), "objects of the federation have none");
    }
}

impl Tier {
    pub fn convert(&self, errors: &mut Errors) -> model::Tier {
        check_global_metadata(&self.metadata, errors);
        check_part_name(&self.metadata.name, TIER_NAME_RULE, errors);
        let path = Path::Root("spec");
        let phase = match self.spec.phase.as_str() {
            "" | "Guard" => Phase::Guard,
            "Baseline" => Phase::Baseline,
            other => {
                errors.add(&path.field("phase"), format!("\"{other}\" is neither Guard nor Baseline"));
                Phase::Guard
            }
        };
        check_order(self.spec.order, &path, errors);
        model::Tier {
            id: TierId { phase, name: self.metadata.name.as_str().into() },
            order: Order(self.spec.order),
            default: convert_default_action(self.spec.default_action.as_deref(), &path.field("defaultAction"), errors),
        }
    }
}

impl FederatedNetworkSet {
    pub fn convert(&self, errors: &mut Errors) -> (EndpointId, Endpoint) {
        check_global_metadata(&self.metadata, errors);
        let path = Path::Root("spec");
        let nets = rule::convert_set(&self.spec.nets, &path.field("nets"), errors);
        let endpoint = Endpoint { nets, labels: self.metadata.labels.clone().into(), ..Endpoint::default() };
        let name = self.metadata.name.as_str().into();
        (EndpointId { kind: EndpointKind::NetworkSet, namespace: None, name }, endpoint)
    }
}

impl MemberCluster {
    pub fn convert(&self, errors: &mut Errors) -> Member {
        let path = Path::Root("spec");
        let name = self.metadata.name.as_str();
        check_global_metadata(&self.metadata, errors);
        check_part_name(name, "must be a DNS label: at most 63 of a-z 0-9 -", errors);
        check_labels(&self.spec.labels, &path.field("labels"), errors);
        let grants_path = path.field("grants");
        let grants = &self.spec.grants;
        let cidrs_path = grants_path.field("cidrs");
        let mut cidrs: Vec<IpNet> = Vec::new();
        for (index, text) in grants.cidrs.iter().enumerate() {
            let path = cidrs_path.index(index);
            let Some(net) = errors.note(&path, parse_net(text)) else { continue };
            if text.parse::<IpNet>().is_ok_and(|written| written.trunc() != written) {
                errors.add(&path, format!("\"{text}\" has bits beyond its prefix; did you mean {net}?"));
            }
            if let Some(other) = cidrs.iter().find(|other| overlap(other, &net)) {
                errors.add(&path, format!("\"{text}\" overlaps with {other}"));
            }
            cidrs.push(net);
        }
        let lists = [
            (self.spec.labels.len(), path.field("labels")),
            (grants.namespaces.len(), grants_path.field("namespaces")),
            (grants.cidrs.len(), cidrs_path),
            (grants.labels.as_ref().map_or(0, BTreeMap::len), grants_path.field("labels")),
        ];
        for (entries, path) in lists.iter().filter(|(entries, _)| *entries > MAX_MEMBER_ENTRIES) {
            errors.add(path, format!("has {entries} entries; {MAX_MEMBER_ENTRIES} are allowed"));
        }
        for key in self.spec.labels.keys().filter(|key| key.starts_with(RESERVED_PREFIX)) {
            errors.add(&path.field("labels"), format!("\"{key}\" is the hub's and cannot be set"));
        }
        let labels_path = grants_path.field("labels");
        let named = |values: &[String]| -> Option<BTreeSet<Arc<str>>> {
            let any = values.iter().any(|value| value == "*");
            (!any).then(|| values.iter().map(|value| value.as_str().into()).collect())
        };
        let labels = grants.labels.as_ref().map(|labels| {
            for key in labels.keys().filter(|key| key.starts_with(RESERVED_PREFIX)) {
                errors
                    .add(&labels_path, format!("\"{key}\": keys under hanse.dev/ are the hub's and cannot be granted"));
            }
            labels.iter().map(|(key, values)| (key.as_str().into(), named(values))).collect()
        });
        let visible_path = grants_path.field("visibleTo");
        let visible_path = visible_path.field("clusterSelector");
        let visible_to = grants
            .visible_to
            .as_ref()
            .and_then(|visible| errors.note(&visible_path, rule::parse_selector(&visible.cluster_selector)));
        let federated_allow_final = match self.spec.federated_allow.as_str() {
            "" | "Pass" => false,
            "Final" => true,
            other => {
                errors.add(&path.field("federatedAllow"), format!("\"{other}\" is neither Pass nor Final"));
                false
            }
        };
        grants.limits.check(&grants_path.field("limits"), errors);
        let acceptance = match self.spec.acceptance.as_str() {
            "" => None,
            "Pending" => Some(ClusterAcceptance::Pending),
            "Accepted" => Some(ClusterAcceptance::Accepted),
            "Revoked" => Some(ClusterAcceptance::Revoked),
            other => {
                let message = format!("\"{other}\" is not one of Pending, Accepted, Revoked");
                errors.add(&path.field("acceptance"), message);
                None
            }
        };
        Member {
            name: name.into(),
            labels: self.spec.labels.clone(),
            grants: Grants {
                namespaces: named(&grants.namespaces),
                cidrs,
                labels,
                visible_to,
                max_endpoints: grants.limits.endpoints.unwrap_or(DEFAULT_MAX_ENDPOINTS),
                max_label_sets: grants.limits.label_sets.unwrap_or(DEFAULT_MAX_LABEL_SETS),
                max_updates_per_second: grants.limits.updates_per_second.unwrap_or(DEFAULT_MAX_UPDATES_PER_SECOND),
            },
            federated_allow_final,
            acceptance,
        }
    }
}

/// The largest number that every reader of JSON reads exactly.
const MAX_LIMIT: u64 = (1 << 53) - 1;

impl LimitsSpec {
    fn check(&self, path: &Path<'_>, errors: &mut Errors) {
        for (limit, name) in [
            (self.endpoints, "endpoints"),
            (self.label_sets, "labelSets"),
            (self.updates_per_second, "updatesPerSecond"),
        ] {
            if let Some(limit) = limit.filter(|limit| *limit > MAX_LIMIT) {
                errors.add(&path.field(name), format!("{limit} is more than {MAX_LIMIT}"));
            }
        }
    }
}

fn check_seconds(seconds: Option<u64>, within: &std::ops::RangeInclusive<u64>, path: &Path<'_>, errors: &mut Errors) {
    if let Some(seconds) = seconds.filter(|seconds| !within.contains(seconds)) {
        errors.add(path, format!("{seconds} is not between {} and {}", within.start(), within.end()));
    }
}

impl ClusterSet {
    /// Checks the fields. The operator reads them.
    pub fn check(&self, errors: &mut Errors) {
        check_global_metadata(&self.metadata, errors);
        let path = Path::Root("spec");
        let domain = &self.spec.trust_domain;
        // SPIFFE-ID, section 2.1.
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        if domain.is_empty() {
            errors.add(&path.field("trustDomain"), "is missing");
        } else if domain.len() > 255 || !domain.bytes().all(allowed) {
            let message = format!("\"{domain}\" is not a trust domain: at most 255 of a-z 0-9 . - _");
            errors.add(&path.field("trustDomain"), message);
        }
        check_seconds(self.spec.lease_seconds, &LEASE_SECONDS, &path.field("leaseSeconds"), errors);
        if let Some(defaults) = &self.spec.defaults {
            let path = path.field("defaults");
            defaults.limits.check(&path.field("limits"), errors);
            check_seconds(defaults.join_token_seconds, &TOKEN_SECONDS, &path.field("joinTokenSeconds"), errors);
        }
    }
}

impl ClusterJoinToken {
    /// Checks the fields. The operator reads them.
    pub fn check(&self, errors: &mut Errors) {
        check_global_metadata(&self.metadata, errors);
        let path = Path::Root("spec");
        let spec = &self.spec;
        if !is_dns_label(&spec.cluster) {
            let message = format!("\"{}\" is not the name of a cluster: at most 63 of a-z 0-9 -", spec.cluster);
            errors.add(&path.field("cluster"), message);
        }
        if !is_subdomain(&spec.secret_name) {
            errors.add(&path.field("secretName"), format!("\"{}\" is not a name: {NAME_RULE}", spec.secret_name));
        }
        check_seconds(spec.lifetime_seconds, &TOKEN_SECONDS, &path.field("lifetimeSeconds"), errors);
    }
}

impl Grants {
    /// Which keys its origin may set, as matching needs it.
    pub fn label_grant(&self) -> LabelGrant {
        match &self.labels {
            None => LabelGrant::All,
            Some(keys) => LabelGrant::Keys(keys.keys().cloned().collect()),
        }
    }
}
