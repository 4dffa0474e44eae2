//! Reasons on the wire: `hanse.report.v1`.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use hanse_proto::report::v1 as pb;
use hanse_ruleset::{ChainId, EndpointId, PolicyId, SetId};

use super::{
    Agent, Behind, ExchangeProblem, Failure, FileProblem, Finding, HookProblem, Lag, MAX_TEXT_BYTES, Object, Reason,
    Rejection, Subject,
};

/// Most bytes of a name: of a DNS name, and of a kind, a namespace and a name together.
const MAX_NAME_BYTES: usize = 253;
const MAX_POLICY_NAME_BYTES: usize = 600;
/// Clusters that a policy is reported to wait for.
const MAX_CLUSTERS: usize = 10;

/// A text of at most `most` bytes.
fn cut(mut text: String, most: usize) -> String {
    const MARK: &str = "…";
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most - MARK.len()));
        text.push_str(MARK);
    }
    text
}

fn text(text: String) -> String {
    cut(text, MAX_TEXT_BYTES)
}

fn name(text: String) -> String {
    cut(text, MAX_NAME_BYTES)
}

fn id(bytes: &[u8]) -> Option<[u8; 16]> {
    bytes.try_into().ok()
}

fn bytes_of(id: [u8; 16]) -> Bytes {
    Bytes::copy_from_slice(&id)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn address_bytes(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub fn pod(of: &EndpointId) -> pb::Pod {
    pb::Pod { namespace: of.namespace.to_string(), name: of.name.to_string() }
}

pub fn parse_pod(of: pb::Pod) -> EndpointId {
    EndpointId { namespace: name(of.namespace).into(), name: name(of.name).into() }
}

pub fn object(of: &Object) -> pb::Object {
    use pb::object::Object as Wire;
    let object = match of {
        Object::Policy { id, name } => Wire::Policy(pb::Policy { id: bytes_of(id.0), name: name.to_string() }),
        Object::Set(id) => Wire::Set(bytes_of(id.0)),
        Object::Chain(id) => Wire::Chain(bytes_of(id.0)),
        Object::Endpoint(id) => Wire::Pod(pod(id)),
    };
    pb::Object { object: Some(object) }
}

/// `None`: an object that this version does not know.
pub fn parse_object(of: pb::Object) -> Option<Object> {
    use pb::object::Object as Wire;
    Some(match of.object? {
        Wire::Policy(policy) => {
            let name = cut(policy.name, MAX_POLICY_NAME_BYTES).into();
            Object::Policy { id: PolicyId(id(&policy.id)?), name }
        }
        Wire::Set(bytes) => Object::Set(SetId(id(&bytes)?)),
        Wire::Chain(bytes) => Object::Chain(ChainId(id(&bytes)?)),
        Wire::Pod(it) => Object::Endpoint(parse_pod(it)),
    })
}

pub fn rejection(of: &Rejection) -> pb::Rejection {
    pb::Rejection { error: text(of.error.clone()), set: of.set.map(|set| bytes_of(set.0)).unwrap_or_default() }
}

pub fn parse_rejection(of: pb::Rejection) -> Rejection {
    Rejection { error: text(of.error), set: id(&of.set).map(SetId) }
}

pub fn finding(of: &Finding) -> pb::Finding {
    use pb::finding::Kind;
    let (kind, address) = match of {
        // An enforced pod has no finding to report.
        Finding::Enforced | Finding::Unknown => (Kind::Unspecified, None),
        Finding::Pending => (Kind::Pending, None),
        Finding::Silent(address) => (Kind::Silent, Some(*address)),
        Finding::HostNetwork(address) => (Kind::HostNetwork, Some(*address)),
        Finding::SecondInterface(_) => (Kind::SecondInterface, None),
        Finding::Bypassed(address) => (Kind::Bypassed, Some(*address)),
        Finding::Ipvs => (Kind::Ipvs, None),
    };
    let interfaces = match of {
        Finding::SecondInterface(names) => text(names.clone()),
        _ => String::new(),
    };
    pb::Finding { kind: kind.into(), address: address.map(address_bytes).unwrap_or_default(), interfaces }
}

pub fn parse_finding(of: pb::Finding) -> Finding {
    use pb::finding::Kind;
    let with = |make: fn(IpAddr) -> Finding| address(&of.address).map_or(Finding::Unknown, make);
    match Kind::try_from(of.kind) {
        Ok(Kind::Pending) => Finding::Pending,
        Ok(Kind::Silent) => with(Finding::Silent),
        Ok(Kind::HostNetwork) => with(Finding::HostNetwork),
        Ok(Kind::SecondInterface) => Finding::SecondInterface(text(of.interfaces)),
        Ok(Kind::Bypassed) => with(Finding::Bypassed),
        Ok(Kind::Ipvs) => Finding::Ipvs,
        Ok(Kind::Unspecified) | Err(_) => Finding::Unknown,
    }
}

pub fn failure(of: &Failure) -> pb::Failure {
    use pb::failure::Failure as Wire;
    let failure = match of {
        Failure::Dataplane(error) => Some(Wire::Dataplane(text(error.clone()))),
        Failure::Refused(error) => Some(Wire::Refused(text(error.clone()))),
        Failure::EnforcerEnded => Some(Wire::EnforcerEnded(pb::Nothing {})),
        Failure::Inconsistent(error) => Some(Wire::Inconsistent(text(error.clone()))),
        Failure::Unreadable(error) => Some(Wire::Unreadable(text(error.clone()))),
        Failure::TermOver { term, current } => Some(Wire::TermOver(pb::TermOver { term: *term, current: *current })),
        Failure::Unknown => None,
    };
    pb::Failure { failure }
}

pub fn parse_failure(of: pb::Failure) -> Failure {
    use pb::failure::Failure as Wire;
    match of.failure {
        Some(Wire::Dataplane(error)) => Failure::Dataplane(text(error)),
        Some(Wire::Refused(error)) => Failure::Refused(text(error)),
        Some(Wire::EnforcerEnded(pb::Nothing {})) => Failure::EnforcerEnded,
        Some(Wire::Inconsistent(error)) => Failure::Inconsistent(text(error)),
        Some(Wire::Unreadable(error)) => Failure::Unreadable(text(error)),
        Some(Wire::TermOver(pb::TermOver { term, current })) => Failure::TermOver { term, current },
        None => Failure::Unknown,
    }
}

pub fn hooks(of: &HookProblem) -> pb::HookProblem {
    use pb::hook_problem::Problem as Wire;
    let problem = match of {
        HookProblem::NotProven => Some(Wire::NotProven(pb::Nothing {})),
        HookProblem::ProbeNotSent(error) => Some(Wire::ProbeNotSent(text(error.clone()))),
        HookProblem::ProbeNotRead(error) => Some(Wire::ProbeNotRead(text(error.clone()))),
        HookProblem::NotRestored(error) => Some(Wire::NotRestored(text(error.clone()))),
        HookProblem::Unknown => None,
    };
    pb::HookProblem { problem }
}

pub fn parse_hooks(of: pb::HookProblem) -> HookProblem {
    use pb::hook_problem::Problem as Wire;
    match of.problem {
        Some(Wire::NotProven(pb::Nothing {})) => HookProblem::NotProven,
        Some(Wire::ProbeNotSent(error)) => HookProblem::ProbeNotSent(text(error)),
        Some(Wire::ProbeNotRead(error)) => HookProblem::ProbeNotRead(text(error)),
        Some(Wire::NotRestored(error)) => HookProblem::NotRestored(text(error)),
        None => HookProblem::Unknown,
    }
}

pub fn file(of: &FileProblem) -> pb::FileProblem {
    pb::FileProblem { file: name(of.file.clone()), error: text(of.error.clone()) }
}

pub fn parse_file(of: pb::FileProblem) -> FileProblem {
    FileProblem { file: name(of.file), error: text(of.error) }
}

fn behind(of: Behind) -> pb::Behind {
    use pb::behind::Kind;
    let (kind, at, wanted) = match of {
        Behind::Hub { at, wanted } => (Kind::Hub, at, wanted),
        Behind::Local { at, wanted } => (Kind::Local, at, wanted),
        Behind::AheadOfHub { at, hub } => (Kind::AheadOfHub, at, hub),
        Behind::OtherEpoch { at } => (Kind::OtherEpoch, at, 0),
        Behind::Unknown => (Kind::Unspecified, 0, 0),
    };
    pb::Behind { kind: kind.into(), at, wanted }
}

fn parse_behind(of: pb::Behind) -> Behind {
    use pb::behind::Kind;
    let (at, wanted) = (of.at, of.wanted);
    match Kind::try_from(of.kind) {
        Ok(Kind::Hub) => Behind::Hub { at, wanted },
        Ok(Kind::Local) => Behind::Local { at, wanted },
        Ok(Kind::AheadOfHub) => Behind::AheadOfHub { at, hub: wanted },
        Ok(Kind::OtherEpoch) => Behind::OtherEpoch { at },
        Ok(Kind::Unspecified) | Err(_) => Behind::Unknown,
    }
}

fn lag(of: &Lag) -> pb::Lag {
    use pb::lag::Agent as Wire;
    let agent = match of.agent {
        Agent::Connected => Some(Wire::Connected(pb::Nothing {})),
        Agent::NeverConnected => Some(Wire::NeverConnected(pb::Nothing {})),
        Agent::Silent(age) => Some(Wire::SilentMs(milliseconds(age))),
        Agent::Unknown => None,
    };
    pb::Lag { agent, behind: of.behind.map(behind), failure: of.failure.as_ref().map(failure) }
}

fn parse_lag(of: pb::Lag) -> Lag {
    use pb::lag::Agent as Wire;
    let agent = match of.agent {
        Some(Wire::Connected(pb::Nothing {})) => Agent::Connected,
        Some(Wire::NeverConnected(pb::Nothing {})) => Agent::NeverConnected,
        Some(Wire::SilentMs(age)) => Agent::Silent(Duration::from_millis(age)),
        None => Agent::Unknown,
    };
    Lag { agent, behind: of.behind.map(parse_behind), failure: of.failure.map(parse_failure) }
}

fn exchange(of: &ExchangeProblem) -> pb::ExchangeProblem {
    use pb::exchange_problem::Problem as Wire;
    let problem = match of {
        ExchangeProblem::HubSilent { silent, error } => {
            let error = error.clone().map(text).unwrap_or_default();
            Some(Wire::HubSilent(pb::HubSilent { silent_ms: milliseconds(*silent), error }))
        }
        ExchangeProblem::SelectionsRejected(why) => Some(Wire::SelectionsRejected(text(why.clone()))),
        ExchangeProblem::SelectionRejected(why) => Some(Wire::SelectionRejected(text(why.clone()))),
        ExchangeProblem::SelectionsUnreadable(count) => Some(Wire::SelectionsUnreadable(*count)),
        ExchangeProblem::ObjectsUnreadable { cluster, count } => Some(Wire::ObjectsUnreadable(pb::UnreadableObjects {
            cluster: cluster.clone().map(name).unwrap_or_default(),
            count: *count,
        })),
        ExchangeProblem::ReportTooLarge(why) => Some(Wire::ReportTooLarge(text(why.clone()))),
        ExchangeProblem::ClusterKeyInUse { served, refused } => {
            Some(Wire::ClusterKeyInUse(pb::KeyInUse { served: served.clone(), refused: refused.clone() }))
        }
        ExchangeProblem::AheadOfHub { at, hub } => {
            Some(Wire::AheadOfHub(behind(Behind::AheadOfHub { at: *at, hub: *hub })))
        }
        ExchangeProblem::NotWatching => Some(Wire::NotWatching(pb::Nothing {})),
        ExchangeProblem::NotReceiving(age) => Some(Wire::NotReceivingMs(milliseconds(*age))),
        ExchangeProblem::NotPublishing(age) => Some(Wire::NotPublishingMs(milliseconds(*age))),
        ExchangeProblem::OldStatus(age) => Some(Wire::OldStatus(pb::OldStatus { age_ms: age.map(milliseconds) })),
        ExchangeProblem::Unknown => None,
    };
    pb::ExchangeProblem { problem }
}

fn parse_exchange(of: pb::ExchangeProblem) -> ExchangeProblem {
    use pb::exchange_problem::Problem as Wire;
    match of.problem {
        Some(Wire::HubSilent(it)) => ExchangeProblem::HubSilent {
            silent: Duration::from_millis(it.silent_ms),
            error: Some(it.error).filter(|error| !error.is_empty()).map(text),
        },
        Some(Wire::SelectionsRejected(why)) => ExchangeProblem::SelectionsRejected(text(why)),
        Some(Wire::SelectionRejected(why)) => ExchangeProblem::SelectionRejected(text(why)),
        Some(Wire::SelectionsUnreadable(count)) => ExchangeProblem::SelectionsUnreadable(count),
        Some(Wire::ObjectsUnreadable(it)) => ExchangeProblem::ObjectsUnreadable {
            cluster: Some(it.cluster).filter(|cluster| !cluster.is_empty()).map(name),
            count: it.count,
        },
        Some(Wire::ReportTooLarge(why)) => ExchangeProblem::ReportTooLarge(text(why)),
        Some(Wire::ClusterKeyInUse(it)) => {
            ExchangeProblem::ClusterKeyInUse { served: name(it.served), refused: name(it.refused) }
        }
        Some(Wire::AheadOfHub(it)) => match parse_behind(it) {
            Behind::AheadOfHub { at, hub } => ExchangeProblem::AheadOfHub { at, hub },
            _ => ExchangeProblem::Unknown,
        },
        Some(Wire::NotWatching(pb::Nothing {})) => ExchangeProblem::NotWatching,
        Some(Wire::NotReceivingMs(age)) => ExchangeProblem::NotReceiving(Duration::from_millis(age)),
        Some(Wire::NotPublishingMs(age)) => ExchangeProblem::NotPublishing(Duration::from_millis(age)),
        Some(Wire::OldStatus(it)) => ExchangeProblem::OldStatus(it.age_ms.map(Duration::from_millis)),
        None => ExchangeProblem::Unknown,
    }
}

pub fn reason(of: &Reason) -> pb::Reason {
    use pb::reason::Reason as Wire;
    let reason = match of {
        Reason::Finding(it) => Some(Wire::Finding(finding(it))),
        Reason::Rejection(it) => Some(Wire::Rejection(rejection(it))),
        Reason::Failure(it) => Some(Wire::Failure(failure(it))),
        Reason::Hooks(it) => Some(Wire::Hooks(hooks(it))),
        Reason::File(it) => Some(Wire::File(file(it))),
        Reason::Lag(it) => Some(Wire::Lag(lag(it))),
        Reason::KeyInUse { served, refused } => {
            Some(Wire::KeyInUse(pb::KeyInUse { served: served.clone(), refused: refused.clone() }))
        }
        Reason::Incomplete => Some(Wire::Incomplete(pb::Nothing {})),
        Reason::PodsNotNamed => Some(Wire::PodsNotNamed(pb::Nothing {})),
        Reason::UnknownNode(node) => Some(Wire::UnknownNode(node.clone())),
        Reason::Observing => Some(Wire::Observing(pb::Nothing {})),
        Reason::PodsOutsideRanges { nodes, node, pod } => {
            Some(Wire::PodsOutsideRanges(pb::PodsOutsideRanges { nodes: *nodes, node: node.clone(), pod: pod.clone() }))
        }
        Reason::Manifest { file, line, field, message } => Some(Wire::Manifest(pb::Manifest {
            file: text(file.clone()),
            line: *line,
            field: text(field.clone()),
            message: text(message.clone()),
        })),
        Reason::Waiting(clusters) => Some(Wire::Waiting(pb::Waiting { clusters: clusters.clone() })),
        Reason::PolicyUnreadable(error) => Some(Wire::PolicyUnreadable(text(error.clone()))),
        Reason::MemberBehind(it) => Some(Wire::MemberBehind(behind(*it))),
        Reason::NotReported => Some(Wire::NotReported(pb::Nothing {})),
        Reason::ClusterSilent(age) => Some(Wire::ClusterSilentMs(milliseconds(*age))),
        Reason::Exchange(it) => Some(Wire::Exchange(exchange(it))),
        Reason::Unknown => None,
    };
    pb::Reason { reason }
}

pub fn parse_reason(of: pb::Reason) -> Reason {
    use pb::reason::Reason as Wire;
    match of.reason {
        Some(Wire::Finding(it)) => Reason::Finding(parse_finding(it)),
        Some(Wire::Rejection(it)) => Reason::Rejection(parse_rejection(it)),
        Some(Wire::Failure(it)) => Reason::Failure(parse_failure(it)),
        Some(Wire::Hooks(it)) => Reason::Hooks(parse_hooks(it)),
        Some(Wire::File(it)) => Reason::File(parse_file(it)),
        Some(Wire::Lag(it)) => Reason::Lag(parse_lag(it)),
        Some(Wire::KeyInUse(it)) => Reason::KeyInUse { served: name(it.served), refused: name(it.refused) },
        Some(Wire::Incomplete(pb::Nothing {})) => Reason::Incomplete,
        Some(Wire::PodsNotNamed(pb::Nothing {})) => Reason::PodsNotNamed,
        Some(Wire::UnknownNode(node)) => Reason::UnknownNode(name(node)),
        Some(Wire::Observing(pb::Nothing {})) => Reason::Observing,
        Some(Wire::PodsOutsideRanges(it)) => {
            Reason::PodsOutsideRanges { nodes: it.nodes, node: name(it.node), pod: text(it.pod) }
        }
        Some(Wire::Manifest(it)) => {
            Reason::Manifest { file: text(it.file), line: it.line, field: text(it.field), message: text(it.message) }
        }
        Some(Wire::Waiting(it)) => Reason::Waiting(it.clusters.into_iter().take(MAX_CLUSTERS).map(name).collect()),
        Some(Wire::PolicyUnreadable(error)) => Reason::PolicyUnreadable(text(error)),
        Some(Wire::MemberBehind(it)) => Reason::MemberBehind(parse_behind(it)),
        Some(Wire::NotReported(pb::Nothing {})) => Reason::NotReported,
        Some(Wire::ClusterSilentMs(age)) => Reason::ClusterSilent(Duration::from_millis(age)),
        Some(Wire::Exchange(it)) => Reason::Exchange(parse_exchange(it)),
        None => Reason::Unknown,
    }
}

pub fn subject(of: &Subject) -> pb::Subject {
    use pb::subject::Subject as Wire;
    let subject = match of {
        Subject::FederatedPolicy(name) => Wire::FederatedPolicy(name.clone()),
        Subject::Object(it) => Wire::Object(object(it)),
        Subject::Everything => Wire::Everything(pb::Nothing {}),
    };
    pb::Subject { subject: Some(subject) }
}

/// What this version does not know may be anything.
pub fn parse_subject(of: pb::Subject) -> Subject {
    use pb::subject::Subject as Wire;
    match of.subject {
        Some(Wire::FederatedPolicy(it)) => Subject::FederatedPolicy(name(it)),
        Some(Wire::Object(it)) => parse_object(it).map_or(Subject::Everything, Subject::Object),
        Some(Wire::Everything(pb::Nothing {})) | None => Subject::Everything,
    }
}

#[cfg(test)]
mod tests {
    use super::super::words::Words;
    use super::*;

    fn all() -> Vec<Reason> {
        let (error, at): (String, IpAddr) = ("no space".into(), [10, 1, 0, 2].into());
        let findings = [
            Finding::Pending,
            Finding::Silent(at),
            Finding::HostNetwork(at),
            Finding::SecondInterface("eth0, net1".into()),
            Finding::Bypassed("fd01::2".parse().expect("an address")),
            Finding::Ipvs,
            Finding::Unknown,
        ];
        let failures = [
            Failure::Dataplane(error.clone()),
            Failure::Refused(error.clone()),
            Failure::EnforcerEnded,
            Failure::Inconsistent(error.clone()),
            Failure::Unreadable(error.clone()),
            Failure::TermOver { term: 4, current: 5 },
            Failure::Unknown,
        ];
        let hooks = [
            HookProblem::NotProven,
            HookProblem::ProbeNotSent(error.clone()),
            HookProblem::ProbeNotRead(error.clone()),
            HookProblem::NotRestored(error.clone()),
            HookProblem::Unknown,
        ];
        let behind = [
            Behind::Hub { at: 1, wanted: 2 },
            Behind::Local { at: 1, wanted: 2 },
            Behind::AheadOfHub { at: 3, hub: 2 },
            Behind::OtherEpoch { at: 1 },
            Behind::Unknown,
        ];
        let agents = [Agent::Connected, Agent::NeverConnected, Agent::Silent(Duration::from_secs(90)), Agent::Unknown];
        let lags = agents.into_iter().flat_map(|agent| {
            let behind = behind.into_iter().map(Some).chain([None]);
            behind.map(move |behind| Lag { agent, behind, failure: behind.is_none().then_some(Failure::EnforcerEnded) })
        });
        let others = [
            Reason::Rejection(Rejection { error: error.clone(), set: None }),
            Reason::Rejection(Rejection { error: error.clone(), set: Some(SetId([7; 16])) }),
            Reason::File(FileProblem { file: "pod-ranges".into(), error: error.clone() }),
            Reason::KeyInUse { served: "192.0.2.1:1".into(), refused: "192.0.2.2:1".into() },
            Reason::Incomplete,
            Reason::PodsNotNamed,
            Reason::UnknownNode("n".into()),
            Reason::Observing,
            Reason::PodsOutsideRanges { nodes: 2, node: "n".into(), pod: "a/b".into() },
            Reason::Manifest { file: "a.yaml".into(), line: 3, field: "spec".into(), message: error.clone() },
            Reason::Waiting(vec!["train".into()]),
            Reason::PolicyUnreadable(error.clone()),
            Reason::MemberBehind(Behind::Hub { at: 1, wanted: 2 }),
            Reason::NotReported,
            Reason::ClusterSilent(Duration::from_secs(5)),
            Reason::Unknown,
        ];
        let exchange = [
            ExchangeProblem::HubSilent { silent: Duration::from_secs(40), error: None },
            ExchangeProblem::HubSilent { silent: Duration::from_secs(40), error: Some(error.clone()) },
            ExchangeProblem::SelectionsRejected(error.clone()),
            ExchangeProblem::SelectionRejected(error.clone()),
            ExchangeProblem::SelectionsUnreadable(3),
            ExchangeProblem::ObjectsUnreadable { cluster: None, count: 2 },
            ExchangeProblem::ObjectsUnreadable { cluster: Some("train".into()), count: 2 },
            ExchangeProblem::ReportTooLarge(error),
            ExchangeProblem::ClusterKeyInUse { served: "192.0.2.1:1".into(), refused: "192.0.2.2:1".into() },
            ExchangeProblem::AheadOfHub { at: 7, hub: 3 },
            ExchangeProblem::NotWatching,
            ExchangeProblem::NotReceiving(Duration::from_secs(30)),
            ExchangeProblem::NotPublishing(Duration::from_secs(45)),
            ExchangeProblem::OldStatus(Some(Duration::from_secs(12))),
            ExchangeProblem::OldStatus(None),
            ExchangeProblem::Unknown,
        ];
        let others = others.into_iter().chain(exchange.map(Reason::Exchange));
        let findings = findings.into_iter().map(Reason::Finding);
        let failures = failures.into_iter().map(Reason::Failure);
        let hooks = hooks.into_iter().map(Reason::Hooks);
        findings.chain(failures).chain(hooks).chain(lags.map(Reason::Lag)).chain(others).collect()
    }

    #[test]
    fn every_reason_is_read_as_written_and_has_words() {
        for it in all() {
            assert_eq!(parse_reason(reason(&it)), it);
            assert!(!Words(&it).to_string().is_empty() && !it.code().is_empty(), "{it:?}");
        }
        let objects = [
            Object::Policy { id: PolicyId([1; 16]), name: "NetworkPolicy a/b".into() },
            Object::Set(SetId([2; 16])),
            Object::Chain(ChainId([3; 16])),
            Object::Endpoint(EndpointId { namespace: "a".into(), name: "p".into() }),
        ];
        let subjects = objects.into_iter().map(Subject::Object);
        for it in subjects.chain([Subject::FederatedPolicy("p".into()), Subject::Everything]) {
            assert_eq!(parse_subject(subject(&it)), it);
        }
    }

    #[test]
    fn reads_unknown_values_as_unknown_reasons() {
        assert_eq!(parse_reason(pb::Reason::default()), Reason::Unknown);
        assert_eq!(parse_failure(pb::Failure::default()), Failure::Unknown);
        assert_eq!(parse_hooks(pb::HookProblem::default()), HookProblem::Unknown);
        assert_eq!(parse_subject(pb::Subject::default()), Subject::Everything);
        for kind in [0, 99, -1] {
            let found = parse_finding(pb::Finding { kind, ..pb::Finding::default() });
            assert!(found == Finding::Unknown && found.is_error(), "{kind}");
        }
        // An address that is missing.
        let silent = pb::Finding { kind: pb::finding::Kind::Silent.into(), ..pb::Finding::default() };
        assert_eq!(parse_finding(silent), Finding::Unknown);
        let lag = pb::Lag { behind: Some(pb::Behind { kind: 99, at: 1, wanted: 1 }), ..pb::Lag::default() };
        let lag = Reason::Lag(parse_lag(lag));
        assert_eq!(lag, Reason::Lag(Lag { agent: Agent::Unknown, behind: Some(Behind::Unknown), failure: None }));
        assert!(Words(&lag).to_string().starts_with("unknown reason"), "{}", Words(&lag));
    }

    #[test]
    fn cuts_long_texts() {
        let long = "ä".repeat(40_000);
        let read = parse_reason(pb::Reason { reason: Some(pb::reason::Reason::PolicyUnreadable(long.clone())) });
        let Reason::PolicyUnreadable(cut) = read else { panic!("another reason") };
        assert!((500..=MAX_TEXT_BYTES).contains(&cut.len()) && cut.ends_with("ä…"), "{}", cut.len());
        assert_eq!(reason(&Reason::PolicyUnreadable(long)), reason(&Reason::PolicyUnreadable(cut)));
    }
}
