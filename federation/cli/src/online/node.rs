//! `hanse node`: the nodes of clusters, as their members report them.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::reason::Problem;
use super::{Client, call, with_client};
use crate::completion;
use crate::output::{self, ListFormat};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the nodes of all clusters, or of one.
    ///
    /// STATE is `enforcing` (the newest rule set is in force, without a problem), `lagging`, or `unknown` while the cluster is
    /// silent. GENERATION is the rule set in force. HUB and LOCAL are the revisions that it was compiled from. AGE is the time
    /// since the last acknowledgement of the agent, or since its connection ended.
    #[command(after_help = "\
Examples:
  hanse node list
  hanse node list train --problems
  hanse node list -o name | grep '^train/'
  hanse describe node train/node-1")]
    List {
        /// Only nodes of this cluster.
        #[arg(add = completion::clusters())]
        cluster: Option<String>,
        /// Only nodes with a problem.
        #[arg(long)]
        problems: bool,
        #[arg(short, long, value_enum, default_value_t)]
        output: ListFormat,
    },
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    pub cluster: String,
    pub node: String,
    /// `enforcing`, `lagging` or `unknown`.
    pub state: String,
    connected: bool,
    /// Term and number.
    generation: String,
    hub_revision: u64,
    local_revision: u64,
    /// Since its agent last acknowledged something, or its stream ended.
    age_ms: Option<u64>,
    agent_version: String,
    /// Pods that are not enforced.
    unenforced: u32,
    problems: Vec<Problem>,
}

impl From<pb::NodeInfo> for Node {
    fn from(it: pb::NodeInfo) -> Self {
        let pb::NodeId { cluster, node } = it.id.unwrap_or_default();
        Self {
            cluster,
            node,
            state: it.state,
            connected: it.connected,
            generation: format!("{}.{}", it.term, it.number),
            hub_revision: it.hub_revision,
            local_revision: it.local_revision,
            age_ms: it.age_ms,
            agent_version: it.agent_version,
            unenforced: it.unenforced,
            problems: it.problems.into_iter().map(Problem::from).collect(),
        }
    }
}

/// All nodes that a request is about, page by page.
pub async fn list(client: &mut Client, mut request: pb::ListNodesRequest) -> anyhow::Result<Vec<Node>> {
    let mut nodes = Vec::new();
    loop {
        let page = call(client.list_nodes(request.clone())).await?;
        request.after = page.nodes.last().and_then(|last| last.id.clone());
        nodes.extend(page.nodes.into_iter().map(Node::from));
        if !page.more || request.after.is_none() {
            return Ok(nodes);
        }
    }
}

impl Node {
    fn age(&self) -> String {
        self.age_ms.map_or_else(|| "never".to_owned(), |age| output::length(Duration::from_millis(age)))
    }

    fn version(&self) -> &str {
        if self.agent_version.is_empty() { "-" } else { &self.agent_version }
    }

    /// In words, as tables and lists have them.
    fn problems(&self) -> impl Iterator<Item = String> {
        self.problems.iter().map(Problem::line)
    }

    /// For `hanse describe node`, with everything that each reason concerns.
    pub fn describe(&self) -> anyhow::Result<()> {
        for (name, value) in [
            ("Node", self.node.clone()),
            ("Cluster", self.cluster.clone()),
            ("State", self.state.clone()),
            ("Connected", if self.connected { "yes".to_owned() } else { "no".to_owned() }),
            ("Age", self.age()),
            ("Agent", self.version().to_owned()),
            ("Generation", self.generation.clone()),
            ("Revisions", format!("hub {}, local {}", self.hub_revision, self.local_revision)),
            ("Unenforced", output::count(self.unenforced as usize, "pod")),
        ] {
            output::field(name, value)?;
        }
        self.describe_problems()
    }

    pub fn describe_problems(&self) -> anyhow::Result<()> {
        for it in &self.problems {
            output::line("")?;
            let node = format_args!("{}/{}", self.cluster, self.node);
            match it.items.len() {
                0 => output::line(format_args!("{node}: {}", it.line()))?,
                _ => output::line(format_args!("{node}: {} ({})", it.reason, it.count))?,
            }
            it.items.iter().try_for_each(|item| output::line(format_args!("  {item}")))?;
        }
        Ok(())
    }
}

impl Command {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let Self::List { cluster, problems, output } = self;
        let cluster = cluster.unwrap_or_default();
        let nodes = with_client(context, async |mut client| {
            if !cluster.is_empty() {
                super::cluster::ensure_exists(&mut client, &cluster).await?;
            }
            let request = pb::ListNodesRequest { cluster, only_problems: problems, ..Default::default() };
            list(&mut client, request).await
        })?;
        match (output, output.data()) {
            (_, Some(format)) => output::list(format, "NodeList", &nodes)?,
            (ListFormat::Name, None) => {
                nodes.iter().try_for_each(|it| output::line(format_args!("{}/{}", it.cluster, it.node)))?;
            }
            (wide, None) => show(&nodes, problems, wide == ListFormat::Wide)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

pub fn show(nodes: &[Node], problems: bool, wide: bool) -> anyhow::Result<()> {
    if nodes.is_empty() {
        let text = if problems { "no nodes with problems" } else { "no nodes reported" };
        return output::line(text);
    }
    let mut headings = vec!["CLUSTER", "NODE", "STATE", "GENERATION", "HUB", "LOCAL", "AGE", "AGENT"];
    if wide {
        headings.extend(["CONNECTED", "UNENFORCED"]);
    }
    headings.push("PROBLEM");
    let mut table = output::table(headings);
    for it in nodes {
        let mut row = vec![
            it.cluster.clone(),
            it.node.clone(),
            it.state.clone(),
            it.generation.clone(),
            it.hub_revision.to_string(),
            it.local_revision.to_string(),
            it.age(),
            it.version().to_owned(),
        ];
        if wide {
            row.extend([if it.connected { "yes" } else { "no" }.to_owned(), it.unenforced.to_string()]);
        }
        let mut its = it.problems();
        let first = its.next().unwrap_or_else(|| "-".to_owned());
        row.push(match its.count() {
            0 => first,
            more => format!("{first} (+{more})"),
        });
        table.add_row(row);
    }
    table.print()
}
