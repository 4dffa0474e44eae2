//! Implications between selectors and between rules. Each function returns `true` only if it can prove the result; `false` means
//! unproven.
//!
//! Matches have three values (no < unknown < yes). "`a` implies `b`" means that `b` is at least as true as `a` for every endpoint, so
//! the results are also valid for unknown labels.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::model::{Action, ClusterScope, EntityMatch, Icmp, IpVersion, PolicyId, Port, Protocol, Rule, Selection};
use crate::selector::Expr;

/// The maximum number of comparisons in one proof. A selector has at most 1,024 characters, about 100 parts. A longer proof counts as
/// unproven.
const MAX_STEPS: u32 = 20_000;

/// Whether every endpoint that matches `a` matches `b`.
pub fn implies(a: &Expr, b: &Expr) -> bool {
    Proof(MAX_STEPS).implies(a, b)
}

/// Whether no endpoint matches both: `a` is at most as true as the negation of `b`.
pub fn excludes(a: &Expr, b: &Expr) -> bool {
    Proof(MAX_STEPS).excludes(a, b)
}

/// Whether no endpoint can match, because the conditions contradict each other.
pub fn is_contradictory(expr: &Expr) -> bool {
    Proof(MAX_STEPS).is_contradictory(expr)
}

/// The number of remaining comparisons.
struct Proof(u32);

impl Proof {
    fn is_spent(&mut self) -> bool {
        self.0 = self.0.saturating_sub(1);
        self.0 == 0
    }

    fn implies(&mut self, a: &Expr, b: &Expr) -> bool {
        if self.is_spent() {
            return false;
        }
        if a == b || is_never(a) {
            return true;
        }
        match b {
            Expr::All | Expr::Global => return true,
            Expr::And(parts) => return parts.iter().all(|part| self.implies(a, part)),
            _ => {}
        }
        match a {
            Expr::Or(parts) => return parts.iter().all(|part| self.implies(part, b)),
            Expr::And(parts) if parts.iter().any(|part| self.implies(part, b)) => return true,
            Expr::In(key, values) if !values.is_empty() => {
                return values.iter().all(|value| self.implies(&Expr::Equal(key.clone(), value.clone()), b));
            }
            _ => {}
        }
        match (a, b) {
            (_, Expr::Or(parts)) => parts.iter().any(|part| self.implies(a, part)),
            (_, Expr::Not(inner)) => self.excludes(a, inner),
            (Expr::Equal(key, value), _) => test(b, key, value) == Some(true),
            (Expr::Not(inner), Expr::NotEqual(key, _) | Expr::NotIn(key, _)) => **inner == Expr::Has(key.clone()),
            (Expr::NotIn(key, values), Expr::NotEqual(other, value)) => key == other && values.contains(value),
            (Expr::NotIn(key, values), Expr::NotIn(other, fewer)) => {
                key == other && fewer.iter().all(|value| values.contains(value))
            }
            (Expr::NotEqual(key, value), Expr::NotIn(other, only)) => key == other && only.iter().all(|it| it == value),
            (Expr::StartsWith(key, text), Expr::StartsWith(other, part)) => key == other && text.starts_with(&**part),
            (Expr::EndsWith(key, text), Expr::EndsWith(other, part)) => key == other && text.ends_with(&**part),
            (
                Expr::StartsWith(key, text) | Expr::EndsWith(key, text) | Expr::Contains(key, text),
                Expr::Contains(other, part),
            ) => key == other && text.contains(&**part),
            (Expr::StartsWith(key, _) | Expr::EndsWith(key, _) | Expr::Contains(key, _), Expr::Has(other)) => {
                key == other
            }
            _ => false,
        }
    }

    fn excludes(&mut self, a: &Expr, b: &Expr) -> bool {
        // The relation is symmetric.
        is_never(a) || is_never(b) || self.excluded_by(a, b) || self.excluded_by(b, a)
    }

    fn excluded_by(&mut self, a: &Expr, b: &Expr) -> bool {
        if self.is_spent() {
            return false;
        }
        match (a, b) {
            (_, Expr::Not(inner)) => self.implies(a, inner),
            (Expr::And(parts), _) => parts.iter().any(|part| self.excludes(part, b)),
            (Expr::Or(parts), _) => parts.iter().all(|part| self.excludes(part, b)),
            (Expr::Equal(key, value), _) => test(b, key, value) == Some(false),
            (Expr::In(key, values), _) => {
                !values.is_empty()
                    && values.iter().all(|value| self.excludes(&Expr::Equal(key.clone(), value.clone()), b))
            }
            _ => false,
        }
    }

    fn is_contradictory(&mut self, expr: &Expr) -> bool {
        match expr {
            Expr::In(_, values) => values.is_empty(),
            Expr::Or(parts) => parts.iter().all(|part| self.is_contradictory(part)),
            Expr::And(parts) => {
                parts.iter().any(|part| self.is_contradictory(part))
                    || (1..parts.len()).any(|at| parts[..at].iter().any(|before| self.excludes(before, &parts[at])))
            }
            other => is_never(other),
        }
    }
}

/// Whether it is false for every endpoint, and never unknown.
fn is_never(expr: &Expr) -> bool {
    matches!(expr, Expr::Not(inner) if matches!(**inner, Expr::All | Expr::Global))
}

/// The result of an expression that compares only `key`, for the value `value`.
fn test(expr: &Expr, key: &str, value: &str) -> Option<bool> {
    match expr {
        Expr::Has(k) => (**k == *key).then_some(true),
        Expr::Equal(k, wanted) => (**k == *key).then(|| **wanted == *value),
        Expr::NotEqual(k, unwanted) => (**k == *key).then(|| **unwanted != *value),
        Expr::Contains(k, part) => (**k == *key).then(|| value.contains(&**part)),
        Expr::StartsWith(k, part) => (**k == *key).then(|| value.starts_with(&**part)),
        Expr::EndsWith(k, part) => (**k == *key).then(|| value.ends_with(&**part)),
        Expr::In(k, values) => (**k == *key).then(|| values.iter().any(|it| **it == *value)),
        Expr::NotIn(k, values) => (**k == *key).then(|| values.iter().all(|it| **it != *value)),
        Expr::All | Expr::Global | Expr::Not(_) | Expr::And(_) | Expr::Or(_) => None,
    }
}

/// Whether `first`, evaluated before `rule` for the same pod and cluster, decides every packet that `rule` could decide.
pub fn covers((first, by): (&Rule, &PolicyId), (rule, of): (&Rule, &PolicyId)) -> bool {
    if first.action == Action::Log || first.unknown_because().is_some() {
        return false;
    }
    // Where a match is unknown, a Deny or Pass acts and an Allow does not.
    let acts_on_unknown = matches!(rule.action, Action::Deny | Action::Pass);
    if first.action == Action::Allow && acts_on_unknown && may_be_unknown(first, by) {
        return false;
    }
    let number = |protocol: Option<Protocol>| protocol.map(Protocol::number);
    let (on, possible) = (families(first), families(rule));
    (0..2).all(|family| on[family] || !possible[family])
        && (first.protocol.is_none() || number(first.protocol) == number(rule.protocol))
        && first.not_protocol.is_none_or(|unwanted| {
            number(rule.not_protocol) == Some(unwanted.number())
                || rule.protocol.is_some_and(|wanted| wanted.number() != unwanted.number())
        })
        && first.icmp.is_none_or(|wanted| rule.icmp.is_some_and(|have| icmp_within(have, wanted)))
        && first.not_icmp.is_none_or(|unwanted| {
            // Without a type it excludes nothing.
            unwanted.kind.is_none()
                || rule.not_icmp.is_some_and(|excluded| excluded.kind.is_some() && icmp_within(unwanted, excluded))
        })
        && entity_covers((&first.source, by), (&rule.source, of), possible)
        && entity_covers((&first.destination, by), (&rule.destination, of), possible)
}

/// Whether every message that matches `a` matches `b`. Without a type, all messages match.
fn icmp_within(a: Icmp, b: Icmp) -> bool {
    b.kind.is_none() || a.kind == b.kind && (b.code.is_none() || a.code == b.code)
}

fn may_be_unknown(rule: &Rule, policy: &PolicyId) -> bool {
    [&rule.source, &rule.destination].into_iter().any(|entity| {
        let named = |ports: &[Port]| ports.iter().any(|port| matches!(port, Port::Named(_)));
        let selections = [&entity.selection, &entity.not_selection].into_iter().flatten();
        let far = |scope: &ClusterScope| *scope != ClusterScope::Local;
        selections.into_iter().any(|it| far(&it.clusters))
            || (named(&entity.ports) || named(&entity.not_ports)) && far(&entity.named_port_pods(policy).clusters)
    })
}

/// The families, IPv4 and IPv6, of which a rule can match a packet.
pub fn families(rule: &Rule) -> [bool; 2] {
    let of = |nets: &[IpNet]| {
        [true, false].map(|v4| nets.is_empty() || nets.iter().any(|net| matches!(net, IpNet::V4(_)) == v4))
    };
    let lists = [&rule.source.nets, &rule.source.not_nets, &rule.destination.nets, &rule.destination.not_nets];
    let mut possible = lists.into_iter().map(|nets| of(nets)).fold([true, true], |[a, b], [c, d]| [a && c, b && d]);
    match rule.protocol {
        Some(Protocol::Icmp) => possible[1] = false,
        Some(Protocol::IcmpV6) => possible[0] = false,
        _ => {}
    }
    match rule.ip_version {
        Some(IpVersion::V4) => possible[1] = false,
        Some(IpVersion::V6) => possible[0] = false,
        None => {}
    }
    possible
}

/// Every address of a family.
pub fn everything(v4: bool) -> IpNet {
    if v4 { IpNet::V4(Ipv4Net::default()) } else { IpNet::V6(Ipv6Net::default()) }
}

/// Whether `net` lies within `nets`, taken together.
pub fn is_within(net: &IpNet, nets: &[IpNet]) -> bool {
    nets.iter().any(|it| it.contains(net)) || IpNet::aggregate(&nets.to_vec()).iter().any(|it| it.contains(net))
}

fn entity_covers(
    (first, by): (&EntityMatch, &PolicyId),
    (rule, of): (&EntityMatch, &PolicyId),
    possible: [bool; 2],
) -> bool {
    let spoken = |net: &&IpNet| possible[usize::from(matches!(net, IpNet::V6(_)))];
    let nets = first.nets.is_empty()
        || if rule.nets.is_empty() {
            [true, false]
                .iter()
                .filter(|v4| possible[usize::from(!**v4)])
                .all(|v4| is_within(&everything(*v4), &first.nets))
        } else {
            rule.nets.iter().filter(spoken).all(|net| is_within(net, &first.nets))
        };
    let apart =
        |net: &IpNet| !rule.nets.is_empty() && rule.nets.iter().all(|it| !it.contains(net) && !net.contains(it));
    let not_nets = || first.not_nets.iter().filter(spoken).all(|net| is_within(net, &rule.not_nets) || apart(net));
    let wider = |first: &Option<Selection>, rule: &Option<Selection>| match (first, rule) {
        (None, _) => true,
        (Some(first), Some(rule)) => selection_within(rule, first),
        (Some(_), None) => false,
    };
    let unwanted = || match (&first.not_selection, &rule.not_selection) {
        (None, _) => true,
        (Some(first), Some(rule)) => selection_within(first, rule),
        (Some(_), None) => false,
    };
    nets && not_nets()
        && (first.service.is_none() || first.service == rule.service)
        && ports_cover((first, by), (rule, of))
        && wider(&first.selection, &rule.selection)
        && unwanted()
}

/// Whether whatever `a` selects, `b` does too.
fn selection_within(a: &Selection, b: &Selection) -> bool {
    scope_within(&a.clusters, &b.clusters) && implies(&a.selector.expr, &b.selector.expr)
}

fn scope_within(a: &ClusterScope, b: &ClusterScope) -> bool {
    match (a, b) {
        (_, ClusterScope::All) => true,
        (ClusterScope::Named(a), ClusterScope::Named(b)) => a.is_subset(b),
        (a, b) => a == b,
    }
}

fn ports_cover((first, by): (&EntityMatch, &PolicyId), (rule, of): (&EntityMatch, &PolicyId)) -> bool {
    let pods = || (first.named_port_pods(by), rule.named_port_pods(of));
    let wanted = |port: &Port| match port {
        Port::Range(..) => within_ranges(port, &first.ports),
        Port::Named(_) => {
            let (wide, narrow) = pods();
            first.ports.contains(port) && selection_within(narrow, wide)
        }
    };
    let excluded = |port: &Port| match port {
        Port::Range(low, high) => {
            let apart = |it: &Port| matches!(it, Port::Range(a, b) if b < low || high < a);
            within_ranges(port, &rule.not_ports) || !rule.ports.is_empty() && rule.ports.iter().all(apart)
        }
        Port::Named(_) => {
            let (wide, narrow) = pods();
            rule.not_ports.contains(port) && selection_within(wide, narrow)
        }
    };
    (first.ports.is_empty() || !rule.ports.is_empty() && rule.ports.iter().all(wanted))
        && first.not_ports.iter().all(excluded)
}

/// Whether a range lies within the ranges of `ports`, taken together.
pub fn within_ranges(range: &Port, ports: &[Port]) -> bool {
    let Port::Range(low, high) = range else { return false };
    let ranges = ports.iter().filter_map(|port| match port {
        Port::Range(low, high) => Some((u32::from(*low), u32::from(*high))),
        Port::Named(_) => None,
    });
    let mut sorted: Vec<(u32, u32)> = ranges.collect();
    sorted.sort_unstable();
    let mut next = u32::from(*low);
    for (from, to) in sorted {
        if from <= next && to >= next {
            next = to + 1;
        }
    }
    next > u32::from(*high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selector::Selector;

    fn expr(text: &str) -> Expr {
        Selector::parse(text).expect("a selector").expr
    }

    #[test]
    fn proves_implications_between_selectors() {
        for (a, b, follows) in [
            ("a == 'x'", "all()", true),
            ("a == 'x'", "has(a)", true),
            ("has(a)", "a == 'x'", false),
            ("a == 'x'", "a != 'y'", true),
            ("a == 'x'", "a != 'x'", false),
            ("a == 'x'", "a in {'x', 'y'}", true),
            ("a in {'x', 'y'}", "a in {'x', 'y', 'z'}", true),
            ("a in {'x', 'y'}", "a == 'x' || a == 'y'", true),
            ("a in {'x', 'y'}", "a == 'x'", false),
            ("a == 'x' && b == 'y'", "b == 'y'", true),
            ("a == 'x' || b == 'y'", "b == 'y'", false),
            ("a == 'x' || a == 'y'", "has(a)", true),
            ("!has(a)", "a != 'x'", true),
            ("!has(a)", "a not in {'x'}", true),
            ("a != 'x'", "!has(a)", false),
            ("!has(a)", "!(a == 'x')", true),
            ("a not in {'x', 'y'}", "a != 'y'", true),
            ("a starts with 'ab'", "a starts with 'a'", true),
            ("a starts with 'a'", "a starts with 'ab'", false),
            ("a starts with 'ab'", "a contains 'b'", true),
            ("a == 'abc'", "a ends with 'bc'", true),
            ("a == 'x'", "b == 'x'", false),
            ("a == 'x'", "!(a == 'y' || b == 'z')", false),
            ("a == 'x'", "!(a == 'y' && b == 'z')", true),
        ] {
            assert_eq!(implies(&expr(a), &expr(b)), follows, "{a} => {b}");
        }
        for (contradiction, is) in [
            ("a == 'x' && a == 'y'", true),
            ("has(a) && !has(a)", true),
            ("a in {'x'} && a not in {'x', 'y'}", true),
            ("a in {}", true),
            ("a != 'x' && a != 'y'", false),
            ("a == 'x' && b == 'y'", false),
            ("(a == 'x' && a == 'y') || b == 'z'", false),
        ] {
            assert_eq!(is_contradictory(&expr(contradiction)), is, "{contradiction}");
        }
    }

    #[test]
    fn adjacent_port_ranges_cover_a_wider_range() {
        let ranges = [Port::Range(10, 20), Port::Range(1, 9), Port::Range(30, 65535)];
        assert!(within_ranges(&Port::Range(1, 20), &ranges));
        assert!(within_ranges(&Port::Range(65535, 65535), &ranges));
        assert!(!within_ranges(&Port::Range(20, 30), &ranges));
        let nets: Vec<IpNet> = ["0.0.0.0/1", "128.0.0.0/1"].map(|net| net.parse().expect("a net")).into();
        assert!(is_within(&everything(true), &nets));
        assert!(!is_within(&everything(false), &nets));
    }
}
