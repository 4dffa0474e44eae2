//! A set of small numbers: a few inline, many as a compressed bitmap.

use roaring::RoaringBitmap;
use smallvec::SmallVec;

/// Up to this many are kept in a sorted list: 64 × 4 bytes, about the size of the smallest bitmap.
const FEW: usize = 64;

/// Ascending, without doubles.
#[derive(Debug, Clone)]
pub enum IdSet {
    Few(SmallVec<[u32; 4]>),
    Many(Box<RoaringBitmap>),
}

impl Default for IdSet {
    fn default() -> Self {
        Self::Few(SmallVec::new())
    }
}

impl IdSet {
    pub fn insert(&mut self, id: u32) {
        match self {
            Self::Few(list) => {
                // Numbers are given out in order, so most come last.
                if list.last().is_none_or(|last| *last < id) {
                    list.push(id);
                } else if let Err(at) = list.binary_search(&id) {
                    list.insert(at, id);
                }
                if list.len() > FEW {
                    *self = Self::Many(Box::new(list.iter().copied().collect()));
                }
            }
            Self::Many(bitmap) => {
                bitmap.insert(id);
            }
        }
    }

    pub fn remove(&mut self, id: u32) {
        match self {
            Self::Few(list) => {
                if let Ok(at) = list.binary_search(&id) {
                    list.remove(at);
                }
            }
            Self::Many(bitmap) => {
                bitmap.remove(id);
                if bitmap.len() <= FEW as u64 / 2 {
                    *self = Self::Few(bitmap.iter().collect());
                }
            }
        }
    }

    pub fn contains(&self, id: u32) -> bool {
        match self {
            Self::Few(list) => list.binary_search(&id).is_ok(),
            Self::Many(bitmap) => bitmap.contains(id),
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
    pub fn iter(&self) -> Iter<'_> {
        match self {
            Self::Few(list) => Iter::Few(list.iter()),
            Self::Many(bitmap) => Iter::Many(Box::new(bitmap.iter())),
        }
    }
}

pub enum Iter<'a> {
    Few(std::slice::Iter<'a, u32>),
    Many(Box<roaring::bitmap::Iter<'a>>),
}

impl std::fmt::Debug for Iter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Iter")
    }
}

impl Iterator for Iter<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        match self {
            Self::Few(list) => list.next().copied(),
            Self::Many(bitmap) => bitmap.next(),
        }
    }
}
