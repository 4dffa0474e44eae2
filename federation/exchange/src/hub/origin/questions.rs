//! What is to be evaluated for a profile or an endpoint, with all that the answer depends on: it can be evaluated while the origin
//! changes.

use std::sync::Arc;

use hanse_policy::inventory::{LabelGrant, NamedPort};

use super::profiles::ProfileId;
use crate::hub::selections::{EffectiveLabels, KnownLabels, may_match, needs_endpoints};
use crate::model::Wanted;

/// Which of these selections match all endpoints of a profile.
#[derive(Debug)]
pub struct ProfileQuestion {
    pub(super) profile: ProfileId,
    pub(super) labels: EffectiveLabels,
    pub(super) own_keys: Vec<(Arc<str>, u32)>,
    /// Numbers of selections, in order.
    pub(super) candidates: Vec<u32>,
}

/// The answer, in order.
#[derive(Debug, Default)]
pub struct Judged {
    /// Selections that match, or may match, all endpoints of the profile.
    pub matches: Vec<u32>,
    /// Selections that must be evaluated for each of them.
    pub per_endpoint: Vec<u32>,
}

/// Whether one of these selections matches an endpoint.
#[derive(Debug)]
pub struct EndpointQuestion {
    pub(super) slot: u32,
    pub(super) labels: EffectiveLabels,
    pub(super) ports: Vec<NamedPort>,
    pub(super) candidates: Vec<u32>,
}

/// Whether an interest selects an endpoint.
#[derive(Debug)]
pub enum Selected {
    Yes,
    No,
    IfOneMatches(EndpointQuestion),
}

impl ProfileQuestion {
    pub fn candidates(&self) -> &[u32] {
        &self.candidates
    }

    pub fn evaluate<'a>(&self, grant: &LabelGrant, wanted: impl Fn(u32) -> Option<&'a Wanted>) -> Judged {
        let known = KnownLabels { pairs: &self.labels, grant };
        let mut judged = Judged::default();
        for number in self.candidates.iter().copied() {
            let Some(wanted) = wanted(number) else { continue };
            if needs_endpoints(wanted, &self.own_keys) {
                judged.per_endpoint.push(number);
            } else if may_match(wanted, &known) {
                judged.matches.push(number);
            }
        }
        judged
    }
}

impl EndpointQuestion {
    pub fn slot(&self) -> u32 {
        self.slot
    }

    pub fn candidates(&self) -> &[u32] {
        &self.candidates
    }

    pub fn evaluate<'a>(&self, grant: &LabelGrant, wanted: impl Fn(u32) -> Option<&'a Wanted>) -> bool {
        let known = KnownLabels { pairs: &self.labels, grant };
        self.candidates.iter().filter_map(|number| wanted(*number)).any(|wanted| {
            let names = wanted.port_names();
            (names.is_empty() || self.ports.iter().any(|port| names.contains(&port.name))) && may_match(wanted, &known)
        })
    }
}
