//! Messages of publishing streams.

use hanse_proto::federation::v1 as pb;
use pb::publish_request::Message as Request;
use pb::publish_response::Message as Response;

use super::{DecodeError, digest_bytes, read_digest, refusal};
use crate::message::{PublishRequest, PublishResponse, Refusals};

pub fn encode_request(request: PublishRequest) -> pb::PublishRequest {
    let message = match request {
        PublishRequest::Open { protocol, epoch, instance, yields } => {
            Request::Open(pb::PublishOpen { protocol, epoch, instance, yields })
        }
        PublishRequest::Begin { snapshot } => {
            Request::Begin(pb::Begin { origin: String::new(), kind: Some(super::kind(snapshot)), needs_interest: 0 })
        }
        PublishRequest::Frame(bytes) => Request::Frame(bytes),
        PublishRequest::End { position, digest } => {
            let digest = digest.map(digest_bytes).unwrap_or_default();
            Request::End(pb::End { position: Some(position.into()), digest, view: 0 })
        }
        PublishRequest::Report(bytes) => Request::Realisation(bytes),
        PublishRequest::Heartbeat { received_age_ms } => Request::Heartbeat(pb::Heartbeat { received_age_ms }),
    };
    pb::PublishRequest { message: Some(message) }
}

/// Reads a member's message.
///
/// # Errors
/// When it is of no known kind, or lacks a field.
pub fn decode_request(request: pb::PublishRequest) -> Result<PublishRequest, DecodeError> {
    Ok(match request.message.ok_or_else(|| DecodeError::Malformed("an empty message".to_owned()))? {
        Request::Open(open) => {
            let pb::PublishOpen { protocol, epoch, instance, yields } = open;
            PublishRequest::Open { protocol, epoch, instance, yields }
        }
        Request::Begin(begin) => PublishRequest::Begin { snapshot: super::is_snapshot(begin.kind.as_ref()) },
        Request::Frame(bytes) => PublishRequest::Frame(bytes),
        Request::End(end) => PublishRequest::End {
            position: super::required("end.position", end.position)?.into(),
            digest: read_digest(&end.digest),
        },
        Request::Realisation(bytes) => PublishRequest::Report(bytes),
        Request::Heartbeat(beat) => PublishRequest::Heartbeat { received_age_ms: beat.received_age_ms },
    })
}

pub fn encode_response(response: PublishResponse) -> pb::PublishResponse {
    let message = match response {
        PublishResponse::Welcome { published, heartbeat_ms } => {
            Response::Welcome(pb::PublishWelcome { position: published.map(Into::into), heartbeat_ms })
        }
        PublishResponse::Ack { position } => Response::Ack(pb::PublishAck { position: Some(position.into()) }),
        PublishResponse::Refusals(Refusals { refusals, total }) => {
            let refusals = refusals.iter().map(|(id, why)| refusal::encode(*id, why)).collect();
            Response::Refusals(pb::Refusals { refusals, total })
        }
        PublishResponse::Resync { reason } => Response::Resync(pb::Resync { reason }),
        PublishResponse::Replica { id, hub } => Response::Replica(pb::Replica { id, hub: Some(hub.into()) }),
    };
    pb::PublishResponse { message: Some(message) }
}

/// Reads the hub's message. `None`: a kind that this version does not know, which a member ignores.
pub fn decode_response(response: pb::PublishResponse) -> Option<PublishResponse> {
    Some(match response.message? {
        Response::Welcome(welcome) => {
            PublishResponse::Welcome { published: welcome.position.map(Into::into), heartbeat_ms: welcome.heartbeat_ms }
        }
        Response::Ack(ack) => PublishResponse::Ack { position: ack.position.unwrap_or_default().into() },
        Response::Refusals(it) => PublishResponse::Refusals(Refusals {
            refusals: it.refusals.into_iter().map(refusal::decode).collect(),
            total: it.total,
        }),
        Response::Resync(resync) => PublishResponse::Resync { reason: resync.reason },
        Response::Replica(it) => PublishResponse::Replica { id: it.id, hub: it.hub.unwrap_or_default().into() },
    })
}
