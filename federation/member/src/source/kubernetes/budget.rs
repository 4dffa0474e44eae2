//! What the policies of one namespace may take of the member's memory.
//!
//! A user who may write policies in one namespace could otherwise exhaust the member of the whole cluster. What exceeds the budget is in
//! force without its rules, which are unknown: it allows nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use hanse_api::manifest::Manifests;
use hanse_api::policy::PolicySize;
use hanse_api::{Diagnostic, Object};

/// Rules of all policies of a namespace in one collection; at about 600 bytes, and as much again where they are compiled, 12 MB.
pub const MAX_RULES: usize = 10_000;
/// Nets and ports of these rules; at some 24 bytes, and as much again, 5 MB.
pub const MAX_ENTRIES: usize = 100_000;

/// The policies of one collection.
#[derive(Debug, Default)]
pub struct Budget {
    namespaces: HashMap<Arc<str>, Use>,
}

#[derive(Debug, Default)]
struct Use {
    total: PolicySize,
    policies: BTreeMap<Arc<Path>, PolicySize>,
    refused: BTreeSet<Arc<Path>>,
}

impl Use {
    fn set(&mut self, origin: &Arc<Path>, size: PolicySize) {
        self.clear(origin);
        self.total = sum(self.total, size);
        self.policies.insert(Arc::clone(origin), size);
    }

    fn clear(&mut self, origin: &Path) {
        if let Some(before) = self.policies.remove(origin) {
            self.total = difference(self.total, before);
        }
    }
}

fn sum(a: PolicySize, b: PolicySize) -> PolicySize {
    PolicySize { rules: a.rules + b.rules, entries: a.entries + b.entries }
}

fn difference(a: PolicySize, b: PolicySize) -> PolicySize {
    PolicySize { rules: a.rules.saturating_sub(b.rules), entries: a.entries.saturating_sub(b.entries) }
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    Fits,
    /// It fits, and is smaller than before: others that were refused may fit, too, if they are read again.
    Frees,
    /// It is left without its rules. The directions that it decides: ingress, egress.
    Closed([bool; 2]),
}

impl Budget {
    /// Refuses a policy that exceeds the budget of its namespace: it remains as a partial object without rules.
    pub fn check(&mut self, origin: &Arc<Path>, name: &Path, read: &mut Manifests) -> Checked {
        let Some(manifest) = read.objects.first_mut().or(read.partial.first_mut()) else { return Checked::Fits };
        let Object::Policy(policy) = &mut manifest.object else { return Checked::Fits };
        let Some(namespace) = policy.local_id().namespace.clone() else { return Checked::Fits };
        let size = policy.size();
        let of = self.namespaces.entry(Arc::clone(&namespace)).or_default();
        let before = of.policies.get(origin).copied().unwrap_or_default();
        let total = sum(difference(of.total, before), size);
        if total.rules <= MAX_RULES && total.entries <= MAX_ENTRIES {
            of.set(origin, size);
            of.refused.remove(origin);
            let is_smaller = size.rules < before.rules || size.entries < before.entries;
            return if is_smaller && !of.refused.is_empty() { Checked::Frees } else { Checked::Fits };
        }
        // An earlier version of it, which stays in force, counts as before.
        of.refused.insert(Arc::clone(origin));
        let why = format!(
            "is too large: with it, the policies of namespace {namespace} have {} rules, one for each peer and protocol, with {} nets and \
             ports; {MAX_RULES} and {MAX_ENTRIES} are allowed",
            total.rules, total.entries
        );
        policy.close(&why);
        let directions = policy.directions();
        let problem = Diagnostic {
            field: "spec".to_owned(),
            object: Some((*manifest.reference).clone()),
            ..Diagnostic::of_file(name, why)
        };
        read.diagnostics.push(problem);
        read.partial.append(&mut read.objects);
        Checked::Closed(directions)
    }

    /// A policy was deleted. Returns whether others that were refused may now fit: they must be read again.
    pub fn remove(&mut self, namespace: &str, origin: &Path) -> bool {
        let Some(of) = self.namespaces.get_mut(namespace) else { return false };
        of.clear(origin);
        of.refused.remove(origin);
        let is_freed = !of.refused.is_empty();
        if of.policies.is_empty() && of.refused.is_empty() {
            self.namespaces.remove(namespace);
        }
        is_freed
    }
}

#[cfg(test)]
mod tests {
    use hanse_api::manifest::read_bytes;

    use super::*;

    fn policy(name: &str, nets: usize) -> (Arc<Path>, Manifests) {
        let peers: Vec<String> =
            (0..nets).map(|it| format!(r#"{{"ipBlock":{{"cidr":"10.{}.{}.0/24"}}}}"#, it / 256, it % 256)).collect();
        let text = format!(
            r#"{{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{{"name":"{name}","namespace":"n"}},
               "spec":{{"podSelector":{{"matchLabels":{{"a":"b"}}}},"policyTypes":["Ingress"],"ingress":[{{"from":[{}]}}]}}}}"#,
            peers.join(",")
        );
        let mut read = Manifests::of_api_server();
        read_bytes(&name.into(), text.as_bytes(), &mut read);
        assert_eq!((read.objects.len(), read.diagnostics.len()), (1, 0));
        (Path::new(name).into(), read)
    }

    fn check(budget: &mut Budget, name: &str, nets: usize) -> (Checked, Manifests) {
        let (origin, mut read) = policy(name, nets);
        (budget.check(&origin, &origin, &mut read), read)
    }

    #[test]
    fn refuses_what_exceeds_the_budget_of_a_namespace() {
        const CLOSED: Checked = Checked::Closed([true, false]);
        let mut budget = Budget::default();
        assert_eq!(check(&mut budget, "a", 40_000).0, Checked::Fits);
        assert_eq!(check(&mut budget, "b", 60_000).0, Checked::Fits);
        let (checked, refused) = check(&mut budget, "c", 1);
        assert_eq!((checked, refused.objects.len(), refused.partial.len()), (CLOSED, 0, 1), "100,001 nets");
        assert!(refused.diagnostics[0].message.contains("namespace n"), "{:?}", refused.diagnostics);
        let Object::Policy(closed) = &refused.partial[0].object else { panic!("a policy") };
        assert_eq!(closed.size(), PolicySize::default());
        // A version that is refused counts as the one before it.
        assert_eq!(check(&mut budget, "a", 41_000).0, CLOSED);
        assert_eq!(check(&mut budget, "b", 60_000).0, Checked::Fits);
        assert_eq!(check(&mut budget, "b", 59_999).0, Checked::Frees);
        assert_eq!(check(&mut budget, "c", 1).0, Checked::Fits);
        assert!(budget.remove("n", Path::new("b")), "a was refused");
        assert_eq!(check(&mut budget, "a", 41_000).0, Checked::Fits);
        assert!(!budget.remove("n", Path::new("a")));
        assert!(!budget.remove("n", Path::new("c")));
        assert!(budget.namespaces.is_empty());
    }
}
