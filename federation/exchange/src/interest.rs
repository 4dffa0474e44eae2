//! Which endpoints of other clusters policies can select: the hub derives it from federated policies, a member registers it
//! for its own.
//!
//! Both sides write interests into messages that the other side must read, and the hub must read back what it has derived.
//! So there is one derivation and one set of limits, and only readable selections can be made. An interest that exceeds a limit is
//! widened: more is sent than the policies select, and no selected endpoint is missing.

use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_policy::model::{ClusterScope, Policy, Port};
use hanse_policy::selector::{Expr, Selector};

use crate::message::{RefusedParts, WrittenScope, WrittenSelection};

/// Bytes of one selector, in its canonical form.
pub const MAX_SELECTOR_BYTES: usize = 8 << 10;
/// Port names of one selection, and bytes of one name.
pub const MAX_PORT_NAMES: usize = 256;
pub const MAX_PORT_NAME_BYTES: usize = 253;

/// How large an interest may be.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub selections: usize,
    /// As encoded, at most.
    pub bytes: usize,
}

/// What a member registers for its own policies: 128 bytes each on the average.
pub const OWN: Size = Size { selections: 16_384, bytes: 2 << 20 };
/// What the hub derives from the policies that one cluster enforces: 64 bytes each on the average.
pub const DERIVED: Size = Size { selections: 65_536, bytes: 4 << 20 };
/// An interest: both of these, with room for what was replaced and is still in force. A message has at most 16 MiB: an
/// opening names this, the member's own part and 4,096 origins of 320 bytes (10.3 MiB); a change of interest adds and removes
/// this much and names 4,096 clusters of 255 bytes (15 MiB).
pub const WHOLE: Size = Size { selections: 262_144, bytes: 7 << 20 };

/// Which endpoints a receiver must be sent: those for which the selector is not certainly false, and which have a port of
/// one of the names where some are given. The scope is never `Local`.
///
/// Every value can be written by one side and read by the other: [`Wanted::new`] is the only way to make one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wanted {
    clusters: ClusterScope,
    selector: Selector,
    port_names: BTreeSet<Arc<str>>,
}

/// The selections of an interest.
pub type Interest = BTreeSet<Arc<Wanted>>;

impl Wanted {
    /// Widens what the other side could not read: a selector that is too long, such as a list of hundreds of values, or
    /// whose canonical form is not an expression becomes `all()`; port names beyond a limit do not restrict the selection.
    pub fn new(clusters: ClusterScope, selector: &Selector, port_names: BTreeSet<Arc<str>>) -> Self {
        let clusters = if clusters == ClusterScope::Local { ClusterScope::All } else { clusters };
        let read = |text: &str| read_selector(text).ok();
        // `!(!a)` is written as `!!a`, which is read as `a`.
        let selector = read(&selector.canonical).filter(|it| read(&it.canonical).as_ref() == Some(it));
        let selector = selector.unwrap_or_else(Selector::all);
        let port_names = if check_port_names(&port_names).is_ok() { port_names } else { BTreeSet::new() };
        Self { clusters, selector, port_names }
    }

    /// Every endpoint of every cluster.
    pub fn everything() -> Self {
        Self { clusters: ClusterScope::All, selector: Selector::all(), port_names: BTreeSet::new() }
    }

    /// The same selection of other clusters.
    pub fn with_clusters(&self, clusters: ClusterScope) -> Self {
        Self { clusters, ..self.clone() }
    }

    pub fn clusters(&self) -> &ClusterScope {
        &self.clusters
    }

    pub fn selector(&self) -> &Selector {
        &self.selector
    }

    /// Empty: the endpoint may have any ports.
    pub fn port_names(&self) -> &BTreeSet<Arc<str>> {
        &self.port_names
    }

    /// The most bytes that it takes in a message: a tag and a length before each text.
    pub fn size(&self) -> usize {
        let texts = |names: &BTreeSet<Arc<str>>| names.iter().map(|name| name.len() + 4).sum::<usize>();
        let clusters = match &self.clusters {
            ClusterScope::Named(names) => texts(names),
            ClusterScope::All | ClusterScope::Local => 0,
        };
        self.selector.canonical.len() + clusters + texts(&self.port_names) + 24
    }
}

impl From<&Wanted> for WrittenSelection {
    fn from(it: &Wanted) -> Self {
        Self {
            clusters: match &it.clusters {
                ClusterScope::Named(names) => WrittenScope::Named(names.iter().map(|n| n.to_string()).collect()),
                ClusterScope::All | ClusterScope::Local => WrittenScope::All,
            },
            selector: it.selector.canonical.to_string(),
            port_names: it.port_names.iter().map(|n| n.to_string()).collect(),
        }
    }
}

/// Reads an interest. A selection that cannot be read is widened by itself; an interest beyond the limit becomes everything.
pub fn read(field: &str, list: Vec<WrittenSelection>, limit: Size, refused: &mut RefusedParts) -> Interest {
    let everything = || Interest::from([Arc::new(Wanted::everything())]);
    if list.len() > limit.selections {
        refused.add(format!("{field}: {} selections, of {}", list.len(), limit.selections));
        return everything();
    }
    let mut interest = Interest::new();
    for (at, selection) in list.into_iter().enumerate() {
        let mut problem = |why: String| refused.add(format!("{field}[{at}].{why}"));
        interest.insert(Arc::new(read_selection(selection, &mut problem)));
    }
    if !fits(interest.iter().map(|it| &**it), limit) {
        refused.add(format!("{field}: more than {} bytes", limit.bytes));
        return everything();
    }
    interest
}

/// A part that is not readable does not restrict the selection.
fn read_selection(selection: WrittenSelection, problem: &mut impl FnMut(String)) -> Wanted {
    let selector = read_selector(&selection.selector).unwrap_or_else(|why| {
        problem(why);
        Selector::all()
    });
    let clusters = match selection.clusters {
        WrittenScope::All => ClusterScope::All,
        WrittenScope::Named(names) => ClusterScope::Named(names.into_iter().map(Arc::from).collect()),
        WrittenScope::Unknown => {
            problem("clusters: missing".to_owned());
            ClusterScope::All
        }
    };
    let mut port_names: BTreeSet<Arc<str>> = selection.port_names.into_iter().map(Arc::from).collect();
    if let Err(why) = check_port_names(&port_names) {
        problem(why);
        port_names.clear();
    }
    // The canonical form, which is sent to members, may be longer than the written one.
    let wanted = Wanted::new(clusters, &selector, port_names);
    if wanted.selector.expr == Expr::All && selector.expr != Expr::All {
        problem(format!(
            "selector: its canonical form has {} bytes, or is nested too deeply",
            selector.canonical.len()
        ));
    }
    wanted
}

/// Reads the selector of a selection.
///
/// # Errors
/// When it exceeds the limit or is not an expression.
fn read_selector(text: &str) -> Result<Selector, String> {
    match text.len() {
        ..=MAX_SELECTOR_BYTES => Selector::parse(text).map_err(|error| format!("selector: {error}")),
        len => Err(format!("selector: {len} bytes, of {MAX_SELECTOR_BYTES}")),
    }
}

/// Whether these can be the port names of a selection.
fn check_port_names(names: &BTreeSet<Arc<str>>) -> Result<(), String> {
    if names.len() > MAX_PORT_NAMES {
        return Err(format!("portNames: {} names, of {MAX_PORT_NAMES}", names.len()));
    }
    match names.iter().find(|name| name.is_empty() || name.len() > MAX_PORT_NAME_BYTES) {
        Some(name) => Err(format!("portNames: a name of {} bytes, of 1 to {MAX_PORT_NAME_BYTES}", name.len())),
        None => Ok(()),
    }
}

/// What policies can select in other clusters, within a limit: what the hub derives for a cluster, and what a member registers
/// for its own.
pub fn derive<'a>(policies: impl IntoIterator<Item = &'a Policy>, limit: Size) -> Interest {
    bounded(policies.into_iter().flat_map(of).map(Arc::new).collect(), limit)
}

/// An interest that exceeds a limit becomes everything.
pub fn bounded(interest: Interest, limit: Size) -> Interest {
    if fits(interest.iter().map(|it| &**it), limit) {
        return interest;
    }
    tracing::warn!(selections = interest.len(), "policies have too many selections: every endpoint is sent");
    Interest::from([Arc::new(Wanted::everything())])
}

/// Whether an interest is within a limit.
fn fits<'a>(interest: impl ExactSizeIterator<Item = &'a Wanted>, limit: Size) -> bool {
    interest.len() <= limit.selections && interest.map(Wanted::size).sum::<usize>() <= limit.bytes
}

/// What one policy can select in other clusters.
pub fn of(policy: &Policy) -> BTreeSet<Wanted> {
    let mut interest = BTreeSet::new();
    let mut want = |clusters: &ClusterScope, selector: &Selector, port_names: BTreeSet<Arc<str>>| {
        if *clusters != ClusterScope::Local {
            interest.insert(Wanted::new(clusters.clone(), selector, port_names));
        }
    };
    let rules = policy.ingress.iter().chain(&policy.egress).flatten();
    for entity in rules.flat_map(|rule| [&rule.source, &rule.destination]) {
        for selection in [&entity.selection, &entity.not_selection].into_iter().flatten() {
            want(&selection.clusters, &selection.selector, BTreeSet::new());
        }
        let named = |port: &Port| match port {
            Port::Named(name) => Some(name.clone()),
            Port::Range(..) => None,
        };
        let names: BTreeSet<Arc<str>> = entity.ports.iter().chain(&entity.not_ports).filter_map(named).collect();
        // Beside a selection a name is looked up on the pods that it selects, which are sent with their ports.
        if !names.is_empty() && entity.selection.is_none() {
            let pods = entity.named_port_pods(&policy.id);
            want(&pods.clusters, &pods.selector, names);
        }
    }
    interest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(expr: Expr) -> Selector {
        Wanted::new(ClusterScope::All, &Selector::from(expr), BTreeSet::new()).selector
    }

    #[test]
    fn a_selection_that_cannot_be_read_back_is_widened() {
        let accounts = |count: usize| {
            let names = (0..count).map(|it| Arc::from(format!("{it:058}")));
            Expr::In("pcsa.projectcalico.org/name".into(), names.collect())
        };
        let within = Selector::from(accounts(100));
        assert!(within.canonical.len() < MAX_SELECTOR_BYTES);
        assert_eq!(readable(accounts(100)), within);
        assert!(Selector::from(accounts(400)).canonical.len() > 3 * MAX_SELECTOR_BYTES);
        assert_eq!(readable(accounts(400)), Selector::all());
        // A text with both quotes cannot be written.
        assert_eq!(readable(Expr::Equal("a".into(), "'\"".into())), Selector::all());
        let nested = (0..600).fold(Expr::Has("a".into()), |inner, at| {
            let parts = [inner, Expr::Has("b".into())].into();
            if at % 2 == 0 { Expr::And(parts) } else { Expr::Or(parts) }
        });
        assert_eq!(readable(nested), Selector::all());
        let twice = Expr::Not(Arc::new(Expr::Not(Arc::new(Expr::Has("a".into())))));
        assert_eq!(readable(twice), Selector::from(Expr::Has("a".into())));
    }

    #[test]
    fn port_names_that_cannot_be_read_back_are_left_out() {
        let of = |names: &[String]| {
            let names: BTreeSet<Arc<str>> = names.iter().map(|it| Arc::from(it.as_str())).collect();
            Wanted::new(ClusterScope::All, &Selector::all(), names).port_names.len()
        };
        let names = |count: usize| (0..count).map(|it| format!("p{it}")).collect::<Vec<_>>();
        assert_eq!((of(&names(256)), of(&names(257))), (256, 0));
        assert_eq!((of(&["x".repeat(253)]), of(&["x".repeat(254)]), of(&[String::new()])), (1, 0, 0));
    }
}
