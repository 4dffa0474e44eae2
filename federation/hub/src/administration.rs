//! The administration API: the service of `administration.proto`.

mod access;
mod accounts;
mod approvals;
mod convert;
mod edit;
mod governed;
mod objects;
mod observe;
mod operated;
mod operators;
mod proposals;
mod state;

use std::sync::Arc;

use hanse_identity::spiffe::check_subdomain;
use hanse_proto::federation::v1 as wire;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use crate::manifest::ObjectId;
use crate::registration::status;
use crate::registry::AuditAction;
use crate::registry::records::MemberState;
use crate::roles::Need;
use access::clipped;
use objects::Answers;
use observe::Wanted;
use state::MAX_WATCHERS;

pub(crate) use access::{caller, permit, refused};
pub use accounts::create_user;
pub(crate) use edit::{OperatorEdit, Origin};
pub(crate) use governed::is_pending_stage;
pub use state::Administration;

/// Maximum length of the reason of a revocation.
const MAX_REASON_BYTES: usize = 1024;

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
        self.check_acceptance().map_err(status)?;
        let audited = AuditAction::new(&who, "cluster.accept", format!("cluster/{}", clipped(&name)));
        self.set_state(&who, audited, &name, MemberState::Accepted).await.map_err(status)?;
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
        let audited = AuditAction::new(&who, "cluster.revoke", format!("cluster/{}", clipped(&name)));
        self.set_state(&who, audited, &name, revoked).await.map_err(status)?;
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

    async fn get_pending(
        &self,
        request: Request<wire::GetPendingRequest>,
    ) -> Result<Response<wire::PendingChange>, Status> {
        let snapshot = self.view(&request)?;
        self.pending(&snapshot, &request.into_inner()).map(Response::new).map_err(status)
    }

    async fn approve(&self, request: Request<wire::ApproveRequest>) -> Result<Response<wire::ApproveResponse>, Status> {
        let who = caller(&request)?;
        self.approve(&who, &request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn list_pending(
        &self,
        request: Request<wire::ListPendingRequest>,
    ) -> Result<Response<wire::ListPendingResponse>, Status> {
        let snapshot = self.view(&request)?;
        let changes = self.all_pending(&snapshot, &caller(&request)?).map_err(status)?;
        Ok(Response::new(wire::ListPendingResponse { changes }))
    }

    async fn reject(&self, request: Request<wire::RejectRequest>) -> Result<Response<wire::RejectResponse>, Status> {
        let who = caller(&request)?;
        self.reject(&who, &request.into_inner()).await.map(Response::new).map_err(status)
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
        Ok(Response::new(self.status(&snapshot)))
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
        let records = records
            .into_iter()
            .map(|(number, record, detail)| convert::audit_to_wire(number, record, detail))
            .collect();
        Ok(Response::new(wire::ListAuditResponse { records }))
    }
}
