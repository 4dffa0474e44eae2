//! Clusters and the federation, from directories of manifests.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::bail;
use hanse_api::assemble::{overlapping_grants, rivals};
use hanse_api::hanse::{Grants, Member};
use hanse_api::manifest::Manifests;
use hanse_api::{Diagnostic, Object, SourceLocation, assemble_federation, assemble_offline};
use hanse_policy::evaluate::Direction;
use hanse_policy::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Inventory};
use hanse_policy::model::{ClusterName, PolicyId, PolicySet, TierId};
use ipnet::IpNet;

use hanse_policy::explain::answer;

use super::reading::{self, DefaultNamespace};
use crate::output;

/// The directories to read.
#[derive(Debug, Clone, clap::Args)]
pub struct Sources {
    /// Cluster name and directory of its manifests (YAML or JSON, as stored by an API server); repeatable. `-` is standard
    /// input.
    #[arg(long = "cluster", value_name = "NAME=DIR")]
    clusters: Vec<ClusterSource>,
    /// Directory of the manifests of the federation (`hanse.dev`); `-` is standard input.
    #[arg(long, value_name = "DIR")]
    federation: Option<PathBuf>,
    /// Refuse templates (documents with `{{`), patches, and documents without a kind. Default: report a note.
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    namespace: DefaultNamespace,
    /// Net of pod addresses, for workloads that do not run yet; repeatable. Pods have no addresses of an IP version without a
    /// net. Default: any address of both versions.
    #[arg(long = "pod-net", value_name = "CIDR", value_delimiter = ',', requires = "clusters")]
    pub pod_nets: Vec<IpNet>,
}

#[derive(Debug, Clone)]
pub struct ClusterSource {
    name: ClusterName,
    directory: PathBuf,
}

impl std::str::FromStr for ClusterSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, directory)) if !name.is_empty() && !directory.is_empty() => {
                Ok(Self { name: name.into(), directory: directory.into() })
            }
            _ => Err("expected NAME=DIR".to_owned()),
        }
    }
}

/// The result of reading.
#[derive(Debug, Default)]
pub struct Loaded {
    pub policies: PolicySet,
    pub inventory: Inventory,
    /// The errors of refused objects and files, which are also on standard error. If there are any, answers are incomplete.
    pub refusals: Vec<Diagnostic>,
    /// Policies with rules for a direction that their types do not include, with the direction and the field.
    pub left_out: Vec<(PolicyId, Direction, &'static str)>,
    /// The clusters whose manifests have HostEndpoints.
    pub hosts: BTreeSet<ClusterName>,
    /// Protocols and ports that containers declare.
    pub declared: BTreeMap<(ClusterName, EndpointId), BTreeSet<(u8, u16)>>,
    /// Policies of the federation that are not in force because no object defines their tier.
    pub without_tier: Vec<(PolicyId, TierId)>,
    places: BTreeMap<WrittenName, SourceLocation>,
}

/// Cluster, kind, namespace and name.
type WrittenName = (Option<ClusterName>, String, Option<String>, String);

impl Sources {
    /// Reads all directories for verdicts.
    ///
    /// # Errors
    /// As [`Self::load_any`], and when no cluster has an endpoint: an empty result would look like a good one.
    pub fn load(&self) -> anyhow::Result<Loaded> {
        let loaded = self.load_any()?;
        let empty: Vec<&ClusterName> =
            loaded.inventory.clusters.iter().filter(|(_, it)| it.endpoints.is_empty()).map(|(name, _)| name).collect();
        let noun = if empty.len() == 1 { "cluster" } else { "clusters" };
        let names = empty.iter().map(|name| name.to_string()).collect::<Vec<_>>().join(", ");
        if empty.len() == loaded.inventory.clusters.len() {
            bail!("{noun} {names}: no pods or workloads found");
        }
        if !empty.is_empty() {
            output::note(format_args!("note: {noun} {names}: no pods or workloads found"));
        }
        Ok(loaded)
    }

    /// Reads all directories. Refused and skipped objects are reported on standard error; the others are read.
    ///
    /// # Errors
    /// When a directory cannot be read, or that of a cluster has no manifests.
    pub fn load_any(&self) -> anyhow::Result<Loaded> {
        if self.clusters.is_empty() {
            return Err(output::UsageError("--cluster NAME=DIR is required".to_owned()).into());
        }
        if self.stdin_uses() > 1 {
            bail!("standard input (`-`) can be used once: use a directory for the other sources");
        }
        let mut loaded = Loaded::default();
        let mut clusters = BTreeMap::new();
        for source in &self.clusters {
            let manifests = loaded.read(Some(&source.name), &source.directory, self)?;
            let mut offline = assemble_offline(&source.name, manifests);
            loaded.report(&offline.state.diagnostics, false);
            self.place_pods(&mut offline.state.cluster);
            let declared = offline.declared.into_iter().map(|(id, ports)| ((source.name.clone(), id), ports));
            loaded.declared.extend(declared);
            if clusters.insert(source.name.clone(), offline.state).is_some() {
                bail!("--cluster {}: given twice", source.name);
            }
        }
        let federated = match &self.federation {
            Some(directory) => loaded.read(None, directory, self)?,
            None => Manifests::default(),
        };
        for workload in &federated.workloads {
            let (SourceLocation { file, line }, of) = (&workload.location, &workload.reference);
            output::note(format_args!("{file}:{line}: note: {} {} belongs to a cluster", of.kind, workload.name));
        }
        let federation = assemble_federation(&federated.objects, clusters.keys().cloned());
        loaded.report(&federation.diagnostics, false);
        loaded.without_tier = federation.without_tier;
        loaded.report(&overlapping_grants(&federated.objects), false);
        for (name, state) in clusters {
            let mut cluster = state.cluster;
            if let Some(member) = federation.members.get(&name) {
                note_grants(&name, member, &cluster);
                cluster.labels = member.labels.clone();
                cluster.label_grant = member.grants.label_grant();
                cluster.federated_allow_final = member.federated_allow_final;
            }
            loaded.inventory.clusters.insert(name.clone(), cluster);
            loaded.policies.clusters.insert(name, state.layer);
        }
        loaded.inventory.federated_sets = federation.sets;
        loaded.policies.federation = federation.layer;
        Ok(loaded)
    }

    /// Limits the addresses of pods that do not run to the given nets: none of an IP version without a net.
    fn place_pods(&self, cluster: &mut Cluster) {
        if self.pod_nets.is_empty() {
            return;
        }
        let lacks_family = [true, false].map(|v4| !self.pod_nets.iter().any(|net| matches!(net, IpNet::V4(_)) == v4));
        for planned in cluster.endpoints.values_mut().filter_map(|endpoint| endpoint.planned.as_mut()) {
            planned.lacks_family = lacks_family;
        }
    }

    /// Number of sources that are standard input.
    pub fn stdin_uses(&self) -> usize {
        let clusters = self.clusters.iter().map(|source| source.directory.as_path());
        clusters.chain(self.federation.as_deref()).filter(|path| *path == Path::new("-")).count()
    }

    /// Whether the running federation is to be queried, instead of directories.
    ///
    /// # Errors
    /// When the directory of the federation is set without that of a cluster.
    pub fn is_live(&self) -> anyhow::Result<bool> {
        if self.clusters.is_empty() && self.federation.is_some() {
            return Err(output::UsageError("--federation requires --cluster NAME=DIR".to_owned()).into());
        }
        Ok(self.clusters.is_empty())
    }

    /// The same, with some directories replaced.
    ///
    /// # Errors
    /// When a cluster is not among those that are read, or is given twice.
    pub fn instead(&self, with: &[ClusterSource], federation: Option<&Path>) -> anyhow::Result<Self> {
        let mut sources = self.clone();
        for (at, source) in with.iter().enumerate() {
            if with[..at].iter().any(|known| known.name == source.name) {
                bail!("--with {}: given twice", source.name);
            }
            match sources.clusters.iter_mut().find(|known| known.name == source.name) {
                Some(known) => *known = source.clone(),
                None => bail!("--with {}: no --cluster has this name", source.name),
            }
        }
        if let Some(federation) = federation {
            sources.federation = Some(federation.to_owned());
        }
        Ok(sources)
    }
}

/// Reports pods that the grants of their cluster would not export: here, all clusters see all pods.
fn note_grants(name: &ClusterName, member: &Member, cluster: &Cluster) {
    let pods = cluster.endpoints.iter().filter(|(id, pod)| id.kind == EndpointKind::Pod && !pod.addresses.is_empty());
    let mut withheld = pods.filter_map(|(id, pod)| Some((id, withheld(&member.grants, id, pod)?)));
    if let Some((id, why)) = withheld.next() {
        let count = 1 + withheld.count();
        let namespace = id.namespace.as_deref().unwrap_or_default();
        output::note(format_args!(
            "note: MemberCluster {name} does not grant {} ({namespace}/{}: {why}): the hub does not distribute them to other \
             clusters, but this answer includes them",
            output::count(count, "pod"),
            id.name
        ));
    }
    if member.federated_allow_final {
        output::note(format_args!(
            "note: MemberCluster {name}: this answer applies federatedAllow Final; a running federation applies it only if the \
             member was started with `--federated-allow Final`"
        ));
    }
}

/// Why the hub would not distribute a pod to the other clusters.
fn withheld(grants: &Grants, id: &EndpointId, pod: &Endpoint) -> Option<String> {
    let namespace = id.namespace.as_deref().unwrap_or_default();
    if grants.namespaces.as_ref().is_some_and(|granted| !granted.contains(namespace)) {
        return Some(format!("namespace {namespace}"));
    }
    if let Some(address) = pod.addresses.iter().find(|it| !grants.cidrs.iter().any(|net| net.contains(*it))) {
        return Some(format!("address {address}"));
    }
    let values = |key: &Arc<str>| grants.labels.as_ref()?.get(key)?.as_ref();
    let (key, value) = pod.labels.iter().find(|(key, value)| values(key).is_some_and(|it| !it.contains(*value)))?;
    Some(format!("label {key}={value}"))
}

impl Loaded {
    fn read(
        &mut self,
        cluster: Option<&ClusterName>,
        directory: &Path,
        sources: &Sources,
    ) -> anyhow::Result<Manifests> {
        let mut manifests = reading::read(directory, &sources.namespace)?;
        let found = [manifests.objects.len(), manifests.workloads.len(), manifests.skipped.len()];
        if found == [0; 3] && manifests.diagnostics.is_empty() && manifests.refused_workloads.is_empty() {
            // A federation may be empty; a cluster is not.
            if cluster.is_some() {
                bail!(reading::no_manifests(directory));
            }
            output::note(format_args!("note: {}", reading::no_manifests(directory)));
        }
        let (refused, notes): (Vec<Diagnostic>, Vec<Diagnostic>) = manifests
            .diagnostics
            .iter()
            .chain(&manifests.refused_workloads)
            .cloned()
            .partition(|it| reading::refuses(it, sources.strict));
        // Refused for unknown fields: what such policies may close stays closed, as in a member.
        manifests.objects.append(&mut manifests.partial);
        let [duplicates, conflicts] = rivals::settle(&mut manifests);
        self.report(&notes, false);
        self.report(&duplicates, false);
        self.report(&manifests.not_storable, false);
        self.report(&manifests.notes, false);
        self.report(&refused, true);
        self.report(&conflicts, true);
        for line in reading::skipped_lines(manifests.skipped.iter()) {
            output::note(format_args!("{}: {line}", directory.display()));
        }
        if manifests.skipped.iter().any(|it| it.object.kind == "HostEndpoint") {
            self.hosts.extend(cluster.cloned());
        }
        for object in &manifests.objects {
            let of = &object.reference;
            let name = (
                cluster.cloned(),
                of.kind.to_string(),
                of.namespace.as_ref().map(ToString::to_string),
                of.name.to_string(),
            );
            // The first one of a name wins.
            if let Entry::Vacant(entry) = self.places.entry(name) {
                entry.insert(object.location.clone());
                let (id, left_out) = match &object.object {
                    Object::Policy(policy) => (policy.id(cluster.unwrap_or(&"".into())), policy.left_out()),
                    Object::FederatedPolicy(policy) => (policy.id().clone(), policy.left_out()),
                    _ => continue,
                };
                self.left_out.extend(left_out.iter().map(|(direction, field)| (id.clone(), *direction, *field)));
            }
        }
        Ok(manifests)
    }

    fn report(&mut self, diagnostics: &[Diagnostic], refused: bool) {
        for diagnostic in diagnostics {
            let SourceLocation { file, line } = &diagnostic.location;
            let kind = if refused { "refused" } else { "note" };
            output::note(format_args!("{file}:{line}: {kind}: {}", described(diagnostic)));
        }
        if refused {
            self.refusals.extend_from_slice(diagnostics);
        }
    }

    /// Whether an object was refused, so that answers do not include it.
    pub fn is_incomplete(&self) -> bool {
        !self.refusals.is_empty()
    }

    /// The last line of a table if answers are incomplete.
    pub fn incomplete_line(&self) -> Option<String> {
        let count = self.refusals.len();
        let refused = output::count(count, "error");
        self.is_incomplete()
            .then(|| format!("incomplete: {refused} above; this answer does not include the refused objects"))
    }

    /// The location of an object.
    pub fn place_of(&self, cluster: Option<&ClusterName>, kind: &str, name: &str) -> Option<&SourceLocation> {
        self.places.get(&(cluster.cloned(), kind.to_owned(), None, name.to_owned()))
    }

    /// The location of a policy.
    pub fn place(&self, policy: &PolicyId) -> Option<&SourceLocation> {
        let (_, kind) = answer::api(policy.kind);
        let namespace = policy.namespace.as_deref().map(str::to_owned);
        let of = |name: &str| (policy.cluster.clone(), kind.to_owned(), namespace.clone(), name.to_owned());
        // Objects without a namespace are in `default`; Calico may store a name with its tier before it.
        let found = self.places.get(&of(&policy.name));
        let bare = || (policy.cluster.clone(), kind.to_owned(), None, policy.name.to_string());
        found.or_else(|| self.places.get(&bare())).or_else(|| self.places.get(&of(&format!("default.{}", policy.name))))
    }
}

/// The message of a diagnostic, without its location.
pub fn described(diagnostic: &Diagnostic) -> String {
    let Diagnostic { field, message, object, .. } = diagnostic;
    let object = object.as_ref().map_or(String::new(), |object| match object.name.is_empty() {
        true => format!("{}: ", object.kind),
        false => format!("{} {}: ", object.kind, object.name),
    });
    let field = if field.is_empty() { String::new() } else { format!("{field}: ") };
    format!("{object}{field}{message}")
}
