//! What people look at: the status of clusters, nodes and objects, and changes of objects as they happen.

use std::sync::Arc;
use std::time::Duration;

use hanse_identity::Identity;
use hanse_identity::tls::Peer;
use hanse_proto::federation::v1 as wire;
use hanse_protocol::reason::wire as reason;
use hanse_runtime::supervisor::caught;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tonic::Status;

use super::convert;
use super::operators;
use super::state::Administration;
use crate::manifest::{self, Kind, ObjectId};
use crate::registry::{Acceptance, Object, Snapshot};
use crate::status::{NodeProgress, ObjectState, Problem, Reasons};

/// Items of a problem that a status names.
const FIRST: usize = 3;
/// A page of nodes ends behind the node with which it has this many bytes. One node has at most 4 MiB, since its member's report
/// has.
const PAGE_BYTES: usize = 2 << 20;
/// A message of changes ends behind the object with which it has this many bytes; an object has at most 256 KiB.
const CHANGES_BYTES: usize = 1 << 20;
/// Messages that wait for one watcher: 2 × about 1 MiB.
const OUTBOX: usize = 2;

impl Administration {
    /// The state of the hub and of all clusters.
    pub(super) fn status(&self, snapshot: &Snapshot) -> wire::StatusResponse {
        wire::StatusResponse {
            revision: snapshot.revision,
            clusters: self.cluster_status(snapshot),
            store_unavailable_ms: self.registry.unavailable_for().map(milliseconds),
            operator: operators::status(self.management.as_ref(), &snapshot.operators, self.registry.now_seconds()),
        }
    }

    fn cluster_status(&self, snapshot: &Snapshot) -> Vec<wire::ClusterStatus> {
        let mut realisations = self.realisations.clusters();
        let peers = self.connections.peers();
        let mut statuses = Vec::with_capacity(snapshot.clusters.len());
        for (name, cluster) in &snapshot.clusters {
            let realisation = realisations.remove(name).unwrap_or_default();
            let identity = Identity::Cluster(name.clone());
            let is_open = |peer: &&Peer| peer.identity() == Some(&identity) && !peer.closed.is_cancelled();
            let peer = peers.iter().find(is_open);
            let member = snapshot.members.get(name).map(|m| &m.record);
            // Without a MemberCluster, there is no grant.
            let object = ObjectId { kind: Kind::MemberCluster, name: name.clone() };
            let is_granted = snapshot.objects.contains_key(&object);
            statuses.push(wire::ClusterStatus {
                name: name.to_string(),
                state: convert::state_name(&cluster.state).to_owned(),
                connected: realisation.connected,
                lease: convert::lease_name(cluster.lease).to_owned(),
                age_ms: self.age_ms(name),
                epoch: realisation.epoch,
                revision: realisation.revision,
                endpoints: realisation.endpoints,
                digests_equal: realisation.digests_equal,
                enforced_revision: realisation.enforced_revision,
                received_revision: realisation.received_revision,
                agents: realisation.agents,
                agents_current: realisation.agents_current,
                certificate_expires_at: member.map_or(0, |m| m.certificate_expires_at),
                key_exchange: peer.map_or_else(String::new, |peer| peer.key_exchange.to_owned()),
                refused: realisation.refused,
                refusals: realisation.refusals,
                unenforced: realisation.unenforced,
                problems: realisation.problems.into_iter().map(|it| problem_to_wire(it, FIRST)).collect(),
                problems_total: realisation.problems_total,
                warnings: if is_granted { cluster.grant.warnings() } else { Vec::new() },
            });
        }
        statuses
    }

    fn age_ms(&self, cluster: &str) -> Option<u64> {
        self.registry.silent_for(cluster).map(milliseconds)
    }

    /// One page of the nodes of all clusters.
    pub(super) fn nodes(&self, snapshot: &Snapshot, request: &wire::ListNodesRequest) -> wire::ListNodesResponse {
        let after = request.after.clone().unwrap_or_default();
        let wanted = |of: &str, name: &str| of.is_empty() || of == name;
        let clusters =
            snapshot.clusters.keys().filter(|name| wanted(&request.cluster, name) && ***name >= *after.cluster);
        let mut page = wire::ListNodesResponse::default();
        let mut bytes = 0;
        for cluster in clusters {
            for node in self.realisations.nodes(cluster) {
                let seen = **cluster == *after.cluster && node.name <= after.node;
                if seen || !wanted(&request.node, &node.name) || request.only_problems && node.problems.is_empty() {
                    continue;
                }
                if bytes >= PAGE_BYTES {
                    page.more = true;
                    return page;
                }
                let node = node_to_wire(cluster, node);
                bytes += node.encoded_len();
                page.nodes.push(node);
            }
        }
        page
    }

    /// Where an object, or its deletion, is enforced.
    pub(super) fn object_status(
        &self,
        snapshot: &Snapshot,
        id: &ObjectId,
        gone_at: u64,
    ) -> Result<wire::ObjectStatusResponse, Status> {
        let states = self.realisations.object(id, gone_at);
        let states = states.ok_or_else(|| Status::unavailable(format!("{id} is not distributed yet: try again")))?;
        let clusters = states.into_iter().map(|(cluster, status)| {
            use wire::object_in_cluster::State;
            let state = match status.state {
                ObjectState::Enforced => State::Enforced(wire::Enforced {}),
                ObjectState::Lagging(reasons) => State::Lagging(reasons_to_wire(reasons)),
                ObjectState::Refused(reasons) => State::Refused(reasons_to_wire(reasons)),
            };
            wire::ObjectInCluster {
                age_ms: self.age_ms(&cluster),
                cluster: cluster.to_string(),
                state: Some(state),
                nodes_enforcing: status.nodes_enforcing,
                nodes: status.nodes,
            }
        });
        let object = snapshot.objects.get(id);
        let converted = object.and_then(|object| object.converted().ok());
        let acceptance = snapshot.acceptance(id).filter(|it| *it != Acceptance::Accepted);
        let not_accepted = acceptance.map(|it| it.to_string());
        Ok(wire::ObjectStatusResponse {
            revision: object.map_or(0, |object| object.revision),
            clusters: clusters.collect(),
            hub_revision: snapshot.revision,
            warnings: converted.map(manifest::warnings).into_iter().flatten().chain(not_accepted).collect(),
        })
    }
}

/// Which objects a request is about.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub kind: Option<Kind>,
    /// Empty: every name.
    pub name: String,
}

impl Wanted {
    pub fn includes(&self, id: &ObjectId) -> bool {
        self.kind.is_none_or(|kind| kind == id.kind) && (self.name.is_empty() || self.name == *id.name)
    }
}

pub(super) type Changes = mpsc::Receiver<Result<wire::ObjectChanges, Status>>;

/// Sends the objects and then their changes, until the reader disconnects. Changes of one object are coalesced.
pub(super) fn watch_objects(
    mut view: watch::Receiver<Arc<Snapshot>>,
    wanted: Wanted,
    permit: OwnedSemaphorePermit,
) -> Changes {
    let (outbox, changes) = mpsc::channel(OUTBOX);
    let failed = outbox.clone();
    let watching = async move {
        let _permit = permit;
        let mut sent = Arc::new(Snapshot::default());
        loop {
            let newest = Arc::clone(&view.borrow_and_update());
            let messages = difference(&sent, &newest, &wanted);
            if !messages.is_empty() || sent.revision == 0 {
                for message in messages {
                    if outbox.send(Ok(message)).await.is_err() {
                        return;
                    }
                }
                let end = wire::ObjectChanges { changes: Vec::new(), revision: newest.revision };
                if outbox.send(Ok(end)).await.is_err() {
                    return;
                }
            }
            sent = newest;
            tokio::select! {
                changed = view.changed() => if changed.is_err() { return },
                () = outbox.closed() => return,
            }
        }
    };
    // A panic ends this stream only. It is counted, and the reader receives an error.
    tokio::spawn(async move {
        if let Err(panicked) = caught("a stream of changed objects", watching).await {
            let _ = failed.send(Err(Status::internal(panicked.to_string()))).await;
        }
    });
    changes
}

/// The changes between two views.
fn difference(old: &Snapshot, new: &Snapshot, wanted: &Wanted) -> Vec<wire::ObjectChanges> {
    let kept = |of: &Snapshot, id: &ObjectId, object: &Arc<Object>| {
        of.objects.get(id).is_some_and(|other| Arc::ptr_eq(other, object) || other.revision == object.revision)
    };
    let written = new.objects.iter().filter(|(id, object)| wanted.includes(id) && !kept(old, id, object));
    let deleted = old.objects.iter().filter(|(id, _)| wanted.includes(id) && !new.objects.contains_key(*id));
    let changes = written.map(|(_, object)| (object, false)).chain(deleted.map(|(_, object)| (object, true)));
    let mut messages: Vec<wire::ObjectChanges> = Vec::new();
    let mut bytes = CHANGES_BYTES;
    for (object, deleted) in changes {
        if bytes >= CHANGES_BYTES {
            messages.push(wire::ObjectChanges::default());
            bytes = 0;
        }
        bytes += object.manifest.len() + object.id.name.len();
        let change = wire::ObjectChange { object: Some(convert::object_to_wire(object)), deleted };
        messages.last_mut().expect("one was pushed").changes.push(change);
    }
    messages
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn problem_to_wire(problem: Problem, most: usize) -> wire::Problem {
    let Problem { node, at, reason: why, items, count } = problem;
    let items = items.iter().take(most).map(reason::subject).collect();
    let at = at.as_ref().map(reason::object);
    wire::Problem { node, reason: Some(reason::reason(&why)), items, count, at }
}

fn reasons_to_wire(reasons: Reasons) -> wire::Reasons {
    let first = reasons.first.into_iter().map(|it| wire::NodeReason {
        node: it.node,
        reason: Some(reason::reason(&it.reason)),
        at: it.at.as_ref().map(reason::object),
    });
    wire::Reasons { first: first.collect(), more: reasons.more }
}

fn node_to_wire(cluster: &str, node: NodeProgress) -> wire::NodeInfo {
    let (term, number) = node.generation;
    wire::NodeInfo {
        id: Some(wire::NodeId { cluster: cluster.to_owned(), node: node.name }),
        state: convert::node_state_name(node.state).to_owned(),
        connected: node.connected,
        term,
        number,
        hub_revision: node.hub_revision,
        local_revision: node.local_revision,
        age_ms: node.age.map(milliseconds),
        agent_version: node.agent_version,
        unenforced: node.unenforced,
        problems: node.problems.into_iter().map(|it| problem_to_wire(it, usize::MAX)).collect(),
    }
}
