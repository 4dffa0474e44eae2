//! Two members of a cluster: one takes the place of the other, also without its files, and goes on without the API server.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hanse_e2e::kubernetes::{kubelet, until};
use hanse_e2e::namespace::Namespace;
use hanse_e2e::probe::{self, Observed};
use hanse_kubernetes::Access;
use hanse_member::state::{SecretName, State};
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::Value;

use super::installed::{AGENTS, MEMBERS, OPEN_FOR_CLIENT};
use super::returning::{deletes_a_kind, forgets, is_kept, joins_again, moves_from_a_claim, yields_after_a_partition};
use super::{NAMESPACE, PATIENCE, success};
use crate::clusters::east::East;
use crate::clusters::nodes::addresses;

/// The EndpointSlice that the leader writes.
pub const SLICE: &str = "hanse-member-leader";
/// The Secret and the Lease of the members.
pub const STATE: &str = "hanse-member";
/// Longer than the Lease of the members, and than the lease of the cluster at the hub.
const OUTAGE: Duration = Duration::from_secs(18);
/// A connection on a busy machine: its first packet is repeated after a second.
const SLOW: Duration = Duration::from_millis(2_500);
const PORT: u16 = 8080;

/// No pod may connect to the client: what changes.
pub const CLOSED_CLIENT: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client, namespace: default}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Ingress]}
";

/// The pod at which the Service of agents points.
pub async fn leader(east: &East) -> Option<Pod> {
    let slices: Api<EndpointSlice> = Api::namespaced(east.client.clone(), NAMESPACE);
    let slice = slices.get_opt(SLICE).await.ok()??;
    let address = slice.endpoints?.first()?.addresses.first()?.parse().ok()?;
    let label = ListParams::default().labels("app.kubernetes.io/component=member");
    let pods = east.pods(NAMESPACE).list(&label).await.ok()?;
    pods.items.into_iter().find(|pod| addresses(pod).contains(&address))
}

/// The same, after a rollout as well: it may point at a member that has ended until the next one leads.
pub async fn leads(east: &East) -> Pod {
    let mut found = None;
    until(PATIENCE, async || {
        found = leader(east).await;
        found.is_some()
    })
    .await;
    found.unwrap_or_else(|| panic!("no member leads\n{}", east.logs()))
}

/// Runs commands of the member beside its pods, as `kubectl exec` does in any of them.
pub struct Files(PathBuf);

impl Files {
    /// `name`: of their directory.
    pub fn at(east: &East, name: &str) -> Self {
        let folder = east.scratch.join(name);
        std::fs::create_dir(&folder).expect("a folder");
        let administrator = east.server.user(name, &["system:masters"]).expect("a user");
        let kubeconfig = east.server.write_kubeconfig(name, &administrator).expect("written");
        let access = Access { kubeconfig: Some(kubeconfig), context: None };
        let name = SecretName { namespace: NAMESPACE.to_owned(), name: STATE.to_owned() };
        State::locate(&folder, Some((&access, &name))).expect("written");
        Self(folder)
    }

    pub fn run(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(crate::system::programs().join("hanse-member"));
        success(command.args(arguments).arg("--data").arg(&self.0), "")
    }

    /// The error of a command that fails.
    pub fn fail(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(crate::system::programs().join("hanse-member"));
        let output = super::output(command.args(arguments).arg("--data").arg(&self.0), "");
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Writes the member's own files into a directory, as those of a member that runs without Secrets.
    pub fn copy_to(&self, folder: &Path) {
        let state = State::of_member(&self.0).expect("the Secrets are read");
        std::fs::create_dir(folder).expect("a folder");
        let to = State::from(folder);
        let nodes = state.list("nodes").expect("listed").into_iter().map(|name| format!("nodes/{name}"));
        let own = ["root.pem", "intermediate.pem", "newest-node-at-start", "term", "member.pem"].map(str::to_owned);
        for file in nodes.chain(own) {
            let bytes = state.read(&file).expect("read").expect("it exists");
            to.write(&file, &bytes).expect("written");
        }
    }
}

/// Connections, one after the other, whose verdict must never change.
struct Traffic {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(usize, Vec<String>)>>,
}

impl Traffic {
    fn start(pairs: Vec<(Arc<Namespace>, SocketAddr, String, Observed)>) -> Self {
        let (stop, start) = (Arc::new(AtomicBool::new(false)), Instant::now());
        let probe = |(from, to, title, expected): (Arc<Namespace>, SocketAddr, String, Observed)| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let (mut count, mut wrong) = (0, Vec::new());
                let patience = if expected == Observed::Open { SLOW } else { probe::PATIENCE };
                while !stop.load(Ordering::Relaxed) {
                    let observed = probe::tcp_within(&from, to, &title, patience);
                    count += 1;
                    if observed != expected {
                        wrong.push(format!("{title} after {:?}: {observed:?}, not {expected:?}", start.elapsed()));
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                (count, wrong)
            })
        };
        let threads = pairs.into_iter().map(probe).collect();
        Self { stop, threads }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let (count, wrong) = thread.join().expect("it does not panic");
            println!("{count} connections, {} wrong", wrong.len());
            assert!(count > 0 && wrong.is_empty(), "{wrong:#?}");
        }
    }
}

impl East {
    /// The status of the cluster at the hub.
    pub fn status(&self, hub: &Pod) -> Value {
        let status: Value = serde_json::from_str(&self.hanse(hub, &["status", "-o", "json"])).unwrap_or_default();
        status["items"][0].clone()
    }

    pub async fn until_current(&self, hub: &Pod, count: usize) {
        let current = until(PATIENCE, async || {
            let status = self.status(hub);
            // Without a connection, it is what the last leader reported.
            status["connected"] == true && status["agentsCurrent"] == count
        });
        let current = current.await;
        assert!(current.is_some(), "{count} agents are current: {:#}\n{}", self.status(hub), self.logs());
    }

    /// Waits until another pod than `before` leads.
    pub async fn next_leader(&self, before: &Pod) -> Pod {
        let mut next = None;
        let is_next = until(PATIENCE, async || {
            next = leader(self).await.filter(|pod| pod.uid() != before.uid());
            next.is_some()
        });
        assert!(is_next.await.is_some(), "another member leads\n{}", self.logs());
        next.expect("found")
    }

    /// Deletes a pod; with `grace` 0, its processes are killed.
    async fn delete(&self, pod: &Pod, grace: Option<u32>) {
        let parameters = DeleteParams { grace_period_seconds: grace, ..DeleteParams::default() };
        self.pods(NAMESPACE).delete(&pod.name_any(), &parameters).await.expect("it is deleted");
    }

    pub async fn members(&self) -> Vec<Pod> {
        self.ready_component("member", MEMBERS).await
    }
}

pub async fn fails_over(east: &mut East, hub: &Pod) {
    // No token is left to join with.
    let secrets: Api<Secret> = Api::namespaced(east.client.clone(), NAMESPACE);
    secrets.delete("hanse-join", &DeleteParams::default()).await.expect("it is deleted");
    let web = east.ready("default", "app=web", 2).await;
    let client = east.ready("default", "app=client", 1).await.remove(0);
    east.kubectl(&["apply", "-f", "-"], OPEN_FOR_CLIENT);
    east.until_observed(&client, &web, Observed::Open).await;
    east.until_observed(&web[0], &web[1..], Observed::Closed).await;
    east.until_current(hub, AGENTS).await;
    let to = |pod: &Pod| {
        let title = kubelet::title("east", "default", &pod.name_any());
        (SocketAddr::new(addresses(pod)[0], PORT), title)
    };
    let pair =
        |from: &Pod, (address, title): (SocketAddr, String), expected| (east.network(from), address, title, expected);
    let mut pairs = vec![pair(&web[0], to(&web[1]), Observed::Closed), pair(&web[1], to(&web[0]), Observed::Closed)];
    pairs.extend(web.iter().map(|web| pair(&client, to(web), Observed::Open)));
    let kept = deletes_a_kind(east, hub, &web[0]).await;
    pairs.push(pair(&web[0], to(&kept), Observed::Closed));
    let traffic = Traffic::start(pairs);
    let closes = [client.clone()];

    // The leader is killed: the other one waits until the Lease ends.
    let first = leads(east).await;
    let start = Instant::now();
    east.delete(&first, Some(0)).await;
    east.kubectl(&["apply", "-f", "-"], CLOSED_CLIENT);
    east.until_observed(&web[0], &closes, Observed::Closed).await;
    println!("a policy changed packets {:?} after the leader was killed", start.elapsed());
    let second = east.next_leader(&first).await;
    east.until_current(hub, AGENTS).await;
    println!("all agents were current {:?} after the leader was killed", start.elapsed());
    east.members().await;

    // The leader ends by itself, as in a rollout, and gives the Lease back.
    let start = Instant::now();
    east.delete(&second, None).await;
    east.kubectl(&["--namespace", "default", "delete", "networkpolicy", "client"], "");
    east.until_observed(&web[0], &closes, Observed::Open).await;
    println!("a policy changed packets {:?} after the leader began to end", start.elapsed());
    east.next_leader(&second).await;
    east.until_current(hub, AGENTS).await;
    east.members().await;
    let status = east.status(hub);
    assert!(!status.to_string().contains("in use"), "no copy of the member is reported: {status:#}");

    yields_after_a_partition(east, hub, &web[0], &client).await;
    stays_revoked(east, hub).await;
    is_kept(east, hub).await;
    joins_again(east, hub).await;
    moves_from_a_claim(east, hub).await;
    is_kept(east, hub).await;
    goes_on_without_api_server(east, hub, &web[0], &client).await;
    traffic.end();
    forgets(east, &web[0], &kept).await;
    east.kubectl(&["--namespace", "default", "delete", "networkpolicy", "web"], "");
    east.until_observed(&web[0], &web[1..], Observed::Open).await;
}

/// A revoked node stays revoked after all members have lost their files, and all processes.
async fn stays_revoked(east: &East, hub: &Pod) {
    let files = Files::at(east, "commands");
    println!("{}", files.run(&["node", "revoke", "b"]).trim());
    east.until_current(hub, AGENTS - 1).await;
    let before = leads(east).await;
    for pod in east.members().await {
        east.delete(&pod, Some(0)).await;
    }
    let next = east.next_leader(&before).await;
    east.until_current(hub, AGENTS - 1).await;
    // Its agent tries to connect, and to enrol.
    let log = || std::fs::read_dir(east.scratch.join("logs")).expect("a folder").flatten().map(|it| it.path());
    let is_refused = |text: &str| text.contains("was revoked");
    let refused = until(PATIENCE, async || {
        log()
            .filter(|path| path.to_string_lossy().contains("agent"))
            .any(|path| std::fs::read_to_string(path).is_ok_and(|text| text.lines().rev().take(3).any(is_refused)))
    });
    assert!(refused.await.is_some(), "node b is refused by {}\n{}", next.name_any(), east.logs());
    let list: Value = serde_json::from_str(&files.run(&["node", "list", "-o", "json"])).expect("JSON");
    let state = |it: &Value| format!("{} {}", it["node"], it["state"]).replace('"', "");
    let states: Vec<_> = list["items"].as_array().into_iter().flatten().map(state).collect();
    assert_eq!(states, ["a enrolled", "b revoked", "late enrolled"]);
    east.until_current(hub, AGENTS - 1).await;
    files.run(&["node", "allow", "b"]);
    east.until_current(hub, AGENTS).await;
    east.members().await;
}

/// Without its API server, the leader serves on: other clusters keep its endpoints, and its nodes their member.
async fn goes_on_without_api_server(east: &mut East, hub: &Pod, web: &Pod, client: &Pod) {
    let before = leads(east).await;
    east.server.kill().expect("it is killed");
    let start = Instant::now();
    let objects = ["the Lease of the member", "the EndpointSlice of the Service of agents"];
    let mut reported = BTreeSet::<&str>::new();
    while start.elapsed() < OUTAGE {
        let status = east.status(hub);
        assert_eq!(status["connected"], true, "after {:?}: {status:#}", start.elapsed());
        reported.extend(objects.into_iter().filter(|it| status.to_string().contains(it)));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let all = until(PATIENCE, async || {
        let status = east.status(hub).to_string();
        reported.extend(objects.into_iter().filter(|it| status.contains(it)));
        reported.len() == objects.len()
    });
    assert!(all.await.is_some(), "status names what is not written: {:#}", east.status(hub));
    east.server.start_again().await.expect("it is ready again");
    let start = Instant::now();
    let applied = until(PATIENCE, async || {
        let mut apply = east.server.kubectl().expect("kubectl");
        super::output(apply.args(["apply", "-f", "-"]), CLOSED_CLIENT).status.success()
    });
    assert!(applied.await.is_some(), "the API server accepts a policy");
    east.until_observed(web, std::slice::from_ref(client), Observed::Closed).await;
    println!("a policy changed packets {:?} after the API server was back", start.elapsed());
    let settled = until(PATIENCE, async || {
        let status = east.status(hub).to_string();
        !objects.iter().any(|it| status.contains(it))
    });
    assert!(settled.await.is_some(), "both are written: {:#}", east.status(hub));
    assert_eq!(leader(east).await.map(|it| it.uid()), Some(before.uid()), "the leader has not changed");
    east.kubectl(&["--namespace", "default", "delete", "networkpolicy", "client"], "");
    east.until_observed(web, std::slice::from_ref(client), Observed::Open).await;
    east.until_current(hub, AGENTS).await;
}
