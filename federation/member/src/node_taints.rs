//! The taint of nodes that come later: pods wait until the node's agent has its first rules.
//!
//! Nodes that exist when the member starts for the first time are never tainted: their pods would not return after a restart. A node that is
//! created later gets the taint at once, unless it registers with it (`--register-with-taints` of a kubelet). It is removed when its agent
//! acknowledges rules.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hanse_kubernetes::{Access, answered};
use hanse_runtime::retry::Backoff;
use k8s_openapi::api::core::v1::{Node, Taint};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::fanout::Fanout;
use crate::state::State;

/// The key of the taint.
pub const AGENT_NOT_READY: &str = "hanse.dev/agent-not-ready";
const NO_SCHEDULE: &str = "NoSchedule";
/// The time of the newest node that existed at the first start.
const NEWEST_AT_START: &str = "newest-node-at-start";
/// How often the acknowledgements of agents are looked at.
const EVERY: Duration = Duration::from_secs(2);
const PAGE: u32 = 500;

/// Sets and removes the taint, until `stop`.
pub async fn keep_taints(access: Access, fanout: Fanout, state: State, stop: CancellationToken) {
    let mut taints = Taints { access, fanout, state, is_examined: BTreeSet::new(), is_done: BTreeSet::new() };
    let mut backoff = Backoff::default();
    let mut nodes = taints.fanout.source_changes();
    loop {
        nodes.mark_unchanged();
        let wait = match taints.keep().await {
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
    access: Access,
    fanout: Fanout,
    state: State,
    /// Nodes that were looked at while their agents had no rules.
    is_examined: BTreeSet<Arc<str>>,
    /// Nodes whose agents have rules, and which have no taint.
    is_done: BTreeSet<Arc<str>>,
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
        let newest = newest_at_start(&client, &self.state).await?;
        let nodes = self.fanout.readiness();
        self.is_examined.retain(|node| nodes.contains_key(node));
        self.is_done.retain(|node| nodes.contains_key(node));
        let mut outcome = Ok(());
        for (node, is_ready) in nodes {
            let known = if is_ready { &self.is_done } else { &self.is_examined };
            if known.contains(&node) || self.is_done.contains(&node) {
                continue;
            }
            let has_enrolled = self.fanout.has_enrolled(&node);
            match examine(&client, &node, is_ready, has_enrolled, newest).await {
                Ok(()) if is_ready => self.is_done.insert(node),
                Ok(()) => self.is_examined.insert(node),
                // Others do not wait for it.
                Err(error) => {
                    outcome = Err(error.context(format!("node {node}")));
                    continue;
                }
            };
        }
        outcome
    }
}

/// Changes the taint of a node, if necessary.
async fn examine(
    client: &Client,
    name: &str,
    is_ready: bool,
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
    let Some(change) = change(&taints, is_ready, is_later && !has_enrolled) else { return Ok(()) };
    let taints = changed(taints, change);
    // The list of taints is replaced as a whole: only if nobody has changed it since.
    let patch = json!({"metadata": {"resourceVersion": node.metadata.resource_version}, "spec": {"taints": taints}});
    answered(api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await?;
    match change {
        Change::Add => {
            tracing::info!(node = name, taint = AGENT_NOT_READY, "new node tainted until its agent has rules")
        }
        Change::Remove => tracing::info!(node = name, taint = AGENT_NOT_READY, "taint removed: the agent has rules"),
    }
    Ok(())
}

fn change(taints: &[Taint], is_ready: bool, is_new: bool) -> Option<Change> {
    let has_taint = taints.iter().any(|taint| taint.key == AGENT_NOT_READY);
    match (has_taint, is_ready) {
        (true, true) => Some(Change::Remove),
        (false, false) if is_new => Some(Change::Add),
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
        for (taints, is_ready, is_new, expected) in [
            (&[][..], false, true, Some(Change::Add)),
            (&[other.clone()][..], false, true, Some(Change::Add)),
            (&[other.clone()][..], false, false, None),
            (&[][..], true, true, None),
            (&tainted[..], false, true, None),
            (&tainted[..], true, true, Some(Change::Remove)),
            // It registered with the taint.
            (&tainted[..], true, false, Some(Change::Remove)),
        ] {
            assert_eq!(change(taints, is_ready, is_new), expected, "{taints:?} {is_ready} {is_new}");
        }
        assert_eq!(changed(tainted, Change::Remove), [other], "the taints of others stay");
    }
}
