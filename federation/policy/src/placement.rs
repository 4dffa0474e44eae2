//! Verdicts for pods without an address, which cover every address that such a pod may get.
//!
//! A rule with nets cannot be evaluated for a pod without an address. So the possible addresses are divided into classes that all
//! applicable rules treat alike, and a query is evaluated once per class. If all verdicts agree, the address does not matter.
//! Otherwise the verdict depends on the address, and the answer is never `allow`.
//!
//! A pod never gets an address of a special range (RFC 6890: "this" network, loopback, link-local, multicast, reserved), nor one
//! that another endpoint, a service or a node has. If the pod networks are known, only their addresses are assumed; pods then have
//! no address of a family without a network.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::rc::Rc;

use ipnet::IpNet;

use crate::evaluate::{Direction, End, Verdict, rules};
use crate::inventory::{EffectiveLabels, EndpointId, EndpointKind, Inventory, selects};
use crate::model::{ClusterName, EntityMatch, PolicySet};
use crate::tri::Tri;

/// The maximum number of pairs of classes per query, at about 20 µs each: 0.3 s. With more, the answer states only that the verdict
/// depends on the address.
pub const MAX_CASES: usize = 16_384;
/// The maximum number of addresses that are tried to find a free one in a class.
const MAX_TRIES: usize = 4_096;
/// The maximum number of nets in a message.
const MAX_NAMED: usize = 3;

/// Ranges without pod addresses (RFC 6890).
const SPECIAL: [&str; 10] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/128",
    "::1/128",
    "::ffff:0:0/96",
    "fe80::/10",
    "ff00::/8",
];

/// One end of a packet. Without an address, it is a pod that does not have one yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spot {
    pub address: Option<IpAddr>,
    pub pod: Option<(ClusterName, EndpointId)>,
}

/// Addresses that all applicable rules treat alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressClass {
    /// Empty: the addresses that are in no net of a rule.
    pub nets: Vec<NetWithout>,
    example: IpAddr,
    /// A second example, if there is one; otherwise equal to `example`.
    other: IpAddr,
}

/// A net without some within it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetWithout {
    pub net: IpNet,
    pub without: Vec<IpNet>,
}

/// A pair of addresses to evaluate.
#[derive(Debug, Clone)]
pub struct Case {
    pub source: End,
    pub destination: End,
    /// The class of the source address; `None` if the address is known.
    pub from: Option<Rc<AddressClass>>,
    /// The class of the destination address; `None` if the address is known.
    pub to: Option<Rc<AddressClass>>,
}

/// Lists of nets as rules and network sets contain them. An address matches a list if one of its nets contains it.
pub type NetLists = BTreeSet<Vec<IpNet>>;

/// The net lists of a pod in a direction: for the source and for the destination.
type NetListCache = HashMap<(ClusterName, EndpointId, Direction), Rc<[NetLists; 2]>>;

/// Finds the addresses to evaluate for pods without an address.
#[derive(Debug)]
pub struct Placement<'a> {
    policies: &'a PolicySet,
    inventory: &'a Inventory,
    assumed: Vec<IpNet>,
    taken: OnceCell<HashSet<IpAddr>>,
    lists: RefCell<NetListCache>,
}

impl<'a> Placement<'a> {
    /// `assumed`: the pod networks; empty if they are not known.
    pub fn new(policies: &'a PolicySet, inventory: &'a Inventory, assumed: &[IpNet]) -> Self {
        Self { policies, inventory, assumed: assumed.to_vec(), taken: OnceCell::new(), lists: RefCell::default() }
    }

    /// The net lists, for the source and the destination, of all rules that may apply to `pod` in a direction, enforced or staged.
    pub fn lists(&self, (cluster, pod): &(ClusterName, EndpointId), direction: Direction) -> Rc<[NetLists; 2]> {
        let key = (cluster.clone(), pod.clone(), direction);
        if let Some(known) = self.lists.borrow().get(&key) {
            return known.clone();
        }
        let mut lists = [NetLists::new(), NetLists::new()];
        let owner = self.inventory.clusters.get(cluster);
        if let Some((owner, endpoint)) = owner.and_then(|owner| Some((owner, owner.endpoints.get(pod)?))) {
            let labels = EffectiveLabels { cluster: owner, id: pod, endpoint, first_hand: true };
            let layers = [Some(&self.policies.federation), self.policies.clusters.get(cluster)];
            let policies = layers.into_iter().flatten().flat_map(|layer| layer.policies.values());
            let enforced = policies.filter(|it| !it.host_only && it.enforcers.contains(cluster, cluster));
            for policy in enforced.filter(|policy| policy.selector.evaluate(&labels) != Tri::No) {
                for rule in rules(policy, direction).unwrap_or_default() {
                    add_net_lists(self.inventory, cluster, &rule.source, &mut lists[0]);
                    add_net_lists(self.inventory, cluster, &rule.destination, &mut lists[1]);
                }
            }
        }
        let lists = Rc::new(lists);
        self.lists.borrow_mut().insert(key, lists.clone());
        lists
    }

    /// One case for each pair of address classes; `None` if there are more than [`MAX_CASES`].
    pub fn cases(&self, from: &Spot, to: &Spot, v4: bool) -> Option<Vec<Case>> {
        let (mut sources, mut destinations) = (NetLists::new(), NetLists::new());
        for (pod, direction) in [(&from.pod, Direction::Egress), (&to.pod, Direction::Ingress)] {
            let Some(pod) = pod else { continue };
            let [source, destination] = &*self.lists(pod, direction);
            sources.extend(source.iter().cloned());
            destinations.extend(destination.iter().cloned());
        }
        self.cases_of(from, to, &[sources, destinations], v4)
    }

    /// [`Self::cases`] with given net lists, for the source and the destination.
    pub fn cases_of(&self, from: &Spot, to: &Spot, lists: &[NetLists; 2], v4: bool) -> Option<Vec<Case>> {
        let classes = |spot: &Spot, lists: &NetLists| -> Vec<Option<Rc<AddressClass>>> {
            match spot.address {
                Some(_) => vec![None],
                None => {
                    classes(lists, v4, &self.assumed, self.taken()).into_iter().map(|it| Some(Rc::new(it))).collect()
                }
            }
        };
        let (sources, destinations) = (classes(from, &lists[0]), classes(to, &lists[1]));
        if sources.len().saturating_mul(destinations.len()) > MAX_CASES {
            return None;
        }
        let several = |(cluster, pod): &(ClusterName, EndpointId)| {
            let endpoint = self.inventory.clusters.get(cluster).and_then(|owner| owner.endpoints.get(pod));
            endpoint.and_then(|it| it.planned.as_ref()).is_some_and(|planned| planned.several)
        };
        // A single pod has one address. If it stands for several, the ends may be two of them.
        let is_same = from.pod.is_some() && from.pod == to.pod;
        let is_one = is_same && !from.pod.as_ref().is_some_and(several);
        let mut cases = Vec::new();
        for source in &sources {
            for destination in &destinations {
                let Some(address) = from.address.or(source.as_ref().map(|it| it.example)) else { continue };
                let other = destination.as_ref().map(|it| match it.example == address {
                    true => it.other,
                    false => it.example,
                });
                let Some(to_address) = to.address.or(other) else { continue };
                let to_address = if is_one { address } else { to_address };
                cases.push(Case {
                    source: End { address, pod: from.pod.clone() },
                    destination: End { address: to_address, pod: to.pod.clone() },
                    from: source.clone(),
                    to: destination.clone(),
                });
                if is_one {
                    return Some(cases);
                }
            }
        }
        Some(cases)
    }

    /// Addresses that are in use.
    fn taken(&self) -> &HashSet<IpAddr> {
        self.taken.get_or_init(|| {
            let mut taken = HashSet::new();
            for cluster in self.inventory.clusters.values() {
                for endpoint in cluster.endpoints.values() {
                    taken.extend(endpoint.addresses.iter().chain(&endpoint.host_addresses));
                }
                for service in cluster.services.values() {
                    taken.extend(&service.addresses);
                    let fronts =
                        service.front.iter().flat_map(|front| front.addresses.iter().chain(&front.external_addresses));
                    taken.extend(fronts);
                }
            }
            taken
        })
    }
}

/// Adds the net lists of one end of a rule: its nets, and those of the network sets that it may select.
pub fn add_net_lists(inventory: &Inventory, enforcer: &str, entity: &EntityMatch, lists: &mut NetLists) {
    let mut add = |nets: &[IpNet]| {
        if !nets.is_empty() {
            let mut nets: Vec<IpNet> = nets.iter().map(IpNet::trunc).collect();
            nets.sort_unstable();
            nets.dedup();
            lists.insert(nets);
        }
    };
    add(&entity.nets);
    add(&entity.not_nets);
    for selection in entity.selection.iter().chain(&entity.not_selection) {
        for (name, owner) in &inventory.clusters {
            let sets =
                owner.endpoints.iter().filter(|(id, set)| id.kind == EndpointKind::NetworkSet && !set.nets.is_empty());
            sets.filter(|(id, set)| selects(enforcer, selection, name, owner, id, set) != Tri::No)
                .for_each(|(_, set)| add(&set.nets));
        }
        for (id, set) in &inventory.federated_sets {
            if inventory.selects_federated_set(selection, id) != Tri::No {
                add(&set.nets);
            }
        }
    }
}

/// A node of the tree of nets: a net of a list, a special range or a pod network.
struct Branch {
    net: IpNet,
    children: Vec<usize>,
    /// For each list, whether it contains the addresses of this net outside of its children.
    in_lists: Vec<bool>,
    /// Whether a pod can have an address here.
    is_possible: bool,
}

/// The address classes of a family. If pods can have addresses outside all nets, the class of those comes first.
fn classes(lists: &NetLists, v4: bool, assumed: &[IpNet], taken: &HashSet<IpAddr>) -> Vec<AddressClass> {
    let of_family = |net: &IpNet| matches!(net, IpNet::V4(_)) == v4;
    // Where nets of one family are assumed, pods have no addresses of the other.
    let any = assumed.is_empty();
    let assumed: BTreeSet<IpNet> = assumed.iter().filter(|net| of_family(net)).map(IpNet::trunc).collect();
    let special: BTreeSet<IpNet> =
        SPECIAL.iter().filter_map(|text| text.parse().ok()).filter(|net| of_family(net)).collect();
    let mut in_lists: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
    for (at, list) in lists.iter().enumerate() {
        for net in list.iter().filter(|net| of_family(net)) {
            in_lists.entry(*net).or_default().push(at);
        }
    }
    let everything = match v4 {
        true => IpNet::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        false => IpNet::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    }
    .expect("a prefix of no bits");
    let nets: BTreeSet<IpNet> = in_lists.keys().chain(&assumed).chain(&special).copied().chain([everything]).collect();
    // Sorted by address, wider nets first: a net comes after all nets that contain it.
    let mut sorted: Vec<IpNet> = nets.into_iter().collect();
    sorted.sort_by_key(|net| (net.network(), net.prefix_len()));
    let mut tree: Vec<Branch> = Vec::with_capacity(sorted.len());
    let mut above: Vec<usize> = Vec::new();
    for net in sorted {
        while above.last().is_some_and(|top| !tree[*top].net.contains(&net)) {
            above.pop();
        }
        let parent = above.last().map(|top| &tree[*top]);
        let mut own = parent.map_or_else(|| vec![false; lists.len()], |parent| parent.in_lists.clone());
        in_lists.get(&net).into_iter().flatten().for_each(|list| own[*list] = true);
        // A net inherits both properties from the nets that contain it.
        let in_special = special.contains(&net) || above.iter().any(|at| special.contains(&tree[*at].net));
        let in_assumed = assumed.contains(&net) || above.iter().any(|at| assumed.contains(&tree[*at].net));
        let is_possible = in_assumed || any && !in_special;
        let at = tree.len();
        tree.push(Branch { net, children: Vec::new(), in_lists: own, is_possible });
        if let Some(parent) = above.last() {
            tree[*parent].children.push(at);
        }
        above.push(at);
    }
    let mut found: Vec<(&[bool], AddressClass)> = Vec::new();
    let mut known: HashMap<&[bool], usize> = HashMap::new();
    for branch in tree.iter().filter(|branch| branch.is_possible) {
        let children: Vec<IpNet> = branch.children.iter().map(|at| tree[*at].net).collect();
        let mut free = free(branch.net, &children).take(MAX_TRIES).filter(|address| !taken.contains(address));
        let Some(example) = free.next() else { continue };
        let other = free.next().unwrap_or(example);
        let named: Vec<IpNet> = children.into_iter().filter(|net| !special.contains(net)).collect();
        let nets = match branch.in_lists.contains(&true) {
            // Special ranges and pod networks alone do not make a class.
            true => vec![NetWithout { net: branch.net, without: named }],
            false => Vec::new(),
        };
        let at = *known.entry(&branch.in_lists).or_insert(found.len());
        match found.get_mut(at) {
            Some((_, class)) => {
                class.nets.extend(nets);
                if class.example == class.other {
                    class.other = example;
                }
            }
            None => found.push((&branch.in_lists, AddressClass { nets, example, other })),
        }
    }
    let mut classes: Vec<AddressClass> = found.into_iter().map(|(_, class)| class).collect();
    classes.sort_by(|a, b| a.nets.cmp(&b.nets));
    classes
}

/// The addresses of a net outside of `parts`, which are sorted and disjoint.
fn free(net: IpNet, parts: &[IpNet]) -> impl Iterator<Item = IpAddr> + use<> {
    let number = |address: IpAddr| match address {
        IpAddr::V4(it) => u128::from(u32::from(it)),
        IpAddr::V6(it) => u128::from(it),
    };
    let address = move |number: u128| match net {
        IpNet::V4(_) => u32::try_from(number).ok().map(|it| IpAddr::V4(it.into())),
        IpNet::V6(_) => Some(IpAddr::V6(number.into())),
    };
    let ends = |net: &IpNet| (number(net.network()), number(net.broadcast()));
    let (first, last) = ends(&net);
    let mut parts: Vec<(u128, u128)> = parts.iter().map(ends).collect();
    parts.reverse();
    let mut next = Some(first);
    std::iter::from_fn(move || {
        let mut at = next.filter(|at| *at <= last)?;
        while let Some((start, end)) = parts.last().copied().filter(|(start, _)| *start <= at) {
            debug_assert!(start <= at);
            parts.pop();
            at = at.max(end.checked_add(1)?);
        }
        next = at.checked_add(1);
        (at <= last).then(|| address(at)).flatten()
    })
}

/// A description of how the verdict depends on addresses: the verdict of the first case, and the addresses for which it differs.
/// `verdicts` has one entry per case; `None` if all are equal.
pub fn dependence(cases: &[Case], verdicts: &[Verdict]) -> Option<String> {
    let base = *verdicts.first()?;
    let other = *verdicts.iter().find(|verdict| **verdict != base)?;
    let differing: Vec<&Case> =
        cases.iter().zip(verdicts).filter(|(_, verdict)| **verdict == other).map(|(case, _)| case).collect();
    // Whether one end alone decides it.
    let by_one = |end: &dyn Fn(&Case) -> *const AddressClass| {
        let those: BTreeSet<_> = differing.iter().map(|case| end(case)).collect();
        cases.iter().zip(verdicts).all(|(case, verdict)| those.contains(&end(case)) == (*verdict == other))
    };
    let pointer = |class: &Option<Rc<AddressClass>>| class.as_ref().map_or(std::ptr::null(), Rc::as_ptr);
    let mut said = BTreeSet::new();
    let clauses: Vec<String> = if by_one(&|case| pointer(&case.to)) {
        let firsts = differing.iter().filter(|case| said.insert(pointer(&case.to)));
        vec![format!("the destination's address is {}", inside(firsts.filter_map(|case| case.to.as_deref())))]
    } else if by_one(&|case| pointer(&case.from)) {
        let firsts = differing.iter().filter(|case| said.insert(pointer(&case.from)));
        vec![format!("the source's address is {}", inside(firsts.filter_map(|case| case.from.as_deref())))]
    } else {
        let clause = |case: &&Case| {
            // An end whose addresses make no difference is not named.
            let tells = |end: usize| cases.iter().any(|it| [&it.from, &it.to][end] != [&case.from, &case.to][end]);
            let ends = [("the source's", &case.from), ("the destination's", &case.to)];
            let ends = ends.into_iter().enumerate().filter(|(at, _)| tells(*at)).map(|(_, end)| end);
            let ends = ends.filter_map(|(end, class)| Some(format!("{end} address is {}", class.as_deref()?)));
            ends.collect::<Vec<_>>().join(" and ")
        };
        differing.iter().map(clause).collect()
    };
    let shown = clauses.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>().join(", or if ");
    let more = match clauses.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        more => format!(", or in {more} more cases"),
    };
    Some(format!("the address: {}, but {} if {shown}{more}", word(base), word(other)))
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allow => "allow",
        Verdict::Deny => "deny",
    }
}

/// `in 10.0.0.0/8 or 192.0.2.0/24`.
fn inside<'c>(classes: impl Iterator<Item = &'c AddressClass>) -> String {
    let mut nets: Vec<&NetWithout> = Vec::new();
    let mut elsewhere = false;
    for class in classes {
        elsewhere |= class.nets.is_empty();
        nets.extend(&class.nets);
    }
    let mut named: Vec<String> = nets.iter().take(MAX_NAMED).map(ToString::to_string).collect();
    if nets.len() > MAX_NAMED {
        named.push(format!("{} more nets", nets.len() - MAX_NAMED));
    }
    match (named.is_empty(), elsewhere) {
        (true, _) => "in no net that a rule names".to_owned(),
        (false, false) => format!("in {}", named.join(" or ")),
        (false, true) => format!("in {} or in no net that a rule names", named.join(" or ")),
    }
}

impl std::fmt::Display for AddressClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&inside(std::iter::once(self)))
    }
}

impl std::fmt::Display for NetWithout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = self.net.to_string();
        if !self.without.is_empty() {
            let named: Vec<String> = self.without.iter().take(MAX_NAMED).map(ToString::to_string).collect();
            let _ = write!(text, " (without {}", named.join(", "));
            let more = self.without.len().saturating_sub(MAX_NAMED);
            text.push_str(&if more > 0 { format!(" and {more} more)") } else { ")".to_owned() });
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists(lists: &[&[&str]]) -> NetLists {
        let list = |list: &&[&str]| list.iter().map(|net| net.parse().expect("a net")).collect();
        lists.iter().map(list).collect()
    }

    fn shown(of: &[&[&str]], v4: bool, assumed: &[&str], taken: &[&str]) -> Vec<String> {
        let assumed: Vec<IpNet> = assumed.iter().map(|net| net.parse().expect("a net")).collect();
        let taken = taken.iter().map(|address| address.parse().expect("an address")).collect();
        classes(&lists(of), v4, &assumed, &taken).iter().map(|class| format!("{class}: {}", class.example)).collect()
    }

    #[test]
    fn classes_separate_addresses_by_lists() {
        let none = "in no net that a rule names: 1.0.0.0";
        assert_eq!(shown(&[], true, &[], &[]), [none]);
        assert_eq!(shown(&[&["10.0.0.0/8"]], true, &[], &[]), [none, "in 10.0.0.0/8: 10.0.0.0"]);
        // Two nets of one list are one class, with an exception of another list.
        assert_eq!(
            shown(&[&["10.0.0.0/8", "192.168.0.0/16"], &["10.1.0.0/16"]], true, &[], &[]),
            [none, "in 10.0.0.0/8 (without 10.1.0.0/16) or 192.168.0.0/16: 10.0.0.0", "in 10.1.0.0/16: 10.1.0.0",]
        );
        // Everything, without what no pod has.
        assert_eq!(
            shown(&[&["0.0.0.0/0"], &["169.254.169.254/32", "127.0.0.1/32"]], true, &[], &[]),
            ["in 0.0.0.0/0: 1.0.0.0"]
        );
        // Another has the only address.
        assert_eq!(shown(&[&["10.0.0.1/32"]], true, &[], &["10.0.0.1"]), [none]);
        assert_eq!(shown(&[&["10.0.0.0/31"]], true, &[], &["10.0.0.0"]), [none, "in 10.0.0.0/31: 10.0.0.1"]);
        // The other family does not matter.
        assert_eq!(shown(&[&["2001:db8::/32"]], true, &[], &[]), [none]);
        assert_eq!(
            shown(&[&["2001:db8::/32", "10.0.0.0/8"]], false, &[], &[]),
            ["in no net that a rule names: ::2", "in 2001:db8::/32: 2001:db8::"]
        );
    }

    #[test]
    fn pods_have_addresses_of_known_pod_networks_only() {
        let nets: &[&[&str]] = &[&["10.0.0.0/8"], &["10.244.7.0/24"], &["192.0.2.0/24"]];
        assert_eq!(
            shown(nets, true, &["10.244.0.0/16"], &[]),
            ["in 10.244.0.0/16 (without 10.244.7.0/24): 10.244.0.0", "in 10.244.7.0/24: 10.244.7.0"]
        );
        // Even where it is special.
        assert_eq!(shown(&[], true, &["169.254.0.0/17"], &[]), ["in no net that a rule names: 169.254.0.0"]);
        // Pods have no addresses of the other family.
        assert_eq!(shown(&[&["fd00::/8"]], false, &["10.244.0.0/16"], &[]), [""; 0]);
        assert_eq!(shown(&[], true, &["fd00::/64"], &[]), [""; 0]);
    }

    #[test]
    fn net_covered_by_its_parts_has_no_class() {
        assert_eq!(
            shown(&[&["10.0.0.0/8"], &["10.0.0.0/9"], &["10.128.0.0/9"]], true, &["10.0.0.0/8"], &[]),
            ["in 10.0.0.0/9: 10.0.0.0", "in 10.128.0.0/9: 10.128.0.0"]
        );
        let last = "255.255.255.255/32".parse().expect("a net");
        assert_eq!(free(last, &[]).count(), 1);
        let all = "::/0".parse().expect("a net");
        assert_eq!(free(all, &[all]).count(), 0);
    }
}
