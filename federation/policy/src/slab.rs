//! A slab: stores values by small ids, which are reused after removal.
//!
//! Each slab has its own id type, a newtype over `u32` declared with [`slab_id!`](crate::slab_id), so that an id of one slab cannot
//! index another. An id is valid from [`Slab::insert`] to [`Slab::remove`]. Ids have no generation: an id that is kept longer may refer to
//! a newer value.

use std::fmt;
use std::hash::Hash;
use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

/// The id of a value in a [`Slab`].
pub trait Id: Copy + Ord + Hash + fmt::Debug {
    fn new(number: u32) -> Self;
    fn number(self) -> u32;
}

/// Declares id types: `slab_id! { /// A node of the graph. pub struct NodeId; }`. An `Option` of one takes four bytes.
#[macro_export]
macro_rules! slab_id {
    ($($(#[$meta:meta])* $visibility:vis struct $name:ident;)+) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        // One above the number.
        $visibility struct $name(std::num::NonZeroU32);

        impl $name {
            const fn at(number: u32) -> Self {
                Self(std::num::NonZeroU32::MIN.saturating_add(number))
            }
        }

        impl $crate::slab::Id for $name {
            fn new(number: u32) -> Self {
                Self::at(number)
            }

            fn number(self) -> u32 {
                self.0.get() - 1
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), $crate::slab::Id::number(*self))
            }
        }
    )+};
}

/// Values of `T` by ids of type `I`. A vacant slot owns no `T`. Indexing and removal panic on a vacant id, in release
/// builds too; [`Slab::get`] returns `None` for it.
#[derive(Clone)]
pub struct Slab<I, T> {
    slots: Vec<Option<T>>,
    /// Vacant slots; the last one is used next.
    free: Vec<u32>,
    id: PhantomData<I>,
}

impl<I, T> Default for Slab<I, T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), id: PhantomData }
    }
}

impl<I: Id, T> Slab<I, T> {
    pub fn new() -> Self {
        Self::default()
    }

    /// Stores a value, in the slot that was freed last if there is one. Panics at 2^32 - 1 values.
    pub fn insert(&mut self, value: T) -> I {
        match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(value);
                I::new(number)
            }
            None => {
                let id = self.next_id();
                self.slots.push(Some(value));
                id
            }
        }
    }

    /// The id that the next [`Self::insert`] returns.
    pub fn next_id(&self) -> I {
        let fresh = || match u32::try_from(self.slots.len()) {
            Ok(number) if number < u32::MAX => number,
            _ => panic!("a slab has at most 2^32 - 1 values"),
        };
        I::new(self.free.last().copied().unwrap_or_else(fresh))
    }

    /// Removes the value of an id, which may be reused. Panics when there is none.
    #[track_caller]
    pub fn remove(&mut self, id: I) -> T {
        match self.slots.get_mut(id.number() as usize).and_then(Option::take) {
            Some(value) => {
                self.free.push(id.number());
                value
            }
            None => vacant(id),
        }
    }

    pub fn get(&self, id: I) -> Option<&T> {
        self.slots.get(id.number() as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, id: I) -> Option<&mut T> {
        self.slots.get_mut(id.number() as usize)?.as_mut()
    }

    pub fn contains(&self, id: I) -> bool {
        self.get(id).is_some()
    }

    /// In ascending order of ids.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (I, &T)> {
        let value = |(number, slot): (usize, _)| Option::map(slot, |value| (I::new(number as u32), value));
        self.slots.iter().map(Option::as_ref).enumerate().filter_map(value)
    }

    /// In ascending order of ids.
    pub fn iter_mut(&mut self) -> impl DoubleEndedIterator<Item = (I, &mut T)> {
        let value = |(number, slot): (usize, _)| Option::map(slot, |value| (I::new(number as u32), value));
        self.slots.iter_mut().map(Option::as_mut).enumerate().filter_map(value)
    }

    /// Frees memory that is not in use.
    pub fn shrink_to_fit(&mut self) {
        self.slots.shrink_to_fit();
        self.free.shrink_to_fit();
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One above the highest number that was ever in use.
    pub fn bound(&self) -> u32 {
        self.slots.len() as u32
    }
}

impl<I: Id, T> Index<I> for Slab<I, T> {
    type Output = T;

    #[track_caller]
    fn index(&self, id: I) -> &T {
        match self.get(id) {
            Some(value) => value,
            None => vacant(id),
        }
    }
}

impl<I: Id, T> IndexMut<I> for Slab<I, T> {
    #[track_caller]
    fn index_mut(&mut self, id: I) -> &mut T {
        match self.get_mut(id) {
            Some(value) => value,
            None => vacant(id),
        }
    }
}

impl<I: Id, T: fmt::Debug> fmt::Debug for Slab<I, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Additional values for the ids of a slab. Grows to the highest written id and never shrinks. A value stays until it is replaced: the
/// owner must reset it when the id is freed.
#[derive(Debug, Clone)]
pub struct SecondaryMap<I, T> {
    values: Vec<T>,
    id: PhantomData<I>,
}

impl<I, T> Default for SecondaryMap<I, T> {
    fn default() -> Self {
        Self { values: Vec::new(), id: PhantomData }
    }
}

impl<I: Id, T: Default> SecondaryMap<I, T> {
    pub fn get(&self, id: I) -> Option<&T> {
        self.values.get(id.number() as usize)
    }

    /// The value of an id, the default where none was written.
    pub fn entry(&mut self, id: I) -> &mut T {
        let at = id.number() as usize;
        if self.values.len() <= at {
            self.values.resize_with(at + 1, T::default);
        }
        &mut self.values[at]
    }
}

#[cold]
#[track_caller]
fn vacant<I: Id>(id: I) -> ! {
    panic!("{id:?} is vacant: it was removed or never inserted")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    slab_id! {
        struct TestId;
    }

    #[test]
    fn reuses_the_slot_that_was_freed_last() {
        let mut slab = Slab::<TestId, &str>::new();
        let [a, b, c] = ["a", "b", "c"].map(|value| slab.insert(value));
        assert_eq!(slab.remove(a), "a");
        assert_eq!(slab.remove(c), "c");
        assert_eq!((slab.len(), slab.get(a), slab[b]), (1, None, "b"));
        assert_eq!(slab.next_id(), c);
        assert_eq!([slab.insert("d"), slab.insert("e")], [c, a]);
        assert_eq!((slab.next_id(), slab.insert("f")), (TestId::at(3), TestId::at(3)));
        assert_eq!(slab.iter().map(|(_, value)| *value).collect::<String>(), "ebdf");
    }

    #[test]
    fn drops_a_value_with_its_slot() {
        let shared = Arc::new(());
        let mut slab = Slab::<TestId, Arc<()>>::new();
        let id = slab.insert(shared.clone());
        drop(slab.remove(id));
        assert_eq!(Arc::strong_count(&shared), 1);
    }

    #[test]
    #[should_panic(expected = "TestId(0) is vacant")]
    fn panics_on_double_remove() {
        let mut slab = Slab::<TestId, u8>::new();
        let id = slab.insert(1);
        slab.remove(id);
        slab.remove(id);
    }

    #[test]
    #[should_panic(expected = "TestId(7) is vacant")]
    fn panics_on_an_index_out_of_range() {
        let _ = Slab::<TestId, u8>::new()[TestId::at(7)];
    }

    #[test]
    #[should_panic(expected = "TestId(0) is vacant")]
    fn panics_on_a_write_to_a_stale_id() {
        let mut slab = Slab::<TestId, u8>::new();
        let id = slab.insert(1);
        slab.remove(id);
        slab[id] = 2;
    }

    #[test]
    fn an_optional_id_takes_four_bytes() {
        assert_eq!(size_of::<Option<TestId>>(), 4);
        assert_eq!((TestId::at(0).number(), TestId::new(u32::MAX - 1).number()), (0, u32::MAX - 1));
    }

    #[test]
    fn a_secondary_map_has_defaults_below_its_highest_id() {
        let mut map = SecondaryMap::<TestId, u8>::default();
        *map.entry(TestId::at(2)) = 7;
        let values: Vec<Option<u8>> = (0..4).map(|at| map.get(TestId::at(at)).copied()).collect();
        assert_eq!(values, [Some(0), Some(0), Some(7), None]);
    }

    proptest! {
        #[test]
        fn agrees_with_a_map(steps in proptest::collection::vec((any::<bool>(), 0u32..20, any::<u16>()), 0..200)) {
            let mut slab = Slab::<TestId, u16>::new();
            let mut model = BTreeMap::new();
            for (insert, number, value) in steps {
                let id = TestId::at(number);
                if insert {
                    let (expected, id) = (slab.next_id(), slab.insert(value));
                    prop_assert_eq!(id, expected);
                    prop_assert!(model.insert(id, value).is_none(), "an occupied slot was reused");
                } else if model.contains_key(&id) {
                    prop_assert_eq!(Some(slab.remove(id)), model.remove(&id));
                } else {
                    prop_assert!(!slab.contains(id) && slab.get_mut(id).is_none());
                }
                prop_assert_eq!(slab.len(), model.len());
            }
            prop_assert!(slab.iter().map(|(id, value)| (id, *value)).eq(model.clone()));
            prop_assert!(slab.iter_mut().map(|(id, value)| (id, *value)).eq(model));
        }
    }
}
