//! A backend without a kernel, which fails on command.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hanse_dataplane::{Applied, Backend, Decisions, Error, Finding, Found, LearnedAddress, Object, Refusal, Rejection};
use hanse_ruleset::{EndpointId, LocalEndpoint, PolicyId, RuleSet, SetId};

/// The state of the dataplane, which outlives the backend as a kernel's does, and its script.
#[derive(Debug, Default)]
pub struct State {
    /// The rules in force.
    pub rules: Option<Arc<RuleSet>>,
    /// The rules in force are not what their digest says.
    pub damaged: bool,
    /// Generation numbers of all calls of `apply`, also of those that failed.
    pub attempts: Vec<u64>,
    /// When repairs failed.
    pub failed_repairs: Vec<Instant>,
    /// Calls of each kind that fail from now on.
    pub failing: Failing,
    /// Policies that are refused.
    pub refuses: BTreeSet<PolicyId>,
    /// The findings of pods; the others are enforced.
    pub findings: BTreeMap<EndpointId, Finding>,
    /// `apply` panics.
    pub panics: bool,
}

#[derive(Debug, Default)]
pub struct Failing {
    pub adopt: u32,
    pub apply: u32,
    pub repair: u32,
    pub probe: u32,
    pub findings: u32,
}

#[derive(Debug, Clone, Default)]
pub struct Fake {
    state: Arc<Mutex<State>>,
    /// Applied last by this backend: what it repairs.
    applied: Option<Arc<RuleSet>>,
}

impl Fake {
    /// The script and the state, which all clones share.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A backend of a new process on the same dataplane.
    pub fn backend(&self) -> Box<dyn Backend> {
        Box::new(Self { applied: None, ..self.clone() })
    }

    /// The number of the generation in force.
    pub fn number(&self) -> Option<u64> {
        self.state().rules.as_ref().map(|rules| rules.generation.number)
    }
}

fn step(left: &mut u32) -> Result<(), Error> {
    match *left {
        0 => Ok(()),
        _ => {
            *left -= 1;
            Err(Error::Access(io::ErrorKind::BrokenPipe.into()))
        }
    }
}

impl Backend for Fake {
    fn adopt(&mut self, expected: Option<&Arc<RuleSet>>) -> Result<Found, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        step(&mut state.failing.adopt)?;
        let Some(rules) = &state.rules else { return Ok(Found::Nothing) };
        self.applied = expected.filter(|it| it.digest() == rules.digest()).cloned();
        Ok(Found::Rules { generation: rules.generation, digest: rules.digest() })
    }

    fn apply(&mut self, next: &Arc<RuleSet>) -> Result<Applied, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.attempts.push(next.generation.number);
        assert!(!state.panics, "the script says so");
        step(&mut state.failing.apply)?;
        let refused = next.policies.iter().filter(|(id, _)| state.refuses.contains(id));
        let refused = refused.map(|(id, policy)| refusal(*id, &policy.name)).collect();
        (state.rules, state.damaged) = (Some(Arc::clone(next)), false);
        self.applied = Some(Arc::clone(next));
        Ok(Applied { refused })
    }

    fn repair(&mut self) -> Result<bool, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(applied) = self.applied.clone() else { return Ok(false) };
        if !state.damaged && state.rules.is_some() {
            return Ok(false);
        }
        if state.failing.repair > 0 {
            state.failed_repairs.push(Instant::now());
        }
        step(&mut state.failing.repair)?;
        (state.rules, state.damaged) = (Some(applied), false);
        Ok(true)
    }

    fn probe(&mut self, _endpoints: &[Arc<LocalEndpoint>]) -> Result<(), Error> {
        step(&mut self.state().failing.probe)
    }

    fn findings(&mut self, endpoints: &[Arc<LocalEndpoint>]) -> Result<BTreeMap<EndpointId, Finding>, Error> {
        let mut state = self.state();
        step(&mut state.failing.findings)?;
        let finding = |id: &EndpointId| state.findings.get(id).cloned().unwrap_or(Finding::Enforced);
        Ok(endpoints.iter().map(|pod| (pod.id.clone(), finding(&pod.id))).collect())
    }

    fn decisions(&mut self) -> io::Result<Box<dyn Decisions>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn learn(&mut self, _set: SetId, members: &[LearnedAddress]) -> Result<usize, Error> {
        Ok(members.len())
    }

    fn cleanup(&mut self) -> Result<(), Error> {
        self.state().rules = None;
        Ok(())
    }
}

pub fn refusal(id: PolicyId, name: &Arc<str>) -> Refusal {
    let object = Object::Policy { id, name: Arc::clone(name) };
    Refusal { object, rejection: Rejection { error: "too large".into(), set: None } }
}
