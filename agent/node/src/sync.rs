//! Following the member: one stream, resumed by digest.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_dataplane::Refusal;
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_protocol::reason::words::Words;
use hanse_protocol::reason::{Failure, FileProblem, Finding, Reason, wire as report};
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
                        outbox.send(self.ack(None)).await.context("tell what the probe found")?;
                    }
                    continue;
                }
                Ok(()) = written.changed() => {
                    self.tell();
                    if told {
                        outbox.send(self.ack(None)).await.context("report which files cannot be written")?;
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
                    tracing::error!(%error, "message of the member not read; the rule set in force stays");
                    self.ack(Some(Failure::Unreadable(error.to_string())))
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
                return self.ack(Some(Failure::Inconsistent(error.to_string())));
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
                    let (object, error) = (Words(&refusal.object), Words(&refusal.rejection));
                    tracing::error!(%object, %error, "the kernel refused an object; denied instead");
                }
                // Also where it is not known any more: what is in force stays.
                self.open = next.node.pod_ranges.is_empty();
                self.pod_ranges.clone_from(&next.node.pod_ranges);
                self.in_force = Some(next);
                self.refused = applied.refused;
                self.connected = true;
                self.tell();
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

    /// A member that was replaced may not know it yet.
    fn is_behind(&self, generation: Generation) -> bool {
        self.in_force.as_ref().is_some_and(|held| generation.term < held.generation.term)
    }

    fn behind(&self, generation: Generation) -> wire::AgentToMember {
        let held = self.in_force.as_ref().map(|held| held.generation.term).unwrap_or_default();
        tracing::warn!(term = generation.term, held, "the member's term is over; what is in force stays");
        self.ack(Some(Failure::TermOver { term: generation.term, current: held }))
    }

    fn move_on(&mut self, generation: Generation, hub_revision: u64, local_revision: u64) -> wire::AgentToMember {
        if let Some(held) = &self.in_force {
            self.in_force = Some(Arc::new(RuleSet { generation, hub_revision, local_revision, ..(**held).clone() }));
            self.connected = true;
            self.tell();
        }
        self.ack(None)
    }

    fn ack(&self, failure: Option<Failure>) -> wire::AgentToMember {
        let nothing = RuleSet::default();
        let held = self.in_force.as_deref().unwrap_or(&nothing);
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
            generation: Some(hanse_protocol::generation(held.generation)),
            digest: hanse_protocol::digest(held.digest()),
            revisions: Some(wire::Revisions { hub: held.hub_revision, local: held.local_revision }),
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
            pod_ranges: self.in_force.as_ref().map_or(&self.pod_ranges, |held| &held.node.pod_ranges).clone(),
            open: self.in_force.as_ref().map_or(self.open, |held| held.node.pod_ranges.is_empty()),
            connected: self.connected,
            not_in_sync: if self.connected { String::new() } else { self.not_in_sync.clone() },
            problems: self.files().iter().map(|it| Words(it).to_string()).collect(),
            // Who writes it knows.
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
mod tests {
    use hanse_dataplane::{Object, Rejection};
    use hanse_protocol::reason::HookProblem;
    use hanse_ruleset::{Digest, NodeConfig, PolicyId};
    use hanse_runtime::health::Health;

    use super::*;
    use crate::enforcer::Proofs;

    fn refusal() -> Refusal {
        let object = Object::Policy { id: PolicyId([1; 16]), name: "NetworkPolicy a/b".into() };
        Refusal { object, rejection: Rejection { error: "too wide".into(), set: None } }
    }

    fn follower() -> Follower {
        let pod = EndpointId { namespace: "a".into(), name: "p".into() };
        let hooks = Some(HookProblem::NotProven);
        let proofs = Proofs { hooks, unenforced: [(pod, Finding::Ipvs)].into() };
        let held = RuleSet { generation: Generation { term: 5, number: 9 }, ..RuleSet::default() };
        Follower {
            node: "n".into(),
            enforcer: Enforcer::ended(proofs),
            in_force: Some(Arc::new(held)),
            refused: vec![refusal()],
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
        assert_eq!(ack.failure, None);
        // What the kernel refused it still refuses, and who is not enforced still is not.
        let refused: Vec<_> = ack.refusals.into_iter().filter_map(|it| report::parse_object(it.object?)).collect();
        assert_eq!(refused, [refusal().object]);
        let pod = EndpointId { namespace: "a".into(), name: "p".into() };
        let pod = wire::PodStatus { pod: Some(report::pod(&pod)), finding: Some(report::finding(&Finding::Ipvs)) };
        assert_eq!((ack.unenforced, ack.hooks), (vec![pod], Some(report::hooks(&HookProblem::NotProven))));
        let status = follower.status.borrow().clone();
        assert!(status.connected && follower.in_sync.holds());
        assert_eq!((status.number, status.refused), (10, vec!["policy NetworkPolicy a/b: too wide".to_owned()]));
    }

    #[test]
    fn files_that_cannot_be_written_are_reported_until_they_can() {
        let follower = follower();
        let said = |follower: &Follower| {
            follower.tell();
            let problems = follower.status.borrow().problems.clone();
            let files = ack(follower.ack(None)).files.into_iter().map(report::parse_file);
            assert_eq!(files.map(|it| Words(&it).to_string()).collect::<Vec<_>>(), problems);
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
        assert_eq!(ack.failure.map(report::parse_failure), Some(Failure::TermOver { term: 4, current: 5 }));
        assert_eq!(ack.generation, Some(wire::Generation { term: 5, number: 9 }));
    }

    #[tokio::test]
    async fn what_does_not_hold_together_is_told_and_not_asked_for_again() {
        let mut follower = follower();
        let wrong = Delta { digest: Digest(1), ..Delta::default() };
        let failure = ack(follower.apply(&wrong).await).failure.map(report::parse_failure);
        assert!(matches!(failure, Some(Failure::Inconsistent(_))), "{failure:?}");
        assert!(follower.in_force.is_some(), "what is in force stays");
        // A difference from something else is asked for as a whole.
        let base = Delta { base: Some(Digest(2)), ..wrong };
        let answer = follower.apply(&base).await.message;
        assert!(matches!(answer, Some(wire::agent_to_member::Message::Hello(_))), "{answer:?}");
    }
}
