//! Why something is not enforced, from the dataplane to the person who reads it.
//!
//! Every process passes these values on, over `hanse.report.v1`; [`words`] makes the text where people read it. A value that
//! this version does not know is `Unknown`, which is never a success.

pub mod wire;
pub mod words;

use std::time::Duration;

pub use hanse_ruleset::report::{Finding, Object, Rejection};

/// Most bytes of a text: the message of an error that another program gave. What is longer is cut.
pub const MAX_TEXT_BYTES: usize = 512;

/// Why a node's newest rule set is not in force. The one before is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Failure {
    /// The dataplane cannot be changed.
    Dataplane(String),
    /// The dataplane refuses the rule set as a whole.
    Refused(String),
    /// The agent's enforcer has ended.
    EnforcerEnded,
    /// The rule set is inconsistent.
    Inconsistent(String),
    /// The message of the member cannot be read.
    Unreadable(String),
    /// The member's term is over.
    TermOver {
        term: u64,
        current: u64,
    },
    Unknown,
}

/// What is wrong with the hooks of a node as a whole.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HookProblem {
    /// No pod has shown yet that the hooks see its packets.
    NotProven,
    ProbeNotSent(String),
    ProbeNotRead(String),
    /// The rules in the kernel may differ from the rule set, and cannot be restored.
    NotRestored(String),
    Unknown,
}

impl HookProblem {
    /// Whether the rules in the kernel may differ from the rule set.
    pub fn rules_may_differ(&self) -> bool {
        matches!(self, Self::NotRestored(_) | Self::Unknown)
    }
}

/// A file that a process cannot write.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileProblem {
    pub file: String,
    pub error: String,
}

/// How far a node, or a member, is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Behind {
    /// At this revision of the hub, of the second.
    Hub {
        at: u64,
        wanted: u64,
    },
    /// At this revision of the cluster's own source, of the second.
    Local {
        at: u64,
        wanted: u64,
    },
    /// At this revision of the hub, which is only at the second.
    AheadOfHub {
        at: u64,
        hub: u64,
    },
    /// At this revision of the hub before it was restored.
    OtherEpoch {
        at: u64,
    },
    Unknown,
}

/// The agent of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Agent {
    Connected,
    /// None has connected since the member started.
    NeverConnected,
    /// It is not connected; since its stream ended.
    Silent(Duration),
    Unknown,
}

/// Why a node does not enforce the newest rule set of its member.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lag {
    pub agent: Agent,
    pub behind: Option<Behind>,
    pub failure: Option<Failure>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Of pods.
    Finding(Finding),
    /// Of objects.
    Rejection(Rejection),
    Failure(Failure),
    Hooks(HookProblem),
    File(FileProblem),
    Lag(Lag),
    /// The node's key is used from two addresses, so what it acknowledges does not count.
    KeyInUse {
        served: String,
        refused: String,
    },
    /// There are more errors than a report names.
    Incomplete,
    /// Pods are not enforced that the report does not name.
    PodsNotNamed,
    /// An agent is connected whose node the source does not have.
    UnknownNode(String),
    /// The node observes: what its rules deny passes.
    Observing,
    /// Pods have addresses outside of the pod ranges of their nodes, and are open until their rules arrive.
    PodsOutsideRanges {
        /// The number of nodes with such pods.
        nodes: u64,
        /// One of them.
        node: String,
        /// The namespace and name of one such pod, with "/" between.
        pod: String,
    },
    /// What is wrong with a manifest of a cluster's source; the field is empty where it is not about one.
    Manifest {
        file: String,
        line: u32,
        field: String,
        message: String,
    },
    /// A policy needs endpoints of these clusters, which have not arrived yet.
    Waiting(Vec<String>),
    /// The cluster's member cannot read a policy.
    PolicyUnreadable(String),
    /// The member itself is behind.
    MemberBehind(Behind),
    /// The cluster has not reported yet.
    NotReported,
    /// Since the hub last received something of the cluster.
    ClusterSilent(Duration),
    Exchange(ExchangeProblem),
    Unknown,
}

/// What is wrong with the exchange between member and hub.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExchangeProblem {
    /// The member received nothing from the hub for this time; the error of the last stream, unless a stream is open.
    HubSilent {
        silent: Duration,
        error: Option<String>,
    },
    /// The hub rejects the selections of the cluster's own policies, and sends every endpoint instead.
    SelectionsRejected(String),
    /// The hub cannot read one selection, and sends more instead.
    SelectionRejected(String),
    /// How many selections the hub cannot read, of which not all are named.
    SelectionsUnreadable(u64),
    /// Objects that the member received and cannot read: of a cluster, or the hub's own.
    ObjectsUnreadable {
        cluster: Option<String>,
        count: u64,
    },
    /// The hub discarded the cluster's report of enforcement because of its size.
    ReportTooLarge(String),
    /// The cluster's key is used from two addresses, so what it reports does not count.
    ClusterKeyInUse {
        served: String,
        refused: String,
    },
    /// The cluster has this revision of the hub, which is only at the second: the hub's files are older.
    AheadOfHub {
        at: u64,
        hub: u64,
    },
    /// The member has no watching stream to this hub.
    NotWatching,
    /// Since the member last received something from the hub.
    NotReceiving(Duration),
    /// Since this replica of the hub last received something from the member, which another replica hears.
    NotPublishing(Duration),
    /// The exchange of the hub was too busy for a new status; the age of this one, unless there is none.
    OldStatus(Option<Duration>),
    Unknown,
}

/// What an error concerns.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// There may be errors of any object.
    Everything,
    /// The name of a FederatedNetworkPolicy.
    FederatedPolicy(String),
    Object(Object),
}

impl Reason {
    /// Identifies the kind of the reason for programs: never changed, never reused.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Finding(finding) => match finding {
                Finding::Enforced => "Enforced",
                Finding::Pending => "ProbePending",
                Finding::Silent(_) => "NotProven",
                Finding::HostNetwork(_) => "HostNetwork",
                Finding::SecondInterface(_) => "SecondInterface",
                Finding::Bypassed(_) => "Bypassed",
                Finding::Ipvs => "IPVS",
                Finding::Unknown => "Unknown",
            },
            Self::Rejection(Rejection { set: None, .. }) => "Rejected",
            Self::Rejection(Rejection { set: Some(_), .. }) => "SetRejected",
            Self::Failure(failure) => failure.code(),
            Self::Hooks(HookProblem::NotProven) => "HooksNotProven",
            Self::Hooks(HookProblem::ProbeNotSent(_) | HookProblem::ProbeNotRead(_)) => "ProbeFailed",
            Self::Hooks(HookProblem::NotRestored(_)) => "RulesNotRestored",
            Self::File(_) => "FileNotWritten",
            Self::Lag(Lag { failure: Some(failure), .. }) => failure.code(),
            Self::Lag(Lag { agent: Agent::NeverConnected, .. }) => "AgentNeverConnected",
            Self::Lag(Lag { agent: Agent::Silent(_), .. }) => "AgentDisconnected",
            Self::Lag(Lag { behind, .. }) => match behind {
                Some(behind) => behind.code(),
                None => "Unknown",
            },
            Self::KeyInUse { .. } => "KeyInUse",
            Self::Incomplete => "ReportIncomplete",
            Self::PodsNotNamed => "PodsNotNamed",
            Self::UnknownNode(_) => "UnknownNode",
            Self::Observing => "Observing",
            Self::PodsOutsideRanges { .. } => "PodsOutsideRanges",
            Self::Manifest { .. } => "ManifestInvalid",
            Self::Waiting(_) => "WaitingForEndpoints",
            Self::PolicyUnreadable(_) => "PolicyUnreadable",
            Self::MemberBehind(_) => "MemberBehind",
            Self::NotReported => "NotReported",
            Self::ClusterSilent(_) => "ClusterSilent",
            Self::Exchange(problem) => problem.code(),
            Self::Hooks(HookProblem::Unknown) | Self::Unknown => "Unknown",
        }
    }
}

impl ExchangeProblem {
    fn code(&self) -> &'static str {
        match self {
            Self::HubSilent { .. } => "HubSilent",
            Self::SelectionsRejected(_) | Self::SelectionRejected(_) | Self::SelectionsUnreadable(_) => {
                "SelectionRejected"
            }
            Self::ObjectsUnreadable { .. } => "ObjectsUnreadable",
            Self::ReportTooLarge(_) => "ReportTooLarge",
            Self::ClusterKeyInUse { .. } => "ClusterKeyInUse",
            Self::AheadOfHub { .. } => "AheadOfHub",
            Self::NotWatching => "NotWatching",
            Self::NotReceiving(_) => "NotReceiving",
            Self::NotPublishing(_) => "NotPublishing",
            Self::OldStatus(_) => "StatusOutdated",
            Self::Unknown => "Unknown",
        }
    }
}

impl Failure {
    fn code(&self) -> &'static str {
        match self {
            Self::Dataplane(_) => "DataplaneFailed",
            Self::Refused(_) => "RuleSetRefused",
            Self::EnforcerEnded => "EnforcerEnded",
            Self::Inconsistent(_) => "RuleSetInconsistent",
            Self::Unreadable(_) => "RuleSetUnreadable",
            Self::TermOver { .. } => "TermOver",
            Self::Unknown => "Unknown",
        }
    }
}

impl Behind {
    fn code(self) -> &'static str {
        match self {
            Self::Hub { .. } => "BehindHub",
            Self::Local { .. } => "BehindSource",
            Self::AheadOfHub { .. } => "AheadOfHub",
            Self::OtherEpoch { .. } => "OtherEpoch",
            Self::Unknown => "Unknown",
        }
    }
}
