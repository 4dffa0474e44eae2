//! Questions to a federation that runs: through the hub, to the members.

use std::path::Path;

use anyhow::Context as _;
use hanse_policy::explain::AnswerLine;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::explanation;
use hanse_proto::federation::v1::inquiries_client::InquiriesClient;

use crate::online::{MAX_ANSWER_BYTES, call, connected};

/// Queries in one request; the hub takes no more.
const BATCH: usize = 64;

/// Asks every query, and hands on each with its answer, in order.
pub fn explain(
    context: Option<&Path>,
    queries: &[String],
    mut take: impl FnMut(&str, Result<AnswerLine<'_>, String>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    connected(context, async |channel| {
        let mut client = InquiriesClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        for batch in queries.chunks(BATCH) {
            let asked = batch.iter().map(|query| query.clone().into_bytes().into()).collect();
            let answer = call(client.explain(pb::ExplainRequest { queries: asked })).await?;
            anyhow::ensure!(answer.explanations.len() == batch.len(), "the hub left questions out");
            for (query, explanation) in batch.iter().zip(answer.explanations) {
                match explanation.explanation {
                    Some(explanation::Explanation::Answer(json)) => {
                        take(query, Ok(serde_json::from_slice(&json).context("understand an answer")?))?;
                    }
                    Some(explanation::Explanation::Error(error)) => take(query, Err(error))?,
                    None => take(query, Err("the hub is newer: the answer is not understood".to_owned()))?,
                }
            }
        }
        Ok(())
    })
}

/// Every pod that a member tells of. What could not be asked is named on standard error.
pub fn pods(context: Option<&Path>) -> anyhow::Result<Vec<pb::PodInfo>> {
    connected(context, async |channel| {
        let mut client = InquiriesClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let answer = call(client.list_pods(pb::ListPodsRequest::default())).await?;
        for note in &answer.notes {
            eprintln!("{}: note: {}", note.cluster, note.note);
        }
        Ok(answer.pods)
    })
}
