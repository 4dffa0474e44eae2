//! Where each kind keeps its pod templates, and which labels its controller puts on the pods.
//!
//! Of labels whose values are known only when the pods run (hashes, indexes, names that are generated) the keys are listed. Sources:
//! the Kubernetes API reference, "Well-Known Labels, Annotations and Taints"; the constants of KServe v0.15 (raw
//! deployments), the Kubeflow training operator v1.9 and MPI operator v0.6, KubeRay v1.4, JobSet v0.8, LeaderWorkerSet
//! v0.6, Knative Serving v1.18, Volcano v1.12.

use std::collections::BTreeSet;

use hanse_policy::inventory::{Labels, Stopped};
use serde_json::Value;

use super::template::Found;
use crate::document::Node;
use crate::field::FieldError;
use crate::metadata::Metadata;

/// Groups with their kinds that have one template at `spec.template`.
const ONE_TEMPLATE: [(&str, &[&str]); 6] = [
    ("apps", &["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"]),
    ("extensions", &["Deployment", "DaemonSet", "ReplicaSet"]),
    ("", &["ReplicationController"]),
    ("argoproj.io", &["Rollout"]),
    ("apps.openshift.io", &["DeploymentConfig"]),
    ("apps.kruise.io", &["CloneSet", "StatefulSet", "DaemonSet", "BroadcastJob"]),
];
const OTHERS: [(&str, &[&str]); 9] = [
    ("batch", &["Job", "CronJob"]),
    ("serving.kserve.io", &["InferenceService", "LLMInferenceService"]),
    ("serving.knative.dev", &["Service", "Configuration"]),
    ("kubeflow.org", &["PyTorchJob", "TFJob", "MPIJob", "XGBoostJob", "PaddleJob", "JAXJob", "MXJob"]),
    ("trainer.kubeflow.org", &["TrainJob"]),
    ("ray.io", &["RayCluster", "RayJob", "RayService"]),
    ("jobset.x-k8s.io", &["JobSet"]),
    ("leaderworkerset.x-k8s.io", &["LeaderWorkerSet"]),
    ("batch.volcano.sh", &["Job"]),
];

pub fn is_known(group: &str, kind: &str) -> bool {
    ONE_TEMPLATE.iter().chain(&OTHERS).any(|(of, kinds)| *of == group && kinds.contains(&kind))
}

/// A node, and its path from the object's root.
#[derive(Clone)]
struct At<'n> {
    node: Node<'n>,
    path: String,
}

impl<'n> At<'n> {
    fn child(&self, name: &str) -> Option<At<'n>> {
        let node = self.node.child(name).filter(|node| !node.is_null())?;
        Some(At { node, path: format!("{}.{name}", self.path) })
    }

    fn below(&self, names: &[&str]) -> Option<At<'n>> {
        names.iter().try_fold(self.clone(), |at, name| at.child(name))
    }

    fn items(&self, name: &str) -> Vec<At<'n>> {
        let Some(list) = self.child(name) else { return Vec::new() };
        let at = |(index, node)| At { node, path: format!("{}[{index}]", list.path) };
        list.node.items().enumerate().map(at).collect()
    }

    fn entries(&self) -> Vec<(&'n str, At<'n>)> {
        let fields = self.node.fields().filter(|(_, node)| !node.is_null());
        fields.map(|(key, node)| (key, At { node, path: format!("{}.{key}", self.path) })).collect()
    }

    fn value(&self, name: &str) -> Option<Value> {
        self.node.child(name).filter(|node| node.scalar().is_some()).map(Node::to_value)
    }

    fn text(&self, name: &str) -> Option<&'n str> {
        self.node.child(name).and_then(Node::text)
    }

    fn is_true(&self, name: &str) -> bool {
        self.value(name) == Some(Value::Bool(true))
    }

    /// Whether a number of replicas is zero.
    fn is_zero(&self, name: &str) -> bool {
        self.value(name).and_then(|value| value.as_f64()) == Some(0.0)
    }

    fn stopped(&self, replicas: &str) -> Option<Stopped> {
        self.is_zero(replicas).then_some(Stopped::NoReplicas)
    }
}

fn labels<const N: usize>(labels: [(&str, &str); N]) -> Labels {
    labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect()
}

fn found(at: At<'_>) -> Found<'_> {
    Found {
        part: None,
        node: at.node,
        path: at.path,
        bare: false,
        inherited: Labels::new(),
        identity: Labels::new(),
        run_time_labels: BTreeSet::new(),
        certain_labels: BTreeSet::new(),
        run_time_ports: false,
        stopped: None,
        ports: Vec::new(),
    }
}

/// Labels that a controller sets when pods run, and that policies may name, by group and kind.
fn run_time_labels(group: &str, kind: &str) -> Vec<&'static str> {
    const DEPLOYMENT: &[&str] = &["pod-template-hash"];
    const STATEFUL_SET: &[&str] =
        &["apps.kubernetes.io/pod-index", "controller-revision-hash", "statefulset.kubernetes.io/pod-name"];
    const DAEMON_SET: &[&str] = &["controller-revision-hash", "pod-template-generation"];
    const JOB: &[&str] =
        &["batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-completion-index", "controller-uid"];
    const JOB_NAME: &[&str] = &["batch.kubernetes.io/job-name", "job-name"];
    const JOB_SET: &[&str] = &[
        "jobset.sigs.k8s.io/global-replicas",
        "jobset.sigs.k8s.io/job-global-index",
        "jobset.sigs.k8s.io/job-index",
        "jobset.sigs.k8s.io/job-key",
        "jobset.sigs.k8s.io/jobset-uid",
        "jobset.sigs.k8s.io/replicatedjob-name",
        "jobset.sigs.k8s.io/replicatedjob-replicas",
        "jobset.sigs.k8s.io/restart-attempt",
    ];
    const KNATIVE: &[&str] = &[
        DEFAULT_APP,
        "serving.knative.dev/configurationGeneration",
        "serving.knative.dev/configurationUID",
        "serving.knative.dev/revision",
        "serving.knative.dev/revisionUID",
        "serving.knative.dev/serviceUID",
    ];
    const GROUP: &[&str] = &[
        "leaderworkerset.sigs.k8s.io/group-index",
        "leaderworkerset.sigs.k8s.io/group-key",
        "leaderworkerset.sigs.k8s.io/template-revision-hash",
        "leaderworkerset.sigs.k8s.io/worker-index",
    ];
    let lists: &[&[&str]] = match (group, kind) {
        ("apps" | "extensions", "Deployment") | ("serving.kserve.io", "InferenceService") => &[DEPLOYMENT],
        ("apps.kruise.io", "CloneSet") => {
            &[DEPLOYMENT, &["apps.kruise.io/cloneset-instance-id", "controller-revision-hash"]]
        }
        (_, "StatefulSet") => &[STATEFUL_SET],
        (_, "DaemonSet") => &[DAEMON_SET],
        (_, "Rollout") => &[&["rollouts-pod-template-hash"]],
        (_, "DeploymentConfig") => &[&["deployment"]],
        (_, "BroadcastJob") => &[&["broadcastjob-controller-uid", "broadcastjob-name"]],
        ("batch", "Job") => &[JOB],
        ("batch", "CronJob") => &[JOB, JOB_NAME],
        ("serving.kserve.io", _) => &[DEPLOYMENT, STATEFUL_SET, GROUP],
        ("serving.knative.dev", _) => &[DEPLOYMENT, KNATIVE],
        ("kubeflow.org", _) => &[&["training.kubeflow.org/replica-index"]],
        ("trainer.kubeflow.org" | "jobset.x-k8s.io", _) => &[JOB, JOB_NAME, JOB_SET],
        ("ray.io", "RayCluster") => &[],
        // The names of their clusters are generated. The submitter is a Job.
        ("ray.io", _) => &[JOB, &["ray.io/cluster", "ray.io/identifier", "ray.io/serve"]],
        ("leaderworkerset.x-k8s.io", _) => &[STATEFUL_SET, GROUP],
        ("batch.volcano.sh", _) => &[&["volcano.sh/task-index"]],
        _ => &[],
    };
    lists.concat()
}

/// Knative calls a revision's pods by the name of the revision, where their template does not set the label.
const DEFAULT_APP: &str = "app";

/// Labels of [`run_time_labels`] that a controller sets on each of its pods, in every version that is supported: only their
/// values are not known.
fn certain_labels(group: &str, kind: &str) -> &'static [&'static str] {
    const HASH: &[&str] = &["pod-template-hash"];
    match (group, kind) {
        ("apps" | "extensions", "Deployment") | ("serving.kserve.io", "InferenceService") => HASH,
        ("serving.knative.dev", _) => HASH,
        ("apps", "StatefulSet") => &["controller-revision-hash", "statefulset.kubernetes.io/pod-name"],
        ("apps", "DaemonSet") => &["controller-revision-hash"],
        ("argoproj.io", "Rollout") => &["rollouts-pod-template-hash"],
        ("batch", "Job" | "CronJob") => {
            &["batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name", "controller-uid", "job-name"]
        }
        _ => &[],
    }
}

/// Groups whose controllers add containers or ports when pods run: a model server's, a proxy's, a runtime's.
const RUN_TIME_PORTS: [&str; 4] = ["ray.io", "serving.kserve.io", "serving.knative.dev", "trainer.kubeflow.org"];

/// Where an object has its controller make NetworkPolicies, which are not in the folder. KubeRay v1.7.
pub fn unread_policy(group: &str, kind: &str, object: Node<'_>) -> Option<FieldError> {
    let field = match (group, kind) {
        ("ray.io", "RayCluster") => "networkPolicy",
        ("ray.io", "RayJob") => "rayClusterSpec.networkPolicy",
        ("ray.io", "RayService") => "rayClusterConfig.networkPolicy",
        _ => return None,
    };
    let spec = At { node: object, path: String::new() }.child("spec")?;
    spec.below(&field.split('.').collect::<Vec<_>>())?;
    let message = "makes the operator create NetworkPolicies, which no answer here takes into account unless they are among \
                   these manifests";
    Some(FieldError { path: format!("spec.{field}"), message: message.to_owned() })
}

/// Whether a controller sets the label only where the template does not.
pub fn is_default_only(key: &str) -> bool {
    key == DEFAULT_APP
}

/// The templates of an object of a known kind, with the keys of what its controller adds when pods run.
pub fn templates<'n>(group: &str, kind: &str, metadata: &Metadata, object: Node<'n>) -> Vec<Found<'n>> {
    let mut found = known_templates(group, kind, metadata, object);
    for template in &mut found {
        let keys = run_time_labels(group, kind).into_iter().filter(|key| !template.identity.contains_key(*key));
        template.run_time_labels = keys.map(Into::into).collect();
        template.certain_labels = certain_labels(group, kind).iter().map(|key| (*key).into()).collect();
        template.run_time_ports = RUN_TIME_PORTS.contains(&group);
    }
    found
}

/// One that another object makes the pods of has none.
fn known_templates<'n>(group: &str, kind: &str, metadata: &Metadata, object: Node<'n>) -> Vec<Found<'n>> {
    let Some(spec) = (At { node: object, path: String::new() }).child("spec") else { return Vec::new() };
    let spec = At { path: "spec".to_owned(), ..spec };
    let name = metadata.name.as_str();
    match (group, kind) {
        ("batch", "Job") => job(&spec, name),
        ("batch", "CronJob") => {
            let suspended = spec.is_true("suspend").then_some(Stopped::Suspended);
            let template = spec.below(&["jobTemplate", "spec", "template"]);
            template.map(|at| Found { stopped: suspended, ..found(at) }).into_iter().collect()
        }
        ("serving.kserve.io", "LLMInferenceService") => llm_inference_service(&spec, name),
        ("serving.kserve.io", _) => inference_service(&spec, metadata),
        ("serving.knative.dev", _) => {
            let mut identity = labels([("serving.knative.dev/configuration", name)]);
            if kind == "Service" {
                identity.extend(labels([("serving.knative.dev/service", name)]));
            }
            spec.child("template").map(|at| Found { identity, ..found(at) }).into_iter().collect()
        }
        ("kubeflow.org", _) => training_job(&spec, kind, name),
        ("trainer.kubeflow.org", _) => {
            let identity = labels([("jobset.sigs.k8s.io/jobset-name", name)]);
            let stopped = spec.is_true("suspend").then_some(Stopped::Suspended);
            // Its pods' containers are the runtime's, which is another object.
            vec![Found { identity, stopped, bare: true, ..found(spec) }]
        }
        ("ray.io", _) => ray(&spec, kind, name),
        ("jobset.x-k8s.io", _) => job_set(&spec, name),
        ("leaderworkerset.x-k8s.io", _) => leader_worker_set(&spec, name),
        ("batch.volcano.sh", _) => volcano_job(&spec, metadata),
        _ => {
            let stopped = spec.stopped(if kind == "BroadcastJob" { "parallelism" } else { "replicas" });
            let identity = match kind {
                "DeploymentConfig" => labels([("deploymentconfig", name)]),
                _ => Labels::new(),
            };
            spec.child("template").map(|at| Found { identity, stopped, ..found(at) }).into_iter().collect()
        }
    }
}

fn job<'n>(spec: &At<'n>, name: &str) -> Vec<Found<'n>> {
    let suspended = spec.is_true("suspend").then_some(Stopped::Suspended);
    let stopped = suspended.or_else(|| spec.stopped("parallelism"));
    let identity = labels([("batch.kubernetes.io/job-name", name), ("job-name", name)]);
    spec.child("template").map(|at| Found { identity, stopped, ..found(at) }).into_iter().collect()
}

/// The components are pod specs with further fields; the field of a model server's container is the name of its framework.
fn inference_service<'n>(spec: &At<'n>, metadata: &Metadata) -> Vec<Found<'n>> {
    let name = metadata.name.as_str();
    let component = |part: &'static str| {
        let at = spec.child(part)?;
        let mut inherited = metadata.labels.clone();
        let own = at.child("labels").map(|own| own.entries()).unwrap_or_default();
        inherited.extend(own.iter().filter_map(|(key, at)| Some(((*key).into(), at.node.text()?.into()))));
        let identity = labels([
            ("app", &*format!("isvc.{name}-{part}")),
            ("component", part),
            ("serving.kserve.io/inferenceservice", name),
        ]);
        let stopped = at.stopped("minReplicas").filter(|_| at.is_zero("maxReplicas"));
        let ports = model_ports(&at);
        Some(Found { part: Some(part.to_owned()), bare: true, inherited, identity, stopped, ports, ..found(at) })
    };
    ["predictor", "transformer", "explainer"].into_iter().filter_map(component).collect()
}

/// The port of a model server's container where none is written: that of KServe's own runtimes.
const MODEL_PORT: u16 = 8080;

fn model_ports(component: &At<'_>) -> Vec<(Option<&'static str>, u16)> {
    let declares = |at: &At<'_>| !at.items("ports").is_empty();
    let frameworks = component.entries().into_iter().filter(|(key, _)| *key != "containers").map(|(_, at)| at);
    let mut numbers: Vec<u16> = Vec::new();
    for framework in frameworks.filter(declares) {
        let port = |at: At<'_>| at.value("containerPort")?.as_u64().and_then(|port| u16::try_from(port).ok());
        numbers.extend(framework.items("ports").into_iter().filter_map(port));
    }
    if numbers.is_empty() && !component.items("containers").iter().any(declares) {
        numbers.push(MODEL_PORT);
    }
    numbers.into_iter().map(|port| (None, port)).collect()
}

fn llm_inference_service<'n>(spec: &At<'n>, name: &str) -> Vec<Found<'n>> {
    let mut all = Vec::new();
    for (prefix, end, at) in [("", "", Some(spec.clone())), ("prefill-", "-prefill", spec.child("prefill"))] {
        let Some(at) = at else { continue };
        let stopped = at.stopped("replicas");
        let nodes = at.child("worker").is_some();
        for (part, component) in [("template", if nodes { "-leader" } else { "" }), ("worker", "-worker")] {
            let Some(pod) = at.child(part) else { continue };
            let part = if part == "template" && nodes { "leader" } else { part };
            let part = if part == "template" { "main" } else { part };
            let component = format!("llminferenceservice-workload{component}{end}");
            let identity = labels([
                ("app.kubernetes.io/component", &*component),
                ("app.kubernetes.io/name", name),
                ("app.kubernetes.io/part-of", "llminferenceservice"),
            ]);
            all.push(Found { part: Some(format!("{prefix}{part}")), bare: true, identity, stopped, ..found(pod) });
        }
    }
    all
}

/// The port that the operator adds to a job's container, by its name and number, where the job does not name it.
fn training_port(kind: &str) -> Option<(&'static str, u16)> {
    match kind {
        "PyTorchJob" => Some(("pytorchjob-port", 23456)),
        "TFJob" => Some(("tfjob-port", 2222)),
        "XGBoostJob" => Some(("xgboostjob-port", 9999)),
        "PaddleJob" => Some(("master", 36543)),
        "JAXJob" => Some(("jaxjob-port", 6666)),
        _ => None,
    }
}

fn training_job<'n>(spec: &At<'n>, kind: &str, name: &str) -> Vec<Found<'n>> {
    let suspended = spec.below(&["runPolicy"]).is_some_and(|policy| policy.is_true("suspend"));
    let specs = spec.entries().into_iter().filter(|(key, _)| key.ends_with("ReplicaSpecs"));
    let role = |(role, at): (&'n str, At<'n>)| {
        let template = at.child("template")?;
        let role = role.to_ascii_lowercase();
        let mut identity =
            labels([("training.kubeflow.org/job-name", name), ("training.kubeflow.org/replica-type", &*role)]);
        if matches!(&*role, "master" | "launcher") || kind == "MPIJob" {
            let job_role = if role == "launcher" || kind == "MPIJob" { &*role } else { "master" };
            identity.extend(labels([("training.kubeflow.org/job-role", job_role)]));
        }
        let stopped = suspended.then_some(Stopped::Suspended).or_else(|| at.stopped("replicas"));
        let ports = training_port(kind).map(|(name, port)| (Some(name), port)).into_iter().collect();
        Some(Found { part: Some(role), identity, stopped, ports, ..found(template) })
    };
    specs.flat_map(|(_, at)| at.entries()).filter_map(role).collect()
}

fn ray<'n>(spec: &At<'n>, kind: &str, name: &str) -> Vec<Found<'n>> {
    let cluster = match kind {
        "RayJob" => spec.child("rayClusterSpec"),
        "RayService" => spec.child("rayClusterConfig"),
        _ => Some(spec.clone()),
    };
    let suspended = spec.is_true("suspend").then_some(Stopped::Suspended);
    let identity = |node_type: &str, group: &str| {
        let mut identity = labels([
            ("app.kubernetes.io/created-by", "kuberay-operator"),
            ("app.kubernetes.io/name", "kuberay"),
            ("ray.io/group", group),
            ("ray.io/is-ray-node", "yes"),
            ("ray.io/node-type", node_type),
        ]);
        // The name of the cluster of a job or a service is generated.
        if kind == "RayCluster" {
            let identifier = format!("{name}-{node_type}");
            identity.extend(labels([("ray.io/cluster", name), ("ray.io/identifier", &*identifier)]));
        }
        identity
    };
    let mut all = Vec::new();
    if let Some(template) = cluster.as_ref().and_then(|it| it.below(&["headGroupSpec", "template"])) {
        let identity = identity("head", "headgroup");
        all.push(Found { part: Some("head".to_owned()), identity, stopped: suspended, ..found(template) });
    }
    for group in cluster.as_ref().map(|it| it.items("workerGroupSpecs")).unwrap_or_default() {
        let Some(template) = group.child("template") else { continue };
        let group_name = group.text("groupName").unwrap_or("workers");
        let none = group.is_zero("replicas") && (group.is_zero("maxReplicas") || group.text("maxReplicas").is_none());
        let stopped = suspended.or_else(|| none.then_some(Stopped::NoReplicas));
        let identity = identity("worker", group_name);
        all.push(Found { part: Some(group_name.to_owned()), identity, stopped, ..found(template) });
    }
    if let Some(template) = spec.child("submitterPodTemplate") {
        let identity = labels([("batch.kubernetes.io/job-name", name), ("job-name", name)]);
        all.push(Found { part: Some("submitter".to_owned()), identity, stopped: suspended, ..found(template) });
    }
    all
}

fn job_set<'n>(spec: &At<'n>, name: &str) -> Vec<Found<'n>> {
    let suspended = spec.is_true("suspend").then_some(Stopped::Suspended);
    let job = |at: At<'n>| {
        let template = at.below(&["template", "spec", "template"])?;
        let part = at.text("name").unwrap_or_default();
        let identity =
            labels([("jobset.sigs.k8s.io/jobset-name", name), ("jobset.sigs.k8s.io/replicatedjob-name", part)]);
        let stopped = suspended.or_else(|| at.stopped("replicas"));
        Some(Found { part: Some(part.to_owned()), identity, stopped, ..found(template) })
    };
    spec.items("replicatedJobs").into_iter().filter_map(job).collect()
}

fn leader_worker_set<'n>(spec: &At<'n>, name: &str) -> Vec<Found<'n>> {
    let stopped = spec.stopped("replicas");
    let Some(group) = spec.child("leaderWorkerTemplate") else { return Vec::new() };
    let own = labels([("leaderworkerset.sigs.k8s.io/name", name)]);
    let workers = group.child("workerTemplate");
    // Without a template of its own a leader is a worker, the first.
    let leader = group.child("leaderTemplate").or_else(|| workers.clone());
    let mut all = Vec::new();
    if let Some(template) = leader {
        let mut identity = own.clone();
        identity.extend(labels([("leaderworkerset.sigs.k8s.io/worker-index", "0")]));
        all.push(Found { part: Some("leader".to_owned()), identity, stopped, ..found(template) });
    }
    if let Some(template) = workers {
        all.push(Found { part: Some("worker".to_owned()), identity: own, stopped, ..found(template) });
    }
    all
}

fn volcano_job<'n>(spec: &At<'n>, metadata: &Metadata) -> Vec<Found<'n>> {
    let (name, namespace) = (metadata.name.as_str(), metadata.namespace());
    let task = |(index, at): (usize, At<'n>)| {
        let template = at.child("template")?;
        let part = at.text("name").map_or_else(|| format!("default{index}"), str::to_owned);
        let identity = labels([
            ("volcano.sh/job-name", name),
            ("volcano.sh/job-namespace", &*namespace),
            ("volcano.sh/task-spec", &*part),
        ]);
        let stopped = at.stopped("replicas");
        Some(Found { part: Some(part), identity, stopped, ..found(template) })
    };
    spec.items("tasks").into_iter().enumerate().filter_map(task).collect()
}
