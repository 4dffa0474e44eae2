//! The Kubernetes source of a member, against a real API server.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use hanse_api::Diagnostic;
use hanse_api::assemble::{Assembly, ClusterState};
use hanse_e2e::kubernetes::{ApiServer, Etcd, Options, manifests, run, until};
use hanse_kubernetes::Access;
use hanse_member::source::{self, LastGood, Location, Source};
use hanse_member::state::State;
use hanse_runtime::health::{Health, Writes};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use serde_json::Value;

mod leaders;

const PATIENCE: Duration = Duration::from_secs(60);

/// What a member knows of its cluster.
#[derive(Debug, Clone, Default)]
struct View {
    is_synced: bool,
    state: ClusterState,
    problems: Vec<Diagnostic>,
}

impl View {
    fn pods(&self) -> Vec<String> {
        self.state.cluster.endpoints.keys().map(|id| format!("{}", id.name)).collect()
    }

    fn policies(&self) -> Vec<String> {
        self.state.layer.policies.keys().map(|id| id.name.to_string()).collect()
    }

    fn has_problem(&self, texts: &[&str]) -> bool {
        self.problems.iter().any(|it| {
            let text = format!("{}: {}", it.location.file, it.message);
            texts.iter().all(|part| text.contains(part))
        })
    }
}

/// The source of a member, on a thread of its own as in the member.
struct Member {
    views: mpsc::Receiver<View>,
    stop: mpsc::Sender<()>,
    /// The source is not polled: it neither reads nor connects.
    paused: Arc<AtomicBool>,
    last: View,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Member {
    fn start(kubeconfig: &Path, data: &Path) -> Self {
        let access = Access { kubeconfig: Some(kubeconfig.to_owned()), context: None };
        let data = data.to_owned();
        Self::start_with(move || {
            let writes = Writes::new(&Health::default());
            Location::Kubernetes(access).open(&State::from(&data), writes).expect("a source")
        })
    }

    fn start_with(open: impl FnOnce() -> LastGood<Box<dyn Source>> + Send + 'static) -> Self {
        install_provider();
        let (sender, views) = mpsc::channel();
        let (stop, stopped) = mpsc::channel::<()>();
        let paused = Arc::new(AtomicBool::new(false));
        let is_paused = Arc::clone(&paused);
        let thread = std::thread::spawn(move || {
            let mut source = open();
            let mut assembly = Assembly::new("c".into());
            let mut problems = source::Problems::default();
            while !matches!(stopped.try_recv(), Ok(()) | Err(mpsc::TryRecvError::Disconnected)) {
                if is_paused.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(10));
                } else if let Some(changes) = source.poll() {
                    assembly.update(changes.objects);
                    let state = ClusterState::clone(assembly.state());
                    problems.apply(changes.problems);
                    let problems = problems.most_important().cloned().collect();
                    if sender.send(View { is_synced: true, state, problems }).is_err() {
                        return;
                    }
                }
            }
        });
        Self { views, stop, paused, last: View::default(), thread: Some(thread) }
    }

    /// The newest view.
    fn view(&mut self) -> &View {
        while let Ok(view) = self.views.try_recv() {
            self.last = view;
        }
        &self.last
    }

    async fn until(&mut self, what: &str, is: impl Fn(&View) -> bool) {
        let found = until(PATIENCE, async || is(self.view())).await;
        let View { is_synced, problems, .. } = &self.last;
        assert!(
            found.is_some(),
            "{what}: synced {is_synced}, pods {:?}, policies {:?}, problems {problems:#?}",
            self.last.pods(),
            self.last.policies()
        );
    }

    /// The condition is satisfied, and still is after several polls.
    async fn stays(&mut self, what: &str, is: impl Fn(&View) -> bool) {
        self.until(what, &is).await;
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(is(self.view()), "{what}: it does not stay so: {:#?}", self.last.problems);
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ended = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the source does not panic");
        }
    }
}

fn install_provider() {
    hanse_identity::tls::install_provider();
}

fn pod(name: &str, address: &str) -> [Value; 2] {
    let metadata = serde_json::json!({"name": name, "namespace": "a", "labels": {"app": name}});
    let container = serde_json::json!({
        "name": "c", "image": "none", "env": [{"name": "PASSWORD", "value": "secret"}],
        "ports": [{"name": "http", "containerPort": 8080}],
    });
    let head = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": {"nodeName": "one", "automountServiceAccountToken": false, "containers": [container]},
    });
    let status = serde_json::json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}});
    [head, status]
}

async fn create_pod(client: &kube::Client, name: &str, address: &str) {
    use kube::api::{Patch, PatchParams, PostParams};
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(client.clone(), "a");
    let [head, status] = pod(name, address);
    let head = serde_json::from_value(head).expect("a pod");
    pods.create(&PostParams::default(), &head).await.expect("the pod is created");
    pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.expect("its status is set");
}

async fn delete_pod(client: &kube::Client, name: &str) {
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(client.clone(), "a");
    pods.delete(name, &kube::api::DeleteParams::default().grace_period(0)).await.expect("the pod is deleted");
}

const CLUSTER: &str = "apiVersion: v1
kind: Namespace
metadata: {name: a, labels: {stage: training}}
---
apiVersion: v1
kind: Node
metadata: {name: one}
spec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24]}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: default, namespace: a}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: a}
spec: {podSelector: {}, policyTypes: [Ingress]}
";

const CALICO: &str = "apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: globalnetworkpolicies.crd.projectcalico.org}
spec:
  group: crd.projectcalico.org
  names: {kind: GlobalNetworkPolicy, listKind: GlobalNetworkPolicyList, plural: globalnetworkpolicies, singular: globalnetworkpolicy}
  scope: Cluster
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
";

fn calico_policy(name: &str) -> String {
    format!(
        "apiVersion: crd.projectcalico.org/v1\nkind: GlobalNetworkPolicy\nmetadata: {{name: {name}}}\n\
         spec: {{tier: default, selector: all(), types: [Ingress], ingress: [{{action: Deny}}]}}\n"
    )
}

const CALICO_NAME: &str = "globalnetworkpolicies.crd.projectcalico.org";

/// A role with the rights of the source, and its account.
fn role(without: &str) -> String {
    role_with(without, "get, list, watch")
}

/// `definitions`: what the account may do with CustomResourceDefinitions.
fn role_with(without: &str, definitions: &str) -> String {
    let rules = [
        ("''", "namespaces", "list, watch"),
        ("''", "nodes", "list, watch"),
        ("''", "pods", "list, watch"),
        ("''", "services", "list, watch"),
        ("''", "serviceaccounts", "list, watch"),
        ("discovery.k8s.io", "endpointslices", "list, watch"),
        ("networking.k8s.io", "networkpolicies", "list, watch"),
        ("apiextensions.k8s.io", "customresourcedefinitions", definitions),
        ("crd.projectcalico.org", "globalnetworkpolicies", "list, watch"),
    ];
    let rule = |(group, resource, verbs): &(&str, &str, &str)| {
        format!("- {{apiGroups: [{group}], resources: [{resource}], verbs: [{verbs}]}}\n")
    };
    let rules: String = rules.iter().filter(|(_, resource, _)| *resource != without).map(rule).collect();
    format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: member, namespace: default}}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {{name: member}}\nrules:\n{rules}---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {{name: member}}\n\
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: member}}\n\
         subjects: [{{kind: ServiceAccount, name: member, namespace: default}}]\n"
    )
}

struct World {
    server: ApiServer,
    client: kube::Client,
    folder: tempfile::TempDir,
    kubeconfig: std::path::PathBuf,
}

impl World {
    async fn new(name: &str) -> Self {
        let etcd = Etcd::start().expect("etcd starts");
        let server = ApiServer::start(&etcd, Options::new(name)).await.expect("it is ready");
        let client = server.client().await.expect("a client");
        manifests::apply(&client, "test", CLUSTER).await.expect("applied");
        manifests::apply(&client, "test", &role("")).await.expect("applied");
        let account = server.service_account("default", "member").await.expect("a token");
        let kubeconfig = server.write_kubeconfig("member", &account).expect("written");
        Self { server, client, folder: tempfile::tempdir().expect("a folder"), kubeconfig }
    }

    fn member(&self) -> Member {
        Member::start(&self.kubeconfig, self.folder.path())
    }

    async fn apply(&self, text: &str) {
        manifests::apply(&self.client, "test", text).await.expect("applied");
    }

    async fn define_calico(&self) {
        self.apply(CALICO).await;
        manifests::established(&self.client, CALICO_NAME).await.expect("established");
    }

    async fn delete_definition(&self) {
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        definitions.delete(CALICO_NAME, &Default::default()).await.expect("deleted");
        let gone = until(PATIENCE, async || definitions.get_opt(CALICO_NAME).await.is_ok_and(|it| it.is_none())).await;
        assert!(gone.is_some(), "the definition goes");
    }

    /// Waits until the state of the member names the definition.
    async fn until_recorded(&self) {
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let uid = definitions.get(CALICO_NAME).await.expect("it exists").metadata.uid.expect("a uid");
        let file = self.folder.path().join("source/definitions.json");
        let is_named = || std::fs::read_to_string(&file).is_ok_and(|text| text.contains(&uid));
        assert!(until(PATIENCE, async || is_named()).await.is_some(), "{:?}", std::fs::read_to_string(&file));
    }

    /// The caches of the source, of a member that does not run.
    fn caches(&self) -> std::path::PathBuf {
        self.folder.path().join("source/objects.redb")
    }

    async fn delete_calico_policy(&self, name: &str) {
        let command = self.server.kubectl().expect("kubectl");
        let mut command = command;
        let output = command.args(["delete", CALICO_NAME, name]).output().expect("kubectl runs");
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn changes_of_objects_follow_the_api_server() {
    run(async {
        let world = World::new("source").await;
        create_pod(&world.client, "early", "10.1.0.2").await;
        let mut member = world.member();
        member.until("the first list", |it| it.pods() == ["early"] && it.policies() == ["closed"]).await;
        let view = member.view();
        assert_eq!(view.problems, []);
        assert!(view.state.nodes.contains_key("one") && view.state.cluster.namespaces.contains_key("a"));
        assert!(
            view.state.cluster.services.iter().any(|((_, name), _)| &**name == "kubernetes"),
            "the API server's own"
        );
        create_pod(&world.client, "late", "10.1.0.3").await;
        member.until("a new pod", |it| it.pods() == ["early", "late"]).await;
        delete_pod(&world.client, "early").await;
        member.until("a deleted pod", |it| it.pods() == ["late"]).await;
        // What other fields contain is not stored. A member that ends writes what it knows.
        drop(member);
        let stored = std::fs::read(world.folder.path().join("source/objects.redb")).expect("stored");
        let contains = |text: &str| stored.windows(text.len()).any(|it| it == text.as_bytes());
        assert!(contains("10.1.0.3") && !contains("PASSWORD") && !contains("managedFields"));
    });
}

/// An object that the API server has accepted is read, whatever the syntax of its annotations. Policies that take too much are closed.
#[test]
fn what_users_may_write_harms_only_their_own_namespace() {
    run(async {
        let mut world = World::new("users").await;
        // 1,000 peers with 60 ports each: 60,000 of the 100,000 ports and nets of a namespace.
        let large = |name: &str| {
            let peers: Vec<_> =
                (0..1_000).map(|it| format!("{{podSelector: {{matchLabels: {{app: a{it}}}}}}}")).collect();
            let ports: Vec<_> = (1..=60).map(|it| format!("{{port: {it}}}")).collect();
            let (peers, ports) = (peers.join(", "), ports.join(", "));
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: a, annotations: {{İstanbul.example/K: x}}}}\n\
                 spec: {{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: [{peers}], ports: [{ports}]}}]}}\n"
            )
        };
        world.apply(&large("first")).await;
        let mut member = world.member();
        let rules = |view: &View, name: &str| {
            let policy = view.state.layer.policies.iter().find(|(id, _)| &*id.name == name)?.1;
            policy.ingress.as_ref().map(Vec::len)
        };
        member.until("the first policy", |it| rules(it, "first") == Some(1_000) && it.problems.is_empty()).await;
        world.apply(&large("second")).await;
        member
            .until("the second one, closed", |it| {
                rules(it, "second") == Some(0)
                    && it.has_problem(&[
                        "networkpolicies.networking.k8s.io/a/second",
                        "is too large",
                        "120000 nets and ports",
                    ])
            })
            .await;
        // So it is after a restart, with and without the API server.
        drop(member);
        let mut member = world.member();
        let is_closed = |it: &View| rules(it, "first") == Some(1_000) && rules(it, "second") == Some(0);
        member.until("both after a restart", |it| is_closed(it) && it.has_problem(&["is too large"])).await;
        drop(member);
        world.server.kill().expect("killed");
        let mut member = world.member();
        member.until("both without the API server", |it| is_closed(it) && it.has_problem(&["cannot be read"])).await;
        world.server.start_again().await.expect("ready");
        member
            .until("both with it", |it| is_closed(it) && it.has_problem(&["is too large"]) && it.problems.len() == 1)
            .await;
        // It counts when the first one is gone.
        let output =
            world.server.kubectl().expect("kubectl").args(["delete", "networkpolicy", "-n", "a", "first"]).output();
        assert!(output.as_ref().is_ok_and(|it| it.status.success()), "{output:?}");
        member.until("the second one", |it| rules(it, "second") == Some(1_000) && it.problems.is_empty()).await;
    });
}

#[test]
fn interruptions_of_the_api_server_remove_nothing() {
    run(async {
        let mut world = World::new("interrupted").await;
        create_pod(&world.client, "p", "10.1.0.2").await;
        create_pod(&world.client, "q", "10.1.0.3").await;
        let mut member = world.member();
        let both = |it: &View| it.pods() == ["p", "q"] && it.policies() == ["closed"];
        member.until("the first list", both).await;
        world.server.kill().expect("killed");
        member.stays("the objects, with a problem", |it| both(it) && it.has_problem(&["pods", "cannot be read"])).await;
        // A member that starts meanwhile has them too.
        drop(member);
        let mut member = world.member();
        member.stays("the stored objects, with a problem", |it| both(it) && it.has_problem(&["pods"])).await;
        world.server.start_again().await.expect("ready");
        member.until("no problem", |it| both(it) && it.problems.is_empty()).await;
        // Changes while the member does not run, and their history is compacted.
        drop(member);
        delete_pod(&world.client, "p").await;
        create_pod(&world.client, "r", "10.1.0.4").await;
        world.server.etcd().compact().expect("compacted");
        let mut member = world.member();
        member.until("the current objects", |it| it.pods() == ["q", "r"] && it.problems.is_empty()).await;
        // The position of a running member is compacted: the API server cannot continue the watch.
        member.paused.store(true, Ordering::Relaxed);
        create_pod(&world.client, "s", "10.1.0.5").await;
        world.server.kill().expect("killed");
        world.server.start_again().await.expect("ready");
        delete_pod(&world.client, "q").await;
        world.server.etcd().compact().expect("compacted");
        world.server.kill().expect("killed");
        world.server.start_again().await.expect("ready");
        member.paused.store(false, Ordering::Relaxed);
        member.until("the current objects", |it| it.pods() == ["r", "s"] && it.problems.is_empty()).await;
    });
}

#[test]
fn objects_that_disappear_with_their_definition_stay_in_force() {
    run(async {
        let world = World::new("definitions").await;
        let mut member = world.member();
        member.until("the first list", |it| it.policies() == ["closed"]).await;
        drop(member);
        let before = world.folder.path().join("before");
        std::fs::copy(world.caches(), &before).expect("copied");
        let mut member = world.member();
        member.until("the first list", |it| it.policies() == ["closed"]).await;
        // The kind comes later.
        world.define_calico().await;
        for name in ["one", "two", "three"] {
            world.apply(&calico_policy(name)).await;
        }
        let all = ["closed", "one", "three", "two"];
        let sorted = |it: &View| {
            let mut policies = it.policies();
            policies.sort();
            policies
        };
        member.until("policies of the new kind", |it| sorted(it) == all).await;
        world.delete_calico_policy("three").await;
        let rest = ["closed", "one", "two"];
        member.until("a deleted policy", |it| sorted(it) == rest).await;
        world.delete_definition().await;
        let kept =
            |it: &View| sorted(it) == rest && it.has_problem(&[CALICO_NAME, "2 objects kept in force", "was deleted"]);
        member.stays("kept policies", kept).await;
        // Also across a restart.
        drop(member);
        let mut member = world.member();
        member.stays("kept policies", kept).await;
        let listed = || source::kept_objects(world.folder.path()).expect("listed");
        assert_eq!(listed(), [format!("{CALICO_NAME}/one"), format!("{CALICO_NAME}/two")]);
        // With damaged caches.
        drop(member);
        std::fs::write(world.caches(), "damaged").expect("written");
        let mut member = world.member();
        member.stays("kept policies", kept).await;
        assert!(listed().len() == 2 && world.caches().with_extension("damaged").exists());
        // With caches that can be neither opened nor written, and then with those of a process that knew none of them.
        drop(member);
        std::fs::remove_file(world.caches()).expect("removed");
        std::fs::create_dir(world.caches()).expect("a folder");
        let mut member = world.member();
        member.stays("kept policies", kept).await;
        drop(member);
        std::fs::remove_dir(world.caches()).expect("removed");
        std::fs::copy(&before, world.caches()).expect("copied");
        let mut member = world.member();
        member.stays("kept policies", kept).await;
        assert_eq!(listed().len(), 2);
        // The kind returns, with one of them: the other one stays.
        world.define_calico().await;
        world.apply(&calico_policy("one")).await;
        let other = |it: &View| sorted(it) == rest && it.has_problem(&["1 object kept in force", "/two"]);
        member.stays("one kept policy", other).await;
        // The one that has returned can be deleted.
        world.delete_calico_policy("one").await;
        member.until("a deleted policy", |it| sorted(it) == ["closed", "two"]).await;
        let data = world.folder.path().to_owned();
        let forgotten = std::thread::spawn(move || source::forget(&data, vec![format!("{CALICO_NAME}/two")], false));
        forgotten.join().expect("it does not panic").expect("the member takes the request");
        member.until("nothing kept", |it| sorted(it) == ["closed"] && it.problems.is_empty()).await;
        assert!(source::kept_objects(world.folder.path()).expect("listed").is_empty());
        // Also a definition that is deleted and created while the member does not run.
        world.apply(&calico_policy("four")).await;
        member.until("a policy", |it| sorted(it) == ["closed", "four"]).await;
        drop(member);
        world.delete_definition().await;
        world.define_calico().await;
        let mut member = world.member();
        let kept = |it: &View| sorted(it) == ["closed", "four"] && it.has_problem(&["1 object kept in force"]);
        member.stays("a kept policy", kept).await;
        // It goes again, with the caches of a member that does not run, or what they lack: which policies it had is not known.
        world.apply(&calico_policy("five")).await;
        member.until("a policy", |it| sorted(it) == ["closed", "five", "four"]).await;
        world.until_recorded().await;
        drop(member);
        world.delete_definition().await;
        std::fs::copy(&before, world.caches()).expect("copied");
        let mut member = world.member();
        leaders::is_never_synced(&mut member, "the caches are older than the policy").await;
        drop(member);
        std::fs::write(world.caches(), "damaged").expect("written");
        let mut member = world.member();
        leaders::is_never_synced(&mut member, "a policy is missing").await;
        let data = world.folder.path().to_owned();
        let forgotten = std::thread::spawn(move || source::forget(&data, Vec::new(), true));
        forgotten.join().expect("it does not panic").expect("the member takes the request");
        member
            .until("what is known", |it| {
                it.policies().contains(&"closed".to_owned()) && !it.policies().contains(&"five".to_owned())
            })
            .await;
    });
}

/// The watch of definitions may be late, or not permitted: why an object was deleted is found out before it is removed.
#[test]
fn objects_that_disappear_before_their_definition_stay_in_force() {
    run(async {
        let mut world = World::new("late-definitions").await;
        world.define_calico().await;
        world.apply(&role_with("", "get, list")).await;
        world.apply(&calico_policy("one")).await;
        world.apply(&calico_policy("two")).await;
        let mut member = world.member();
        let is_named = |it: &View| it.has_problem(&["cannot watch resource \"customresourcedefinitions\""]);
        member.until("the first list, and the missing right", |it| it.policies().len() == 3 && is_named(it)).await;
        world.delete_calico_policy("two").await;
        let rest = |it: &View| it.policies() == ["closed", "one"] || it.policies() == ["one", "closed"];
        member.until("a deleted policy", rest).await;
        let is_kept = |it: &View| rest(it) && it.has_problem(&[CALICO_NAME, "1 object kept in force"]);
        world.delete_definition().await;
        member.stays("a kept policy", is_kept).await;
        // Nor does a list under another definition, which the member finds although it may not watch definitions.
        world.define_calico().await;
        world.apply(&calico_policy("three")).await;
        let sorted = |it: &View| it.policies().into_iter().collect::<BTreeSet<_>>();
        let all: BTreeSet<String> = ["closed", "one", "three"].map(str::to_owned).into();
        member.stays("both policies", |it| sorted(it) == all && it.has_problem(&["1 object kept in force"])).await;
        // Nor one that is necessary because the history of the former definition is compacted.
        member.paused.store(true, Ordering::Relaxed);
        world.server.kill().expect("killed");
        world.server.start_again().await.expect("ready");
        world.delete_definition().await;
        world.define_calico().await;
        world.apply(&calico_policy("four")).await;
        world.server.etcd().compact().expect("compacted");
        world.server.kill().expect("killed");
        world.server.start_again().await.expect("ready");
        member.paused.store(false, Ordering::Relaxed);
        let all: BTreeSet<String> = ["closed", "four", "one", "three"].map(str::to_owned).into();
        member.stays("all policies", |it| sorted(it) == all && it.has_problem(&["/three"])).await;
    });
}

#[test]
fn missing_rights_are_reported_by_name() {
    run(async {
        let world = World::new("rights").await;
        world.define_calico().await;
        world.apply(&calico_policy("one")).await;
        create_pod(&world.client, "p", "10.1.0.2").await;
        let complete = |it: &View| it.pods() == ["p"] && it.policies().len() == 2;
        let mut member = world.member();
        member.until("the first list", complete).await;
        drop(member);
        for resource in [
            "namespaces",
            "nodes",
            "pods",
            "services",
            "serviceaccounts",
            "endpointslices",
            "networkpolicies",
            "customresourcedefinitions",
            "globalnetworkpolicies",
        ] {
            world.apply(&role(resource)).await;
            let named = format!("cannot list resource \"{resource}\"");
            // A member that has read the cluster before goes on with what it knows.
            let mut member = world.member();
            member.until(resource, |it| complete(it) && it.has_problem(&[&named])).await;
            drop(member);
            // A new one does not take what it may not read for nothing.
            let fresh = tempfile::tempdir().expect("a folder");
            let mut member = Member::start(&world.kubeconfig, fresh.path());
            for _ in 0..20 {
                tokio::time::sleep(Duration::from_millis(50)).await;
                assert!(!member.view().is_synced, "{resource}: {:?}", member.last);
            }
            world.apply(&role("")).await;
            member.until(resource, |it| complete(it) && it.problems.is_empty()).await;
        }
    });
}
