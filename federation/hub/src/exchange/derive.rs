//! The exchange's view of the registry: clusters, and federated objects with what each makes its enforcers need.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hanse_k8s_api::hanse::{ClusterLabels, resolve_clusters, select_clusters};
use hanse_k8s_api::manifest::{Manifests, Object, read_bytes};
use hanse_policy::inventory::LabelGrant;
use hanse_policy::model::{ClusterName, ClusterScope, Phase, Policy, Port};
use hanse_policy::selector::{Expr, Selector};

use super::model::{
    ClusterState, FederatedManifest, Federation, Grant, Interest, Lease, ManifestKind, Position, Wanted, digest_of,
};
use crate::grants::MemberCluster;
use crate::manifest::Kind;
use crate::registry::{self, Registry, Snapshot};

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

/// The federation as the registry has it now. An object that this version cannot read is left out and logged: its
/// enforcers keep what they had.
pub fn federation(registry: &Registry, snapshot: &Snapshot) -> Federation {
    let accepted = || snapshot.clusters.iter().filter(|(_, cluster)| cluster.state == registry::ClusterState::Accepted);
    let labels: ClusterLabels = accepted().map(|(name, cluster)| (name.clone(), cluster.labels.clone())).collect();
    let mut federation = Federation {
        position: Position { epoch: registry.epoch(), revision: snapshot.revision },
        ..Federation::default()
    };
    for (name, cluster) in accepted() {
        let silent = || registry.silent_for(name).unwrap_or(Duration::ZERO).as_millis();
        let visible_to = cluster.grant.visible_to.as_ref().map(|selector| {
            let mut names = select_clusters(selector, &labels);
            names.insert(name.clone());
            names
        });
        // The grant in words is the same on every replica.
        let token = digest_of(format!("{:?} {visible_to:?}", cluster.grant).as_bytes());
        let state = ClusterState {
            labels: cluster.labels.clone(),
            grant: Arc::clone(&cluster.grant) as Arc<dyn Grant>,
            grant_token: u64::try_from(token >> 64).unwrap_or_default(),
            cidrs: cluster.grant.cidrs.clone(),
            lease: match cluster.lease {
                registry::Lease::NeverHeard => Lease::NeverHeard,
                registry::Lease::Live => Lease::Live,
                registry::Lease::Stale => Lease::Stale { silent_ms: u64::try_from(silent()).unwrap_or(u64::MAX) },
            },
            federated_allow_final: cluster.federated_allow_final,
            visible_to,
        };
        federation.clusters.insert(name.clone(), state);
    }
    let mut policies = Vec::new();
    let mut phases: BTreeMap<Arc<str>, Phase> = BTreeMap::new();
    for (id, object) in &snapshot.objects {
        let kind = match id.kind {
            Kind::FederatedNetworkPolicy => ManifestKind::Policy,
            Kind::FederatedNetworkSet => ManifestKind::NetworkSet,
            Kind::Tier => ManifestKind::Tier,
            Kind::MemberCluster => continue,
        };
        let mut read = Manifests::default();
        read_bytes(&Arc::from(id.to_string()), &object.manifest, &mut read);
        let Some(manifest) = read.objects.pop().filter(|_| read.diagnostics.is_empty()) else {
            tracing::warn!(object = %id, "the object cannot be read by this version and is not relayed");
            continue;
        };
        let plain = FederatedManifest {
            json: object.manifest.clone(),
            enforcers: None,
            resolved: BTreeMap::new(),
            interest: Interest::new(),
            features: Vec::new(),
        };
        match manifest.object {
            Object::FederatedNetworkPolicy(policy) => policies.push((id.name.clone(), policy, plain)),
            Object::Tier(tier) => {
                phases.insert(id.name.clone(), tier.convert(&mut Default::default()).id.phase);
                federation.manifests.insert((kind, id.name.clone()), Arc::new(plain));
            }
            _ => drop(federation.manifests.insert((kind, id.name.clone()), Arc::new(plain))),
        }
    }
    let everybody: BTreeSet<ClusterName> = labels.keys().cloned().collect();
    for (name, policy, plain) in policies {
        let mut resolved = BTreeMap::new();
        for text in policy.cluster_selectors() {
            if let Ok(selector) = Selector::parse(text) {
                resolved.insert(Arc::from(text), select_clusters(&selector, &labels));
            }
        }
        let converted =
            policy.convert_with(&|selector| resolve_clusters(selector, &labels), &phases, &mut Default::default());
        let enforcers = match &converted.enforcers {
            ClusterScope::Named(names) => names.clone(),
            ClusterScope::All | ClusterScope::Local => everybody.clone(),
        };
        let interest = interest_of(&converted);
        let manifest = FederatedManifest { enforcers: Some(enforcers), resolved, interest, ..plain };
        federation.manifests.insert((ManifestKind::Policy, name), Arc::new(manifest));
    }
    federation
}

/// What a policy can select in other clusters.
pub fn interest_of(policy: &Policy) -> Interest {
    let mut interest = Interest::new();
    let mut want = |clusters: &ClusterScope, selector: Selector, port_names: BTreeSet<Arc<str>>| {
        if *clusters != ClusterScope::Local {
            interest.insert(Arc::new(Wanted { clusters: clusters.clone(), selector, port_names }));
        }
    };
    let rules = policy.ingress.iter().chain(&policy.egress).flatten();
    for entity in rules.flat_map(|rule| [&rule.source, &rule.destination]) {
        for selection in [&entity.selection, &entity.not_selection].into_iter().flatten() {
            want(&selection.clusters, selection.selector.clone(), BTreeSet::new());
        }
        let named = |port: &Port| match port {
            Port::Named(name) => Some(name.clone()),
            Port::Range(..) => None,
        };
        let names: BTreeSet<Arc<str>> = entity.ports.iter().chain(&entity.not_ports).filter_map(named).collect();
        if !names.is_empty() {
            want(&entity.named_port_scope(&policy.id), Selector::from(Expr::All), names);
        }
    }
    interest
}
