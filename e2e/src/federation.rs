//! A federation of real API servers: a management cluster whose custom resources the hub's operator reconciles, and clusters
//! whose members and agents are installed with the chart.
//!
//! All API servers share one etcd, with prefixes of their own. The hub and the API servers are at the router of the fabric, where
//! every node reaches them.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;

use crate::deployment::{Deployment, HUB, HUB_JOIN};
use crate::fabric::{Fabric, ROUTER};
use crate::kubernetes::cluster::{Cluster, Endpoint};
use crate::kubernetes::{ApiServer, Etcd, Options, manifests};
use crate::probe::{self, Observed};
use crate::world;

pub mod delays;

/// Images are not pulled: nodes run the program of this name.
const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// The namespace of releases.
pub const NAMESPACE: &str = "hanse";

/// All clusters, and the hub; dropped, all of it ends.
pub struct Federation<'a> {
    pub management: ApiServer,
    /// Of the administrator of the management cluster.
    pub client: kube::Client,
    pub clusters: Vec<Cluster>,
    pub system: Deployment<'a>,
    worlds: Vec<world::Cluster>,
}

impl std::fmt::Debug for Federation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Federation").field("clusters", &self.clusters).finish_non_exhaustive()
    }
}

impl<'a> Federation<'a> {
    /// Starts everything except members and agents, which [`Self::join`] installs. Must be called in the router's namespace.
    /// `registrations` are manifests of the MemberClusters, and of a ClusterJoinToken for each, with its name and the Secret
    /// `NAME-join`; `programs` is the folder of the project's programs.
    ///
    /// # Errors
    /// When a program is missing or does not serve in time.
    pub async fn start(
        fabric: &'a Fabric,
        worlds: &[world::Cluster],
        registrations: &str,
        programs: &Path,
        scratch: &Path,
    ) -> anyhow::Result<Self> {
        // Users of pods enter it.
        fs::set_permissions(scratch, Permissions::from_mode(0o755)).context("open the folder of logs and volumes")?;
        let etcd = Etcd::start()?;
        let address: IpAddr = ROUTER.parse().context("read the router's address")?;
        let management = ApiServer::start(&etcd, Options::new("management").listen(address));
        let members = worlds.iter().map(|world| {
            let (etcd, scratch) = (Arc::clone(&etcd), scratch.join(&world.name));
            async move {
                fs::create_dir_all(&scratch).context("create a folder for a cluster")?;
                Cluster::start(&etcd, address, world, fabric, programs, &scratch).await
            }
        });
        let (management, clusters) = futures::join!(management, futures::future::join_all(members));
        let (management, clusters) = (management?, clusters.into_iter().collect::<Result<Vec<_>, _>>()?);
        let crds = deploy().join("crds");
        kubectl(&management, &["apply", "--server-side", "-f", &crds.to_string_lossy()], "")?;
        let client = management.client().await?;
        for file in fs::read_dir(&crds).context("list the custom resource definitions")?.flatten() {
            // The name of a file is that of its definition.
            let definition = file.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
            manifests::established(&client, &definition).await?;
        }
        let mut system = Deployment::start(fabric, programs, scratch)?;
        system.operate(&management.kubeconfig())?;
        kubectl(&management, &["apply", "-f", "-"], registrations)?;
        Ok(Self { management, client, clusters, system, worlds: worlds.to_vec() })
    }

    /// Installs member and agents in every cluster with a join token, and waits until all nodes enforce.
    ///
    /// # Errors
    /// When a release cannot be installed, or is not ready in time.
    pub async fn join(&self) -> anyhow::Result<()> {
        for (cluster, world) in self.clusters.iter().zip(&self.worlds) {
            self.install(cluster, world)?;
        }
        for (cluster, world) in self.clusters.iter().zip(&self.worlds) {
            for (component, count) in [("member", 1), ("agent", world.nodes.len())] {
                let label = format!("app.kubernetes.io/component={component}");
                cluster.ready(NAMESPACE, &label, count).await?;
            }
        }
        self.settle().map(drop)
    }

    fn install(&self, cluster: &Cluster, world: &world::Cluster) -> anyhow::Result<()> {
        let server = &cluster.server;
        let (issued, secret) = (format!("cjt/{}", cluster.name()), format!("{}-join", cluster.name()));
        self.kubectl(&["wait", "--for=condition=Issued", "--timeout=60s", &issued])?;
        let token = self.kubectl(&["get", "secret", &secret, "-o", "go-template={{.data.token | base64decode}}"])?;
        kubectl(server, &["create", "namespace", NAMESPACE], "")?;
        let secret = ["create", "secret", "generic", "hanse-join", "--namespace", NAMESPACE];
        kubectl(server, &[&secret[..], &["--from-file=token=/dev/stdin"]].concat(), &token)?;
        let first = world.nodes.first().context("a cluster has a node")?;
        let member = json!({
            "enabled": true,
            "image": { "digest": DIGEST },
            "cluster": cluster.name(),
            "hub": { "addresses": [HUB], "joinAddresses": [HUB_JOIN], "tokenSecret": { "name": "hanse-join" } },
            // On the node that is named below.
            "replicas": 1,
            "nodeSelector": { "kubernetes.io/hostname": first.name },
        });
        let agent = json!({ "enabled": true, "image": { "digest": DIGEST } });
        let mut helm = server.helm()?;
        helm.args(["install", "hanse"]).arg(deploy().join("chart")).args(["--namespace", NAMESPACE]);
        for (key, value) in [("image", json!({ "registry": "registry.example" })), ("member", member), ("agent", agent)]
        {
            helm.arg("--set-json").arg(format!("{key}={value}"));
        }
        success(&mut helm, "").map(drop)
    }

    /// Waits until every agent enforces the newest that its cluster and the hub have.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn settle(&self) -> anyhow::Result<Duration> {
        let names: Vec<&str> = self.clusters.iter().map(Cluster::name).collect();
        self.system.settle(&names).with_context(|| self.logs())
    }

    /// kubectl as the administrator of the management cluster. Returns what it prints.
    ///
    /// # Errors
    /// When it fails; the error contains what it says.
    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        kubectl(&self.management, arguments, "")
    }

    /// `kubectl apply` at the management cluster.
    ///
    /// # Errors
    /// As [`Self::kubectl`].
    pub fn apply(&self, text: &str) -> anyhow::Result<String> {
        kubectl(&self.management, &["apply", "-f", "-"], text)
    }

    /// The end of all logs.
    pub fn logs(&self) -> String {
        let members: Vec<String> = self.clusters.iter().map(Cluster::logs).collect();
        format!("{}\n{}", self.system.logs(), members.join("\n"))
    }
}

/// kubectl as the administrator of a cluster, with a text as its input.
///
/// # Errors
/// When it fails; the error contains what it says.
pub fn kubectl(server: &ApiServer, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    success(server.kubectl()?.args(arguments), input)
}

/// When connections are as wanted everywhere: one pair of pods for each cluster, and the time since the call at which the last of
/// them changed. `None` when that does not happen before the deadline.
pub fn becomes(pairs: &[(&Endpoint, &Endpoint)], wanted: &Observed, deadline: Duration) -> Option<Duration> {
    std::thread::scope(|scope| {
        let probes: Vec<_> = pairs
            .iter()
            .map(|(from, to)| {
                let observe = || probe::becomes(&from.network, to.address(0), &to.title(), wanted.clone(), deadline);
                scope.spawn(observe)
            })
            .collect();
        let times = probes.into_iter().map(|it| it.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        // All of them end before the result is known.
        let times: Vec<Option<Duration>> = times.collect();
        times.into_iter().collect::<Option<Vec<_>>>()?.into_iter().max()
    })
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn success(command: &mut Command, input: &str) -> anyhow::Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().with_context(|| format!("start {name}"))?;
    child.stdin.take().context("the input is piped")?.write_all(input.as_bytes()).context("write its input")?;
    let output = child.wait_with_output().with_context(|| format!("wait for {name}"))?;
    if !output.status.success() {
        let arguments: Vec<_> = command.get_args().map(|it| it.to_string_lossy()).collect();
        bail!("{name} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}
