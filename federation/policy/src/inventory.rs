//! What policy is judged against: clusters, namespaces, endpoints, network sets and services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;

use crate::model::{ClusterName, ClusterScope, Selection};
use crate::selector::{Label, LabelLookup, build};
use crate::tri::Tri;

pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// Labels that objects with equal labels may share. Written to, they are copied where they are shared.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct SharedLabels(Arc<Labels>);

impl From<Labels> for SharedLabels {
    fn from(labels: Labels) -> Self {
        Self(Arc::new(labels))
    }
}

impl SharedLabels {
    /// Whether another object shares them.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl FromIterator<(Arc<str>, Arc<str>)> for SharedLabels {
    fn from_iter<T: IntoIterator<Item = (Arc<str>, Arc<str>)>>(pairs: T) -> Self {
        Labels::from_iter(pairs).into()
    }
}

impl<const N: usize> From<[(Arc<str>, Arc<str>); N]> for SharedLabels {
    fn from(pairs: [(Arc<str>, Arc<str>); N]) -> Self {
        Labels::from(pairs).into()
    }
}

impl Deref for SharedLabels {
    type Target = Labels;

    fn deref(&self) -> &Labels {
        &self.0
    }
}

impl DerefMut for SharedLabels {
    fn deref_mut(&mut self) -> &mut Labels {
        Arc::make_mut(&mut self.0)
    }
}

/// Which label keys an origin may set. A key outside is *unknown* on its objects, not absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LabelGrant {
    #[default]
    All,
    Keys(BTreeSet<Arc<str>>),
}

/// One cluster as its policies and those of the federation see it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Cluster {
    /// Set at the hub only.
    pub labels: Labels,
    pub label_grant: LabelGrant,
    /// Its lease has ended: every selector answers unknown for each of its endpoints.
    pub stale: bool,
    /// A federated Allow is final here, instead of leaving to the local tiers.
    pub federated_allow_final: bool,
    pub namespaces: BTreeMap<Arc<str>, Namespace>,
    pub service_accounts: BTreeMap<(Arc<str>, Arc<str>), Labels>,
    pub endpoints: BTreeMap<EndpointId, Endpoint>,
    pub services: BTreeMap<(Arc<str>, Arc<str>), Service>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Namespace {
    /// As stored; `kubernetes.io/metadata.name` is added by the API server and by our sources.
    pub labels: Labels,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EndpointKind {
    Pod,
    /// NetworkSet (with a namespace) or GlobalNetworkSet and FederatedNetworkSet (without).
    NetworkSet,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId {
    pub kind: EndpointKind,
    pub namespace: Option<Arc<str>>,
    pub name: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamedPort {
    pub name: Arc<str>,
    pub protocol: u8,
    pub port: u16,
}

/// Whatever a selector can match: a pod that owns addresses, or a network set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Endpoint {
    /// Its own labels, as written. See [`EffectiveLabels`] for what a selector sees.
    pub labels: SharedLabels,
    pub service_account: Option<Arc<str>>,
    /// A pod's addresses, the primary first; empty for a pod that ended, has none yet, or is on the host's network.
    pub addresses: Vec<IpAddr>,
    /// A network set's nets.
    pub nets: Vec<IpNet>,
    pub ports: Vec<NamedPort>,
    pub node: Option<Arc<str>>,
    /// Shares its node's addresses, and is selected by nothing.
    pub host_network: bool,
    /// The node's addresses that a pod on the host's network uses, its primary first. They are not the pod's: a
    /// question about the pod is answered for these addresses.
    pub host_addresses: Vec<IpAddr>,
    /// `Some`: no pod runs yet, and its addresses, of both families, are not known. Only offline tools have such endpoints.
    pub planned: Option<Planned>,
}

/// Pods that are written down and do not run: a workload's pod template, or a pod that no API server has stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Planned {
    /// A template, of which there may be several pods.
    pub several: bool,
    pub stopped: Option<Stopped>,
    /// Keys of labels of its own that its controller sets when the pods run: neither value nor absence is known before.
    pub run_time_labels: BTreeSet<Arc<str>>,
    /// Those of them that every pod gets: only the value is not known before.
    pub certain_labels: BTreeSet<Arc<str>>,
    /// Its pods get containers with ports that are not known before.
    pub run_time_ports: bool,
    /// For IPv4, and for IPv6: its pods have no address of it.
    pub lacks_family: [bool; 2],
}

impl Planned {
    /// Whether its pods have an address of a family.
    pub fn has_family(&self, v4: bool) -> bool {
        !self.lacks_family[usize::from(!v4)]
    }
}

/// Why a workload is not to run for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    NoReplicas,
    Suspended,
}

/// A service with its backends, for `services` matches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// Of all its endpoints, those without a port too: what a source is matched by.
    pub addresses: BTreeSet<IpAddr>,
    /// Address, protocol and port: what a destination is matched by.
    pub backends: BTreeSet<(IpAddr, u8, u16)>,
    /// Endpoints that have no address yet, with protocols and ports.
    pub planned: BTreeMap<EndpointId, BTreeSet<(u8, u16)>>,
    /// What clients of the service see. Only offline tools know it.
    pub front: Option<Box<Front>>,
}

/// A service as its clients see it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Front {
    /// The cluster's addresses of it; none of a headless one.
    pub addresses: Vec<IpAddr>,
    /// Its addresses for clients outside: external addresses, and those of its load balancer. Within the cluster packets to
    /// them go to its backends, too.
    pub external_addresses: Vec<IpAddr>,
    /// Its name resolves to the addresses of its backends.
    pub headless: bool,
    /// Its name is another name, outside the cluster.
    pub external_name: Option<Arc<str>>,
    /// Without a selector its backends are written by hand.
    pub selects: bool,
    pub ports: Vec<FrontPort>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontPort {
    pub name: Option<Arc<str>>,
    pub protocol: u8,
    pub port: u16,
    /// Where packets to the port go, each with its own port.
    pub backends: Vec<(Backend, u16)>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    Address(IpAddr),
    /// A pod of the service's cluster.
    Pod(EndpointId),
}

/// The whole ClusterSet, as far as it is known here.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Inventory {
    pub clusters: BTreeMap<ClusterName, Cluster>,
    /// FederatedNetworkSets: of no cluster, matched within [`crate::model::ClusterScope::All`].
    pub federated_sets: BTreeMap<EndpointId, Endpoint>,
}

impl Inventory {
    /// Whether `selection`, in a policy that `enforcer` enforces, matches an endpoint of `cluster`.
    ///
    /// No if the endpoint is out of scope. Unknown for endpoints of a stale cluster, and for labels with keys that the cluster may not
    /// set. Endpoints of `enforcer` itself are never unknown, except for labels that a planned endpoint gets at run time.
    pub fn selects(&self, enforcer: &str, selection: &Selection, cluster: &str, endpoint: &EndpointId) -> Tri {
        let found = self.clusters.get(cluster).and_then(|owner| Some((owner, owner.endpoints.get(endpoint)?)));
        found.map_or(Tri::No, |(owner, it)| selects(enforcer, selection, cluster, owner, endpoint, it))
    }

    /// Whether `selection` matches a federated network set. Only a selection of the whole ClusterSet can.
    pub fn selects_federated_set(&self, selection: &Selection, set: &EndpointId) -> Tri {
        match self.federated_sets.get(set) {
            Some(endpoint) if selection.clusters == ClusterScope::All => {
                let cluster = &Cluster::default();
                selection.selector.evaluate(&EffectiveLabels { cluster, id: set, endpoint, first_hand: true })
            }
            _ => Tri::No,
        }
    }
}

/// [`Inventory::selects`] where the endpoint is at hand.
pub(crate) fn selects(
    enforcer: &str,
    selection: &Selection,
    cluster: &str,
    owner: &Cluster,
    id: &EndpointId,
    endpoint: &Endpoint,
) -> Tri {
    let first_hand = enforcer == cluster;
    // Network sets are their own cluster's, and no workloads.
    let is_set = id.kind == EndpointKind::NetworkSet;
    let seen = !is_set || first_hand && !matches!(selection.clusters, ClusterScope::Named(_));
    if endpoint.host_network || !seen || !selection.clusters.contains(enforcer, cluster) {
        return Tri::No;
    }
    if owner.stale && !first_hand {
        return Tri::Unknown;
    }
    selection.selector.evaluate(&EffectiveLabels { cluster: owner, id, endpoint, first_hand })
}

impl Endpoint {
    /// Whether packets may come from it and go to it: a pod with an address of its own, known or not.
    pub fn is_reachable(&self) -> bool {
        !self.host_network && (!self.addresses.is_empty() || self.planned.is_some())
    }

    /// Keys of its own labels whose values are not known, and whether they are there all the same.
    pub fn run_time_labels(&self) -> impl Iterator<Item = (&Arc<str>, bool)> {
        let planned = self.planned.iter();
        planned.flat_map(|it| it.run_time_labels.iter().map(|key| (key, it.certain_labels.contains(key))))
    }

    /// Whether it has an address of a family, known or not.
    pub fn has_family(&self, v4: bool) -> bool {
        self.planned.as_ref().is_some_and(|planned| planned.has_family(v4))
            || self.addresses.iter().any(|address| address.is_ipv4() == v4)
    }
}

impl ClusterScope {
    /// Whether a policy that `enforcer` enforces looks at endpoints of `cluster`.
    pub fn contains(&self, enforcer: &str, cluster: &str) -> bool {
        match self {
            Self::Local => enforcer == cluster,
            Self::All => true,
            Self::Named(names) => names.contains(cluster),
        }
    }
}

/// The labels of an endpoint as a selector sees them: its own, then the namespace's behind `pcns.`, a pod's account's
/// behind `pcsa.` (with the names of both as `projectcalico.org/name`), and
/// `projectcalico.org/{namespace,serviceaccount,orchestrator}`. Own labels of those names and prefixes are not in their
/// place, so that they cannot be forged: they are behind [`build::OWN_PREFIX`], where only Kubernetes' selectors see them. An
/// own label whose key is outside the cluster's grant is unknown, present or not; so is one that is set when a planned
/// endpoint runs, to its own cluster too.
#[derive(Debug, Clone, Copy)]
pub struct EffectiveLabels<'a> {
    pub cluster: &'a Cluster,
    pub id: &'a EndpointId,
    pub endpoint: &'a Endpoint,
    /// Evaluated by the endpoint's own cluster, which the grant does not limit.
    pub first_hand: bool,
}

impl EffectiveLabels<'_> {
    /// A label of the object's own.
    fn own(&self, key: &str) -> Label<'_> {
        match &self.cluster.label_grant {
            LabelGrant::Keys(granted) if !self.first_hand && !granted.contains(key) => Label::Unknown,
            _ => match &self.endpoint.planned {
                Some(planned) if planned.certain_labels.contains(key) => Label::Some,
                Some(planned) if planned.run_time_labels.contains(key) => Label::Unknown,
                _ => self.endpoint.labels.get(key).map_or(Label::Absent, |value| Label::Present(value)),
            },
        }
    }

    fn namespace(&self) -> Option<&Namespace> {
        self.cluster.namespaces.get(self.id.namespace.as_ref()?)
    }

    fn account(&self) -> Option<&Arc<str>> {
        self.endpoint.service_account.as_ref().filter(|_| self.id.kind == EndpointKind::Pod)
    }

    fn account_labels(&self) -> Option<&Labels> {
        self.cluster.service_accounts.get(&(self.id.namespace.clone()?, self.account()?.clone()))
    }

    /// All that are present, and known; not sorted.
    pub fn known(&self) -> Vec<(Arc<str>, Arc<str>)> {
        let mut all = Vec::new();
        self.each_known(&mut |key, value| all.push((key.into(), value.clone())));
        all
    }

    /// Calls `visit` with all that are present, and known, in no order.
    pub fn each_known(&self, visit: &mut impl FnMut(&str, &Arc<str>)) {
        let granted = match &self.cluster.label_grant {
            LabelGrant::Keys(granted) if !self.first_hand => Some(granted),
            _ => None,
        };
        for (key, value) in self.endpoint.labels.iter() {
            if granted.is_none_or(|granted| granted.contains(key)) {
                visit(&build::own_key(key), value);
            }
        }
        let mut prefixed = String::new();
        let mut behind = |prefix: &str, key: &str, value: &Arc<str>, visit: &mut dyn FnMut(&str, &Arc<str>)| {
            prefixed.clear();
            prefixed.push_str(prefix);
            prefixed.push_str(key);
            visit(&prefixed, value);
        };
        if let Some(namespace) = &self.id.namespace {
            visit(build::NAMESPACE, namespace);
            behind(build::NAMESPACE_PREFIX, build::NAME, namespace, visit);
        }
        for (key, value) in self.namespace().iter().flat_map(|namespace| &namespace.labels) {
            let key = if &**key == build::NAME { build::OWN_NAME } else { &**key };
            behind(build::NAMESPACE_PREFIX, key, value, visit);
        }
        if let Some(account) = self.account() {
            visit(build::SERVICE_ACCOUNT, account);
            behind(build::SERVICE_ACCOUNT_PREFIX, build::NAME, account, visit);
        }
        for (key, value) in self.account_labels().into_iter().flatten() {
            if &**key != build::NAME {
                behind(build::SERVICE_ACCOUNT_PREFIX, key, value, visit);
            }
        }
        if self.id.kind == EndpointKind::Pod {
            static KUBERNETES: LazyLock<Arc<str>> = LazyLock::new(|| build::KUBERNETES.into());
            visit(build::ORCHESTRATOR, &KUBERNETES);
        }
    }
}

impl LabelLookup for EffectiveLabels<'_> {
    fn label(&self, key: &str) -> Label<'_> {
        fn of<'v>(value: Option<&'v Arc<str>>) -> Label<'v> {
            value.map_or(Label::Absent, |value| Label::Present(value))
        }
        // Every name that is not the object's own starts with this letter; most keys do not.
        if !key.starts_with('p') {
            return self.own(key);
        }
        if let Some(key) = key.strip_prefix(build::NAMESPACE_PREFIX) {
            return match key {
                build::NAME => of(self.id.namespace.as_ref()),
                _ => {
                    let key = if key == build::OWN_NAME { build::NAME } else { key };
                    of(self.namespace().and_then(|namespace| namespace.labels.get(key)))
                }
            };
        }
        if let Some(key) = key.strip_prefix(build::SERVICE_ACCOUNT_PREFIX) {
            return match key {
                build::NAME => of(self.account()),
                _ => of(self.account_labels().and_then(|labels| labels.get(key))),
            };
        }
        if let Some(key) = key.strip_prefix(build::OWN_PREFIX) {
            return self.own(key);
        }
        match key {
            build::NAMESPACE => of(self.id.namespace.as_ref()),
            build::SERVICE_ACCOUNT => of(self.account()),
            build::ORCHESTRATOR if self.id.kind == EndpointKind::Pod => Label::Present(build::KUBERNETES),
            build::ORCHESTRATOR => Label::Absent,
            _ => self.own(key),
        }
    }
}
