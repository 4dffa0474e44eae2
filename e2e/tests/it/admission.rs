//! The admission webhook and approvals on a real API server: the hub, kubectl and `hanse` are processes, and users have rights by RBAC.

mod approval;
mod certificate;
mod rights;
mod role;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use base64::Engine as _;
use hanse_e2e::kubernetes::certificates::{Authority, Certified};
use hanse_e2e::kubernetes::{ApiServer, Options, manifests, until};
use hanse_e2e::process::Process;
use serde_json::{Value, json};

use crate::{chart, operator};

const PATIENCE: Duration = Duration::from_secs(60);

/// The user that the chart gives the hub.
const HUB: &str = "system:serviceaccount:hanse:hanse-hub";

/// The rights of the hub, and the configuration of its webhook, as the chart renders them.
fn of_chart() -> Vec<Value> {
    let hub = chart::set(chart::set(chart::complete(), "member.enabled", json!(false)), "agent.enabled", json!(false));
    let webhook = json!({"enabled": true, "clientCA": {"secretName": "api-servers", "names": [API_SERVER]}});
    let hub = chart::set(chart::set(hub, "hub.operator", json!({"enabled": true})), "hub.webhook", webhook);
    let kinds = [
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
        "Role",
        "RoleBinding",
        "ValidatingWebhookConfiguration",
    ];
    let objects = chart::rendered(&hub).into_iter();
    objects.filter(|it| it["kind"].as_str().is_some_and(|it| kinds.contains(&it))).collect()
}

/// The name of the API server's client certificate.
const API_SERVER: &str = "kube-apiserver-webhooks";

/// A file with an authority, and the options of an API server that presents a certificate of it to webhooks.
fn client_authority(folder: &Path) -> Options {
    let authority = Authority::create("webhooks").expect("an authority");
    std::fs::write(folder.join("clients.pem"), authority.pem()).expect("written");
    let Certified { certificate, key } = authority.client(API_SERVER, &[]).expect("a certificate");
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let user = json!({"client-certificate-data": encode(&certificate), "client-key-data": encode(&key)});
    let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "users": [{"name": "*", "user": user}]});
    let (path, file) = (folder.join("webhooks.kubeconfig"), folder.join("admission.yaml"));
    std::fs::write(&path, kubeconfig.to_string()).expect("written");
    let version = "apiserver.config.k8s.io/v1";
    let plugin = json!({"apiVersion": version, "kind": "WebhookAdmissionConfiguration", "kubeConfigFile": path});
    let plugins = json!([{"name": "ValidatingAdmissionWebhook", "configuration": plugin}]);
    let config = json!({"apiVersion": version, "kind": "AdmissionConfiguration", "plugins": plugins});
    std::fs::write(&file, config.to_string()).expect("written");
    Options::new("management").argument(&format!("--admission-control-config-file={}", file.display()))
}

/// Users: all but `carol` may write policies, as far as RBAC on the kinds goes. `ada` and `bob` may use the tiers `platform` and `strict`,
/// `bob` and `eve` may approve in `strict`, and `mallory` may use `other`. `carol` may change and delete tiers, and not create them.
const USERS: &str = "apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: writer}
rules:
- {apiGroups: [hanse.dev], resources: ['*'], verbs: [get, list, create, update, patch, delete, deletecollection]}
- {apiGroups: [''], resources: [configmaps], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: author}
rules: [{apiGroups: [hanse.dev], resources: [tiers], resourceNames: [platform, strict], verbs: [use]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: other-author}
rules: [{apiGroups: [hanse.dev], resources: [tiers], resourceNames: [other], verbs: [use]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: approver}
rules: [{apiGroups: [hanse.dev], resources: [tiers], resourceNames: [strict], verbs: [approve]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: remover}
rules: [{apiGroups: [hanse.dev], resources: [tiers], verbs: [get, list, update, patch, delete]}]
";

const BINDINGS: [(&str, &[&str]); 5] = [
    ("writer", &["ada", "bob", "eve", "mallory"]),
    ("author", &["ada", "bob"]),
    ("other-author", &["mallory"]),
    ("approver", &["bob", "eve"]),
    ("remover", &["carol"]),
];

fn binding(role: &str) -> String {
    let users = BINDINGS.iter().find(|it| it.0 == role).map(|it| it.1).unwrap_or_default();
    let subjects: Vec<String> = users.iter().map(|user| format!("{{kind: User, name: {user}}}")).collect();
    format!(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {{name: {role}}}\nroleRef: {{apiGroup: \
         rbac.authorization.k8s.io, kind: ClusterRole, name: {role}}}\nsubjects: [{}]\n",
        subjects.join(", ")
    )
}

fn tier(name: &str, spec: &str) -> String {
    format!("apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )
}

fn deny(tier: &str) -> String {
    format!("tier: {tier}, selector: all(), types: [Ingress], ingress: []")
}

/// A management cluster and a hub with a webhook.
struct World {
    server: ApiServer,
    kubeconfig: PathBuf,
    folder: tempfile::TempDir,
    listen: [SocketAddr; 3],
    hub: Option<Process>,
    users: RefCell<HashMap<String, PathBuf>>,
    certificate_seconds: u64,
}

impl World {
    async fn start(certificate_seconds: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let options = client_authority(folder.path());
        let (server, kubeconfig) = operator::management_with(options, &of_chart()).await;
        let client = server.client().await.expect("a client");
        manifests::apply(&client, "test", USERS).await.expect("it is applied");
        for (role, _) in BINDINGS {
            manifests::apply(&client, "test", &binding(role)).await.expect("it is applied");
        }
        let ports = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let listen = ports.map(|it| it.local_addr().expect("an address"));
        let mut world =
            Self { server, kubeconfig, folder, listen, hub: None, users: RefCell::default(), certificate_seconds };
        let made = world.hub_command("init").output().expect("it runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        world.start_hub();
        world.until("the webhook is configured", || world.configuration().contains("caBundle")).await;
        // API servers follow the configuration: then an object that is wrong is refused by the webhook.
        let wrong = policy("wrong", "tier: platform, selector: 'app =='");
        world.until("the webhook is used", || world.try_apply("", &wrong).1.contains("policies.hanse.dev")).await;
        world.until("the hub answers", || world.try_apply("", &wrong).1.contains("denied the request")).await;
        world
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    fn hub_command(&self, verb: &str) -> Command {
        let mut command = Command::new(crate::system::programs().join("hanse-hub"));
        let [listen, join, _] = self.listen.map(|it| it.to_string());
        command.args([verb, "--listen", &listen, "--join-listen", &join, "--data"]).arg(self.data());
        command
    }

    fn start_hub(&mut self) {
        let mut command = self.hub_command("run");
        command.arg("--operator").arg("--kubeconfig").arg(&self.kubeconfig);
        let webhook = self.listen[2];
        command.arg(format!("--webhook-listen={webhook}")).arg(format!("--webhook-url=https://{webhook}"));
        command.arg(format!("--webhook-certificate-seconds={}", self.certificate_seconds));
        command.arg(format!("--webhook-client-ca={}", self.folder.path().join("clients.pem").display()));
        command.arg(format!("--webhook-client-name={API_SERVER}"));
        let before = self.hub_log().matches("hub is serving").count();
        let hub = Process::start_bound(command, &self.folder.path().join("hub.log")).expect("it starts");
        self.hub = Some(hub);
        let served = hanse_e2e::probe::until(PATIENCE, || self.hub_log().matches("hub is serving").count() > before);
        assert!(served.is_some(), "{}", self.hub_log());
    }

    fn hub_log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("hub.log")).unwrap_or_default()
    }

    /// kubectl as a user; the administrator where `user` is empty.
    fn kubectl(&self, user: &str, arguments: &[&str]) -> (bool, String) {
        let mut command = self.server.kubectl().expect("kubectl");
        if !user.is_empty() {
            command.env("KUBECONFIG", self.kubeconfig_of(user));
        }
        text(&command.args(arguments).output().expect("it runs"))
    }

    fn kubeconfig_of(&self, user: &str) -> PathBuf {
        let made = || {
            let kubeconfig = self.server.user(user, &[]).expect("a kubeconfig");
            self.server.write_kubeconfig(user, &kubeconfig).expect("it is written")
        };
        self.users.borrow_mut().entry(user.to_owned()).or_insert_with(made).clone()
    }

    fn try_apply(&self, user: &str, manifest: &str) -> (bool, String) {
        let path = self.folder.path().join("manifest.yaml");
        std::fs::write(&path, manifest).expect("written");
        self.kubectl(user, &["apply", "-f", path.to_str().expect("UTF-8")])
    }

    fn apply(&self, user: &str, manifest: &str) {
        let (success, text) = self.try_apply(user, manifest);
        assert!(success, "{user}: {text}\n{}", self.hub_log());
    }

    /// What `user` sends is refused by the webhook with these words.
    fn refused(&self, user: &str, arguments: &[&str], words: &str) {
        let (success, text) = self.kubectl(user, arguments);
        assert!(!success && text.contains(words), "{user} {arguments:?}: {text}");
    }

    fn apply_refused(&self, user: &str, manifest: &str, words: &str) {
        let (success, text) = self.try_apply(user, manifest);
        assert!(!success && text.contains(words), "{user}: {manifest}: {text}");
    }

    fn hanse(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(crate::system::programs().join("hanse"));
        let output = command.env("HANSE_CONTEXT", self.data().join("admin.context")).args(arguments).output();
        text(&output.expect("it runs"))
    }

    /// The version in force at the hub.
    fn in_force(&self, kind: &str, name: &str) -> Value {
        let (success, text) = self.hanse(&["get", kind, name, "-o", "json"]);
        if success { serde_json::from_str(&text).expect("JSON") } else { Value::Null }
    }

    /// The audit log, newest first: who, action, outcome.
    fn audit(&self, object: &str) -> Vec<Value> {
        let (success, text) = self.hanse(&["audit", "-o", "json", "--object", object]);
        assert!(success, "{text}");
        let list: Value = serde_json::from_str(&text).expect("JSON");
        list["items"].as_array().cloned().unwrap_or_default()
    }

    async fn until(&self, what: &str, is: impl Fn() -> bool) {
        let found = until(PATIENCE, async || is()).await;
        let objects = || self.kubectl("", &["get", "hanse", "-o", "yaml"]).1;
        assert!(found.is_some(), "{what}: {}\n{}\n{}", objects(), self.configuration(), self.hub_log());
    }

    fn condition(&self, object: &str, kind: &str) -> [String; 3] {
        let (success, text) = self.kubectl("", &["get", object, "-o", "json"]);
        let object = if success { serde_json::from_str::<Value>(&text).expect("JSON") } else { Value::Null };
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let found = conditions.into_iter().find(|it| it["type"] == kind).unwrap_or_default();
        ["status", "reason", "message"].map(|name| found[name].as_str().unwrap_or_default().to_owned())
    }

    async fn until_condition(&self, object: &str, kind: &str, status: &str, reason: &str) {
        let is = || self.condition(object, kind)[..2] == [status, reason];
        self.until(&format!("{object} has {kind}={status} {reason}"), is).await;
    }

    async fn accepted(&self, object: &str) {
        self.until_condition(object, "Accepted", "True", "Accepted").await;
    }

    fn configuration(&self) -> String {
        self.kubectl("", &["get", "validatingwebhookconfiguration", "hanse-hub", "-o", "yaml"]).1
    }

    /// Requests that the hub has no right to.
    fn forbidden(&self) -> Vec<String> {
        let audit = self.server.audit().expect("the audit log");
        let is = |it: &&Value| it["user"]["username"] == HUB && it["responseStatus"]["code"] == 403;
        audit.iter().filter(is).map(|it| format!("{} {}", it["verb"], it["requestURI"])).collect()
    }
}

fn text(output: &Output) -> (bool, String) {
    let text = if output.status.success() { &output.stdout } else { &output.stderr };
    (output.status.success(), String::from_utf8_lossy(text).into_owned())
}
