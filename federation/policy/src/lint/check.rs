//! Checks and findings.

use std::sync::Arc;

use crate::evaluate::Direction;
use crate::model::{ClusterName, PolicyId, TierId};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Probably a mistake.
    Warning,
    /// Allows more than is reasonable, or cannot have the effect that is written.
    Error,
}

/// A kind of finding. Ids are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Check {
    pub id: &'static str,
    pub name: &'static str,
    pub severity: Severity,
    /// How to fix it.
    pub advice: &'static str,
}

macro_rules! checks {
    ($($constant:ident $id:literal $name:literal $severity:ident $advice:literal)*) => {
        $(pub const $constant: Check = Check { id: $id, name: $name, severity: Severity::$severity, advice: $advice };)*
        /// Every check.
        pub const CHECKS: &[Check] = &[$($constant),*];
    };
}

checks! {
    SUBJECT_SELECTS_NOTHING "HN001" "subject-selects-nothing" Warning
        "Correct the selector, or delete the policy if its workloads are gone."
    PEER_SELECTS_NOTHING "HN002" "peer-selects-nothing" Warning
        "Correct the selector or its clusters. This rule has no effect."
    RULE_NEVER_MATCHES "HN003" "rule-never-matches" Error
        "Split the rule: no packet meets all of its conditions."
    RULE_SHADOWED "HN004" "rule-shadowed" Warning
        "Delete the rule, or move it before the rule that decides first."
    NO_DEFAULT_DENY "HN005" "namespace-without-default-deny" Warning
        "Add a policy that selects every pod of the namespace and allows nothing, or a federated one for the cluster."
    CLUSTER_WITHOUT_DEFAULT_DENY "HN006" "cluster-without-default-deny" Warning
        "Add a policy with an empty selector to a tier that denies by default. In a Baseline tier it applies only to traffic that no other policy decides."
    EGRESS_TO_WORLD "HN007" "egress-to-world" Warning
        "Restrict the destinations with a selector, nets, or a network set, for example of the image registries that are needed."
    PASS_TO_NOTHING "HN008" "pass-to-nothing" Note
        "Traffic that passes here is allowed by the profile. Add a later tier that denies it, or deny it here."
    MISSING_CLUSTER "HN009" "cluster-unknown-or-stale" Warning
        "The cluster's endpoints are unknown or absent, so Allow rules for them do not match. Correct the name, or run `hanse status` to see why the cluster is silent."
    MISSING_TIER "HN010" "tier-without-object" Warning
        "Create the tier. Without the tier object, a federated policy is not in force, and a tier of the cluster itself is evaluated last and denies."
    NOT_UNDERSTOOD "HN011" "not-understood" Error
        "Upgrade, or rewrite the rule: an Allow rule like this never matches, and a Deny or Pass rule denies everything that it may match."
    RULE_REDUNDANT "HN012" "rule-redundant" Note
        "An earlier policy has the same effect: delete the rule, unless something else depends on it."
    ONLY_LOGS "HN013" "only-logs" Warning
        "Add a rule that decides after the Log rule (Allow, Pass or Deny), or give the tier defaultAction: Pass."
    NAMESPACE_LABEL "HN014" "label-of-namespaces" Warning
        "Move the comparison into namespaceSelector."
    HOST_POLICY "HN015" "host-endpoint-policy" Note
        "Leave this policy to Calico: Hanse enforces policy on pods, not on host endpoints."
    GLOBAL_SET_OUT_OF_SCOPE "HN016" "global-set-out-of-scope" Warning
        "Add namespaceSelector: global() to this end of the rule: without it a NetworkPolicy selects in its own namespace only."
    DNS_CUT "HN017" "dns-cut-off" Warning
        "Allow egress to port 53 (UDP and TCP) of the cluster's DNS, unless these pods must not resolve names."
    NET_OF_SERVICE "HN018" "net-of-a-service" Warning
        "Select the Service's pods, or the addresses of backends that are not pods, with the port that they listen on: policy is evaluated after the Service's address and port were translated to those of a backend."
    RULES_LEFT_OUT "HN019" "rules-left-out-by-types" Error
        "Add the direction to policyTypes (types in Calico's and federated policies), or delete these rules: only that list determines which directions a policy restricts."
    PORT_NAME_UNKNOWN "HN020" "port-name-without-port" Warning
        "Correct the name or the protocol, or name the port in the pod's containers: name, number and protocol must all agree."
    EQUAL_PRIORITY "HN021" "equal-priority" Warning
        "Give the policies different priorities: the API does not define the order of policies with equal priority."
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Finding {
    pub check: Check,
    /// The cluster of the policy, or the cluster that was checked.
    pub cluster: Option<ClusterName>,
    pub about: About,
    pub message: String,
}

/// The object that a finding is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum About {
    /// With the list and the index in it, where it is one rule.
    Policy(PolicyId, Option<(Direction, u32)>),
    Tier(TierId),
    /// Of the cluster that the finding names.
    Namespace(Arc<str>),
    /// The cluster as a whole.
    Cluster,
}

/// Checks that are skipped for a cluster without known pods.
pub const NEEDING_PODS: &[Check] = &[
    SUBJECT_SELECTS_NOTHING,
    PEER_SELECTS_NOTHING,
    NO_DEFAULT_DENY,
    CLUSTER_WITHOUT_DEFAULT_DENY,
    PASS_TO_NOTHING,
    GLOBAL_SET_OUT_OF_SCOPE,
    DNS_CUT,
];
