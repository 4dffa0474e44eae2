//! Sets of small numbers.

use std::collections::BTreeMap;

/// A growable set of small numbers, one bit each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bits(Vec<u64>);

impl Bits {
    pub fn contains(&self, at: u32) -> bool {
        self.0.get(at as usize / 64).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// Sets or clears a bit and returns what it was.
    pub fn set(&mut self, at: u32, value: bool) -> bool {
        let word = at as usize / 64;
        if word >= self.0.len() {
            if !value {
                return false;
            }
            self.0.resize(word + 1, 0);
        }
        let mask = 1 << (at % 64);
        let was = self.0[word] & mask != 0;
        if value {
            self.0[word] |= mask;
        } else {
            self.0[word] &= !mask;
        }
        was
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().enumerate().flat_map(|(at, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    at as u32 * 64 + bit
                })
            })
        })
    }
}

/// A set of slots: a few in order, more of them as one bit each. Most classes select little of most origins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slots {
    Few(Vec<u32>),
    Many(Bits),
}

impl Slots {
    /// As much as the bits of 1,024 slots.
    const FEW: usize = 32;

    pub fn contains(&self, at: u32) -> bool {
        match self {
            Self::Few(slots) => slots.binary_search(&at).is_ok(),
            Self::Many(bits) => bits.contains(at),
        }
    }

    /// Puts a slot in or takes it out, and returns whether it was in.
    pub fn set(&mut self, at: u32, value: bool) -> bool {
        match self {
            Self::Few(slots) => {
                let place = slots.binary_search(&at);
                match (place, value) {
                    (Ok(place), false) => drop(slots.remove(place)),
                    (Err(place), true) if slots.len() < Self::FEW => slots.insert(place, at),
                    (Err(_), true) => {
                        let mut bits = Bits::default();
                        for slot in slots.iter().chain([&at]) {
                            bits.set(*slot, true);
                        }
                        *self = Self::Many(bits);
                    }
                    _ => {}
                }
                place.is_ok()
            }
            Self::Many(bits) => bits.set(at, value),
        }
    }

    /// What it takes besides itself.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Few(slots) => slots.capacity() * size_of::<u32>(),
            Self::Many(Bits(words)) => words.capacity() * size_of::<u64>(),
        }
    }

    /// Those that are keys of a map.
    pub fn of<V>(&self, map: &BTreeMap<u32, V>) -> Vec<u32> {
        match self {
            Self::Few(slots) => slots.iter().copied().filter(|slot| map.contains_key(slot)).collect(),
            Self::Many(bits) => map.keys().copied().filter(|slot| bits.contains(*slot)).collect(),
        }
    }

    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let (few, many) = match self {
            Self::Few(slots) => (Some(slots), None),
            Self::Many(bits) => (None, Some(bits)),
        };
        few.into_iter().flatten().copied().chain(many.into_iter().flat_map(Bits::iter))
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every 7th number modulo 101 is put in or taken out, so that the set grows past what is kept as it is and shrinks again.
    #[test]
    fn slots_are_a_set_at_every_size() {
        let (mut slots, mut set) = (Slots::default(), BTreeSet::new());
        for step in 0..400_u32 {
            let (at, value) = (step * 7 % 101, step < 150 || step % 3 == 0);
            let was = if value { !set.insert(at) } else { set.remove(&at) };
            assert_eq!(slots.set(at, value), was, "step {step}");
            assert!((0..101).all(|at| slots.contains(at) == set.contains(&at)), "step {step}");
            assert!(slots.iter().eq(set.iter().copied()), "step {step}");
            let even: BTreeMap<u32, ()> = (0..101).step_by(2).map(|at| (at, ())).collect();
            assert!(slots.of(&even).into_iter().eq(set.iter().copied().filter(|at| at % 2 == 0)), "step {step}");
        }
        assert!(matches!(slots, Slots::Many(_)));
    }
}
