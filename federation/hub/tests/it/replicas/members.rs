//! Members with a published cluster, and what each has received of the others, with times.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hanse_api::assemble::Changed;
use hanse_exchange::codec::digest_bytes;
use hanse_exchange::interest::{Interest, Wanted};
use hanse_exchange::member::model::{Change, pod};
use hanse_exchange::member::receiver::Receiver;
use hanse_exchange::model::Lease;
use hanse_member::exchange::client::Client;
use hanse_member::hubs::Hubs;
use hanse_member::own_streams::Ends;
use hanse_member::questions::Answering;
use hanse_member::registration::MemberIdentity;
use hanse_member::world::World;
use hanse_policy::inventory::{Cluster, Endpoint, Inventory, Namespace};
use hanse_proto::federation::v1 as wire;
use hanse_ruleset::UnknownPods;
use hanse_runtime::health::{Health, Writes};
use hanse_runtime::shutdown::Shutdown;
use tokio::time::Instant;

/// Pods of each cluster.
const PODS: usize = 8;

/// A change: a pod of a cluster, or a policy, has this number from here on.
pub type Subject = (String, String);
/// The numbers of each subject, with the times at which they were made, or arrived.
pub type Numbers = BTreeMap<Subject, Vec<(u64, Instant)>>;

#[derive(Debug, Default)]
pub struct Seen {
    pub inventory: Inventory,
    /// The numbers of each subject, when they arrived.
    pub times: Numbers,
    /// Clusters whose endpoints became unknown.
    pub stale: Vec<String>,
}

pub struct Member {
    pub name: String,
    pub client: Client,
    pub hubs: Hubs,
    pub seen: Arc<Mutex<Seen>>,
    pub made: Arc<Mutex<Numbers>>,
    cluster: Arc<Mutex<Cluster>>,
    net: u8,
    shutdown: Shutdown,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.shutdown.token().cancel();
    }
}

impl Member {
    pub fn start(identity: &MemberIdentity, folder: &Path, net: u8, hub: &str) -> Self {
        let (shutdown, writes) = (Shutdown::default(), Writes::new(&Health::default()));
        let name = identity.cluster().to_string();
        let hubs = Hubs::restore(&name, folder, &[hub.to_owned()], writes.clone());
        let client = Client::restore(folder, writes, hubs.clone());
        client.want(Interest::from([Arc::new(Wanted::everything())]));
        let seen = Arc::<Mutex<Seen>>::default();
        tokio::spawn(observe(client.clone(), seen.clone(), shutdown.clone()));
        client.start(identity, &shutdown);
        answer(identity, &hubs, &shutdown);
        let mut cluster = Cluster::default();
        cluster.namespaces.insert("n".into(), Namespace::default());
        let (made, cluster) = (Arc::default(), Arc::new(Mutex::new(cluster)));
        let this = Self { name, client, hubs, seen, made, cluster, net, shutdown };
        (0..PODS).for_each(|number| this.set(number, 1));
        this
    }

    /// Gives a pod a number.
    fn set(&self, number: usize, value: u64) {
        let name = format!("p-{number}");
        let id = pod("n".into(), name.as_str().into());
        let endpoint = Endpoint {
            addresses: vec![[10, self.net, 0, u8::try_from(number).unwrap() + 1].into()],
            labels: [("seq".into(), value.to_string().into())].into(),
            ..Endpoint::default()
        };
        let mut cluster = self.cluster.lock().unwrap();
        cluster.endpoints.insert(id.clone(), endpoint);
        let changed = Changed { endpoints: [id].into(), namespaces: ["n".into()].into(), ..Changed::default() };
        let subject = (self.name.clone(), name);
        self.made.lock().unwrap().entry(subject).or_default().push((value, Instant::now()));
        self.client.publish(&cluster, &changed);
    }

    /// The next change of one of its pods.
    pub fn change(&self, value: u64) {
        self.set(usize::try_from(value).unwrap() % PODS, value);
    }

    /// The endpoints of this cluster.
    pub fn published(&self) -> Cluster {
        self.cluster.lock().unwrap().clone()
    }

    /// Whether it has received what another one has published now.
    pub fn has(&self, other: &Self) -> bool {
        let seen = self.seen.lock().unwrap();
        let received = seen.inventory.clusters.get(other.name.as_str());
        received.is_some_and(|received| {
            let labels = |cluster: &Cluster| {
                cluster.endpoints.iter().map(|(id, it)| (id.clone(), it.labels.clone())).collect::<BTreeMap<_, _>>()
            };
            labels(received) == labels(&other.published())
        })
    }

    pub fn watched(&self) -> Option<String> {
        self.client.watched()
    }
}

/// Answers questions of users, at all replicas.
fn answer(identity: &MemberIdentity, hubs: &Hubs, shutdown: &Shutdown) {
    let world = || World::new(identity.cluster().clone(), UnknownPods::Deny, Ends::default());
    let (answering, mut requests) = Answering::new(world().live().clone());
    answering.start(identity, hubs, shutdown);
    let world = world();
    std::thread::spawn(move || {
        while let Some(request) = requests.blocking_recv() {
            request.answer(&world);
        }
    });
}

/// Notes what arrives, and reports as a member without nodes does.
async fn observe(client: Client, seen: Arc<Mutex<Seen>>, shutdown: Shutdown) {
    let stop = shutdown.token();
    let mut changes = client.changes();
    let mut report = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
            _ = report.tick() => {
                let report = client.with_receiver(|it| realisation(it, client.digests_equal()));
                client.report(report);
                continue;
            }
        }
        let Some(updates) = client.take_updates() else { continue };
        let (mut seen, now) = (seen.lock().unwrap(), Instant::now());
        for change in &updates.changes {
            change.apply(&mut seen.inventory);
            let (subject, value) = match change {
                Change::Endpoint { cluster, id, endpoint: Some(endpoint) } => {
                    let value = endpoint.labels.get("seq").and_then(|it| it.parse().ok());
                    ((cluster.to_string(), id.name.to_string()), value)
                }
                Change::Manifest { name, manifest: Some(manifest), .. } => {
                    let json: serde_json::Value = serde_json::from_slice(&manifest.json).unwrap();
                    ((String::new(), name.to_string()), json["spec"]["order"].as_u64())
                }
                Change::Cluster { name, record: Some(record) } => {
                    if matches!(record.lease, Lease::Stale { .. }) {
                        seen.stale.push(name.to_string());
                    }
                    continue;
                }
                _ => continue,
            };
            if let Some(value) = value {
                seen.times.entry(subject).or_default().push((value, now));
            }
        }
    }
}

fn realisation(receiver: &Receiver, digests_equal: Option<bool>) -> wire::Realisation {
    let (received, in_force) = receiver.positions();
    let hub = wire::OriginState {
        origin: String::new(),
        position: Some(received.into()),
        digest: digest_bytes(receiver.hub_digest()),
    };
    let origins = receiver.origins().into_iter().map(|(origin, status)| wire::OriginState {
        origin: origin.to_string(),
        position: Some(status.position.into()),
        digest: digest_bytes(status.digest),
    });
    wire::Realisation {
        hub: Some(in_force.into()),
        received: Some(received.into()),
        origins: [hub].into_iter().chain(origins).collect(),
        digests_equal,
        ..wire::Realisation::default()
    }
}
