//! The administration API: the conversion module of `administration.proto`, and its rules.

mod convert;
mod objects;
mod observe;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hanse_identity::Identity;
use hanse_identity::spiffe::{check_label, check_subdomain};
use hanse_identity::tls::{Connections, Peer, peer_identity};
use hanse_proto::federation::v1 as wire;
use hanse_store::Transaction;
use tokio::sync::Semaphore;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use objects::{Answers, MAX_DRY_RUNS};

use crate::authority::Authority;
use crate::grants::MemberCluster;
use crate::manifest::ObjectId;
use crate::registration::{requested, status};
use crate::registry::records::{self, MemberRecord, MemberState, TokenRecord, UserRecord};
use crate::registry::{AuditAction, ChangeError, MAX_TOKENS, MAX_USERS, Registry, Snapshot, key, seconds};
use crate::roles::{Need, Role, allow, denial};
use crate::status::Realisations;
use hanse_identity::token::{Token, TokenKind};
use observe::{MAX_WATCHERS, Wanted};

/// Maximum lifetime of a token: a week.
const MAX_TOKEN_LIFE: Duration = Duration::from_secs(7 * 86_400);
/// Maximum number of valid tokens of one cluster, so that a revocation can delete all of them in its transaction.
const MAX_CLUSTER_TOKENS: usize = 64;
/// Expired tokens that are deleted when one is created.
const TOKENS_SWEPT: usize = 32;
/// Maximum length of the reason of a revocation.
const MAX_REASON_BYTES: usize = 1024;

/// The service of `administration.proto`.
#[derive(Clone)]
pub struct Administration {
    registry: Registry,
    authority: Authority,
    connections: Connections,
    realisations: Arc<dyn Realisations>,
    watchers: Arc<Semaphore>,
    dry_runs: Arc<Semaphore>,
}

impl std::fmt::Debug for Administration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Administration").field("registry", &self.registry).finish_non_exhaustive()
    }
}

impl Administration {
    pub fn new(
        registry: Registry,
        authority: Authority,
        connections: Connections,
        realisations: Arc<dyn Realisations>,
    ) -> Self {
        let (watchers, dry_runs) = (Arc::new(Semaphore::new(MAX_WATCHERS)), Arc::new(Semaphore::new(MAX_DRY_RUNS)));
        Self { registry, authority, connections, realisations, watchers, dry_runs }
    }

    fn view<T>(&self, request: &Request<T>) -> Result<Arc<Snapshot>, Status> {
        let snapshot = self.registry.snapshot();
        permit(&snapshot, &caller(request)?, Need::View).map_err(status)?;
        Ok(snapshot)
    }

    async fn create_token(&self, who: &Identity, request: wire::CreateTokenRequest) -> Result<Token, ChangeError> {
        check_label(&request.cluster).map_err(|e| ChangeError::Invalid(format!("cluster: {e}")))?;
        let life = Duration::from_secs(request.lifetime_seconds);
        if life.is_zero() || life > MAX_TOKEN_LIFE {
            return Err(ChangeError::Invalid("lifetime_seconds: use 1 to 604800 (a week)".to_owned()));
        }
        let root = self.authority.root().fingerprint();
        let token = Token::generate(TokenKind::Cluster, &request.cluster, self.authority.trust_domain().clone(), root);
        let token = token.map_err(ChangeError::Invalid)?;
        let now = self.registry.now();
        let record = TokenRecord {
            cluster: request.cluster.clone(),
            secret_hash: token.secret_hash().to_string(),
            expires_at: seconds(now + life),
            accept: request.accept,
            bound_key: None,
            created_by: who.to_string(),
        };
        let audited =
            AuditAction::new(who, "token.create", format!("token/{} for cluster/{}", token.id, token.cluster));
        self.registry
            .change(&audited, |snapshot| {
                permit(snapshot, who, Need::Operate(&request.cluster))?;
                let ended = snapshot.tokens.iter().filter(|(_, t)| t.expires_at <= seconds(now));
                let ended: Vec<_> = ended.map(|(id, _)| id.clone()).collect();
                if snapshot.tokens.len() - ended.len() >= MAX_TOKENS {
                    return Err(ChangeError::Limit(format!("the limit of {MAX_TOKENS} tokens is reached")));
                }
                if live_tokens(snapshot, &request.cluster, seconds(now)).count() >= MAX_CLUSTER_TOKENS {
                    let cluster = &request.cluster;
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

    async fn revoke_token(&self, who: &Identity, id: &str) -> Result<(), ChangeError> {
        let audited = AuditAction::new(who, "token.revoke", format!("token/{}", clipped(id)));
        let change = self.registry.change(&audited, |snapshot| {
            let token = snapshot.tokens.get(id);
            permit(snapshot, who, token.map_or(Need::Administer, |t| Need::Operate(&t.cluster)))?;
            token.ok_or_else(|| ChangeError::NotFound(format!("token {id} not found")))?;
            Ok((Transaction::default().delete(key(&["token", id])?), ()))
        });
        change.await.map(|_| ())
    }

    /// Changes the state of a cluster's registration.
    async fn set_state(
        &self,
        who: &Identity,
        action: &'static str,
        name: &str,
        to: MemberState,
    ) -> Result<(), ChangeError> {
        let audited = AuditAction::new(who, action, format!("cluster/{}", clipped(name)));
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
    fn close_refused(&self) -> u32 {
        let snapshot = self.registry.snapshot();
        let closed = self.connections.close_where(|peer| refused(&snapshot, peer));
        u32::try_from(closed).unwrap_or(u32::MAX)
    }

    async fn create_user(
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

    async fn revoke_user(&self, who: &Identity, name: &str) -> Result<(), ChangeError> {
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

/// CIDRs of clusters never overlap; the later one is refused.
fn check_nets(snapshot: &Snapshot, name: &str, new: &MemberCluster) -> Result<(), ChangeError> {
    for (other, cluster) in &snapshot.clusters {
        if **other != *name
            && let Some((own, theirs)) = new.overlap(&cluster.grant)
        {
            let text =
                format!("spec.grants.cidrs: {own} overlaps with {theirs}, which is granted to the cluster {other}");
            return Err(ChangeError::Conflict(text));
        }
    }
    Ok(())
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
fn clipped(text: &str) -> String {
    text.chars().take(64).collect()
}

#[tonic::async_trait]
impl wire::administration_server::Administration for Administration {
    async fn create_token(
        &self,
        request: Request<wire::CreateTokenRequest>,
    ) -> Result<Response<wire::CreateTokenResponse>, Status> {
        let who = caller(&request)?;
        let token = self.create_token(&who, request.into_inner()).await.map_err(status)?;
        Ok(Response::new(wire::CreateTokenResponse { id: token.id.clone(), token: token.to_text() }))
    }

    async fn list_tokens(
        &self,
        request: Request<wire::ListTokensRequest>,
    ) -> Result<Response<wire::ListTokensResponse>, Status> {
        let snapshot = self.view(&request)?;
        let tokens = snapshot.tokens.iter().map(|(id, token)| convert::token_to_wire(id, token)).collect();
        Ok(Response::new(wire::ListTokensResponse { tokens }))
    }

    async fn revoke_token(
        &self,
        request: Request<wire::RevokeTokenRequest>,
    ) -> Result<Response<wire::RevokeTokenResponse>, Status> {
        let who = caller(&request)?;
        self.revoke_token(&who, &request.into_inner().id).await.map_err(status)?;
        Ok(Response::new(wire::RevokeTokenResponse {}))
    }

    async fn list_clusters(
        &self,
        request: Request<wire::ListClustersRequest>,
    ) -> Result<Response<wire::ListClustersResponse>, Status> {
        let snapshot = self.view(&request)?;
        let wanted = request.into_inner().name;
        let clusters = snapshot.clusters.iter().filter(|(name, _)| wanted.is_empty() || ***name == *wanted);
        let clusters = clusters
            .map(|(name, cluster)| convert::cluster_to_wire(cluster, snapshot.members.get(name).map(|m| &m.record)));
        Ok(Response::new(wire::ListClustersResponse { clusters: clusters.collect() }))
    }

    async fn accept_cluster(
        &self,
        request: Request<wire::AcceptClusterRequest>,
    ) -> Result<Response<wire::AcceptClusterResponse>, Status> {
        let who = caller(&request)?;
        let name = request.into_inner().name;
        self.set_state(&who, "cluster.accept", &name, MemberState::Accepted).await.map_err(status)?;
        Ok(Response::new(wire::AcceptClusterResponse {}))
    }

    async fn revoke_cluster(
        &self,
        request: Request<wire::RevokeClusterRequest>,
    ) -> Result<Response<wire::RevokeClusterResponse>, Status> {
        let who = caller(&request)?;
        let wire::RevokeClusterRequest { name, reason } = request.into_inner();
        if reason.len() > MAX_REASON_BYTES {
            return Err(Status::invalid_argument("reason: at most 1,024 bytes"));
        }
        let revoked = MemberState::Revoked { reason };
        self.set_state(&who, "cluster.revoke", &name, revoked).await.map_err(status)?;
        let closed = self.close_refused();
        info!(cluster = name, closed, "cluster revoked");
        Ok(Response::new(wire::RevokeClusterResponse { closed }))
    }

    async fn create_user(
        &self,
        request: Request<wire::CreateUserRequest>,
    ) -> Result<Response<wire::CreateUserResponse>, Status> {
        let who = caller(&request)?;
        let created = self.create_user(&who, request.into_inner()).await?;
        self.close_refused();
        Ok(Response::new(created))
    }

    async fn list_users(
        &self,
        request: Request<wire::ListUsersRequest>,
    ) -> Result<Response<wire::ListUsersResponse>, Status> {
        let snapshot = self.registry.snapshot();
        permit(&snapshot, &caller(&request)?, Need::Administer).map_err(status)?;
        let users = snapshot.users.iter().map(|(name, user)| convert::user_to_wire(name, user)).collect();
        Ok(Response::new(wire::ListUsersResponse { users }))
    }

    async fn revoke_user(
        &self,
        request: Request<wire::RevokeUserRequest>,
    ) -> Result<Response<wire::RevokeUserResponse>, Status> {
        let who = caller(&request)?;
        self.revoke_user(&who, &request.into_inner().name).await.map_err(status)?;
        Ok(Response::new(wire::RevokeUserResponse { closed: self.close_refused() }))
    }

    async fn apply(&self, request: Request<wire::ApplyRequest>) -> Result<Response<wire::ApplyResponse>, Status> {
        let who = caller(&request)?;
        self.apply(&who, request.into_inner(), false).await.map(Response::new).map_err(status)
    }

    async fn dry_run(&self, request: Request<wire::ApplyRequest>) -> Result<Response<wire::ApplyResponse>, Status> {
        let who = caller(&request)?;
        self.apply(&who, request.into_inner(), true).await.map(Response::new).map_err(status)
    }

    async fn get(&self, request: Request<wire::GetRequest>) -> Result<Response<wire::GetResponse>, Status> {
        let snapshot = self.view(&request)?;
        let request = request.into_inner();
        let kind = convert::kind_from_wire(request.kind)?;
        let wanted = Wanted { kind, name: request.name };
        let objects = snapshot.objects.values().filter(|object| wanted.includes(&object.id));
        let objects = objects.map(|object| convert::object_to_wire(object));
        Ok(Response::new(wire::GetResponse { objects: objects.collect() }))
    }

    async fn delete(&self, request: Request<wire::DeleteRequest>) -> Result<Response<wire::DeleteResponse>, Status> {
        let who = caller(&request)?;
        self.delete(&who, request.into_inner()).await.map(Response::new).map_err(status)
    }

    type ApplyManyStream = Answers<wire::ApplyManyResponse>;

    async fn apply_many(
        &self,
        request: Request<Streaming<wire::ApplyManyRequest>>,
    ) -> Result<Response<Self::ApplyManyStream>, Status> {
        let who = caller(&request)?;
        Ok(Response::new(self.edit_many(who, request.into_inner())))
    }

    type DeleteManyStream = Answers<wire::DeleteManyResponse>;

    async fn delete_many(
        &self,
        request: Request<Streaming<wire::DeleteManyRequest>>,
    ) -> Result<Response<Self::DeleteManyStream>, Status> {
        let who = caller(&request)?;
        Ok(Response::new(self.edit_many(who, request.into_inner())))
    }

    async fn version(&self, request: Request<wire::VersionRequest>) -> Result<Response<wire::VersionResponse>, Status> {
        self.view(&request)?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let trust_domain = self.authority.trust_domain().to_string();
        Ok(Response::new(wire::VersionResponse { version, trust_domain }))
    }

    type WatchStream = ReceiverStream<Result<wire::ObjectChanges, Status>>;

    async fn watch(&self, request: Request<wire::GetRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.view(&request)?;
        let wire::GetRequest { kind, name } = request.into_inner();
        let wanted = Wanted { kind: convert::kind_from_wire(kind)?, name };
        let watchers = Arc::clone(&self.watchers).try_acquire_owned();
        let permit = watchers.map_err(|_| Status::resource_exhausted(format!("{MAX_WATCHERS} watch already")))?;
        Ok(Response::new(ReceiverStream::new(observe::watch_objects(self.registry.subscribe(), wanted, permit))))
    }

    async fn status(&self, request: Request<wire::StatusRequest>) -> Result<Response<wire::StatusResponse>, Status> {
        let snapshot = self.view(&request)?;
        let clusters = self.cluster_status(&snapshot);
        Ok(Response::new(wire::StatusResponse { revision: snapshot.revision, clusters }))
    }

    async fn list_nodes(
        &self,
        request: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesResponse>, Status> {
        let snapshot = self.view(&request)?;
        Ok(Response::new(self.nodes(&snapshot, &request.into_inner())))
    }

    async fn object_status(
        &self,
        request: Request<wire::ObjectStatusRequest>,
    ) -> Result<Response<wire::ObjectStatusResponse>, Status> {
        let snapshot = self.view(&request)?;
        let wire::ObjectStatusRequest { kind, name, gone_at } = request.into_inner();
        let kind = convert::kind_from_wire(kind)?.ok_or_else(|| Status::invalid_argument("kind: name one"))?;
        check_subdomain(&name).map_err(|e| Status::invalid_argument(format!("name: {e}")))?;
        let id = ObjectId { kind, name: name.into() };
        self.object_status(&snapshot, &id, gone_at).map(Response::new)
    }

    async fn list_audit(
        &self,
        request: Request<wire::ListAuditRequest>,
    ) -> Result<Response<wire::ListAuditResponse>, Status> {
        permit(&self.registry.snapshot(), &caller(&request)?, Need::Administer).map_err(status)?;
        let wire::ListAuditRequest { limit, object } = request.into_inner();
        let limit = match limit {
            0 => 100,
            limit => limit as usize,
        };
        let records = self.registry.audit(limit, &object).await.map_err(status)?;
        let records = records.into_iter().map(|(number, record)| convert::audit_to_wire(number, record)).collect();
        Ok(Response::new(wire::ListAuditResponse { records }))
    }
}
