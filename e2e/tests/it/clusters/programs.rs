//! Pods whose programs run as processes: with what their specs give them, and nothing else.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use hanse_e2e::kubernetes::kubelet::Programs;
use hanse_e2e::kubernetes::{Kubelet, until};
use hanse_e2e::sandbox::{self, Privilege};
use kube::api::DeleteParams;

use super::nodes::{self, PATIENCE, is_ready};

/// Prints what a program sees.
const FACTS: &str = r#"#!/bin/sh
echo "arguments: $*"
echo "user: $(id -u):$(id -g) groups: $(id -G)"
grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status
echo "variables: $POD@$NODE $ADDRESS $KEY $FROM_MAP $ABSENT. host: $KUBERNETES_SERVICE_HOST home: $HOME"
echo "map: $(cat /etc/settings/level) secret: $(cat /secret/here/key) $(stat -Lc %a:%g /secret/here/key)"
for it in token ca.crt namespace; do test -s /var/run/secrets/kubernetes.io/serviceaccount/$it && echo "account: $it"; done
for it in /x /etc/x /secret/x /proc/sys/net/ipv4/ip_forward /scratch/x /node/x /tmp/x; do
  if (echo 1 >$it) 2>/dev/null; then echo "can write: $it"; fi
done
test -e /root || echo "the machine's files are not there"
exit "$1"
"#;

const OBJECTS: &str = "apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {level: debug, from-map: m}
---
apiVersion: v1
kind: Secret
metadata: {name: secret}
stringData: {key: s3cr3t}
---
apiVersion: v1
kind: Pod
metadata: {name: least, labels: {app: least}}
spec:
  nodeName: c
  restartPolicy: Never
  securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 2000}
  containers:
  - name: facts
    image: registry.example/facts:v1@sha256:0000
    args: ['0', '--node=$(NODE)', $$(NODE)]
    env:
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: ADDRESS, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: KEY, valueFrom: {secretKeyRef: {name: secret, key: key}}}
    - {name: FROM_MAP, valueFrom: {configMapKeyRef: {name: settings, key: from-map}}}
    - {name: ABSENT, valueFrom: {secretKeyRef: {name: absent, key: key, optional: true}}}
    securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts:
    - {name: settings, mountPath: /etc/settings}
    - {name: secret, mountPath: /secret/here, readOnly: true}
    - {name: scratch, mountPath: /scratch}
    - {name: node, mountPath: /node, readOnly: true}
  volumes:
  - {name: settings, configMap: {name: settings}}
  - {name: secret, secret: {secretName: secret, defaultMode: 0400}}
  - {name: scratch, emptyDir: {}}
  - {name: node, hostPath: {path: /var/lib/x, type: DirectoryOrCreate}}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, labels: {app: agent}}
spec:
  nodeName: c
  hostNetwork: true
  restartPolicy: Never
  containers:
  - name: facts
    image: any
    command: [/usr/bin/facts, '3']
    securityContext: {capabilities: {drop: [ALL], add: [NET_ADMIN]}}
    volumeMounts: [{name: node, mountPath: /node}, {name: secret, mountPath: /secret/here}]
  volumes:
  - {name: node, hostPath: {path: /var/lib/x, type: DirectoryOrCreate}}
  - {name: secret, secret: {secretName: secret}}
";

const HUB: &str = "apiVersion: v1
kind: Pod
metadata: {name: hub, labels: {app: hub}}
spec:
  nodeName: d
  securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532}
  initContainers:
  - name: init
    image: hanse-hub
    args: [init, --data, /data/hub, --listen, '$(ADDRESS):7443', --join-listen, '$(ADDRESS):7444']
    env: &env [{name: ADDRESS, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    securityContext: &least {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts: &mounts [{name: data, mountPath: /data}]
  containers:
  - name: hub
    image: hanse-hub
    args: [run, --data, /data/hub, --listen, '$(ADDRESS):7443', --join-listen, '$(ADDRESS):7444', --health-listen, '$(ADDRESS):8080']
    env: *env
    securityContext: *least
    volumeMounts: *mounts
    ports: [{name: health, containerPort: 8080}]
    startupProbe: {httpGet: {path: /healthz, port: health}, periodSeconds: 1, failureThreshold: 60}
    readinessProbe: {httpGet: {path: PATH, port: health}, periodSeconds: 1}
    livenessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
  volumes: [{name: data, emptyDir: {}}]
";

fn node(name: &str, number: u8) -> hanse_e2e::world::Node {
    hanse_e2e::world::Node {
        name: name.to_owned(),
        addresses: vec![[172, 20, 0, number].into()],
        pod_ranges: vec![format!("10.20.{number}.0/24").parse().expect("a range")],
    }
}

async fn start_node(east: &mut nodes::East, fabric: &hanse_e2e::fabric::Fabric, name: &str, programs: &Programs) {
    let network = fabric.shared_node("east", name).expect("it is built");
    let node = node(name, if name == "c" { 3 } else { 4 });
    let programs = Arc::new(programs.clone());
    let started = Kubelet::start_with(&east.server, network, (&node).into(), programs).await;
    east.kubelets.insert(name.to_owned(), started.expect("it registers"));
}

async fn ended(east: &nodes::East, name: &str) -> (String, i32) {
    let mut end = None;
    let ended = until(PATIENCE, async || {
        let pod = east.pods.get(name).await.expect("it exists");
        let status = pod.status.as_ref();
        let terminated =
            status.and_then(|it| it.container_statuses.as_ref()?.first()?.state.as_ref()?.terminated.clone());
        let phase = status.and_then(|status| status.phase.clone());
        end = terminated.zip(phase).map(|(it, phase)| (phase, it.exit_code));
        end.is_some()
    });
    assert!(ended.await.is_some(), "{name} ends: {:#?}", east.pods.get(name).await);
    end.expect("it ended")
}

#[test]
fn programs_get_what_their_pods_say() {
    let with = vec![node("c", 3), node("d", 4)];
    nodes::test_with("programs::programs_get_what_their_pods_say", with, async |_, fabric, east| {
        let scratch = tempfile::tempdir().expect("a folder");
        let programs = scratch.path().join("programs");
        std::fs::create_dir(&programs).expect("a folder");
        std::fs::write(programs.join("facts"), FACTS).expect("a program");
        std::fs::set_permissions(programs.join("facts"), PermissionsExt::from_mode(0o755)).expect("it can be run");
        std::fs::set_permissions(scratch.path(), PermissionsExt::from_mode(0o755)).expect("every user may enter");
        let facts = Programs::new(&programs, scratch.path());
        start_node(east, fabric, "c", &facts).await;
        east.apply(OBJECTS).await;

        assert_eq!(ended(east, "least").await, ("Succeeded".to_owned(), 0));
        let address = nodes::addresses(&east.pods.get("least").await.expect("it exists"))[0];
        let expected = format!(
            "arguments: 0 --node=c $(NODE)
user: 65532:65532 groups: 65532 2000
CapEff:\t0000000000000000
CapBnd:\t0000000000000000
NoNewPrivs:\t1
variables: least@c {address} s3cr3t m . host: 127.0.0.1 home: 
map: debug secret: s3cr3t 440:2000
account: token
account: ca.crt
account: namespace
can write: /scratch/x
the machine's files are not there
"
        );
        // A user namespace has its root only.
        let is_root = sandbox::privilege() == Some(Privilege::Root);
        let log = facts.log("default", "least", "facts");
        let lines = |text: &str| -> Vec<String> {
            let is_user = |line: &str| line.starts_with("user: ") || line.starts_with("map: ");
            text.lines().filter(|line| is_root || !is_user(line)).map(str::to_owned).collect()
        };
        assert_eq!(lines(&log), lines(&expected));

        // Root without other capabilities than its own, on the node's network and with the node's folder.
        assert_eq!(ended(east, "agent").await, ("Failed".to_owned(), 3));
        let log = facts.log("default", "agent", "facts");
        assert!(log.contains("arguments: 3\nuser: 0:0 groups: 0"), "{log}");
        let net_admin = format!("{:016x}", 1u64 << 12);
        assert!(log.contains(&format!("CapEff:\t{net_admin}\nCapBnd:\t{net_admin}\nNoNewPrivs:\t0\n")), "{log}");
        let writable: Vec<&str> = log.lines().filter_map(|line| line.strip_prefix("can write: ")).collect();
        assert_eq!(writable, ["/x", "/etc/x", "/secret/x", "/node/x", "/tmp/x"], "{log}");
        assert!(facts.host_path("c", "/var/lib/x/x").is_file() && !Path::new("/var/lib/x").exists());

        // A program of the project, made ready by its probes, starts again when it is killed.
        let hub = Programs::new(&crate::system::programs(), scratch.path());
        start_node(east, fabric, "d", &hub).await;
        east.apply(&HUB.replace("PATH", "/readyz")).await;
        let ready = until(PATIENCE, async || east.pods.get("hub").await.is_ok_and(|pod| is_ready(&pod))).await;
        assert!(ready.is_some(), "{:#?}\n{}", east.pods.get("hub").await, hub.log("default", "hub", "hub"));
        assert!(hub.log("default", "hub", "hub").contains("hub is serving"));
        east.pods.delete("hub", &DeleteParams::default()).await.expect("it is deleted");
        let gone = until(PATIENCE, async || east.pods.get_opt("hub").await.is_ok_and(|it| it.is_none())).await;
        assert!(gone.is_some(), "it ends when it is requested to: {}", hub.log("default", "hub", "hub"));
        assert!(hub.log("default", "hub", "hub").contains("stop"), "{}", hub.log("default", "hub", "hub"));

        // One whose readiness probe fails is not ready.
        east.apply(&HUB.replace("PATH", "/absent")).await;
        let runs = async || hub.log("default", "hub", "hub").matches("hub is serving").count() == 2;
        assert!(until(PATIENCE, runs).await.is_some());
        let network = east.kubelets["d"].pod("default", "hub").expect("it runs");
        let address = nodes::addresses(&east.pods.get("hub").await.expect("it exists"))[0];
        let answers = || hanse_e2e::probe::http_ok(&network, (address, 8080).into(), "/readyz");
        assert!(until(PATIENCE, async || answers()).await.is_some(), "the program itself is ready");
        assert!(!is_ready(&east.pods.get("hub").await.expect("it exists")));
    });
}
