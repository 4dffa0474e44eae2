//! Conversion between wire types and domain types.

use hanse_proto::federation::v1 as wire;
use tonic::Status;

use crate::grants::Namespaces;
use crate::manifest::Kind;
use crate::registry::records::{AuditDetail, AuditRecord, MemberRecord, TokenRecord, UserRecord};
use crate::registry::{Cluster, ClusterState, Lease, Object};
use crate::roles::Role;
use crate::status::NodeState;

/// Maximum number of tiers or clusters in a role.
const MAX_NAMES: usize = 1_000;

pub(super) fn kind_to_wire(kind: Kind) -> wire::ObjectKind {
    match kind {
        Kind::FederatedNetworkPolicy => wire::ObjectKind::FederatedNetworkPolicy,
        Kind::FederatedNetworkSet => wire::ObjectKind::FederatedNetworkSet,
        Kind::MemberCluster => wire::ObjectKind::MemberCluster,
        Kind::StagedFederatedNetworkPolicy => wire::ObjectKind::StagedFederatedNetworkPolicy,
        Kind::Tier => wire::ObjectKind::Tier,
    }
}

/// None for "unspecified".
pub(super) fn kind_from_wire(kind: i32) -> Result<Option<Kind>, Status> {
    match wire::ObjectKind::try_from(kind) {
        Ok(wire::ObjectKind::Unspecified) => Ok(None),
        Ok(wire::ObjectKind::FederatedNetworkPolicy) => Ok(Some(Kind::FederatedNetworkPolicy)),
        Ok(wire::ObjectKind::FederatedNetworkSet) => Ok(Some(Kind::FederatedNetworkSet)),
        Ok(wire::ObjectKind::MemberCluster) => Ok(Some(Kind::MemberCluster)),
        Ok(wire::ObjectKind::StagedFederatedNetworkPolicy) => Ok(Some(Kind::StagedFederatedNetworkPolicy)),
        Ok(wire::ObjectKind::Tier) => Ok(Some(Kind::Tier)),
        Err(_) => Err(Status::invalid_argument(format!("kind: unknown value {kind}"))),
    }
}

pub(super) fn state_name(state: &ClusterState) -> &'static str {
    match state {
        ClusterState::Expected => "expected",
        ClusterState::Pending => "pending",
        ClusterState::Accepted => "accepted",
        ClusterState::Revoked { .. } => "revoked",
    }
}

pub(super) fn lease_name(lease: Lease) -> &'static str {
    match lease {
        Lease::NeverConnected => "never heard",
        Lease::Live => "live",
        Lease::Stale => "stale",
    }
}

pub(super) fn node_state_name(state: NodeState) -> &'static str {
    match state {
        NodeState::Enforcing => "enforcing",
        NodeState::Lagging => "lagging",
        NodeState::Unknown => "unknown",
    }
}

pub(super) fn object_to_wire(object: &Object) -> wire::Object {
    wire::Object {
        kind: kind_to_wire(object.id.kind).into(),
        name: object.id.name.to_string(),
        revision: object.revision,
        manifest: object.manifest.clone(),
    }
}

pub(super) fn token_to_wire(id: &str, token: &TokenRecord) -> wire::TokenInfo {
    wire::TokenInfo {
        id: id.to_owned(),
        cluster: token.cluster.clone(),
        expires_at: token.expires_at,
        accept: token.accept,
        bound_key: token.bound_key.clone().unwrap_or_default(),
        created_by: token.created_by.clone(),
    }
}

pub(super) fn cluster_to_wire(cluster: &Cluster, member: Option<&MemberRecord>) -> wire::ClusterInfo {
    use wire::cluster_info::State;
    let state = match &cluster.state {
        ClusterState::Expected => State::Expected(wire::Expected {}),
        ClusterState::Pending => State::Pending(wire::Pending {}),
        ClusterState::Accepted => State::Accepted(wire::Accepted {}),
        ClusterState::Revoked { reason } => State::Revoked(wire::Revoked { reason: reason.to_string() }),
    };
    let (all_namespaces, namespaces) = match &cluster.grant.namespaces {
        Namespaces::All => (true, Vec::new()),
        Namespaces::Named(names) => (false, names.iter().map(ToString::to_string).collect()),
    };
    wire::ClusterInfo {
        name: cluster.name.to_string(),
        state: Some(state),
        labels: cluster.labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        namespaces,
        all_namespaces,
        cidrs: cluster.grant.cidrs.iter().map(ToString::to_string).collect(),
        key: member.map(|m| m.key.clone()).unwrap_or_default(),
        certificate_expires_at: member.map_or(0, |m| m.certificate_expires_at),
        federated_allow_final: cluster.federated_allow_final,
    }
}

pub(super) fn role_from_wire(role: wire::Role) -> Result<Role, Status> {
    use wire::role::Role as Wire;
    let names = |field: &str, names: Vec<String>| match names.len() {
        1..=MAX_NAMES => Ok(names),
        _ => Err(Status::invalid_argument(format!("roles.{field}: expected 1 to {MAX_NAMES} names"))),
    };
    match role.role {
        Some(Wire::Viewer(_)) => Ok(Role::Viewer),
        Some(Wire::Author(author)) => Ok(Role::Author { tiers: names("author.tiers", author.tiers)? }),
        Some(Wire::Approver(approver)) => Ok(Role::Approver { tiers: names("approver.tiers", approver.tiers)? }),
        Some(Wire::Operator(operator)) => {
            Ok(Role::Operator { clusters: names("operator.clusters", operator.clusters)? })
        }
        Some(Wire::Administrator(_)) => Ok(Role::Administrator),
        None => Err(Status::invalid_argument("roles: unknown role")),
    }
}

fn role_to_wire(role: &Role) -> wire::Role {
    use wire::role::Role as Wire;
    let role = match role {
        Role::Viewer => Wire::Viewer(wire::Viewer {}),
        Role::Author { tiers } => Wire::Author(wire::Author { tiers: tiers.clone() }),
        Role::Approver { tiers } => Wire::Approver(wire::Approver { tiers: tiers.clone() }),
        Role::Operator { clusters } => Wire::Operator(wire::Operator { clusters: clusters.clone() }),
        Role::Administrator => Wire::Administrator(wire::Administrator {}),
    };
    wire::Role { role: Some(role) }
}

pub(super) fn user_to_wire(name: &str, user: &UserRecord) -> wire::UserInfo {
    wire::UserInfo {
        name: name.to_owned(),
        roles: user.roles.iter().map(role_to_wire).collect(),
        revoked: user.revoked,
        certificate_expires_at: user.certificate_expires_at,
    }
}

pub(super) fn audit_to_wire(number: u64, record: AuditRecord, detail: AuditDetail) -> wire::AuditRecord {
    let AuditRecord { at, who, action, object, outcome, detailed: _ } = record;
    let AuditDetail { before, after } = detail;
    wire::AuditRecord { number, at, who, action, object, outcome, before, after }
}
