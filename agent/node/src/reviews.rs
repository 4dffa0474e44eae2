//! Reviews of the tokens of callers of metrics, by the member. The agent has no access to the API server, and needs none.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_runtime::monitor::{Review, Unreviewed, Verdict};
use tokio::sync::Mutex;
use tonic::Code;
use tonic::transport::Channel;

use crate::identity::NodeIdentity;

/// How long a member may take for one review.
const CALL_WITHIN: Duration = Duration::from_secs(3);
/// A connection is replaced this long before its end.
const SPARE: Duration = Duration::from_secs(5);
/// The longest reason of a member that is passed on, in bytes.
const MAX_REASON_BYTES: usize = 256;

/// Reviews by the member, once the node has enrolled.
#[derive(Debug, Clone, Default)]
pub struct MemberReview {
    enrolled: Arc<OnceLock<Enrolled>>,
}

#[derive(Debug)]
struct Enrolled {
    identity: NodeIdentity,
    members: Vec<String>,
    /// Kept between reviews, with its end.
    open: Mutex<Option<(AgentsClient<Channel>, SystemTime)>>,
}

impl MemberReview {
    /// Reviews are possible from now on.
    pub fn enrolled(&self, identity: NodeIdentity, members: Vec<String>) {
        // Called once: a node has one identity.
        drop(self.enrolled.set(Enrolled { identity, members, open: Mutex::default() }));
    }
}

impl Review for MemberReview {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Verdict, Unreviewed>> {
        async {
            let unavailable = |why: &str| Unreviewed::Unavailable(why.to_owned());
            let Some(enrolled) = self.enrolled.get() else { return Err(unavailable("the node has not enrolled")) };
            let reviewed = tokio::time::timeout(CALL_WITHIN, enrolled.call(token)).await;
            reviewed.unwrap_or_else(|_| Err(unavailable("the member does not answer")))
        }
        .boxed()
    }
}

impl Enrolled {
    async fn call(&self, token: &str) -> Result<Verdict, Unreviewed> {
        let mut client = self.client().await?;
        match client.review_metrics_token(wire::MetricsToken { token: token.to_owned() }).await {
            Ok(answer) => {
                let wire::MetricsVerdict { authenticated, allowed, user } = answer.into_inner();
                Ok(match (authenticated, allowed) {
                    (true, true) => Verdict::Allowed,
                    (true, false) => Verdict::Forbidden { user },
                    (false, _) => Verdict::Unauthenticated,
                })
            }
            Err(status) => {
                let mut reason = match status.code() {
                    Code::Unimplemented => "the member is an earlier version, which reviews no tokens".to_owned(),
                    _ => format!("the member answers: {}", status.message()),
                };
                reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
                // The next review opens another connection, to another member where there is one.
                *self.open.lock().await = None;
                Err(Unreviewed::Unavailable(reason))
            }
        }
    }

    /// A connection to the first member that can be reached.
    async fn client(&self) -> Result<AgentsClient<Channel>, Unreviewed> {
        let mut open = self.open.lock().await;
        if let Some((client, ends_at)) = &*open
            && ends_at.duration_since(SystemTime::now()).is_ok_and(|left| left > SPARE)
        {
            return Ok(client.clone());
        }
        let failed = |error: anyhow::Error| {
            tracing::debug!(error = format!("{error:#}"), "no connection for reviews of tokens");
            Unreviewed::Unavailable("the member cannot be reached".to_owned())
        };
        self.identity.check_time().map_err(failed)?;
        let tls = self.identity.client().map_err(failed)?;
        let mut last = anyhow::anyhow!("there is no member");
        for member in &self.members {
            match tls.connect(member).await {
                Ok(connection) => {
                    let client = AgentsClient::new(connection.channel);
                    *open = Some((client.clone(), connection.peer.ends_at));
                    return Ok(client);
                }
                Err(error) => last = error.into(),
            }
        }
        Err(failed(last))
    }
}
