//! The changes of the operator other than those of objects. Their author in the audit log is `operator`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hanse_identity::Identity;
use hanse_identity::tls::Peer;
use hanse_identity::token::Token;
use hanse_store::Transaction;

use super::accounts::TokenOrigin;
use super::edit::OPERATOR;
use super::state::Administration;
use crate::manifest::Kind;
use crate::registry::records::{self, CustomResource, MemberState, Settings, TokenRecord};
use crate::registry::{AuditAction, ChangeError, key};

fn audit(action: &'static str, object: String) -> AuditAction {
    AuditAction { who: OPERATOR.to_owned(), action, object, proposed: None }
}

impl Administration {
    /// Accepting clusters is not up to users where the operator decides by `spec.acceptance`. Revoking them is: it only tightens, and
    /// must be possible while the API server is not.
    pub(super) fn check_acceptance(&self) -> Result<(), ChangeError> {
        if self.operated.contains(&Kind::MemberCluster) {
            let text = "the operator of this hub accepts clusters: set spec.acceptance of the MemberCluster to Accepted, with \
                        `kubectl patch` and the management cluster";
            return Err(ChangeError::Conflict(text.to_owned()));
        }
        Ok(())
    }

    pub(crate) fn trust_domain(&self) -> String {
        self.authority.trust_domain().to_string()
    }

    /// The SHA-256 of the root certificate.
    pub(crate) fn root_fingerprint(&self) -> String {
        self.authority.root().fingerprint().to_string()
    }

    /// The key exchanges of the clusters that are connected to this process.
    pub(crate) fn key_exchanges(&self) -> BTreeMap<Arc<str>, &'static str> {
        let peers = self.connections.peers().into_iter().filter(|peer| !peer.closed.is_cancelled());
        let of = |peer: Peer| match peer.identity() {
            Some(Identity::Cluster(name)) => Some((Arc::clone(name), peer.key_exchange)),
            _ => None,
        };
        peers.filter_map(of).collect()
    }

    /// Changes the state of a cluster's registration.
    ///
    /// # Errors
    /// When the cluster has not joined, was revoked and is to be accepted, or the store fails.
    pub(crate) async fn operate_state(&self, cluster: &str, to: MemberState) -> Result<(), ChangeError> {
        let action = match to {
            MemberState::Accepted => "cluster.accept",
            MemberState::Pending => "cluster.suspend",
            MemberState::Revoked { .. } => "cluster.revoke",
        };
        let audited = audit(action, format!("cluster/{cluster}"));
        self.set_state(&Identity::Hub, audited, cluster, to).await
    }

    /// Makes a token for a ClusterJoinToken. Until it is confirmed, no member knows it.
    ///
    /// # Errors
    /// When a limit is reached, or the store fails.
    pub(crate) async fn operate_token(
        &self,
        cluster: &str,
        life: Duration,
        accept: bool,
        uid: &str,
    ) -> Result<Token, ChangeError> {
        let custom_resource = Some(CustomResource { uid: uid.to_owned(), is_written: false });
        let origin = TokenOrigin { created_by: OPERATOR.to_owned(), custom_resource };
        self.issue_token(cluster, life, accept, origin, |object| audit("token.create", object), |_| Ok(())).await
    }

    /// The Secret of a token was written.
    ///
    /// # Errors
    /// When the token was revoked meanwhile, or the store fails.
    pub(crate) async fn confirm_token(&self, id: &str) -> Result<(), ChangeError> {
        let audited = audit("token.write", format!("token/{id}"));
        let change = self.registry.change(&audited, |snapshot| {
            let token =
                snapshot.tokens.get(id).ok_or_else(|| ChangeError::NotFound(format!("token {id} not found")))?;
            let mut record = TokenRecord::clone(token);
            record.custom_resource.iter_mut().for_each(|it| it.is_written = true);
            Ok((Transaction::default().put(key(&["token", id])?, records::encode(&record)), ()))
        });
        change.await.map(|_| ())
    }

    /// Revokes a token. One that does not exist is revoked.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn operate_token_revocation(&self, id: &str) -> Result<(), ChangeError> {
        let audited = audit("token.revoke", format!("token/{id}"));
        match self.delete_token(&Identity::Hub, id, audited).await {
            Err(ChangeError::NotFound(_)) => Ok(()),
            outcome => outcome,
        }
    }

    /// Uses the settings of a ClusterSet; `None`: those of the hub's command line.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn operate_settings(&self, settings: Option<&Settings>) -> Result<(), ChangeError> {
        let audited = audit("settings", "ClusterSet/default".to_owned());
        let change = self.registry.change(&audited, |snapshot| {
            if snapshot.settings.as_ref() == settings {
                return Ok((Transaction::default(), ()));
            }
            let path = key(&["meta", "settings"])?;
            let transaction = match settings {
                Some(settings) => Transaction::default().put(path, records::encode(settings)),
                None => Transaction::default().delete(path),
            };
            Ok((transaction, ()))
        });
        change.await.map(|_| ())
    }
}
