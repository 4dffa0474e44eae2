//! Joining and renewing: the conversion module of `registration.proto`, and its rules.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use hanse_api::Object;
use hanse_api::hanse::ClusterAcceptance;
use hanse_identity::Identity;
use hanse_identity::ca::CaError;
use hanse_identity::keys::{Certificate, Fingerprint, KeyError, RequestedKey};
use hanse_identity::spiffe::check_label;
use hanse_identity::tls::{host_of, peer, peer_identity};
use hanse_proto::federation::v1 as wire;
use hanse_runtime::rate_limit::RateLimit;
use hanse_store::{StoreError, Transaction};
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::authority::Authority;
use crate::manifest::{Kind, ObjectId};
use crate::metrics::{HubMetrics, Outcome};
use crate::registry::records::{self, MemberRecord, MemberState, TokenRecord, UserRecord};
use crate::registry::{AuditAction, ChangeError, MAX_CLUSTERS, Registry, Snapshot, key, seconds};
use hanse_identity::token::{MAX_TOKEN_BYTES, Token, TokenKind};

/// Interval at which a waiting member retries.
const RETRY: Duration = Duration::from_secs(1);
/// Calls on the join listener from one address, with a burst of ten seconds' worth: each costs up to two signatures to verify and
/// two to make, below a millisecond.
const CALLS_PER_SECOND: f64 = 10.0;
/// Renewals of one identity. One is enough; responses may be lost.
const RENEWALS_IN_A_LIFETIME: f64 = 16.0;
/// The same message for a wrong token, a wrong cluster and an unknown token: callers must not distinguish them.
const REFUSED: &str =
    "invalid token: unknown, expired, revoked, or for another cluster; `hanse token create` creates a new one";

/// The services of `registration.proto`.
#[derive(Debug, Clone)]
pub struct Registration {
    registry: Registry,
    authority: Authority,
    metrics: HubMetrics,
    /// `spec.acceptance` of a MemberCluster precedes the token.
    is_operated: bool,
    /// Of calls without a certificate.
    rate: Arc<Mutex<RateLimit<IpAddr>>>,
    /// Of renewals: each is written to the store and to the audit log, which is bounded.
    renewals: Arc<Mutex<RateLimit<String>>>,
}

/// The certificates that a join or a renewal returns.
struct Issued {
    certificate: Certificate,
    intermediate: Option<Certificate>,
}

enum Joined {
    Issued(Box<Issued>),
    Waiting,
}

impl Registration {
    pub fn new(registry: Registry, authority: Authority, metrics: HubMetrics) -> Self {
        let rate = Arc::new(Mutex::new(RateLimit::new(CALLS_PER_SECOND)));
        let lifetime = authority.lifetimes.leaf.as_secs_f64().max(1.0);
        let renewals = RateLimit::with_burst(RENEWALS_IN_A_LIFETIME / lifetime, RENEWALS_IN_A_LIFETIME);
        let renewals = Arc::new(Mutex::new(renewals));
        Self { registry, authority, metrics, is_operated: false, rate, renewals }
    }

    /// Where an operator runs, `spec.acceptance` of a MemberCluster decides, and the token only where that is absent.
    #[must_use]
    pub fn with_operator(self) -> Self {
        Self { is_operated: true, ..self }
    }

    /// The state of a cluster that registers.
    fn initial_state(&self, snapshot: &Snapshot, token: &TokenRecord) -> Result<MemberState, ChangeError> {
        let id = ObjectId { kind: Kind::MemberCluster, name: token.cluster.as_str().into() };
        let object = snapshot.objects.get(&id).filter(|_| self.is_operated);
        let decided = object.and_then(|object| match object.converted() {
            Ok(Object::Member(member)) => member.acceptance,
            _ => None,
        });
        Ok(match decided {
            Some(ClusterAcceptance::Accepted) => MemberState::Accepted,
            None if token.accept => MemberState::Accepted,
            Some(ClusterAcceptance::Pending) | None => MemberState::Pending,
            Some(ClusterAcceptance::Revoked) => {
                let text = "spec.acceptance of the MemberCluster is Revoked: an administrator of the ClusterSet must change it";
                return Err(ChangeError::Denied(text.to_owned()));
            }
        })
    }

    /// Limits calls on the join listener: connections are limited, but each may carry many calls.
    fn admit<T>(&self, request: &Request<T>) -> Result<SocketAddr, Status> {
        let address = peer(request)?.address;
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        match rate.allows(host_of(address.ip()), Instant::now()) {
            true => Ok(address),
            false => Err(Status::resource_exhausted("too many calls from this address: try again in a second")),
        }
    }

    async fn join(
        &self,
        token: &Token,
        request: &RequestedKey,
        intermediate: &RequestedKey,
        allow_final: bool,
    ) -> Result<Joined, ChangeError> {
        let now = self.registry.now();
        let public = request.public().to_string();
        let action = AuditAction {
            who: format!("token/{}", token.id),
            action: "join",
            object: format!("cluster/{}", token.cluster),
            proposed: None,
        };
        let root = self.authority.root().fingerprint();
        let lifetimes = self.authority.lifetimes;
        let (_, accepted) = self
            .registry
            .change(&action, |snapshot| {
                let record = check_token(snapshot, token, root, now)?;
                let mut transaction = Transaction::default();
                match &record.bound_key {
                    None => {
                        let bound = TokenRecord { bound_key: Some(public.clone()), ..record.clone() };
                        transaction = transaction.put(key(&["token", &token.id])?, records::encode(&bound));
                    }
                    Some(bound) if *bound == public => {}
                    Some(_) => return Err(ChangeError::Denied("the token was used with another key".to_owned())),
                }
                if snapshot.members.len() >= MAX_CLUSTERS && !snapshot.members.contains_key(token.cluster.as_str()) {
                    return Err(ChangeError::Limit(format!("the limit of {MAX_CLUSTERS} clusters is reached")));
                }
                let before = snapshot.members.get(token.cluster.as_str()).map(|m| &m.record);
                let member = match before {
                    // The same member retries: the decision of the operator stays in force.
                    Some(member) if member.token == token.id && member.key == public => member.clone(),
                    Some(member) if member.token == token.id => {
                        let text = "the cluster has renewed its key after it joined with this token";
                        return Err(ChangeError::Denied(text.to_owned()));
                    }
                    // A used token does not restore a registration that a newer token has replaced.
                    Some(_) if record.bound_key.is_some() => {
                        return Err(ChangeError::Denied("the cluster has joined with a newer token".to_owned()));
                    }
                    // A newer token replaces the registration, including its key.
                    _ => MemberRecord {
                        key: public.clone(),
                        previous_key: None,
                        state: self.initial_state(snapshot, &record)?,
                        certificate_expires_at: 0,
                        federated_allow_final: allow_final,
                        token: token.id.clone(),
                    },
                };
                let accepted = match &member.state {
                    MemberState::Accepted => true,
                    MemberState::Pending => false,
                    MemberState::Revoked { .. } => {
                        return Err(ChangeError::Denied("the cluster was revoked".to_owned()));
                    }
                };
                // The expiry is recorded before the certificate is issued.
                let expires = if accepted { seconds(now + lifetimes.leaf) } else { 0 };
                let member = MemberRecord { certificate_expires_at: expires, ..member };
                if before != Some(&member) {
                    transaction = transaction.put(key(&["member", &token.cluster])?, records::encode(&member));
                }
                Ok((transaction, accepted))
            })
            .await?;
        if !accepted {
            return Ok(Joined::Waiting);
        }
        let identity = Identity::cluster(&token.cluster).map_err(|e| ChangeError::Invalid(e.to_string()))?;
        let ca = self.authority.ca();
        let certificate = ca.issue(&identity, request, lifetimes.leaf, now).map_err(signing)?;
        let intermediate =
            ca.issue_intermediate(&token.cluster, intermediate, lifetimes.intermediate, now).map_err(signing)?;
        Ok(Joined::Issued(Box::new(Issued { certificate, intermediate: Some(intermediate) })))
    }

    async fn renew(
        &self,
        presented: &Certificate,
        request: &RequestedKey,
        intermediate: Option<&RequestedKey>,
    ) -> Result<Issued, ChangeError> {
        let now = self.registry.now();
        let identity = presented.identity.clone();
        let action = AuditAction::new(&identity, "renew", identity.to_string());
        let (new, presented_key) = (request.public().to_string(), presented.public.to_string());
        // The keys after the renewal. A caller with the previous key has not received the response of its renewal: it may
        // repeat the same request, and nothing else.
        let keys = |key: &str| match (presented_key == key, new == key) {
            (true, true) => Ok((new.clone(), None)),
            (true, false) | (false, true) => Ok((new.clone(), Some(presented_key.clone()))),
            (false, false) => Err(ChangeError::Denied("the key was renewed".to_owned())),
        };
        let lifetimes = self.authority.lifetimes;
        let lifetime = match &identity {
            Identity::Cluster(_) => lifetimes.leaf,
            Identity::User(_) if intermediate.is_none() => lifetimes.user,
            _ => return Err(ChangeError::Denied("only clusters and users can renew".to_owned())),
        };
        let certificate_expires_at = seconds(now + lifetime);
        self.registry
            .change(&action, |snapshot| {
                if !snapshot.admits(presented) {
                    return Err(ChangeError::Denied("the certificate was revoked".to_owned()));
                }
                let absent = || ChangeError::NotFound("not registered".to_owned());
                let (path, record) = match &identity {
                    Identity::Cluster(name) => {
                        let member = snapshot.members.get(name).ok_or_else(absent)?.record.clone();
                        let (key, previous_key) = keys(&member.key)?;
                        let renewed = MemberRecord { key, previous_key, certificate_expires_at, ..member };
                        (["member", name], records::encode(&renewed))
                    }
                    Identity::User(name) => {
                        let user = UserRecord::clone(snapshot.users.get(name).ok_or_else(absent)?);
                        let (key, previous_key) = keys(&user.key)?;
                        let renewed = UserRecord { key, previous_key, certificate_expires_at, ..user };
                        (["user", name], records::encode(&renewed))
                    }
                    Identity::Hub | Identity::Node { .. } => return Err(absent()),
                };
                Ok((Transaction::default().put(key(&path)?, record), ()))
            })
            .await?;
        let ca = self.authority.ca();
        let certificate = ca.issue(&identity, request, lifetime, now).map_err(signing)?;
        let intermediate = match (&identity, intermediate) {
            (Identity::Cluster(name), Some(requested)) => {
                Some(ca.issue_intermediate(name, requested, lifetimes.intermediate, now).map_err(signing)?)
            }
            _ => None,
        };
        Ok(Issued { certificate, intermediate })
    }

    /// Renews an expired certificate, for a limited time, with the registered key only.
    async fn renew_late(&self, request: &RequestedKey) -> Result<Certificate, ChangeError> {
        let now = self.registry.now();
        let public = request.public().to_string();
        let lifetimes = self.authority.lifetimes;
        // The same message for an unknown, a revoked and a late key: callers must not distinguish them.
        let refused = || ChangeError::Denied("this key cannot renew".to_owned());
        let find = |snapshot: &Snapshot| {
            let mut members = snapshot.members.iter();
            let (name, member) = members.find(|(_, m)| m.record.key == public)?;
            let member = &member.record;
            let until = member.certificate_expires_at + lifetimes.late_renewal.as_secs();
            let may =
                member.state == MemberState::Accepted && member.certificate_expires_at != 0 && seconds(now) <= until;
            may.then(|| (name.clone(), member.clone()))
        };
        // Unknown callers must not write to the audit log: only a key that is found changes anything.
        let (name, _) = find(&self.registry.snapshot()).ok_or_else(refused)?;
        let identity = Identity::Cluster(name.clone());
        let action = AuditAction::new(&identity, "renew.late", identity.to_string());
        self.registry
            .change(&action, |snapshot| {
                let (_, member) = find(snapshot).filter(|(n, _)| *n == name).ok_or_else(refused)?;
                let renewed = MemberRecord { certificate_expires_at: seconds(now + lifetimes.leaf), ..member };
                Ok((Transaction::default().put(key(&["member", &name])?, records::encode(&renewed)), ()))
            })
            .await?;
        self.authority.ca().issue(&identity, request, lifetimes.leaf, now).map_err(signing)
    }

    fn issued(&self, issued: Issued) -> wire::Issued {
        wire::Issued {
            certificate: issued.certificate.der.to_vec().into(),
            root: self.authority.root().der.to_vec().into(),
            intermediate: issued.intermediate.map(|c| c.der.to_vec().into()).unwrap_or_default(),
        }
    }
}

/// The record of the token, if its secret is correct and it has not expired.
fn check_token(
    snapshot: &Snapshot,
    token: &Token,
    root: Fingerprint,
    now: SystemTime,
) -> Result<TokenRecord, ChangeError> {
    // Not `Denied`, which is recorded: guessing must not fill the audit log.
    let refused = || ChangeError::NotFound(REFUSED.to_owned());
    let record = snapshot.tokens.get(token.id.as_str()).ok_or_else(refused)?;
    let hash = token.secret_hash().to_string();
    let right = verify_slices_are_equal(hash.as_bytes(), record.secret_hash.as_bytes()).is_ok();
    if !right || record.cluster != token.cluster || token.root != root || seconds(now) >= record.expires_at {
        return Err(refused());
    }
    Ok(TokenRecord::clone(record))
}

fn signing(error: CaError) -> ChangeError {
    ChangeError::Invalid(format!("issue the certificate: {error}"))
}

/// The gRPC code of a refused change.
pub(crate) fn status(error: ChangeError) -> Status {
    match error {
        ChangeError::Invalid(text) => Status::invalid_argument(text),
        ChangeError::Denied(text) => Status::permission_denied(text),
        ChangeError::NotFound(text) => Status::not_found(text),
        ChangeError::Conflict(text) | ChangeError::Pending(text) => Status::failed_precondition(text),
        ChangeError::Limit(text) => Status::resource_exhausted(text),
        ChangeError::Busy => Status::aborted("conflicting changes of other replicas: try again"),
        // Logged where it began; the reason contains names of hosts, and no secret.
        ChangeError::Store(error @ StoreError::Unavailable(_)) => Status::unavailable(error.to_string()),
        ChangeError::Store(error) => {
            tracing::error!(%error, "store failed");
            Status::unavailable("store failed")
        }
    }
}

pub(crate) fn requested(der: &[u8], field: &'static str) -> Result<RequestedKey, Status> {
    RequestedKey::from_request(der).map_err(|e: KeyError| Status::invalid_argument(format!("{field}: {e}")))
}

#[tonic::async_trait]
impl wire::registration_server::Registration for Registration {
    async fn join(&self, request: Request<wire::JoinRequest>) -> Result<Response<wire::JoinResponse>, Status> {
        let address = self.admit(&request)?;
        let request = request.into_inner();
        if request.token.len() > MAX_TOKEN_BYTES {
            return Err(Status::invalid_argument("token: it is too long"));
        }
        let token = Token::parse(TokenKind::Cluster, &request.token)
            .map_err(|error| Status::invalid_argument(format!("token: it is {error}")))?;
        check_label(&request.cluster).map_err(|e| Status::invalid_argument(format!("cluster: {e}")))?;
        if request.cluster != token.cluster {
            warn!(%address, token = token.id, cluster = request.cluster, "a token was presented for another cluster");
            return Err(Status::permission_denied(format!("the token is for the cluster {}", token.cluster)));
        }
        let own = requested(&request.request, "request")?;
        let intermediate = requested(&request.intermediate_request, "intermediate_request")?;
        if own.public() == intermediate.public() {
            return Err(Status::invalid_argument("intermediate_request: it must be for a key of its own"));
        }
        let joined = self.join(&token, &own, &intermediate, request.federated_allow_final).await.map_err(|error| {
            warn!(%address, token = token.id, cluster = token.cluster, %error, "join refused");
            self.metrics.joins.get_or_create(&Outcome::REFUSED).inc();
            status(error)
        })?;
        use wire::join_response::State;
        let state = match joined {
            Joined::Issued(issued) => {
                info!(%address, cluster = token.cluster, key = %own.public(), "cluster joined");
                self.metrics.joins.get_or_create(&Outcome::ISSUED).inc();
                State::Issued(self.issued(*issued))
            }
            Joined::Waiting => {
                self.metrics.joins.get_or_create(&Outcome::WAITING).inc();
                State::Waiting(wire::AwaitingAcceptance { retry_ms: RETRY.as_millis() as u64 })
            }
        };
        Ok(Response::new(wire::JoinResponse { state: Some(state) }))
    }

    async fn renew_late(
        &self,
        request: Request<wire::RenewLateRequest>,
    ) -> Result<Response<wire::RenewLateResponse>, Status> {
        self.admit(&request)?;
        let request = requested(&request.into_inner().request, "request")?;
        let certificate = self.renew_late(&request).await.map_err(status)?;
        info!(identity = %certificate.identity, "certificate renewed late");
        Ok(Response::new(wire::RenewLateResponse { certificate: certificate.der.to_vec().into() }))
    }
}

#[tonic::async_trait]
impl wire::renewal_server::Renewal for Registration {
    async fn renew(&self, request: Request<wire::RenewRequest>) -> Result<Response<wire::RenewResponse>, Status> {
        peer_identity(&request)?;
        let presented = peer(&request)?.certificate.clone().ok_or_else(|| Status::unauthenticated("no certificate"))?;
        let who = presented.identity.to_string();
        if !self.renewals.lock().unwrap_or_else(PoisonError::into_inner).allows(who, Instant::now()) {
            let most = RENEWALS_IN_A_LIFETIME;
            return Err(Status::resource_exhausted(format!("{most} renewals in a certificate's lifetime are enough")));
        }
        let request = request.into_inner();
        let own = requested(&request.request, "request")?;
        let intermediate = match request.intermediate_request.is_empty() {
            true => None,
            false => Some(requested(&request.intermediate_request, "intermediate_request")?),
        };
        let issued = self.renew(&presented, &own, intermediate.as_ref()).await.map_err(status)?;
        Ok(Response::new(wire::RenewResponse { issued: Some(self.issued(issued)) }))
    }
}
