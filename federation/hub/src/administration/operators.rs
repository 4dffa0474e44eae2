//! The state of the operators of all hubs in one status.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_proto::federation::v1 as wire;

use crate::management::{MAX_PROBLEMS, Monitor, NO_LEADER, clipped};
use crate::registry::records::OperatorRecord;

/// Problems in a status: 32 × at most 600 characters.
const MAX_SHOWN: usize = 32;

/// `stored`: what the hubs wrote to the store; that of this process is newer. `now`: in seconds since 1970. `None`: no hub has an operator.
pub(super) fn status(
    local: Option<&Monitor>,
    stored: &BTreeMap<Arc<str>, Arc<OperatorRecord>>,
    now: u64,
) -> Option<wire::OperatorStatus> {
    let mut states: BTreeMap<Arc<str>, Arc<OperatorRecord>> = stored.clone();
    states.extend(local.map(|it| (Arc::clone(it.identity()), Arc::new(it.record()))));
    if states.is_empty() {
        return None;
    }
    let age_ms = |since: u64| now.saturating_sub(since).saturating_mul(1_000);
    let leads = states.iter().filter_map(|(hub, state)| Some((state.leads_since?, hub)));
    // The Lease may be that of a hub that has written nothing to the store.
    let seen = || states.values().find_map(|state| state.leader.clone());
    let (leader, leading_ms) = match leads.max() {
        Some((since, hub)) => (hub.to_string(), Some(age_ms(since))),
        None => (seen().unwrap_or_default(), None),
    };
    let (mut problems, mut total) = (Vec::new(), 0_u32);
    let mut leaderless = None;
    for (hub, state) in &states {
        let shown = state.problems.len().min(MAX_PROBLEMS);
        total = total.saturating_add(state.total.saturating_sub(u32::try_from(shown).unwrap_or_default()));
        for it in state.problems.iter().take(MAX_PROBLEMS) {
            let problem = wire::OperatorProblem {
                hub: clipped(hub),
                reason: clipped(&it.reason),
                message: clipped(&it.message),
                age_ms: age_ms(it.since),
            };
            if it.reason != NO_LEADER {
                problems.push(problem);
            } else if leader.is_empty() && leaderless.as_ref().is_none_or(|it| *it < problem.age_ms) {
                // One for all hubs.
                leaderless = Some(problem.age_ms);
                problems.retain(|it| it.reason != NO_LEADER);
                problems.insert(0, problem);
            }
        }
    }
    let problems_total = total.saturating_add(u32::try_from(problems.len()).unwrap_or(u32::MAX));
    problems.truncate(MAX_SHOWN);
    Some(wire::OperatorStatus { leader: clipped(&leader), leading_ms, problems, problems_total })
}

#[cfg(test)]
mod tests {
    use hanse_kubernetes::election::Holder;

    use super::*;
    use crate::management::Task;
    use crate::registry::records::OperatorProblem;

    fn stored(of: &[(&str, OperatorRecord)]) -> BTreeMap<Arc<str>, Arc<OperatorRecord>> {
        of.iter().map(|(name, record)| (Arc::from(*name), Arc::new(record.clone()))).collect()
    }

    fn problem(reason: &str, since: u64) -> OperatorProblem {
        OperatorProblem { reason: reason.to_owned(), message: "why".to_owned(), since }
    }

    #[test]
    fn a_hub_that_does_not_lead_shows_the_leader_and_its_problems() {
        assert_eq!(status(None, &stored(&[]), 100), None);
        let leading = OperatorRecord {
            leads_since: Some(40),
            problems: vec![problem("NotRead", 90)],
            total: 1,
            ..OperatorRecord::default()
        };
        let cut_off = OperatorRecord { problems: vec![problem(NO_LEADER, 50)], total: 1, ..OperatorRecord::default() };
        let local = Monitor::new("hub-2");
        local.attempted(&Ok(Holder::Other("hub-1".to_owned())));
        local.refused(Task::Review, "", "forbidden");
        let all = stored(&[("hub-0", cut_off.clone()), ("hub-1", leading), ("hub-2", cut_off.clone())]);
        let shown = status(Some(&local), &all, 100).expect("there is one");
        assert_eq!((&*shown.leader, shown.leading_ms, shown.problems_total), ("hub-1", Some(60_000), 2));
        let problems: Vec<_> = shown.problems.iter().map(|it| (&*it.hub, &*it.reason)).collect();
        assert_eq!(problems, [("hub-1", "NotRead"), ("hub-2", "RightsNotChecked")], "a leader is known");
        assert_eq!(shown.problems[0].age_ms, 10_000);

        // Without one, all hubs have the same problem.
        let older = OperatorRecord { problems: vec![problem(NO_LEADER, 30)], ..cut_off.clone() };
        let shown = status(None, &stored(&[("hub-0", cut_off), ("hub-1", older)]), 100).expect("there is one");
        assert_eq!((&*shown.leader, shown.leading_ms, shown.problems_total), ("", None, 1));
        assert_eq!((&*shown.problems[0].hub, shown.problems[0].age_ms), ("hub-1", 70_000));
    }

    #[test]
    fn records_of_other_hubs_are_bounded() {
        let many = OperatorRecord {
            problems: vec![OperatorProblem { message: "x".repeat(9_999), ..problem("NotRead", 0) }; 999],
            total: 999,
            ..OperatorRecord::default()
        };
        let all = stored(&[("a", many.clone()), ("b", many)]);
        let shown = status(None, &all, 1).expect("there is one");
        assert_eq!((shown.problems.len(), shown.problems_total), (MAX_SHOWN, 1_998));
        assert!(shown.problems.iter().all(|it| it.message.chars().count() <= 513));
    }
}
