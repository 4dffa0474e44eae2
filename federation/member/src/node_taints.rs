//! The taint of nodes that come later: pods wait until the node's agent has its first rules.
//!
//! Nodes that exist when the member starts for the first time are never tainted: their pods would not return after a restart. A node that is
//! created later gets the taint at once, unless it registers with it (`--register-with-taints` of a kubelet). It is removed when its agent
//! acknowledges rules, or when the labels of the node say that no agent runs there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hanse_api::inventory::AGENT_NOT_READY;
use hanse_kubernetes::{Access, answered};
use hanse_policy::inventory::Labels;
use hanse_runtime::health::Writes;
use hanse_runtime::retry::Backoff;
use k8s_openapi::api::core::v1::{Node, Taint};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::api_server::Reported;
use crate::fanout::{Fanout, Readiness};
use crate::state::State;

const NO_SCHEDULE: &str = "NoSchedule";
/// The time of the newest node that existed at the first start.
const NEWEST_AT_START: &str = "newest-node-at-start";
/// How often the acknowledgements of agents are looked at.
const EVERY: Duration = Duration::from_secs(2);
const PAGE: u32 = 500;

/// What happens to the taint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeTaints {
    Leave,
    /// Nodes that come later have it until their agents have rules. Agents run on the nodes with all of these labels.
    Until(BTreeMap<String, String>),
    /// No node keeps it.
    Remove,
}

impl NodeTaints {
    /// Whether taints are looked at.
    pub fn are_kept(&self) -> bool {
        *self != Self::Leave
    }

    /// Whether an agent is to run on a node with these labels.
    pub fn have_agent(&self, labels: &Labels) -> bool {
        match self {
            Self::Leave => true,
            Self::Until(of_agents) => {
                of_agents.iter().all(|(key, value)| labels.get(key.as_str()).is_some_and(|it| **it == **value))
            }
            Self::Remove => false,
        }
    }
}

/// Sets and removes the taint, until `stop`.
pub async fn keep_taints(
    taints: NodeTaints,
    access: Access,
    fanout: Fanout,
    state: State,
    writes: Writes,
    stop: CancellationToken,
) {
    let mut taints = Taints { taints, access, fanout, state, examined: BTreeMap::new() };
    let mut reported = Reported::new(writes, "the taints of nodes");
    let mut backoff = Backoff::default();
    let mut nodes = taints.fanout.source_changes();
    loop {
        nodes.mark_unchanged();
        let kept = taints.keep().await;
        reported.note(&kept);
        let wait = match kept {
            Ok(()) => {
                backoff.reset();
                EVERY
            }
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "taints of nodes not kept: pods of new nodes may be open");
                backoff.next_delay()
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            // At once: the scheduler does not wait either.
            Ok(()) = nodes.changed() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

struct Taints {
    taints: NodeTaints,
    access: Access,
    fanout: Fanout,
    state: State,
    /// What was known of a node when its taint was looked at last. One that was ready is looked at again only if it has the taint.
    examined: BTreeMap<Arc<str>, Readiness>,
}

/// What is to be done with the taint of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Add,
    Remove,
}

impl Taints {
    async fn keep(&mut self) -> anyhow::Result<()> {
        let client = self.access.client().await?;
        let newest = match self.taints {
            NodeTaints::Until(_) => newest_at_start(&client, &self.state).await?,
            NodeTaints::Leave | NodeTaints::Remove => None,
        };
        let nodes = self.fanout.readiness();
        self.examined.retain(|node, _| nodes.contains_key(node));
        let mut outcome = Ok(());
        for (node, (readiness, has_taint)) in nodes {
            let is_examined =
                self.examined.get(&node).is_some_and(|last| *last == readiness || *last == Readiness::Ready);
            // Another program may have set the taint since.
            let must_be_freed = has_taint && readiness != Readiness::Waiting;
            if is_examined && !must_be_freed {
                continue;
            }
            let has_enrolled = self.fanout.has_enrolled(&node);
            match examine(&client, &node, readiness, has_enrolled, newest).await {
                Ok(()) => drop(self.examined.insert(node, readiness)),
                // Others do not wait for it.
                Err(error) => outcome = Err(error.context(format!("node {node}"))),
            }
        }
        outcome
    }
}

/// Changes the taint of a node, if necessary.
async fn examine(
    client: &Client,
    name: &str,
    readiness: Readiness,
    has_enrolled: bool,
    newest_at_start: Option<Timestamp>,
) -> anyhow::Result<()> {
    let api: Api<Node> = Api::all(client.clone());
    // Nodes are listed anyway: this needs no further right.
    let found = answered(api.list(&ListParams::default().fields(&format!("metadata.name={name}")))).await?;
    let Some(node) = found.items.into_iter().next() else { return Ok(()) };
    let created = node.creation_timestamp().map(|it| it.0);
    let taints = node.spec.unwrap_or_default().taints.unwrap_or_default();
    let is_later = created > newest_at_start;
    let Some(change) = change(&taints, readiness, is_later && !has_enrolled) else { return Ok(()) };
    let taints = changed(taints, change);
    // The list of taints is replaced as a whole: only if nobody has changed it since.
    let patch = json!({"metadata": {"resourceVersion": node.metadata.resource_version}, "spec": {"taints": taints}});
    answered(api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await?;
    match change {
        Change::Add => {
            tracing::info!(node = name, taint = AGENT_NOT_READY, "new node tainted until its agent has rules")
        }
        Change::Remove if readiness == Readiness::NoAgent => {
            tracing::info!(node = name, taint = AGENT_NOT_READY, "taint removed: no agent runs on the node")
        }
        Change::Remove => tracing::info!(node = name, taint = AGENT_NOT_READY, "taint removed: the agent has rules"),
    }
    Ok(())
}

fn change(taints: &[Taint], readiness: Readiness, is_new: bool) -> Option<Change> {
    let has_taint = taints.iter().any(|taint| taint.key == AGENT_NOT_READY);
    match (has_taint, readiness) {
        (true, Readiness::Ready | Readiness::NoAgent) => Some(Change::Remove),
        (false, Readiness::Waiting) if is_new => Some(Change::Add),
        _ => None,
    }
}

fn changed(mut taints: Vec<Taint>, change: Change) -> Vec<Taint> {
    match change {
        Change::Add => {
            let (key, effect) = (AGENT_NOT_READY.to_owned(), NO_SCHEDULE.to_owned());
            taints.push(Taint { key, effect, ..Taint::default() });
        }
        Change::Remove => taints.retain(|taint| taint.key != AGENT_NOT_READY),
    }
    taints
}

/// The creation of the newest node at the first start, by the clock of the API server; `None` if there was no node.
async fn newest_at_start(client: &Client, state: &State) -> anyhow::Result<Option<Timestamp>> {
    if let Some(text) = state.read(NEWEST_AT_START).with_context(|| format!("read {NEWEST_AT_START}"))? {
        let text = String::from_utf8_lossy(&text);
        return match text.trim() {
            "" => Ok(None),
            text => Ok(Some(text.parse().with_context(|| format!("parse {NEWEST_AT_START}"))?)),
        };
    }
    let api: Api<Node> = Api::all(client.clone());
    let (mut newest, mut parameters) = (None, ListParams::default().limit(PAGE));
    loop {
        let page = answered(api.list_metadata(&parameters)).await?;
        newest = page.items.iter().filter_map(|node| Some(node.creation_timestamp()?.0)).max().max(newest);
        match page.metadata.continue_.filter(|it| !it.is_empty()) {
            Some(next) => parameters = parameters.continue_token(&next),
            None => break,
        }
    }
    let text = newest.map(|it: Timestamp| it.to_string()).unwrap_or_default();
    let state = state.clone();
    let written = tokio::task::spawn_blocking(move || state.write(NEWEST_AT_START, text.as_bytes())).await?;
    written.with_context(|| format!("write {NEWEST_AT_START}"))?;
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_new_nodes_without_rules_are_tainted() {
        let other = Taint { key: "gpu".to_owned(), effect: NO_SCHEDULE.to_owned(), ..Taint::default() };
        let tainted = changed(vec![other.clone()], Change::Add);
        for (taints, readiness, is_new, expected) in [
            (&[][..], Readiness::Waiting, true, Some(Change::Add)),
            (&[other.clone()][..], Readiness::Waiting, true, Some(Change::Add)),
            (&[other.clone()][..], Readiness::Waiting, false, None),
            (&[][..], Readiness::Ready, true, None),
            (&[][..], Readiness::NoAgent, true, None),
            (&tainted[..], Readiness::Waiting, true, None),
            (&tainted[..], Readiness::Ready, true, Some(Change::Remove)),
            // It registered with the taint.
            (&tainted[..], Readiness::Ready, false, Some(Change::Remove)),
            (&tainted[..], Readiness::NoAgent, false, Some(Change::Remove)),
        ] {
            assert_eq!(change(taints, readiness, is_new), expected, "{taints:?} {readiness:?} {is_new}");
        }
        assert_eq!(changed(tainted, Change::Remove), [other], "the taints of others stay");
    }

    #[test]
    fn agents_run_on_nodes_with_all_labels() {
        let labels = |pairs: &[(&str, &str)]| -> Labels {
            pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
        };
        let of_agents = [("kubernetes.io/os", "linux"), ("pool", "gpu")];
        let until = NodeTaints::Until(of_agents.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect());
        for (of_node, expected) in [
            (&of_agents[..], true),
            (&of_agents[..1], false),
            (&[("kubernetes.io/os", "windows"), ("pool", "gpu")], false),
            (&[], false),
        ] {
            assert_eq!(until.have_agent(&labels(of_node)), expected, "{of_node:?}");
        }
        assert!(NodeTaints::Until(BTreeMap::new()).have_agent(&labels(&[])), "without a selector, on every node");
        assert!(!NodeTaints::Remove.have_agent(&labels(&of_agents)));
    }
}
