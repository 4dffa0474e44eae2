//! The exchange's view of the registry: clusters, and federated objects with what their enforcers must be sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hanse_api::clusters::{ClusterLabels, ClusterSelector, select_clusters};
use hanse_api::object::Object;
use hanse_api::policy::FederatedPolicy;
use hanse_exchange::interest::{self, Wanted};
use hanse_exchange::limits::EXISTING_TIER;
use hanse_policy::inventory::LabelGrant;
use hanse_policy::model::{ClusterName, ClusterScope, Phase};

use crate::grants::MemberCluster;
use crate::manifest::{Kind, ObjectId};
use crate::registry::{self, Registry, Snapshot};
use hanse_exchange::model::{
    ClusterState, FederatedManifest, Federation, Grant, Interest, Lease, ManifestKind, Position, digest_of,
};

impl Grant for MemberCluster {
    fn permits_namespace(&self, name: &str) -> bool {
        MemberCluster::permits_namespace(self, name)
    }

    fn permits_address(&self, address: IpAddr) -> bool {
        MemberCluster::permits_address(self, address)
    }

    fn permits_label(&self, key: &str, value: &str) -> bool {
        MemberCluster::permits_label(self, key, value)
    }

    fn label_grant(&self) -> LabelGrant {
        MemberCluster::label_grant(self)
    }

    fn max_endpoints(&self) -> usize {
        usize::try_from(self.limits.endpoints).unwrap_or(usize::MAX)
    }

    fn max_label_sets(&self) -> usize {
        usize::try_from(self.limits.label_sets).unwrap_or(usize::MAX)
    }
}

/// Derives the exchange's view of the registry. Objects stay read, so that a change costs what it touches.
#[derive(Debug, Default)]
pub struct Deriver {
    read: HashMap<ObjectId, Read>,
    labels: ClusterLabels,
    phases: BTreeMap<Arc<str>, Phase>,
    made: BTreeMap<(ManifestKind, Arc<str>), Arc<FederatedManifest>>,
}

/// An object of the registry, read.
#[derive(Debug)]
struct Read {
    object: Arc<registry::Object>,
    /// Read or changed since the manifests were made.
    is_changed: bool,
}

impl Read {
    /// The tier that a policy names.
    fn tier(&self) -> Option<&Arc<str>> {
        match self.object.converted() {
            Ok(Object::FederatedPolicy(policy)) => Some(policy.tier()),
            _ => None,
        }
    }
}

impl Deriver {
    /// The federation as the registry has it now.
    pub fn federation(&mut self, registry: &Registry, snapshot: &Snapshot) -> Federation {
        let mut federation = Federation {
            position: Position { epoch: registry.epoch(), revision: snapshot.revision },
            ..Federation::default()
        };
        let accepted = snapshot.clusters.iter().filter(|(_, it)| it.state == registry::ClusterState::Accepted);
        let labels: ClusterLabels =
            accepted.clone().map(|(name, cluster)| (name.clone(), cluster.labels.clone())).collect();
        for (name, cluster) in accepted {
            federation.clusters.insert(name.clone(), cluster_state(name, cluster, registry.lease_time(), &labels));
        }
        self.read_objects(snapshot);
        let tier = |(id, read): (&ObjectId, &Read)| match read.object.converted() {
            Ok(Object::FederatedTier(tier)) => Some((id.name.clone(), tier.id.phase)),
            _ => None,
        };
        let phases: BTreeMap<Arc<str>, Phase> = self.read.iter().filter_map(tier).collect();
        // Policies depend on labels and tiers as well.
        let same = labels == self.labels && phases == self.phases;
        (self.labels, self.phases) = (labels, phases);
        let mut made = BTreeMap::new();
        for (id, read) in &self.read {
            let Some(kind) = manifest_kind(id.kind) else { continue };
            let key = (kind, id.name.clone());
            let old = self.made.get(&key);
            let manifest = match old.filter(|_| same && !read.is_changed) {
                Some(old) => Arc::clone(old),
                None => Arc::new(self.make(read, old.map(|old| &**old))),
            };
            made.insert(key, manifest);
        }
        send_where_replaced(&mut made);
        // A deleted tier stays with the members that have policies in it: those policies stay as well.
        let used: BTreeSet<&Arc<str>> = self.read.values().filter_map(Read::tier).collect();
        for (key, old) in
            self.made.iter().filter(|((kind, name), _)| *kind == ManifestKind::Tier && used.contains(name))
        {
            made.entry(key.clone()).or_insert_with(|| Arc::clone(old));
        }
        self.read.values_mut().for_each(|read| read.is_changed = false);
        self.made.clone_from(&made);
        federation.manifests = made;
        federation
    }

    fn read_objects(&mut self, snapshot: &Snapshot) {
        self.read.retain(|id, _| snapshot.objects.contains_key(id));
        for (id, object) in &snapshot.objects {
            if manifest_kind(id.kind).is_none() || self.read.get(id).is_some_and(|it| Arc::ptr_eq(&it.object, object)) {
                continue;
            }
            if let Err(error) = object.converted() {
                tracing::error!(%error, object = %id, "object not readable by this version: its enforcers keep the last one");
            }
            self.read.insert(id.clone(), Read { object: Arc::clone(object), is_changed: true });
        }
    }

    fn make(&self, read: &Read, old: Option<&FederatedManifest>) -> FederatedManifest {
        let plain = FederatedManifest {
            json: read.object.manifest.clone(),
            enforcers: None,
            also_for: BTreeSet::new(),
            resolved: BTreeMap::new(),
            interest: Interest::new(),
            features: Vec::new(),
        };
        let all_clusters = || self.labels.keys().cloned().collect::<BTreeSet<ClusterName>>();
        // No Deny depends on a staged policy.
        let is_staged = read.object.id.kind == Kind::StagedFederatedNetworkPolicy;
        let everything = || match is_staged {
            true => Interest::new(),
            false => Interest::from([Arc::new(Wanted::everything())]),
        };
        match read.object.converted() {
            // Leaving it out would take away what is in force. Nobody knows this feature, so that all_clusters refuses this
            // version by itself and keeps the last; what that needs is sent as before, or else all that it could need.
            Err(_) if read.object.id.kind.is_policy() => FederatedManifest {
                enforcers: old.and_then(|old| old.enforcers.clone()).or_else(|| Some(all_clusters())),
                interest: old.map_or_else(everything, |old| old.interest.clone()),
                resolved: old.map(|old| old.resolved.clone()).unwrap_or_default(),
                features: vec![UNREADABLE.to_owned()],
                ..plain
            },
            Err(_) => FederatedManifest { features: vec![UNREADABLE.to_owned()], ..plain },
            // This version is not in force anywhere. Where an earlier version is, it stays, and its interest with it.
            Ok(Object::FederatedPolicy(policy)) if !self.phases.contains_key(policy.tier()) => match old {
                Some(old) => {
                    FederatedManifest { json: plain.json, features: vec![EXISTING_TIER.to_owned()], ..old.clone() }
                }
                // A member may have an earlier version in force that the hub does not know: after a restart of the hub, or because
                // the member was away during a deletion. If the member were sent less than that version needs, its Deny would open.
                // Only the member knows its interest, and registers only that of its own policies; so it is sent everything.
                None => FederatedManifest {
                    enforcers: Some(all_clusters()),
                    interest: everything(),
                    features: vec![EXISTING_TIER.to_owned()],
                    ..plain
                },
            },
            Ok(Object::FederatedPolicy(policy)) => self.make_policy(policy, plain),
            Ok(_) => plain,
        }
    }

    fn make_policy(&self, policy: &FederatedPolicy, plain: FederatedManifest) -> FederatedManifest {
        let mut resolved = BTreeMap::new();
        for selector in policy.cluster_selectors() {
            resolved.insert(selector.text.clone(), select_clusters(&selector.selector, &self.labels));
        }
        let select = |selector: &ClusterSelector| resolved.get(&selector.text).cloned().unwrap_or_default();
        let converted = policy.resolve(&select, &self.phases);
        let enforcers = match &converted.enforcers {
            ClusterScope::Named(names) => names.clone(),
            ClusterScope::All | ClusterScope::Local => self.labels.keys().cloned().collect(),
        };
        let interest = interest::of(&converted).into_iter().map(|wanted| self.widened(Arc::new(wanted))).collect();
        FederatedManifest { enforcers: Some(enforcers), resolved, interest, ..plain }
    }

    /// Naming all clusters is the same as selecting all, which takes less space.
    fn widened(&self, wanted: Arc<Wanted>) -> Arc<Wanted> {
        match wanted.clusters() {
            ClusterScope::Named(names) if self.labels.keys().all(|name| names.contains(name)) => {
                Arc::new(wanted.with_clusters(ClusterScope::All))
            }
            _ => wanted,
        }
    }
}

/// The feature that an object needs which the hub itself could not read.
pub const UNREADABLE: &str = "hub-cannot-read";

/// Staged policies are also sent to the clusters that enforce the policies which they would replace.
fn send_where_replaced(made: &mut BTreeMap<(ManifestKind, Arc<str>), Arc<FederatedManifest>>) {
    let staged = made.iter().filter(|((kind, _), _)| *kind == ManifestKind::StagedPolicy);
    let changed: Vec<_> = staged
        .filter_map(|(key, manifest)| {
            let replaced = made.get(&(ManifestKind::Policy, key.1.clone()));
            let also_for = replaced.and_then(|it| it.enforcers.clone()).unwrap_or_default();
            let changed =
                || Arc::new(FederatedManifest { also_for: also_for.clone(), ..FederatedManifest::clone(manifest) });
            (manifest.also_for != also_for).then(|| (key.clone(), changed()))
        })
        .collect();
    made.extend(changed);
}

fn manifest_kind(kind: Kind) -> Option<ManifestKind> {
    match kind {
        Kind::FederatedNetworkPolicy => Some(ManifestKind::Policy),
        Kind::StagedFederatedNetworkPolicy => Some(ManifestKind::StagedPolicy),
        Kind::FederatedNetworkSet => Some(ManifestKind::NetworkSet),
        Kind::Tier => Some(ManifestKind::Tier),
        Kind::MemberCluster => None,
    }
}

fn cluster_state(
    name: &ClusterName,
    cluster: &registry::Cluster,
    lease_time: Duration,
    labels: &ClusterLabels,
) -> ClusterState {
    let visible_to = cluster.grant.visible_to.as_ref().map(|selector| {
        let mut names = select_clusters(selector, labels);
        names.insert(name.clone());
        names
    });
    // The formatted grant is the same on every replica.
    let token = digest_of(format!("{:?} {visible_to:?}", cluster.grant).as_bytes());
    ClusterState {
        labels: cluster.labels.clone(),
        grant: Arc::clone(&cluster.grant) as Arc<dyn Grant>,
        grant_token: u64::try_from(token >> 64).unwrap_or_default(),
        cidrs: cluster.grant.cidrs.clone(),
        lease: match cluster.lease {
            registry::Lease::NeverConnected => Lease::NeverConnected,
            registry::Lease::Live => Lease::Live,
            // A cluster was silent for the time of a lease when it ended. This is constant, and the same on every replica.
            registry::Lease::Stale => {
                Lease::Stale { silent_ms: u64::try_from(lease_time.as_millis()).unwrap_or(u64::MAX) }
            }
        },
        federated_allow_final: cluster.federated_allow_final,
        visible_to,
    }
}
