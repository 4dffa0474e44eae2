//! Queries of a federation that runs: through the hub, to the members.

use std::path::Path;

use anyhow::Context as _;
use hanse_policy::explain::AnswerLine;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::explanation;
use hanse_proto::federation::v1::inquiries_client::InquiriesClient;
use tonic::transport::Channel;

use crate::online::{MAX_ANSWER_BYTES, call, open};
use crate::output;

/// Queries in one request; the hub accepts no more.
pub const BATCH: usize = 64;

/// One connection for many questions.
pub struct Session {
    runtime: tokio::runtime::Runtime,
    client: InquiriesClient<Channel>,
}

impl Session {
    pub fn open(context: Option<&Path>) -> anyhow::Result<Self> {
        let (runtime, channel) = open(context)?;
        Ok(Self { runtime, client: InquiriesClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES) })
    }

    /// Sends every query, and passes on the answers with their queries' places in the list, in order.
    pub fn explain(
        &mut self,
        queries: &[String],
        mut take: impl FnMut(usize, Result<AnswerLine<'_>, String>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for (number, batch) in queries.chunks(BATCH).enumerate() {
            let asked = batch.iter().map(|query| query.clone().into_bytes().into()).collect();
            let answer = self.runtime.block_on(call(self.client.explain(pb::ExplainRequest { queries: asked })))?;
            anyhow::ensure!(answer.explanations.len() == batch.len(), "the hub left queries unanswered");
            for (at, explanation) in (number * BATCH..).zip(answer.explanations) {
                match explanation.explanation {
                    Some(explanation::Explanation::Answer(json)) => {
                        take(at, Ok(serde_json::from_slice(&json).context("understand an answer")?))?;
                    }
                    Some(explanation::Explanation::Error(error)) => take(at, Err(error))?,
                    None => take(at, Err("the hub is newer: the answer is not understood".to_owned()))?,
                }
            }
        }
        Ok(())
    }

    /// Every pod that a member reports, and whether members could not be queried or left some out: they are named on standard
    /// error.
    pub fn pods(&mut self) -> anyhow::Result<(Vec<pb::PodInfo>, bool)> {
        let answer = self.runtime.block_on(call(self.client.list_pods(pb::ListPodsRequest::default())))?;
        for note in &answer.notes {
            output::note(format_args!("{}: note: {}", note.cluster, note.note));
        }
        Ok((answer.pods, !answer.notes.is_empty()))
    }
}
