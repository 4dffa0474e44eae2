//! What hub and members send each other, as values. [`crate::codec`] encodes and decodes them.

use bytes::Bytes;
use hanse_policy::model::ClusterName;

use crate::model::{Position, Refusal};

/// From a member to the hub, on a publishing stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishRequest {
    /// The first message. `instance` identifies the process: 16 random bytes, or none. `yields`: another process may have been elected to
    /// publish in its place.
    Open {
        protocol: u32,
        epoch: u64,
        instance: Bytes,
        yields: bool,
    },
    /// A batch follows: [`Self::Frame`]s, then [`Self::End`].
    Begin {
        snapshot: bool,
    },
    /// Encoded updates: see [`crate::codec::frame`].
    Frame(Bytes),
    End {
        position: Position,
        digest: Option<u128>,
    },
    /// An encoded report of enforcement, which the hub reads outside the exchange.
    Report(Bytes),
    /// `received_age_ms`: since the cluster last received something on a watching stream.
    Heartbeat {
        received_age_ms: Option<u64>,
    },
}

/// From the hub to a member, on a publishing stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishResponse {
    /// `published`: the last position of the cluster that this hub has.
    Welcome {
        published: Option<Position>,
        heartbeat_ms: u64,
    },
    Ack {
        position: Position,
    },
    Refusals(Refusals),
    /// The member must publish a snapshot.
    Resync {
        reason: String,
    },
    /// The process of the hub that serves the stream, before the welcome, and the position of its objects, whenever it has changed.
    Replica {
        id: Bytes,
        hub: Position,
    },
}

/// All refusals of a cluster's objects.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refusals {
    /// The first of them, by the ids of the objects.
    pub refusals: Vec<(u64, Refusal)>,
    pub total: u64,
}

/// From a member to the hub, on a watching stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchRequest {
    Open(WatchOpen),
    /// Replaces the selections of the cluster's own policies.
    Own(Vec<WrittenSelection>),
    /// What is in force: everything that needs at most this interest, from this position of the hub.
    InForce {
        interest: u64,
        hub: Position,
    },
    /// The receiver needs a snapshot. `None`: of the hub's own objects.
    Mismatch {
        origin: Option<ClusterName>,
    },
    Heartbeat,
}

/// A selection as in a message. One of another version may not be readable here; a member returns it unchanged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WrittenSelection {
    pub clusters: WrittenScope,
    pub selector: String,
    pub port_names: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WrittenScope {
    All,
    Named(Vec<String>),
    /// Of a kind that this version does not know.
    Unknown,
}

/// What a member has when it opens a watching stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WatchOpen {
    pub protocol: u32,
    /// Of the hub's own objects.
    pub hub: Option<Position>,
    pub hub_digest: Option<u128>,
    pub received: Vec<ReceivedOrigin>,
    /// The interest that was complete last.
    pub interest: Vec<WrittenSelection>,
    pub own: Vec<WrittenSelection>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedOrigin {
    pub origin: ClusterName,
    pub position: Option<Position>,
    pub view: u64,
    pub digest: Option<u128>,
}

/// From the hub to a member, on a watching stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchResponse {
    Welcome {
        heartbeat_ms: u64,
    },
    /// A batch follows. `origin`: `None` for the hub's own objects, which come into force when interest `needs_interest` is
    /// complete.
    Begin {
        origin: Option<ClusterName>,
        snapshot: bool,
        needs_interest: u64,
    },
    /// Encoded updates: see [`crate::codec::frame`].
    Frame(Bytes),
    /// `view` identifies the interest and the grants under which the state was selected.
    End {
        position: Position,
        digest: Option<u128>,
        view: u64,
    },
    Interest(InterestChange),
    /// The receiver has all that an interest selects of an origin. `position`: `None` where the hub has no state of the origin
    /// and does not wait for it.
    Complete {
        interest: u64,
        origin: ClusterName,
        position: Option<Position>,
        view: u64,
    },
    /// The cluster left or was revoked.
    Withdrawn {
        cluster: ClusterName,
    },
    Heartbeat,
    PartsRefused(RefusedParts),
    /// The addresses of the hub's replicas: see [`crate::hubs`].
    Hubs(Vec<String>),
    /// Whether the digests that the member has reported equal those of the hub.
    Compared {
        equal: bool,
    },
}

/// The receiver's interest from here on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InterestChange {
    pub number: u64,
    pub added: Vec<WrittenSelection>,
    pub removed: Vec<WrittenSelection>,
    /// Those for which a [`WatchResponse::Complete`] follows.
    pub origins: Vec<ClusterName>,
    /// `added` is all of it.
    pub whole: bool,
}

/// Parts of a message that the hub could not read. Each was replaced by something wider.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RefusedParts {
    pub total: u64,
    /// The first, in words.
    pub parts: Vec<String>,
}

/// Parts of one message that are named, and the bytes of each.
const MAX_NAMED_PARTS: usize = 16;
const MAX_PART_BYTES: usize = 256;

impl RefusedParts {
    pub fn add(&mut self, mut part: String) {
        self.total = self.total.saturating_add(1);
        if self.parts.len() < MAX_NAMED_PARTS {
            part.truncate(part.floor_char_boundary(MAX_PART_BYTES));
            self.parts.push(part);
        }
    }
}
