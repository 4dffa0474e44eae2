//! Queries to the members of a running federation, through the hub.

use std::path::Path;

use hanse_policy::explain::AnswerLine;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::explanation;
use hanse_proto::federation::v1::inquiries_client::InquiriesClient;
use tonic::transport::Channel;

use crate::online::{MAX_ANSWER_BYTES, call, open};
use crate::output;

/// Maximum number of queries in one request, as the hub limits it.
pub const BATCH: usize = 64;

/// One connection for many queries.
pub struct Session {
    runtime: tokio::runtime::Runtime,
    client: InquiriesClient<Channel>,
}

impl Session {
    pub fn open(context: Option<&Path>) -> anyhow::Result<Self> {
        let (runtime, channel) = open(context)?;
        Ok(Self { runtime, client: InquiriesClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES) })
    }

    /// Sends the queries, and passes each answer to `take` with the index of its query, in order.
    pub fn explain(
        &mut self,
        queries: &[String],
        mut take: impl FnMut(usize, Result<AnswerLine<'_>, String>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for (number, batch) in queries.chunks(BATCH).enumerate() {
            let sent = batch.iter().map(|query| query.clone().into_bytes().into()).collect();
            let answer = self.runtime.block_on(call(self.client.explain(pb::ExplainRequest { queries: sent })))?;
            anyhow::ensure!(answer.explanations.len() == batch.len(), "the hub did not answer all queries");
            for (at, explanation) in (number * BATCH..).zip(answer.explanations) {
                match explanation.explanation {
                    Some(explanation::Explanation::Answer(json)) => {
                        let answer = serde_json::from_slice(&json);
                        take(at, answer.map_err(|error| format!("read the answer of the hub: {error}")))?;
                    }
                    Some(explanation::Explanation::Error(error)) => take(at, Err(error))?,
                    None => take(at, Err("unknown response: the hub is newer than this command".to_owned()))?,
                }
            }
        }
        Ok(())
    }

    /// All pods that members report, and whether the list is incomplete: members that did not answer, or that have too many pods,
    /// are reported on standard error.
    pub fn pods(&mut self) -> anyhow::Result<(Vec<pb::PodInfo>, bool)> {
        let answer = self.runtime.block_on(call(self.client.list_pods(pb::ListPodsRequest::default())))?;
        for note in &answer.notes {
            output::note(format_args!("{}: note: {}", note.cluster, note.note));
        }
        Ok((answer.pods, !answer.notes.is_empty()))
    }
}
