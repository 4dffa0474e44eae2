//! What Calico makes of its policies, from the text and the code of the reference (github.com/projectcalico/calico, 3.32),
//! in the reference's own steps: rules are converted, selectors and port names become sets of addresses and sockets, and a
//! packet is matched by these alone. Each step names the file and the function that it follows.
//!
//! A [`Misreading`] switches off one clause that was misread before. The test checks that packets distinguish the two.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::oracle::{list, text};

pub type Labels = BTreeMap<String, String>;

/// Address, protocol and port.
pub type Socket = (IpAddr, u8, u16);

/// The value over some labels; the second argument is the value of `all()`.
pub type Meaning = fn(&Labels, bool) -> bool;

/// A pod or a network set.
pub struct Thing {
    pub labels: Labels,
    pub namespace: Option<String>,
    pub account: Option<String>,
    pub nets: Vec<IpNet>,
    pub ports: Vec<(String, u8, u16)>,
}

pub struct State {
    pub namespaces: BTreeMap<String, Labels>,
    pub accounts: BTreeMap<(String, String), Labels>,
    pub things: Vec<Thing>,
    pub tiers: Vec<Value>,
    pub policies: Vec<Value>,
    /// Of the service `front` of namespace `a`; 0 means neither protocol nor port.
    pub backends: Vec<Socket>,
    pub selectors: Vec<(String, Meaning)>,
}

pub struct Packet {
    pub addresses: [IpAddr; 2],
    pub protocol: u8,
    /// Of the source and of the destination.
    pub ports: [u16; 2],
    pub icmp: (u8, u8),
}

/// One clause read otherwise than the reference has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Misreading {
    /// A notSelector beside a positive part is evaluated on every object that contains the address.
    NotSelectorApart,
    /// The namespace of a namespaced policy does not limit a lone notSelector.
    LoneNotSelectorUnlimited,
    /// A port's name without a protocol is that of a TCP port.
    NamesOfTcp,
    /// A port's name beside a selection is looked up on every pod.
    NamesOfEveryPod,
    /// A negated port's name beside a selection is looked up on every pod.
    NotNamesOfEveryPod,
    /// Numbers in a list with names are for the pods that have one of the names.
    NumbersOfPodsOnly,
    /// `all()` in a namespaceSelector is everything.
    AllNamespacesIsAll,
    /// A namespaceSelector is ANDed with the namespace of a namespaced policy.
    NamespaceSelectorAdds,
    /// A rule of nets alone is limited to the namespace of a namespaced policy.
    NetsLimited,
    /// `services` at the source matches protocol and port.
    SourceServicesBySocket,
    /// A list of nets of the other family matches nothing, instead of switching the rule off: a negated one matches all.
    ForeignNotNetsMatch,
}

impl Misreading {
    pub const ALL: [Self; 11] = [
        Self::NotSelectorApart,
        Self::LoneNotSelectorUnlimited,
        Self::NamesOfTcp,
        Self::NamesOfEveryPod,
        Self::NotNamesOfEveryPod,
        Self::NumbersOfPodsOnly,
        Self::AllNamespacesIsAll,
        Self::NamespaceSelectorAdds,
        Self::NetsLimited,
        Self::SourceServicesBySocket,
        Self::ForeignNotNetsMatch,
    ];
}

/// The part of a rule that an address is matched with.
type Selector<'s> = Box<dyn Fn(&Thing) -> bool + 's>;

/// felix/calc/rule_scanner.go, `ParsedRule`: the conditions of an end, over sets.
#[derive(Default)]
struct End<'s> {
    nets: Vec<&'s str>,
    not_nets: Vec<&'s str>,
    ip_sets: Vec<Vec<IpNet>>,
    not_ip_sets: Vec<Vec<IpNet>>,
    ip_port_sets: Vec<Vec<Socket>>,
    ports: Vec<(u16, u16)>,
    named_port_sets: Vec<Vec<Socket>>,
    not_ports: Vec<(u16, u16)>,
    not_named_port_sets: Vec<Vec<Socket>>,
}

/// What decided.
pub enum Decision<'s> {
    Rule(&'s Value),
    EndOfTier(bool),
    Profile,
}

/// The reference, or the reference misread.
pub struct Reference<'s> {
    reading: Reading<'s>,
    /// By the address of the rule: source and destination.
    ends: HashMap<*const Value, [End<'s>; 2]>,
}

#[derive(Clone, Copy)]
struct Reading<'s> {
    state: &'s State,
    misreading: Option<Misreading>,
}

pub fn number(protocol: &Value) -> u8 {
    match protocol.as_str() {
        None => u8::try_from(protocol.as_u64().expect("a number")).expect("of a protocol"),
        Some("TCP") => 6,
        Some("UDP") => 17,
        Some("SCTP") => 132,
        Some("ICMP") => 1,
        Some("ICMPv6") => 58,
        Some(other) => panic!("{other}?"),
    }
}

impl<'s> Reading<'s> {
    fn misreads(&self, misreading: Misreading) -> bool {
        self.misreading == Some(misreading)
    }

    fn holds(&self, selector: &Value, labels: &Labels, all: bool) -> bool {
        let known = self.state.selectors.iter().find(|(known, _)| selector == known);
        known.expect("a known selector").1(labels, all)
    }

    /// A namespaceSelector, over the labels that a thing has of its namespace under `pcns.`: a thing without a namespace has
    /// none. updateprocessors/rules.go, `getEndpointSelector`: `all()` becomes "has a namespace", wherever it is written,
    /// and `global()` the opposite.
    fn namespace_selected(&self, selector: &Value, thing: &Thing) -> bool {
        let none = Labels::new();
        let labels = thing.namespace.as_ref().map_or(&none, |namespace| &self.state.namespaces[namespace]);
        match selector.as_str() {
            Some("global()") => thing.namespace.is_none(),
            _ => {
                let all = thing.namespace.is_some() || self.misreads(Misreading::AllNamespacesIsAll);
                self.holds(selector, labels, all)
            }
        }
    }

    /// A serviceAccountSelector, over the labels that a pod has of its account under `pcsa.` (updateprocessors/rules.go,
    /// `parseServiceAccounts`).
    fn account_selected(&self, selector: &Value, thing: &Thing) -> bool {
        let none = Labels::new();
        let key = thing.namespace.clone().zip(thing.account.clone());
        self.holds(selector, key.and_then(|key| self.state.accounts.get(&key)).unwrap_or(&none), true)
    }

    /// libcalico-go/lib/backend/syncersv1/updateprocessors/rules.go, `GetEntityRuleSelector` and `getEndpointSelector`: one
    /// selector of serviceAccounts and selector, with the namespaceSelector, or else the namespace of a namespaced policy as
    /// soon as one of selector, notSelector and serviceAccounts is there.
    fn positive(&self, entity: &'s Value, own: Option<&'s str>) -> Option<Selector<'s>> {
        let this = *self;
        let [selector, not_selector, namespaces] =
            ["selector", "notSelector", "namespaceSelector"].map(|name| entity.get(name));
        let accounts = entity.get("serviceAccounts");
        let nets = this.misreads(Misreading::NetsLimited) && !list(&entity["nets"]).is_empty();
        let lone = not_selector.is_some() && !this.misreads(Misreading::LoneNotSelectorUnlimited);
        let looks = selector.is_some() || lone || accounts.is_some() || nets;
        let own = own.filter(|_| looks && (namespaces.is_none() || this.misreads(Misreading::NamespaceSelectorAdds)));
        let given = selector.is_some() || accounts.is_some() || namespaces.is_some() || own.is_some();
        given.then(|| -> Selector<'s> {
            Box::new(move |thing| {
                namespaces.is_none_or(|selector| this.namespace_selected(selector, thing))
                    && own.is_none_or(|own| thing.namespace.as_deref() == Some(own))
                    && selector.is_none_or(|selector| this.holds(selector, &thing.labels, true))
                    && accounts.is_none_or(|accounts| {
                        let names = list(&accounts["names"]);
                        let named =
                            || thing.account.as_ref().is_some_and(|own| names.iter().any(|name| name == own.as_str()));
                        (names.is_empty() || named())
                            && accounts.get("selector").is_none_or(|selector| this.account_selected(selector, thing))
                    })
            })
        })
    }

    /// felix/calc/rule_scanner.go, `extractSelectors` and `combineMatchesIfPossible`: a negated selector beside a positive
    /// one is part of the positive one; alone it stays a selector of its own.
    fn selectors(&self, entity: &'s Value, own: Option<&'s str>) -> (Option<Selector<'s>>, Option<Selector<'s>>) {
        let this = *self;
        let negated = entity.get("notSelector");
        let negated = negated
            .map(|selector| -> Selector<'s> { Box::new(move |thing| this.holds(selector, &thing.labels, true)) });
        match (self.positive(entity, own), negated) {
            (Some(positive), Some(negated)) if !self.misreads(Misreading::NotSelectorApart) => {
                (Some(Box::new(move |thing| positive(thing) && !negated(thing))), None)
            }
            apart => apart,
        }
    }

    /// felix/labelindex/named_port_index.go, `CalculateEndpointContribution`: without a port's name a set has the nets of
    /// what the selector selects, pods and network sets alike.
    fn ip_set(&self, selector: &Selector<'s>) -> Vec<IpNet> {
        self.state.things.iter().filter(|thing| selector(thing)).flat_map(|thing| thing.nets.clone()).collect()
    }

    /// felix/calc/rule_scanner.go, `namedPortsToIPSets`, with felix/labelindex/named_port_index.go,
    /// `CalculateEndpointContribution` and `LookupNamedPorts`: for each name a set of sockets, of what the positive selector
    /// selects (without one, of all) and has such a port. A network set has no ports. The port is of the rule's protocol, or
    /// of whatever protocol where the rule has none (felix/labelindex/ipsetmember/ipset_port_protocol.go, `ProtocolAny`);
    /// the socket keeps the protocol of the container port.
    fn named_port_sets(
        &self,
        names: &[&str],
        positive: Option<&Selector<'s>>,
        protocol: Option<u8>,
    ) -> Vec<Vec<Socket>> {
        let protocol = protocol.or(self.misreads(Misreading::NamesOfTcp).then_some(6));
        let set = |name: &&str| {
            let things = self.state.things.iter().filter(|thing| positive.is_none_or(|positive| positive(thing)));
            let ports = things.flat_map(|thing| thing.ports.iter().map(move |port| (thing, port)));
            let named = ports.filter(|(_, port)| port.0 == *name && protocol.is_none_or(|wanted| port.1 == wanted));
            named.flat_map(|(thing, port)| thing.nets.iter().map(|net| (net.addr(), port.1, port.2))).collect()
        };
        names.iter().map(set).collect()
    }

    /// felix/calc/rule_scanner.go, `ruleToParsedRule`, for one end.
    fn end(&self, rule: &'s Value, name: &'s str, own: Option<&'s str>) -> End<'s> {
        let entity = &rule[name];
        let (positive, negated) = self.selectors(entity, own);
        // `splitNamedAndNumericPorts`.
        let split = |field: &str| {
            let is_name = |port: &&Value| port.as_str().is_some_and(|port| port.starts_with(char::is_alphabetic));
            let (names, numbers): (Vec<&Value>, Vec<&Value>) = list(&entity[field]).iter().partition(is_name);
            let range = |port: &Value| match port.as_str().map(|port| port.split_once(':').expect("a range")) {
                Some((first, last)) => (first.parse().expect("port"), last.parse().expect("port")),
                None => [(); 2].map(|()| port.as_u64().and_then(|it| u16::try_from(it).ok()).expect("port")).into(),
            };
            (names.into_iter().map(text).collect::<Vec<&str>>(), numbers.into_iter().map(range).collect::<Vec<_>>())
        };
        let ((names, ports), (not_names, not_ports)) = (split("ports"), split("notPorts"));
        let protocol = rule.get("protocol").map(number);
        let of = |misreading| if self.misreads(misreading) { None } else { positive.as_ref() };
        let mut end = End {
            nets: list(&entity["nets"]).iter().map(text).collect(),
            not_nets: list(&entity["notNets"]).iter().map(text).collect(),
            named_port_sets: self.named_port_sets(&names, of(Misreading::NamesOfEveryPod), protocol),
            not_named_port_sets: self.named_port_sets(&not_names, of(Misreading::NotNamesOfEveryPod), protocol),
            not_ip_sets: negated.iter().map(|negated| self.ip_set(negated)).collect(),
            ..End::default()
        };
        // The selector's own set is left out where all ports are names: those sets are limited to it already.
        if !ports.is_empty() || names.is_empty() || self.misreads(Misreading::NamesOfEveryPod) {
            end.ip_sets = positive.iter().map(|positive| self.ip_set(positive)).collect();
        }
        if self.misreads(Misreading::NumbersOfPodsOnly) && !ports.is_empty() && !names.is_empty() {
            end.ip_sets.extend(end.named_port_sets.iter().map(|set| set.iter().map(|it| it.0.into()).collect()));
        }
        // Of a service: sockets at the destination, addresses at the source.
        if entity.get("services").is_some() {
            if name == "destination" || self.misreads(Misreading::SourceServicesBySocket) {
                end.ip_port_sets.push(self.state.backends.clone());
            } else {
                end.ip_sets.push(self.state.backends.iter().map(|it| it.0.into()).collect());
            }
        }
        (end.ports, end.not_ports) = (ports, not_ports);
        end
    }

    fn rule_matches(&self, rule: &Value, ends: &[End<'_>; 2], packet: &Packet) -> bool {
        let given = |name: &str| rule.get(name);
        let v4 = packet.addresses[0].is_ipv4();
        // felix/calc/rule_convert.go, `ipVersionToProtoIPVersion`: without a version the name of a protocol, never its
        // number, decides; a negated protocol does not.
        let named = given("protocol").and_then(|protocol| match protocol.as_str() {
            Some("ICMP") => Some(4),
            Some("ICMPv6") => Some(6),
            _ => None,
        });
        let version = given("ipVersion").and_then(Value::as_u64).or(named);
        // felix/rules/policy.go, `FilterRuleToIPVersion` and `filterNets`: a rule of the other version, or with a list of
        // which nothing is of this one, is not there; a negated list that has all addresses switches it off, too.
        if version.is_some_and(|version| (version == 4) != v4) {
            return false;
        }
        let gone = |nets: &[&str]| !nets.is_empty() && nets.iter().all(|net| net.contains(':') == v4);
        let gone_not = |nets: &[&str]| gone(nets) && !self.misreads(Misreading::ForeignNotNetsMatch);
        if ends.iter().any(|end| gone(&end.nets) || gone_not(&end.not_nets)) {
            return false;
        }
        // felix/rules/policy.go, `CalculateRuleMatch`: the protocol, then each end, then type and code, of the table's own
        // version of ICMP.
        let has_icmp = |wanted: &Value| {
            packet.protocol == if v4 { 1 } else { 58 }
                && wanted["type"] == packet.icmp.0
                && wanted.get("code").is_none_or(|code| *code == packet.icmp.1)
        };
        given("protocol").is_none_or(|it| number(it) == packet.protocol)
            && given("notProtocol").is_none_or(|it| number(it) != packet.protocol)
            && given("icmp").is_none_or(has_icmp)
            && !given("notICMP").is_some_and(has_icmp)
            && (0..2).all(|at| end_matches(&ends[at], packet.addresses[at], packet.protocol, packet.ports[at]))
    }

    /// updateprocessors/networkpolicyprocessor.go and globalnetworkpolicyprocessor.go: the selector of a policy.
    fn applies(&self, policy: &Value, pod: &Thing, ingress: bool) -> bool {
        let (spec, namespace) = (&policy["spec"], policy["metadata"]["namespace"].as_str());
        let rules = |name: &str| !list(&spec[name]).is_empty();
        // libcalico-go/lib/clientv3/globalnetworkpolicy.go, `defaultPolicyTypesField`, when a policy is written.
        let of_direction = match list(&spec["types"]) {
            [] if ingress => rules("ingress") || !rules("egress"),
            [] => rules("egress"),
            types => types.iter().any(|name| name == if ingress { "Ingress" } else { "Egress" }),
        };
        of_direction
            && namespace.is_none_or(|namespace| pod.namespace.as_deref() == Some(namespace))
            && spec.get("selector").is_none_or(|selector| self.holds(selector, &pod.labels, true))
            && spec.get("namespaceSelector").is_none_or(|selector| self.namespace_selected(selector, pod))
            && spec.get("serviceAccountSelector").is_none_or(|selector| self.account_selected(selector, pod))
    }

    fn tier(&self, name: &str) -> Option<&'s Value> {
        self.state.tiers.iter().find(|tier| tier["metadata"]["name"] == name)
    }
}

impl<'s> Reference<'s> {
    pub fn new(state: &'s State, misreading: Option<Misreading>) -> Self {
        let reading = Reading { state, misreading };
        let mut ends = HashMap::new();
        for policy in &state.policies {
            let own = policy["metadata"]["namespace"].as_str();
            for rule in ["ingress", "egress"].iter().flat_map(|section| list(&policy["spec"][section])) {
                let both = ["source", "destination"].map(|name| reading.end(rule, name, own));
                ends.insert(std::ptr::from_ref(rule), both);
            }
        }
        Self { reading, ends }
    }

    /// Both directions; a pod reaches itself, which never leaves it.
    pub fn verdict(&self, packet: &Packet, decided: &mut impl FnMut(Decision<'s>)) -> bool {
        let owner = |at: usize| self.pod(packet.addresses[at]).map(std::ptr::from_ref);
        owner(0).is_some() && owner(0) == owner(1)
            || self.direction(packet, false, decided) && self.direction(packet, true, decided)
    }

    fn pod(&self, address: IpAddr) -> Option<&'s Thing> {
        let pods = self.reading.state.things.iter().filter(|thing| thing.account.is_some());
        pods.into_iter().find(|pod| pod.nets.contains(&IpNet::from(address)))
    }

    /// felix/rules/endpoints.go, `endpointIptablesChain`: tier by tier, of those that have a policy for the pod in this
    /// direction; an allow returns, a pass goes to the next tier, the end of a tier is its default action. After the tiers
    /// the profiles allow.
    fn direction(&self, packet: &Packet, ingress: bool, decided: &mut impl FnMut(Decision<'s>)) -> bool {
        let Self { reading, ends } = self;
        let Some(pod) = self.pod(packet.addresses[usize::from(ingress)]) else { return true };
        let section = if ingress { "ingress" } else { "egress" };
        // felix/calc/policy_sorter.go, `TierLess`: tiers with an object first, by order, absent last, then by name.
        let mut by_tier: BTreeMap<(bool, u64, &str), Vec<&Value>> = BTreeMap::new();
        for policy in reading.state.policies.iter().filter(|policy| reading.applies(policy, pod, ingress)) {
            let name = policy["spec"]["tier"].as_str().unwrap_or("default");
            let order = match (reading.tier(name), name) {
                (Some(tier), _) => tier["spec"]["order"].as_u64().unwrap_or(u64::MAX),
                (None, "default") => 1_000_000,
                (None, _) => u64::MAX,
            };
            by_tier.entry((reading.tier(name).is_none() && name != "default", order, name)).or_default().push(policy);
        }
        'tiers: for ((.., name), mut policies) in by_tier {
            // felix/calc/policy_sorter.go, `PolKVLess`: by order, absent last, then by name, namespace and kind.
            policies.sort_by_key(|policy| {
                let namespace = policy["metadata"]["namespace"].as_str().unwrap_or_default();
                let tie = format!("{}/{namespace}/{}", text(&policy["metadata"]["name"]), text(&policy["kind"]));
                (policy["spec"]["order"].as_u64().unwrap_or(u64::MAX), tie)
            });
            for policy in policies {
                for rule in list(&policy["spec"][section]) {
                    if !reading.rule_matches(rule, &ends[&std::ptr::from_ref(rule)], packet) {
                        continue;
                    }
                    decided(Decision::Rule(rule));
                    match text(&rule["action"]) {
                        "Allow" => return true,
                        "Deny" => return false,
                        "Pass" => continue 'tiers,
                        _ => {}
                    }
                }
            }
            let denies = reading.tier(name).is_none_or(|tier| tier["spec"]["defaultAction"] == "Deny");
            decided(Decision::EndOfTier(denies));
            if denies {
                return false;
            }
        }
        decided(Decision::Profile);
        true
    }
}

/// felix/rules/policy.go, `CalculateRuleMatch` and `AppendPortMatchBlock`: numbers and names of a list are alternatives, all
/// else must be true.
fn end_matches(end: &End<'_>, address: IpAddr, protocol: u8, port: u16) -> bool {
    let within = |nets: &[&str]| nets.iter().any(|net| net.parse::<IpNet>().expect("net").contains(&address));
    let in_set = |set: &Vec<IpNet>| set.iter().any(|net| net.contains(&address));
    let has_ports = matches!(protocol, 6 | 17 | 132);
    let in_ranges =
        |ranges: &[(u16, u16)]| has_ports && ranges.iter().any(|(first, last)| (first..=last).contains(&&port));
    let in_sockets = |set: &Vec<Socket>| has_ports && set.contains(&(address, protocol, port));
    let any_port = end.ports.is_empty() && end.named_port_sets.is_empty();
    (end.nets.is_empty() || within(&end.nets))
        && end.ip_sets.iter().all(in_set)
        && end.ip_port_sets.iter().all(in_sockets)
        && (any_port || in_ranges(&end.ports) || end.named_port_sets.iter().any(in_sockets))
        && !within(&end.not_nets)
        && !end.not_ip_sets.iter().any(in_set)
        && !in_ranges(&end.not_ports)
        && !end.not_named_port_sets.iter().any(in_sockets)
}
