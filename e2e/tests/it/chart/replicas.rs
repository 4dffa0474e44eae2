//! The way from one hub with an embedded store to three replicas on three nodes of etcd with TLS, as pods of a release: with the
//! arguments, files, service accounts and rights that the chart renders. Replicas and a node of etcd are then killed, and changes of
//! policies still become verdicts on packets.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hanse_e2e::fabric::{Fabric, ROUTER};
use hanse_e2e::kubernetes::certificates::Authority;
use hanse_e2e::kubernetes::{run, until};
use hanse_e2e::probe::Observed;
use hanse_e2e::sandbox;
use hanse_exchange::hubs::weight;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams};
use serde_json::{Value, json};

use super::{NAMESPACE, PATIENCE, Release, complete, jobs, set};
use crate::clusters::east::{East, WORKLOADS, world};
use crate::clusters::nodes::is_ready;
use crate::etcd_nodes::Nodes;

pub(super) const REPLICAS: usize = 3;
/// The nodes of the cluster, each with an agent.
const AGENTS: usize = 2;
/// The lease of a cluster at the hub, in seconds.
const LEASE_SECONDS: u64 = 10;
/// The Lease of the operator.
const OPERATOR: &str = "hanse-hub-operator";

/// Volumes without a class for the replicas: no provisioner runs.
fn volumes() -> String {
    let volume = |number| {
        format!(
            "apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: volume-{number}}}\nspec: {{capacity: {{storage: 1Gi}}, \
             accessModes: [ReadWriteOnce], hostPath: {{path: /volume-{number}}}}}\n---\n"
        )
    };
    let volumes: String = (0..REPLICAS).map(volume).collect();
    format!("{volumes}apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n")
}

/// The cluster, and the token with which it joins.
fn registration(cluster: &str) -> String {
    format!(
        "apiVersion: hanse.dev/v1alpha1
kind: MemberCluster
metadata: {{name: {cluster}}}
spec: {{grants: {{namespaces: ['*'], cidrs: [10.20.0.0/16]}}}}
---
apiVersion: hanse.dev/v1alpha1
kind: ClusterJoinToken
metadata: {{name: {cluster}}}
spec: {{cluster: {cluster}, secretName: hanse-join, accept: true}}
"
    )
}

/// It closes nothing yet.
pub(super) const POLICY: &str = "apiVersion: hanse.dev/v1alpha1
kind: Tier
metadata: {name: platform}
spec: {phase: Guard, order: 100}
---
apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkPolicy
metadata: {name: web}
spec:
  tier: platform
  selector: app == 'web'
  types: [Ingress]
  ingress: [{action: Allow}]
";

/// The files of the two Secrets that the chart needs, and those of the nodes of etcd.
fn certificates(folder: &Path) -> Vec<String> {
    fs::create_dir(folder).expect("a folder");
    let authority = Authority::create("etcd").expect("an authority");
    let server = authority.server(&[ROUTER.to_owned()]).expect("a certificate");
    let client = authority.client("hanse", &[]).expect("a certificate");
    for (name, text) in [
        ("ca.crt", &authority.pem()),
        ("server.crt", &server.certificate),
        ("server.key", &server.key),
        ("tls.crt", &client.certificate),
        ("tls.key", &client.key),
    ] {
        fs::write(folder.join(name), text).expect("written");
    }
    fs::write(folder.join("unlock.key"), rand::random::<[u8; 32]>()).expect("written");
    let file = |name: &str| folder.join(name).display().to_string();
    [
        ["--cert-file".to_owned(), file("server.crt")],
        ["--key-file".to_owned(), file("server.key")],
        ["--trusted-ca-file".to_owned(), file("ca.crt")],
    ]
    .into_iter()
    .flatten()
    .chain(["--client-cert-auth".to_owned()])
    .collect()
}

/// As the README of the chart describes it.
fn values(east: &East, etcd: &Nodes) -> Value {
    let files = "ca=/etc/hanse/etcd/ca.crt&cert=/etc/hanse/etcd/tls.crt&key=/etc/hanse/etcd/tls.key&timeout=3";
    let url = format!("etcds://{}/hanse?{files}", etcd.hosts().join(","));
    let ports: Vec<u16> = etcd.hosts().iter().filter_map(|it| it.rsplit_once(':')?.1.parse().ok()).collect();
    let mut values = complete();
    for (path, value) in [
        ("hub.replicas", json!(REPLICAS)),
        ("hub.etcd", json!({"url": url, "secretName": "hanse-etcd", "ports": ports})),
        ("hub.keySecret", json!({"name": "hanse-unlock"})),
        ("hub.operator", json!({"enabled": true})),
        ("hub.persistence", json!({"storageClassName": ""})),
        ("hub.leaseSeconds", json!(LEASE_SECONDS)),
        // The policy of the chart, which Hanse enforces, permits no other egress.
        ("hub.apiServerPorts", json!([east.server.address().port()])),
        ("member.replicas", json!(1)),
    ] {
        values = set(values, path, value);
    }
    values
}

pub(super) fn pod(number: usize) -> String {
    format!("hanse-hub-{number}")
}

/// What a replica announces to members.
fn address(number: usize) -> String {
    format!("{}.{NAMESPACE}.svc:7443", pod(number))
}

/// The replica that a cluster watches while it reaches all of them.
fn preferred(cluster: &str) -> usize {
    (0..REPLICAS).max_by_key(|number| weight(cluster, &address(*number))).expect("there are replicas")
}

struct Running {
    east: East,
    /// Connects to the pods of `web`.
    client: Pod,
    web: Vec<Pod>,
    member: String,
}

impl Running {
    fn log_of_member(&self) -> String {
        self.east.programs.log(NAMESPACE, &self.member, "member")
    }

    /// The replica that the member watches.
    fn watched(&self) -> Option<usize> {
        let log = self.log_of_member();
        let line = log.lines().rev().find(|line| line.contains("hub serves the watch stream"))?;
        (0..REPLICAS).find(|number| line.contains(&address(*number)))
    }

    /// The policy, and whether its status claims that the newest version is enforced.
    fn policy(&self) -> (Value, bool) {
        let policy: Value =
            serde_json::from_str(&self.east.kubectl(&["get", "fnp", "web", "-o", "json"], "")).expect("JSON");
        let conditions = policy["status"]["conditions"].as_array().into_iter().flatten();
        let is_enforced = conditions.clone().any(|it| it["type"] == "Enforced" && it["status"] == "True");
        let is_newest = policy["status"]["observedGeneration"] == policy["metadata"]["generation"];
        (policy, is_enforced && is_newest)
    }

    /// Changes the policy, and waits until packets and status follow. Whenever status claims it, packets show it. Returns whether
    /// status said in between that the new version was not enforced.
    async fn change(&self, what: &str, action: &str, expected: Observed) -> bool {
        let change = json!({"spec": {"ingress": [{"action": action}]}}).to_string();
        self.east.kubectl(&["patch", "fnp", "web", "--type=merge", "-p", &change], "");
        let (start, mut arrived, mut said_no) = (Instant::now(), None, false);
        loop {
            let (policy, claims) = self.policy();
            let has_arrived = self.web.iter().all(|web| self.east.observe(&self.client, web) == expected);
            if has_arrived {
                arrived.get_or_insert_with(|| start.elapsed());
            }
            if claims {
                assert!(has_arrived, "{what}: status claims what packets do not show: {policy:#}");
                println!(
                    "{what}: packets are {expected:?} after {arrived:?}, status says so after {:?}",
                    start.elapsed()
                );
                return said_no;
            }
            said_no = true;
            // After several changes, a status is written once a minute.
            assert!(start.elapsed() < PATIENCE * 2, "{what}: {has_arrived}: {policy:#}\n{}", self.east.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn kill(&self, number: usize) {
        let killed = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.east.pods(NAMESPACE).delete(&pod(number), &killed).await.expect("it is deleted");
    }

    async fn is_away(&self, number: usize) -> bool {
        let found = self.east.pods(NAMESPACE).get_opt(&pod(number)).await.expect("an answer");
        found.is_none_or(|it| !is_ready(&it))
    }

    /// `hanse status` as the administrator, whose context one of the replicas has in its volume.
    fn status(&self, replicas: &[Pod]) -> Value {
        let context = |replica: &Pod| -> PathBuf {
            let claim = format!("claims/east/{NAMESPACE}/data-{}/hub/admin.context", replica.name_any());
            self.east.scratch.join(claim)
        };
        let holder = replicas.iter().find(|it| context(it).exists()).expect("one has the context of the administrator");
        let mut command = std::process::Command::new(crate::system::programs().join("hanse"));
        command.arg("--context").arg(context(holder)).args(["status", "-o", "json"]);
        let printed = self.east.network(holder).enter(|| super::success(&mut command, ""));
        serde_json::from_str(&printed).expect("JSON")
    }
}

/// The replica whose operator leads.
async fn leader(east: &East) -> Option<usize> {
    let leases: Api<Lease> = Api::namespaced(east.client.clone(), NAMESPACE);
    let holder = leases.get_opt(OPERATOR).await.ok()??.spec?.holder_identity.filter(|it| !it.is_empty())?;
    let has_acquired = |number: &usize| {
        let log = east.programs.log(NAMESPACE, &pod(*number), "hub");
        log.lines().any(|line| line.contains("Lease acquired") && line.contains(&holder))
    };
    (0..REPLICAS).find(has_acquired)
}

#[test]
fn policies_arrive_when_replicas_of_the_hub_are_killed() {
    sandbox::test("chart::replicas::policies_arrive_when_replicas_of_the_hub_are_killed", || {
        let world = world();
        let fabric = Fabric::build(std::slice::from_ref(&world)).expect("the network");
        let scratch = tempfile::tempdir_in("/run").expect("a folder");
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).expect("every user may enter");
        fabric.router().enter(|| {
            run(async {
                let files = scratch.path().join("etcd");
                let extra = certificates(&files);
                let router: IpAddr = ROUTER.parse().expect("an address");
                let mut etcd = Nodes::start_at(router, &extra, true).await;
                let east = East::start(&world, &fabric, scratch.path()).await;
                let running = install(east, &etcd, &files).await;
                survives(&running, &mut etcd).await;
            });
        });
    });
}

/// The hub first: the cluster gets a name for which the replica that it watches is not the one whose operator leads.
async fn install(east: East, etcd: &Nodes, files: &Path) -> Running {
    let start = Instant::now();
    east.apply(&volumes()).await;
    let from = |name: &str| format!("--from-file={}", files.join(name).display());
    let create = ["--namespace", NAMESPACE, "create", "secret", "generic"];
    east.kubectl(&[&create[..], &["hanse-etcd", &from("ca.crt"), &from("tls.crt"), &from("tls.key")]].concat(), "");
    east.kubectl(&[&create[..], &["hanse-unlock", &from("unlock.key")]].concat(), "");
    let values = values(&east, etcd);
    let release = Release { server: &east.server };
    jobs::moves_to_etcd(&east, &release, &values, files).await;
    let mut leads = None;
    let found = until(PATIENCE, async || {
        leads = leader(&east).await;
        leads.is_some()
    });
    assert!(found.await.is_some(), "an operator leads\n{}", east.logs());
    println!("three replicas are ready, and the operator of {leads:?} leads, after {:?}", start.elapsed());
    let cluster = (0..).map(|number| format!("east-{number}")).find(|name| Some(preferred(name)) != leads);
    let cluster = cluster.expect("one of many");
    east.kubectl(&["apply", "-f", "-"], &registration(&cluster));
    east.kubectl(&["wait", "--for=condition=Issued", "--timeout=60s", &format!("cjt/{cluster}")], "");
    release.helm(&["upgrade", "hanse"], Some(&set(values, "member.cluster", json!(cluster))));
    let member = east.ready_component("member", 1).await.remove(0).name_any();
    east.ready_component("agent", AGENTS).await;
    east.apply(WORKLOADS).await;
    let web = east.ready("default", "app=web", 2).await;
    let client = east.ready("default", "app=client", 1).await.remove(0);
    println!("the cluster is connected after {:?}", start.elapsed());
    let running = Running { east, client, web, member };
    let watches = until(PATIENCE, async || running.watched() == Some(preferred(&cluster)));
    let log = || running.log_of_member();
    assert!(watches.await.is_some(), "the member watches {}: {}", address(preferred(&cluster)), log());
    running
}

async fn survives(running: &Running, etcd: &mut Nodes) {
    let east = &running.east;
    running.change("nothing fails", "Deny", Observed::Closed).await;

    // No node accepts the replica's next pod, so that it stays away.
    let watched = running.watched().expect("it watches one");
    assert_ne!(leader(east).await, Some(watched));
    east.kubectl(&["cordon", "a", "b"], "");
    running.kill(watched).await;
    running.change("the watched replica is killed", "Allow", Observed::Open).await;
    assert!(running.is_away(watched).await, "it was away all the time");
    let another = running.watched().expect("it watches one");
    assert_ne!(another, watched, "the member has left it: {}", running.log_of_member());
    east.kubectl(&["uncordon", "a", "b"], "");
    east.ready_component("hub", REPLICAS).await;

    let leads = leader(east).await.expect("one leads");
    let before = east.pods(NAMESPACE).get(&pod(leads)).await.expect("it exists");
    running.kill(leads).await;
    let said_no = running.change("the replica whose operator leads is killed", "Deny", Observed::Closed).await;
    assert!(said_no, "until another operator leads, status says that the newest version is not enforced");
    let replicas = east.ready_component("hub", REPLICAS).await;
    assert!(replicas.iter().all(|it| it.uid() != before.uid()));

    let of_etcd = etcd.leader().await;
    etcd.kill(of_etcd);
    running.change("the leader of etcd is killed", "Allow", Observed::Open).await;
    let table = east.kubectl(&["get", "fnp"], "");
    let row: Vec<&str> = table.lines().nth(1).expect("a row").split_whitespace().collect();
    // The policy has no order: name, tier, accepted, distributed, enforced, clusters, nodes.
    assert_eq!(row[2..7], ["True", "True", "True", "1/1", "2/2"], "{table}");
    let mut status = Value::Null;
    let is_healthy = until(PATIENCE, async || {
        status = running.status(&replicas);
        status["items"][0]["connected"] == true && status["items"][0]["agentsCurrent"] == AGENTS
    });
    assert!(is_healthy.await.is_some(), "{status:#}\n{}", east.logs());
}
