//! A set of ids: a few inline, many as a compressed bitmap.

use roaring::RoaringBitmap;
use smallvec::SmallVec;

use crate::slab::Id;

/// Up to this many are kept in a sorted list: 64 × 4 bytes, about the size of the smallest bitmap.
const FEW: usize = 64;

/// Distinct ids in ascending order.
#[derive(Debug, Clone)]
pub enum IdSet<I> {
    Few(SmallVec<[I; 4]>),
    Many(Box<RoaringBitmap>),
}

impl<I> Default for IdSet<I> {
    fn default() -> Self {
        Self::Few(SmallVec::new())
    }
}

impl<I: Id> IdSet<I> {
    pub fn insert(&mut self, id: I) {
        match self {
            Self::Few(list) => {
                // Ids are given out in order, so most come last.
                if list.last().is_none_or(|last| *last < id) {
                    list.push(id);
                } else if let Err(at) = list.binary_search(&id) {
                    list.insert(at, id);
                }
                if list.len() > FEW {
                    *self = Self::Many(Box::new(list.iter().map(|id| id.number()).collect()));
                }
            }
            Self::Many(bitmap) => {
                bitmap.insert(id.number());
            }
        }
    }

    pub fn remove(&mut self, id: I) {
        match self {
            Self::Few(list) => {
                if let Ok(at) = list.binary_search(&id) {
                    list.remove(at);
                }
            }
            Self::Many(bitmap) => {
                bitmap.remove(id.number());
                if bitmap.len() <= FEW as u64 / 2 {
                    *self = Self::Few(bitmap.iter().map(I::new).collect());
                }
            }
        }
    }

    pub fn contains(&self, id: I) -> bool {
        match self {
            Self::Few(list) => list.binary_search(&id).is_ok(),
            Self::Many(bitmap) => bitmap.contains(id.number()),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::Few(list) => list.len(),
            Self::Many(bitmap) => bitmap.len() as usize,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In ascending order.
    pub fn iter(&self) -> Iter<'_, I> {
        match self {
            Self::Few(list) => Iter::Few(list.iter()),
            Self::Many(bitmap) => Iter::Many(Box::new(bitmap.iter())),
        }
    }
}

pub enum Iter<'a, I> {
    Few(std::slice::Iter<'a, I>),
    Many(Box<roaring::bitmap::Iter<'a>>),
}

impl<I> std::fmt::Debug for Iter<'_, I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Iter")
    }
}

impl<I: Id> Iterator for Iter<'_, I> {
    type Item = I;

    fn next(&mut self) -> Option<I> {
        match self {
            Self::Few(list) => list.next().copied(),
            Self::Many(bitmap) => bitmap.next().map(I::new),
        }
    }
}
