//! Events of a simulation: changes of clusters, policies and grants, broken streams, and restarts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use hanse_api::Object;
use hanse_api::manifest::{Manifests, read_bytes};
use hanse_exchange::interest::{self, Interest, Wanted};
use hanse_exchange::member::model::Position;
use hanse_exchange::member::publisher::Publisher;
use hanse_exchange::member::receiver::Receiver;
use hanse_exchange::message::{WrittenScope, WrittenSelection};
use hanse_exchange::model as hub;
use hanse_policy::inventory::{Endpoint, Namespace};
use hanse_policy::model::{ClusterName, ClusterScope};
use hanse_policy::selector::{Expr, Selector};

use super::delivery::over_the_wire_to_hub;
use super::{Fleet, Grant, MEMBERS, NAMESPACES, Registered, Version, exchange, name, pod};

const SELECTORS: [&str; 7] =
    ["app == 'web'", "app == 'db'", "has(app)", "all()", "app != 'web'", "pcns.stage == 'prod'", "!has(gpu)"];

/// A selector above the size limit: 400 names of 58 bytes.
fn oversized() -> Expr {
    Expr::In("app".into(), (0..400).map(|it| format!("{it:058}").into()).collect())
}

fn written(selector: &Selector) -> WrittenSelection {
    let selector = selector.canonical.to_string();
    WrittenSelection { clusters: WrittenScope::All, selector, port_names: Vec::new() }
}

impl Fleet<'_> {
    pub fn random_event(&mut self) {
        let member = self.random.below(MEMBERS);
        match self.random.below(100) {
            0..16 => {
                let (pod, value) = (format!("pod-{}", self.random.below(8)), self.random.one(&["web", "db", "cache"]));
                match self.random.below(3) {
                    0 => self.remove_pod(member, &pod),
                    1 => self.set_pod(member, &pod, "app", value),
                    _ => self.set_pod(member, &pod, "gpu", value),
                }
                self.count("pod changed");
            }
            16..18 => {
                let (namespace, stage) = (self.random.one(&NAMESPACES), self.random.one(&["prod", "dev"]));
                let labels = [("stage".into(), stage.into())].into_iter().collect();
                self.members[member].truth.namespaces.insert(namespace.into(), Namespace { labels });
                self.publish(member);
                self.count("namespace changed");
            }
            18..23 => {
                let (policy, selector) = (self.random.one(&["a", "b", "c"]), self.random.one(&SELECTORS));
                let enforcers: Vec<usize> = (0..MEMBERS).filter(|_| self.random.below(2) == 0).collect();
                let clusters = match self.random.below(3) {
                    0 => ClusterScope::Named([name(0), name(1)].into()),
                    _ => ClusterScope::All,
                };
                self.apply_policy(policy, selector, &enforcers, clusters);
                self.count("policy applied");
            }
            23 => {
                let policy = self.random.one(&["a", "b", "c"]);
                if self.policies.remove(policy).is_some() {
                    self.send_federation();
                    self.count("policy deleted");
                }
            }
            24 => self.change_own_interest(member),
            25 => self.cut_publish(member),
            26 => self.cut_watch(member),
            27 if self.random.below(4) == 0 => self.restart_hub(),
            28 if self.random.below(4) == 0 => self.restart_member(member),
            29 => self.change_lease(member),
            30 if self.random.below(2) == 0 => self.change_grant(member),
            31 if self.random.below(3) == 0 => match self.registered.contains_key(&name(member)) {
                true => self.withdraw(member),
                false => self.come(member),
            },
            32 => {
                let stored = self.members[member].receiver.store();
                self.members[member].stored_receiver = stored;
            }
            33..66 => drop(self.deliver_published(member)),
            _ => drop(self.deliver_one(member)),
        }
    }

    /// Changes all pods at once.
    pub fn set_pods(&mut self, member: usize, pods: impl Iterator<Item = (String, &'static str)>) {
        pods.for_each(|(pod, value)| self.label_pod(member, &pod, "app", value));
        self.publish(member);
    }

    pub fn set_pod(&mut self, member: usize, pod: &str, key: &str, value: &str) {
        self.label_pod(member, pod, key, value);
        self.publish(member);
    }

    pub(super) fn label_pod(&mut self, member: usize, pod_name: &str, key: &str, value: &str) {
        let hash = pod_name.len() + pod_name.bytes().map(usize::from).sum::<usize>();
        let id = pod(NAMESPACES[hash % NAMESPACES.len()], pod_name);
        let it = &mut self.members[member];
        it.addresses += 1;
        let fresh = IpAddr::from(Ipv4Addr::from(0x0a00_0000 + (member as u32) * 0x1_0000 + it.addresses));
        let endpoint =
            it.truth.endpoints.entry(id).or_insert_with(|| Endpoint { addresses: vec![fresh], ..Endpoint::default() });
        endpoint.labels.insert(key.into(), value.into());
    }

    pub fn remove_pod(&mut self, member: usize, pod_name: &str) {
        self.members[member].truth.endpoints.retain(|id, _| *id.name != *pod_name);
        self.publish(member);
    }

    pub fn apply_policy(&mut self, policy: &str, selector: &str, enforcers: &[usize], clusters: ClusterScope) {
        let selector = Selector::parse(selector).expect("a selector");
        let wanted = Wanted::new(clusters, &selector, BTreeSet::new());
        self.apply_interest(policy, [Arc::new(wanted)].into(), enforcers);
    }

    /// Applies a manifest (JSON) with the interest that the hub derives from it.
    pub fn apply_manifest(&mut self, policy: &str, manifest: &str, enforcers: &[usize]) {
        let mut read = Manifests::default();
        read_bytes(&"policy".into(), manifest.as_bytes(), &mut read);
        assert_eq!(read.diagnostics, []);
        let Some(Object::FederatedPolicy(written)) = read.objects.pop().map(|it| it.object) else {
            panic!("not a federated policy")
        };
        let converted = written.among(&BTreeMap::new(), &BTreeMap::new());
        self.apply_interest(policy, interest::derive([&converted], interest::DERIVED), enforcers);
    }

    pub(super) fn apply_interest(&mut self, policy: &str, interest: Interest, enforcers: &[usize]) {
        let number = self.versions.len() as u64 + 1;
        let version = Version {
            interest,
            enforcers: enforcers.iter().map(|member| name(*member)).collect(),
            synced: BTreeMap::new(),
        };
        self.versions.insert(number, version);
        self.policies.insert(policy.into(), number);
        self.send_federation();
        let synced = (0..MEMBERS).map(name).filter_map(|cluster| {
            let origin = self.exchange.origin(&cluster).filter(|origin| origin.synced)?;
            let at = Position { epoch: origin.position.epoch, revision: origin.position.revision };
            Some((cluster, at))
        });
        let synced: BTreeMap<ClusterName, Position> = synced.collect();
        self.versions.get_mut(&number).expect("just made").synced = synced;
    }

    pub(super) fn change_own_interest(&mut self, member: usize) {
        // Earlier versions of the member register selections that the hub cannot read.
        let selector = match self.random.below(6) {
            0 => Selector::from(oversized()),
            _ => Selector::parse(self.random.one(&SELECTORS)).expect("a selector"),
        };
        let own = if self.random.below(3) == 0 { Vec::new() } else { vec![written(&selector)] };
        self.register(member, own);
        self.count("own interest changed");
    }

    pub fn register_oversized(&mut self, member: usize) {
        self.register(member, vec![written(&Selector::from(oversized()))]);
    }

    pub fn register_nothing(&mut self, member: usize) {
        self.register(member, Vec::new());
    }

    pub(super) fn register(&mut self, member: usize, own: Vec<WrittenSelection>) {
        let it = &mut self.members[member];
        it.own.clone_from(&own);
        let request = it.receiver.set_own_written(own);
        if let (Some(request), Some(id)) = (request, it.watching) {
            self.exchange.watch(id, over_the_wire_to_hub(request)).expect("the protocol");
        }
    }

    pub fn cut_publish(&mut self, member: usize) {
        if let Some(stream) = self.members[member].publishing.take() {
            self.exchange.publish_close(stream.id);
            self.members[member].closed.push(stream.id);
            self.count("publish stream cut");
        }
    }

    pub fn cut_watch(&mut self, member: usize) {
        if let Some(id) = self.members[member].watching.take() {
            self.exchange.watch_close(id);
            self.members[member].evaluated = None;
            self.members[member].receiver.disconnected();
            self.count("watch stream cut");
        }
    }

    /// Restarts the hub without endpoints, which it does not store.
    pub fn restart_hub(&mut self) {
        for it in &mut self.members {
            (it.publishing, it.watching, it.evaluated) = (None, None, None);
            it.closed.clear();
            it.receiver.disconnected();
        }
        self.exchange = exchange();
        self.versions.values_mut().for_each(|version| version.synced.clear());
        self.send_federation();
        self.count("hub restarted");
    }

    /// The member continues from its stored state, or starts a new epoch.
    pub(super) fn restart_member(&mut self, member: usize) {
        self.cut_publish(member);
        self.cut_watch(member);
        let lost = self.random.below(4) == 0;
        let it = &mut self.members[member];
        it.receiver = Receiver::restore(&it.stored_receiver).unwrap_or_default();
        (it.view, it.in_force, it.positions) = Default::default();
        it.publisher = match lost {
            true => Publisher::new(it.publisher.position().epoch + 1),
            false => Publisher::restore(&it.stored_publisher).expect("what was stored"),
        };
        it.receiver.set_own_written(it.own.clone());
        it.positions = it.receiver.origins().into_iter().map(|(name, status)| (name, status.position)).collect();
        self.take_changes(member, true);
        self.publish(member);
        self.count(if lost { "numbering lost" } else { "member restarted" });
    }

    /// Restarts a member without the stored receiver.
    pub fn restart_without_state(&mut self, member: usize) {
        self.members[member].stored_receiver.clear();
        self.restart_member(member);
    }

    pub(super) fn change_lease(&mut self, member: usize) {
        let Some(it) = self.registered.get_mut(&name(member)) else { return };
        it.lease = match it.lease {
            hub::Lease::NeverConnected => return,
            hub::Lease::Live => hub::Lease::Stale { silent_ms: 30_000 },
            hub::Lease::Stale { .. } => hub::Lease::Live,
        };
        self.send_federation();
        self.count("lease ended");
    }

    pub(super) fn change_grant(&mut self, member: usize) {
        let someone = name(self.random.below(MEMBERS));
        let Some(it) = self.registered.get_mut(&name(member)) else { return };
        match self.random.below(3) {
            0 => {
                for other in self.members.iter_mut().filter(|other| other.name != someone) {
                    other.hidden.insert(name(member));
                }
                it.visible_to = Some([someone, name(member)].into());
            }
            1 => it.visible_to = None,
            _ if it.grant.denied.is_empty() => drop(it.grant.denied.insert("secret")),
            _ => it.grant.denied.clear(),
        }
        // Newly granted endpoints arrive like those of a new cluster, after policies.
        for version in self.versions.values_mut() {
            version.synced.remove(&name(member));
        }
        self.send_federation();
        self.count("grant changed");
    }

    pub fn withdraw(&mut self, member: usize) {
        self.registered.remove(&name(member));
        self.cut_publish(member);
        self.cut_watch(member);
        for version in self.versions.values_mut() {
            version.synced.remove(&name(member));
        }
        self.send_federation();
        self.count("cluster withdrawn");
    }

    pub(super) fn come(&mut self, member: usize) {
        let new = Registered { grant: Grant::default(), lease: hub::Lease::NeverConnected, visible_to: None };
        self.registered.insert(name(member), new);
        self.send_federation();
        self.count("cluster came");
    }

    pub fn stall(&mut self, member: usize) {
        self.members[member].stalled = true;
    }

    pub fn resume(&mut self, member: usize) {
        self.members[member].stalled = false;
    }
}
