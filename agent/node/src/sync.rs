//! The stream to the member, resumed by digest.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_dataplane::Refusal;
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_protocol::reason::words::Words;
use hanse_protocol::reason::{Failure, FileProblem, Finding, Reason, wire as report};
use hanse_protocol::{self, Assembled, Assembler};
use hanse_ruleset::{Delta, EndpointId, Enforcement, Generation, RuleSet};
use hanse_runtime::health::{Condition, Writes};
use hanse_runtime::retry::Backoff;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tracing::Instrument as _;

use crate::enforcer::Enforcer;
use crate::identity::{NodeIdentity, Rejection, is_refusal};
use crate::metrics::AgentMetrics;
use crate::status::{Status, Unenforced};

/// The largest message that is accepted: 1 MiB and its frame.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024 + 64 * 1024;
/// Messages that wait to be sent: an answer to each of the two that can be in flight.
const OUTBOX: usize = 4;
/// Refusals that one ack names.
const MAX_REFUSALS: usize = 1_000;
/// Pods that one ack names.
const MAX_UNENFORCED: usize = 1_000;

#[derive(Debug)]
pub struct Follower {
    pub node: String,
    pub enforcer: Enforcer,
    /// The rule set in force, as far as it is known.
    pub in_force: Option<Arc<RuleSet>>,
    /// Its objects that the kernel refused.
    pub refused: Vec<Refusal>,
    /// The node's pod ranges, while no rules are known.
    pub pod_ranges: Vec<IpNet>,
    /// While no rules are known: pod ranges are not known either.
    pub open: bool,
    /// The stream is open, and the member has sent the newest rules over it.
    pub connected: bool,
    /// Why it is not connected.
    pub not_in_sync: String,
    /// Distinguishes this process from another one with the same key.
    pub instance: [u8; 16],
    /// Files that cannot be written.
    pub writes: Writes,
    /// True while `connected`, and the rules in the kernel are those of the rule set. Keep-alives detect a silent member within 20 seconds.
    pub in_sync: Condition,
    pub metrics: AgentMetrics,
    pub status: watch::Sender<Status>,
}

impl Follower {
    /// Follows one of `members` until `stop`.
    pub async fn run(mut self, identity: NodeIdentity, members: Vec<String>, stop: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut renewed = identity.credentials.subscribe();
        for member in members.iter().cycle() {
            renewed.mark_unchanged();
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.follow(&identity, member, &mut backoff).instrument(tracing::info_span!("member_stream", member)) => ended,
            };
            match ended {
                Ok(()) => {
                    tracing::info!(member, "stream to the member ended, opening the next");
                    self.disconnected("the stream ended".to_owned());
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(error, member, "not in sync with the member, trying again");
                    self.disconnected(error);
                }
            }
            tokio::select! {
                again = backoff.wait(&stop) => if !again { return },
                // A new certificate may replace one that has expired.
                _ = renewed.changed() => {}
            }
        }
    }

    fn disconnected(&mut self, why: String) {
        (self.connected, self.not_in_sync) = (false, why);
        self.publish();
    }

    /// Closes ranges that arrive when nothing is in force.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn close(&mut self, ranges: Vec<IpNet>) -> anyhow::Result<()> {
        self.enforcer.close(&ranges).await.context("close the pod ranges")?;
        tracing::info!(?ranges, "pod ranges closed until the first rules arrive");
        (self.pod_ranges, self.open) = (ranges, false);
        self.publish();
        Ok(())
    }

    async fn follow(&mut self, identity: &NodeIdentity, member: &str, backoff: &mut Backoff) -> anyhow::Result<()> {
        let mut renewed = identity.credentials.subscribe();
        renewed.mark_unchanged();
        let (mut outbox, mut stream) = self.open(identity, member).await?;
        if !self.connected {
            self.not_in_sync = format!(
                "connected to {member}, which has not sent rules for this node yet: check that its cluster has a Node {}, and that it \
                 has received the state of its hub",
                self.node
            );
            self.publish();
        }
        let mut assembler = Assembler::default();
        let mut proofs = self.enforcer.proofs();
        proofs.mark_unchanged();
        let mut written = self.writes.changes();
        // The member has the last acknowledgement, so changes of the status can follow.
        let mut acknowledged = false;
        loop {
            let message = tokio::select! {
                message = stream.message() => message.context("receive")?,
                Ok(()) = proofs.changed() => {
                    self.publish();
                    if acknowledged {
                        outbox.send(self.ack(None)).await.context("report findings")?;
                    }
                    continue;
                }
                Ok(()) = written.changed() => {
                    self.publish();
                    if acknowledged {
                        outbox.send(self.ack(None)).await.context("report files that cannot be written")?;
                    }
                    continue;
                }
                // The next connection uses the new certificate and resumes by digest; then the old one closes.
                _ = renewed.changed() => {
                    renewed.mark_unchanged();
                    (outbox, stream) = self.open(identity, member).await?;
                    (assembler, acknowledged) = (Assembler::default(), false);
                    continue;
                }
            };
            let Some(message) = message else { return Ok(()) };
            let assembled = assembler.receive(message);
            let received = match &assembled {
                Ok(Assembled::Delta(delta)) => delta.generation,
                Ok(Assembled::Position { generation, .. }) => *generation,
                _ => self.generation(),
            };
            self.metrics.set_generations(received, self.generation());
            let answer = match assembled {
                Ok(Assembled::Nothing) => continue,
                Ok(Assembled::Delta(delta)) if self.is_behind(delta.generation) => self.behind(delta.generation),
                Ok(Assembled::Position { generation, .. }) if self.is_behind(generation) => self.behind(generation),
                Ok(Assembled::Delta(delta)) => self.apply(&delta).await,
                Ok(Assembled::Position { generation, hub_revision, local_revision }) => {
                    self.advance(generation, hub_revision, local_revision)
                }
                Err(error) => {
                    tracing::error!(%error, "message of the member not read; the rule set in force stays");
                    self.ack(Some(Failure::Unreadable(error.to_string())))
                }
            };
            self.metrics.set_generations(received, self.generation());
            acknowledged = matches!(answer.message, Some(wire::agent_to_member::Message::Ack(_)));
            backoff.reset();
            outbox.send(answer).await.context("answer")?;
        }
    }

    async fn open(
        &self,
        identity: &NodeIdentity,
        member: &str,
    ) -> anyhow::Result<(mpsc::Sender<wire::AgentToMember>, Streaming<wire::MemberToAgent>)> {
        identity.check_time()?;
        let shown = identity.credentials.current().certificate.public;
        let authority = identity.authority();
        let connection = identity.client()?.connect(member).await.inspect_err(|error| {
            if error.is_of_other_authority() {
                identity.note(Rejection::OfAuthority(authority));
            }
        })?;
        let peer = connection.peer;
        let mut client = AgentsClient::new(connection.channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let (outbox, sending) = mpsc::channel(OUTBOX);
        outbox.send(self.hello()).await.context("send the hello")?;
        match client.sync(ReceiverStream::new(sending)).await {
            Ok(stream) => Ok((outbox, stream.into_inner())),
            Err(status) if is_refusal(&status) => {
                identity.note(Rejection::OfKey(shown));
                bail!("the member refused this node: {}", status.message())
            }
            Err(status) => bail!("open the stream: {}", peer.explain(&status)),
        }
    }

    fn hello(&self) -> wire::AgentToMember {
        let nothing = RuleSet::default();
        let in_force = self.in_force.as_deref().unwrap_or(&nothing);
        let hello = wire::Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: Some(hanse_protocol::generation(in_force.generation)),
            digest: hanse_protocol::digest(in_force.digest()),
            features: Vec::new(),
            instance: self.instance.to_vec().into(),
        };
        wire::AgentToMember { message: Some(wire::agent_to_member::Message::Hello(hello)) }
    }

    async fn apply(&mut self, delta: &Delta) -> wire::AgentToMember {
        let nothing = RuleSet::default();
        let next = match self.in_force.as_deref().unwrap_or(&nothing).apply(delta) {
            Ok(next) => Arc::new(next),
            // Another request would have the same answer.
            Err(error) if delta.base.is_none() => {
                tracing::error!(%error, "rule set inconsistent; the rules in force stay");
                return self.ack(Some(Failure::Inconsistent(error.to_string())));
            }
            Err(error) => {
                tracing::warn!(%error, "delta does not match the rules in force, requesting the whole rule set");
                self.in_force = None;
                return self.hello();
            }
        };
        match self.enforcer.apply(Arc::clone(&next)).await {
            Ok(applied) => {
                tracing::info!(
                    term = next.generation.term,
                    number = next.generation.number,
                    endpoints = next.endpoints.len(),
                    policies = next.policies.len(),
                    "enforced"
                );
                for refusal in &applied.refused {
                    let (object, error) = (Words(&refusal.object), Words(&refusal.rejection));
                    tracing::error!(%object, %error, "the kernel refused an object; denied instead");
                }
                // Also where the rule set in force is unknown: it stays.
                self.open = next.node.pod_ranges.is_empty();
                self.pod_ranges.clone_from(&next.node.pod_ranges);
                self.in_force = Some(next);
                self.refused = applied.refused;
                self.connected = true;
                self.publish();
                self.ack(None)
            }
            Err(error) => {
                let failure = Failure::from(&error);
                let number = next.generation.number;
                tracing::error!(error = %Words(&failure), number, "rule set not enforced; the last one stays in force");
                self.ack(Some(failure))
            }
        }
    }

    /// The generation in force; the lowest where it is unknown.
    fn generation(&self) -> Generation {
        self.in_force.as_ref().map(|rules| rules.generation).unwrap_or_default()
    }

    /// A member that was replaced may not know that yet.
    fn is_behind(&self, generation: Generation) -> bool {
        self.in_force.as_ref().is_some_and(|rules| generation.term < rules.generation.term)
    }

    fn behind(&self, generation: Generation) -> wire::AgentToMember {
        let current = self.in_force.as_ref().map(|rules| rules.generation.term).unwrap_or_default();
        tracing::warn!(term = generation.term, current, "the member's term is over; the rules in force stay");
        self.ack(Some(Failure::TermOver { term: generation.term, current }))
    }

    fn advance(&mut self, generation: Generation, hub_revision: u64, local_revision: u64) -> wire::AgentToMember {
        if let Some(rules) = &self.in_force {
            self.in_force = Some(Arc::new(RuleSet { generation, hub_revision, local_revision, ..(**rules).clone() }));
            self.connected = true;
            self.publish();
        }
        self.ack(None)
    }

    fn ack(&self, failure: Option<Failure>) -> wire::AgentToMember {
        let nothing = RuleSet::default();
        let in_force = self.in_force.as_deref().unwrap_or(&nothing);
        let refusal = |it: &Refusal| wire::Refusal {
            object: Some(report::object(&it.object)),
            rejection: Some(report::rejection(&it.rejection)),
        };
        let proofs = self.enforcer.proofs().borrow().clone();
        let pods = proofs.unenforced.iter().take(MAX_UNENFORCED);
        let pod = |(id, finding): (&EndpointId, &Finding)| wire::PodStatus {
            pod: Some(report::pod(id)),
            finding: Some(report::finding(finding)),
        };
        let ack = wire::Ack {
            generation: Some(hanse_protocol::generation(in_force.generation)),
            digest: hanse_protocol::digest(in_force.digest()),
            revisions: Some(wire::Revisions { hub: in_force.hub_revision, local: in_force.local_revision }),
            refusals: self.refused.iter().take(MAX_REFUSALS).map(refusal).collect(),
            failure: failure.as_ref().map(report::failure),
            unenforced: pods.map(pod).collect(),
            hooks: proofs.hooks.as_ref().map(report::hooks),
            files: self.files().iter().map(report::file).collect(),
        };
        wire::AgentToMember { message: Some(wire::agent_to_member::Message::Ack(ack)) }
    }

    /// The files that cannot be written.
    fn files(&self) -> Vec<FileProblem> {
        self.writes.failing().into_iter().map(|(file, error)| FileProblem { file: file.to_owned(), error }).collect()
    }

    /// Publishes readiness and status.
    pub fn publish(&self) {
        let proofs = self.enforcer.proofs().borrow().clone();
        let not_restored = proofs.hooks.as_ref().filter(|it| it.rules_may_differ()).map(|it| Words(it).to_string());
        let in_sync = self.connected && not_restored.is_none();
        self.in_sync.set(in_sync);
        self.metrics.set_in_sync(in_sync);
        self.metrics.set_refused(self.refused.len());
        let nothing = RuleSet::default();
        let in_force = self.in_force.as_deref().unwrap_or(&nothing);
        let status = Status {
            node: self.node.clone(),
            term: in_force.generation.term,
            number: in_force.generation.number,
            digest: in_force.digest().to_string(),
            hub_revision: in_force.hub_revision,
            local_revision: in_force.local_revision,
            endpoints: in_force.endpoints.len(),
            policies: in_force.policies.len(),
            sets: in_force.sets.len(),
            refused: self.refused.iter().map(refused).collect(),
            hooks: proofs.hooks.as_ref().map_or_else(String::new, |it| Words(it).to_string()),
            unenforced: proofs
                .unenforced
                .iter()
                .map(|(id, finding)| Unenforced {
                    namespace: id.namespace.to_string(),
                    name: id.name.to_string(),
                    reason: Words(finding).to_string(),
                    code: Reason::Finding(finding.clone()).code().to_owned(),
                })
                .collect(),
            pod_ranges: self.in_force.as_ref().map_or(&self.pod_ranges, |rules| &rules.node.pod_ranges).clone(),
            observes: self.in_force.as_ref().is_some_and(|rules| rules.node.enforcement == Enforcement::Observe),
            open: self.in_force.as_ref().map_or(self.open, |rules| rules.node.pod_ranges.is_empty()),
            connected: self.connected,
            not_in_sync: match self.connected {
                true => not_restored.unwrap_or_default(),
                false => self.not_in_sync.clone(),
            },
            problems: self.files().iter().map(|it| Words(it).to_string()).collect(),
            // Set when it is written.
            flows: String::new(),
            written_at: 0,
        };
        self.status.send_replace(status);
    }
}

fn refused(refusal: &Refusal) -> String {
    format!("{}: {}", Words(&refusal.object), Words(&refusal.rejection))
}

#[cfg(test)]
mod tests;
