//! Endpoints of an origin with the same namespace, account and label set: selections are judged once for all of them.

use std::collections::BTreeSet;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use hanse_policy::slab::{Id as _, Slab};
use hashbrown::{DefaultHashBuilder, HashTable};

use crate::model::Refusal;

hanse_policy::slab_id! {
    pub struct ProfileId;
}

/// The ids of a namespace, an account and a label set; 0 where there is none.
pub type ProfileKey = [u64; 3];

/// Usual endpoints have labels of their own under one or two keys.
const FIRST_KEYS: usize = 64;

#[derive(Debug)]
pub struct Profile {
    pub key: ProfileKey,
    pub endpoints: Vec<u32>,
    /// Keys of the own labels of its endpoints, and of some former ones.
    pub own_keys: Box<[Arc<str>]>,
    /// Above this number, the keys of former endpoints are dropped.
    pub most_keys: usize,
    /// Selections that match, or may match, all of its endpoints.
    pub matches: Box<[u32]>,
    /// Selections that must be evaluated for each endpoint.
    pub per_endpoint: Box<[u32]>,
    pub problem: Option<Box<Refusal>>,
}

impl Profile {
    fn new(key: ProfileKey) -> Self {
        let (endpoints, own_keys, matches, per_endpoint) = Default::default();
        Self { key, endpoints, own_keys, most_keys: FIRST_KEYS, matches, per_endpoint, problem: None }
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

    pub fn get(&self, id: ProfileId) -> &Profile {
        &self.all[id]
    }

    pub fn get_mut(&mut self, id: ProfileId) -> &mut Profile {
        &mut self.all[id]
    }

    pub fn iter(&self) -> impl Iterator<Item = &Profile> {
        self.all.iter().map(|(_, profile)| profile)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Profile> {
        self.all.iter_mut().map(|(_, profile)| profile)
    }

    /// The profiles that refer to an object.
    pub fn referring(&self, id: u64) -> impl Iterator<Item = ProfileId> + '_ {
        let (first, last) = (ProfileId::new(0), ProfileId::new(u32::MAX - 1));
        self.referring.range((id, first)..=(id, last)).map(|(_, profile)| *profile)
    }

    /// The profile of a key, and whether it was made now.
    pub fn of(&mut self, key: ProfileKey) -> (ProfileId, bool) {
        let hash = self.hasher.hash_one(key);
        if let Some(id) = self.by_key.find(hash, |id| self.all[*id].key == key) {
            return (*id, false);
        }
        let new = self.all.insert(Profile::new(key));
        self.by_key.insert_unique(hash, new, |id| self.hasher.hash_one(self.all[*id].key));
        self.referring.extend(key.into_iter().filter(|id| *id != 0).map(|id| (id, new)));
        (new, true)
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
