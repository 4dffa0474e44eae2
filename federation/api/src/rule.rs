//! Rules as Calico v3 writes them, which `hanse.dev` shares: validation and conversion.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::model::{
    Action, ClusterScope, EntityMatch, HttpMatch, HttpPath, Icmp, IpVersion, Port, Protocol, Rule, Selection,
    ServiceMatch,
};
use hanse_policy::selector::build;
use hanse_policy::selector::{Expr, Selector};
use ipnet::IpNet;

use crate::decode::IntOrString;
use crate::field::{Errors, Path};
use crate::label_selector::written_peer;
use crate::metadata::check_annotations;
use crate::names::{NAME_RULE, is_subdomain, port_name_error};

mod spec;

pub use crate::limits::*;
pub use spec::*;

/// Whose rules are converted.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Of a namespaced policy: rules with a selector look only there, unless they have a namespaceSelector.
    pub namespace: Option<&'a str>,
    /// Resolves a cluster selector, or its absence, to clusters.
    pub clusters: &'a dyn Fn(Option<&Selector>) -> ClusterScope,
    /// Whether `clusterSelector` is a field of this kind.
    pub federated: bool,
}

/// Of which direction rules are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RulesOf {
    Ingress,
    Egress,
}

impl std::fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// The rules of one direction.
pub fn convert_rules(
    rules: &[RuleSpec],
    of: RulesOf,
    context: Context<'_>,
    path: &Path<'_>,
    errors: &mut Errors,
) -> Vec<Rule> {
    if rules.len() > MAX_RULES {
        errors.refuse(path, format!("has {} rules; {MAX_RULES} are allowed", rules.len()));
    }
    for (index, rule) in rules.iter().enumerate() {
        check_direction(rule, of, &path.index(index), errors);
    }
    let indexed = rules.iter().enumerate();
    let converted = indexed.filter_map(|(index, rule)| {
        let path = path.index(index);
        match errors.is_stored() {
            true => convert_stored_rule(index, rule, context, &path),
            false => convert_rule(index, rule, context, &path, errors),
        }
    });
    converted.collect()
}

/// Services and HTTP go with one direction each: services are the peer, and requests are judged where they arrive.
fn check_direction(rule: &RuleSpec, of: RulesOf, path: &Path<'_>, errors: &mut Errors) {
    let (own_end, name) = match of {
        RulesOf::Ingress => (&rule.destination, "destination"),
        RulesOf::Egress => (&rule.source, "source"),
    };
    if own_end.services.is_some() {
        let path = path.field(name);
        errors.refuse(
            &path.field("services"),
            format!("selects the peer, and is not allowed in the {name} of {of:?} rules"),
        );
    }
    if of == RulesOf::Egress && rule.http.is_some() {
        errors.refuse(&path.field("http"), "is for ingress rules only");
    }
}

/// What has no meaning in a stored rule makes that rule unknown, and takes nothing else of the policy out of force.
fn convert_stored_rule(index: usize, rule: &RuleSpec, context: Context<'_>, path: &Path<'_>) -> Option<Rule> {
    let mut errors = Errors::of_stored();
    let mut rule = convert_rule(index, rule, context, path, &mut errors)?;
    rule.not_understood = errors.0.first().map(|error| error.to_string().into());
    Some(rule)
}

const ACTIONS: [(&str, Action); 4] =
    [("Allow", Action::Allow), ("Deny", Action::Deny), ("Pass", Action::Pass), ("Log", Action::Log)];

/// Calico's dataplanes read a stored action in any case, and an empty one as Allow; one that they do not know is taken
/// for Deny.
fn convert_action(text: &str, path: &Path<'_>, errors: &mut Errors) -> Option<Action> {
    let is = |name: &str| if errors.is_stored() { text.eq_ignore_ascii_case(name) } else { text == name };
    match ACTIONS.iter().find(|(name, _)| is(name)) {
        Some((_, action)) => return Some(*action),
        None if text.is_empty() && errors.is_stored() => return Some(Action::Allow),
        None if text.is_empty() => errors.add(path, "is missing: Allow, Deny, Pass or Log"),
        None => errors.add(path, format!("\"{text}\" is not one of Allow, Deny, Pass, Log")),
    }
    errors.is_stored().then_some(Action::Deny)
}

fn convert_rule(
    index: usize,
    rule: &RuleSpec,
    context: Context<'_>,
    path: &Path<'_>,
    errors: &mut Errors,
) -> Option<Rule> {
    let action = convert_action(&rule.action, &path.field("action"), errors);
    let ip_version = match rule.ip_version {
        None => None,
        Some(4) => Some(IpVersion::V4),
        Some(6) => Some(IpVersion::V6),
        Some(other) => {
            errors.add(&path.field("ipVersion"), format!("{other} is neither 4 nor 6"));
            None
        }
    };
    let mut protocol_of = |spec: &Option<IntOrString>, name: &'static str| {
        let spec = spec.as_ref()?;
        let converted = convert_protocol(spec, errors.is_stored());
        errors.note(&path.field(name), converted)
    };
    let protocol = protocol_of(&rule.protocol, "protocol");
    let not_protocol = protocol_of(&rule.not_protocol, "notProtocol");
    let icmp = rule.icmp.and_then(|icmp| convert_icmp(icmp, &path.field("icmp"), errors));
    let not_icmp = rule.not_icmp.and_then(|icmp| convert_icmp(icmp, &path.field("notICMP"), errors));
    let stored = errors.is_stored();
    let is_icmp = |spec: &Option<IntOrString>| is_protocol(spec, "ICMP", 1, stored);
    let is_icmpv6 = |spec: &Option<IntOrString>| is_protocol(spec, "ICMPv6", 58, stored);
    let of_v4 = is_icmp(&rule.protocol) || is_icmp(&rule.not_protocol);
    let of_v6 = is_icmpv6(&rule.protocol) || is_icmpv6(&rule.not_protocol);
    if of_v4 && ip_version == Some(IpVersion::V6) || of_v6 && ip_version == Some(IpVersion::V4) {
        errors.refuse(&path.field("ipVersion"), "contradicts the IP version of the protocol");
    }
    if rule.icmp.is_some() && !is_icmp(&rule.protocol) && !is_icmpv6(&rule.protocol) {
        errors.add(&path.field("icmp"), "needs the protocol ICMP or ICMPv6");
    }
    if let Some(metadata) = rule.metadata.as_ref().filter(|_| !stored && !errors.has_accepted_metadata()) {
        let path = path.field("metadata");
        check_annotations(&metadata.annotations, &path.field("annotations"), errors);
    }
    let mut source = convert_entity(&rule.source, context, &path.field("source"), false, errors);
    let mut destination = convert_entity(&rule.destination, context, &path.field("destination"), true, errors);
    check_families(ip_version, &source, &destination, path, errors);
    check_ports(rule, protocol, [&mut source, &mut destination], path, errors);
    let http = rule.http.as_ref().and_then(|http| {
        let path = path.field("http");
        if action.is_some_and(|action| action != Action::Allow) {
            errors.refuse(&path, "requires the action Allow");
        }
        if rule.protocol.is_some() && !is_protocol(&rule.protocol, "TCP", 6, stored) {
            errors.refuse(&path, "requires the protocol TCP");
        }
        convert_http(http, &path, errors)
    });
    Some(Rule {
        action: action?,
        index: u32::try_from(index).unwrap_or(u32::MAX),
        ip_version,
        protocol,
        not_protocol,
        icmp,
        not_icmp,
        source,
        destination,
        http,
        not_understood: None,
    })
}

/// Whether a protocol is written so. A number in quotes is neither to Calico's schema.
fn is_protocol(spec: &Option<IntOrString>, name: &str, number: i64, stored: bool) -> bool {
    match spec {
        Some(IntOrString::Int(value)) => *value == number,
        Some(IntOrString::String(text)) if stored => {
            text.eq_ignore_ascii_case(name) || text.parse::<i64>().is_ok_and(|value| value == number)
        }
        Some(IntOrString::String(text)) => text == name,
        None => false,
    }
}

const PROTOCOLS: [(&str, Protocol); 6] = [
    ("TCP", Protocol::Tcp),
    ("UDP", Protocol::Udp),
    ("ICMP", Protocol::Icmp),
    ("ICMPv6", Protocol::IcmpV6),
    ("SCTP", Protocol::Sctp),
    ("UDPLite", Protocol::UdpLite),
];

/// By name or by number, 1 to 255. A stored name counts in any case.
fn convert_protocol(spec: &IntOrString, stored: bool) -> Result<Protocol, String> {
    let number = |number: i64| match u8::try_from(number) {
        Ok(number) if number > 0 => Ok(Protocol::Number(number)),
        _ => Err(format!("{number} is not between 1 and 255")),
    };
    let text = match spec {
        IntOrString::Int(value) => return number(*value),
        IntOrString::String(text) => text,
    };
    let is = |name: &str| if stored { text.eq_ignore_ascii_case(name) } else { text == name };
    if let Some((_, protocol)) = PROTOCOLS.iter().find(|(name, _)| is(name)) {
        return Ok(*protocol);
    }
    match text.parse::<i64>() {
        Ok(value) if text.bytes().all(|byte| byte.is_ascii_digit()) => number(value),
        _ => Err(format!("\"{text}\" is not one of TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or 1 to 255")),
    }
}

fn convert_icmp(icmp: IcmpSpec, path: &Path<'_>, errors: &mut Errors) -> Option<Icmp> {
    let mut part = |value: Option<i64>, name: &'static str, last: u8| {
        let value = value?;
        let number = u8::try_from(value).ok().filter(|number| *number <= last);
        if number.is_none() {
            errors.add(&path.field(name), format!("{value} is not between 0 and {last}"));
        }
        number
    };
    let (kind, code) = (part(icmp.kind, "type", 254), part(icmp.code, "code", 255));
    if icmp.kind.is_none() && icmp.code.is_some() {
        errors.refuse(&path.field("code"), "needs type beside it");
    }
    Some(Icmp { kind, code: code.filter(|_| kind.is_some()) })
}

/// The fields that say which pods a policy is for; `all()` of none.
pub fn written_subject<const N: usize>(fields: [(&str, &str); N]) -> String {
    let fields = written(&fields);
    if fields.is_empty() { "all()".to_owned() } else { fields }
}

/// The fields of an end of a rule that select pods and sets.
fn written_end(entity: &EntitySpec, path: &Path<'_>) -> String {
    let accounts = entity.service_accounts.as_ref();
    let names = accounts.map(|accounts| accounts.names.join(", ")).filter(|names| !names.is_empty());
    let names = names.map_or_else(String::new, |names| format!("[{names}]"));
    let accounts = written(&[("names", &names), ("selector", accounts.map_or("", |accounts| &accounts.selector))]);
    let accounts = if accounts.is_empty() { accounts } else { format!("{{{accounts}}}") };
    let fields = written(&[
        ("clusterSelector", entity.cluster_selector.as_deref().unwrap_or_default()),
        ("namespaceSelector", &entity.namespace_selector),
        ("serviceAccounts", &accounts),
        ("selector", &entity.selector),
        ("notSelector", &entity.not_selector),
    ]);
    written_peer(path, &format!("{{{fields}}}"))
}

/// Those fields that are given.
fn written(fields: &[(&str, &str)]) -> String {
    let given = fields.iter().filter(|(_, text)| !text.is_empty());
    given.map(|(name, text)| format!("{name}: {text}")).collect::<Vec<_>>().join(", ")
}

fn convert_entity(
    entity: &EntitySpec,
    context: Context<'_>,
    path: &Path<'_>,
    is_destination: bool,
    errors: &mut Errors,
) -> EntityMatch {
    let selector = note_selector(&entity.selector, &path.field("selector"), errors);
    refuse_global(&entity.selector, &path.field("selector"), errors);
    let not_selector = note_selector(&entity.not_selector, &path.field("notSelector"), errors);
    let namespaces = note_selector(&entity.namespace_selector, &path.field("namespaceSelector"), errors);
    if entity.namespace_selector.contains("global(") && !is_global_alone(&entity.namespace_selector) {
        errors.refuse(&path.field("namespaceSelector"), "global() is not allowed beside anything else");
    }
    let accounts = entity.service_accounts.as_ref();
    let accounts = accounts.filter(|accounts| !accounts.names.is_empty() || !accounts.selector.is_empty());
    let accounts = accounts.map(|accounts| {
        let path = path.field("serviceAccounts");
        // The one selector of a rule that Calico's schema does not bound.
        let given = Some(&accounts.selector).filter(|text| !text.is_empty());
        let selector = given.and_then(|text| errors.note(&path.field("selector"), parse_unbounded(text)));
        let names = accounts.names.iter().map(String::as_str);
        let names = if accounts.names.is_empty() { Expr::All } else { build::service_accounts(names) };
        build::all_of([names, selector.map_or(Expr::All, |selector| build::with_service_account(&selector.expr))])
    });
    if entity.cluster_selector.is_some() && !context.federated {
        errors.add(&path.field("clusterSelector"), "is a field of FederatedNetworkPolicy only");
    }
    let cluster_path = path.field("clusterSelector");
    let cluster_selector =
        entity.cluster_selector.as_ref().and_then(|text| errors.note(&cluster_path, parse_selector(text)));
    let clusters = (context.clusters)(cluster_selector.as_ref());

    let looks_at_labels = selector.is_some() || not_selector.is_some() || accounts.is_some();
    let namespace_scope = match (&namespaces, context.namespace) {
        (Some(selector), _) => Some(build::in_namespaces(&selector.expr)),
        (None, Some(namespace)) if looks_at_labels => Some(build::in_namespace(namespace)),
        _ => None,
    };
    // A lone clusterSelector means whatever those clusters own.
    let selected = selector.is_some() || accounts.is_some() || namespace_scope.is_some() || cluster_selector.is_some();
    let (selection, not_selection) = if selected {
        // One object, pod or set, must meet the positive parts and not the negated one.
        let own = selector.map(|selector| selector.expr);
        let unwanted = not_selector.map(|selector| build::not(selector.expr));
        let parts = [namespace_scope, accounts, own, unwanted].into_iter().flatten();
        let selector = Selector::from(build::all_of(parts)).with_written(written_end(entity, path));
        (Some(Selection { clusters, selector }), None)
    } else {
        let unwanted = not_selector.map(|selector| selector.with_written(written_end(entity, path)));
        (None, unwanted.map(|selector| Selection { clusters, selector }))
    };
    let service = entity
        .services
        .as_ref()
        .and_then(|service| convert_service(service, entity, context, &path.field("services"), is_destination, errors));
    EntityMatch {
        nets: convert_nets(&entity.nets, &path.field("nets"), errors),
        not_nets: convert_not_nets(&entity.not_nets, &path.field("notNets"), errors),
        selection,
        not_selection,
        ports: convert_port_list(&entity.ports, &path.field("ports"), errors),
        not_ports: convert_port_list(&entity.not_ports, &path.field("notPorts"), errors),
        service,
    }
}

fn convert_service(
    service: &ServiceSpec,
    entity: &EntitySpec,
    context: Context<'_>,
    path: &Path<'_>,
    is_destination: bool,
    errors: &mut Errors,
) -> Option<ServiceMatch> {
    let others = [
        (!entity.selector.is_empty(), "selector"),
        (!entity.not_selector.is_empty(), "notSelector"),
        (!entity.namespace_selector.is_empty(), "namespaceSelector"),
        (entity.service_accounts.is_some(), "serviceAccounts"),
        (!entity.nets.is_empty(), "nets"),
        (!entity.not_nets.is_empty(), "notNets"),
        (is_destination && !entity.ports.is_empty(), "ports"),
        (is_destination && !entity.not_ports.is_empty(), "notPorts"),
    ];
    for (_, name) in others.into_iter().filter(|(given, _)| *given) {
        errors.refuse(path, format!("is not allowed beside {name}"));
    }
    if entity.cluster_selector.is_some() {
        errors.add(
            path,
            "is not allowed beside clusterSelector: it is a Service of the cluster that enforces the policy",
        );
    }
    if service.name.is_empty() {
        errors.add(&path.field("name"), "is missing");
        return None;
    }
    for (text, name) in [(&service.name, "name"), (&service.namespace, "namespace")] {
        if !text.is_empty() && !is_subdomain(text) {
            errors.refuse(&path.field(name), format!("\"{text}\" is not a name: {NAME_RULE}"));
        }
    }
    let namespace: Arc<str> = match (service.namespace.as_str(), context.namespace) {
        ("", Some(own)) => own.into(),
        ("", None) => {
            errors.add(&path.field("namespace"), "is missing: this policy has no namespace of its own");
            return None;
        }
        (given, _) => given.into(),
    };
    Some(ServiceMatch { namespace, name: service.name.as_str().into() })
}

/// `None`: not given. The length of a stored selector is that of its object.
pub fn note_selector(text: &str, path: &Path<'_>, errors: &mut Errors) -> Option<Selector> {
    if text.is_empty() {
        return None;
    }
    let parsed = if errors.is_stored() { parse_unbounded(text) } else { parse_selector(text) };
    errors.note(path, parsed)
}

/// A selector of a policy, bounded.
pub fn parse_selector(text: &str) -> Result<Selector, String> {
    if text.chars().count() > MAX_SELECTOR_CHARACTERS {
        return Err(format!("longer than {MAX_SELECTOR_CHARACTERS} characters"));
    }
    parse_unbounded(text)
}

fn parse_unbounded(text: &str) -> Result<Selector, String> {
    let selector = Selector::parse(text);
    let selector = selector.map_err(|error| format!("\"{}\" is not a selector: {error}", error.excerpt(text).0))?;
    Ok(if text.contains("//") { Selector::from(build::of_author(selector.expr)) } else { selector })
}

/// Whether a selector is `global()` and nothing else, not even parentheses: by the text, as Calico looks for it.
fn is_global_alone(text: &str) -> bool {
    let blank = [' ', '\t'];
    let inside = text.trim_matches(blank).strip_prefix("global(").and_then(|rest| rest.strip_suffix(')'));
    inside.is_some_and(|inside| inside.trim_matches(blank).is_empty())
}

/// Lists that Calico's schema calls sets have no duplicates, as written.
pub fn refuse_duplicates(texts: &[String], path: &Path<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (index, text) in texts.iter().enumerate().filter(|(_, text)| !seen.insert(*text)) {
        errors.refuse(&path.index(index), format!("duplicate of \"{text}\""));
    }
}

/// `global()` is for the namespaceSelector of a rule. By the text, as Calico looks for it.
pub fn refuse_global(text: &str, path: &Path<'_>, errors: &mut Errors) {
    if text.contains("global(") {
        errors.refuse(path, "global() is for the namespaceSelector of a rule only");
    }
}

/// Nets of a rule: with a prefix length, and without host bits. In a stored rule either may be otherwise.
fn convert_nets(texts: &[String], path: &Path<'_>, errors: &mut Errors) -> Vec<IpNet> {
    if texts.len() > MAX_NETS {
        errors.refuse(path, format!("has {} nets; {MAX_NETS} are allowed", texts.len()));
    }
    refuse_duplicates(texts, path, errors);
    let parsed = texts.iter().enumerate().filter_map(|(index, text)| {
        let path = path.index(index);
        if !text.contains('/') && errors.is_stored() {
            return errors.note(&path, parse_set_net(text));
        }
        let (net, has_host_bits) = errors.note(&path, parse_cidr(text))?;
        if has_host_bits {
            errors.refuse(&path, format!("\"{text}\" has bits beyond its prefix; did you mean {net}?"));
        }
        Some(net)
    });
    parsed.collect()
}

/// A CIDR as Calico reads it, without its host bits, and whether it had any. The prefix may have leading zeros; IPv4 that
/// is mapped into IPv6 is IPv4 where all of the net is.
fn parse_cidr(text: &str) -> Result<(IpNet, bool), String> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let is_number = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let prefix: u8 = is_number.then(|| prefix.parse().ok())??;
        let net = IpNet::new(address, prefix).ok()?;
        let has_host_bits = net.trunc().addr() != address;
        let net = match (address.to_canonical(), prefix.checked_sub(96)) {
            (mapped @ IpAddr::V4(_), Some(prefix)) if address.is_ipv6() => IpNet::new(mapped, prefix).ok()?,
            _ => net,
        };
        Some((net.trunc(), has_host_bits))
    };
    parse().ok_or_else(|| format!("\"{text}\" is not a CIDR, such as 10.9.8.0/24 or 2001:db8::/64"))
}

/// The same; all of a family may not be excluded, for the rule would match nothing. Calico looks for it in IPv4 by the
/// text.
fn convert_not_nets(texts: &[String], path: &Path<'_>, errors: &mut Errors) -> Vec<IpNet> {
    for (index, text) in texts.iter().enumerate() {
        let is_v6 = |net: IpNet| matches!(net, IpNet::V6(_));
        if text == "0.0.0.0/0" || parse_cidr(text).is_ok_and(|(net, bits)| net.prefix_len() == 0 && !bits && is_v6(net))
        {
            errors.refuse(
                &path.index(index),
                format!("\"{text}\" excludes every address, so that the rule matches nothing"),
            );
        }
    }
    convert_nets(texts, path, errors)
}

/// Nets of a network set: host bits are masked, and a bare address is one address. In a stored set an
/// invalid net is ignored.
pub fn convert_set(texts: &[String], path: &Path<'_>, errors: &mut Errors) -> Vec<IpNet> {
    if texts.len() > MAX_SET_NETS {
        errors.refuse(path, format!("has {} nets; {MAX_SET_NETS} are allowed", texts.len()));
    }
    refuse_duplicates(texts, path, errors);
    let mut nets = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        if text.chars().count() > MAX_SET_NET_CHARACTERS {
            errors.refuse(&path.index(index), format!("longer than {MAX_SET_NET_CHARACTERS} characters"));
        }
        match parse_set_net(text) {
            Ok(net) => nets.push(net),
            Err(error) => errors.refuse(&path.index(index), error),
        }
    }
    nets
}

fn parse_set_net(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.to_canonical().into()),
        Err(_) => parse_cidr(text).map(|(net, _)| net),
    }
}

fn convert_port_list(specs: &[IntOrString], path: &Path<'_>, errors: &mut Errors) -> Vec<Port> {
    if specs.len() > MAX_PORTS {
        errors.refuse(path, format!("has {} ports; {MAX_PORTS} are allowed", specs.len()));
    }
    let ports = specs.iter().enumerate();
    let stored = errors.is_stored();
    ports.filter_map(|(index, spec)| errors.note(&path.index(index), convert_port(spec, stored))).collect()
}

/// A number, `first:last`, or a name: a port's of a container, or in a stored rule what once passed for one.
fn convert_port(spec: &IntOrString, stored: bool) -> Result<Port, String> {
    let number = |value: i64| match u16::try_from(value) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{value} is not a port (1–65535)")),
    };
    let text = match spec {
        IntOrString::Int(value) => return number(*value).map(|port| Port::Range(port, port)),
        IntOrString::String(text) => text,
    };
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let parse =
        |part: &str| part.parse::<i64>().map_err(|_| format!("{part} is not a port (1–65535)")).and_then(number);
    if digits(text) {
        return parse(text).map(|port| Port::Range(port, port));
    }
    if let Some((first, last)) = text.split_once(':')
        && digits(first)
        && digits(last)
    {
        let (first, last) = (parse(first)?, parse(last)?);
        return match first <= last {
            true => Ok(Port::Range(first, last)),
            false => Err(format!("the range {first}:{last} ends before it starts")),
        };
    }
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let once_valid = (1..=MAX_STORED_PORT_NAME_BYTES).contains(&text.len()) && text.bytes().all(inside);
    match port_name_error(text) {
        Some(why) if !(stored && once_valid) => {
            Err(format!("\"{text}\" is not a port: use a number, first:last, or a name ({why})"))
        }
        _ => Ok(Port::Named(text.as_str().into())),
    }
}

/// All nets of a rule are of one family, the rule's own where it names one.
fn check_families(
    ip_version: Option<IpVersion>,
    source: &EntityMatch,
    destination: &EntityMatch,
    path: &Path<'_>,
    errors: &mut Errors,
) {
    let nets = [&source.nets, &source.not_nets, &destination.nets, &destination.not_nets];
    let has = |v4: bool| nets.into_iter().flatten().any(|net| matches!(net, IpNet::V4(_)) == v4);
    let (v4, v6) = (has(true), has(false));
    if v4 && v6 {
        errors.refuse(path, "has both IPv4 and IPv6 nets; split it into two rules");
    }
    if (v4 && ip_version == Some(IpVersion::V6)) || (v6 && ip_version == Some(IpVersion::V4)) {
        errors.refuse(&path.field("ipVersion"), "contradicts the IP version of the nets");
    }
}

/// Numbers need a protocol that has ports; names alone carry theirs. Ports that have no meaning are left out.
fn check_ports(
    rule: &RuleSpec,
    protocol: Option<Protocol>,
    ends: [&mut EntityMatch; 2],
    path: &Path<'_>,
    errors: &mut Errors,
) {
    let has_ports = protocol.is_some_and(|protocol| matches!(protocol.number(), 6 | 17 | 132));
    for (entity, end) in ends.into_iter().zip(["source", "destination"]) {
        for (ports, name) in [(&mut entity.ports, "ports"), (&mut entity.not_ports, "notPorts")] {
            let all_named = ports.iter().all(|port| matches!(port, Port::Named(_)));
            let fine = ports.is_empty() || has_ports || (rule.protocol.is_none() && all_named);
            if !fine {
                let end_path = path.field(end);
                errors.add(&end_path.field(name), "needs the protocol TCP, UDP or SCTP");
                ports.clear();
            }
        }
    }
}

fn convert_http(http: &HttpSpec, path: &Path<'_>, errors: &mut Errors) -> Option<HttpMatch> {
    let methods_path = path.field("methods");
    if http.methods.len() > MAX_HTTP_METHODS {
        errors.refuse(&methods_path, format!("has {} methods; {MAX_HTTP_METHODS} are allowed", http.methods.len()));
    }
    refuse_duplicates(&http.methods, &methods_path, errors);
    let paths_path = path.field("paths");
    if http.paths.len() > MAX_HTTP_PATHS {
        errors.refuse(&paths_path, format!("has {} paths; {MAX_HTTP_PATHS} are allowed", http.paths.len()));
    }
    let mut paths = Vec::new();
    for (index, entry) in http.paths.iter().enumerate() {
        let path = paths_path.index(index);
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let (text, found) = match (given(&entry.exact), given(&entry.prefix)) {
            (Some(exact), None) => (exact.clone(), HttpPath::Exact(exact)),
            (None, Some(prefix)) => (prefix.clone(), HttpPath::Prefix(prefix)),
            _ => {
                errors.refuse(&path, "must have one of exact and prefix");
                continue;
            }
        };
        if !text.starts_with('/') || text.contains(['?', '#', ' ']) {
            errors.refuse(&path, "must start with / and must not contain ?, # or a space");
        }
        if text.chars().count() > MAX_HTTP_PATH_CHARACTERS {
            errors.refuse(&path, format!("longer than {MAX_HTTP_PATH_CHARACTERS} characters"));
        }
        paths.push(found);
    }
    Some(HttpMatch { methods: http.methods.clone(), paths })
}
