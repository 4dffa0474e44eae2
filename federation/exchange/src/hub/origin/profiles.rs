//! Endpoints of an origin with the same namespace, account and label set: selections are judged once for all of them.

use std::collections::BTreeSet;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use hanse_policy::slab::{Id as _, Slab};
use hashbrown::{DefaultHashBuilder, HashTable};
use smallvec::SmallVec;

use crate::model::{Pairs, Refusal};

hanse_policy::slab_id! {
    pub struct ProfileId;
}

/// The ids of a namespace, an account and a label set; 0 where there is none.
pub type ProfileKey = [u64; 3];

/// Usual endpoints have labels of their own under one or two keys. Each further key costs time at every judgement.
const MAX_OWN_KEYS: usize = 256;

/// Keys of the labels of their own that a profile's endpoints have.
#[derive(Debug)]
pub enum OwnKeys {
    /// In order, each with the number of endpoints that have it.
    Few(Vec<(Arc<str>, u32)>),
    /// More than [`MAX_OWN_KEYS`]: every selection is evaluated for each endpoint, until the profile has no endpoint.
    Many,
}

impl OwnKeys {
    /// Adds the keys of an endpoint, and returns whether one of them is new.
    fn add<'a>(&mut self, keys: impl Iterator<Item = &'a Arc<str>>) -> bool {
        let mut is_new = false;
        for key in keys {
            let Self::Few(few) = self else { break };
            match few.binary_search_by(|(have, _)| have.cmp(key)) {
                Ok(at) => few[at].1 += 1,
                Err(_) if few.len() == MAX_OWN_KEYS => {
                    *self = Self::Many;
                    is_new = true;
                }
                Err(at) => {
                    // Most profiles have one or two keys, and there may be as many profiles as endpoints.
                    few.reserve_exact(1);
                    few.insert(at, (Arc::clone(key), 1));
                    is_new = true;
                }
            }
        }
        is_new
    }

    /// Removes the keys of an endpoint that were added.
    fn remove<'a>(&mut self, keys: impl Iterator<Item = &'a Arc<str>>) {
        let Self::Few(few) = self else { return };
        for key in keys {
            if let Ok(at) = few.binary_search_by(|(have, _)| have.cmp(key)) {
                few[at].1 -= 1;
                if few[at].1 == 0 {
                    few.remove(at);
                }
            }
        }
    }

    pub fn is_many(&self) -> bool {
        matches!(self, Self::Many)
    }

    /// The keys; none where there are too many.
    pub fn few(&self) -> &[(Arc<str>, u32)] {
        match self {
            Self::Few(few) => few,
            Self::Many => &[],
        }
    }
}

impl Default for OwnKeys {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

/// Numbers without an allocation where there are a few, as of most profiles.
pub type Numbers = SmallVec<[u32; 4]>;

#[derive(Debug)]
pub struct Profile {
    pub key: ProfileKey,
    pub endpoints: Numbers,
    pub own_keys: OwnKeys,
    /// Selections that match, or may match, all of its endpoints, in order. None where all selections are evaluated for each.
    pub matches: Numbers,
    /// Other selections that must be evaluated for each endpoint, in order.
    pub per_endpoint: Numbers,
    pub problem: Option<Box<Refusal>>,
}

impl Profile {
    fn new(key: ProfileKey) -> Self {
        let (endpoints, own_keys, matches, per_endpoint) = Default::default();
        Self { key, endpoints, own_keys, matches, per_endpoint, problem: None }
    }

    /// Adds an endpoint with these labels of its own. Returns its position, and whether the profile is to be judged.
    pub fn add(&mut self, slot: u32, own: &Pairs) -> (u32, bool) {
        let is_first = self.endpoints.is_empty();
        if is_first {
            self.own_keys = OwnKeys::default();
        }
        let has_new_key = self.own_keys.add(own.iter().map(|(key, _)| key));
        self.endpoints.push(slot);
        (self.endpoints.len() as u32 - 1, is_first || has_new_key)
    }

    /// Removes an endpoint with these labels of its own. Returns the slot of the one that has its position now.
    pub fn remove(&mut self, position: u32, own: &Pairs) -> Option<u32> {
        self.own_keys.remove(own.iter().map(|(key, _)| key));
        self.endpoints.swap_remove(position as usize);
        self.endpoints.get(position as usize).copied()
    }
}

/// Profiles by id, by key and by what they refer to.
#[derive(Debug, Default)]
pub struct Profiles {
    all: Slab<ProfileId, Profile>,
    by_key: HashTable<ProfileId>,
    hasher: DefaultHashBuilder,
    /// Ids of objects, each with a profile that refers to it.
    referring: BTreeSet<(u64, ProfileId)>,
}

impl Profiles {
    /// One above the highest number of a profile.
    pub fn bound(&self) -> u32 {
        self.all.bound()
    }

    /// The profile at a number, if there is one.
    pub fn at(&self, number: u32) -> Option<(ProfileId, &Profile)> {
        let id = ProfileId::new(number);
        Some((id, self.all.get(id)?))
    }

    pub fn find(&self, id: ProfileId) -> Option<&Profile> {
        self.all.get(id)
    }

    pub fn get(&self, id: ProfileId) -> &Profile {
        &self.all[id]
    }

    pub fn get_mut(&mut self, id: ProfileId) -> &mut Profile {
        &mut self.all[id]
    }

    pub fn iter(&self) -> impl Iterator<Item = (ProfileId, &Profile)> {
        self.all.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Profile> {
        self.all.iter_mut().map(|(_, profile)| profile)
    }

    /// The profiles that refer to an object.
    pub fn referring(&self, id: u64) -> impl Iterator<Item = ProfileId> + '_ {
        let (first, last) = (ProfileId::new(0), ProfileId::new(u32::MAX - 1));
        self.referring.range((id, first)..=(id, last)).map(|(_, profile)| *profile)
    }

    /// The profile of a key.
    pub fn of(&mut self, key: ProfileKey) -> ProfileId {
        let hash = self.hasher.hash_one(key);
        if let Some(id) = self.by_key.find(hash, |id| self.all[*id].key == key) {
            return *id;
        }
        let new = self.all.insert(Profile::new(key));
        self.by_key.insert_unique(hash, new, |id| self.hasher.hash_one(self.all[*id].key));
        self.referring.extend(key.into_iter().filter(|id| *id != 0).map(|id| (id, new)));
        new
    }

    /// Removes a profile if it has no endpoint any more: label sets come and go with every job.
    pub fn remove_empty(&mut self, id: ProfileId) -> bool {
        let profile = &self.all[id];
        if !profile.endpoints.is_empty() {
            return false;
        }
        let key = profile.key;
        if let Ok(found) = self.by_key.find_entry(self.hasher.hash_one(key), |it| *it == id) {
            found.remove();
        }
        for referred in key {
            self.referring.remove(&(referred, id));
        }
        self.all.remove(id);
        true
    }

    pub fn shrink(&mut self) {
        self.all.shrink_to_fit();
        for (_, profile) in self.all.iter_mut() {
            profile.endpoints.shrink_to_fit();
        }
        let all = &self.all;
        self.by_key.shrink_to_fit(|id| self.hasher.hash_one(all[*id].key));
    }
}
