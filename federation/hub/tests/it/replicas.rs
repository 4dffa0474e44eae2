//! Several replicas of the hub on three real nodes of etcd, with real members, while endpoints and policies change.

// With paths, since the benchmark of failovers includes this file. The tests are modules of their own.
#[path = "replicas/churn.rs"]
pub mod churn;
#[path = "replicas/members.rs"]
pub mod members;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use hanse_identity::keys::Credentials;
use hanse_proto::federation::v1 as wire;
use hanse_proto::federation::v1::inquiries_client::InquiriesClient;
use hanse_store::StoreUrl;
use tokio::time::Instant;

use crate::process::{Process, administrator, free_ports, hub};
use crate::support::{Admin, SOON, apply, join, member_cluster, open, tier};
use members::Member;

/// Short, so that a test observes that leases do not end.
pub const LEASE: Duration = Duration::from_secs(5);

/// A ClusterSet whose hub has replicas.
pub struct World {
    pub folder: tempfile::TempDir,
    replicas: Vec<Replica>,
}

struct Replica {
    url: String,
    ports: [String; 2],
    process: Option<Process>,
}

impl World {
    /// A replica for each URL, all of which lead to one store.
    pub async fn start(urls: &[StoreUrl]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let replicas =
            urls.iter().map(|url| Replica { url: url.to_string(), ports: free_ports(), process: None }).collect();
        let mut this = Self { folder, replicas };
        let first = &this.replicas[0];
        let made = hub()
            .args(["init", "--listen", &*first.ports[0], "--join-listen", &*first.ports[1], "--store", &*first.url])
            .arg("--data")
            .arg(this.data())
            .arg("--key-file")
            .arg(this.key_file())
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        (0..urls.len()).for_each(|number| this.run(number));
        let mut admin = this.admin(0).await;
        admin.apply(apply(tier("platform"))).await.unwrap();
        this
    }

    pub fn data(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    pub fn key_file(&self) -> PathBuf {
        self.folder.path().join("unlock.key")
    }

    pub fn log(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("hub-{number}.log"))
    }

    /// Starts a replica, for the first time or again.
    pub fn run(&mut self, number: usize) {
        let (log, key_file) = (self.log(number), self.key_file());
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        let replica = &mut self.replicas[number];
        let [listen, join] = replica.ports.clone();
        let child = hub()
            .args(["run", "--listen", &*listen, "--join-listen", &*join, "--advertise", &*listen])
            .args(["--store", &*replica.url, "--lease-seconds", &LEASE.as_secs().to_string(), "--key-file"])
            .arg(key_file)
            .stderr(Stdio::from(log))
            .spawn()
            .unwrap();
        replica.process = Some(Process { child, listen, join });
    }

    /// Kills a replica with SIGKILL.
    pub fn kill(&mut self, number: usize) {
        drop(self.replicas[number].process.take().expect("it runs"));
    }

    /// Stops a replica with SIGTERM, and waits for its end.
    pub fn stop(&mut self, number: usize) {
        let mut process = self.replicas[number].process.take().expect("it runs");
        let killed = std::process::Command::new("kill").arg(process.child.id().to_string()).status().unwrap();
        assert!(killed.success() && process.child.wait().unwrap().success());
    }

    pub fn address(&self, number: usize) -> &str {
        &self.replicas[number].ports[0]
    }

    pub fn join_address(&self, number: usize) -> &str {
        &self.replicas[number].ports[1]
    }

    pub fn number_of(&self, address: &str) -> usize {
        self.replicas.iter().position(|it| it.ports[0] == address).expect("the address of a replica")
    }

    pub fn running(&self) -> Vec<usize> {
        (0..self.replicas.len()).filter(|number| self.replicas[*number].process.is_some()).collect()
    }

    pub async fn admin(&self, number: usize) -> Admin {
        administrator(&self.data(), self.replicas[number].process.as_ref().expect("it runs")).await
    }

    /// An administrator at each replica that runs.
    pub async fn admins(&self) -> BTreeMap<usize, Admin> {
        let mut admins = BTreeMap::new();
        for number in self.running() {
            admins.insert(number, self.admin(number).await);
        }
        admins
    }

    pub async fn token(&self, cluster: &str) -> String {
        let request = wire::CreateTokenRequest { cluster: cluster.to_owned(), lifetime_seconds: 600, accept: true };
        self.admin(self.running()[0]).await.create_token(request).await.unwrap().into_inner().token
    }

    /// A cluster that joins at one replica, and is configured with that one only.
    pub async fn member(&self, cluster: &str, net: u8, number: usize) -> Member {
        let token = self.token(cluster).await;
        let grants = member_cluster(cluster, &[&format!("10.{net}.0.0/16")]);
        self.admin(number).await.apply(apply(grants)).await.unwrap();
        let folder = self.folder.path().join(cluster);
        let identity = join(&folder, cluster, &token, self.join_address(number)).await.unwrap();
        Member::start(&identity, &folder, net, self.address(number))
    }

    /// Waits until a user at this replica gets an answer of the member of every cluster.
    pub async fn answered(&self, number: usize) {
        let data = self.data();
        let credentials = Credentials::read(&data.join("admin.key"), &data.join("admin.pem")).unwrap();
        let channel = open(credentials, &data.join("ca.pem"), self.address(number)).await.unwrap();
        let (mut inquiries, deadline) = (InquiriesClient::new(channel), Instant::now() + SOON);
        loop {
            let listed = inquiries.list_pods(wire::ListPodsRequest::default()).await.unwrap().into_inner();
            if listed.notes.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "replica {number}: {:?}\n{}", listed.notes, self.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the replicas logged, for a failure.
    pub fn logs(&self) -> String {
        let tail = |path: &Path| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(25)..].join("\n")
        };
        (0..self.replicas.len()).map(|number| format!("hub {number}:\n{}\n", tail(&self.log(number)))).collect()
    }

    /// Waits for a status of a replica.
    pub async fn until(
        &self,
        number: usize,
        what: &str,
        is: impl Fn(&wire::StatusResponse) -> bool,
    ) -> wire::StatusResponse {
        let (mut admin, deadline) = (self.admin(number).await, Instant::now() + SOON * 3);
        loop {
            let now = admin.status(wire::StatusRequest {}).await.map(tonic::Response::into_inner);
            match now {
                Ok(now) if is(&now) => return now,
                now => assert!(Instant::now() < deadline, "{what}: replica {number}: {now:?}\n{}", self.logs()),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until every replica judges all clusters as healthy, whichever replica they watch.
    pub async fn settle(&self) {
        for number in self.running() {
            self.until(number, "all clusters are healthy at every replica", |it| {
                it.store_unavailable_ms.is_none()
                    && it.clusters.iter().all(|cluster| {
                        cluster.lease == "live"
                            && cluster.connected
                            && cluster.digests_equal == Some(true)
                            && cluster.problems.is_empty()
                    })
            })
            .await;
        }
    }
}

/// Waits until `check` is true, and returns how long that took.
pub async fn when(what: &str, world: &World, limit: Duration, check: impl Fn() -> bool) -> Duration {
    let began = Instant::now();
    while !check() {
        assert!(began.elapsed() < limit, "not within {limit:?}: {what}\n{}", world.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    began.elapsed()
}
