//! Answers as they are printed.

use hanse_policy::evaluate::{Answer, Effect, Judgement, Step, Verdict};
use hanse_policy::model::{Action, Phase, PolicyId, PolicyKind, TierDefault};
use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct AnswerLine<'a> {
    verdict: &'static str,
    egress: DirectionLine<'a>,
    ingress: DirectionLine<'a>,
    staged: StagedLine<'a>,
    /// Which form of the evaluator answered.
    form: &'static str,
}

/// What would be said if staged policies were committed; where none is staged, the verdict alone.
#[derive(Debug, Serialize)]
struct StagedLine<'a> {
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    egress: Option<DirectionLine<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ingress: Option<DirectionLine<'a>>,
}

#[derive(Debug, Serialize)]
struct DirectionLine<'a> {
    verdict: &'static str,
    trace: Vec<StepLine<'a>>,
}

/// Exactly one of `rule`, `endOfTier`, `profile` and `itself` is there.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct StepLine<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tier: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyLine<'a>>,
    /// Zero-based index in the list of this direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<u32>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    end_of_tier: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<&'static str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    itself: bool,
    action: &'static str,
    /// Where the rule did something else than its action: `leave` (a federated Allow leaves to the cluster's own tiers)
    /// or `deny-unknown` (it may match, which cannot be known).
    #[serde(skip_serializing_if = "Option::is_none")]
    effect: Option<&'static str>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyLine<'a> {
    /// Absent: the federation's.
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<&'a str>,
    api_version: &'static str,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    name: &'a str,
}

impl<'a> AnswerLine<'a> {
    pub fn new(enforced: &'a Answer, pending: Option<&'a Answer>, form: &'static str) -> Self {
        Self {
            verdict: verdict(enforced.verdict),
            egress: direction(enforced.egress.as_ref()),
            ingress: direction(enforced.ingress.as_ref()),
            staged: StagedLine {
                verdict: verdict(pending.unwrap_or(enforced).verdict),
                egress: pending.map(|pending| direction(pending.egress.as_ref())),
                ingress: pending.map(|pending| direction(pending.ingress.as_ref())),
            },
            form,
        }
    }
}

pub fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allow => "allow",
        Verdict::Deny => "deny",
    }
}

/// What decided a direction, for people.
pub fn reason(judgement: Option<&Judgement>) -> String {
    match judgement.and_then(|judgement| judgement.trace.last()) {
        None => "-".to_owned(),
        Some(Step::Itself) => "allow: itself".to_owned(),
        Some(Step::Profile) => "allow: profile".to_owned(),
        Some(Step::EndOfTier { tier, last, action }) => {
            format!("{}: end of tier {} after {}", default_name(*action).to_lowercase(), tier.name, policy_name(last))
        }
        Some(Step::Rule { tier, policy, index, action, effect }) => {
            let action = match effect {
                Effect::DeniedUnknown => "deny (unknown)".to_owned(),
                Effect::Left => "leave".to_owned(),
                Effect::Acted => action_name(*action).to_lowercase(),
            };
            format!("{action}: {} rule {index} in tier {}", policy_name(policy), tier.name)
        }
    }
}

pub fn policy_name(id: &PolicyId) -> String {
    let (_, kind) = api(id.kind);
    match &id.namespace {
        Some(namespace) => format!("{kind} {namespace}/{}", id.name),
        None => format!("{kind} {}", id.name),
    }
}

fn direction(judgement: Option<&Judgement>) -> DirectionLine<'_> {
    match judgement {
        None => DirectionLine { verdict: "none", trace: Vec::new() },
        Some(judgement) => {
            DirectionLine { verdict: verdict(judgement.verdict), trace: judgement.trace.iter().map(step).collect() }
        }
    }
}

fn step(step: &Step) -> StepLine<'_> {
    match step {
        Step::Rule { tier, policy, index, action, effect } => StepLine {
            phase: Some(phase(tier.phase)),
            tier: Some(&tier.name),
            policy: Some(policy_line(policy)),
            rule: Some(*index),
            action: action_name(*action),
            effect: match effect {
                Effect::Acted => None,
                Effect::Left => Some("leave"),
                Effect::DeniedUnknown => Some("deny-unknown"),
            },
            ..StepLine::default()
        },
        Step::EndOfTier { tier, last, action } => StepLine {
            phase: Some(phase(tier.phase)),
            tier: Some(&tier.name),
            policy: Some(policy_line(last)),
            end_of_tier: true,
            action: default_name(*action),
            ..StepLine::default()
        },
        Step::Profile => StepLine { profile: Some("kubernetes"), action: "Allow", ..StepLine::default() },
        Step::Itself => StepLine { itself: true, action: "Allow", ..StepLine::default() },
    }
}

fn policy_line(id: &PolicyId) -> PolicyLine<'_> {
    let (api_version, kind) = api(id.kind);
    PolicyLine { cluster: id.cluster.as_deref(), api_version, kind, namespace: id.namespace.as_deref(), name: &id.name }
}

pub fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Guard => "Guard",
        Phase::Local => "Local",
        Phase::Baseline => "Baseline",
    }
}

pub fn default_name(action: TierDefault) -> &'static str {
    match action {
        TierDefault::Deny => "Deny",
        TierDefault::Pass => "Pass",
    }
}

fn action_name(action: Action) -> &'static str {
    match action {
        Action::Allow => "Allow",
        Action::Deny => "Deny",
        Action::Pass => "Pass",
        Action::Log => "Log",
    }
}

pub fn api(kind: PolicyKind) -> (&'static str, &'static str) {
    match kind {
        PolicyKind::KubernetesNetworkPolicy => ("networking.k8s.io/v1", "NetworkPolicy"),
        PolicyKind::ClusterNetworkPolicy => ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy"),
        PolicyKind::CalicoNetworkPolicy => ("projectcalico.org/v3", "NetworkPolicy"),
        PolicyKind::CalicoGlobalNetworkPolicy => ("projectcalico.org/v3", "GlobalNetworkPolicy"),
        PolicyKind::StagedNetworkPolicy => ("projectcalico.org/v3", "StagedNetworkPolicy"),
        PolicyKind::StagedGlobalNetworkPolicy => ("projectcalico.org/v3", "StagedGlobalNetworkPolicy"),
        PolicyKind::StagedKubernetesNetworkPolicy => ("projectcalico.org/v3", "StagedKubernetesNetworkPolicy"),
        PolicyKind::FederatedNetworkPolicy => ("hanse.dev/v1alpha1", "FederatedNetworkPolicy"),
    }
}
