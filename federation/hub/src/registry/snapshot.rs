//! One consistent view of the registry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use hanse_api::federated::FederatedObject;
use hanse_exchange::hubs::read_list;
use hanse_identity::Identity;
use hanse_identity::keys::Certificate;
use hanse_policy::inventory::Labels;
use hanse_store::{Change, Entry, Event, LeaseId, Listing, Revision, Transaction};

use super::records::{
    self, ApprovalRecord, ChangeRecord, MemberRecord, MemberState, OperatorRecord, ProposalRecord, ReplicaRecord,
    Settings, TokenRecord, UserRecord,
};
use crate::grants::MemberCluster;
use crate::manifest::{self, Kind, ObjectId};

/// The registry as of one revision. Cheap to clone: everything in it is shared.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub revision: Revision,
    /// Every cluster that has joined or is expected, in the order of names.
    pub clusters: BTreeMap<Arc<str>, Arc<Cluster>>,
    /// The federated objects.
    pub objects: BTreeMap<ObjectId, Arc<Object>>,
    /// The bytes of their manifests together.
    pub(crate) object_bytes: usize,
    pub(crate) tokens: BTreeMap<Arc<str>, Arc<TokenRecord>>,
    pub(crate) members: BTreeMap<Arc<str>, Arc<Stored<MemberRecord>>>,
    pub(crate) users: BTreeMap<Arc<str>, Arc<UserRecord>>,
    /// The changes of each custom resource, by its UID, that are not finished.
    pub(crate) changes: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<ChangeRecord>>>,
    /// The approvals that are not used yet, by the UID of the PolicyApproval.
    pub(crate) approvals: BTreeMap<Arc<str>, Arc<ApprovalRecord>>,
    /// The changes of users that wait for an approval, at a hub without an operator.
    pub(crate) proposals: BTreeMap<ObjectId, Arc<ProposalRecord>>,
    pub(crate) audit_number: u64,
    pub(crate) audit_revision: Revision,
    /// Those of the ClusterSet, where an operator writes them.
    pub(crate) settings: Option<Settings>,
    /// The clusters whose lease has ended while a hub ran.
    silent: BTreeSet<Arc<str>>,
    /// Each cluster's lease.
    leases: BTreeMap<Arc<str>, ClusterLease>,
    /// The revision at which each cluster first sent a message, or its lease last changed.
    first_received: BTreeMap<Arc<str>, Revision>,
    grants: BTreeMap<Arc<str>, Arc<Stored<MemberCluster>>>,
    /// The addresses of each replica of the hub that is running.
    replicas: BTreeMap<Arc<str>, Arc<BTreeSet<String>>>,
    /// The states of the operators of all replicas that are running, by their identities.
    pub(crate) operators: BTreeMap<Arc<str>, Arc<OperatorRecord>>,
    /// `instance/<cluster>`: the process that publishes for each cluster, its number in hexadecimal.
    pub(super) instances: BTreeMap<Arc<str>, Arc<Stored<Arc<str>>>>,
}

#[derive(Debug, Clone)]
pub(crate) struct Stored<T> {
    pub(crate) record: T,
    pub(crate) revision: Revision,
}

/// The lease of a cluster.
#[derive(Debug, Clone, Copy)]
struct ClusterLease {
    revision: Revision,
    id: Option<LeaseId>,
    /// Its time. `None`: written by an earlier version.
    seconds: Option<u64>,
}

/// One cluster: its registration, its MemberCluster and its lease in one.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    pub name: Arc<str>,
    pub state: ClusterState,
    /// From its MemberCluster. Without one, the cluster has neither labels nor grants, and exports nothing.
    pub labels: Labels,
    pub grant: Arc<MemberCluster>,
    pub lease: Lease,
    pub federated_allow_final: bool,
    /// The revision of the newest of all of the above.
    pub revision: Revision,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterState {
    /// The MemberCluster exists, and the cluster has not joined.
    Expected,
    /// It waits for an operator.
    Pending,
    Accepted,
    /// Withdrawn: all its data is invalid.
    Revoked {
        reason: Arc<str>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    NeverConnected,
    Live,
    Stale,
}

/// Whether the last version of an object is used. Where it is not, the last good version of a policy stays in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acceptance {
    Accepted,
    /// A policy whose tier does not exist.
    TierNotFound(Arc<str>),
    /// This version cannot read it: what is wrong, with the field.
    Unreadable(String),
}

impl Acceptance {
    /// Identifies the reason for programs. `None`: accepted.
    pub fn reason(&self) -> Option<&'static str> {
        match self {
            Self::Accepted => None,
            Self::TierNotFound(_) => Some("TierNotFound"),
            Self::Unreadable(_) => Some("Unreadable"),
        }
    }
}

impl std::fmt::Display for Acceptance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Accepted => f.write_str("accepted"),
            Self::TierNotFound(tier) => {
                write!(f, "spec.tier: Tier {tier} does not exist: the policy is not in force until it is created")
            }
            Self::Unreadable(why) => f.write_str(why),
        }
    }
}

/// A federated object as its author wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub id: ObjectId,
    /// The author's bytes (JSON).
    pub manifest: Bytes,
    /// The revision that wrote them.
    pub revision: Revision,
    read: ReadOnce,
}

/// What the bytes say, read when it is first needed: it does not distinguish objects.
#[derive(Debug, Clone, Default)]
struct ReadOnce(OnceLock<Arc<FederatedObject>>);

impl PartialEq for ReadOnce {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for ReadOnce {}

impl Object {
    fn new(id: ObjectId, manifest: Bytes, revision: Revision) -> Self {
        Self { id, manifest, revision, read: ReadOnce::default() }
    }

    /// The object, read by this version.
    ///
    /// # Errors
    /// What is wrong with it, or that it is of another kind than its key.
    pub fn converted(&self) -> Result<&hanse_api::Object, &str> {
        use hanse_api::Object::{FederatedNetworkSet, FederatedPolicy, FederatedTier, Member};
        let object = self.read.0.get_or_init(|| Arc::new(FederatedObject::read(&self.manifest))).object()?;
        let fits = match self.id.kind {
            Kind::FederatedNetworkPolicy => matches!(object, FederatedPolicy(it) if !it.is_staged()),
            Kind::StagedFederatedNetworkPolicy => matches!(object, FederatedPolicy(it) if it.is_staged()),
            Kind::FederatedNetworkSet => matches!(object, FederatedNetworkSet(..)),
            Kind::MemberCluster => matches!(object, Member(_)),
            Kind::Tier => matches!(object, FederatedTier(_)),
        };
        if fits { Ok(object) } else { Err("is of another kind than its key") }
    }

    /// The tier that a policy names, also one that this version cannot read.
    pub fn tier(&self) -> Option<Arc<str>> {
        if !self.id.kind.is_policy() {
            return None;
        }
        self.converted().map_or_else(|_| manifest::tier_in(&self.manifest), manifest::tier_of)
    }
}

impl Snapshot {
    /// Its revision is that of the newest entry, which all replicas see: that of the listing may belong to another program.
    pub(crate) fn from_listing(listing: &Listing) -> Result<Self, String> {
        let mut snapshot = Self::default();
        for entry in &listing.entries {
            let event = Event { revision: entry.modified, key: entry.key.clone(), entry: Some(entry.clone()) };
            snapshot.apply(&event).map_err(|e| format!("{}: {e}", entry.key))?;
        }
        let names: Vec<Arc<str>> = snapshot.clusters.keys().cloned().collect();
        for name in names {
            let part = |of: Option<Revision>| of.unwrap_or_default();
            let mut revision = part(snapshot.members.get(&name).map(|m| m.revision))
                .max(part(snapshot.grants.get(&name).map(|g| g.revision)))
                .max(part(snapshot.leases.get(&name).map(|lease| lease.revision)))
                .max(part(snapshot.first_received.get(&name).copied()));
            if let Some(cluster) = snapshot.clusters.get_mut(&name) {
                // The end of a lease leaves no entry with its revision: the newest revision is late enough.
                if cluster.lease == Lease::Stale {
                    revision = snapshot.revision;
                }
                *cluster = Arc::new(Cluster { revision, ..Cluster::clone(cluster) });
            }
        }
        Ok(snapshot)
    }

    pub(crate) fn apply(&mut self, event: &Event) -> Result<(), String> {
        self.revision = self.revision.max(event.revision);
        let segments: Vec<&str> = event.key.segments().collect();
        let entry = event.entry.as_ref();
        match segments[..] {
            ["token", id] => set(&mut self.tokens, id, read(entry)?.map(Arc::new)),
            ["user", name] => set(&mut self.users, name, read(entry)?.map(Arc::new)),
            ["member", name] => {
                let record = read(entry)?.map(|record| Arc::new(Stored { record, revision: event.revision }));
                set(&mut self.members, name, record);
                self.merge(name, event.revision);
            }
            ["lease", name] => {
                // The end of a lease is a change of the cluster too.
                let lease = |entry: &Entry| {
                    let seconds = std::str::from_utf8(&entry.value).ok().and_then(|it| it.parse().ok());
                    ClusterLease { revision: event.revision, id: entry.lease, seconds }
                };
                set(&mut self.leases, name, entry.map(lease));
                self.merge(name, event.revision);
            }
            ["silent", name] => match entry {
                Some(_) => _ = self.silent.insert(name.into()),
                None => _ = self.silent.remove(name),
            },
            ["heard", name] => {
                set(&mut self.first_received, name, entry.map(|_| event.revision));
                self.merge(name, event.revision);
            }
            ["object", kind, name] => {
                let Some(kind) = Kind::from_name(kind) else {
                    // Of a newer version: it stays in the store, and the other objects are used.
                    tracing::warn!(kind, object = name, "object ignored: its kind is unknown to this version");
                    return Ok(());
                };
                let id = ObjectId { kind, name: name.into() };
                let object = entry.map(|it| Arc::new(Object::new(id.clone(), it.value.clone(), it.modified)));
                if kind == Kind::MemberCluster {
                    let grant = object.as_ref().map(|object| {
                        let record = object.converted().map_or_else(
                            |error| {
                                // Written by another version: the previous grant stays in force; without one, nothing is granted.
                                tracing::error!(%error, cluster = name, "MemberCluster cannot be read");
                                self.grants.get(name).map(|old| old.record.clone()).unwrap_or_default()
                            },
                            |object| MemberCluster::of(object).unwrap_or_default(),
                        );
                        Arc::new(Stored { record, revision: event.revision })
                    });
                    set(&mut self.grants, name, grant);
                    self.merge(name, event.revision);
                }
                let old = match object {
                    Some(object) => {
                        self.object_bytes += object.manifest.len();
                        self.objects.insert(id, object)
                    }
                    None => self.objects.remove(&id),
                };
                self.object_bytes -= old.map_or(0, |old| old.manifest.len());
            }
            ["instance", name] => {
                let record = entry.map(|entry| {
                    let record = String::from_utf8_lossy(&entry.value).into();
                    Arc::new(Stored { record, revision: entry.modified })
                });
                set(&mut self.instances, name, record);
            }
            ["hub", replica] => {
                // A record of another version may be unreadable here: its addresses are not sent, and all else goes on.
                let addresses = entry.map(|entry| Arc::new(ReplicaRecord::read(replica, &entry.value)));
                set(&mut self.replicas, replica, addresses);
            }
            ["operator", identity] => {
                // One that another version wrote may be unreadable: it has no state here.
                let record = entry.and_then(|entry| records::decode(&entry.value).ok()).map(Arc::new);
                set(&mut self.operators, identity, record);
            }
            ["meta", "settings"] => self.settings = read(entry)?,
            ["change", uid, id] => {
                let of_object = self.changes.entry(uid.into()).or_default();
                set(of_object, id, read(entry)?.map(Arc::new));
                if of_object.is_empty() {
                    self.changes.remove(uid);
                }
            }
            ["approval", uid] => set(&mut self.approvals, uid, read(entry)?.map(Arc::new)),
            ["proposal", kind, name] => {
                let Some(kind) = Kind::from_name(kind) else { return Ok(()) };
                let id = ObjectId { kind, name: name.into() };
                match read(entry)? {
                    Some(record) => _ = self.proposals.insert(id, Arc::new(record)),
                    None => _ = self.proposals.remove(&id),
                }
            }
            ["meta", "audit"] => {
                if let Some(entry) = entry {
                    let text = std::str::from_utf8(&entry.value).ok();
                    self.audit_number =
                        text.and_then(|t| t.parse().ok()).ok_or("the counter of the audit log is not a number")?;
                    self.audit_revision = entry.modified;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The addresses of all replicas of the hub that are running, at most [`hanse_exchange::hubs::MAX_HUBS`].
    pub fn hub_addresses(&self) -> BTreeSet<String> {
        let all: BTreeSet<&str> = self.replicas.values().flat_map(|it| it.iter().map(String::as_str)).collect();
        read_list(&all.into_iter().collect::<Vec<_>>()).0
    }

    /// The number of the process that publishes for a cluster, in hexadecimal.
    pub fn instance_of(&self, cluster: &str) -> Option<Arc<str>> {
        self.instances.get(cluster).map(|it| Arc::clone(&it.record))
    }

    /// Shows `transaction` as if it were the next that is committed.
    pub(crate) fn preview(&mut self, transaction: &Transaction) {
        let revision = self.revision + 1;
        for change in &transaction.changes {
            let key = change.key().clone();
            let entry = match change {
                Change::Delete(_) => None,
                Change::Put { value, lease, .. } => {
                    let (key, value, lease) = (key.clone(), value.clone(), *lease);
                    Some(Entry { key, value, created: revision, modified: revision, lease })
                }
            };
            let event = Event { revision, key, entry };
            if let Err(error) = self.apply(&event) {
                tracing::error!(%error, key = %event.key, "pending write cannot be read");
            }
        }
    }

    fn merge(&mut self, name: &str, revision: Revision) {
        let member = self.members.get(name);
        let grant = self.grants.get(name);
        if member.is_none() && grant.is_none() {
            self.clusters.remove(name);
            return;
        }
        let state = match member.map(|m| &m.record.state) {
            None => ClusterState::Expected,
            Some(MemberState::Pending) => ClusterState::Pending,
            Some(MemberState::Accepted) => ClusterState::Accepted,
            Some(MemberState::Revoked { reason }) => ClusterState::Revoked { reason: reason.as_str().into() },
        };
        let lease = match (self.leases.contains_key(name), self.first_received.contains_key(name)) {
            (true, _) => Lease::Live,
            (false, true) => Lease::Stale,
            (false, false) => Lease::NeverConnected,
        };
        let grant = grant.map_or_else(Default::default, |g| Arc::new(g.record.clone()));
        let name: Arc<str> = name.into();
        let cluster = Cluster {
            name: name.clone(),
            state,
            labels: grant.labels.clone(),
            grant,
            lease,
            federated_allow_final: member.is_some_and(|m| m.record.federated_allow_final),
            revision,
        };
        // Renewals of certificates change nothing that other clusters see: the revision stays the same.
        let same = |old: &Arc<Cluster>| Cluster { revision, ..Cluster::clone(old) } == cluster;
        if !self.clusters.get(&name).is_some_and(same) {
            self.clusters.insert(name, Arc::new(cluster));
        }
    }

    /// Whether this certificate's owner is registered with its key, and not revoked.
    pub fn admits(&self, certificate: &Certificate) -> bool {
        let is = |key: &str, previous: &Option<String>| {
            let public = certificate.public.to_string();
            public == key || previous.as_ref() == Some(&public)
        };
        match &certificate.identity {
            Identity::Hub => true,
            Identity::Cluster(name) => self.members.get(name).is_some_and(|member| {
                let member = &member.record;
                member.state == MemberState::Accepted && is(&member.key, &member.previous_key)
            }),
            Identity::User(name) => {
                self.users.get(name).is_some_and(|user| !user.revoked && is(&user.key, &user.previous_key))
            }
            Identity::Node { .. } => false,
        }
    }

    /// Whether the last version of an object is used. `None`: the object does not exist.
    pub fn acceptance(&self, id: &ObjectId) -> Option<Acceptance> {
        let object = self.objects.get(id)?;
        if let Err(why) = object.converted() {
            return Some(Acceptance::Unreadable(why.to_owned()));
        }
        let exists = |tier: &Arc<str>| self.objects.contains_key(&ObjectId { kind: Kind::Tier, name: tier.clone() });
        Some(match object.tier().filter(|tier| !exists(tier)) {
            Some(tier) => Acceptance::TierNotFound(tier),
            None => Acceptance::Accepted,
        })
    }

    /// The accepted clusters that are stale, and not known to have fallen silent.
    pub(crate) fn unmarked_stale(&self) -> impl Iterator<Item = &Arc<str>> {
        let stale = self.clusters.values().filter(|it| it.state == ClusterState::Accepted && it.lease == Lease::Stale);
        stale.map(|it| &it.name).filter(|name| !self.silent.contains(*name))
    }

    /// The lease of a live cluster, and its time in seconds, where that is known.
    pub(crate) fn lease_of(&self, cluster: &str) -> Option<(LeaseId, Option<u64>)> {
        self.leases.get(cluster).and_then(|lease| Some((lease.id?, lease.seconds)))
    }

    /// The names of the accepted clusters whose labels `matches`.
    pub fn accepted(&self, matches: impl Fn(&Cluster) -> bool) -> BTreeSet<Arc<str>> {
        let accepted = self.clusters.values().filter(|c| c.state == ClusterState::Accepted && matches(c));
        accepted.map(|c| c.name.clone()).collect()
    }
}

fn set<T>(map: &mut BTreeMap<Arc<str>, T>, name: &str, value: Option<T>) {
    match value {
        Some(value) => drop(map.insert(name.into(), value)),
        None => drop(map.remove(name)),
    }
}

fn read<T: serde::de::DeserializeOwned>(entry: Option<&Entry>) -> Result<Option<T>, String> {
    entry.map(|e| records::decode(&e.value)).transpose().map_err(|e| e.to_string())
}
