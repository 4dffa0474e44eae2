//! Messages of watching streams.

use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use pb::watch_request::Message as Request;
use pb::watch_response::Message as Response;

use super::{DecodeError, digest_bytes, read_digest, required, selection};
use crate::message::{
    InterestChange, ReceivedOrigin, RefusedParts, WatchOpen, WatchRequest, WatchResponse, WrittenSelection,
};

pub fn encode_request(request: WatchRequest) -> pb::WatchRequest {
    use pb::watch_ack::What;
    let ack = |what| Request::Ack(pb::WatchAck { what: Some(what) });
    let message = match request {
        WatchRequest::Open(open) => Request::Open(encode_open(open)),
        WatchRequest::Own(list) => Request::Own(pb::OwnInterest { selections: encode_selections(list) }),
        WatchRequest::InForce { interest, hub } => ack(What::InForce(pb::InForce { interest, hub: Some(hub.into()) })),
        WatchRequest::Mismatch { origin } => ack(What::Mismatch(pb::DigestMismatch { origin: name_of(origin) })),
        WatchRequest::Heartbeat => Request::Heartbeat(pb::Heartbeat::default()),
    };
    pb::WatchRequest { message: Some(message) }
}

/// Reads a member's message. `None`: a kind that this version does not know, which the hub ignores.
pub fn decode_request(request: pb::WatchRequest) -> Option<WatchRequest> {
    use pb::watch_ack::What;
    Some(match request.message? {
        Request::Open(open) => WatchRequest::Open(decode_open(open)),
        Request::Own(own) => WatchRequest::Own(decode_selections(own.selections)),
        Request::Ack(ack) => match ack.what? {
            What::InForce(it) => {
                WatchRequest::InForce { interest: it.interest, hub: it.hub.unwrap_or_default().into() }
            }
            What::Mismatch(it) => WatchRequest::Mismatch { origin: origin_of(it.origin) },
        },
        Request::Heartbeat(_) => WatchRequest::Heartbeat,
    })
}

pub fn encode_response(response: WatchResponse) -> pb::WatchResponse {
    use pb::complete::State;
    let message = match response {
        WatchResponse::Welcome { heartbeat_ms } => Response::Welcome(pb::WatchWelcome { heartbeat_ms }),
        WatchResponse::Begin { origin, snapshot, needs_interest } => {
            Response::Begin(pb::Begin { origin: name_of(origin), kind: Some(super::kind(snapshot)), needs_interest })
        }
        WatchResponse::Frame(bytes) => Response::Frame(bytes),
        WatchResponse::End { position, digest, view } => {
            let digest = digest.map(digest_bytes).unwrap_or_default();
            Response::End(pb::End { position: Some(position.into()), digest, view })
        }
        WatchResponse::Interest(InterestChange { number, added, removed, origins, whole }) => {
            Response::Interest(pb::Interest {
                number,
                added: encode_selections(added),
                removed: encode_selections(removed),
                origins: origins.iter().map(|name| name.to_string()).collect(),
                whole,
            })
        }
        WatchResponse::Complete { interest, origin, position, view } => {
            let state = position.map_or(State::Unavailable(pb::Unavailable {}), |at| State::Position(at.into()));
            Response::Complete(pb::Complete { interest, origin: origin.to_string(), state: Some(state), view })
        }
        WatchResponse::Withdrawn { cluster } => Response::Withdrawn(pb::Withdrawn { cluster: cluster.to_string() }),
        WatchResponse::Heartbeat => Response::Heartbeat(pb::Heartbeat::default()),
        WatchResponse::PartsRefused(RefusedParts { parts, total }) => {
            Response::Refused(pb::PartsRefused { parts, total })
        }
        WatchResponse::Hubs(addresses) => Response::Hubs(pb::Hubs { addresses }),
        WatchResponse::Compared { equal } => Response::Compared(pb::Compared { equal }),
    };
    pb::WatchResponse { message: Some(message) }
}

/// Reads the hub's message. `None`: a kind that this version does not know, which a member ignores.
///
/// # Errors
/// When it lacks a field.
pub fn decode_response(response: pb::WatchResponse) -> Result<Option<WatchResponse>, DecodeError> {
    use pb::complete::State;
    let Some(message) = response.message else { return Ok(None) };
    Ok(Some(match message {
        Response::Welcome(welcome) => WatchResponse::Welcome { heartbeat_ms: welcome.heartbeat_ms },
        Response::Begin(begin) => WatchResponse::Begin {
            snapshot: super::is_snapshot(begin.kind.as_ref()),
            origin: origin_of(begin.origin),
            needs_interest: begin.needs_interest,
        },
        Response::Frame(bytes) => WatchResponse::Frame(bytes),
        Response::End(end) => WatchResponse::End {
            position: required("end.position", end.position)?.into(),
            digest: read_digest(&end.digest),
            view: end.view,
        },
        Response::Interest(it) => WatchResponse::Interest(InterestChange {
            number: it.number,
            added: decode_selections(it.added),
            removed: decode_selections(it.removed),
            origins: it.origins.into_iter().map(ClusterName::from).collect(),
            whole: it.whole,
        }),
        Response::Complete(it) => WatchResponse::Complete {
            interest: it.interest,
            origin: it.origin.into(),
            position: match it.state {
                Some(State::Position(at)) => Some(at.into()),
                Some(State::Unavailable(_)) | None => None,
            },
            view: it.view,
        },
        Response::Withdrawn(it) => WatchResponse::Withdrawn { cluster: it.cluster.into() },
        Response::Heartbeat(_) => WatchResponse::Heartbeat,
        Response::Refused(it) => WatchResponse::PartsRefused(RefusedParts { parts: it.parts, total: it.total }),
        Response::Hubs(it) => WatchResponse::Hubs(it.addresses),
        Response::Compared(it) => WatchResponse::Compared { equal: it.equal },
    }))
}

fn encode_open(open: WatchOpen) -> pb::WatchOpen {
    let received = |it: ReceivedOrigin| pb::ResumePoint {
        origin: it.origin.to_string(),
        position: it.position.map(Into::into),
        view: it.view,
        digest: it.digest.map(digest_bytes).unwrap_or_default(),
    };
    pb::WatchOpen {
        protocol: open.protocol,
        hub: open.hub.map(Into::into),
        origins: open.received.into_iter().map(received).collect(),
        interest: encode_selections(open.interest),
        own: encode_selections(open.own),
        hub_digest: open.hub_digest.map(digest_bytes).unwrap_or_default(),
    }
}

fn decode_open(open: pb::WatchOpen) -> WatchOpen {
    let received = |it: pb::ResumePoint| ReceivedOrigin {
        origin: it.origin.into(),
        position: it.position.map(Into::into),
        view: it.view,
        digest: read_digest(&it.digest),
    };
    WatchOpen {
        protocol: open.protocol,
        hub: open.hub.map(Into::into),
        received: open.origins.into_iter().map(received).collect(),
        interest: decode_selections(open.interest),
        own: decode_selections(open.own),
        hub_digest: read_digest(&open.hub_digest),
    }
}

fn encode_selections(list: Vec<WrittenSelection>) -> Vec<pb::Selection> {
    list.into_iter().map(selection::to_wire).collect()
}

fn decode_selections(list: Vec<pb::Selection>) -> Vec<WrittenSelection> {
    list.into_iter().map(selection::from_wire).collect()
}

/// An empty name is the hub's own objects.
fn origin_of(name: String) -> Option<ClusterName> {
    (!name.is_empty()).then(|| name.into())
}

fn name_of(origin: Option<ClusterName>) -> String {
    origin.map(|name| name.to_string()).unwrap_or_default()
}
