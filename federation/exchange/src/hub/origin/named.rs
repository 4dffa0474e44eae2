//! Namespaces and accounts of an origin.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::Pairs;

#[derive(Debug)]
pub(super) enum NamedObject {
    Namespace { name: Arc<str>, labels: Pairs },
    Account { namespace: u64, name: Arc<str>, labels: Pairs },
}

/// By slot.
#[derive(Debug, Default)]
pub(super) struct Named(BTreeMap<u32, NamedObject>);

impl Named {
    pub(super) fn insert(&mut self, slot: u32, object: NamedObject) {
        self.0.insert(slot, object);
    }

    pub(super) fn remove(&mut self, slot: u32) {
        self.0.remove(&slot);
    }

    pub(super) fn namespace(&self, slot: u32) -> Option<(&Arc<str>, &Pairs)> {
        match self.0.get(&slot)? {
            NamedObject::Namespace { name, labels } => Some((name, labels)),
            NamedObject::Account { .. } => None,
        }
    }

    /// An account, if it is of this namespace.
    pub(super) fn account(&self, slot: u32, of: u64) -> Option<(&Arc<str>, &Pairs)> {
        match self.0.get(&slot)? {
            NamedObject::Account { namespace, name, labels } if *namespace == of => Some((name, labels)),
            _ => None,
        }
    }

    /// The id of an account's namespace.
    pub(super) fn namespace_of(&self, slot: u32) -> Option<u64> {
        match self.0.get(&slot)? {
            NamedObject::Account { namespace, .. } => Some(*namespace),
            NamedObject::Namespace { .. } => None,
        }
    }

    /// Slots of accounts, with the ids of their namespaces.
    pub(super) fn accounts(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.0.keys().filter_map(|slot| Some((*slot, self.namespace_of(*slot)?)))
    }
}
