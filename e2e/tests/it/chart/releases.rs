//! Releases on a real API server: they are installed, upgraded, rolled back and removed, and what they leave behind.

use std::collections::BTreeSet;
use std::process::Command;

use hanse_e2e::kubernetes::{ApiServer, Controllers, Etcd, Options, manifests, run, until};
use serde_json::{Value, json};

use super::{NAMESPACE, PATIENCE, STATE, chart, complete, output, set, state, success, template, text, value_sets};

/// Where an object of Prometheus' operator, of cert-manager, or of OpenShift may be stored.
const DEFINITION: &str = "apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: PLURAL.GROUP}
spec:
  group: GROUP
  names: {kind: KIND, plural: PLURAL}
  scope: SCOPE
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
";

/// Kind, namespace and name of every object of the server that does not come and go by itself.
fn everything(server: &ApiServer) -> BTreeSet<String> {
    let mut kinds = server.kubectl().expect("kubectl");
    let kinds = success(kinds.args(["api-resources", "--verbs=list", "-o", "name"]), "");
    let transient = ["events", "events.events.k8s.io", "leases.coordination.k8s.io", "componentstatuses"];
    let kinds: Vec<&str> = kinds.lines().filter(|it| !transient.contains(it)).collect();
    let mut get = server.kubectl().expect("kubectl");
    get.args(["get", &kinds.join(","), "--all-namespaces", "--no-headers", "-o"]);
    get.arg("custom-columns=K:.kind,NS:.metadata.namespace,N:.metadata.name");
    let listed = success(&mut get, "");
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    listed.lines().map(words).filter(|it| !it.starts_with("APIService ")).collect()
}

pub(super) struct Release<'a> {
    pub(super) server: &'a ApiServer,
}

impl Release<'_> {
    pub(super) fn helm(&self, arguments: &[&str], values: Option<&Value>) -> String {
        let mut command = self.server.helm().expect("Helm");
        command.args(arguments).args(["--namespace", NAMESPACE]);
        let mut input = String::new();
        if let Some(values) = values {
            command.arg(chart()).args(["--values", "-"]);
            input = values.to_string();
        }
        success(&mut command, &input)
    }

    pub(super) fn get(&self, object: &str, path: &str) -> String {
        let mut command = self.server.kubectl().expect("kubectl");
        command.args(["--namespace", NAMESPACE, "get", object, "-o", &format!("jsonpath={path}")]);
        success(&mut command, "")
    }

    /// Waits until the objects of the server are those of before, and these.
    async fn until_left(&self, before: &BTreeSet<String>, left: &[&str]) {
        let mut more = BTreeSet::new();
        let expected: BTreeSet<String> = left.iter().map(|it| (*it).to_owned()).collect();
        let done = until(PATIENCE, async || {
            more = everything(self.server).difference(before).cloned().collect();
            more == expected
        });
        assert!(done.await.is_some(), "left behind: {more:#?}, expected: {expected:#?}");
    }
}

/// A release whose member has its state in a claim, as in earlier versions of the chart, is not upgraded as if it had none.
fn refuses_state_in_a_claim(server: &ApiServer, release: &Release<'_>, values: &Value) {
    let kubectl = |arguments: &[&str], input: &str| {
        let mut command = server.kubectl().expect("kubectl");
        success(command.args(["--namespace", NAMESPACE]).args(arguments), input);
    };
    let claim = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: hanse-member}\n\
                 spec: {accessModes: [ReadWriteOnce], storageClassName: '', resources: {requests: {storage: 1Gi}}}\n";
    kubectl(&["apply", "-f", "-"], claim);
    release.helm(&["upgrade", "hanse"], Some(values));
    kubectl(&["patch", "secret", "hanse-member", "--type=merge", "-p", r#"{"data":null}"#], "");
    let mut command = server.helm().expect("Helm");
    command.args(["upgrade", "hanse", "--namespace", NAMESPACE]).arg(chart()).args(["--values", "-"]);
    let refused = output(&mut command, &values.to_string());
    let message = text(&refused.stderr);
    assert!(!refused.status.success() && message.contains("member.cache.claim=hanse-member"), "{message}");
    let moving =
        set(set(values.clone(), "member.cache", json!({"claim": "hanse-member"})), "member.replicas", json!(1));
    release.helm(&["upgrade", "hanse"], Some(&moving));
    let volume = release.get("deployment/hanse-member", "{.spec.template.spec.volumes[?(@.name==\"data\")]}");
    assert!(volume.contains(r#""claimName":"hanse-member""#), "{volume}");
    kubectl(&["delete", "persistentvolumeclaim", "hanse-member", "--wait=false"], "");
}

/// To an earlier chart, and back: no field that cannot be changed differs. The Lease of the member was an object of the release then, so that the
/// one that the member created has to be gone.
fn rolls_back_to_an_earlier_chart(server: &ApiServer, release: &Release<'_>) {
    let folder = tempfile::tempdir().expect("a folder");
    let older = folder.path().join("chart");
    success(Command::new("cp").arg("-a").arg(chart()).arg(&older), "");
    let lease = "apiVersion: coordination.k8s.io/v1\nkind: Lease\nmetadata: {name: hanse-member, namespace: hanse}\n";
    std::fs::write(older.join("templates/lease.yaml"), lease).expect("written");
    let helpers = std::fs::read_to_string(older.join("templates/_helpers.tpl")).expect("it is read");
    let without = helpers.replace("chart.hanse.dev/release: {{ .root.Release.Name }}\n", "");
    assert_ne!(without, helpers, "earlier charts did not have the label");
    std::fs::write(older.join("templates/_helpers.tpl"), without).expect("written");
    let helm = |arguments: &[&str], input: &str| {
        output(server.helm().expect("Helm").args(arguments).args(["--namespace", NAMESPACE]), input)
    };
    let kubectl = |arguments: &[&str], input: &str| success(server.kubectl().expect("kubectl").args(arguments), input);
    let path = older.to_str().expect("UTF-8");
    let upgraded = helm(&["upgrade", "hanse", path, "--values", "-", "--output", "json"], &complete().to_string());
    let status: Value = serde_json::from_slice(&upgraded.stdout).expect("the release");
    let revision = status["version"].to_string();
    // Helm removes the Lease, and the member creates it.
    let label = r"{.metadata.labels.chart\.hanse\.dev/release}";
    assert_eq!(release.get("service/hanse-hub", label), "");
    release.helm(&["upgrade", "hanse"], Some(&complete()));
    assert_eq!(release.get("service/hanse-hub", label), "hanse");
    let leases = ["--namespace", NAMESPACE, "get", "leases", "-o", "name"];
    assert!(!kubectl(&leases, "").contains("hanse-member"));
    kubectl(&["create", "-f", "-"], lease);
    let refused = helm(&["rollback", "hanse", &revision], "");
    let message = text(&refused.stderr);
    assert!(!refused.status.success() && message.contains("Lease") && message.contains("hanse-member"), "{message}");
    kubectl(&["--namespace", NAMESPACE, "delete", "lease", "hanse-member"], "");
    release.helm(&["rollback", "hanse", &revision], None);
    assert!(kubectl(&leases, "").contains("hanse-member"), "it is that of the chart");
    assert_eq!(release.get("service/hanse-hub", label), "");
    release.helm(&["upgrade", "hanse"], Some(&complete()));
}

#[test]
fn releases_come_and_go_on_a_real_api_server() {
    run(async {
        let etcd = Etcd::start().expect("etcd starts");
        let server = ApiServer::start(&etcd, Options::new("chart")).await.expect("it is ready");
        let _controllers = Controllers::start(&server).await.expect("they work");
        let client = server.client().await.expect("a client");
        let monitoring = "monitoring.coreos.com";
        for (kind, plural, group, scope) in [
            ("ServiceMonitor", "servicemonitors", monitoring, "Namespaced"),
            ("PrometheusRule", "prometheusrules", monitoring, "Namespaced"),
            ("Certificate", "certificates", "cert-manager.io", "Namespaced"),
            ("SecurityContextConstraints", "securitycontextconstraints", "security.openshift.io", "Cluster"),
        ] {
            let definition = DEFINITION.replace("KIND", kind).replace("PLURAL", plural).replace("GROUP", group);
            let definition = definition.replace("SCOPE", scope);
            manifests::apply(&client, "test", &definition).await.expect("it is established");
        }
        let namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n");
        manifests::apply(&client, "test", &namespace).await.expect("it is applied");
        let ready = until(PATIENCE, async || {
            let all = everything(&server);
            all.contains(&format!("ServiceAccount {NAMESPACE} default"))
                && all.contains(&format!("ConfigMap {NAMESPACE} kube-root-ca.crt"))
        });
        assert!(ready.await.is_some(), "{:#?}", everything(&server));

        for (name, values) in value_sets() {
            let rendered = success(&mut template(&values), "");
            let mut apply = server.kubectl().expect("kubectl");
            // Each object names its namespace: the operator's Events are in another one.
            apply.args(["apply", "--dry-run=server", "--validate=strict", "-f", "-"]);
            let applied = success(&mut apply, &rendered);
            println!("{name}: {} objects", applied.lines().count());
        }
        state::is_not_overwritten(&server).await;
        let gone = until(PATIENCE, async || !everything(&server).contains("Secret state m"));
        assert!(gone.await.is_some(), "the namespace of the test is gone");
        let before = everything(&server);

        let release = Release { server: &server };
        let notes = release.helm(&["install", "hanse"], Some(&complete()));
        assert!(notes.contains("secret generic hanse-join") && notes.contains("member of cluster east"), "{notes}");
        let created =
            until(PATIENCE, async || everything(&server).contains("PersistentVolumeClaim hanse data-hanse-hub-0"));
        assert!(created.await.is_some(), "the claim of the hub is created");
        // The member writes this at run time: neither upgrade nor rollback removes it.
        let mut patch = server.kubectl().expect("kubectl");
        let authority = r#"{"data":{"authority.pem":"PEM"}}"#;
        patch.args([
            "--namespace",
            NAMESPACE,
            "patch",
            "configmap",
            "hanse-authority",
            "--type=merge",
            "-p",
            authority,
        ]);
        success(&mut patch, "");
        // Likewise the state.
        let state = r#"{"data":{"member.pem":"UEVN"}}"#;
        let mut patch = server.kubectl().expect("kubectl");
        patch.args(["--namespace", NAMESPACE, "patch", "secret", "hanse-member", "--type=merge", "-p", state]);
        success(&mut patch, "");
        let memory = "{.spec.template.spec.containers[0].resources.limits.memory}";
        assert_eq!(release.get("deployment/hanse-member", memory), "1Gi");
        let upgraded = set(complete(), "member.resources", json!({"limits": {"memory": "2Gi"}}));
        let upgraded = set(upgraded, "agent.enabled", json!(false));
        release.helm(&["upgrade", "hanse"], Some(&upgraded));
        assert_eq!(release.get("deployment/hanse-member", memory), "2Gi");
        assert!(!everything(&server).contains("DaemonSet hanse hanse-agent"));
        release.helm(&["rollback", "hanse", "1"], None);
        assert_eq!(release.get("deployment/hanse-member", memory), "1Gi");
        assert!(everything(&server).contains("DaemonSet hanse hanse-agent"));
        assert_eq!(release.get("configmap/hanse-authority", "{.data.authority\\.pem}"), "PEM");
        assert_eq!(release.get("secret/hanse-member", "{.data.member\\.pem}"), "UEVN");

        rolls_back_to_an_earlier_chart(&server, &release);

        // Keys and state stay by default, and the next release takes them over.
        release.helm(&["uninstall", "hanse"], None);
        let secrets = STATE.iter().map(|name| format!("Secret hanse {name}"));
        let kept: Vec<String> = secrets.chain(["PersistentVolumeClaim hanse data-hanse-hub-0".to_owned()]).collect();
        let kept: Vec<&str> = kept.iter().map(String::as_str).collect();
        release.until_left(&before, &kept).await;
        let delete = json!({"whenDeleted": "Delete"});
        let values = set(set(complete(), "hub.persistence", delete.clone()), "member.state", delete);
        release.helm(&["install", "hanse"], Some(&values));
        assert_eq!(release.get("secret/hanse-member", "{.data.member\\.pem}"), "UEVN", "the keys are taken over");
        refuses_state_in_a_claim(&server, &release, &values);
        let owned = until(PATIENCE, async || {
            let owner = release.get("persistentvolumeclaim/data-hanse-hub-0", "{.metadata.ownerReferences[0].kind}");
            owner == "StatefulSet"
        });
        assert!(owned.await.is_some(), "the claim is deleted with the StatefulSet");
        release.helm(&["uninstall", "hanse"], None);
        release.until_left(&before, &[]).await;
    });
}
