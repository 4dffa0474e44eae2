//! Enrolment of nodes: single-use tokens with a time limit, stored as hashes, bound to the first key that presents them.
//!
//! One file per token in the folder `node-tokens` of the state, so that `hanse-member node-token create` needs no running member.

use std::time::{Duration, SystemTime};

use hanse_identity::Identity;
use hanse_identity::keys::{Fingerprint, RequestedKey};
use hanse_identity::spiffe::check_subdomain;
use hanse_identity::tls::peer;
use hanse_identity::token::{Token, TokenError, TokenKind};
use hanse_proto::agent::v1 as wire;
use hanse_runtime::moment::{from_seconds, seconds};
use serde::{Deserialize, Serialize};
use tonic::{Request, Response, Status};

use super::nodes::{Locked, NodeRecord, Nodes};
use super::state::Fanout;
use crate::api_server::ReviewError;
use crate::registration::MemberIdentity;
use crate::state::State;

const FOLDER: &str = "node-tokens";
/// The maximum number of tokens, of some 0.5 KB each with a long name.
const MAX_TOKENS: usize = 1_000;
/// Some 1.5 KiB are usual.
const MAX_SERVICE_ACCOUNT_TOKEN_BYTES: usize = 8 * 1024;
/// Pod ranges of one node that are sent; one of each family is usual.
const MAX_POD_RANGES: usize = 64;

/// The stored record of a token.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeToken {
    pub node: String,
    /// SHA-256 of the secret, hexadecimal.
    secret_hash: String,
    /// Seconds since the Unix epoch, by this machine's clock.
    expires_at: u64,
    /// SHA-256 of the public key that presented it first, hexadecimal.
    key: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum NodeTokenError {
    #[error("\"{0}\" is not a node name (a lowercase DNS name)")]
    Name(String),
    #[error("create the token: {0}")]
    Make(String),
    #[error("write the token")]
    Write(#[source] std::io::Error),
    #[error("read the tokens")]
    Read(#[source] std::io::Error),
    #[error(
        "node {0} is not known: it has no record and no token, and the source does not have it; see `hanse-member node list`"
    )]
    Unknown(String),
    #[error("there are {MAX_TOKENS} tokens: revoke those that are not used; see `hanse-member node-token list`")]
    TooMany,
    #[error("node {0} is not revoked: see `hanse-member node list`")]
    NotRevoked(String),
}

/// A new token.
#[derive(Debug)]
pub struct Created {
    /// A secret.
    pub text: String,
    pub id: String,
    pub expires_at: SystemTime,
    /// Whether the source had such a node when it was last read; `None` if it never was.
    pub known: Option<bool>,
}

/// Creates a token that enrols `node` once, within `lifetime`.
///
/// # Errors
/// When the name is not a node name, or the token cannot be written.
pub fn create_node_token(
    state: impl Into<State>,
    identity: &MemberIdentity,
    node: &str,
    lifetime: Duration,
) -> Result<Created, NodeTokenError> {
    let state = state.into();
    Identity::node(identity.cluster(), node).map_err(|_| NodeTokenError::Name(node.to_owned()))?;
    let authority = identity.authority();
    let certificate = authority.certificate();
    let domain = certificate.trust_domain.clone();
    let token = Token::generate(TokenKind::Node, identity.cluster(), domain, certificate.fingerprint());
    let token = token.map_err(NodeTokenError::Make)?;
    let expires_at = SystemTime::now() + lifetime;
    let kept = NodeToken {
        node: node.to_owned(),
        secret_hash: token.secret_hash().to_string(),
        expires_at: seconds(expires_at),
        key: None,
    };
    // Expired tokens are removed.
    let mut count = 0;
    for (id, token) in list_node_tokens(&state)? {
        match token.has_ended(SystemTime::now()) {
            true => drop(revoke_node_token(&state, &id)?),
            false => count += 1,
        }
    }
    if count >= MAX_TOKENS {
        return Err(NodeTokenError::TooMany);
    }
    let text = serde_json::to_vec(&kept).map_err(|error| NodeTokenError::Make(error.to_string()))?;
    state.write(&file_of(&token.id), &text).map_err(NodeTokenError::Write)?;
    let known = Nodes::new(&state).read_source_nodes().map(|nodes| nodes.contains_key(node));
    Ok(Created { text: token.to_text(), id: token.id, expires_at, known })
}

/// The stored tokens, by id.
///
/// # Errors
/// When the folder or a file cannot be read.
pub fn list_node_tokens(state: impl Into<State>) -> Result<Vec<(String, NodeToken)>, NodeTokenError> {
    let tokens = read_tokens(&state.into())?.into_iter().map(|(id, token)| Ok((id, token?)));
    tokens.collect::<std::io::Result<_>>().map_err(NodeTokenError::Read)
}

fn file_of(id: &str) -> String {
    format!("{FOLDER}/{id}.json")
}

/// The record of each token, by id.
fn read_tokens(state: &State) -> Result<Vec<(String, std::io::Result<NodeToken>)>, NodeTokenError> {
    let mut tokens = Vec::new();
    for name in state.list(FOLDER).map_err(NodeTokenError::Read)? {
        let Some(id) = name.strip_suffix(".json") else { continue };
        let token = match state.read(&file_of(id)).transpose() {
            // Revoked in the meantime.
            None => continue,
            Some(bytes) => bytes.and_then(|bytes| Ok(serde_json::from_slice(&bytes)?)),
        };
        tokens.push((id.to_owned(), token));
    }
    Ok(tokens)
}

/// Revokes a token. Returns whether it existed. A node that has enrolled with it stays.
///
/// # Errors
/// When the file cannot be removed.
pub fn revoke_node_token(state: impl Into<State>, id: &str) -> Result<bool, NodeTokenError> {
    // The id becomes a file name.
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_') {
        return Ok(false);
    }
    state.into().remove(&file_of(id)).map_err(NodeTokenError::Write)
}

/// The enrolled nodes. A record that cannot be read is logged and skipped.
///
/// # Errors
/// When they cannot be read.
pub fn list_nodes(state: impl Into<State>) -> Result<Vec<NodeRecord>, NodeTokenError> {
    let nodes = Nodes::new(state);
    nodes.reload().map_err(NodeTokenError::Read)?;
    Ok(nodes.list())
}

/// Revokes the keys and tokens of a node, which may enrol with a later token; a running member ends its stream within two seconds.
///
/// # Errors
/// When the name is not a node name, the node is not known, or the record cannot be written.
pub fn revoke_node(state: impl Into<State>, node: &str) -> Result<(), NodeTokenError> {
    let state = state.into();
    check_subdomain(node).map_err(|_| NodeTokenError::Name(node.to_owned()))?;
    let nodes = Nodes::new(&state);
    let locked = nodes.lock().map_err(NodeTokenError::Write)?;
    // Before the record: if the process ends in between, no token is left that enrols a revoked node.
    let tokens = read_tokens(&state)?;
    let has_token = tokens.iter().any(|(_, token)| token.as_ref().is_ok_and(|token| token.node == node));
    if !has_token && !locked.is_known(node) {
        return Err(NodeTokenError::Unknown(node.to_owned()));
    }
    for (id, token) in tokens {
        match token {
            Ok(token) if token.node != node => continue,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, id, "unreadable token removed"),
        }
        revoke_node_token(&state, &id)?;
    }
    locked.revoke(node).map_err(NodeTokenError::Write)
}

/// Ends the revocation of a node, which may then enrol with a token of its service account. Its former keys stay refused.
///
/// # Errors
/// When the name is not a node name, the node is not revoked, or the record cannot be written.
pub fn allow_node(state: impl Into<State>, node: &str) -> Result<(), NodeTokenError> {
    check_subdomain(node).map_err(|_| NodeTokenError::Name(node.to_owned()))?;
    let nodes = Nodes::new(state);
    let locked = nodes.lock().map_err(NodeTokenError::Write)?;
    match locked.allow(node).map_err(NodeTokenError::Write)? {
        true => Ok(()),
        false => Err(NodeTokenError::NotRevoked(node.to_owned())),
    }
}

impl NodeToken {
    /// It can no longer be used.
    pub fn has_ended(&self, now: SystemTime) -> bool {
        seconds(now) > self.expires_at
    }

    pub fn expires_at(&self) -> SystemTime {
        from_seconds(self.expires_at)
    }

    /// A key has presented it.
    pub fn is_used(&self) -> bool {
        self.key.is_some()
    }
}

#[derive(Debug, Clone)]
pub struct Service {
    pub fanout: Fanout,
    pub identity: MemberIdentity,
}

impl Service {
    /// Redeems the token for a key and returns its node. The key is registered, and streams with another key end.
    fn redeem(&self, locked: &Locked<'_>, request: &wire::EnrolRequest, key: Fingerprint) -> Result<String, Status> {
        // One answer for every invalid token, so that attempts reveal nothing.
        let refused = || Status::permission_denied("the token is not valid: unknown, used by another key, or expired");
        let keep = |_| Status::internal("write the token");
        let token = Token::parse(TokenKind::Node, &request.token).map_err(|error| match error {
            TokenError::OfCluster => Status::invalid_argument(format!("the token is {error}")),
            TokenError::OfNode | TokenError::Malformed => refused(),
        })?;
        let (state, file) = (self.identity.state(), file_of(&token.id));
        let kept = state.read(&file).ok().flatten().and_then(|bytes| serde_json::from_slice::<NodeToken>(&bytes).ok());
        let mut kept = kept.ok_or_else(refused)?;
        let now = SystemTime::now();
        // Both are hashes of secrets of 256 bits: the time of the comparison reveals nothing useful.
        if kept.secret_hash != token.secret_hash().to_string() || kept.has_ended(now) {
            return Err(refused());
        }
        if !request.node.is_empty() && request.node != kept.node {
            let requested: String = request.node.chars().take(253).collect();
            let message = format!("the token is for node {}, not for node {requested}; it stays unused", kept.node);
            return Err(Status::failed_precondition(message));
        }
        let presented = key.to_string();
        match &kept.key {
            // The answer was missed. Later enrolments, renewals and revocations are not undone.
            Some(bound) if *bound == presented && locked.is_of(&kept.node, &key).map_err(keep)? => {}
            Some(_) => return Err(refused()),
            None => kept.key = Some(presented),
        }
        // First the key, then the token: a crash between the two leaves a token that can be presented again.
        locked.enrolled(&kept.node, &key, now, now + self.fanout.shared.lifetime).map_err(keep)?;
        self.fanout.expel(Some(&kept.node));
        let text = serde_json::to_vec(&kept).map_err(|_| Status::internal("write the token"))?;
        state.write_in(locked.turn(), &file, &text).map_err(keep)?;
        Ok(kept.node)
    }
}

impl Service {
    /// The node of a service-account token.
    async fn review(&self, request: &wire::EnrolRequest) -> Result<String, Status> {
        let Some(reviewer) = &self.fanout.shared.reviewer else {
            return Err(Status::permission_denied("this member accepts node tokens only, no service-account tokens"));
        };
        let node = reviewer.node_of(&request.token).await.map_err(|error| match error {
            ReviewError::Refused(why) => Status::permission_denied(why),
            ReviewError::Failed(error) => {
                tracing::warn!(error = format!("{error:#}"), "service-account token not reviewed");
                Status::unavailable("the member cannot review the token at its API server")
            }
        })?;
        if !request.node.is_empty() && request.node != node {
            let requested: String = request.node.chars().take(253).collect();
            return Err(Status::failed_precondition(format!("the token is for node {node}, not for node {requested}")));
        }
        Ok(node)
    }

    /// Registers the key of a node that a service-account token identifies, and ends streams with another key.
    ///
    /// Unlike a node token, this token may be presented again: its holder can get further ones from the API server. It therefore neither
    /// ends a revocation nor a dispute, and the earlier keys become former keys, whose use begins one.
    fn register(&self, locked: &Locked<'_>, node: String, key: Fingerprint) -> Result<String, Status> {
        let keep = |_| Status::internal("write the record of the node");
        if locked.is_revoked(&node).map_err(keep)? {
            let message =
                format!("node {node} was revoked: run `hanse-member node allow {node}`, or create a node token for it");
            return Err(Status::permission_denied(message));
        }
        if let Some((one, other)) = locked.rivals(&node).map_err(keep)? {
            let message = format!(
                "keys of node {node} are in use from {one} and {other}: revoke it, stop the process that has a copy, and run \
                 `hanse-member node allow {node}`"
            );
            return Err(Status::permission_denied(message));
        }
        if !locked.is_of(&node, &key).map_err(keep)? {
            let now = SystemTime::now();
            locked.enrolled_again(&node, &key, now, now + self.fanout.shared.lifetime).map_err(keep)?;
            self.fanout.expel(Some(&node));
        }
        Ok(node)
    }
}

fn is_service_account_token(token: &str) -> bool {
    // A JSON Web Token: three parts, the first of which is the base64 of a JSON object.
    token.starts_with("ey")
        && token.len() <= MAX_SERVICE_ACCOUNT_TOKEN_BYTES
        && token.bytes().filter(|byte| *byte == b'.').count() == 2
}

fn requested(request: &[u8]) -> Result<RequestedKey, Status> {
    RequestedKey::from_request(request).map_err(|error| Status::invalid_argument(format!("invalid request: {error}")))
}

#[tonic::async_trait]
impl wire::enrolment_server::Enrolment for Service {
    async fn enrol(&self, request: Request<wire::EnrolRequest>) -> Result<Response<wire::EnrolResponse>, Status> {
        let from = peer(&request)?.address;
        let request = request.into_inner();
        let key = requested(&request.request)?;
        let reviewed = match is_service_account_token(&request.token) {
            true => Some(self.review(&request).await?),
            false => None,
        };
        // Before the token is used: without the ranges of its pods the node would be open.
        let Some(known) = self.fanout.source_nodes(&request.node).await else {
            return Err(Status::unavailable("the member has not read its source yet"));
        };
        // One at a time, also with concurrent revocations: a token is bound once.
        let (service, public) = (self.clone(), key.public());
        if let Some(node) = reviewed.as_deref().filter(|node| !known.contains_key(*node)) {
            return Err(Status::unavailable(format!("the source does not have the node {node} yet")));
        }
        if let Some(node) = &reviewed {
            self.fanout.refuse_former(node, key.public(), from).await?;
        }
        let enrol = move |locked: &Locked<'_>| match reviewed {
            Some(node) => service.register(locked, node, public),
            None => service.redeem(locked, &request, public),
        };
        let redeemed = self.fanout.shared.keys.change(enrol).await;
        let node = redeemed.map_err(|_| Status::internal("write the token"))??;
        let answer = issue(&self.identity, &node, &key, self.fanout.shared.lifetime)?;
        let ranges = known.get(&*node);
        match ranges {
            Some(ranges) => tracing::info!(node, pod_ranges = ranges.len(), "node enrolled"),
            None => tracing::warn!(node, "node enrolled that the source does not have"),
        }
        let ranges = ranges.map_or(&[][..], |ranges| &ranges[..ranges.len().min(MAX_POD_RANGES)]);
        Ok(Response::new(wire::EnrolResponse { pod_ranges: hanse_protocol::nets(ranges), ..answer }))
    }

    async fn renew_late(
        &self,
        request: Request<wire::RenewLateRequest>,
    ) -> Result<Response<wire::EnrolResponse>, Status> {
        let from = peer(&request)?.address;
        let request = request.into_inner();
        let key = requested(&request.request)?;
        self.fanout.refuse_former(&request.node, key.public(), from).await?;
        let (now, lifetime) = (SystemTime::now(), self.fanout.shared.lifetime);
        let (node, public) = (request.node.clone(), key.public());
        let renew = move |it: &Locked<'_>| it.renew_late(&node, &public, now, now + lifetime);
        let renewed = self.fanout.shared.keys.change(renew).await.flatten();
        // The answer does not reveal whether a key is unknown, revoked or too late.
        if !renewed.map_err(|_| Status::internal("write the renewal"))? {
            return Err(Status::permission_denied("this key may not renew"));
        }
        tracing::info!(node = request.node, "certificate renewed late");
        Ok(Response::new(issue(&self.identity, &request.node, &key, lifetime)?))
    }
}

/// A certificate of the cluster's authority for a node.
pub fn issue(
    identity: &MemberIdentity,
    node: &str,
    key: &RequestedKey,
    lifetime: Duration,
) -> Result<wire::EnrolResponse, Status> {
    let node = Identity::node(identity.cluster(), node).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let authority = identity.authority();
    let certificate = authority
        .issue(&node, key, lifetime, SystemTime::now())
        .map_err(|error| Status::internal(error.to_string()))?;
    Ok(wire::EnrolResponse {
        certificate: certificate.der.to_vec().into(),
        authority: authority.certificate().der.to_vec().into(),
        pod_ranges: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use hanse_identity::keys::Key;

    use super::*;
    use crate::fanout::tests::joined;

    fn request() -> RequestedKey {
        let request = Key::generate().expect("a key").request().expect("signed");
        RequestedKey::from_request(&request).expect("whole")
    }

    #[test]
    fn token_enrols_its_node_with_the_first_key_until_it_expires() {
        let folder = tempfile::tempdir().expect("a folder");
        let identity = joined(folder.path());
        let create = || {
            let created = create_node_token(folder.path(), &identity, "n", Duration::from_secs(60));
            created.expect("a token").text
        };
        let fanout = Fanout::new(folder.path(), Duration::from_secs(60)).expect("a fan-out");
        let service = Service { fanout, identity: identity.clone() };
        let redeem = |token: &str, key: &RequestedKey| {
            let request = wire::EnrolRequest { token: token.to_owned(), ..wire::EnrolRequest::default() };
            let kept = &service.fanout.shared.keys;
            service.redeem(&kept.lock().expect("free"), &request, key.public())
        };
        let (token, mine, theirs) = (create(), request(), request());
        let id = Token::parse(TokenKind::Node, &token).expect("a token").id;
        let other = create();
        let forged = other.replace(&Token::parse(TokenKind::Node, &other).expect("a token").id, &id);
        assert!(forged != other && Token::parse(TokenKind::Node, &forged).is_ok_and(|it| it.id == id));
        assert!(redeem(&forged, &mine).is_err(), "another secret");
        assert_eq!(redeem(&token, &mine).expect("enrolled"), "n");
        assert_eq!(redeem(&token, &mine).expect("the answer was missed"), "n");
        assert!(redeem(&token, &theirs).is_err(), "another key");
        let path = folder.path().join(FOLDER).join(format!("{id}.json"));
        let mut kept: NodeToken = serde_json::from_slice(&std::fs::read(&path).expect("kept")).expect("JSON");
        kept.expires_at = seconds(SystemTime::now()) - 1;
        std::fs::write(&path, serde_json::to_vec(&kept).expect("JSON")).expect("written");
        assert!(redeem(&token, &mine).is_err(), "too late");
        let token = create();
        let id = Token::parse(TokenKind::Node, &token).expect("a token").id;
        assert!(revoke_node_token(folder.path(), &id).expect("revoked"));
        assert!(redeem(&token, &mine).is_err(), "revoked");
        assert!(redeem("", &mine).is_err());
    }

    #[test]
    fn revoked_node_does_not_enrol_with_a_service_account_token() {
        let folder = tempfile::tempdir().expect("a folder");
        let identity = joined(folder.path());
        let fanout = Fanout::new(folder.path(), Duration::from_secs(60)).expect("a fan-out");
        let service = Service { fanout, identity: identity.clone() };
        let register = |key: &RequestedKey| {
            let keys = &service.fanout.shared.keys;
            service.register(&keys.lock().expect("free"), "n".to_owned(), key.public())
        };
        let (first, second) = (request(), request());
        let is_of = |key: &RequestedKey| {
            service.fanout.shared.keys.lock().expect("free").is_of("n", &key.public()).expect("read")
        };
        assert!(register(&first).is_ok() && register(&first).is_ok() && is_of(&first));
        assert!(register(&second).is_ok() && is_of(&second) && !is_of(&first), "the node was set up again");
        let address = |text: &str| text.parse().expect("an address");
        let dispute = |key: &RequestedKey| {
            let keys = service.fanout.shared.keys.lock().expect("free");
            keys.dispute("n", &key.public(), address("192.0.2.2:1")).expect("read")
        };
        assert!(dispute(&second).is_none() && dispute(&first).is_some(), "another process uses the former key");
        assert!(
            register(&request()).is_err() && is_of(&second),
            "this token does not settle which process is the node's"
        );
        revoke_node(folder.path(), "n").expect("it is known");
        assert!(register(&second).is_err() && register(&first).is_err(), "revoked");
        allow_node(folder.path(), "n").expect("it is revoked");
        assert!(allow_node(folder.path(), "n").is_err(), "it is not revoked any more");
        let is_allowed = |key: &RequestedKey| {
            let keys = service.fanout.shared.keys.lock().expect("free");
            let (now, ends) = (SystemTime::now(), SystemTime::now() + Duration::from_secs(60));
            keys.renew_late("n", &key.public(), now, ends).expect("read")
        };
        assert!(!is_allowed(&second), "the revoked key stays refused");
        assert!(register(&second).is_ok() && is_of(&second));
        revoke_node(folder.path(), "n").expect("it is known");
        let token = create_node_token(folder.path(), &identity, "n", Duration::from_secs(60)).expect("a token").text;
        let redeemed = wire::EnrolRequest { token, ..wire::EnrolRequest::default() };
        let keys = &service.fanout.shared.keys;
        assert!(service.redeem(&keys.lock().expect("free"), &redeemed, first.public()).is_ok());
        assert!(register(&first).is_ok(), "enrolled again");
    }

    #[test]
    fn lists_tokens_until_they_are_revoked() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(list_node_tokens(folder.path()).expect("no folder yet").is_empty());
        std::fs::create_dir(folder.path().join(FOLDER)).expect("made");
        let token = NodeToken { node: "n".into(), secret_hash: String::new(), expires_at: 7, key: None };
        let path = folder.path().join(FOLDER).join("0123456789abcdef.json");
        std::fs::write(&path, serde_json::to_vec(&token).expect("text")).expect("written");
        let listed = list_node_tokens(folder.path()).expect("listed");
        assert_eq!((listed.len(), &*listed[0].0, &*listed[0].1.node), (1, "0123456789abcdef", "n"));
        assert!(listed[0].1.has_ended(SystemTime::now()) && !listed[0].1.is_used());
        for other in ["", "other", "../node-tokens/0123456789abcdef", "."] {
            assert!(!revoke_node_token(folder.path(), other).expect("nothing"), "{other}");
        }
        assert!(revoke_node_token(folder.path(), "0123456789abcdef").expect("revoked") && !path.exists());
    }

    #[test]
    fn revoked_node_has_no_token_left() {
        let folder = tempfile::tempdir().expect("a folder");
        let identity = joined(folder.path());
        let create =
            |node| create_node_token(folder.path(), &identity, node, Duration::from_secs(60)).expect("a token");
        let (of_other, _) = (create("other"), create("n"));
        let damaged = folder.path().join(FOLDER).join("0123456789abcdef.json");
        std::fs::write(&damaged, "no token").expect("written");
        assert!(list_node_tokens(folder.path()).is_err(), "it is damaged");
        let ids = || list_node_tokens(folder.path()).expect("read").into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        let unknown = revoke_node(folder.path(), "typo").expect_err("not known");
        assert!(matches!(unknown, NodeTokenError::Unknown(_)) && list_nodes(folder.path()).expect("read").is_empty());
        assert!(damaged.exists(), "nothing was revoked");
        revoke_node(folder.path(), "n").expect("its token is known");
        assert_eq!(ids(), [&*of_other.id]);
        revoke_node(folder.path(), "n").expect("its record is known");
        assert!(matches!(revoke_node(folder.path(), "../n"), Err(NodeTokenError::Name(_))));
        // Nor if the record cannot be written.
        create("n");
        let record = list_nodes(folder.path()).expect("read");
        assert_eq!(record.iter().map(|it| (&*it.node, it.revoked)).collect::<Vec<_>>(), [("n", true)]);
        let file = folder.path().join("nodes").join(format!("{}.json", Fingerprint::of(b"n")));
        std::fs::remove_file(&file).and_then(|()| std::fs::create_dir(&file)).expect("what cannot be replaced");
        assert!(revoke_node(folder.path(), "n").is_err());
        assert_eq!(ids(), [of_other.id]);
    }
}
