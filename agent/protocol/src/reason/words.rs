//! Reasons as text for people. No program parses this text.

use std::fmt::{Display, Formatter, Result};
use std::time::Duration;

use super::{
    Agent, Behind, ExchangeProblem, Failure, FileProblem, Finding, HookProblem, Lag, Object, Reason, Rejection, Subject,
};

/// Formats a reason or an object.
#[derive(Debug, Clone, Copy)]
pub struct Words<'a, T>(pub &'a T);

impl Display for Words<'_, Object> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            Object::Policy { name, .. } => write!(f, "policy {name}"),
            Object::Set(id) => write!(f, "set {id}"),
            Object::Chain(id) => write!(f, "chain {id}"),
            Object::Endpoint(id) => write!(f, "pod {}/{}", id.namespace, id.name),
        }
    }
}

impl Display for Words<'_, Subject> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            Subject::FederatedPolicy(name) => f.write_str(name),
            Subject::Object(object) => Words(object).fmt(f),
            Subject::Everything => f.write_str("every object"),
        }
    }
}

impl Display for Words<'_, Rejection> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            Rejection { error, set: None } => f.write_str(error),
            Rejection { error, set: Some(set) } => write!(f, "its set {set} was refused: {error}"),
        }
    }
}

impl Display for Words<'_, Finding> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            Finding::Enforced => f.write_str("enforced"),
            Finding::Pending => f.write_str("not proven: the probe is in progress"),
            Finding::Silent(address) => write!(f, "not proven: {address} does not answer the probe"),
            Finding::HostNetwork(address) => write!(f, "host network: {address} is an address of the node"),
            Finding::SecondInterface(names) => {
                write!(f, "second interface: policy is enforced on only one of {names}, the one with the pod's address")
            }
            Finding::Bypassed(address) => write!(
                f,
                "bypassed: traffic from {address} to other pods does not pass the hooks (a bridge without br_netfilter, or a \
                 program that moves packets past them)"
            ),
            Finding::Ipvs => {
                write!(
                    f,
                    "not enforced for services: kube-proxy runs in IPVS mode; run it in nftables or iptables mode"
                )
            }
            Finding::Unknown => f.write_str(UNKNOWN),
        }
    }
}

const UNKNOWN: &str = "unknown reason: the sender is a newer version";

impl Display for Words<'_, HookProblem> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            HookProblem::NotProven => f.write_str("enforcement is not proven yet: no pod has answered a probe"),
            HookProblem::ProbeNotSent(error) => write!(f, "the probe cannot be sent: {error}"),
            HookProblem::ProbeNotRead(error) => write!(f, "the answers to the probe cannot be read: {error}"),
            HookProblem::NotRestored(error) => write!(f, "the rules in the kernel cannot be restored: {error}"),
            HookProblem::Unknown => f.write_str(UNKNOWN),
        }
    }
}

impl Display for Words<'_, Failure> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            Failure::Dataplane(error) => write!(f, "access the kernel's dataplane: {error}"),
            Failure::Refused(error) => write!(f, "the kernel refuses the rule set: {error}"),
            Failure::EnforcerEnded => f.write_str("the enforcer thread has ended"),
            Failure::Inconsistent(error) => write!(f, "the rule set is inconsistent: {error}"),
            Failure::Unreadable(error) => write!(f, "the member's message cannot be read: {error}"),
            Failure::TermOver { term, current } => {
                write!(f, "the member's term {term} is over: the current term is {current}")
            }
            Failure::Unknown => f.write_str(UNKNOWN),
        }
    }
}

impl Display for Words<'_, FileProblem> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "{} cannot be written: {}", self.0.file, self.0.error)
    }
}

impl Display for Words<'_, Behind> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            Behind::Hub { at, wanted } => write!(f, "at hub revision {at}, newest is {wanted}"),
            Behind::Local { at, wanted } => write!(f, "at local revision {at}, newest is {wanted}"),
            Behind::AheadOfHub { at, hub } => write!(f, "at revision {at} of the hub, which is at {hub}"),
            Behind::OtherEpoch { at: 0 } => f.write_str("has received nothing from the hub yet"),
            Behind::OtherEpoch { at } => write!(f, "at revision {at} of the hub before it was restored"),
            Behind::Unknown => f.write_str(UNKNOWN),
        }
    }
}

impl Display for Words<'_, Lag> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Lag { agent, behind, failure } = self.0;
        let separator = match agent {
            Agent::Connected => "",
            Agent::NeverConnected => {
                return f.write_str(
                    "no agent has connected since the member started: start the agent; if it never enrolled, create a token with \
                     `hanse-member node-token create` (`hanse-member node list` shows enrolled nodes)",
                );
            }
            Agent::Silent(age) => {
                write!(f, "its agent is not connected, last seen {} ago", age_in_words(*age))?;
                ", "
            }
            Agent::Unknown => return f.write_str(UNKNOWN),
        };
        match (behind, failure) {
            (Some(behind), Some(failure)) => {
                write!(f, "{separator}the newest rule set is not in force ({}): {}", Words(behind), Words(failure))
            }
            (None, Some(failure)) => write!(f, "{separator}the newest rule set is not in force: {}", Words(failure)),
            (Some(behind), None) => write!(f, "{separator}{}", Words(behind)),
            (None, None) => Ok(()),
        }
    }
}

impl Display for Words<'_, ExchangeProblem> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            ExchangeProblem::HubSilent { silent, error } => {
                let why = error.as_deref().unwrap_or("the stream is open, and nothing arrives");
                write!(f, "nothing was received from the hub for {} s: {why}", silent.as_secs())
            }
            ExchangeProblem::SelectionsRejected(why) => {
                write!(f, "the hub rejects the selections of this cluster's policies, and sends every endpoint: {why}")
            }
            ExchangeProblem::SelectionRejected(why) => {
                write!(f, "the hub cannot read a selection, and sends more endpoints: {why}")
            }
            ExchangeProblem::SelectionsUnreadable(count) => {
                write!(f, "the hub cannot read {count} selections, and sends more endpoints")
            }
            ExchangeProblem::ObjectsUnreadable { cluster: None, count } => {
                write!(f, "{count} objects that the hub sent cannot be read")
            }
            ExchangeProblem::ObjectsUnreadable { cluster: Some(name), count } => {
                write!(f, "{count} objects of cluster {name} cannot be read")
            }
            ExchangeProblem::ReportTooLarge(why) => {
                write!(f, "its enforcement report is too large, and was discarded: {why}")
            }
            ExchangeProblem::ClusterKeyInUse { served, refused } => write!(
                f,
                "its key is used from two addresses, {served} (served) and {refused} (refused), so its reports do not count: one \
                 uses a copy of the member's data directory; stop it, or revoke the cluster and join it with a new token and a \
                 new --data"
            ),
            ExchangeProblem::AheadOfHub { at, hub } => write!(
                f,
                "has revision {at} of the hub, which is at {hub}: the hub's files are older than what clusters enforce; stop the \
                 hub and start it with --restored"
            ),
            ExchangeProblem::NotWatching => f.write_str("has no Watch stream to this hub"),
            ExchangeProblem::NotReceiving(age) => write!(f, "has received nothing for {} s", age.as_secs()),
            ExchangeProblem::NotPublishing(age) => {
                write!(
                    f,
                    "has sent this replica of the hub nothing for {} s: other clusters may have old data of it",
                    age.as_secs()
                )
            }
            ExchangeProblem::OldStatus(Some(age)) => {
                write!(f, "the exchange of the hub is busy: this status is {} s old", age.as_secs())
            }
            ExchangeProblem::OldStatus(None) => f.write_str("the exchange of the hub is busy: no status yet"),
            ExchangeProblem::Unknown => f.write_str(UNKNOWN),
        }
    }
}

impl Display for Words<'_, Reason> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            // One reason for many pods: without the address.
            Reason::Finding(Finding::Silent(_)) => f.write_str("not proven: no answer to the probe"),
            Reason::Finding(Finding::HostNetwork(_)) => f.write_str("host network"),
            Reason::Finding(Finding::Bypassed(_)) => f.write_str(
                "bypassed: traffic to other pods does not pass the hooks (a bridge without br_netfilter, or a program that moves \
                 packets past them)",
            ),
            Reason::Finding(finding) => Words(finding).fmt(f),
            Reason::Rejection(rejection) => Words(rejection).fmt(f),
            Reason::Failure(failure) => Words(failure).fmt(f),
            Reason::Hooks(problem) => Words(problem).fmt(f),
            Reason::File(problem) => Words(problem).fmt(f),
            Reason::Lag(lag) => Words(lag).fmt(f),
            Reason::KeyInUse { served, refused } => write!(
                f,
                "its key is used from two addresses, {served} (served) and {refused} (refused), so its acknowledgements do not \
                 count: one uses a copy of the node's data directory; revoke the node and enrol it again"
            ),
            Reason::Incomplete => f.write_str("there are more errors than the report lists"),
            Reason::PodsNotNamed => f.write_str("more pods are not enforced than the report lists"),
            Reason::UnknownNode(node) => write!(
                f,
                "node {node}: its agent is connected, but the source has no Node of this name: check the agent's --node, and the \
                 source"
            ),
            Reason::Observing => f.write_str("it observes: what its rules deny is logged, and passes"),
            Reason::PodsOutsideRanges { nodes, node, pod } => write!(
                f,
                "{nodes} nodes have pods with addresses outside of the Node's podCIDRs, such as pod {pod} on {node}: new pods there \
                 are open until their rules arrive; let the network plugin take addresses from podCIDRs"
            ),
            Reason::Manifest { file, line, field, message } if field.is_empty() => write!(f, "{file}:{line}: {message}"),
            Reason::Manifest { file, line, field, message } => write!(f, "{file}:{line}: {field}: {message}"),
            Reason::Waiting(clusters) => write!(f, "waits for {}", clusters.join(", ")),
            Reason::PolicyUnreadable(error) => f.write_str(error),
            Reason::MemberBehind(Behind::Hub { at, wanted }) => write!(f, "the member is at revision {at} of {wanted}"),
            Reason::MemberBehind(behind) => write!(f, "the member is {}", Words(behind)),
            Reason::NotReported => f.write_str("has not reported yet"),
            Reason::ClusterSilent(age) => write!(f, "silent for {}", age_in_words(*age)),
            Reason::Exchange(problem) => Words(problem).fmt(f),
            Reason::Unknown => f.write_str(UNKNOWN),
        }
    }
}

/// A reason with the object that has the problem, where that is not the object of the request.
#[derive(Debug, Clone, Copy)]
pub struct Located<'a> {
    pub at: Option<&'a Object>,
    pub reason: &'a Reason,
}

impl Display for Located<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match (self.at, self.reason) {
            (Some(at), Reason::Finding(finding)) => write!(f, "{} is not enforced: {}", Words(at), Words(finding)),
            (Some(at), reason) => write!(f, "{}: {}", Words(at), Words(reason)),
            (None, Reason::Finding(_)) => write!(f, "not enforced: {}", Words(self.reason)),
            (None, reason) => Words(reason).fmt(f),
        }
    }
}

/// To the second or coarser.
fn age_in_words(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3_600 => format!("{} m", seconds / 60),
        seconds @ 3_600..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}
