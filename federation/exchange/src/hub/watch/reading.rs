//! What a receiver says, read. That takes much longer than it may make others wait: it is done outside the exchange.

use std::sync::Arc;

use crate::interest;
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use hashbrown::HashMap;
use pb::watch_request::Message as Request;

use crate::codec as wire;
use crate::limits::MAX_CLUSTERS;
use crate::model::{Interest, Position};

/// The first message of a watching stream.
#[derive(Debug)]
pub struct ReadOpening {
    pub(super) protocol: u32,
    pub(super) opening: Opening,
    pub(super) own: Interest,
    /// What it named as its interest was not read as it was written.
    pub(super) anew: bool,
    /// What was not taken of it, and of its own interest.
    pub(super) refused: [wire::Refused; 2],
}

impl ReadOpening {
    /// What cannot be taken of the opening is sent anew, or widened.
    pub fn of(open: pb::WatchOpen) -> Self {
        let mut refused = wire::Refused::default();
        if open.held.len() > MAX_CLUSTERS {
            refused.add(format!("held: {} origins, of {MAX_CLUSTERS}", open.held.len()));
        }
        let mut held = HashMap::new();
        for (at, it) in open.held.into_iter().take(MAX_CLUSTERS).enumerate() {
            let Some(position) = it.position else {
                refused.add(format!("held[{at}].position: missing"));
                continue;
            };
            let state = Held { position: position.into(), view: it.view, digest: wire::read_digest(&it.digest) };
            held.insert(ClusterName::from(it.origin), state);
        }
        let held_refused = refused.total;
        let interest = wire::read_interest("interest", open.interest, interest::WHOLE, &mut refused);
        let anew = refused.total > held_refused;
        let mut refused_own = wire::Refused::default();
        let own = wire::read_interest("own", open.own, interest::OWN, &mut refused_own);
        let opening = Opening {
            hub: open.hub.map(Position::from),
            hub_digest: wire::read_digest(&open.hub_digest),
            held,
            interest: Arc::new(interest),
        };
        Self { protocol: open.protocol, opening, own, anew, refused: [refused, refused_own] }
    }
}

/// A later message.
#[derive(Debug)]
pub enum ReadRequest {
    Nothing,
    Open,
    Own(Interest, wire::Refused),
    InForce(pb::InForce),
    Mismatch(pb::DigestMismatch),
}

impl ReadRequest {
    pub fn of(request: pb::WatchRequest) -> Self {
        match request.message {
            None | Some(Request::Heartbeat(_)) => Self::Nothing,
            Some(Request::Open(_)) => Self::Open,
            Some(Request::Own(own)) => {
                let mut refused = wire::Refused::default();
                let own = wire::read_interest("own", own.selections, interest::OWN, &mut refused);
                Self::Own(own, refused)
            }
            Some(Request::Ack(ack)) => match ack.what {
                Some(pb::watch_ack::What::InForce(it)) => Self::InForce(it),
                Some(pb::watch_ack::What::Mismatch(it)) => Self::Mismatch(it),
                None => Self::Nothing,
            },
        }
    }
}

/// What a receiver opened its stream with, until the hub's state is as new as it.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) hub: Option<Position>,
    pub(super) hub_digest: Option<u128>,
    pub(super) held: HashMap<ClusterName, Held>,
    pub(super) interest: Arc<Interest>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) position: Position,
    pub(super) view: u64,
    pub(super) digest: Option<u128>,
}
