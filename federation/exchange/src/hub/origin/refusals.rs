//! Which objects are not used, and why.

use super::Origin;
use super::objects::{Body, Entry, endpoint_of};
use crate::codec::object;
use crate::model::Refusal;

impl Origin {
    /// All refusals: how many, and the first `max`.
    pub fn refusals(&self, max: usize) -> (usize, Vec<(u64, Refusal)>) {
        let overflow = &self.overflow;
        let mut list: Vec<_> = overflow.refused.iter().take(max).map(|(id, why)| (*id, why.clone())).collect();
        for slot in &self.unused {
            let Some((entry, why)) = self.entry(*slot).and_then(|entry| Some((entry, self.reason(*slot, entry)?)))
            else {
                continue;
            };
            if list.len() == max {
                break;
            }
            list.push((entry.id, why));
        }
        (overflow.refused.len() + overflow.unreadable + self.unused.len(), list)
    }

    /// Why an object is not used.
    fn reason(&self, slot: u32, entry: &Entry) -> Option<Refusal> {
        match entry.body {
            Body::Endpoint { profile, .. } if !entry.visible => Some(match &self.profiles.get(profile).problem {
                Some(problem) => (**problem).clone(),
                None => self.taken_address(entry),
            }),
            Body::Named if !entry.visible => self.named.namespace_of(slot).map(Refusal::ReferenceMissing),
            _ => self.refused.get(&slot).cloned(),
        }
    }

    fn taken_address(&self, entry: &Entry) -> Refusal {
        let taken = endpoint_of(&entry.bytes).and_then(|e| {
            e.addresses.into_iter().find(|address| {
                let owner = self.addresses.owner(*address).and_then(|slot| self.entry(slot));
                owner.is_none_or(|owner| owner.id != entry.id)
            })
        });
        taken.map_or(Refusal::ReferenceMissing(0), Refusal::AddressTaken)
    }

    /// Why an object is refused, in words.
    pub fn explain(&self, id: u64, why: &Refusal) -> String {
        let object = self.describe(id);
        match why {
            Refusal::ReferenceMissing(to) => {
                format!("{object}: it refers to {}, which does not exist or is refused", self.describe(*to))
            }
            why => format!("{object}: {why}"),
        }
    }

    /// The kind and name of an object.
    pub fn describe(&self, id: u64) -> String {
        let object = self.slot_of(id).and_then(|slot| self.entry(slot));
        let Some((kind, namespace, name)) = object.and_then(|entry| object::name_of(&entry.bytes)) else {
            return format!("object {id}");
        };
        // Also where the namespace itself is refused.
        let of = self.slot_of(namespace).and_then(|slot| self.entry(slot));
        match of.and_then(|entry| object::name_of(&entry.bytes)) {
            Some(("namespace", _, of)) => format!("{kind} {of}/{name}"),
            _ => format!("{kind} {name}"),
        }
    }
}
