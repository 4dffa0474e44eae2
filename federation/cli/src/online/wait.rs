//! `hanse wait --for=enforced POLICY`: until a policy is enforced on every node of every cluster that it names.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::policy_in_cluster::State;
use serde::Serialize;

use super::{CallError, Client, call, with_client};
use crate::output::{self, Format};

/// How often the hub is asked.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How long after a hub went away it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often people are told who lags.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// Wait until policies are enforced on every node of every cluster that they name.
///
/// Exits 0 when it is so, 1 when the time is up (and says who lags), 2 when a cluster refuses a policy. A hub that goes away
/// meanwhile is asked again until the time is up.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse wait --for=enforced default-deny
  hanse wait --for=enforced --timeout 300 default-deny inference registry")]
pub struct Wait {
    #[arg(long = "for", value_enum, default_value_t = Condition::Enforced)]
    condition: Condition,
    /// How long to wait, in seconds.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// FederatedNetworkPolicies.
    #[arg(required = true, value_name = "POLICY")]
    policies: Vec<String>,
    /// Prints how it ended, with each cluster.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Condition {
    Enforced,
}

#[derive(Debug, Serialize)]
struct Waited {
    policy: String,
    /// `enforced`, `lagging` or `refused`; `lagging` also while no cluster that enforces it has joined.
    state: &'static str,
    clusters: Vec<InCluster>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct InCluster {
    cluster: String,
    state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    why: String,
    /// Since the hub last heard of the cluster.
    age_ms: Option<u64>,
}

impl Waited {
    async fn ask(client: &mut Client, policy: &str) -> anyhow::Result<Self> {
        let request = pb::PolicyStatusRequest { name: policy.to_owned() };
        let status = call(client.policy_status(request)).await?;
        let clusters = status.clusters.into_iter().map(|it| {
            let (state, why) = match it.state {
                Some(State::Enforced(_)) => ("enforced", String::new()),
                Some(State::Refused(why)) => ("refused", why),
                Some(State::Lagging(who)) => ("lagging", who),
                None => ("lagging", "says nothing of it".to_owned()),
            };
            InCluster { cluster: it.cluster, state, why, age_ms: it.age_ms }
        });
        let clusters: Vec<InCluster> = clusters.collect();
        let is = |state: &str| clusters.iter().any(|it| it.state == state);
        let state = if is("refused") {
            "refused"
        } else if is("lagging") || clusters.is_empty() {
            "lagging"
        } else {
            "enforced"
        };
        Ok(Self { policy: policy.to_owned(), state, clusters })
    }

    /// `what`, and a line for each of the clusters that are in `state`.
    fn say(&self, what: &str, state: &str) {
        if self.clusters.is_empty() {
            return output::note(format_args!("{what} a cluster: none of those that are to enforce it has joined"));
        }
        output::note(what);
        let age = |it: &InCluster| match it.age_ms {
            Some(age) if age > 5_000 => format!(" (silent for {})", output::length(Duration::from_millis(age))),
            Some(_) => String::new(),
            None => " (never heard)".to_owned(),
        };
        for it in self.clusters.iter().filter(|it| it.state == state) {
            output::note(format_args!("  {}: {}{}", it.cluster, it.why, age(it)));
        }
    }
}

impl Wait {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let Condition::Enforced = self.condition;
        let start = Instant::now();
        let is_up = || start.elapsed() >= Duration::from_secs(self.timeout);
        let (mut again, mut told) = (false, String::new());
        loop {
            match with_client(context, |client| self.ask(client, start)) {
                Err(error) if CallError::is_passing(&error) && !is_up() => {
                    // Once is no news: a policy that was just applied may not be distributed yet.
                    let text = format!("{error:#}");
                    if again && told != text {
                        output::note(format_args!("{text}; asking again"));
                        told = text;
                    }
                    std::thread::sleep(if again { ASK_AGAIN } else { ASK_EVERY });
                    again = true;
                }
                outcome => return outcome,
            }
        }
    }

    /// Asks over one connection, as long as it lasts.
    async fn ask(&self, mut client: Client, start: Instant) -> anyhow::Result<ExitCode> {
        let mut told = Instant::now();
        loop {
            let mut all = Vec::new();
            for policy in &self.policies {
                all.push(Waited::ask(&mut client, policy).await?);
            }
            let is_up = start.elapsed() >= Duration::from_secs(self.timeout);
            let is = |state: &str| all.iter().any(|it| it.state == state);
            let code = match (is("refused"), is("lagging")) {
                (true, _) => Some(2),
                (false, false) => Some(0),
                (false, true) => is_up.then_some(1),
            };
            if let Some(code) = code {
                self.conclude(&all, start)?;
                return Ok(ExitCode::from(code));
            }
            if told.elapsed() > TELL_EVERY {
                told = Instant::now();
                for it in all.iter().filter(|it| it.state == "lagging") {
                    it.say(&format!("{} waits for", it.policy), "lagging");
                }
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    fn conclude(&self, all: &[Waited], start: Instant) -> anyhow::Result<()> {
        for it in all {
            match it.state {
                _ if self.output != Format::Table => output::print(self.output, it)?,
                "refused" => it.say(&format!("{} is refused by", it.policy), "refused"),
                "lagging" => {
                    let what = format!("{} is not enforced after {} s: it waits for", it.policy, self.timeout);
                    it.say(&what, "lagging");
                }
                _ => {
                    let text = format!("{} is enforced, after {:.2} s", it.policy, start.elapsed().as_secs_f64());
                    output::line(text)?;
                }
            }
        }
        Ok(())
    }
}
