//! Following the member: one stream, resumed by digest.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_dataplane::Refusal;
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_protocol::{self, Assembled, Assembler};
use hanse_ruleset::{Delta, EndpointId, Generation, RuleSet};
use hanse_runtime::health::{Condition, Writes};
use hanse_runtime::retry::Backoff;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::enforcer::Enforcer;
use crate::identity::{NodeIdentity, Rejection, is_refusal};
use crate::status::{Status, Unenforced};

/// The largest message that is taken: the 1 MiB of the contract and its frame.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024 + 64 * 1024;
/// Messages to the member that wait to be sent: an answer to each of the two that can be under way.
const OUTBOX: usize = 4;
/// Refusals that one ack names.
const MAX_REFUSALS: usize = 1_000;
/// Pods that one ack names.
const MAX_UNENFORCED: usize = 1_000;

#[derive(Debug)]
pub struct Follower {
    pub node: String,
    pub enforcer: Enforcer,
    /// What is in force, as far as it is known.
    pub in_force: Option<Arc<RuleSet>>,
    /// Objects of it that the kernel refused.
    pub refused: Vec<Refusal>,
    /// Of the node's pods, as far as they are known while no rules are.
    pub pod_ranges: Vec<IpNet>,
    /// While no rules are known: nothing closes its pods either.
    pub open: bool,
    /// The stream is open, and the member has said over it what must be in force.
    pub connected: bool,
    /// While it is not: why.
    pub not_in_sync: String,
    /// Tells this process apart from another with the same key.
    pub instance: [u8; 16],
    /// Which files cannot be written.
    pub writes: Writes,
    /// Holds as long as `connected`. Of a member who falls silent, keep-alives tell within 20 seconds.
    pub in_sync: Condition,
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
                ended = self.follow(&identity, member, &mut backoff) => ended,
            };
            match ended {
                Ok(()) => {
                    tracing::info!(member, "the stream ended, opening the next");
                    self.lose("the stream ended".to_owned());
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(error, member, "not in sync, trying again");
                    self.lose(error);
                }
            }
            tokio::select! {
                again = backoff.wait(&stop) => if !again { return },
                // Who waits with a certificate that has ended need not wait any longer.
                _ = renewed.changed() => {}
            }
        }
    }

    /// The stream has ended: `why`.
    fn lose(&mut self, why: String) {
        (self.connected, self.not_in_sync) = (false, why);
        self.tell();
    }

    /// Closes ranges that are known late, where nothing is in force.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn close(&mut self, ranges: Vec<IpNet>) -> anyhow::Result<()> {
        self.enforcer.close(&ranges).await.context("close the ranges of the node's pods")?;
        tracing::info!(?ranges, "the ranges of the node's pods are closed until the first rules arrive");
        (self.pod_ranges, self.open) = (ranges, false);
        self.tell();
        Ok(())
    }

    async fn follow(&mut self, identity: &NodeIdentity, member: &str, backoff: &mut Backoff) -> anyhow::Result<()> {
        let mut renewed = identity.credentials.subscribe();
        renewed.mark_unchanged();
        let (mut outbox, mut stream) = self.open(identity, member).await?;
        if !self.connected {
            self.not_in_sync = format!(
                "connected to {member}, which has sent no rules for this node yet: see that its cluster has a Node {}, and that it \
                 has heard its hub",
                self.node
            );
            self.tell();
        }
        let mut assembler = Assembler::default();
        let mut proofs = self.enforcer.proofs();
        proofs.mark_unchanged();
        let mut written = self.writes.changes();
        // Whether the member has heard what is in force, and so can be told more of it.
        let mut told = false;
        loop {
            let message = tokio::select! {
                message = stream.message() => message.context("receive")?,
                Ok(()) = proofs.changed() => {
                    self.tell();
                    if told {
                        outbox.send(self.ack(String::new())).await.context("tell what the probe found")?;
                    }
                    continue;
                }
                Ok(()) = written.changed() => {
                    self.tell();
                    if told {
                        outbox.send(self.ack(String::new())).await.context("report which files cannot be written")?;
                    }
                    continue;
                }
                // The next connection shows the new certificate, and resumes by digest; then the old one closes.
                _ = renewed.changed() => {
                    renewed.mark_unchanged();
                    (outbox, stream) = self.open(identity, member).await?;
                    (assembler, told) = (Assembler::default(), false);
                    continue;
                }
            };
            let Some(message) = message else { return Ok(()) };
            let answer = match assembler.receive(message) {
                Ok(Assembled::Nothing) => continue,
                Ok(Assembled::Delta(delta)) if self.is_behind(delta.generation) => self.behind(delta.generation),
                Ok(Assembled::Position { generation, .. }) if self.is_behind(generation) => self.behind(generation),
                Ok(Assembled::Delta(delta)) => self.apply(&delta).await,
                Ok(Assembled::Position { generation, hub_revision, local_revision }) => {
                    self.move_on(generation, hub_revision, local_revision)
                }
                Err(error) => {
                    tracing::error!(%error, "the member sent what cannot be understood; what is in force stays");
                    self.ack(error.to_string())
                }
            };
            told = matches!(answer.message, Some(wire::agent_to_member::Message::Ack(_)));
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
        outbox.send(self.hello()).await.context("say hello")?;
        match client.sync(ReceiverStream::new(sending)).await {
            Ok(stream) => Ok((outbox, stream.into_inner())),
            Err(status) if is_refusal(&status) => {
                identity.note(Rejection::OfKey(shown));
                bail!("the member refuses this node: {}", status.message())
            }
            Err(status) => bail!("open the stream: {}", peer.explain(&status)),
        }
    }

    fn hello(&self) -> wire::AgentToMember {
        let nothing = RuleSet::default();
        let held = self.in_force.as_deref().unwrap_or(&nothing);
        let hello = wire::Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: Some(hanse_protocol::generation(held.generation)),
            digest: hanse_protocol::digest(held.digest()),
            features: Vec::new(),
            instance: self.instance.to_vec().into(),
        };
        wire::AgentToMember { message: Some(wire::agent_to_member::Message::Hello(hello)) }
    }

    async fn apply(&mut self, delta: &Delta) -> wire::AgentToMember {
        let nothing = RuleSet::default();
        let next = match self.in_force.as_deref().unwrap_or(&nothing).apply(delta) {
            Ok(next) => Arc::new(next),
            // Asked again it would be the same.
            Err(error) if delta.base.is_none() => {
                tracing::error!(%error, "the rule set does not hold together; what is in force stays");
                return self.ack(error.to_string());
            }
            Err(error) => {
                tracing::warn!(%error, "the delta does not fit, asking for the whole");
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
                    tracing::error!(
                        object = refusal.object,
                        reason = refusal.reason,
                        "the kernel refused; closed instead"
                    );
                }
                // Also where it is not known any more: what is in force stays.
                self.open = next.node.pod_ranges.is_empty();
                self.pod_ranges.clone_from(&next.node.pod_ranges);
                self.in_force = Some(next);
                self.refused = applied.refused;
                self.connected = true;
                self.tell();
                self.ack(String::new())
            }
            Err(error) => {
                tracing::error!(%error, number = next.generation.number, "not enforced; what is in force stays");
                self.ack(error.to_string())
            }
        }
    }

    /// A member that was replaced may not know it yet.
    fn is_behind(&self, generation: Generation) -> bool {
        self.in_force.as_ref().is_some_and(|held| generation.term < held.generation.term)
    }

    fn behind(&self, generation: Generation) -> wire::AgentToMember {
        let held = self.in_force.as_ref().map(|held| held.generation.term).unwrap_or_default();
        tracing::warn!(term = generation.term, held, "the member's term is over; what is in force stays");
        self.ack(format!("term {} is over: term {held} has begun", generation.term))
    }

    fn move_on(&mut self, generation: Generation, hub_revision: u64, local_revision: u64) -> wire::AgentToMember {
        if let Some(held) = &self.in_force {
            self.in_force = Some(Arc::new(RuleSet { generation, hub_revision, local_revision, ..(**held).clone() }));
            self.connected = true;
            self.tell();
        }
        self.ack(String::new())
    }

    fn ack(&self, failed: String) -> wire::AgentToMember {
        let nothing = RuleSet::default();
        let held = self.in_force.as_deref().unwrap_or(&nothing);
        let refusal = |it: &Refusal| wire::Refusal { object: it.object.clone(), reason: it.reason.clone() };
        let proofs = self.enforcer.proofs().borrow().clone();
        let pods = proofs.unenforced.iter().take(MAX_UNENFORCED);
        let pod = |(id, reason): (&EndpointId, &String)| wire::PodStatus {
            namespace: id.namespace.to_string(),
            name: id.name.to_string(),
            reason: reason.clone(),
        };
        let ack = wire::Ack {
            generation: Some(hanse_protocol::generation(held.generation)),
            digest: hanse_protocol::digest(held.digest()),
            revisions: Some(wire::Revisions { hub: held.hub_revision, local: held.local_revision }),
            refusals: self.refused.iter().take(MAX_REFUSALS).map(refusal).collect(),
            failed,
            unenforced: pods.map(pod).collect(),
            probe: proofs.hooks.clone(),
            problems: self.writes.problems(),
        };
        wire::AgentToMember { message: Some(wire::agent_to_member::Message::Ack(ack)) }
    }

    /// Says how it is, to whoever asks for readiness or status.
    pub fn tell(&self) {
        self.in_sync.set(self.connected);
        let nothing = RuleSet::default();
        let held = self.in_force.as_deref().unwrap_or(&nothing);
        let proofs = self.enforcer.proofs().borrow().clone();
        let status = Status {
            node: self.node.clone(),
            term: held.generation.term,
            number: held.generation.number,
            digest: held.digest().to_string(),
            hub_revision: held.hub_revision,
            local_revision: held.local_revision,
            endpoints: held.endpoints.len(),
            policies: held.policies.len(),
            sets: held.sets.len(),
            refused: self.refused.iter().map(|it| format!("{}: {}", it.object, it.reason)).collect(),
            hooks: proofs.hooks.clone(),
            unenforced: proofs
                .unenforced
                .iter()
                .map(|(id, reason)| Unenforced {
                    namespace: id.namespace.to_string(),
                    name: id.name.to_string(),
                    reason: reason.clone(),
                })
                .collect(),
            pod_ranges: self.in_force.as_ref().map_or(&self.pod_ranges, |held| &held.node.pod_ranges).clone(),
            open: self.in_force.as_ref().map_or(self.open, |held| held.node.pod_ranges.is_empty()),
            connected: self.connected,
            not_in_sync: if self.connected { String::new() } else { self.not_in_sync.clone() },
            problems: self.writes.problems(),
            // Who writes it knows.
            flows: String::new(),
            written_at: 0,
        };
        self.status.send_replace(status);
    }
}

#[cfg(test)]
mod tests {
    use hanse_ruleset::{Digest, NodeConfig};
    use hanse_runtime::health::Health;

    use super::*;
    use crate::enforcer::Proofs;

    fn follower() -> Follower {
        let pod = EndpointId { namespace: "a".into(), name: "p".into() };
        let proofs = Proofs { hooks: "no pod".into(), unenforced: [(pod, "bypassed".to_owned())].into() };
        let held = RuleSet { generation: Generation { term: 5, number: 9 }, ..RuleSet::default() };
        Follower {
            node: "n".into(),
            enforcer: Enforcer::ended(proofs),
            in_force: Some(Arc::new(held)),
            refused: vec![Refusal { object: "policy a/b".into(), reason: "too wide".into() }],
            pod_ranges: Vec::new(),
            open: false,
            connected: false,
            not_in_sync: String::new(),
            instance: [7; 16],
            writes: Writes::new(&Health::default()),
            in_sync: Health::default().condition("in sync"),
            status: watch::Sender::new(Status::default()),
        }
    }

    fn ack(message: wire::AgentToMember) -> wire::Ack {
        match message.message {
            Some(wire::agent_to_member::Message::Ack(ack)) => ack,
            other => panic!("an ack, not {other:?}"),
        }
    }

    #[test]
    fn a_new_position_is_no_better_than_what_is_in_force() {
        let mut follower = follower();
        let ack = ack(follower.move_on(Generation { term: 5, number: 10 }, 3, 4));
        assert_eq!(ack.generation, Some(wire::Generation { term: 5, number: 10 }));
        assert_eq!(ack.revisions, Some(wire::Revisions { hub: 3, local: 4 }));
        assert_eq!(ack.failed, "");
        // What the kernel refused it still refuses, and who is not enforced still is not.
        assert_eq!(ack.refusals, [wire::Refusal { object: "policy a/b".into(), reason: "too wide".into() }]);
        let pod = wire::PodStatus { namespace: "a".into(), name: "p".into(), reason: "bypassed".into() };
        assert_eq!((ack.unenforced, ack.probe.as_str()), (vec![pod], "no pod"));
        let status = follower.status.borrow().clone();
        assert!(status.connected && follower.in_sync.holds());
        assert_eq!((status.number, status.refused), (10, vec!["policy a/b: too wide".to_owned()]));
    }

    #[test]
    fn files_that_cannot_be_written_are_reported_until_they_can() {
        let follower = follower();
        let said = |follower: &Follower| {
            follower.tell();
            let problems = follower.status.borrow().problems.clone();
            assert_eq!(ack(follower.ack(String::new())).problems, problems);
            problems
        };
        assert!(said(&follower).is_empty());
        follower.writes.note("ruleset.snapshot", &Err(std::io::ErrorKind::StorageFull.into()));
        assert_eq!(said(&follower), ["ruleset.snapshot cannot be written: no storage space"]);
        follower.writes.note("ruleset.snapshot", &Ok(()));
        assert!(said(&follower).is_empty());
    }

    #[test]
    fn who_has_lost_the_member_is_not_ready() {
        let mut follower = follower();
        follower.move_on(Generation { term: 5, number: 10 }, 3, 4);
        assert!(follower.in_sync.holds());
        follower.lose("the stream ended".to_owned());
        assert!(!follower.in_sync.holds() && !follower.status.borrow().connected);
    }

    #[test]
    fn pods_are_said_to_be_open_only_where_nothing_closes_them() {
        let mut follower = Follower { in_force: None, ..follower() };
        let said = |follower: &Follower| {
            follower.tell();
            let status = follower.status.borrow();
            (status.open, status.ranges())
        };
        let (open, closed) = ("none known: a pod is OPEN", "not known: what was closed before");
        let (is_open, text) = said(&follower);
        assert!(!is_open && text.starts_with(closed), "the kernel holds ranges that were closed: {text}");
        follower.open = true;
        let (is_open, text) = said(&follower);
        assert!(is_open && text.starts_with(open), "{text}");
        // Rules that name no range close none.
        (follower.in_force, follower.open) = (Some(Arc::default()), false);
        assert!(said(&follower).0);
        let node = NodeConfig { pod_ranges: vec!["10.1.0.0/24".parse().expect("a net")], ..NodeConfig::default() };
        follower.in_force = Some(Arc::new(RuleSet { node, ..RuleSet::default() }));
        assert_eq!(said(&follower), (false, "10.1.0.0/24".to_owned()));
    }

    #[test]
    fn a_term_that_is_over_changes_nothing() {
        let follower = follower();
        let at = |term, number| Generation { term, number };
        assert!(follower.is_behind(at(4, 100)) && !follower.is_behind(at(5, 1)) && !follower.is_behind(at(6, 0)));
        let ack = ack(follower.behind(at(4, 100)));
        assert_eq!(ack.failed, "term 4 is over: term 5 has begun");
        assert_eq!(ack.generation, Some(wire::Generation { term: 5, number: 9 }));
    }

    #[tokio::test]
    async fn what_does_not_hold_together_is_told_and_not_asked_for_again() {
        let mut follower = follower();
        let wrong = Delta { digest: Digest(1), ..Delta::default() };
        assert!(!ack(follower.apply(&wrong).await).failed.is_empty());
        assert!(follower.in_force.is_some(), "what is in force stays");
        // A difference from something else is asked for as a whole.
        let base = Delta { base: Some(Digest(2)), ..wrong };
        let answer = follower.apply(&base).await.message;
        assert!(matches!(answer, Some(wire::agent_to_member::Message::Hello(_))), "{answer:?}");
    }
}
