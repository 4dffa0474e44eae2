//! The API server of the member's cluster, beside the objects that the source reads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use hanse_kubernetes::{Access, answered};
use hanse_runtime::health::Writes;
use hanse_runtime::retry::Backoff;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::registration::MemberIdentity;

/// The interval between checks of the ConfigMap with the authority.
const CHECK_AUTHORITY_EVERY: Duration = Duration::from_secs(60);
/// The owner of the fields that the member writes.
const FIELD_MANAGER: &str = "hanse-member";
/// The keys under which API servers report the pod that a token is bound to, and its node.
const POD_CLAIM: &str = "authentication.kubernetes.io/pod-name";
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";
/// Reviews at a time: everybody who reaches the port for enrolment can cause them.
const REVIEWS: usize = 8;
/// How long an enrolment waits for those before it.
const TURN_WITHIN: Duration = Duration::from_secs(10);
/// The key of the authority's certificate in its ConfigMap.
pub const AUTHORITY_KEY: &str = "authority.pem";

/// A write that fails for this long is reported: a restart of the API server is not a problem.
const FAILS_AFTER: Duration = Duration::from_secs(5);
/// The name of reviews in reports of failed writes, and how long one that failed is reported: whether the next one fails is known only when
/// an agent enrols.
pub const REVIEWS_REPORTED_AS: &str = "reviews of the tokens of agents";
const REVIEW_REPORTED_FOR: Duration = Duration::from_secs(600);

/// Reports whether an object of the API server, which other programs read, can be written.
#[derive(Debug)]
pub struct Reported {
    writes: Writes,
    object: &'static str,
    failing_since: Option<Instant>,
}

impl Reported {
    /// `object`: its name in the report.
    pub fn new(writes: Writes, object: &'static str) -> Self {
        Self { writes, object, failing_since: None }
    }

    pub fn note<T>(&mut self, result: &anyhow::Result<T>) {
        match result {
            Ok(_) => {
                self.failing_since = None;
                self.writes.note_for_others(self.object, &Ok(()));
            }
            Err(error) if self.failing_since.get_or_insert_with(Instant::now).elapsed() >= FAILS_AFTER => {
                self.writes.note_for_others(self.object, &Err(std::io::Error::other(format!("{error:#}"))));
            }
            Err(_) => {}
        }
    }
}

/// Why a service-account token does not identify a node.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// Another request with this token would have the same answer.
    #[error("{0}")]
    Refused(String),
    /// The API server did not answer.
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

/// Reviews the tokens with which agents enrol.
#[derive(Clone)]
pub struct Reviewer {
    client: Client,
    agents: AgentAccount,
    turns: Arc<Semaphore>,
    /// When the last review failed, and why; `None` if it did not.
    failed: Arc<Mutex<Option<(Instant, String)>>>,
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reviewer").field("agents", &self.agents).finish_non_exhaustive()
    }
}

/// The service account of the agents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentAccount {
    pub namespace: String,
    pub name: String,
    /// The audience that a token must have.
    pub audience: String,
}

impl Reviewer {
    pub fn new(client: Client, agents: AgentAccount) -> Self {
        Self { client, agents, turns: Arc::new(Semaphore::new(REVIEWS)), failed: Arc::default() }
    }

    /// The node of the pod that a token is bound to.
    ///
    /// # Errors
    /// When the token is not a valid token of the agents' service account for the audience, or is not bound to a pod on a node; when the
    /// API server does not answer.
    pub async fn node_of(&self, token: &str) -> Result<String, ReviewError> {
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![self.agents.audience.clone()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let turn = tokio::time::timeout(TURN_WITHIN, self.turns.acquire()).await;
        let _turn = turn.context("many nodes enrol at the same time").map_err(ReviewError::Failed)?;
        let parameters = PostParams::default();
        let reviewed = answered(api.create(&parameters, &review)).await;
        let failed = reviewed.as_ref().err().map(|error| (Instant::now(), format!("{error:#}")));
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = failed;
        let status = reviewed.context("review the token").map_err(ReviewError::Failed)?.status.unwrap_or_default();
        let user = status.user.unwrap_or_default();
        self.check(status.authenticated == Some(true), &status.audiences.unwrap_or_default(), &user)
            .map_err(|error| ReviewError::Refused(error.to_string()))
    }

    /// Why the last review failed, unless that is long ago.
    pub fn failure(&self) -> Option<String> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = failed.as_ref().filter(|(at, _)| at.elapsed() < REVIEW_REPORTED_FOR);
        recent.map(|(_, error)| error.clone())
    }

    fn check(&self, is_authenticated: bool, audiences: &[String], user: &UserInfo) -> anyhow::Result<String> {
        let AgentAccount { namespace, name, audience } = &self.agents;
        ensure!(
            is_authenticated,
            "the API server does not accept the service-account token for the audience {audience}"
        );
        // An API server that does not check audiences returns none.
        ensure!(audiences.contains(audience), "the token is not for the audience {audience}");
        let expected = format!("system:serviceaccount:{namespace}:{name}");
        let user_name = user.username.as_deref().unwrap_or_default();
        ensure!(user_name == expected, "the token is of {user_name}, not of {expected}");
        let claim = |key| user.extra.as_ref().and_then(|extra| extra.get(key)).map_or(&[][..], Vec::as_slice);
        let ([_], [node]) = (claim(POD_CLAIM), claim(NODE_CLAIM)) else {
            bail!("the token is not bound to a pod on a node")
        };
        Ok(node.clone())
    }
}

/// The namespace and name of a ConfigMap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigMapName {
    pub namespace: String,
    pub name: String,
}

/// Keeps the certificate of the cluster's authority in a ConfigMap, from which agents read it, until `stop`.
pub async fn keep_authority(access: Access, to: ConfigMapName, identity: MemberIdentity, stop: CancellationToken) {
    let mut backoff = Backoff::default();
    let mut authorities = identity.authorities();
    loop {
        let pem = authorities.borrow_and_update().certificate().to_pem();
        let wait = match write_authority(&access, &to, &pem).await {
            Ok(()) => {
                backoff.reset();
                CHECK_AUTHORITY_EVERY
            }
            Err(error) => {
                let (error, namespace, name) = (format!("{error:#}"), &to.namespace, &to.name);
                tracing::warn!(
                    error,
                    namespace,
                    name,
                    "authority not written to its ConfigMap: nodes cannot enrol with it"
                );
                backoff.next_delay()
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            _ = authorities.changed() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn write_authority(access: &Access, to: &ConfigMapName, pem: &str) -> anyhow::Result<()> {
    let api: Api<ConfigMap> = Api::namespaced(access.client().await?, &to.namespace);
    let found = answered(api.get_opt(&to.name)).await?;
    if found.is_some_and(|map| map.data.is_some_and(|data| data.get(AUTHORITY_KEY).is_some_and(|it| it == pem))) {
        return Ok(());
    }
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": to.name, "namespace": to.namespace},
        "data": BTreeMap::from([(AUTHORITY_KEY, pem)]),
    });
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    answered(api.patch(&to.name, &parameters, &Patch::Apply(map))).await?;
    tracing::info!(namespace = to.namespace, name = to.name, "authority written to its ConfigMap");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, nodes: &[&str]) -> UserInfo {
        let nodes = nodes.iter().map(|node| (*node).to_owned()).collect();
        let extra = [(NODE_CLAIM.to_owned(), nodes), (POD_CLAIM.to_owned(), vec!["agent-1".to_owned()])].into();
        UserInfo { username: Some(name.to_owned()), extra: Some(extra), ..UserInfo::default() }
    }

    #[tokio::test]
    async fn token_identifies_a_node_only_with_account_audience_and_node() {
        hanse_identity::tls::install_provider();
        let config = kube::Config::new("https://127.0.0.1:1".parse().expect("an address"));
        let agents = AgentAccount {
            namespace: "hanse".to_owned(),
            name: "agent".to_owned(),
            audience: "hanse-member".to_owned(),
        };
        let reviewer = Reviewer::new(Client::try_from(config).expect("a client"), agents);
        let (agent, audience) = ("system:serviceaccount:hanse:agent", ["hanse-member".to_owned()]);
        assert_eq!(reviewer.check(true, &audience, &user(agent, &["one"])).expect("accepted"), "one");
        // A token may be bound to a node object, without a pod.
        let mut of_node = user(agent, &["one"]);
        of_node.extra.as_mut().expect("claims").remove(POD_CLAIM);
        for (is_authenticated, audiences, user) in [
            (false, &audience[..], user(agent, &["one"])),
            (true, &[][..], user(agent, &["one"])),
            (true, &["other".to_owned()][..], user(agent, &["one"])),
            (true, &audience[..], user("system:serviceaccount:other:agent", &["one"])),
            (true, &audience[..], user(agent, &[])),
            (true, &audience[..], user(agent, &["one", "two"])),
            (true, &audience[..], of_node),
        ] {
            assert!(reviewer.check(is_authenticated, audiences, &user).is_err(), "{audiences:?} {user:?}");
        }
    }
}
