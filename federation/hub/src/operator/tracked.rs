//! What the operator keeps of a custom resource: never the object itself, whose size its author decides.
//!
//! An object takes some hundred bytes, for its name, its versions, its finalizers and a digest of its status. Its manifest is kept until
//! the hub has stored or refused it, as far as [`MAX_PENDING`] permits; then the hub has it, or it is read again when the hub may decide
//! differently.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hanse_api::hanse::{ClusterAcceptance, ClusterJoinTokenSpec, ClusterSetSpec};
use hanse_runtime::retry::Backoff;
use hanse_store::Revision;
use kube::ResourceExt as _;
use kube::api::DynamicObject;
use serde::Deserialize as _;
use serde::de::IntoDeserializer as _;
use tokio::time::Instant;

use super::allowance::Allowance;
use super::condition::{Refusal, Written};
use super::objects::{self, Defaults, FINALIZER};
use super::resource::Resource;
use crate::administration::Origin;
use crate::custom_resources::ClusterJoinTokenStatus;

/// Manifests that wait for the hub, together: as much as the hub stores, and some.
const MAX_PENDING: usize = 64 << 20;
/// Delays after the API server refused a write of an object: the answer may change with a webhook, a rule or a quota.
const REFUSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The manifests that are kept, together.
#[derive(Debug, Clone, Default)]
pub struct Pending(Arc<AtomicUsize>);

/// A manifest that is kept.
#[derive(Debug)]
struct Kept {
    bytes: Bytes,
    pending: Pending,
}

impl Pending {
    fn keep(&self, bytes: Bytes) -> Option<Kept> {
        let before = self.0.fetch_add(bytes.len(), Ordering::Relaxed);
        let kept = Kept { bytes, pending: self.clone() };
        (before < MAX_PENDING).then_some(kept)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.pending.0.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

/// What the operator needs to know of the spec.
#[derive(Debug, Clone, PartialEq)]
pub enum Details {
    None,
    /// The number of nets of a set.
    Nets(usize),
    /// The acceptance of a MemberCluster.
    Acceptance(Option<ClusterAcceptance>),
    /// The spec of a ClusterSet, or why it cannot be read.
    ClusterSet(Result<Box<ClusterSetSpec>, String>),
    /// Spec and status of a ClusterJoinToken, or why the spec cannot be read.
    Token(Result<Box<ClusterJoinTokenSpec>, String>, Box<ClusterJoinTokenStatus>),
}

/// Why the hub does not use a version, and when that may change.
#[derive(Debug)]
pub struct Refused {
    pub refusal: Refusal,
    pub at: Revision,
    /// No change of the store changes it.
    pub is_final: bool,
    backoff: Backoff,
    not_before: Instant,
}

/// One custom resource.
#[derive(Debug)]
pub struct Tracked {
    pub uid: String,
    pub version: String,
    pub generation: i64,
    pub is_leaving: bool,
    pub finalizers: Vec<String>,
    pub details: Details,
    hash: blake3::Hash,
    manifest: Option<Kept>,
    /// The revision of the hub's object that was compared, and whether it is equal.
    compared: Option<(Revision, bool)>,
    /// The manifest depends on defaults that have changed.
    is_outdated: bool,
    /// What the status says.
    pub status: Written,
    pub refused: Option<Refused>,
    /// Why the hub does not delete it, and the revision at which it was decided.
    pub blocked: Option<(Revision, String)>,
    pub allowance: Allowance,
    /// After the API server refused a write of this object: no write before.
    retry: Option<(Backoff, Instant)>,
}

impl Refused {
    /// A refusal of the same version as an earlier one is decided again after a longer time.
    pub fn new(refusal: Refusal, at: Revision, is_final: bool, before: Option<Self>, now: Instant) -> Self {
        let mut backoff = before.map_or_else(|| Backoff::new(REFUSED.0, REFUSED.1), |before| before.backoff);
        let not_before = now + backoff.next_delay();
        Self { refusal, at, is_final, backoff, not_before }
    }

    /// Whether it is time for another attempt.
    pub fn may_retry(&self, now: Instant) -> bool {
        !self.is_final && self.not_before <= now
    }

    /// Whether the hub may decide differently now.
    pub fn is_due(&self, revision: Revision, now: Instant) -> bool {
        self.may_retry(now) && self.at != revision
    }
}

impl Tracked {
    pub fn new(resource: Resource, object: &DynamicObject, defaults: &Defaults, pending: &Pending) -> Self {
        let manifest = objects::manifest(resource, object, defaults);
        let spec = &object.data["spec"];
        let details = match resource {
            Resource::FederatedNetworkSet => Details::Nets(spec["nets"].as_array().map_or(0, Vec::len)),
            Resource::MemberCluster => Details::Acceptance(match spec["acceptance"].as_str() {
                Some("Accepted") => Some(ClusterAcceptance::Accepted),
                Some("Pending") => Some(ClusterAcceptance::Pending),
                Some("Revoked") => Some(ClusterAcceptance::Revoked),
                _ => None,
            }),
            Resource::ClusterSet => Details::ClusterSet(read(spec).map(Box::new)),
            Resource::ClusterJoinToken => {
                let status = ClusterJoinTokenStatus::deserialize(&object.data["status"]).unwrap_or_default();
                Details::Token(read(spec).map(Box::new), Box::new(status))
            }
            _ => Details::None,
        };
        Self {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            version: object.metadata.resource_version.clone().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            is_leaving: object.metadata.deletion_timestamp.is_some(),
            finalizers: object.finalizers().to_vec(),
            details,
            hash: blake3::hash(&manifest),
            manifest: resource.kind().and_then(|_| pending.keep(manifest)),
            compared: None,
            is_outdated: false,
            status: Written::of(object.data.get("status")),
            refused: None,
            blocked: None,
            allowance: Allowance::default(),
            retry: None,
        }
    }

    /// The version of which it is.
    pub fn origin(&self) -> Origin {
        Origin { uid: self.uid.clone(), generation: self.generation }
    }

    pub fn has_finalizer(&self) -> bool {
        self.finalizers.iter().any(|it| it == FINALIZER)
    }

    /// The manifest, while it is kept.
    pub fn manifest(&self) -> Option<&Bytes> {
        self.manifest.as_ref().map(|it| &it.bytes)
    }

    /// The hub has decided on it.
    pub fn forget_manifest(&mut self) {
        self.manifest = None;
    }

    /// Compares it with the hub's object.
    pub fn compare(&mut self, stored: Option<(Revision, &Bytes)>) {
        self.compared = stored.map(|(revision, bytes)| match self.compared {
            Some((at, is_equal)) if at == revision => (at, is_equal),
            _ => (revision, blake3::hash(bytes) == self.hash),
        });
        if self.is_stored() {
            self.manifest = None;
            self.refused = None;
        }
    }

    /// Whether the hub's object is this version, as of the last comparison.
    pub fn is_stored(&self) -> bool {
        self.compared.is_some_and(|(_, is_equal)| is_equal)
    }

    /// Whether the hub's object is this version with the defaults of now.
    pub fn is_current(&self) -> bool {
        self.is_stored() && !self.is_outdated
    }

    /// The manifest must be made again.
    pub fn outdate(&mut self) {
        self.is_outdated = true;
        self.manifest = None;
    }

    /// Whether `object` is this version or a later one of the same object. Versions of an object are numbers that increase.
    pub fn precedes(&self, object: &DynamicObject) -> bool {
        let number = |version: Option<&str>| version?.parse::<u64>().ok();
        let versions = number(Some(&self.version)).zip(number(object.metadata.resource_version.as_deref()));
        object.metadata.uid.as_ref() == Some(&self.uid) && versions.is_none_or(|(own, other)| own <= other)
    }

    pub fn may_write(&self, now: Instant) -> bool {
        self.retry.as_ref().is_none_or(|(_, at)| *at <= now)
    }

    /// The API server refused a write.
    pub fn write_refused(&mut self, now: Instant) {
        let first = || (Backoff::new(REFUSED.0, REFUSED.1), now);
        let (backoff, at) = self.retry.get_or_insert_with(first);
        *at = now + backoff.next_delay();
    }

    pub fn write_accepted(&mut self) {
        self.retry = None;
    }

    fn number(&self) -> u64 {
        self.version.parse().unwrap_or_default()
    }

    /// As [`Self::follow`], of an object that was read so that the hub decides on it again.
    pub fn follow_for_decision(mut self, old: Option<Self>) -> Self {
        let (hash, manifest) = (self.hash, self.manifest.take());
        let followed = self.follow(old);
        if followed.hash == hash { Self { manifest, ..followed } } else { followed }
    }

    /// Replaces an older version of the same object by this one, and keeps what is known of it.
    pub fn follow(mut self, old: Option<Self>) -> Self {
        let Some(old) = old.filter(|old| old.uid == self.uid) else { return self };
        // An event from before the operator's last write.
        if old.number() > self.number() {
            return old;
        }
        if old.hash == self.hash {
            self.refused = old.refused;
            self.compared = old.compared;
            if self.refused.is_some() || self.is_stored() {
                self.manifest = None;
            }
        }
        let mut allowance = old.allowance;
        if old.generation != self.generation {
            allowance.renew();
        }
        Self { blocked: old.blocked, allowance, retry: old.retry, ..self }
    }
}

fn read<'a, T: serde::Deserialize<'a>>(spec: &'a serde_json::Value) -> Result<T, String> {
    T::deserialize(spec.into_deserializer()).map_err(|error: serde_json::Error| format!("spec: {error}"))
}
