//! Whether the members and agents of a release run as its newest version says.

use std::time::Duration;

use anyhow::Context as _;
use hanse_kubernetes::answered;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use kube::{Api, Client};

use super::Place;
use super::target::{name_of, until};

/// Pods of one component of a release.
#[derive(Debug, Default)]
pub struct Pods {
    pub wanted: usize,
    /// Those of the newest version.
    pub updated: usize,
    pub ready: usize,
}

impl Pods {
    pub fn are_ready(&self) -> bool {
        self.updated >= self.wanted && self.ready >= self.wanted
    }
}

/// The state of the agents; `None`: the release has none.
pub async fn agents(client: &Client, place: &Place) -> anyhow::Result<Option<Pods>> {
    let api: Api<DaemonSet> = Api::namespaced(client.clone(), &place.namespace);
    let found = answered(api.get_opt(&format!("{}-agent", name_of(place)))).await;
    let Some(set) = found.context("read the agents' DaemonSet")? else { return Ok(None) };
    let generation = set.metadata.generation;
    let Some(status) = set.status.filter(|it| it.observed_generation == generation) else {
        // The controller has not seen it yet.
        return Ok(Some(Pods { wanted: 1, ..Pods::default() }));
    };
    Ok(Some(Pods {
        wanted: count(Some(status.desired_number_scheduled)),
        updated: count(status.updated_number_scheduled),
        ready: count(Some(status.number_ready)),
    }))
}

/// Waits until all members and agents run and are ready. Helm does not wait for the last ones. Returns the number of nodes.
pub async fn ready(client: &Client, place: &Place, timeout: Duration) -> anyhow::Result<usize> {
    until(timeout, "wait until all members and agents are ready", async || {
        let members = members(client, place).await?;
        let agents = agents(client, place).await?.unwrap_or_default();
        match agents.are_ready() && members.are_ready() {
            true => Ok(Ok(agents.wanted)),
            false => Ok(Err(format!(
                "ready: {} of {} members, {} of {} agents",
                members.updated.min(members.ready),
                members.wanted,
                agents.updated.min(agents.ready),
                agents.wanted
            ))),
        }
    })
    .await
}

async fn members(client: &Client, place: &Place) -> anyhow::Result<Pods> {
    let api: Api<Deployment> = Api::namespaced(client.clone(), &place.namespace);
    let found = answered(api.get_opt(&format!("{}-member", name_of(place)))).await;
    let Some(deployment) = found.context("read the member's Deployment")? else { return Ok(Pods::default()) };
    let status = deployment.status.unwrap_or_default();
    let is_seen = status.observed_generation == deployment.metadata.generation;
    let wanted = count(deployment.spec.and_then(|it| it.replicas).or(Some(1)));
    let (updated, ready) = (count(status.updated_replicas), count(status.ready_replicas));
    Ok(Pods { wanted, updated: if is_seen { updated } else { 0 }, ready })
}

fn count(number: Option<i32>) -> usize {
    usize::try_from(number.unwrap_or_default()).unwrap_or_default()
}
