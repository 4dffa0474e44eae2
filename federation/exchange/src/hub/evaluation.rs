//! What a class needs evaluated before it is built. It is made from the state of the exchange, evaluated while others use the
//! exchange, and the answers are taken over where what they depend on is unchanged. What has changed meanwhile was judged when it
//! changed, also for the selections of classes that are being built.

use std::sync::Arc;

use hanse_policy::inventory::LabelGrant;
use hashbrown::HashMap;

use super::origin::{EndpointQuestion, Judged, Origin, ProfileQuestion};
use super::views::ClassId;
use crate::model::Wanted;

/// A part of the work that builds a class.
#[derive(Debug)]
pub struct Evaluation {
    pub(super) class: ClassId,
    /// The selections of the class by number.
    pub(super) wanted: Arc<HashMap<u32, Arc<Wanted>>>,
    pub(super) of_origins: Vec<Questions>,
}

/// Questions about one origin, at one state of it.
#[derive(Debug)]
pub(super) struct Questions {
    pub(super) origin: usize,
    pub(super) version: u64,
    pub(super) grant: LabelGrant,
    pub(super) profiles: Vec<ProfileQuestion>,
    pub(super) endpoints: Vec<EndpointQuestion>,
}

/// An evaluation with its answers.
#[derive(Debug)]
pub struct Evaluated {
    pub(super) of: Arc<Evaluation>,
    pub(super) answers: Vec<Answers>,
}

/// In the order of the questions.
#[derive(Debug)]
pub(super) struct Answers {
    pub(super) profiles: Vec<Judged>,
    pub(super) endpoints: Vec<bool>,
}

impl Evaluation {
    /// Evaluates it. This takes some 30 ms at most, and needs no access to the exchange.
    pub fn evaluate(self: Arc<Self>) -> Evaluated {
        let answers = self.answers();
        Evaluated { of: self, answers }
    }

    pub(super) fn answers(&self) -> Vec<Answers> {
        let wanted = |number: u32| self.wanted.get(&number).map(|wanted| &**wanted);
        let of_origin = |it: &Questions| Answers {
            profiles: it.profiles.iter().map(|question| question.evaluate(&it.grant, wanted)).collect(),
            endpoints: it.endpoints.iter().map(|question| question.evaluate(&it.grant, wanted)).collect(),
        };
        self.of_origins.iter().map(of_origin).collect()
    }

    /// How many selections are evaluated, each once for each profile or endpoint.
    pub(super) fn evaluations(&self) -> usize {
        let of_profiles = self.of_origins.iter().flat_map(|it| &it.profiles).map(|it| it.candidates().len());
        let of_endpoints = self.of_origins.iter().flat_map(|it| &it.endpoints).map(|it| it.candidates().len());
        of_profiles.chain(of_endpoints).sum()
    }
}

impl Questions {
    pub(super) fn new(number: usize, origin: &Origin) -> Self {
        let (profiles, endpoints) = Default::default();
        Self { origin: number, version: origin.version, grant: origin.label_grant().clone(), profiles, endpoints }
    }
}
