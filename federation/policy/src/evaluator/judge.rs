//! Evaluating packets.

use std::net::IpAddr;
use std::sync::Arc;

use smallvec::SmallVec;

use super::chain::{Chain, ChainKey};
use super::policies::{Evaluator, net_bit, selector_bit};
use crate::evaluate::{
    Answer, Direction, End, Enforcer, Facts, Query, TierRules, View, answer, has_named_port, is_backend,
};
use crate::explain::Explanation;
use crate::indexed::{ClassId, ClusterId, IndexedInventory, LOCAL, SelectorId, SlotId};
use crate::model::{ClusterScope, Selection, ServiceMatch};
use crate::outline::{EndBits, PacketOutline};
use crate::tri::Tri;

/// An evaluator with its inventory, for any number of packets. It belongs to one thread; several may read at once.
#[derive(Debug)]
pub struct Judge<'a> {
    evaluator: &'a Evaluator,
    pub(super) inventory: &'a IndexedInventory,
    bits: EndBits,
}

/// An end of a packet, as the inventory knows it.
#[derive(Debug, Default)]
struct ResolvedEnd {
    pod: Option<ResolvedPod>,
    /// The network sets that contain the address.
    sets: SmallVec<[SlotId; 4]>,
}

#[derive(Debug, Clone, Copy)]
struct ResolvedPod {
    slot: SlotId,
    cluster: ClusterId,
    class: Option<ClassId>,
}

impl<'a> Judge<'a> {
    pub fn new(evaluator: &'a Evaluator, inventory: &'a IndexedInventory) -> Self {
        Self { evaluator, inventory, bits: EndBits::new(evaluator.bit_count(inventory)) }
    }

    /// An address as an end of a packet, with the pod that owns it: of several, the local cluster's, then the first by name.
    pub fn end(&self, address: IpAddr) -> End {
        let pod = self.inventory.owner(address).map(|slot| {
            let cluster = &self.inventory.clusters[self.inventory.cluster_of(slot)].name;
            (cluster.clone(), self.inventory.id_of(slot))
        });
        End { address, pod }
    }

    /// The pod at an end, where it is one of the local cluster.
    pub fn local_pod(&self, end: &End) -> Option<SlotId> {
        let (cluster, id) = end.pod.as_ref()?;
        self.inventory.endpoint(self.inventory.cluster_id(cluster).filter(|cluster| *cluster == LOCAL)?, id)
    }

    /// The node of a pod of the local cluster, where it has one; `None`: the end is not such a pod.
    pub fn node_of(&self, end: &End) -> Option<Option<&'a Arc<str>>> {
        let slot = &self.inventory.slots[self.local_pod(end)?];
        Some(slot.node.map(|node| &self.inventory.nodes[node]))
    }

    /// The own labels of the pod at an end, as written, by key.
    pub fn labels_of(&self, end: &End) -> impl Iterator<Item = (&'a str, &'a Arc<str>)> {
        let inventory = self.inventory;
        let slot = end.pod.as_ref().and_then(|(cluster, id)| inventory.endpoint(inventory.cluster_id(cluster)?, id));
        slot.into_iter().flat_map(move |slot| inventory.own_labels(slot))
    }

    /// What is enforced, and where something is staged, what would be if it were committed.
    pub fn explain(&self, query: &Query) -> Explanation {
        let facts = self.facts(query);
        let enforced = self.judge(&facts, View::Enforced, None);
        let pending = self.evaluator.has_staged().then(|| self.judge(&facts, View::Pending, Some(&enforced)));
        Explanation::new(enforced, pending)
    }

    /// The same as [`crate::evaluate::evaluate`] in the directions of the local cluster's pods; `None` in others.
    pub fn evaluate(&self, query: &Query, view: View) -> Answer {
        self.judge(&self.facts(query), view, None)
    }

    /// `enforced`: the answer of the enforced view, which is reused in directions where no staged policy changes the chain.
    fn judge(&self, facts: &PacketFacts<'_, '_>, view: View, enforced: Option<&Answer>) -> Answer {
        let query = facts.query;
        answer(query, false, |_, direction| {
            let at = usize::from(direction == Direction::Ingress);
            let pod = facts.ends[at].pod.filter(|pod| pod.cluster == LOCAL)?;
            let chain = self.chain(pod.class, direction, view);
            if let Some(enforced) = enforced
                && Arc::ptr_eq(&chain, &self.chain(pod.class, direction, View::Enforced))
            {
                return if at == 0 { enforced.egress.clone() } else { enforced.ingress.clone() };
            }
            self.set_bits(&chain, facts);
            let names_ports = |pod: ResolvedPod| !self.inventory.slots[pod.slot].ports().is_empty();
            let packet = PacketOutline::new(query, facts.ends[1].pod.is_some_and(names_ports), &self.bits);
            let local = &self.inventory.clusters[LOCAL];
            let enforcer = Enforcer {
                facts,
                cluster: &local.name,
                federated_allow_final: local.record.as_ref().is_some_and(|record| record.federated_allow_final),
            };
            let tiers = chain.tiers.iter().map(|tier| {
                let outlines = chain.outlines[tier.rules.clone()].iter().zip(tier.rules.clone());
                let candidates = outlines.filter(|(outline, _)| packet.may_match(outline));
                let rules = candidates.filter_map(|(_, at)| chain.rule(at, direction));
                TierRules {
                    id: &tier.id,
                    default: tier.default,
                    last: &tier.last,
                    // A cluster knows the labels of its own pods.
                    rules: rules.map(|(policy, rule)| (policy, rule, Tri::Yes)),
                }
            });
            Some(enforcer.judge(tiers, query))
        })
    }

    fn facts<'j>(&'j self, query: &'j Query) -> PacketFacts<'j, 'a> {
        PacketFacts { judge: self, query, ends: [self.known(&query.source), self.known(&query.destination)] }
    }

    fn known(&self, end: &End) -> ResolvedEnd {
        let pod = end.pod.as_ref().and_then(|(cluster, id)| {
            let cluster = self.inventory.cluster_id(cluster)?;
            let slot = self.inventory.endpoint(cluster, id)?;
            Some(ResolvedPod { slot, cluster, class: self.inventory.slots[slot].class })
        });
        ResolvedEnd { pod, sets: self.inventory.sets_containing(end.address) }
    }

    fn chain(&self, class: Option<ClassId>, direction: Direction, view: View) -> Arc<Chain> {
        let is_subject = |selector| self.evaluator.is_subject.get(selector).copied().unwrap_or(false);
        let matches = class.into_iter().flat_map(|class| self.inventory.index.matches(class));
        let subjects = matches.filter(|it| it.certain && is_subject(it.selector)).map(|it| it.selector);
        self.evaluator.chain(self.inventory, ChainKey { subjects: subjects.collect(), direction, view })
    }

    /// Sets the bits of the selectors that match the ends, or may, and of the nets that contain them.
    fn set_bits(&self, chain: &Chain, facts: &PacketFacts<'_, '_>) {
        self.bits.clear();
        let addresses = [facts.query.source.address, facts.query.destination.address];
        for (at, end) in facts.ends.iter().enumerate().filter(|(at, _)| chain.requires[*at]) {
            let sets = end.sets.iter().filter_map(|set| self.inventory.slots[*set].class);
            for class in end.pod.and_then(|pod| pod.class).into_iter().chain(sets) {
                let matches = self.inventory.index.matches(class).iter();
                matches.for_each(|it| self.bits.set(at, selector_bit(it.selector)));
            }
            let nets = self.evaluator.nets_by_address.containing(addresses[at]);
            nets.for_each(|net| self.bits.set(at, net_bit(net)));
        }
    }

    /// Whether a selector matches a class.
    fn matches(&self, class: Option<ClassId>, selector: SelectorId) -> Tri {
        let matches = class.map_or(&[][..], |class| self.inventory.index.matches(class));
        match matches.binary_search_by_key(&selector, |it| it.selector) {
            Ok(at) if matches[at].certain => Tri::Yes,
            Ok(_) => Tri::Unknown,
            Err(_) => Tri::No,
        }
    }
}

/// [`Facts`] of one packet.
struct PacketFacts<'j, 'a> {
    judge: &'j Judge<'a>,
    query: &'j Query,
    ends: [ResolvedEnd; 2],
}

impl PacketFacts<'_, '_> {
    fn end(&self, end: &End) -> &ResolvedEnd {
        &self.ends[usize::from(!std::ptr::eq(end, &self.query.source))]
    }

    fn pod(&self, pod: ResolvedPod, scope: &ClusterScope, selector: SelectorId) -> Tri {
        match self.judge.inventory.in_scope(scope, pod.cluster) {
            true => self.judge.matches(pod.class, selector),
            false => Tri::No,
        }
    }
}

impl Facts for PacketFacts<'_, '_> {
    fn selected(&self, _enforcer: &str, selection: &Selection, end: &End) -> Tri {
        let inventory = self.judge.inventory;
        // Every selector of a stored policy is registered.
        let Some(selector) = inventory.index.find(&selection.selector) else { return Tri::Unknown };
        let end = self.end(end);
        let mut any = end.pod.map_or(Tri::No, |pod| self.pod(pod, &selection.clusters, selector));
        for set in &end.sets {
            if inventory.sets_in_scope(&selection.clusters, inventory.cluster_of(*set)) {
                any = any.or(self.judge.matches(inventory.slots[*set].class, selector));
            }
        }
        any
    }

    fn named_port(&self, _enforcer: &str, pods: &Selection, name: &str, end: &End, protocol: u8, port: u16) -> Tri {
        let inventory = self.judge.inventory;
        let Some(selector) = inventory.index.find(&pods.selector) else { return Tri::Unknown };
        let named = |pod: &ResolvedPod| has_named_port(inventory.slots[pod.slot].ports(), name, protocol, port);
        let pod = self.end(end).pod.filter(named);
        pod.map_or(Tri::No, |pod| self.pod(pod, &pods.clusters, selector))
    }

    fn backend(&self, _enforcer: &str, service: &ServiceMatch, end: &End, port: Option<(u8, u16)>) -> Tri {
        let service = self.judge.inventory.service(&(service.namespace.clone(), service.name.clone()));
        Tri::from(service.is_some_and(|service| is_backend(service, end.address, None, port)))
    }
}
