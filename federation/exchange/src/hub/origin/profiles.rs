//! Endpoints of an origin with the same namespace, account and label set: selections are judged once for all of them.

use std::collections::BTreeSet;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::model::Refusal;

/// The ids of a namespace, an account and a label set; 0 where there is none.
pub type ProfileKey = [u64; 3];

/// Usual endpoints have labels of their own under one or two keys.
const FIRST_KEYS: usize = 64;

#[derive(Debug)]
pub struct Profile {
    pub key: ProfileKey,
    pub endpoints: Vec<u32>,
    /// Keys of labels of their own, of its endpoints and of some that were in it.
    pub own_keys: Box<[Arc<str>]>,
    /// With this many keys, those that no endpoint has any more are dropped.
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

/// Profiles by number, by key and by what they refer to.
#[derive(Debug, Default)]
pub struct Profiles {
    list: Vec<Profile>,
    /// Numbers of profiles without endpoints.
    free: Vec<u32>,
    /// Numbers by the profiles' keys.
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// Ids, and the numbers of the profiles that refer to them.
    referring: BTreeSet<(u64, u32)>,
}

impl Profiles {
    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn get(&self, number: u32) -> &Profile {
        &self.list[number as usize]
    }

    pub fn get_mut(&mut self, number: u32) -> &mut Profile {
        &mut self.list[number as usize]
    }

    pub fn iter(&self) -> impl Iterator<Item = &Profile> {
        self.list.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Profile> {
        self.list.iter_mut()
    }

    /// The profiles that refer to an object.
    pub fn referring(&self, id: u64) -> impl Iterator<Item = u32> + '_ {
        self.referring.range((id, 0)..=(id, u32::MAX)).map(|(_, number)| *number)
    }

    /// The number of a key's profile, and whether it was made now.
    pub fn number(&mut self, key: ProfileKey) -> (u32, bool) {
        let hash = self.hasher.hash_one(key);
        if let Some(number) = self.numbers.find(hash, |number| self.list[*number as usize].key == key) {
            return (*number, false);
        }
        let number = match self.free.pop() {
            Some(number) => {
                self.list[number as usize] = Profile::new(key);
                number
            }
            None => {
                self.list.push(Profile::new(key));
                self.list.len() as u32 - 1
            }
        };
        let hash_of = |number: &u32| self.hasher.hash_one(self.list[*number as usize].key);
        self.numbers.insert_unique(hash, number, hash_of);
        self.referring.extend(key.into_iter().filter(|id| *id != 0).map(|id| (id, number)));
        (number, true)
    }

    /// Forgets a profile if it has no endpoint any more: label sets come and go with every job.
    pub fn forget_empty(&mut self, number: u32) -> bool {
        let profile = &self.list[number as usize];
        if !profile.endpoints.is_empty() {
            return false;
        }
        let key = profile.key;
        if let Ok(found) = self.numbers.find_entry(self.hasher.hash_one(key), |it| *it == number) {
            found.remove();
        }
        for id in key {
            self.referring.remove(&(id, number));
        }
        self.list[number as usize] = Profile::new(key);
        self.free.push(number);
        true
    }

    pub fn shrink(&mut self) {
        self.list.shrink_to_fit();
        for profile in &mut self.list {
            profile.endpoints.shrink_to_fit();
        }
        let list = &self.list;
        self.numbers.shrink_to_fit(|number| self.hasher.hash_one(list[*number as usize].key));
    }
}
