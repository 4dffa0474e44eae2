//! `hanse wait --for=enforced POLICY`: until a policy is enforced on every node of every cluster that it names.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::policy_in_cluster::State;

use super::{call, with_client};

/// How often the hub is asked.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How often people are told who lags.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// Exits 0 when it is so, 1 when the time is up (and says who lags), 2 when a cluster refuses the policy.
#[derive(Debug, clap::Args)]
pub struct Wait {
    #[arg(long = "for", value_enum, default_value_t = Condition::Enforced)]
    condition: Condition,
    /// How long to wait, in seconds.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// The FederatedNetworkPolicy.
    policy: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Condition {
    Enforced,
}

impl Wait {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        with_client(context, |mut client| async move {
            let Condition::Enforced = self.condition;
            let start = Instant::now();
            let mut told = start;
            loop {
                let request = pb::PolicyStatusRequest { name: self.policy.clone() };
                let status = call(client.policy_status(request)).await?;
                let (mut lagging, mut refused) = (Vec::new(), Vec::new());
                for it in status.clusters {
                    match it.state {
                        Some(State::Enforced(_)) => {}
                        Some(State::Refused(why)) => refused.push(format!("{}: {why}", it.cluster)),
                        Some(State::Lagging(who)) => lagging.push(format!("{}: {who}", it.cluster)),
                        None => lagging.push(format!("{}: says nothing of it", it.cluster)),
                    }
                }
                if !refused.is_empty() {
                    eprintln!("{} is refused\n  {}", self.policy, refused.join("\n  "));
                    return Ok(ExitCode::from(2));
                }
                if lagging.is_empty() {
                    println!("{} is enforced, after {:.2} s", self.policy, start.elapsed().as_secs_f64());
                    return Ok(ExitCode::SUCCESS);
                }
                if start.elapsed() > Duration::from_secs(self.timeout) {
                    eprintln!("{} is not enforced after {} s\n  {}", self.policy, self.timeout, lagging.join("\n  "));
                    return Ok(ExitCode::FAILURE);
                }
                if told.elapsed() > TELL_EVERY {
                    told = Instant::now();
                    eprintln!("waiting for\n  {}", lagging.join("\n  "));
                }
                tokio::time::sleep(ASK_EVERY).await;
            }
        })
    }
}
