//! The product's own processes in a fabric: a hub at the router, a member on the first node of each cluster, an agent on
//! every node, joined with real tokens.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::fabric::{Fabric, UPLINK};
use crate::namespace::Namespace;
use crate::probe;
use crate::process::Process;
use crate::world::{Cluster, Node};

/// The router's address towards every node: the hub of the world serves there.
pub const HUB: &str = "169.254.2.1:7443";
pub const HUB_JOIN: &str = "169.254.2.1:7444";
const AGENTS_PORT: u16 = 7500;
const ENROL_PORT: u16 = 7501;
/// How long a process may take to say that it serves, and a cluster to be in sync.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// All processes of a world; dropped, all of them are killed.
#[derive(Debug)]
pub struct Deployment<'a> {
    fabric: &'a Fabric,
    programs: PathBuf,
    /// Data folders, tokens and logs.
    scratch: PathBuf,
    hub: Option<Process>,
    members: BTreeMap<String, Process>,
    /// By (cluster, node).
    agents: BTreeMap<(String, String), Process>,
    /// How long certificates are valid, in seconds, where not as by default.
    lifetime: Option<u32>,
    /// The kubeconfig of the management cluster, where the hub's operator runs.
    management: Option<PathBuf>,
}

impl<'a> Deployment<'a> {
    /// Makes a ClusterSet and serves it.
    pub fn start(fabric: &'a Fabric, programs: &Path, scratch: &Path) -> anyhow::Result<Self> {
        Self::start_with(fabric, programs, scratch, None)
    }

    /// As [`Self::start`], with certificates of members and nodes that are valid for `lifetime` seconds.
    pub fn start_with(
        fabric: &'a Fabric,
        programs: &Path,
        scratch: &Path,
        lifetime: Option<u32>,
    ) -> anyhow::Result<Self> {
        let (programs, scratch) = (programs.to_owned(), scratch.to_owned());
        let (members, agents) = (BTreeMap::new(), BTreeMap::new());
        let mut world = Self { fabric, programs, scratch, hub: None, members, agents, lifetime, management: None };
        let mut init = world.program("hanse-hub");
        init.args(["init", "--listen", HUB, "--join-listen", HUB_JOIN, "--data"]).arg(world.scratch.join("hub"));
        let output = init.output().context("start hanse-hub init")?;
        if !output.status.success() {
            bail!("hanse-hub init: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        world.start_hub()?;
        Ok(world)
    }

    fn program(&self, name: &str) -> Command {
        Command::new(self.programs.join(name))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.log"))
    }

    /// Serves the ClusterSet, for the first time or again.
    pub fn start_hub(&mut self) -> anyhow::Result<()> {
        let log = self.log("hub");
        let before = std::fs::read_to_string(&log).unwrap_or_default().matches("hub is serving").count();
        let mut run = self.program("hanse-hub");
        run.args(["run", "--listen", HUB, "--join-listen", HUB_JOIN, "--data"]).arg(self.scratch.join("hub"));
        let management = self.management.iter();
        run.args(management.flat_map(|it| ["--operator".as_ref(), "--kubeconfig".as_ref(), it.as_os_str()]));
        run.args(self.lifetime.iter().flat_map(|it| ["--certificate-seconds".to_owned(), it.to_string()]));
        let mut hub = Process::start(self.fabric.router(), run, &log).context("start hanse-hub")?;
        let served = probe::until(PATIENCE, || hub.has_ended() || hub.log().matches("hub is serving").count() > before);
        if served.is_none() || hub.has_ended() {
            bail!("the hub does not serve:\n{}", hub.log());
        }
        self.hub = Some(hub);
        Ok(())
    }

    /// Serves the ClusterSet again, with an operator for the custom resources of a management cluster.
    pub fn operate(&mut self, management: &Path) -> anyhow::Result<()> {
        self.kill_hub()?;
        self.management = Some(management.to_owned());
        self.start_hub()
    }

    /// `kill -9`.
    pub fn kill_hub(&mut self) -> anyhow::Result<()> {
        self.hub.take().context("the hub runs")?.kill().context("kill the hub")?;
        Ok(())
    }

    /// Lets a cluster join with a token, and its nodes enrol: member and agents run. `source` is the directory of its manifests.
    pub fn join(&mut self, cluster: &Cluster, source: &Path) -> anyhow::Result<()> {
        self.make_token(&cluster.name)?;
        self.start_member(cluster, source)?;
        for node in &cluster.nodes {
            let mut create = self.program("hanse-member");
            create.args(["node-token", "create", "--cluster", &cluster.name, "--node", &node.name, "--data"]);
            create.arg(self.member_data(&cluster.name));
            let made = create.output().context("start hanse-member node-token create")?;
            let token = success("hanse-member node-token create", made)?;
            write_secret(&self.scratch.join(format!("{}-{}.token", cluster.name, node.name)), &token)?;
            self.start_agent(cluster, node)?;
        }
        Ok(())
    }

    /// Makes the token with which a cluster's member joins.
    pub fn make_token(&self, cluster: &str) -> anyhow::Result<()> {
        let token = self.hanse(&["token", "create", "--cluster", cluster])?;
        write_secret(&self.scratch.join(format!("{cluster}.token")), &token)
    }

    fn member_data(&self, cluster: &str) -> PathBuf {
        self.scratch.join(format!("member-{cluster}"))
    }

    fn member_host<'c>(&self, cluster: &'c Cluster) -> anyhow::Result<(&'a Namespace, &'c Node)> {
        let node = cluster.nodes.first().context("the cluster has a node")?;
        Ok((self.fabric.node(&cluster.name, &node.name).context("the node is built")?, node))
    }

    /// Starts the member of a cluster, for the first time or again.
    pub fn start_member(&mut self, cluster: &Cluster, source: &Path) -> anyhow::Result<()> {
        let (namespace, node) = self.member_host(cluster)?;
        let log = self.log(&format!("member-{}", cluster.name));
        let before = std::fs::read_to_string(&log).unwrap_or_default().matches("member serves").count();
        let address = |port| format!("{}:{port}", node.addresses[0]);
        let mut run = self.program("hanse-member");
        run.args(["run", "--cluster", &cluster.name, "--hub", HUB, "--join", HUB_JOIN]);
        run.args(["--agent-listen", &address(AGENTS_PORT), "--enrol-listen", &address(ENROL_PORT)]);
        run.arg("--token-file").arg(self.scratch.join(format!("{}.token", cluster.name)));
        run.args(self.lifetime.iter().flat_map(|it| ["--node-certificate-seconds".to_owned(), it.to_string()]));
        run.arg("--data").arg(self.member_data(&cluster.name)).arg("--source").arg(source);
        let mut member = Process::start(namespace, run, &log).context("start hanse-member")?;
        let serves = |member: &mut Process| member.log().matches("member serves").count() > before;
        let served = probe::until(PATIENCE, || member.has_ended() || serves(&mut member));
        if served.is_none() || member.has_ended() {
            bail!("the member of {} does not serve:\n{}", cluster.name, member.log());
        }
        self.members.insert(cluster.name.clone(), member);
        Ok(())
    }

    /// `kill -9`.
    pub fn kill_member(&mut self, cluster: &str) -> anyhow::Result<()> {
        self.members.remove(cluster).context("the member runs")?.kill().context("kill the member")?;
        Ok(())
    }

    /// Starts the agent of a node, for the first time or again.
    pub fn start_agent(&mut self, cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
        let name = format!("{}-{}", cluster.name, node.name);
        let namespace = self.fabric.node(&cluster.name, &node.name).context("the node is built")?;
        let member = self.member_host(cluster)?.1.addresses[0];
        let mut run = self.program("hanse-agent");
        run.args(["run", "--node", &node.name, "--uplink", UPLINK]);
        run.args(["--member", &format!("{member}:{AGENTS_PORT}"), "--enrol", &format!("{member}:{ENROL_PORT}")]);
        run.arg("--token-file").arg(self.scratch.join(format!("{name}.token")));
        run.arg("--data").arg(self.scratch.join(format!("agent-{name}")));
        let agent = Process::start(namespace, run, &self.log(&format!("agent-{name}"))).context("start hanse-agent")?;
        self.agents.insert((cluster.name.clone(), node.name.clone()), agent);
        Ok(())
    }

    /// `kill -9`.
    pub fn kill_agent(&mut self, cluster: &str, node: &str) -> anyhow::Result<()> {
        let agent = self.agents.remove(&(cluster.to_owned(), node.to_owned())).context("the agent runs")?;
        agent.kill().context("kill the agent")?;
        Ok(())
    }

    /// What kernels of a cluster decided of connections, as its member has it: `hanse-member flows` with these arguments.
    pub fn flows(&self, cluster: &str, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
        let mut command = self.program("hanse-member");
        command.args(["flows", "-o", "json", "--last", "100000", "--data"]).arg(self.member_data(cluster));
        let output = command.args(arguments).output().context("start hanse-member flows")?;
        let lines = success("hanse-member flows", output)?;
        lines.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Runs `hanse` as the administrator; its output, or its complaint.
    pub fn hanse(&self, arguments: &[&str]) -> anyhow::Result<String> {
        success(&format!("hanse {}", arguments.join(" ")), self.try_hanse(arguments)?)
    }

    /// As [`Self::hanse`], whatever the outcome.
    pub fn try_hanse(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = self.program("hanse");
        command.arg("--context").arg(self.context()).args(arguments);
        self.fabric.router().enter(|| command.output()).context("start hanse")
    }

    /// The administrator's context file.
    pub fn context(&self) -> PathBuf {
        self.scratch.join("hub/admin.context")
    }

    /// Waits until every agent of these clusters enforces the newest that its cluster and the hub have.
    pub fn settle(&self, clusters: &[&str]) -> anyhow::Result<Duration> {
        let mut last = String::new();
        let settled = probe::until(PATIENCE, || {
            let Ok(text) = self.hanse(&["status", "-o", "json"]) else { return false };
            let status: Value = serde_json::from_str(&text).unwrap_or_default();
            let revision = &status["hubRevision"];
            let current = |name: &&str| {
                let found = status["items"].as_array().into_iter().flatten().find(|it| it["name"] == **name);
                found.is_some_and(|it| {
                    it["agents"] != 0
                        && it["agents"] == it["agentsCurrent"]
                        && it["enforcedRevision"] == *revision
                        && it["digestsEqual"] == true
                })
            };
            last = text;
            clusters.iter().all(current)
        });
        settled.with_context(|| format!("not in sync after {} s: {last}\n{}", PATIENCE.as_secs(), self.logs()))
    }

    /// Waits until every federated policy is enforced everywhere.
    pub fn wait_for_policies(&self) -> anyhow::Result<()> {
        let objects: Value = serde_json::from_str(&self.hanse(&["get", "FederatedNetworkPolicy", "-o", "json"])?)?;
        for object in objects["items"].as_array().into_iter().flatten() {
            let name = object["metadata"]["name"].as_str().context("an object has a name")?;
            self.hanse(&["wait", "--for=enforced", "--timeout", "20", name]).with_context(|| self.logs())?;
        }
        Ok(())
    }

    /// What each process has said so far: the hub first, then members, then agents.
    pub fn all_logs(&self) -> Vec<String> {
        self.hub.iter().chain(self.members.values()).chain(self.agents.values()).map(Process::log).collect()
    }

    /// The end of every log, for when something is wrong.
    pub fn logs(&self) -> String {
        let all = self.hub.iter().chain(self.members.values()).chain(self.agents.values());
        let end = |process: &Process| {
            let log = process.log();
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(8)..].join("\n")
        };
        all.map(end).collect::<Vec<_>>().join("\n--\n")
    }
}

fn success(what: &str, output: Output) -> anyhow::Result<String> {
    if !output.status.success() {
        bail!("{what}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut options = std::fs::File::options();
    let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(path).context("keep a token")?;
    file.write_all(text.as_bytes()).context("keep a token")
}
