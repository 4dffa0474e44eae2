//! Tokens, registrations of clusters, and users.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hanse_identity::Identity;
use hanse_identity::spiffe::check_label;
use hanse_identity::token::{Token, TokenKind};
use hanse_proto::federation::v1 as wire;
use hanse_store::Transaction;
use tonic::Status;

use super::access::{clipped, permit, refused};
use super::convert;
use super::state::Administration;
use crate::authority::Authority;
use crate::registration::{requested, status};
use crate::registry::records::{self, CustomResource, MemberRecord, MemberState, TokenRecord, UserRecord};
use crate::registry::{AuditAction, ChangeError, MAX_TOKENS, MAX_USERS, Registry, Snapshot, key, seconds};
use crate::roles::{Need, Role};

/// Maximum lifetime of a token: a week.
const MAX_TOKEN_LIFE: Duration = Duration::from_secs(7 * 86_400);
/// Maximum number of valid tokens of one cluster, so that a revocation can delete all of them in its transaction.
const MAX_CLUSTER_TOKENS: usize = 64;
/// Expired tokens that are deleted when one is created.
const TOKENS_SWEPT: usize = 32;

/// Who made a token.
pub(super) struct TokenOrigin {
    pub created_by: String,
    pub custom_resource: Option<CustomResource>,
}

impl Administration {
    pub(super) async fn create_token(
        &self,
        who: &Identity,
        request: wire::CreateTokenRequest,
    ) -> Result<Token, ChangeError> {
        check_label(&request.cluster).map_err(|e| ChangeError::Invalid(format!("cluster: {e}")))?;
        let life = Duration::from_secs(request.lifetime_seconds);
        if life.is_zero() || life > MAX_TOKEN_LIFE {
            return Err(ChangeError::Invalid("lifetime_seconds: use 1 to 604800 (a week)".to_owned()));
        }
        let origin = TokenOrigin { created_by: who.to_string(), custom_resource: None };
        let audit = |object| AuditAction::new(who, "token.create", object);
        self.issue_token(&request.cluster, life, request.accept, origin, audit, |snapshot| {
            permit(snapshot, who, Need::Operate(&request.cluster))
        })
        .await
    }

    /// Makes a token, where `permitted` does not refuse it.
    pub(super) async fn issue_token(
        &self,
        cluster: &str,
        life: Duration,
        accept: bool,
        origin: TokenOrigin,
        audit: impl FnOnce(String) -> AuditAction,
        permitted: impl Fn(&Snapshot) -> Result<(), ChangeError>,
    ) -> Result<Token, ChangeError> {
        let root = self.authority.root().fingerprint();
        let token = Token::generate(TokenKind::Cluster, cluster, self.authority.trust_domain().clone(), root);
        let token = token.map_err(ChangeError::Invalid)?;
        let now = self.registry.now();
        let record = TokenRecord {
            cluster: cluster.to_owned(),
            secret_hash: token.secret_hash().to_string(),
            expires_at: seconds(now + life),
            accept,
            bound_key: None,
            created_by: origin.created_by,
            custom_resource: origin.custom_resource,
        };
        let audited = audit(format!("token/{} for cluster/{}", token.id, token.cluster));
        self.registry
            .change(&audited, |snapshot| {
                permitted(snapshot)?;
                let ended = snapshot.tokens.iter().filter(|(_, t)| t.expires_at <= seconds(now));
                let ended: Vec<_> = ended.map(|(id, _)| id.clone()).collect();
                if snapshot.tokens.len() - ended.len() >= MAX_TOKENS {
                    return Err(ChangeError::Limit(format!("the limit of {MAX_TOKENS} tokens is reached")));
                }
                if live_tokens(snapshot, cluster, seconds(now)).count() >= MAX_CLUSTER_TOKENS {
                    let text = format!(
                        "the limit of {MAX_CLUSTER_TOKENS} tokens for cluster {cluster} is reached: revoke one"
                    );
                    return Err(ChangeError::Limit(text));
                }
                let mut transaction = Transaction::default().put(key(&["token", &token.id])?, records::encode(&record));
                for id in ended.iter().take(TOKENS_SWEPT) {
                    transaction = transaction.delete(key(&["token", id])?);
                }
                Ok((transaction, ()))
            })
            .await?;
        Ok(token)
    }

    pub(super) async fn revoke_token(&self, who: &Identity, id: &str) -> Result<(), ChangeError> {
        self.delete_token(who, id, AuditAction::new(who, "token.revoke", format!("token/{}", clipped(id)))).await
    }

    pub(super) async fn delete_token(&self, who: &Identity, id: &str, audited: AuditAction) -> Result<(), ChangeError> {
        let change = self.registry.change(&audited, |snapshot| {
            let token = snapshot.tokens.get(id);
            permit(snapshot, who, token.map_or(Need::Administer, |t| Need::Operate(&t.cluster)))?;
            token.ok_or_else(|| ChangeError::NotFound(format!("token {id} not found")))?;
            Ok((Transaction::default().delete(key(&["token", id])?), ()))
        });
        change.await.map(|_| ())
    }

    /// Changes the state of a cluster's registration.
    pub(super) async fn set_state(
        &self,
        who: &Identity,
        audited: AuditAction,
        name: &str,
        to: MemberState,
    ) -> Result<(), ChangeError> {
        let change = self.registry.change(&audited, |snapshot| {
            permit(snapshot, who, Need::Operate(name))?;
            let member = snapshot.members.get(name).map(|m| m.record.clone());
            let member = member.ok_or_else(|| ChangeError::NotFound(format!("cluster {name} has not joined")))?;
            let transaction = match (&member.state, &to) {
                (from, to) if from == to => Transaction::default(),
                (MemberState::Revoked { .. }, MemberState::Accepted) => {
                    let text = "the cluster was revoked: join again with a new token and `hanse-member join`";
                    return Err(ChangeError::Conflict(text.to_owned()));
                }
                (MemberState::Revoked { .. }, _) => Transaction::default(),
                _ => {
                    let mut transaction = Transaction::default();
                    if matches!(to, MemberState::Revoked { .. }) {
                        // Its tokens are deleted with it.
                        for id in live_tokens(snapshot, name, self.registry.now_seconds()) {
                            transaction = transaction.delete(key(&["token", id])?);
                        }
                    }
                    let record = MemberRecord { state: to.clone(), ..member };
                    transaction.put(key(&["member", name])?, records::encode(&record))
                }
            };
            Ok((transaction, ()))
        });
        change.await.map(|_| ())
    }

    /// Closes the connections of this replica whose certificate is no longer admitted. Other replicas follow the store.
    pub(super) fn close_refused(&self) -> u32 {
        let snapshot = self.registry.snapshot();
        let closed = self.connections.close_where(|peer| refused(&snapshot, peer));
        u32::try_from(closed).unwrap_or(u32::MAX)
    }

    pub(super) async fn create_user(
        &self,
        who: &Identity,
        request: wire::CreateUserRequest,
    ) -> Result<wire::CreateUserResponse, Status> {
        let identity = Identity::user(&request.name).map_err(|e| Status::invalid_argument(format!("name: {e}")))?;
        let roles = request.roles.into_iter().map(convert::role_from_wire).collect::<Result<Vec<Role>, _>>()?;
        if roles.is_empty() || roles.len() > 16 {
            return Err(Status::invalid_argument("roles: expected 1 to 16"));
        }
        let requested = requested(&request.request, "request")?;
        let now = self.registry.now();
        create_user(&self.registry, &self.authority, who, &request.name, roles, &requested.public().to_string(), now)
            .await
            .map_err(status)?;
        let certificate = self.authority.ca().issue(&identity, &requested, self.authority.lifetimes.user, now);
        let certificate = certificate.map_err(|e| Status::internal(e.to_string()))?;
        Ok(wire::CreateUserResponse {
            certificate: certificate.der.to_vec().into(),
            root: self.authority.root().der.to_vec().into(),
        })
    }

    pub(super) async fn revoke_user(&self, who: &Identity, name: &str) -> Result<(), ChangeError> {
        let audited = AuditAction::new(who, "user.revoke", format!("user/{}", clipped(name)));
        let change = self.registry.change(&audited, |snapshot| {
            permit(snapshot, who, Need::Administer)?;
            let user = snapshot.users.get(name);
            let user = user.ok_or_else(|| ChangeError::NotFound(format!("user {name} not found")))?;
            if !other_administrator(snapshot, name) {
                return Err(ChangeError::Conflict("this is the last administrator".to_owned()));
            }
            let record = UserRecord { revoked: true, ..UserRecord::clone(user) };
            Ok((Transaction::default().put(key(&["user", name])?, records::encode(&record)), ()))
        });
        change.await.map(|_| ())
    }
}

/// Creates a user, or replaces the key and roles of one.
///
/// # Errors
/// When `who` lacks the role, or the store fails.
pub async fn create_user(
    registry: &Registry,
    authority: &Authority,
    who: &Identity,
    name: &str,
    roles: Vec<Role>,
    public: &str,
    now: SystemTime,
) -> Result<(), ChangeError> {
    let record = UserRecord {
        key: public.to_owned(),
        previous_key: None,
        roles,
        revoked: false,
        certificate_expires_at: seconds(now + authority.lifetimes.user),
    };
    let audited = AuditAction::new(who, "user.create", format!("user/{name}"));
    let change = registry.change(&audited, |snapshot| {
        permit(snapshot, who, Need::Administer)?;
        if snapshot.users.len() >= MAX_USERS && !snapshot.users.contains_key(name) {
            return Err(ChangeError::Limit(format!("the limit of {MAX_USERS} users is reached")));
        }
        if !record.roles.contains(&Role::Administrator) && !other_administrator(snapshot, name) {
            return Err(ChangeError::Conflict("this is the last administrator".to_owned()));
        }
        Ok((Transaction::default().put(key(&["user", name])?, records::encode(&record)), ()))
    });
    change.await.map(|_| ())
}

/// The valid tokens of a cluster.
fn live_tokens<'a>(snapshot: &'a Snapshot, cluster: &'a str, now: u64) -> impl Iterator<Item = &'a Arc<str>> {
    let live = move |(_, token): &(&Arc<str>, &Arc<TokenRecord>)| token.cluster == cluster && token.expires_at > now;
    snapshot.tokens.iter().filter(live).map(|(id, _)| id)
}

/// Whether an administrator other than `name` exists.
fn other_administrator(snapshot: &Snapshot, name: &str) -> bool {
    let others = snapshot.users.iter().filter(|(other, user)| ***other != *name && !user.revoked);
    others.into_iter().any(|(_, user)| user.roles.contains(&Role::Administrator))
}
