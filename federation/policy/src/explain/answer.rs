//! The JSON format of answers.

use std::borrow::Cow;
use std::fmt::{Display, Formatter};

use super::question::QueryEnd;
use crate::evaluate::{Answer, Effect, Judgement, Step, Verdict};
use crate::model::{Action, Phase, PolicyId, PolicyKind, TierDefault};
use serde::{Deserialize, Serialize};

/// A verdict in an answer. A verdict that this version does not know cannot be read, so that it never counts as one that allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AnswerVerdict {
    Allow,
    Deny,
    /// Cases differ.
    Depends,
    /// Of a direction whose end is not a pod.
    None,
}

impl Display for AnswerVerdict {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Depends => "depends",
            Self::None => "none",
        })
    }
}

impl From<Verdict> for AnswerVerdict {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allow => Self::Allow,
            Verdict::Deny => Self::Deny,
        }
    }
}

/// The answer to one query, as a line of JSON. The keys are a contract: programs rely on them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AnswerLine<'a> {
    /// `allow` or `deny`; `depends` if it differs between possible addresses of a pod that does not run, or between backends of a service.
    pub verdict: AnswerVerdict,
    pub egress: DirectionLine<'a>,
    pub ingress: DirectionLine<'a>,
    pub staged: StagedLine<'a>,
    /// The evaluator that was used.
    pub form: Cow<'a, str>,
    /// For a live query: the members that evaluated it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub asked: Vec<Asked>,
    /// The ends that do not run: `cluster/namespace/kind/name`, why it is stopped if it is, and the labels of policies that are unknown
    /// before it runs. Rules that depend on these labels do not allow.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_running: Vec<String>,
    /// A description of what the verdict depends on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depends_on: Option<String>,
    /// The service that was queried, with an answer for each backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceLine<'a>>,
    /// Neither end is a known endpoint, so no policy applies and the verdict has no meaning.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub neither_end_known: bool,
}

/// A service, and the answers for its backends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServiceLine<'a> {
    /// `cluster/namespace/name`.
    pub name: String,
    /// The service is headless: its name resolves to the addresses of its pods, and ports are not translated.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub headless: bool,
    pub backends: Vec<BackendLine<'a>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendLine<'a> {
    pub to: QueryEnd,
    /// The port of the backend.
    pub port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<AnswerLine<'a>>,
    /// Why there is no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A member that evaluated a query, with the revisions that it had compiled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Asked {
    pub cluster: String,
    pub hub_revision: u64,
    pub local_revision: u64,
    /// Hanse's own streams in its cluster, as text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own_streams: Vec<String>,
}

/// The verdict if all staged policies were committed. The directions are set only if there are staged policies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StagedLine<'a> {
    pub verdict: AnswerVerdict,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<DirectionLine<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<DirectionLine<'a>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DirectionLine<'a> {
    /// `allow`, `deny`, or `none` if that end is not a pod.
    pub verdict: AnswerVerdict,
    trace: Vec<StepLine<'a>>,
    /// If the verdict is `depends`: the deciding steps of all cases, without duplicates. `trace` is that of the first case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    decided_by: Vec<StepLine<'a>>,
}

/// Exactly one of `rule`, `endOfTier`, `profile`, `itself` and `ownStream` is set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StepLine<'a> {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    phase: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tier: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyLine<'a>>,
    /// Zero-based index in the list of this direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rule: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    end_of_tier: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    profile: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    itself: bool,
    /// The name of one of Hanse's own streams, which are allowed before all tiers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    own_stream: Option<Cow<'a, str>>,
    action: Cow<'a, str>,
    /// Set if the effect differs from the action: `leave` (a federated Allow ends its phase), `deny-unknown` (the rule may match), or
    /// `not-enforced` (an Allow that may match and has a part that cannot be evaluated, such as HTTP: it does not allow).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    effect: Option<Cow<'a, str>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PolicyLine<'a> {
    /// Absent for a federated policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster: Option<Cow<'a, str>>,
    api_version: Cow<'a, str>,
    kind: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    namespace: Option<Cow<'a, str>>,
    name: Cow<'a, str>,
}

/// The maximum number of rules in the description of a verdict `depends`.
const MAX_REASONS: usize = 3;

impl<'a> AnswerLine<'a> {
    pub fn new(enforced: &'a Answer, pending: Option<&'a Answer>, form: &'static str) -> Self {
        Self {
            verdict: enforced.verdict.into(),
            egress: DirectionLine::new(enforced.egress.as_ref()),
            ingress: DirectionLine::new(enforced.ingress.as_ref()),
            staged: StagedLine {
                verdict: pending.unwrap_or(enforced).verdict.into(),
                egress: pending.map(|pending| DirectionLine::new(pending.egress.as_ref())),
                ingress: pending.map(|pending| DirectionLine::new(pending.ingress.as_ref())),
            },
            form: form.into(),
            asked: Vec::new(),
            not_running: Vec::new(),
            depends_on: None,
            service: None,
            neither_end_known: false,
        }
    }

    /// Combines the answers of several cases: the first one, with `depends` for verdicts that differ.
    pub fn of_all(lines: &[Self]) -> Option<Self> {
        let mut first = lines.first()?.clone();
        let verdict = |of: &dyn Fn(&Self) -> AnswerVerdict| {
            let verdict = of(&lines[0]);
            if lines.iter().all(|line| of(line) == verdict) { verdict } else { AnswerVerdict::Depends }
        };
        first.verdict = verdict(&|line| line.verdict);
        first.staged.verdict = verdict(&|line| line.staged.verdict);
        first.egress = DirectionLine::of_all(lines.iter().map(|line| &line.egress))?;
        first.ingress = DirectionLine::of_all(lines.iter().map(|line| &line.ingress))?;
        let staged = |of: &dyn Fn(&Self) -> Option<&DirectionLine<'a>>| {
            DirectionLine::of_all(lines.iter().filter_map(of)).filter(|_| lines.iter().all(|line| of(line).is_some()))
        };
        (first.staged.egress, first.staged.ingress) = (
            staged(&|line| line.staged.egress.as_ref()).or(first.staged.egress),
            staged(&|line| line.staged.ingress.as_ref()).or(first.staged.ingress),
        );
        Some(first)
    }

    /// The same, where one of Hanse's own streams came before every tier in a direction: its name.
    pub fn with_own_streams(mut self, egress: Option<&str>, ingress: Option<&str>) -> Self {
        for (own, line, staged) in [
            (egress, &mut self.egress, self.staged.egress.as_mut()),
            (ingress, &mut self.ingress, self.staged.ingress.as_mut()),
        ] {
            if let Some(name) = own {
                [Some(line), staged].into_iter().flatten().for_each(|line| *line = DirectionLine::own_stream(name));
            }
        }
        let asked = std::mem::take(&mut self.asked);
        Self { asked, ..Self::joined(Some(self.clone()), Some(self)) }
    }

    /// Egress as the source's side judged it, ingress as the destination's did; `None` where that end is not a pod.
    pub fn joined(source: Option<Self>, destination: Option<Self>) -> Self {
        let none = || DirectionLine { verdict: AnswerVerdict::None, trace: Vec::new(), decided_by: Vec::new() };
        let form = source.as_ref().or(destination.as_ref()).map_or("prepared".into(), |line| line.form.clone());
        let (egress, staged_egress) = source.map_or_else(|| (none(), None), |line| (line.egress, line.staged.egress));
        let (ingress, staged_ingress) =
            destination.map_or_else(|| (none(), None), |line| (line.ingress, line.staged.ingress));
        let verdict = |egress: &DirectionLine<'_>, ingress: &DirectionLine<'_>| {
            let is = |verdict| egress.verdict == verdict || ingress.verdict == verdict;
            match (is(AnswerVerdict::Deny), is(AnswerVerdict::Depends)) {
                (true, _) => AnswerVerdict::Deny,
                (false, true) => AnswerVerdict::Depends,
                (false, false) => AnswerVerdict::Allow,
            }
        };
        let (pending_egress, pending_ingress) =
            (staged_egress.as_ref().unwrap_or(&egress), staged_ingress.as_ref().unwrap_or(&ingress));
        let is_staged = staged_egress.is_some() || staged_ingress.is_some();
        let staged = StagedLine {
            verdict: verdict(pending_egress, pending_ingress),
            egress: is_staged.then(|| pending_egress.clone()),
            ingress: is_staged.then(|| pending_ingress.clone()),
        };
        Self {
            verdict: verdict(&egress, &ingress),
            egress,
            ingress,
            staged,
            form,
            asked: Vec::new(),
            not_running: Vec::new(),
            depends_on: None,
            service: None,
            neither_end_known: false,
        }
    }
}

impl<'a> DirectionLine<'a> {
    fn own_stream(name: &str) -> Self {
        let step = StepLine { own_stream: Some(name.to_owned().into()), action: "Allow".into(), ..StepLine::default() };
        Self { verdict: AnswerVerdict::Allow, trace: vec![step], decided_by: Vec::new() }
    }

    fn new(judgement: Option<&'a Judgement>) -> Self {
        match judgement {
            None => Self { verdict: AnswerVerdict::None, trace: Vec::new(), decided_by: Vec::new() },
            Some(judgement) => {
                let trace = judgement.trace.iter().map(step).collect();
                Self { verdict: judgement.verdict.into(), trace, decided_by: Vec::new() }
            }
        }
    }

    /// Of one direction in several cases: the first, with what decides where they differ.
    fn of_all<'l>(lines: impl Iterator<Item = &'l Self> + Clone) -> Option<Self>
    where
        'a: 'l,
    {
        let mut first = lines.clone().next()?.clone();
        if first.verdict != AnswerVerdict::Depends && lines.clone().all(|line| line.verdict == first.verdict) {
            return Some(first);
        }
        first.verdict = AnswerVerdict::Depends;
        first.decided_by.clear();
        for step in lines.flat_map(|line| match line.decided_by.is_empty() {
            true => line.trace.last().map_or(&[][..], std::slice::from_ref),
            false => &line.decided_by[..],
        }) {
            if !first.decided_by.contains(step) {
                first.decided_by.push(step.clone());
            }
        }
        Some(first)
    }

    /// What decided, for people.
    pub fn reason(&self) -> String {
        if self.verdict != AnswerVerdict::Depends {
            return self.trace.last().map_or("-".to_owned(), StepLine::reason);
        }
        let shown: Vec<String> = self.decided_by.iter().take(MAX_REASONS).map(StepLine::reason).collect();
        let more = match self.decided_by.len().saturating_sub(MAX_REASONS) {
            0 => String::new(),
            more => format!("; or {more} more"),
        };
        if shown.is_empty() { "depends".to_owned() } else { format!("depends: {}{more}", shown.join("; or ")) }
    }
}

impl StepLine<'_> {
    /// What it did, for people.
    fn reason(&self) -> String {
        let tier = self.tier.as_deref().unwrap_or_default();
        let policy = self.policy.as_ref().map(PolicyLine::title).unwrap_or_default();
        let action = match self.effect.as_deref() {
            Some("deny-unknown") => "deny (unknown)".to_owned(),
            Some(effect) => effect.to_owned(),
            None => self.action.to_lowercase(),
        };
        match self.rule {
            Some(rule) => format!("{action}: {policy} rule {rule} in tier {tier}"),
            None if self.end_of_tier => format!("{action}: end of tier {tier} after {policy}"),
            None if self.itself => format!("{action}: itself"),
            None if self.own_stream.is_some() => {
                format!("{action}: Hanse's own stream, {}", self.own_stream.as_deref().unwrap_or_default())
            }
            None => format!("{action}: profile"),
        }
    }
}

impl PolicyLine<'_> {
    fn title(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{} {namespace}/{}", self.kind, self.name),
            None => format!("{} {}", self.kind, self.name),
        }
    }
}

pub fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allow => "allow",
        Verdict::Deny => "deny",
    }
}

/// The deciding steps of several cases, each once, for display: of the direction that denies, else of one that a policy decides.
pub fn reasons<'s>(answers: impl IntoIterator<Item = &'s Answer>) -> Vec<String> {
    let mut reasons = Vec::new();
    for answer in answers {
        let directions = [answer.egress.as_ref(), answer.ingress.as_ref()];
        let by_policy = |it: &&Judgement| !matches!(it.trace.last(), Some(Step::Profile | Step::Itself) | None);
        let find = |wanted: &dyn Fn(&&Judgement) -> bool| directions.into_iter().flatten().find(wanted);
        let denied = find(&|it| it.verdict == Verdict::Deny);
        let reason = reason(denied.or_else(|| find(&by_policy)).or_else(|| find(&|_| true)));
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }
    reasons
}

/// What decided a direction, for people.
pub fn reason(judgement: Option<&Judgement>) -> String {
    DirectionLine::new(judgement).reason()
}

pub fn policy_name(id: &PolicyId) -> String {
    let (_, kind) = api(id.kind);
    match &id.namespace {
        Some(namespace) => format!("{kind} {namespace}/{}", id.name),
        None => format!("{kind} {}", id.name),
    }
}

fn step(step: &Step) -> StepLine<'_> {
    match step {
        Step::Rule { tier, policy, index, action, effect } => StepLine {
            phase: Some(phase(tier.phase).into()),
            tier: Some((&*tier.name).into()),
            policy: Some(policy_line(policy)),
            rule: Some(*index),
            action: action_name(*action).into(),
            effect: match effect {
                Effect::Acted => None,
                Effect::Left => Some("leave".into()),
                Effect::DeniedUnknown => Some("deny-unknown".into()),
                Effect::NotEnforced => Some("not-enforced".into()),
            },
            ..StepLine::default()
        },
        Step::EndOfTier { tier, last, action } => StepLine {
            phase: Some(phase(tier.phase).into()),
            tier: Some((&*tier.name).into()),
            policy: Some(policy_line(last)),
            end_of_tier: true,
            action: default_name(*action).into(),
            ..StepLine::default()
        },
        Step::Profile => StepLine { profile: Some("kubernetes".into()), action: "Allow".into(), ..StepLine::default() },
        Step::Itself => StepLine { itself: true, action: "Allow".into(), ..StepLine::default() },
    }
}

fn policy_line(id: &PolicyId) -> PolicyLine<'_> {
    let (api_version, kind) = api(id.kind);
    PolicyLine {
        cluster: id.cluster.as_deref().map(Cow::Borrowed),
        api_version: api_version.into(),
        kind: kind.into(),
        namespace: id.namespace.as_deref().map(Cow::Borrowed),
        name: (&*id.name).into(),
    }
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
        PolicyKind::StagedFederatedNetworkPolicy => ("hanse.dev/v1alpha1", "StagedFederatedNetworkPolicy"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(egress: AnswerVerdict, ingress: AnswerVerdict) -> AnswerLine<'static> {
        let direction = |verdict| DirectionLine { verdict, trace: Vec::new(), decided_by: Vec::new() };
        let mut line = AnswerLine::joined(None, None);
        (line.egress, line.ingress) = (direction(egress), direction(ingress));
        line
    }

    #[test]
    fn joined_sides_allow_only_where_no_side_denies_or_depends() {
        use AnswerVerdict::{Allow, Deny, Depends, None};
        for (egress, ingress, expected) in [
            (Allow, Allow, Allow),
            (Allow, None, Allow),
            (Deny, Allow, Deny),
            (Depends, Deny, Deny),
            (Depends, Allow, Depends),
            (Allow, Depends, Depends),
        ] {
            let joined = AnswerLine::joined(Some(line(egress, None)), Some(line(None, ingress)));
            assert_eq!((joined.verdict, joined.staged.verdict), (expected, expected), "{egress} {ingress}");
        }
    }

    #[test]
    fn unknown_verdict_cannot_be_read() {
        use serde::de::value::{Error, StrDeserializer};
        let read = |text: &str| AnswerVerdict::deserialize(StrDeserializer::<Error>::new(text));
        for verdict in [AnswerVerdict::Allow, AnswerVerdict::Deny, AnswerVerdict::Depends, AnswerVerdict::None] {
            assert_eq!(read(&verdict.to_string()), Ok(verdict));
        }
        for unknown in ["no-such-verdict", "", "Allow"] {
            assert!(read(unknown).is_err(), "{unknown:?}");
        }
    }
}
