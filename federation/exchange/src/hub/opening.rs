//! Decoded messages of a receiver. Parsing selections takes much longer than other streams may wait, so that it happens outside
//! the lock of the exchange.

use std::sync::Arc;

use hanse_policy::model::ClusterName;
use hashbrown::HashMap;

use super::views::ClassId;
use crate::interest::{self, Interest};
use crate::limits::MAX_CLUSTERS;
use crate::message::{RefusedParts, WatchOpen, WatchRequest};
use crate::model::Position;

/// The first message of a watching stream.
#[derive(Debug)]
pub struct ReadOpening {
    pub(super) protocol: u32,
    pub(super) opening: Opening,
    pub(super) own: Interest,
    /// The interest in it was not readable as written.
    pub(super) interest_widened: bool,
    /// Parts of it that could not be read, and of its own interest.
    pub(super) refused: [RefusedParts; 2],
}

impl ReadOpening {
    /// A part of the opening that is not readable counts as not received, or is widened.
    pub fn of(open: WatchOpen) -> Self {
        let mut refused = RefusedParts::default();
        if open.received.len() > MAX_CLUSTERS {
            refused.add(format!("origins: {}, more than the limit of {MAX_CLUSTERS}", open.received.len()));
        }
        let mut received = HashMap::new();
        for (at, it) in open.received.into_iter().take(MAX_CLUSTERS).enumerate() {
            let Some(position) = it.position else {
                refused.add(format!("origins[{at}].position: missing"));
                continue;
            };
            received.insert(it.origin, Received { position, view: it.view, digest: it.digest });
        }
        let refused_before = refused.total;
        let interest = interest::read("interest", open.interest, interest::WHOLE, &mut refused);
        let interest_widened = refused.total > refused_before;
        let mut refused_own = RefusedParts::default();
        let own = interest::read("own", open.own, interest::OWN, &mut refused_own);
        let opening = Opening {
            hub: open.hub,
            hub_digest: open.hub_digest,
            received,
            interest: Arc::new(interest),
            starting: None,
        };
        Self { protocol: open.protocol, opening, own, interest_widened, refused: [refused, refused_own] }
    }
}

/// A later message.
#[derive(Debug)]
pub enum ReadRequest {
    Nothing,
    Open,
    Own(Interest, RefusedParts),
    InForce { interest: u64, hub: Position },
    Mismatch { origin: Option<ClusterName> },
}

impl ReadRequest {
    pub fn of(request: WatchRequest) -> Self {
        match request {
            WatchRequest::Heartbeat => Self::Nothing,
            WatchRequest::Open(_) => Self::Open,
            WatchRequest::Own(own) => {
                let mut refused = RefusedParts::default();
                let own = interest::read("own", own, interest::OWN, &mut refused);
                Self::Own(own, refused)
            }
            WatchRequest::InForce { interest, hub } => Self::InForce { interest, hub },
            WatchRequest::Mismatch { origin } => Self::Mismatch { origin },
        }
    }
}

/// The opening of a receiver, until the hub's state is at least as new.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) hub: Option<Position>,
    pub(super) hub_digest: Option<u128>,
    pub(super) received: HashMap<ClusterName, Received>,
    pub(super) interest: Arc<Interest>,
    /// The classes that it starts with, while they are being built.
    pub(super) starting: Option<Starting>,
}

#[derive(Debug, Clone)]
pub(super) struct Starting {
    /// Of the interest that it was opened with, and of the first one that it is given.
    pub(super) opening_class: ClassId,
    pub(super) class: ClassId,
    pub(super) interest: Arc<Interest>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Received {
    pub(super) position: Position,
    pub(super) view: u64,
    pub(super) digest: Option<u128>,
}
