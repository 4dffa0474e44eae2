//! Who may call, and what a caller may do.

use hanse_identity::Identity;
use hanse_identity::tls::{Peer, peer_identity};
use tonic::{Request, Status};

use crate::registry::{ChangeError, Snapshot};
use crate::roles::{Need, allow, denial};

/// Checks that `who` has the role that is needed. The hub itself (`init`) may do everything.
pub(crate) fn permit(snapshot: &Snapshot, who: &Identity, need: Need<'_>) -> Result<(), ChangeError> {
    let roles = match who {
        Identity::Hub => return Ok(()),
        Identity::User(name) => snapshot.users.get(name).filter(|user| !user.revoked).map(|user| &user.roles[..]),
        Identity::Cluster(_) | Identity::Node { .. } => None,
    };
    let roles = roles.unwrap_or_default();
    if allow(roles, need) { Ok(()) } else { Err(ChangeError::Denied(denial(&who.to_string(), roles, need))) }
}

/// Whether a connection must be closed.
pub(crate) fn refused(snapshot: &Snapshot, peer: &Peer) -> bool {
    peer.certificate.as_ref().is_some_and(|certificate| !snapshot.admits(certificate))
}

pub(crate) fn caller<T>(request: &Request<T>) -> Result<Identity, Status> {
    match peer_identity(request)? {
        user @ Identity::User(_) => Ok(user.clone()),
        other => Err(Status::permission_denied(format!("{other} is not a user; `hanse user create` creates a user"))),
    }
}

/// Limits the length of unverified input in messages.
pub(super) fn clipped(text: &str) -> String {
    text.chars().take(64).collect()
}
