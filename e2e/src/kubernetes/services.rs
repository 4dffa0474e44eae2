//! Plays kube-proxy on simulated nodes, and the load balancer of a cloud.
//!
//! A TCP connection over IPv4 from a node or a pod to the cluster IP of a Service goes to one of its ready endpoints. A Service of
//! the type LoadBalancer gets the address of an endpoint, which clients outside the cluster reach.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use serde_json::json;
use tokio::sync::oneshot;

use super::kubeconfig::client;
use super::server::ApiServer;
use crate::namespace::Namespace;

/// The label of an EndpointSlice that names its Service.
const OWNER: &str = "kubernetes.io/service-name";

/// Serves the Services of one cluster; dropped, it stops, and the rules stay.
#[derive(Debug)]
pub struct Services {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Services {
    /// Changes the rules of `nodes` with the Services of the server. It connects in the network namespace of the caller.
    ///
    /// # Errors
    /// When no credentials can be made.
    pub fn start(server: &ApiServer, nodes: Vec<Arc<Namespace>>) -> anyhow::Result<Self> {
        let kubeconfig = server.user("service-proxy", &["system:masters"])?;
        let (stop, mut stopped) = oneshot::channel();
        let name = server.name().to_owned();
        // Commands block, and must not delay others.
        let thread = std::thread::spawn(move || {
            super::run(async {
                let client = match client(&kubeconfig).await {
                    Ok(client) => client,
                    Err(error) => return eprintln!("services of {name}: {error:#}"),
                };
                let config = watcher::Config::default;
                let services = watcher(Api::<Service>::all(client.clone()), config()).default_backoff();
                let slices = watcher(Api::<EndpointSlice>::all(client.clone()), config()).default_backoff();
                let changes = futures::stream::select(services.map(drop), slices.map(drop));
                let mut changes = std::pin::pin!(changes);
                let mut last = String::new();
                loop {
                    tokio::select! {
                        _ = &mut stopped => return,
                        change = changes.next() => if change.is_none() { return },
                    }
                    // The server may be away, on purpose: the watch reports when it is back.
                    if let Err(error) = apply(&client, &nodes, &mut last).await {
                        eprintln!("services of {name}: {error:#}");
                    }
                }
            });
        });
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            // A panic has shown itself already.
            drop(thread.join());
        }
    }
}

async fn apply(client: &kube::Client, nodes: &[Arc<Namespace>], last: &mut String) -> anyhow::Result<()> {
    let services = Api::<Service>::all(client.clone()).list(&ListParams::default()).await.context("list Services")?;
    let slices = Api::<EndpointSlice>::all(client.clone());
    let slices = slices.list(&ListParams::default()).await.context("list EndpointSlices")?;
    let mut rules = String::new();
    for service in &services {
        let backends = backends(service, &slices.items);
        write_rules(&mut rules, service, &backends);
        if let Some((address, _)) = backends.values().flatten().next() {
            balance(client, service, *address).await?;
        }
    }
    if rules != *last {
        let chain = |name: &str, hook: &str| {
            format!("chain {name} {{ type nat hook {hook} priority -100; policy accept;\n{rules}}}\n")
        };
        let (pods, node) = (chain("pods", "prerouting"), chain("node", "output"));
        // A table that is declared and deleted first is replaced.
        let table =
            format!("table ip e2e-services\ndelete table ip e2e-services\ntable ip e2e-services {{\n{pods}{node}}}\n");
        for namespace in nodes {
            namespace.enter(|| nft(&table))?;
        }
        *last = rules;
    }
    Ok(())
}

/// The name of a port of a Service, and addresses with ports that serve it.
type Backends = BTreeMap<String, Vec<(Ipv4Addr, i32)>>;

fn backends(service: &Service, slices: &[EndpointSlice]) -> Backends {
    let mut backends = Backends::new();
    let is_of = |slice: &&EndpointSlice| {
        let (metadata, service) = (&slice.metadata, &service.metadata);
        let owner = metadata.labels.as_ref().and_then(|labels| labels.get(OWNER));
        metadata.namespace == service.namespace && owner == service.name.as_ref()
    };
    for slice in slices.iter().filter(is_of) {
        let is_ready = |ready: Option<bool>| ready != Some(false);
        let endpoints = slice.endpoints.iter().flatten();
        let ready = endpoints.filter(|it| is_ready(it.conditions.as_ref().and_then(|it| it.ready)));
        let addresses: Vec<Ipv4Addr> =
            ready.flat_map(|it| &it.addresses).filter_map(|address| address.parse().ok()).collect();
        for port in slice.ports.iter().flatten() {
            let number = port.port.unwrap_or_default();
            let name = port.name.clone().unwrap_or_default();
            backends.entry(name).or_default().extend(addresses.iter().map(|address| (*address, number)));
        }
    }
    backends
}

fn write_rules(rules: &mut String, service: &Service, backends: &Backends) {
    let Some(spec) = &service.spec else { return };
    let Some(ip) = spec.cluster_ip.as_ref().and_then(|ip| ip.parse::<Ipv4Addr>().ok()) else { return };
    let is_tcp = |port: &&ServicePort| port.protocol.as_deref().is_none_or(|it| it == "TCP");
    for port in spec.ports.iter().flatten().filter(is_tcp) {
        let to = backends.get(port.name.as_deref().unwrap_or_default()).map_or(&[][..], Vec::as_slice);
        let map: Vec<String> =
            to.iter().enumerate().map(|(at, (address, number))| format!("{at} : {address} . {number}")).collect();
        if !map.is_empty() {
            let (count, map) = (map.len(), map.join(", "));
            writeln!(rules, "ip daddr {ip} tcp dport {} dnat to numgen random mod {count} map {{ {map} }}", port.port)
                .expect("text");
        }
    }
}

/// Gives a Service of the type LoadBalancer an address, once.
async fn balance(client: &kube::Client, service: &Service, address: Ipv4Addr) -> anyhow::Result<()> {
    let is_balanced = service.spec.as_ref().is_some_and(|spec| spec.type_.as_deref() == Some("LoadBalancer"));
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    if !is_balanced || status.is_some_and(|it| it.ingress.as_ref().is_some_and(|it| !it.is_empty())) {
        return Ok(());
    }
    let (namespace, name) = (service.metadata.namespace.as_deref(), service.metadata.name.as_deref());
    let api: Api<Service> = Api::namespaced(client.clone(), namespace.unwrap_or_default());
    let status = Patch::Merge(json!({ "status": { "loadBalancer": { "ingress": [{ "ip": address }] } } }));
    api.patch_status(name.unwrap_or_default(), &PatchParams::default(), &status).await.context("report the address")?;
    Ok(())
}

fn nft(table: &str) -> anyhow::Result<()> {
    let mut command = Command::new("nft");
    let mut nft =
        command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start nft")?;
    nft.stdin.take().context("the input is piped")?.write_all(table.as_bytes()).context("write rules")?;
    let output = nft.wait_with_output().context("wait for nft")?;
    ensure!(output.status.success(), "nft: {}\n{table}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
