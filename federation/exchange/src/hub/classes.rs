//! Classes: receivers with the same interest share what it selects.
//!
//! A class has, for each origin, the objects that its interest selects, and their digest. To make one, each origin is scanned:
//! with hundreds of thousands of endpoints that takes longer than other streams may wait. So a class is built in parts, of which the
//! evaluations are made outside the exchange ([`Evaluation`]), and receivers stay with their former class until it is complete.
//! While it is built, changes of an origin are applied to the slots that were scanned; the rest is scanned later, in its newest
//! state.

use std::collections::VecDeque;
use std::sync::Arc;

use hanse_policy::slab::Slab;
use hashbrown::HashMap;

use super::derived;
use super::evaluation::{Answers, Evaluated, Evaluation, Questions};
use super::origin::{Changes, JudgingCursor, Origin, Selected};
use super::selections::{EVALUATIONS_PER_UPDATE, Selections};
use super::slots::Bits;
use super::views::{ClassId, View};
use crate::interest::{Interest, Wanted};
use crate::model::first_bits;

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

#[derive(Debug)]
struct Building {
    stage: Stage,
    /// Its selections by number.
    wanted: Arc<HashMap<u32, Arc<Wanted>>>,
    /// Selections that some origin may not have judged yet.
    unjudged: Vec<u32>,
    /// What is to be evaluated before it is built further.
    prepared: Option<Arc<Evaluation>>,
}

/// How far a class is built.
#[derive(Debug)]
enum Stage {
    /// Its selections are numbered.
    Numbering { rest: std::vec::IntoIter<Arc<Wanted>>, hasher: Box<blake3::Hasher> },
    /// Each origin judges the selections that are new to it. `of_origin`: those that concern the present one.
    Judging { origin: usize, of_origin: Option<Vec<u32>>, cursor: JudgingCursor },
    /// Each origin is scanned.
    Scanning { origin: usize, slot: u32 },
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
        let rest = interest.iter().cloned().collect::<Vec<_>>().into_iter();
        let building = Building {
            stage: Stage::Numbering { rest, hasher: Box::new(blake3::Hasher::new()) },
            wanted: Arc::default(),
            unjudged: Vec::new(),
            prepared: None,
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

    /// Goes on with a class that is not built yet, for as long as `slice` updates take, or until an evaluation of it is prepared.
    /// Returns the class: another one, which has the same selections and takes over the users, where there is one.
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
        if let Stage::Numbering { rest, hasher } = &mut building.stage {
            let by_number = Arc::make_mut(&mut building.wanted);
            while left > 0
                && let Some(wanted) = rest.next()
            {
                derived::hash(&wanted, &mut *hasher);
                let (number, is_new) = selections.acquire(&wanted);
                if is_new || self.unjudged.contains(number) {
                    self.unjudged.set(number, true);
                    building.unjudged.push(number);
                }
                class.numbers.push(number);
                by_number.insert(number, wanted);
                left -= 1;
            }
            if rest.len() > 0 {
                class.building = Some(building);
                return id;
            }
            building.unjudged.sort_unstable();
            class.numbers.sort_unstable();
            for number in &class.numbers {
                class.interest.set(*number, true);
            }
            class.token = first_bits(&hasher.finalize());
            if let Some(same) = self.by_selections.get(&class.numbers).copied() {
                class.building = Some(building);
                self.merge(id, same, selections, origins);
                return same;
            }
            self.by_selections.insert(class.numbers.clone(), id);
            building.stage = Stage::Judging { origin: 0, of_origin: None, cursor: JudgingCursor::default() };
        }
        while left > 0 && building.prepared.is_none() {
            if class.numbers.is_empty() || building.is_scanned(origins) {
                for number in &building.unjudged {
                    self.unjudged.set(*number, false);
                }
                return id;
            }
            let began = selections.evaluated();
            let of_origins = building.prepare(class, origins, selections, left * EVALUATIONS_PER_UPDATE);
            left = left.saturating_sub(1 + selections.evaluated_since(began) / EVALUATIONS_PER_UPDATE);
            let evaluation = Evaluation { class: id, wanted: Arc::clone(&building.wanted), of_origins };
            // Little is evaluated at once.
            match evaluation.evaluations() <= slice {
                true => class.answer(origins, &evaluation, &evaluation.answers()),
                false => building.prepared = Some(Arc::new(evaluation)),
            }
        }
        class.building = Some(building);
        id
    }

    /// What is to be evaluated before a class is built further, unless it is being evaluated.
    pub(super) fn prepared(&self, id: ClassId) -> Option<Arc<Evaluation>> {
        let prepared = self.all[id].building.as_ref()?.prepared.as_ref()?;
        (Arc::strong_count(prepared) == 1).then(|| Arc::clone(prepared))
    }

    /// Takes over the answers of an evaluation.
    pub(super) fn take_evaluated(&mut self, evaluated: &Evaluated, origins: &mut [Option<Origin>]) {
        let Evaluated { of, answers } = evaluated;
        // The number of a class that was released may have been given to another one.
        let Some(class) = self.all.get_mut(of.class) else { return };
        let Some(building) = class.building.as_mut() else { return };
        if building.prepared.as_ref().is_some_and(|prepared| Arc::ptr_eq(prepared, of)) {
            building.prepared = None;
            class.answer(origins, of, answers);
        }
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
    /// Each origin is scanned, and nothing is left to be evaluated.
    fn is_scanned(&self, origins: &[Option<Origin>]) -> bool {
        matches!(self.stage, Stage::Scanning { origin, .. } if origin >= origins.len()) && self.prepared.is_none()
    }

    /// Goes on in the present stage for the time of about `most` evaluations, and returns what is to be evaluated.
    fn prepare(
        &mut self,
        class: &mut Class,
        origins: &[Option<Origin>],
        selections: &Selections,
        most: usize,
    ) -> Vec<Questions> {
        let (began, mut all) = (selections.evaluated(), Vec::new());
        let left = || most.saturating_sub(selections.evaluated_since(began));
        while left() > 0 {
            selections.charge(1);
            match &mut self.stage {
                Stage::Numbering { .. } => break,
                Stage::Judging { origin: number, .. } if *number >= origins.len() => {
                    self.stage = Stage::Scanning { origin: 0, slot: 0 };
                    // What is scanned depends on what was judged.
                    break;
                }
                Stage::Scanning { origin: number, .. } if *number >= origins.len() => break,
                Stage::Judging { origin: number, of_origin, cursor } => {
                    let next = origins[*number].as_ref().and_then(|origin| {
                        let fresh = of_origin.get_or_insert_with(|| {
                            let unjudged = self.unjudged.iter().copied();
                            unjudged.filter(|number| selections.concerns(*number, &origin.name)).collect()
                        });
                        let mut questions = Questions::new(*number, origin);
                        let next =
                            origin.profile_questions(fresh, selections, *cursor, left(), &mut questions.profiles);
                        all.extend((!questions.profiles.is_empty()).then_some(questions));
                        next
                    });
                    match next {
                        Some(next) => *cursor = next,
                        None => (*number, *of_origin, *cursor) = (*number + 1, None, JudgingCursor::default()),
                    }
                }
                Stage::Scanning { origin: number, slot } => {
                    let Some(origin) = origins[*number].as_ref() else {
                        *number += 1;
                        continue;
                    };
                    let mut questions = Questions::new(*number, origin);
                    let view = view_of(&mut class.views, *number);
                    while *slot < origin.slot_bound() && left() > 0 {
                        match origin.selected(*slot, &class.interest, selections) {
                            Selected::No => {}
                            Selected::Yes => view.add_endpoint(origin, *slot),
                            Selected::IfOneMatches(question) => {
                                question.candidates().iter().for_each(|number| selections.charge_evaluation(*number));
                                questions.endpoints.push(question);
                            }
                        }
                        selections.charge(EVALUATIONS_PER_UPDATE / SLOTS_PER_UPDATE);
                        *slot += 1;
                    }
                    if *slot >= origin.slot_bound() {
                        (*number, *slot) = (*number + 1, 0);
                    }
                    all.extend((!questions.endpoints.is_empty()).then_some(questions));
                }
            }
        }
        all
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
        match self.building.as_ref().map(|building| &building.stage) {
            None => u32::MAX,
            Some(Stage::Scanning { origin, .. }) if number < *origin => u32::MAX,
            Some(Stage::Scanning { origin, slot }) if number == *origin => *slot,
            Some(_) => 0,
        }
    }

    /// Takes over the answers of an evaluation where what they depend on is unchanged.
    fn answer(&mut self, origins: &mut [Option<Origin>], evaluation: &Evaluation, answers: &[Answers]) {
        for (questions, answers) in evaluation.of_origins.iter().zip(answers) {
            let Some(origin) = origins[questions.origin].as_mut() else { continue };
            let (changed, grant) = (origin.version != questions.version, &questions.grant);
            for (question, judged) in questions.profiles.iter().zip(&answers.profiles) {
                origin.answer_profile(question, judged, grant, changed);
            }
            let view = view_of(&mut self.views, questions.origin);
            for (question, selected) in questions.endpoints.iter().zip(&answers.endpoints) {
                if *selected && (!changed || origin.is_unchanged(question, grant)) {
                    view.add_endpoint(origin, question.slot());
                }
            }
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
