//! A member and its agents as pods of a cluster: with service accounts, roles and nothing else. What `kubectl apply` says becomes
//! verdicts on packets.

use std::time::Instant;

use hanse_e2e::deployment::Deployment;
use hanse_e2e::fabric::Fabric;
use hanse_e2e::kubernetes::{run, until};
use hanse_e2e::probe::Observed;
use hanse_e2e::sandbox;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{Api, DeleteParams};

use super::east::{East, WORKLOADS, world};
use super::nodes::PATIENCE;

/// What the member and the agents need of the cluster, and run with.
const HANSE: &str = "apiVersion: v1
kind: Namespace
metadata: {name: hanse}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: hanse-member, namespace: hanse}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: hanse-agent, namespace: hanse}
automountServiceAccountToken: false
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: hanse-member}
rules:
- {apiGroups: [''], resources: [namespaces, nodes, pods, services, serviceaccounts], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
- {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [list, watch]}
- {apiGroups: [apiextensions.k8s.io], resources: [customresourcedefinitions], verbs: [get, list, watch]}
- {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: hanse-member}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: hanse-member}
subjects: [{kind: ServiceAccount, name: hanse-member, namespace: hanse}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: hanse-member, namespace: hanse}
rules:
- {apiGroups: [''], resources: [configmaps], verbs: [create]}
- {apiGroups: [''], resources: [configmaps], resourceNames: [hanse-authority], verbs: [get, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: hanse-member, namespace: hanse}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: hanse-member}
subjects: [{kind: ServiceAccount, name: hanse-member, namespace: hanse}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: hanse-member, namespace: hanse}
spec:
  replicas: 1
  strategy: {type: Recreate}
  selector: {matchLabels: {app: hanse-member}}
  template:
    metadata: {labels: {app: hanse-member}}
    spec:
      serviceAccountName: hanse-member
      nodeSelector: {kubernetes.io/hostname: a}
      hostNetwork: true
      securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532}
      containers:
      - name: member
        image: hanse-member
        args: [run, --cluster, east, --hub, HUB, --join, JOIN, --token-file, /token/token, --data, /data/member,
               --agent-listen, '172.20.0.1:7500', --enrol-listen, '172.20.0.1:7501', --source, kubernetes,
               --agent-service-account, hanse/hanse-agent, --authority-config-map, hanse/hanse-authority,
               --health-listen, '172.20.0.1:7502']
        securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
        readinessProbe: {httpGet: {path: /readyz, port: 7502}, periodSeconds: 1}
        volumeMounts: [{name: data, mountPath: /data}, {name: token, mountPath: /token, readOnly: true}]
      volumes:
      - {name: data, emptyDir: {}}
      - {name: token, secret: {secretName: hanse-join, defaultMode: 0440}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: hanse-agent, namespace: hanse}
spec:
  selector: {matchLabels: {app: hanse-agent}}
  template:
    metadata: {labels: {app: hanse-agent}}
    spec:
      serviceAccountName: hanse-agent
      automountServiceAccountToken: false
      hostNetwork: true
      tolerations: [{operator: Exists}]
      containers:
      - name: agent
        image: hanse-agent
        args: [run, --node, $(NODE), --member, '172.20.0.1:7500', --enrol, '172.20.0.1:7501', --data, /var/lib/hanse/agent,
               --service-account-token, /var/run/hanse/token, --authority, /etc/hanse/authority.pem]
        env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
        securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW]}}
        volumeMounts:
        - {name: data, mountPath: /var/lib/hanse}
        - {name: token, mountPath: /var/run/hanse, readOnly: true}
        - {name: authority, mountPath: /etc/hanse, readOnly: true}
      volumes:
      - {name: data, hostPath: {path: /var/lib/hanse, type: DirectoryOrCreate}}
      - {name: authority, configMap: {name: hanse-authority}}
      - name: token
        projected: {sources: [{serviceAccountToken: {audience: hanse-member, path: token, expirationSeconds: 3600}}]}
";

fn policy(from: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: web, namespace: default}}\n\
         spec: {{podSelector: {{matchLabels: {{app: web}}}}, policyTypes: [Ingress], ingress: [{from}]}}\n"
    )
}

impl East {
    /// Lets the cluster join, runs its member and agents until these enforce, and the workloads: web and client.
    pub(super) async fn deploy(&self, system: &Deployment<'_>) -> (Vec<Pod>, Vec<Pod>) {
        let token = system.hanse(&["token", "create", "--cluster", "east"]).expect("a token");
        self.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: hanse}\n").await;
        self.apply(&format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: hanse-join, namespace: hanse}}\nstringData: {{token: '{token}'}}\n"
        ))
        .await;
        self.apply(&HANSE.replace("HUB", "169.254.2.1:7443").replace("JOIN", "169.254.2.1:7444")).await;
        self.apply(WORKLOADS).await;
        let start = Instant::now();
        self.ready("hanse", "app=hanse-member", 1).await;
        self.ready("hanse", "app=hanse-agent", 2).await;
        println!("member and agents were ready after {:?}", start.elapsed());
        let pods = (self.ready("default", "app=web", 2).await, self.ready("default", "app=client", 1).await);
        // The agents have enrolled, and enforce: pods that no rule set names are closed, and these are named.
        let enforced = until(PATIENCE, async || {
            let status = system.hanse(&["status", "-o", "json"]).unwrap_or_default();
            let status: serde_json::Value = serde_json::from_str(&status).unwrap_or_default();
            status["items"][0]["agentsCurrent"] == 2
        });
        assert!(enforced.await.is_some(), "{}", system.hanse(&["status"]).unwrap_or_default());
        pods
    }
}

#[test]
fn applied_policies_become_verdicts() {
    sandbox::test("clusters::enforcement::applied_policies_become_verdicts", || {
        let world = world();
        let fabric = Fabric::build(std::slice::from_ref(&world)).expect("the network");
        let scratch = tempfile::tempdir_in("/run").expect("a folder");
        let set_mode = |mode| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(scratch.path(), PermissionsExt::from_mode(mode)).expect("set");
        };
        set_mode(0o755);
        let system = Deployment::start(&fabric, &crate::system::programs(), scratch.path()).expect("a hub");
        fabric.router().enter(|| {
            run(async {
                let mut east = East::start(&world, &fabric, scratch.path()).await;
                let (web, clients) = east.deploy(&system).await;
                let client = &clients[0];
                east.until_observed(client, &web, Observed::Open).await;
                let closed = policy("");
                east.apply(&closed).await;
                println!("closed after {:?}", east.until_observed(client, &web, Observed::Closed).await);
                east.apply(&policy("{from: [{podSelector: {matchLabels: {app: client}}}]}")).await;
                println!("open after {:?}", east.until_observed(client, &web, Observed::Open).await);
                east.apply(&policy("{from: [{podSelector: {matchLabels: {app: other}}}]}")).await;
                east.until_observed(client, &web, Observed::Closed).await;
                // Without the API server, and with a member that starts again meanwhile, verdicts stay.
                east.server.kill().expect("killed");
                assert!(web.iter().all(|to| east.observe(client, to) == Observed::Closed));
                east.server.start_again().await.expect("ready");
                // A new pod of the same kind is judged as the others, and never open before.
                let deployments: Api<k8s_openapi::api::apps::v1::Deployment> =
                    Api::namespaced(east.client.clone(), "default");
                let scale = kube::api::Patch::Merge(serde_json::json!({"spec": {"replicas": 4}}));
                deployments.patch("web", &Default::default(), &scale).await.expect("scaled");
                let more = east.ready("default", "app=web", 4).await;
                assert!(more.iter().all(|to| east.observe(client, to) == Observed::Closed));
                // The policy is deleted.
                let policies: Api<NetworkPolicy> = Api::namespaced(east.client.clone(), "default");
                policies.delete("web", &DeleteParams::default()).await.expect("deleted");
                println!("open after {:?}", east.until_observed(client, &more, Observed::Open).await);
                // A revoked node does not enrol again with the token of its pod.
                let member = &east.ready("hanse", "app=hanse-member", 1).await[0];
                let uid = member.metadata.uid.as_deref().expect("a uid");
                let data = scratch.path().join("volumes").join(uid).join("data/member");
                // As the user of the member, whose files they are.
                let mut revoke = std::process::Command::new("setpriv");
                revoke.args(["--reuid=65532", "--regid=65532", "--clear-groups"]);
                revoke.arg(crate::system::programs().join("hanse-member"));
                let revoked = revoke.args(["node", "revoke", "b", "--data"]).arg(&data).output().expect("it runs");
                assert!(revoked.status.success(), "{revoked:?}");
                let is_refused = until(PATIENCE, async || east.logs().contains("node b was revoked")).await;
                assert!(is_refused.is_some(), "{}", east.logs());
                let status = system.hanse(&["status", "-o", "json"]).expect("the status");
                let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
                assert_eq!(status["items"][0]["agentsCurrent"], 1);
            });
        });
    });
}
