//! ClusterJoinTokens: each token is written to one Secret, once.
//!
//! The operator may create Secrets in the hub's namespace, and neither read nor change any. The order is: the hash of the token in the
//! store, the Secret, and then a mark in the store that the Secret was written. After a crash between the first and the last, the
//! operator cannot know whether the Secret has the token: it revokes the token and makes another one. If the Secret exists then, the
//! status says so, and nothing is overwritten.

use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::PostParams;
use serde_json::Value;
use tokio::time::Instant;
use tracing::{info, warn};

use super::Reconciler;
use crate::custom_resources::ClusterJoinTokenStatus;
use crate::management::Task;
use crate::operator::condition::{Answer, Refusal, conditions, json};
use crate::operator::members;
use crate::operator::resource::Key;
use crate::operator::tracked::{Details, Refused, Tracked};
use crate::operator::writer::FIELD_MANAGER;
use crate::registry::{ChangeError, Snapshot};
use hanse_kubernetes::{RequestError, answered};

/// The key of the token in its Secret.
const SECRET_KEY: &str = "token";
/// Where neither the token nor the ClusterSet states a lifetime.
const LIFETIME: Duration = Duration::from_secs(3_600);
/// Tokens that are issued in one pass: each takes three writes.
const ISSUED: usize = 16;

/// What to do with a ClusterJoinToken.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    /// An attempt to write its Secret may have succeeded.
    Revoke(Vec<String>),
    Issue,
}

fn step(snapshot: &Snapshot, uid: &str, is_issued: bool) -> Step {
    let of_it = snapshot.tokens.iter().filter_map(|(id, token)| Some((id, token.custom_resource.as_ref()?)));
    let mut of_it = of_it.filter(|(_, it)| it.uid == uid).peekable();
    if is_issued || of_it.clone().any(|(_, it)| it.is_written) {
        return Step::Nothing;
    }
    match of_it.peek() {
        Some(_) => Step::Revoke(of_it.map(|(id, _)| id.to_string()).collect()),
        None => Step::Issue,
    }
}

impl Reconciler {
    /// Issues tokens.
    pub(super) async fn issue(&mut self) -> anyhow::Result<()> {
        let (snapshot, now) = (self.registry.snapshot(), Instant::now());
        let mut steps = Vec::new();
        for (key, it) in self.ready() {
            let Details::Token(_, status) = &it.details else { continue };
            let waits = it.refused.as_ref().is_some_and(|refused| !refused.may_retry(now));
            if it.is_leaving || !it.has_finalizer() || waits {
                continue;
            }
            match step(&snapshot, &it.uid, status.token_id.is_some()) {
                Step::Nothing => {}
                step => steps.push((key.clone(), step)),
            }
        }
        let mut outcome = Ok(());
        for (key, step) in steps.into_iter().take(ISSUED) {
            if let Step::Revoke(ids) = &step {
                for id in ids {
                    self.administration.operate_token_revocation(id).await.with_context(|| format!("revoke {key}"))?;
                    warn!(object = %key, token = id, "token revoked: its Secret was perhaps not written");
                }
            }
            match self.issue_one(&key).await {
                Ok(()) => {}
                Err(error) => outcome = Err(error),
            }
        }
        outcome
    }

    async fn issue_one(&mut self, key: &Key) -> anyhow::Result<()> {
        let Some(tracked) = self.tracked.get_mut(key) else { return Ok(()) };
        let Details::Token(spec, _) = &tracked.details else { return Ok(()) };
        let uid = tracked.uid.clone();
        let before = tracked.refused.take();
        let refused = |reason, message| Refusal { reason, message };
        let issued = async {
            let spec = spec.as_ref().map_err(|error| Ok(refused("Invalid", error.clone())))?;
            let life = spec.lifetime_seconds.map(Duration::from_secs).or(self.defaults.token_life());
            let secret = |token: &str, id: &str| {
                let owner = serde_json::json!({"apiVersion": "hanse.dev/v1alpha1", "kind": "ClusterJoinToken", "name": *key.name, "uid": uid});
                let metadata = serde_json::json!({
                    "name": spec.secret_name, "ownerReferences": [owner],
                    "annotations": {"hanse.dev/cluster": spec.cluster, "hanse.dev/token-id": id},
                });
                let secret = serde_json::json!({
                    "metadata": metadata, "type": "Opaque", "immutable": true, "stringData": {SECRET_KEY: token},
                });
                serde_json::from_value::<Secret>(secret).expect("a Secret")
            };
            let api: Api<Secret> = Api::default_namespaced(self.writer.client.clone());
            let monitor = &self.writer.monitor;
            let create = async |secret: &Secret, dry_run| {
                let parameters = PostParams { dry_run, field_manager: Some(FIELD_MANAGER.to_owned()) };
                match answered(async { Ok(api.create(&parameters, secret).await) }).await.map_err(Err)? {
                    Ok(_) => {
                        monitor.succeeded(Task::Secret, &key.name);
                        Ok(())
                    }
                    Err(kube::Error::Api(status)) if status.code == 409 => {
                        let name = &spec.secret_name;
                        let text = format!(
                            "spec.secretName: Secret {name} exists: delete it, or create another ClusterJoinToken"
                        );
                        Err(Ok(refused("SecretExists", text)))
                    }
                    Err(kube::Error::Api(status)) => {
                        monitor.refused(Task::Secret, &key.name, &status.message);
                        Err(Ok(refused("SecretNotWritten", status.message)))
                    }
                    Err(error) => {
                        let error = anyhow::Error::from(RequestError::new(error));
                        Err(Err(error.context(format!("write the Secret of {key}"))))
                    }
                }
            };
            // What would be refused makes no token.
            create(&secret("", ""), true).await?;
            let token =
                self.administration.operate_token(&spec.cluster, life.unwrap_or(LIFETIME), spec.accept, &uid).await;
            let token = token.map_err(|error| match error {
                ChangeError::Limit(text) => Ok(refused("LimitReached", text)),
                ChangeError::Invalid(text) => Ok(refused("Invalid", text)),
                error => Err(anyhow::Error::from(error).context(format!("write {key} to the store"))),
            })?;
            if let Err(error) = create(&secret(&token.to_text(), &token.id), false).await {
                // Where there was no answer, the Secret may have been written: the next pass revokes the token.
                if error.is_ok() {
                    self.administration.operate_token_revocation(&token.id).await.map_err(|error| Err(error.into()))?;
                }
                return Err(error);
            }
            self.writer.metrics.wrote("secret");
            info!(object = %key, token = token.id, secret = spec.secret_name, "join token written to its Secret");
            self.administration.confirm_token(&token.id).await.map_err(|error| Err(error.into()))
        };
        match issued.await {
            Ok(()) => Ok(()),
            Err(Ok(refusal)) => {
                let refused = Refused::new(refusal, 0, false, before, Instant::now());
                self.writer.metrics.refused("hub");
                if let Some(tracked) = self.tracked.get_mut(key) {
                    tracked.refused = Some(refused);
                }
                Ok(())
            }
            Err(Err(error)) => Err(error),
        }
    }

    /// Revokes the tokens of a ClusterJoinToken. Its Secret is garbage of the API server, which owns no object any more.
    pub(super) async fn revoke(&mut self, key: &Key) -> anyhow::Result<()> {
        let Some(tracked) = self.tracked.get(key) else { return Ok(()) };
        let snapshot = self.registry.snapshot();
        let is_of_it = |token: &crate::registry::records::TokenRecord| {
            token.custom_resource.as_ref().is_some_and(|it| it.uid == tracked.uid)
        };
        for (id, _) in snapshot.tokens.iter().filter(|(_, token)| is_of_it(token)) {
            self.administration.operate_token_revocation(id).await.with_context(|| format!("revoke {key}"))?;
        }
        Ok(())
    }
}

/// The status of a ClusterJoinToken. What the hub does not store any more is as the status of before says.
pub fn status(snapshot: &Snapshot, tracked: &Tracked, before: &ClusterJoinTokenStatus, now: u64) -> Value {
    let mut stored = snapshot.tokens.iter().filter_map(|(id, token)| {
        token.custom_resource.as_ref().filter(|it| it.uid == tracked.uid && it.is_written).map(|_| (id, token))
    });
    let stored = stored.next();
    let token_id = stored.map(|(id, _)| id.to_string()).or_else(|| before.token_id.clone());
    let expires =
        stored.and_then(|(_, token)| members::time(token.expires_at)).or_else(|| before.expiration_time.clone());
    let bound_key = stored.and_then(|(_, token)| token.bound_key.clone()).or_else(|| before.bound_key.clone());
    let issued = match (&token_id, &tracked.refused) {
        (Some(_), _) => Answer::new("Issued", true, "Issued", "the token was written to the Secret, once"),
        (None, Some(Refused { refusal: Refusal { reason, message }, .. })) => {
            Answer::new("Issued", false, reason, message)
        }
        (None, None) => Answer::new("Issued", false, "Pending", "the hub has not issued the token yet"),
    };
    let used = match &bound_key {
        Some(_) => Answer::new("Used", true, "Used", "a cluster has joined with the token"),
        None => Answer::new("Used", false, "NotUsed", "no cluster has joined with the token"),
    };
    let has_ended = expires.as_ref().is_some_and(|it| u64::try_from(it.0.as_second()).unwrap_or_default() <= now);
    let expired = match (&token_id, stored) {
        (None, _) => Answer::new("Expired", false, "NotIssued", "the token was not issued"),
        _ if has_ended => Answer::new("Expired", true, "Expired", "the lifetime of the token has ended"),
        (_, None) => Answer::new("Expired", true, "Revoked", "the token was revoked"),
        (_, Some(_)) => Answer::new("Expired", false, "Valid", "the token is valid for the key that presents it first"),
    };
    json(&ClusterJoinTokenStatus {
        observed_generation: tracked.generation,
        conditions: conditions(vec![issued, used, expired], tracked.generation, &tracked.status),
        token_id,
        expiration_time: expires,
        bound_key,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::records::{CustomResource, TokenRecord, encode};

    #[test]
    fn token_of_an_interrupted_attempt_is_revoked_and_one_that_was_written_is_never_issued_again() {
        let snapshot = |is_written: Option<bool>| {
            let mut snapshot = Snapshot::default();
            if let Some(is_written) = is_written {
                let token = TokenRecord {
                    cluster: "a".to_owned(),
                    secret_hash: String::new(),
                    expires_at: 1,
                    accept: false,
                    bound_key: None,
                    created_by: "operator".to_owned(),
                    custom_resource: Some(CustomResource { uid: "u".to_owned(), is_written }),
                };
                let key = crate::registry::key(&["token", "t"]).expect("a key");
                snapshot.preview(&hanse_store::Transaction::default().put(key, encode(&token)));
            }
            snapshot
        };
        assert_eq!(step(&snapshot(None), "u", false), Step::Issue);
        assert_eq!(step(&snapshot(None), "u", true), Step::Nothing);
        assert_eq!(step(&snapshot(Some(false)), "u", false), Step::Revoke(vec!["t".to_owned()]));
        assert_eq!(step(&snapshot(Some(false)), "other", false), Step::Issue);
        assert_eq!(step(&snapshot(Some(true)), "u", false), Step::Nothing);
    }
}
