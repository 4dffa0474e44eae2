//! Classes: receivers with the same interest share what it selects.
//!
//! A class has, for each origin, the objects that its interest selects, and their digest. To make one, each origin is scanned:
//! with hundreds of thousands of endpoints that takes longer than other streams may wait. So a class is built in parts, and
//! receivers stay with their former class until it is complete. While it is built, changes of an origin are applied to the slots
//! that were scanned; the rest is scanned later, in its newest state.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use hanse_policy::slab::Slab;
use hashbrown::HashMap;

use super::derived;
use super::origin::{Before, Changes, Entry, JudgingCursor, Origin};
use super::selections::{EVALUATIONS_PER_UPDATE, Selections};
use super::slots::{Bits, Slots};
use crate::interest::{Interest, Wanted};
use crate::model::first_bits;

hanse_policy::slab_id! {
    pub(super) struct ClassId;
}

/// Classes without receivers that are kept, and their size by [`Class::bytes`]: a receiver whose stream ended reconnects with the
/// same interest, and making a class of everything takes a scan of every endpoint.
const MAX_IDLE: usize = 8;
const MAX_IDLE_BYTES: usize = 64 << 20;
/// Memory of a selection besides its text: the expression, and its entries in the index.
const SELECTION_BYTES: usize = 512;
/// Slots that are scanned in the time that one update takes.
const SLOTS_PER_UPDATE: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Classes {
    all: Slab<ClassId, Class>,
    by_selections: HashMap<Vec<u32>, ClassId>,
    /// By the address of the interest that the class was made of: clusters that enforce the same policies share it.
    by_interest: HashMap<usize, ClassId>,
    /// The classes without users and their bytes; the one that was released last is at the end.
    idle: VecDeque<(ClassId, usize)>,
    /// Selections of unfinished classes that some origin may not have judged yet.
    unjudged: Bits,
}

#[derive(Debug)]
pub(super) struct Class {
    of: Arc<Interest>,
    /// Of its selections; in order once all are known.
    numbers: Vec<u32>,
    interest: Bits,
    /// Of the selections' canonical forms: the same on every replica.
    token: u64,
    users: u32,
    /// By the origins' numbers.
    views: Vec<View>,
    building: Option<Box<Building>>,
}

/// How far a class is built: selections are numbered, then each origin judges the new ones and is scanned.
#[derive(Debug)]
struct Building {
    rest: std::vec::IntoIter<Arc<Wanted>>,
    hasher: blake3::Hasher,
    is_numbered: bool,
    /// Selections that some origin may not have judged yet.
    unjudged: Vec<u32>,
    origin: usize,
    /// Those of `unjudged` that concern the present origin, until they were judged.
    of_origin: Option<Vec<u32>>,
    cursor: Option<JudgingCursor>,
    slot: u32,
}

/// What a class selects of one origin.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) members: Slots,
    pub(super) digest: u128,
    /// The frames of its snapshot, while a receiver is sent them.
    pub(super) snapshot: Option<Weak<Vec<Bytes>>>,
}

impl Classes {
    pub(super) fn get(&self, id: ClassId) -> &Class {
        &self.all[id]
    }

    pub(super) fn get_mut(&mut self, id: ClassId) -> &mut Class {
        &mut self.all[id]
    }

    pub(super) fn is_built(&self, id: ClassId) -> bool {
        self.all[id].building.is_none()
    }

    pub(super) fn forget_origin(&mut self, number: usize) {
        for (_, class) in self.all.iter_mut() {
            *class.view_mut(number) = View::default();
        }
    }

    /// Applies changes of an origin to every view of it; returns the ids that receivers of each class must be sent.
    pub(super) fn update(
        &mut self,
        number: usize,
        origin: &Origin,
        changes: &Changes,
        selections: &Selections,
    ) -> HashMap<ClassId, Vec<u64>> {
        let mut dirty: HashMap<ClassId, Vec<u64>> = HashMap::new();
        let candidates = origin.candidates(&changes.endpoints, selections);
        for (id, class) in self.all.iter_mut() {
            let scanned = class.scanned(number);
            if scanned == 0 {
                continue;
            }
            let mut fit = candidates.of(&class.interest);
            let view = view_of(&mut class.views, number);
            fit.extend(view.members.of(&changes.endpoints));
            // A slot that is in the view as a support may be an endpoint now.
            fit.retain(|slot| *slot < scanned || view.members.contains(*slot));
            fit.sort_unstable();
            fit.dedup();
            let ids = view.update(origin, changes, &fit, &class.interest, selections);
            if !ids.is_empty() {
                view.snapshot = None;
                dirty.insert(id, ids);
            }
        }
        dirty
    }

    /// Of the classes without users that are kept.
    pub(super) fn idle_bytes(&self) -> usize {
        self.idle.iter().map(|(_, bytes)| bytes).sum()
    }

    pub(super) fn add_user(&mut self, id: ClassId) {
        self.all[id].users += 1;
        self.idle.retain(|(idle, _)| *idle != id);
    }

    /// The class of an interest, with one more user, and whether it was made now and is to be built: see [`Self::build`].
    pub(super) fn acquire(&mut self, interest: &Arc<Interest>) -> (ClassId, bool) {
        let address = Arc::as_ptr(interest) as usize;
        if let Some(id) = self.by_interest.get(&address).copied() {
            self.add_user(id);
            return (id, false);
        }
        let building = Building {
            rest: interest.iter().cloned().collect::<Vec<_>>().into_iter(),
            hasher: blake3::Hasher::new(),
            is_numbered: false,
            unjudged: Vec::new(),
            origin: 0,
            of_origin: None,
            cursor: Some(JudgingCursor::default()),
            slot: 0,
        };
        let id = self.all.insert(Class {
            of: Arc::clone(interest),
            numbers: Vec::new(),
            interest: Bits::default(),
            token: 0,
            users: 1,
            views: Vec::new(),
            building: Some(Box::new(building)),
        });
        self.by_interest.insert(address, id);
        (id, true)
    }

    /// Goes on with a class that is not built yet, for as long as `slice` updates take. Returns the class: another one, which has
    /// the same selections and takes over the users, where there is one.
    pub(super) fn build(
        &mut self,
        id: ClassId,
        selections: &mut Selections,
        origins: &mut [Option<Origin>],
        slice: usize,
    ) -> ClassId {
        let class = &mut self.all[id];
        let Some(mut building) = class.building.take() else { return id };
        let mut left = slice;
        while left > 0
            && let Some(wanted) = building.rest.next()
        {
            derived::hash(&wanted, &mut building.hasher);
            let (number, is_new) = selections.acquire(&wanted);
            if is_new || self.unjudged.contains(number) {
                self.unjudged.set(number, true);
                building.unjudged.push(number);
            }
            class.numbers.push(number);
            left -= 1;
        }
        if building.rest.len() == 0 && !building.is_numbered {
            building.is_numbered = true;
            building.unjudged.sort_unstable();
            class.numbers.sort_unstable();
            for number in &class.numbers {
                class.interest.set(*number, true);
            }
            class.token = first_bits(&building.hasher.finalize());
            if let Some(same) = self.by_selections.get(&class.numbers).copied() {
                class.building = Some(building);
                self.merge(id, same, selections, origins);
                return same;
            }
            self.by_selections.insert(class.numbers.clone(), id);
        }
        while left > 0 && building.rest.len() == 0 {
            if building.origin >= origins.len() || class.numbers.is_empty() {
                for number in &building.unjudged {
                    self.unjudged.set(*number, false);
                }
                return id;
            }
            left = left.saturating_sub(building.step(class, origins, selections, left));
        }
        class.building = Some(building);
        id
    }

    /// Gives the users of a class to another one with the same selections.
    fn merge(&mut self, from: ClassId, into: ClassId, selections: &mut Selections, origins: &mut [Option<Origin>]) {
        let users = self.all[from].users;
        self.add_user(into);
        self.all[into].users += users - 1;
        self.forget(from, selections, origins);
    }

    /// One user fewer.
    pub(super) fn release(&mut self, id: ClassId, selections: &mut Selections, origins: &mut [Option<Origin>]) {
        let class = &mut self.all[id];
        class.users -= 1;
        if class.users > 0 {
            return;
        }
        if class.building.is_some() {
            self.forget(id, selections, origins);
            return;
        }
        let bytes = class.bytes();
        self.idle.push_back((id, bytes));
        while self.idle.len() > MAX_IDLE || self.idle_bytes() > MAX_IDLE_BYTES {
            let Some((oldest, _)) = self.idle.pop_front() else { return };
            self.forget(oldest, selections, origins);
        }
    }

    fn forget(&mut self, id: ClassId, selections: &mut Selections, origins: &mut [Option<Origin>]) {
        let class = self.all.remove(id);
        if self.by_selections.get(&class.numbers) == Some(&id) {
            self.by_selections.remove(&class.numbers);
        }
        let address = Arc::as_ptr(&class.of) as usize;
        if self.by_interest.get(&address) == Some(&id) {
            self.by_interest.remove(&address);
        }
        let mut released = Bits::default();
        for number in class.numbers {
            if selections.release(number) {
                released.set(number, true);
                self.unjudged.set(number, false);
            }
        }
        for origin in origins.iter_mut().flatten() {
            origin.unselect(&released);
        }
    }

    /// The ids that only one of two classes selects of an origin.
    pub(super) fn differences(&self, number: usize, origin: &Origin, old: ClassId, new: ClassId) -> Vec<u64> {
        if old == new {
            return Vec::new();
        }
        let (old, new) = (self.get(old).view(number), self.get(new).view(number));
        let has = |view: Option<&View>, slot| view.is_some_and(|view| view.members.contains(slot));
        let either = [old, new].into_iter().flatten().flat_map(|view| view.members.iter());
        let slots = either.filter(|slot| has(old, *slot) != has(new, *slot));
        slots.filter_map(|slot| origin.entry(slot)).map(|entry| entry.id).collect()
    }
}

impl Building {
    /// Builds the next part of the present origin, for about the time of `left` updates, and returns how many it took.
    fn step(
        &mut self,
        class: &mut Class,
        origins: &mut [Option<Origin>],
        selections: &Selections,
        left: usize,
    ) -> usize {
        let Some(origin) = origins[self.origin].as_mut() else {
            self.next_origin();
            return 0;
        };
        let most = left.saturating_mul(EVALUATIONS_PER_UPDATE);
        if let Some(cursor) = self.cursor {
            let Some(fresh) = &self.of_origin else {
                let unjudged = self.unjudged.iter().copied();
                self.of_origin = Some(unjudged.filter(|number| selections.concerns(*number, &origin.name)).collect());
                return self.unjudged.len() / EVALUATIONS_PER_UPDATE;
            };
            let (began, profiles) = (selections.evaluated(), origin.profile_bound());
            let before = cursor.profile();
            self.cursor = origin.select(fresh, selections, cursor, most);
            let after = self.cursor.map_or(profiles, JudgingCursor::profile);
            let visited = if fresh.is_empty() { 0 } else { after.saturating_sub(before) as usize };
            return visited
                + selections.evaluated_since(began) / EVALUATIONS_PER_UPDATE
                + usize::from(self.cursor.is_some());
        }
        let slots = origin.slot_bound();
        let view = view_of(&mut class.views, self.origin);
        let (began, from) = (selections.evaluated(), self.slot);
        let cost = |slot: u32| {
            let evaluated = selections.evaluated_since(began);
            evaluated.saturating_add((slot - from) as usize * EVALUATIONS_PER_UPDATE / SLOTS_PER_UPDATE)
        };
        while self.slot < slots && cost(self.slot) < most {
            view.scan(origin, self.slot, &class.interest, selections);
            self.slot += 1;
        }
        let cost = cost(self.slot);
        if self.slot == slots {
            self.next_origin();
        }
        1 + cost / EVALUATIONS_PER_UPDATE
    }

    fn next_origin(&mut self) {
        self.origin += 1;
        (self.of_origin, self.cursor, self.slot) = (None, Some(JudgingCursor::default()), 0);
    }
}

impl Class {
    pub(super) fn token(&self) -> u64 {
        self.token
    }

    /// More than one receiver has it.
    pub(super) fn is_shared(&self) -> bool {
        self.users > 1
    }

    pub(super) fn view(&self, number: usize) -> Option<&View> {
        self.views.get(number)
    }

    /// Origins that came after the class was made have an empty view.
    pub(super) fn view_mut(&mut self, number: usize) -> &mut View {
        view_of(&mut self.views, number)
    }

    /// Slots of an origin below this one were scanned.
    fn scanned(&self, number: usize) -> u32 {
        match &self.building {
            None => u32::MAX,
            Some(building) if !building.is_numbered || number > building.origin => 0,
            Some(building) if number == building.origin => building.slot,
            Some(_) => u32::MAX,
        }
    }

    /// Its approximate memory, with that of its selections.
    fn bytes(&self) -> usize {
        let selections = self.of.iter().map(|wanted| wanted.size() + SELECTION_BYTES).sum::<usize>();
        let views = self.views.iter().map(|view| size_of::<View>() + view.members.bytes()).sum::<usize>();
        selections + views
    }
}

fn view_of(views: &mut Vec<View>, number: usize) -> &mut View {
    if views.len() <= number {
        views.resize_with(number + 1, View::default);
    }
    &mut views[number]
}

impl View {
    /// Adds what is in a slot if the interest selects it.
    fn scan(&mut self, origin: &Origin, slot: u32, interest: &Bits, selections: &Selections) {
        if origin.is_endpoint(slot) && origin.endpoint_selected(slot, interest, selections) {
            self.add(origin, slot);
            for support in origin.supports_of(slot) {
                self.add(origin, support);
            }
        }
    }

    fn add(&mut self, origin: &Origin, slot: u32) {
        if let Some(entry) = origin.entry(slot)
            && !self.members.set(slot, true)
        {
            self.digest = self.digest.wrapping_add(entry.digest());
        }
    }

    /// Applies a change of the origin, and returns the ids that a receiver must be sent. `fit` are the changed endpoints that were in
    /// the view, or may be now.
    fn update(
        &mut self,
        origin: &Origin,
        changes: &Changes,
        fit: &[u32],
        interest: &Bits,
        selections: &Selections,
    ) -> Vec<u64> {
        let mut dirty = Vec::new();
        let mut supports = self.members.of(&changes.supports);
        for (slot, before) in fit.iter().filter_map(|slot| changes.endpoints.get_key_value(slot)) {
            let now = origin.endpoint_selected(*slot, interest, selections);
            let was = self.members.set(*slot, now);
            self.account(origin, *slot, *before, was, now, &mut dirty);
            if now {
                supports.extend(origin.supports_of(*slot));
            }
        }
        supports.sort_unstable();
        supports.dedup();
        for (slot, before) in supports.iter().filter_map(|slot| changes.supports.get_key_value(slot)) {
            let now = origin.support_selected(*slot, &self.members);
            let was = self.members.set(*slot, now);
            self.account(origin, *slot, *before, was, now, &mut dirty);
        }
        dirty
    }

    fn account(&mut self, origin: &Origin, slot: u32, before: Before, was: bool, now: bool, dirty: &mut Vec<u64>) {
        let after = origin.entry(slot).filter(|_| now).map_or(0, Entry::digest);
        if was {
            self.digest = self.digest.wrapping_sub(before.digest);
        }
        self.digest = self.digest.wrapping_add(after);
        if was != now || (now && before.digest != after) {
            dirty.push(before.id);
        }
    }
}
