//! The loop of a simulated node: what the server wants of its pods, and what runs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::Value;

use super::addresses::Addresses;
use super::sandbox::Sandbox;
use super::status::{self, State};
use super::workload::{Start, Workload};
use super::{NodeOptions, Running, key};
use crate::namespace::Namespace;

/// How often pods are compared with what the server wants.
const TICK: Duration = Duration::from_millis(50);
/// How long containers that ended wait for the next start. The kubelet begins with ten seconds.
const BACKOFF: Duration = Duration::from_secs(1);
/// How long a failed attempt waits for the next one.
const RETRY: Duration = Duration::from_millis(500);
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

pub struct Pods {
    client: kube::Client,
    cluster: String,
    server: SocketAddr,
    options: NodeOptions,
    node: Arc<Namespace>,
    workload: Arc<dyn Workload>,
    running: Running,
    addresses: Addresses,
    /// By UID.
    entries: BTreeMap<String, Entry>,
    /// For interface names, which are short and never reused.
    links: u32,
}

struct Entry {
    /// As the server has it.
    pod: Pod,
    /// The server has it no longer.
    deleted: bool,
    sandbox: Option<Sandbox>,
    /// What the server knows of its state: it is sent once.
    reported: Option<(State, i32, bool)>,
    /// After a failure.
    not_before: Option<Instant>,
}

impl Pods {
    pub fn new(
        client: kube::Client,
        (cluster, server): (String, SocketAddr),
        options: NodeOptions,
        node: Arc<Namespace>,
        workload: Arc<dyn Workload>,
        running: Running,
    ) -> Self {
        let addresses = Addresses::new(&options.pod_ranges);
        Self {
            client,
            cluster,
            server,
            options,
            node,
            workload,
            running,
            addresses,
            entries: BTreeMap::new(),
            links: 0,
        }
    }

    pub async fn run(mut self) {
        let pods: Api<Pod> = Api::all(self.client.clone());
        // A node may watch its own pods only.
        let config = watcher::Config::default().fields(&format!("spec.nodeName={}", self.options.name));
        let mut events = std::pin::pin!(watcher(pods, config).default_backoff());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut listed = BTreeSet::new();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => self.observe(event, &mut listed),
                    // The server may be away, on purpose: the watch goes on by itself.
                    Some(Err(error)) => eprintln!("node {}: watch pods: {error}", self.options.name),
                    None => return,
                },
                _ = tick.tick() => {}
            }
            let due = |entry: &Entry| entry.not_before.is_none_or(|time| time <= Instant::now());
            let due: Vec<String> =
                self.entries.iter().filter(|(_, entry)| due(entry)).map(|(uid, _)| uid.clone()).collect();
            for uid in due {
                self.reconcile(&uid).await;
            }
        }
    }

    fn observe(&mut self, event: Event<Pod>, listed: &mut BTreeSet<String>) {
        match event {
            Event::Init => listed.clear(),
            Event::InitApply(pod) => {
                listed.extend(pod.metadata.uid.clone());
                self.set(pod);
            }
            Event::InitDone => {
                for (uid, entry) in &mut self.entries {
                    entry.deleted |= !listed.contains(uid);
                }
            }
            Event::Apply(pod) => self.set(pod),
            Event::Delete(pod) => {
                if let Some(entry) = pod.metadata.uid.as_ref().and_then(|uid| self.entries.get_mut(uid)) {
                    entry.deleted = true;
                }
            }
        }
    }

    fn set(&mut self, pod: Pod) {
        let Some((.., uid)) = key(&pod) else { return };
        let new = || Entry { pod: pod.clone(), deleted: false, sandbox: None, reported: None, not_before: None };
        let entry = self.entries.entry(uid).or_insert_with(new);
        entry.pod = pod;
    }

    /// Brings one pod nearer to what is wanted, and tries again later where that fails.
    async fn reconcile(&mut self, uid: &str) {
        let Some(mut entry) = self.entries.remove(uid) else { return };
        entry.not_before = None;
        match self.step(&mut entry).await {
            Ok(true) => {}
            Ok(false) => {
                self.entries.insert(uid.to_owned(), entry);
            }
            Err(error) => {
                let (name, node) = (entry.pod.metadata.name.as_deref().unwrap_or_default(), &self.options.name);
                eprintln!("node {node}, pod {name}: {error:#}");
                entry.not_before = Some(Instant::now() + RETRY);
                self.entries.insert(uid.to_owned(), entry);
            }
        }
    }

    /// Returns whether the pod is done with.
    async fn step(&mut self, entry: &mut Entry) -> anyhow::Result<bool> {
        if entry.deleted {
            self.remove(entry);
            return Ok(true);
        }
        if entry.pod.metadata.deletion_timestamp.is_some() {
            return self.end(entry).await;
        }
        if is_terminal(&entry.pod) {
            self.remove(entry);
            return Ok(false);
        }
        if entry.sandbox.is_none() {
            entry.sandbox = Some(self.create(&entry.pod)?);
        }
        let Some(sandbox) = &mut entry.sandbox else { return Ok(false) };
        let state = match sandbox.containers.as_mut().map(|it| it.ended()) {
            Some(None) => State::Running,
            Some(Some(code)) => {
                sandbox.containers = None;
                let policy = entry.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref());
                if policy == Some("Never") || (code == 0 && policy == Some("OnFailure")) {
                    sandbox.ended = Some(code);
                    State::Ended { code }
                } else {
                    let why = format!("the containers ended with code {code}");
                    sandbox.failure = Some((Instant::now(), why.clone()));
                    State::Waiting(why)
                }
            }
            None => match (sandbox.ended, &sandbox.failure) {
                (Some(code), _) => State::Ended { code },
                (None, Some((since, why))) if since.elapsed() < BACKOFF => State::Waiting(why.clone()),
                _ => {
                    let start = Start {
                        cluster: &self.cluster,
                        node: &self.options.name,
                        pod: &entry.pod,
                        network: &sandbox.network,
                        node_network: &self.node,
                        addresses: &sandbox.addresses,
                        node_addresses: &self.options.addresses,
                        restarts: sandbox.starts,
                        client: &self.client,
                        server: self.server,
                    };
                    match self.workload.start(&start).await {
                        Ok(containers) => {
                            (sandbox.containers, sandbox.failure) = (Some(containers), None);
                            sandbox.starts += 1;
                            State::Running
                        }
                        Err(error) => {
                            let why = format!("{error:#}");
                            sandbox.failure = Some((Instant::now(), why.clone()));
                            State::Waiting(why)
                        }
                    }
                }
            },
        };
        self.report(entry, state).await?;
        Ok(false)
    }

    /// The pod's network, with the addresses that it had before this node started, where they are free.
    fn create(&mut self, pod: &Pod) -> anyhow::Result<Sandbox> {
        let (namespace, name, uid) = key(pod).context("the pod has no namespace, name or UID")?;
        let sandbox = if pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true)) {
            Sandbox::on_host(&self.node, &self.options.addresses)
        } else {
            let ips = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
            let before: Vec<_> = ips.into_iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
            let addresses = self.addresses.take(&before)?;
            let interface = format!("pod{}", self.links);
            self.links += 1;
            // A pod of the same name may still be ending on another node.
            let title = format!("{}-{namespace}-{name}-{}", self.cluster, uid.get(..8).unwrap_or(&uid));
            let created = Sandbox::create(&self.node, interface, &title, addresses.clone());
            created.inspect_err(|_| self.addresses.release(&addresses))?
        };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.insert((namespace, name), Arc::clone(&sandbox.network));
        Ok(sandbox)
    }

    fn remove(&mut self, entry: &mut Entry) {
        let Some(sandbox) = entry.sandbox.take() else { return };
        if let Some((namespace, name, _)) = key(&entry.pod) {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            // Another pod may have the name already.
            if running.get(&(namespace.clone(), name.clone())).is_some_and(|it| Arc::ptr_eq(it, &sandbox.network)) {
                running.remove(&(namespace, name));
            }
        }
        let addresses = sandbox.addresses.clone();
        drop(sandbox);
        self.addresses.release(&addresses);
    }

    /// Graceful deletion: requests the end, waits for it for as long as the pod says, reports it, and only then lets the server
    /// delete the object.
    async fn end(&mut self, entry: &mut Entry) -> anyhow::Result<bool> {
        if let Some(sandbox) = &mut entry.sandbox {
            let since = *sandbox.stopping.get_or_insert_with(|| {
                if let Some(containers) = &mut sandbox.containers {
                    containers.stop();
                }
                Instant::now()
            });
            let seconds = entry.pod.metadata.deletion_grace_period_seconds.and_then(|it| u64::try_from(it).ok());
            let grace = seconds.map_or(DEFAULT_GRACE, Duration::from_secs);
            let stopped = sandbox.containers.as_mut().is_none_or(|it| it.has_stopped() || it.ended().is_some());
            if !stopped && since.elapsed() < grace {
                return Ok(false);
            }
            sandbox.containers = None;
            self.report(entry, State::Ended { code: 0 }).await?;
            self.remove(entry);
        }
        let (namespace, name, uid) = key(&entry.pod).context("the pod has no namespace, name or UID")?;
        let preconditions = Some(Preconditions { uid: Some(uid), resource_version: None });
        let now = DeleteParams { grace_period_seconds: Some(0), preconditions, ..DeleteParams::default() };
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        is_current(pods.delete(&name, &now).await.map(drop)).context("delete the pod")?;
        // The watch says when it is gone; a finalizer may keep it.
        entry.not_before = Some(Instant::now() + RETRY);
        Ok(false)
    }

    async fn report(&self, entry: &mut Entry, state: State) -> anyhow::Result<()> {
        let Some(sandbox) = &mut entry.sandbox else { return Ok(()) };
        let ready = state == State::Running && sandbox.containers.as_mut().is_some_and(|it| it.is_ready());
        let report = (state, sandbox.starts, ready);
        // The controller of nodes changes the condition of pods whose node has not renewed its lease.
        if entry.reported.as_ref() == Some(&report) && status::is_ready(&entry.pod) == ready {
            return Ok(());
        }
        let status = status::patch(&entry.pod, &self.options.addresses, sandbox, &report.0, ready);
        self.patch(&entry.pod, status).await?;
        entry.reported = Some(report);
        Ok(())
    }

    async fn patch(&self, pod: &Pod, status: Value) -> anyhow::Result<()> {
        let (namespace, name, _) = key(pod).context("the pod has no namespace, name or UID")?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        let patched = pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await;
        is_current(patched.map(drop)).context("report the pod's status")
    }
}

fn is_terminal(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// A pod that is gone, or whose name another pod has, needs nothing: the watch reports it.
fn is_current(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        other => other,
    }
}
