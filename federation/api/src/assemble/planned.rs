//! What a folder of manifests says of pods that do not run: for the offline commands only.
//!
//! - Each pod template of a workload is an endpoint `kind/name`, or `kind/name/part` where its object has several. It has
//!   no address ([`Planned`]).
//! - A pod that no API server has stored (it has no status) is one too, under its own name.
//! - A running pod of the same workload replaces the template's endpoint, and an object that another one of the folder
//!   controls is not a workload of its own.
//! - Services select them, and are seen as their clients see them ([`Front`]).
//!
//! Members assemble by [`super::Assembly`], which knows none of this: they never enforce for these endpoints and never
//! publish them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::inventory::{
    Backend, Endpoint, EndpointId, EndpointKind, Front, FrontPort, Labels, Namespace, Planned, Service,
};
use hanse_policy::model::ClusterName;

use super::cluster::{ClusterState, NAMESPACE_NAME_LABEL, assemble_cluster};
use super::rivals;
use crate::diagnostic::SourceLocation;
use crate::inventory::{
    EndpointSlice, NamespacedName, Pod, PodPhase, Service as WrittenService, SliceEndpoint, TargetPort,
};
use crate::manifest::{Manifest, Manifests};
use crate::names::{group, owner_name};
use crate::object::Object;
use crate::workload::{Template, Workload};

/// A cluster as it is written down.
#[derive(Debug, Clone, Default)]
pub struct Offline {
    pub state: ClusterState,
    /// Protocols and ports that containers declare, by endpoint.
    pub declared: BTreeMap<EndpointId, BTreeSet<(u8, u16)>>,
    /// Where the templates of planned endpoints are written.
    pub locations: BTreeMap<EndpointId, SourceLocation>,
}

/// The inventory and the policies of the cluster `name`, with what does not run yet. Of several objects with one key one
/// counts; commands that answer by them settle that first, and report conflicts.
pub fn assemble_offline(name: &ClusterName, mut read: Manifests) -> Offline {
    let settled = rivals::settle(&mut read);
    let workloads = Workloads::new(&read.workloads);
    let replaced = workloads.replaced(read.objects.iter().filter_map(pod));
    let mut offline = Offline::default();
    let mut unstored = Vec::new();
    for pod in read.objects.iter().filter_map(pod) {
        offline.declared.entry(pod.id.clone()).or_default().extend(pod.declared_ports());
        if pod.phase == PodPhase::Unstored {
            unstored.push(pod.id.clone());
        }
    }
    let services = Services::new(&read.objects);
    let planned = workloads.planned(&replaced);
    offline.state = assemble_cluster(name, read.objects);
    offline.state.diagnostics.extend(settled.into_iter().flatten());
    let cluster = &mut offline.state.cluster;
    for id in unstored {
        if let Some(endpoint) = cluster.endpoints.get_mut(&id) {
            endpoint.planned = Some(Planned::default());
        }
    }
    for (id, endpoint, ports, place) in planned {
        if let Some(namespace) = id.namespace.clone() {
            let labels = || [(NAMESPACE_NAME_LABEL.into(), Arc::clone(&namespace))].into();
            cluster.namespaces.entry(Arc::clone(&namespace)).or_insert_with(|| Namespace { labels: labels() });
        }
        offline.declared.insert(id.clone(), ports);
        offline.locations.insert(id.clone(), place);
        cluster.endpoints.insert(id, endpoint);
    }
    services.add_to(&mut cluster.services, &cluster.endpoints);
    offline
}

fn pod(manifest: &Manifest) -> Option<&Pod> {
    if let Object::Pod(pod) = &manifest.object { Some(pod) } else { None }
}

/// A namespace, and an object in it as owners are named.
type OwnerKey = (Arc<str>, Arc<str>);
/// A workload and one of its templates, by number.
type TemplateAt = (usize, usize);

struct Workloads<'m> {
    all: Vec<&'m Workload>,
    by_name: HashMap<OwnerKey, usize>,
}

/// An endpoint with the protocols and ports that its containers declare, and where it is written.
type PlannedEndpoint = (EndpointId, Endpoint, BTreeSet<(u8, u16)>, SourceLocation);

impl<'m> Workloads<'m> {
    fn new(written: &'m [Workload]) -> Self {
        // What has a generated name is the owner of nothing.
        let named = written.iter().enumerate().filter(|(_, workload)| !workload.metadata.name.is_empty());
        let key = |(at, workload): (usize, &Workload)| {
            let of = &workload.reference;
            let name = owner_name(&of.api_version, &of.kind, &workload.name);
            ((workload.metadata.namespace(), name), at)
        };
        Self { by_name: named.map(key).collect(), all: written.iter().collect() }
    }

    /// The workload at the top of a chain of controllers. `None` where the first of them is not in the folder.
    fn top(&self, namespace: &Arc<str>, controller: &Arc<str>) -> Option<usize> {
        let mut at = *self.by_name.get(&(Arc::clone(namespace), Arc::clone(controller)))?;
        // A chain of five is long (InferenceService, Service, Configuration, Revision, Deployment); one that closes ends.
        for _ in 0..self.all.len().min(16) {
            let next = self.all[at].metadata.controller.as_ref();
            let next = next.and_then(|next| self.by_name.get(&(Arc::clone(namespace), Arc::clone(next))));
            match next {
                Some(next) if *next != at => at = *next,
                _ => break,
            }
        }
        Some(at)
    }

    /// Whether another object of the folder makes it.
    fn is_controlled(&self, at: usize) -> bool {
        let metadata = &self.all[at].metadata;
        let controller = metadata.controller.as_ref();
        controller.and_then(|it| self.top(&metadata.namespace(), it)).is_some_and(|top| top != at)
    }

    /// The templates of which pods run.
    fn replaced(&self, pods: impl Iterator<Item = &'m Pod>) -> BTreeSet<TemplateAt> {
        let mut identities: HashMap<Arc<str>, Vec<TemplateAt>> = HashMap::new();
        for (at, workload) in self.all.iter().enumerate() {
            for (number, _) in workload.templates.iter().enumerate().filter(|(_, it)| !it.identity.is_empty()) {
                identities.entry(workload.metadata.namespace()).or_default().push((at, number));
            }
        }
        let mut replaced = BTreeSet::new();
        for pod in pods.filter(|pod| pod.is_running()) {
            let Some(controller) = &pod.controller else { continue };
            let namespace = pod.id.namespace.clone().unwrap_or_default();
            let labels = &pod.labels;
            let top =
                self.top(&namespace, controller).or_else(|| self.by_generated_name(&namespace, controller, labels));
            if let Some(top) = top {
                let templates = &self.all[top].templates;
                let is_of = |template: &Template| templates.len() == 1 || has_all(labels, &template.identity);
                let of_pod = templates.iter().enumerate().filter(|(_, template)| is_of(template));
                replaced.extend(of_pod.map(|(number, _)| (top, number)));
                continue;
            }
            // A controller between them is not in the folder: the pod has the labels that the controller of the template sets.
            let of_namespace = identities.get(&namespace).into_iter().flatten();
            let of_pod = of_namespace.filter(|(at, it)| has_all(labels, &self.all[*at].templates[*it].identity));
            replaced.extend(of_pod);
        }
        replaced
    }

    /// The workload of a pod whose ReplicaSet or Job is not in the folder: their names begin with its own.
    fn by_generated_name(&self, namespace: &Arc<str>, controller: &str, labels: &Labels) -> Option<usize> {
        let find = |name: &str, api_version: &str, kind: &str| {
            self.by_name.get(&(Arc::clone(namespace), owner_name(api_version, kind, name))).copied()
        };
        if let Some(name) = controller.strip_prefix("ReplicaSet.apps/") {
            let of_hash = |label: &str| {
                let hash = labels.get(label)?;
                name.strip_suffix(&**hash)?.strip_suffix('-')
            };
            let deployment = of_hash("pod-template-hash").and_then(|name| find(name, "apps/v1", "Deployment"));
            let rollout = || find(of_hash("rollouts-pod-template-hash")?, "argoproj.io/v1alpha1", "Rollout");
            return deployment.or_else(rollout);
        }
        let (name, number) = controller.strip_prefix("Job.batch/")?.rsplit_once('-')?;
        let is_time = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        find(name, "batch/v1", "CronJob").filter(|_| is_time)
    }

    /// An endpoint for each template that no running pod replaces.
    fn planned(self, replaced: &BTreeSet<TemplateAt>) -> Vec<PlannedEndpoint> {
        let mut taken = BTreeSet::new();
        let mut all = Vec::new();
        // Several objects that generate their names from one prefix.
        let mut of_prefix: HashMap<(Arc<str>, &str, &str), usize> = HashMap::new();
        for workload in self.all.iter().filter(|it| it.generated.is_some()) {
            *of_prefix.entry((workload.metadata.namespace(), &workload.reference.kind, &workload.name)).or_default() +=
                1;
        }
        for (at, workload) in self.all.iter().enumerate().filter(|(at, _)| !self.is_controlled(*at)) {
            for (number, template) in workload.templates.iter().enumerate() {
                if replaced.contains(&(at, number)) {
                    continue;
                }
                let (namespace, of) = (workload.metadata.namespace(), &workload.reference);
                let is_alone = of_prefix.get(&(Arc::clone(&namespace), &*of.kind, &*workload.name)) == Some(&1);
                let name = workload.generated.as_ref().filter(|_| !is_alone).unwrap_or(&workload.name);
                let id = |kind: &str| EndpointId {
                    kind: EndpointKind::Pod,
                    namespace: Some(Arc::clone(&namespace)),
                    name: title(kind, name, template).into(),
                };
                let kind = of.kind.to_ascii_lowercase();
                let mut own = id(&kind);
                if !taken.insert(own.clone()) {
                    // Kinds of several groups have one name.
                    own = id(&format!("{kind}.{}", group(&of.api_version)));
                    taken.insert(own.clone());
                }
                all.push((
                    own,
                    endpoint(template),
                    template.spec.declared_ports().collect(),
                    workload.location.clone(),
                ));
            }
        }
        all
    }
}

fn title(kind: &str, name: &str, template: &Template) -> String {
    match &template.part {
        Some(part) => format!("{kind}/{name}/{part}"),
        None => format!("{kind}/{name}"),
    }
}

fn endpoint(template: &Template) -> Endpoint {
    Endpoint {
        labels: template.labels.clone().into(),
        service_account: Some(template.spec.account()),
        ports: template.spec.named_ports(),
        host_network: template.spec.host_network,
        planned: Some(Planned {
            several: true,
            stopped: template.stopped,
            run_time_labels: template.run_time_labels.clone(),
            certain_labels: template.certain_labels.clone(),
            run_time_ports: template.run_time_ports,
            lacks_family: [false; 2],
        }),
        ..Endpoint::default()
    }
}

fn has_all(labels: &Labels, wanted: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The services of a folder, with the slices that belong to them.
struct Services {
    written: BTreeMap<NamespacedName, (WrittenService, Vec<EndpointSlice>)>,
    /// Whether the folder says anything of slices: a service without any then has no running backend.
    has_slices: bool,
}

impl Services {
    fn new(objects: &[Manifest]) -> Self {
        let mut this = Self { written: BTreeMap::new(), has_slices: false };
        for manifest in objects {
            if let Object::Service(service) = &manifest.object {
                this.written.entry(service.key.clone()).or_insert_with(|| (WrittenService::clone(service), Vec::new()));
            }
        }
        for manifest in objects {
            if let Object::EndpointSlice(slice) = &manifest.object {
                this.has_slices = true;
                if let Some((_, slices)) = slice.service.as_ref().and_then(|key| this.written.get_mut(key)) {
                    slices.push(slice.clone());
                }
            }
        }
        this
    }

    fn add_to(self, services: &mut BTreeMap<NamespacedName, Service>, endpoints: &BTreeMap<EndpointId, Endpoint>) {
        let mut by_namespace: HashMap<&str, Vec<(&EndpointId, &Endpoint)>> = HashMap::new();
        for (id, endpoint) in endpoints.iter().filter(|(id, it)| id.kind == EndpointKind::Pod && it.is_reachable()) {
            by_namespace.entry(id.namespace.as_deref().unwrap_or_default()).or_default().push((id, endpoint));
        }
        for (key, (written, slices)) in self.written {
            let selector = &written.selector;
            let is_selected = |(_, endpoint): &&(&EndpointId, &Endpoint)| {
                // Of running pods the slices say it, where there are any.
                !selector.is_empty()
                    && (endpoint.planned.is_some() || !self.has_slices)
                    && has_all(&endpoint.labels, selector)
            };
            let selected: Vec<_> =
                by_namespace.get(&*key.0).into_iter().flatten().filter(is_selected).copied().collect();
            let service = services.entry(key).or_default();
            for (id, endpoint) in &selected {
                service.addresses.extend(&endpoint.addresses);
                if endpoint.planned.is_some() {
                    service.planned.entry((*id).clone()).or_default();
                }
            }
            let mut ports = Vec::new();
            for port in &written.ports {
                let protocol = port.protocol;
                let mut backends: Vec<(Backend, u16)> = from_slices(&slices, port.name.as_deref(), protocol);
                for (id, endpoint) in &selected {
                    let target = match &port.target {
                        None => Some(port.port),
                        Some(TargetPort::Number(number)) => Some(*number),
                        Some(TargetPort::Name(name)) => {
                            let named = endpoint.ports.iter().find(|it| it.name == *name && it.protocol == protocol);
                            named.map(|named| named.port)
                        }
                    };
                    let Some(target) = target else { continue };
                    service.backends.extend(endpoint.addresses.iter().map(|address| (*address, protocol, target)));
                    if endpoint.planned.is_some() {
                        service.planned.entry((*id).clone()).or_default().insert((protocol, target));
                    }
                    backends.push((Backend::Pod((*id).clone()), target));
                }
                backends.sort_unstable();
                backends.dedup();
                ports.push(FrontPort { name: port.name.clone(), protocol, port: port.port, backends });
            }
            service.front = Some(Box::new(Front {
                selects: !selector.is_empty(),
                addresses: written.addresses,
                external_addresses: written.external_addresses,
                headless: written.headless,
                external_name: written.external_name,
                ports,
            }));
        }
    }
}

/// The backends of one port of a service, by its name: those that are ready, or else those that end and still serve, as
/// kube-proxy takes them. Rules that name the service match the others too.
fn from_slices(slices: &[EndpointSlice], name: Option<&str>, protocol: u8) -> Vec<(Backend, u16)> {
    let of = |wanted: fn(&SliceEndpoint) -> bool| {
        let mut backends = Vec::new();
        for slice in slices {
            for port in &slice.ports {
                if port.name.as_deref().unwrap_or_default() == name.unwrap_or_default() && port.protocol == protocol {
                    let addresses: Vec<IpAddr> = slice.addresses_of(wanted).collect();
                    let to = |number| addresses.iter().map(move |address| (Backend::Address(*address), number));
                    backends.extend(port.port.into_iter().flat_map(to));
                }
            }
        }
        backends
    };
    let ready = of(|endpoint| endpoint.ready);
    if ready.is_empty() { of(|endpoint| endpoint.last_resort) } else { ready }
}
