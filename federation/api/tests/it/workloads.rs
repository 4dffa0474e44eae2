//! Pod templates as planned endpoints, and what replaces them.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_api::{Manifests, Offline, assemble_cluster, assemble_offline, read_bytes};
use hanse_policy::inventory::{Backend, EffectiveLabels, EndpointKind, Stopped};
use hanse_policy::selector::{Label, LabelLookup as _};

fn read(text: &str) -> Manifests {
    let mut read = Manifests::default();
    read_bytes(&Arc::from("file.yaml"), text.as_bytes(), &mut read);
    assert!(read.diagnostics.is_empty(), "{:?}", read.diagnostics);
    assert!(read.refused_workloads.is_empty(), "{:?}", read.refused_workloads);
    read
}

fn offline(text: &str) -> Offline {
    assemble_offline(&"c".into(), read(text))
}

/// `namespace/name` of every pod, running or not.
fn pods(offline: &Offline) -> Vec<String> {
    let pods = offline.state.cluster.endpoints.keys().filter(|id| id.kind == EndpointKind::Pod);
    pods.map(|id| format!("{}/{}", id.namespace.as_deref().unwrap_or_default(), id.name)).collect()
}

const POD: &str = "metadata: {labels: {app: a}}, spec: {serviceAccountName: s, containers: [{name: c, ports: [{name: http, containerPort: 80}, {containerPort: 53, protocol: UDP}]}]}";

/// A kind with its spec, and of each endpoint the name, the labels that its controller adds, and why it is stopped.
type Case<'a> = (&'a str, &'a str, &'a str, &'a [(&'a str, &'a [(&'a str, &'a str)], Option<Stopped>)]);

#[test]
fn each_template_is_an_endpoint() {
    let template = format!("template: {{{POD}}}");
    let one = format!("{{{template}}}");
    let idle = format!("{{replicas: 0, {template}}}");
    let cron = format!("{{suspend: true, jobTemplate: {{spec: {one}}}}}");
    let suspended = format!("{{suspend: true, {template}}}");
    let torch = format!(
        "{{pytorchReplicaSpecs: {{Master: {{replicas: 1, {template}}}, Worker: {{replicas: 0, {template}}}}}}}"
    );
    let mpi = format!("{{mpiReplicaSpecs: {{Launcher: {one}, Worker: {one}}}}}");
    let ray = format!("{{headGroupSpec: {one}, workerGroupSpecs: [{{groupName: gpu, replicas: 2, {template}}}]}}");
    let ray_job = format!("{{rayClusterSpec: {ray}, submitterPodTemplate: {{{POD}}}}}");
    let ray_service = format!("{{rayClusterConfig: {ray}}}");
    let job_set = format!(
        "{{replicatedJobs: [{{name: driver, template: {{spec: {one}}}}}, {{name: workers, template: {{spec: {one}}}}}]}}"
    );
    let lws = format!("{{leaderWorkerTemplate: {{leaderTemplate: {{{POD}}}, workerTemplate: {{{POD}}}}}}}");
    let volcano = format!("{{tasks: [{{name: ps, {template}}}]}}");
    let kserve = "{predictor: {labels: {tier: gold}, serviceAccountName: s, containers: [{name: c, ports: [{name: http, containerPort: 80}, {containerPort: 53, protocol: UDP}]}]}}";
    let job: &[(&str, &str)] = &[("batch.kubernetes.io/job-name", "x"), ("job-name", "x")];
    let head: &[(&str, &str)] = &[("ray.io/cluster", "x"), ("ray.io/node-type", "head"), ("ray.io/group", "headgroup")];
    let worker: &[(&str, &str)] = &[("ray.io/cluster", "x"), ("ray.io/node-type", "worker"), ("ray.io/group", "gpu")];
    let master: &[(&str, &str)] = &[
        ("training.kubeflow.org/job-name", "x"),
        ("training.kubeflow.org/replica-type", "master"),
        ("training.kubeflow.org/job-role", "master"),
    ];
    let cases: &[Case<'_>] = &[
        ("apps/v1", "Deployment", &one, &[("deployment/x", &[], None)]),
        ("apps/v1", "Deployment", &idle, &[("deployment/x", &[], Some(Stopped::NoReplicas))]),
        ("extensions/v1beta1", "Deployment", &one, &[("deployment/x", &[], None)]),
        ("apps/v1", "StatefulSet", &one, &[("statefulset/x", &[], None)]),
        ("apps/v1", "DaemonSet", &one, &[("daemonset/x", &[], None)]),
        ("apps/v1", "ReplicaSet", &one, &[("replicaset/x", &[], None)]),
        ("v1", "ReplicationController", &one, &[("replicationcontroller/x", &[], None)]),
        ("batch/v1", "Job", &one, &[("job/x", job, None)]),
        ("batch/v1", "Job", &suspended, &[("job/x", job, Some(Stopped::Suspended))]),
        ("batch/v1beta1", "CronJob", &cron, &[("cronjob/x", &[], Some(Stopped::Suspended))]),
        ("argoproj.io/v1alpha1", "Rollout", &one, &[("rollout/x", &[], None)]),
        (
            "apps.openshift.io/v1",
            "DeploymentConfig",
            &one,
            &[("deploymentconfig/x", &[("deploymentconfig", "x")], None)],
        ),
        ("serving.knative.dev/v1", "Service", &one, &[("service/x", &[("serving.knative.dev/service", "x")], None)]),
        (
            "serving.kserve.io/v1beta1",
            "InferenceService",
            kserve,
            &[(
                "inferenceservice/x/predictor",
                &[
                    ("app", "isvc.x-predictor"),
                    ("component", "predictor"),
                    ("serving.kserve.io/inferenceservice", "x"),
                    ("tier", "gold"),
                    ("of", "object"),
                ],
                None,
            )],
        ),
        (
            "kubeflow.org/v1",
            "PyTorchJob",
            &torch,
            &[
                ("pytorchjob/x/master", master, None),
                ("pytorchjob/x/worker", &[("training.kubeflow.org/replica-type", "worker")], Some(Stopped::NoReplicas)),
            ],
        ),
        (
            "kubeflow.org/v2beta1",
            "MPIJob",
            &mpi,
            &[
                ("mpijob/x/launcher", &[("training.kubeflow.org/job-role", "launcher")], None),
                ("mpijob/x/worker", &[("training.kubeflow.org/job-role", "worker")], None),
            ],
        ),
        ("ray.io/v1", "RayCluster", &ray, &[("raycluster/x/gpu", worker, None), ("raycluster/x/head", head, None)]),
        (
            "ray.io/v1",
            "RayJob",
            &ray_job,
            &[
                ("rayjob/x/gpu", &worker[1..], None),
                ("rayjob/x/head", &head[1..], None),
                ("rayjob/x/submitter", &job[1..], None),
            ],
        ),
        (
            "ray.io/v1",
            "RayService",
            &ray_service,
            &[("rayservice/x/gpu", &worker[1..], None), ("rayservice/x/head", &head[1..], None)],
        ),
        (
            "jobset.x-k8s.io/v1alpha2",
            "JobSet",
            &job_set,
            &[
                ("jobset/x/driver", &[("jobset.sigs.k8s.io/replicatedjob-name", "driver")], None),
                ("jobset/x/workers", &[("jobset.sigs.k8s.io/jobset-name", "x")], None),
            ],
        ),
        (
            "leaderworkerset.x-k8s.io/v1",
            "LeaderWorkerSet",
            &lws,
            &[
                ("leaderworkerset/x/leader", &[("leaderworkerset.sigs.k8s.io/worker-index", "0")], None),
                ("leaderworkerset/x/worker", &[("leaderworkerset.sigs.k8s.io/name", "x")], None),
            ],
        ),
        ("batch.volcano.sh/v1alpha1", "Job", &volcano, &[("job/x/ps", &[("volcano.sh/task-spec", "ps")], None)]),
    ];
    for (api_version, kind, spec, expected) in cases {
        let text = format!(
            "apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: x, namespace: shop, labels: {{of: object}}}}\nspec: {spec}\n"
        );
        let offline = offline(&text);
        let names: Vec<String> = expected.iter().map(|(name, ..)| format!("shop/{name}")).collect();
        assert_eq!(pods(&offline), names, "{kind}");
        let cluster = &offline.state.cluster;
        for ((id, endpoint), (_, added, stopped)) in cluster.endpoints.iter().zip(*expected) {
            let planned = endpoint.planned.as_ref().expect("it does not run");
            assert_eq!((planned.several, planned.stopped), (true, *stopped), "{kind}");
            assert!(endpoint.addresses.is_empty() && endpoint.is_reachable(), "{kind}");
            assert_eq!(endpoint.service_account.as_deref(), Some("s"), "{kind}");
            assert!(endpoint.ports.iter().any(|port| (&*port.name, port.port) == ("http", 80)), "{kind}");
            assert!(offline.declared[id].is_superset(&[(6, 80), (17, 53)].into()), "{kind}");
            let own: &[(&str, &str)] = if *kind == "InferenceService" { &[] } else { &[("app", "a")] };
            for (key, value) in added.iter().chain(own) {
                assert_eq!(endpoint.labels.get(*key).map(|it| &**it), Some(*value), "{kind} {key}");
            }
        }
        let labels = &cluster.namespaces["shop"].labels;
        assert_eq!(labels.get("kubernetes.io/metadata.name").map(|it| &**it), Some("shop"), "{kind}");
    }
}

/// Of what a controller sets on each pod only the value is unknown before it runs, whatever a template says of it; what it sets
/// on some may be present or absent.
#[test]
fn labels_of_running_pods_are_unknown() {
    let one = format!("{{template: {{{POD}}}}}");
    let cron = format!("{{jobTemplate: {{spec: {one}}}}}");
    let ray = format!("{{rayClusterSpec: {{headGroupSpec: {one}}}}}");
    let forged = one.replace("app: a", "app: a, pod-template-hash: forged");
    for (api_version, kind, name, spec, (unknown, label), known) in [
        ("apps/v1", "Deployment", "name: x", &one, ("pod-template-hash", Label::Some), "app"),
        ("apps/v1", "Deployment", "name: x", &forged, ("pod-template-hash", Label::Some), "app"),
        ("apps/v1", "StatefulSet", "name: x", &one, ("statefulset.kubernetes.io/pod-name", Label::Some), "app"),
        (
            "apps/v1",
            "StatefulSet",
            "name: x",
            &one,
            ("apps.kubernetes.io/pod-index", Label::Unknown),
            "pod-template-hash",
        ),
        ("apps/v1", "DaemonSet", "name: x", &one, ("controller-revision-hash", Label::Some), "app"),
        ("apps/v1", "ReplicaSet", "name: x", &one, ("", Label::Absent), "pod-template-hash"),
        ("batch/v1", "Job", "name: x", &one, ("batch.kubernetes.io/controller-uid", Label::Some), "job-name"),
        ("batch/v1", "Job", "name: x", &one, ("batch.kubernetes.io/job-completion-index", Label::Unknown), "job-name"),
        ("batch/v1", "Job", "generateName: x-", &one, ("job-name", Label::Some), "app"),
        ("batch/v1", "CronJob", "name: x", &cron, ("job-name", Label::Some), "app"),
        ("ray.io/v1", "RayJob", "name: x", &ray, ("ray.io/cluster", Label::Unknown), "ray.io/node-type"),
        ("serving.knative.dev/v1", "Service", "name: x", &one, ("serving.knative.dev/revision", Label::Unknown), "app"),
        ("serving.knative.dev/v1", "Service", "name: x", &one.replace("app: a", "b: c"), ("app", Label::Unknown), "b"),
    ] {
        let text =
            format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{{name}, namespace: shop}}\nspec: {spec}\n");
        let offline = offline(&text);
        let cluster = &offline.state.cluster;
        let (id, endpoint) = cluster.endpoints.first_key_value().expect("a template");
        let labels = EffectiveLabels { cluster, id, endpoint, first_hand: true };
        assert_eq!(labels.label(unknown), label, "{kind} {unknown}");
        assert!(!matches!(labels.label(known), Label::Some | Label::Unknown), "{kind} {known}");
        assert!(!endpoint.labels.contains_key(unknown), "{kind} {unknown}");
    }
}

#[test]
fn controllers_add_ports_that_are_not_written() {
    let offline = offline(
        "apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nmetadata: {name: x}\nspec: {pytorchReplicaSpecs: {Master: {template: {spec: {containers: [{name: pytorch}]}}}}}\n---\n\
         apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata: {name: m}\nspec: {predictor: {model: {modelFormat: {name: sklearn}}}}\n---\n\
         apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata: {name: llm}\nspec: {predictor: {model: {ports: [{containerPort: 9000}]}}}\n",
    );
    let declared: BTreeMap<&str, Vec<_>> =
        offline.declared.iter().map(|(id, ports)| (&*id.name, ports.iter().copied().collect())).collect();
    assert_eq!(declared["pytorchjob/x/master"], [(6, 23456)]);
    assert_eq!(declared["inferenceservice/m/predictor"], [(6, 8080)]);
    assert_eq!(declared["inferenceservice/llm/predictor"], [(6, 9000)]);
}

fn workload(api_version: &str, kind: &str, name: &str, owner: &str, spec: &str) -> String {
    let owners = owners(owner);
    format!(
        "---\napiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop{owners}}}\nspec: {spec}\n"
    )
}

/// `apps/v1 ReplicaSet web-1`.
fn owners(owner: &str) -> String {
    let parts: Vec<&str> = owner.split(' ').collect();
    match parts[..] {
        [api_version, kind, name] => format!(
            ", ownerReferences: [{{apiVersion: other/v1, kind: Other, name: other}}, {{apiVersion: {api_version}, kind: {kind}, name: {name}, controller: true}}]"
        ),
        _ => String::new(),
    }
}

fn running(name: &str, owner: &str, labels: &str, phase: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{{labels}}}{}}}\nstatus: {{phase: {phase}, podIP: 10.0.0.1}}\n",
        owners(owner)
    )
}

#[test]
fn running_pods_replace_their_workload() {
    let template = "{template: {metadata: {labels: {app: a}}, spec: {}}}";
    let deployment = workload("apps/v1", "Deployment", "web", "", template);
    let replica_set = workload("apps/v1", "ReplicaSet", "web-5c9", "apps/v1 Deployment web", template);
    let cron = workload("batch/v1", "CronJob", "tick", "", "{jobTemplate: {spec: {template: {spec: {}}}}}");
    let ray = workload(
        "ray.io/v1",
        "RayCluster",
        "r",
        "",
        "{headGroupSpec: {template: {spec: {}}}, workerGroupSpecs: [{groupName: gpu, template: {spec: {}}}]}",
    );
    let kserve = workload("serving.kserve.io/v1beta1", "InferenceService", "llm", "", "{predictor: {model: {}}}");
    let pod = |owner: &str, labels: &str| running("p", owner, labels, "Running");
    let hashed = "app: a, pod-template-hash: 5c9";
    let ray_head = "ray.io/cluster: r, ray.io/node-type: head, ray.io/group: headgroup, ray.io/identifier: r-head, ray.io/is-ray-node: 'yes', app.kubernetes.io/name: kuberay, app.kubernetes.io/created-by: kuberay-operator";
    let isvc = "app: isvc.llm-predictor, component: predictor, serving.kserve.io/inferenceservice: llm";
    for (about, manifests, expected) in [
        ("none runs", vec![&deployment], vec!["deployment/web"]),
        ("a controlled ReplicaSet is none of its own", vec![&deployment, &replica_set], vec!["deployment/web"]),
        ("its owner is not in the folder", vec![&replica_set], vec!["replicaset/web-5c9"]),
        (
            "by way of the ReplicaSet",
            vec![&deployment, &replica_set, &pod("apps/v1 ReplicaSet web-5c9", "app: a")],
            vec!["p"],
        ),
        ("by the hash", vec![&deployment, &pod("apps/v1 ReplicaSet web-5c9", hashed)], vec!["p"]),
        ("another hash", vec![&deployment, &pod("apps/v1 ReplicaSet web-6d0", hashed)], vec!["deployment/web", "p"]),
        ("no owner", vec![&deployment, &pod("", hashed)], vec!["deployment/web", "p"]),
        (
            "ended",
            vec![&deployment, &replica_set, &running("p", "apps/v1 ReplicaSet web-5c9", "", "Succeeded")],
            vec!["deployment/web", "p"],
        ),
        ("a job by its time", vec![&cron, &pod("batch/v1 Job tick-29218140", "")], vec!["p"]),
        ("a job of another name", vec![&cron, &pod("batch/v1 Job tick-tock", "")], vec!["cronjob/tick", "p"]),
        (
            "one template of several",
            vec![&ray, &pod("ray.io/v1 RayCluster r", ray_head)],
            vec!["p", "raycluster/r/gpu"],
        ),
        ("by the controller's labels", vec![&kserve, &pod("apps/v1 ReplicaSet llm-predictor-7b", isvc)], vec!["p"]),
    ] {
        let text: String = manifests.into_iter().map(String::as_str).collect();
        let expected: Vec<String> = expected.into_iter().map(|name| format!("shop/{name}")).collect();
        assert_eq!(pods(&offline(&text)), expected, "{about}");
    }
}

#[test]
fn an_owner_chain_that_closes_ends() {
    let template = "{template: {spec: {}}}";
    let text = workload("apps/v1", "ReplicaSet", "a", "apps/v1 ReplicaSet b", template)
        + &workload("apps/v1", "ReplicaSet", "b", "apps/v1 ReplicaSet a", template)
        + &running("p", "apps/v1 ReplicaSet a", "", "Running");
    assert!(pods(&offline(&text)).contains(&"shop/p".to_owned()));
}

#[test]
fn the_first_of_two_workloads_with_one_key_counts() {
    let text = workload("apps/v1", "Deployment", "web", "", "{template: {metadata: {labels: {v: one}}, spec: {}}}")
        + &workload("apps/v1beta2", "Deployment", "web", "", "{template: {metadata: {labels: {v: two}}, spec: {}}}");
    let offline = offline(&text);
    let (_, endpoint) = offline.state.cluster.endpoints.first_key_value().expect("one");
    assert_eq!(endpoint.labels["v"], "one".into());
    assert_eq!(offline.state.diagnostics.len(), 1, "{:?}", offline.state.diagnostics);
    assert!(
        offline.state.diagnostics[0].message.contains("conflicts with file.yaml:2"),
        "{:?}",
        offline.state.diagnostics
    );
}

#[test]
fn a_pod_without_a_status_is_planned_under_its_own_name() {
    let pod = |spec: &str, status: &str| {
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{{spec}}}\n{status}")
    };
    for (text, planned, reachable) in [
        (pod("", ""), true, true),
        (pod("hostNetwork: true", ""), true, false),
        (pod("", "status: {phase: Pending}\n"), false, false),
        (pod("", "status: {phase: Running, podIP: 10.0.0.1}\n"), false, true),
    ] {
        let offline = offline(&text);
        let (_, endpoint) = offline.state.cluster.endpoints.first_key_value().expect("a pod");
        assert_eq!((endpoint.planned.is_some(), endpoint.is_reachable()), (planned, reachable), "{text}");
        assert!(endpoint.planned.as_ref().is_none_or(|planned| !planned.several));
    }
}

/// Members assemble what they read by the same reader: none of it is a pod to them.
#[test]
fn members_have_no_planned_endpoint() {
    let text = workload("apps/v1", "Deployment", "web", "", "{template: {metadata: {labels: {app: a}}, spec: {}}}")
        + "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: shop}\nspec: {selector: {app: a}, ports: [{port: 80}]}\n";
    assert_eq!(pods(&offline(&text)), ["shop/deployment/web", "shop/p"]);
    let state = assemble_cluster(&"c".into(), read(&text).objects);
    let endpoints: Vec<_> =
        state.cluster.endpoints.iter().map(|(id, it)| (&*id.name, it.planned.clone(), it.is_reachable())).collect();
    assert_eq!(endpoints, [("p", None, false)]);
    let service = state.cluster.services.values().next().expect("a service");
    assert!(service.planned.is_empty() && service.backends.is_empty() && service.front.is_none(), "{service:?}");
}

#[test]
fn a_malformed_template_is_refused_by_itself() {
    let mut read = Manifests::default();
    let text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec:\n  template:\n    spec:\n      containers:\n      - ports: [{containerPort: http}]\n---\n\
                apiVersion: apps/v1\nkind: Deployment\nmetadata: {}\nspec: {}\n---\n\
                apiVersion: apps/v1\nkind: Deployment\nmetadata: {generateName: b-}\nspec: {template: {spec: {}}}\n";
    read_bytes(&Arc::from("f"), text.as_bytes(), &mut read);
    let refused: Vec<_> = read.refused_workloads.iter().map(|it| (it.location.line, &*it.field)).collect();
    assert_eq!(refused, [(8, "spec.template.spec.containers[0].ports[0].containerPort"), (12, "metadata.name")]);
    assert!(read.diagnostics.is_empty(), "members are not told of what they do not read: {:?}", read.diagnostics);
    assert_eq!(pods(&assemble_offline(&"c".into(), read)), ["default/deployment/b-"]);
}

#[test]
fn services_select_what_does_not_run() {
    let text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\nspec: {template: {metadata: {labels: {app: a}}, spec: {containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}}}\n---\n\
                apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: other}\nspec: {template: {metadata: {labels: {app: a}}, spec: {}}}\n---\n\
                apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop, labels: {app: a}}\nstatus: {phase: Running, podIP: 10.0.0.1}\n---\n\
                apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd00::1'], selector: {app: a}, ports: [{name: a, port: 80, targetPort: http}, {name: b, port: 81}, {name: c, port: 82, targetPort: 9000}]}\n";
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\nendpoints: [{addresses: [10.0.0.7]}]\nports: [{name: a, port: 8081}]\n";
    let front = |text: &str| {
        let offline = offline(text);
        let service = &offline.state.cluster.services[&("shop".into(), "web".into())];
        let front = service.front.clone().expect("a front");
        assert_eq!(front.addresses.len(), 2);
        let name = |backend: &Backend| match backend {
            Backend::Address(address) => address.to_string(),
            Backend::Pod(id) => id.name.to_string(),
        };
        let ports = front.ports.iter().map(|port| {
            let backends: Vec<String> = port.backends.iter().map(|(to, port)| format!("{}:{port}", name(to))).collect();
            format!("{} {}", port.port, backends.join(" "))
        });
        let planned: Vec<_> = service.planned.iter().map(|(id, ports)| (id.name.to_string(), ports.clone())).collect();
        assert_eq!(planned, [("deployment/web".to_owned(), [(6, 8080), (6, 81), (6, 9000)].into())]);
        ports.collect::<Vec<_>>()
    };
    // A name is the port of each backend that has it.
    assert_eq!(front(text), ["80 deployment/web:8080", "81 deployment/web:81 p:81", "82 deployment/web:9000 p:9000"]);
    // Of running pods the slices say it, where there are any.
    assert_eq!(
        front(&format!("{text}{slice}")),
        ["80 10.0.0.7:8081 deployment/web:8080", "81 deployment/web:81", "82 deployment/web:9000"]
    );
}
