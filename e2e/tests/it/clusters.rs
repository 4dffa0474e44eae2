//! The test clusters themselves: what other tests build on.

use std::time::{Duration, Instant};

use hanse_e2e::kubernetes::crds::{self, Calico};
use hanse_e2e::kubernetes::{ApiServer, Controllers, Etcd, Options, kubeconfig, manifests, run, until};
use hanse_e2e::{namespace, sandbox};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::Error;
use kube::api::{Api, ListParams, WatchParams};
use serde_json::Value;

pub mod east;
mod enforcement;
pub mod nodes;
mod operated;
mod programs;

const PATIENCE: Duration = Duration::from_secs(60);

fn config_map(name: &str) -> String {
    format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{key: value}}\n")
}

fn status(result: Result<impl std::fmt::Debug, Error>) -> u16 {
    match result {
        Err(Error::Api(status)) => status.code,
        other => panic!("the server refuses it: {other:?}"),
    }
}

/// The resident memory in MB.
fn memory(process: Option<&hanse_e2e::process::Process>) -> u64 {
    process.expect("it is running").memory().expect("it has memory") / 1_000_000
}

#[test]
fn api_servers_share_an_etcd_and_nothing_else() {
    run(async {
        let start = Instant::now();
        let etcd = Etcd::start().expect("etcd starts");
        let etcd_time = start.elapsed();
        let (north, south) = tokio::join!(
            ApiServer::start(&etcd, Options::new("north")),
            ApiServer::start(&etcd, Options::new("south"))
        );
        let (north, south) = (north.expect("it is ready"), south.expect("it is ready"));
        let servers_time = start.elapsed();
        let controllers = tokio::join!(Controllers::start(&north), Controllers::start(&south));
        let (manager, mut other) = (controllers.0.expect("they work"), controllers.1.expect("they work"));
        other.start_scheduler(&south).expect("it starts");
        println!(
            "etcd {etcd_time:?}, two API servers {servers_time:?}, their controllers {:?}; API servers {} and {} MB, \
             controllers {} and {} MB",
            start.elapsed(),
            memory(north.process()),
            memory(south.process()),
            memory(Some(manager.manager())),
            memory(Some(other.manager())),
        );

        // What one stores, the other does not have; and neither accepts the other's administrator.
        let (north_client, south_client) =
            (north.client().await.expect("a client"), south.client().await.expect("a client"));
        manifests::apply(&north_client, "test", &config_map("only-north")).await.expect("it is applied");
        let maps = |client: &kube::Client| Api::<ConfigMap>::default_namespaced(client.clone());
        assert!(maps(&north_client).get("only-north").await.is_ok());
        assert_eq!(status(maps(&south_client).get("only-north").await), 404);
        let stranger = north.user("admin", &["system:masters"]).expect("a kubeconfig");
        let mut stranger: Value = stranger;
        stranger["clusters"][0]["cluster"]["server"] = south.url().into();
        stranger["clusters"][0]["cluster"]["certificate-authority-data"] =
            south.user("x", &[]).expect("a kubeconfig")["clusters"][0]["cluster"]["certificate-authority-data"].clone();
        let stranger = kubeconfig::client(&stranger).await.expect("a client");
        assert_eq!(status(maps(&stranger).list(&ListParams::default()).await), 401);

        // Health needs no credentials, everything else does.
        let mut anonymous = south.user("x", &[]).expect("a kubeconfig");
        anonymous["users"][0]["user"] = serde_json::json!({});
        let anonymous = kubeconfig::client(&anonymous).await.expect("a client");
        let ready = kube::core::Request::new("/readyz").list(&ListParams::default()).expect("a request");
        assert_eq!(anonymous.request_text(ready).await.expect("it answers"), "ok");
        assert_eq!(status(maps(&anonymous).list(&ListParams::default()).await), 401);

        // A service account without rights is refused by name; a role gives it what it says, and no more.
        let account = south.service_account("default", "default").await.expect("a token");
        let account = kubeconfig::client(&account).await.expect("a client");
        assert_eq!(status(maps(&account).list(&ListParams::default()).await), 403);
        let role = "apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader, namespace: default}
rules: [{apiGroups: [''], resources: [configmaps], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: Group, name: readers}, {kind: ServiceAccount, name: default, namespace: default}]
";
        manifests::apply(&south_client, "test", role).await.expect("it is applied");
        let allowed = until(PATIENCE, async || maps(&account).list(&ListParams::default()).await.is_ok()).await;
        assert!(allowed.is_some(), "the role takes effect");
        assert_eq!(status(maps(&account).delete("kube-root-ca.crt", &Default::default()).await), 403);
        // Both groups of a certificate count.
        let user = south.user("jane", &["others", "readers"]).expect("a kubeconfig");
        let user = kubeconfig::client(&user).await.expect("a client");
        assert!(maps(&user).list(&ListParams::default()).await.is_ok());

        // Each has its own audit log, which has the refusals too.
        let refused = |event: &Value| {
            event["user"]["username"] == "system:serviceaccount:default:default"
                && event["responseStatus"]["code"] == 403
        };
        assert!(south.audit().expect("it is written").iter().any(refused));
        assert!(!north.audit().expect("it is written").iter().any(refused));
        let applied = |event: &Value| event["verb"] == "patch" && event["objectRef"]["name"] == "only-north";
        assert!(north.audit().expect("it is written").iter().any(applied));

        // The controllers work: a namespace that is deleted goes, which needs the namespace controller.
        let namespaces: Api<Namespace> = Api::all(south_client.clone());
        manifests::apply(&south_client, "test", "apiVersion: v1\nkind: Namespace\nmetadata: {name: gone}\n")
            .await
            .expect("it is applied");
        namespaces.delete("gone", &Default::default()).await.expect("it is deleted");
        let gone = until(PATIENCE, async || namespaces.get_opt("gone").await.is_ok_and(|it| it.is_none())).await;
        assert!(gone.is_some(), "the namespace goes");
    });
}

#[test]
fn an_api_server_keeps_its_objects_and_its_address_across_restarts() {
    run(async {
        let etcd = Etcd::start().expect("etcd starts");
        let mut server = ApiServer::start(&etcd, Options::new("restarts")).await.expect("it is ready");
        let (client, address) = (server.client().await.expect("a client"), server.address());
        let applied = manifests::apply(&client, "test", &config_map("kept")).await.expect("it is applied");
        let old = applied[0].metadata.resource_version.clone().expect("a version");
        server.stop().expect("it stops");
        etcd.kill().expect("it is killed");
        etcd.start_again().expect("it starts again");
        let start = Instant::now();
        server.start_again().await.expect("it is ready again");
        println!("a restart: {:?}", start.elapsed());
        assert_eq!(server.address(), address);
        // A client of before the restart goes on.
        let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
        assert_eq!(maps.get("kept").await.expect("it is kept").data.expect("data")["key"], "value");

        // After a compaction and a restart, an old watch cannot be resumed.
        manifests::apply(&client, "test", &config_map("later")).await.expect("it is applied");
        assert!(etcd.compact().expect("it compacts") > 0);
        server.kill().expect("it is killed");
        server.start_again().await.expect("it is ready again");
        let watch = async || {
            use futures::{StreamExt as _, TryStreamExt as _};
            let stream = maps.watch(&WatchParams::default(), &old).await;
            match stream {
                Ok(stream) => stream.boxed().try_next().await,
                Err(error) => Err(error),
            }
        };
        match watch().await {
            Ok(Some(kube::api::WatchEvent::Error(status))) => assert_eq!(status.code, 410),
            other => assert_eq!(status(other), 410),
        }
    });
}

#[test]
fn an_api_server_in_one_namespace_serves_clients_in_others() {
    sandbox::test("clusters::an_api_server_in_one_namespace_serves_clients_in_others", || {
        let far = namespace::Namespace::create("far").expect("a namespace");
        let near = namespace::Namespace::create("near").expect("a namespace");
        near.batch(
            "link add eth0 type veth peer name eth0 netns far\nlink set eth0 up\naddr add 169.254.9.1/24 dev eth0\n",
        )
        .expect("a link");
        far.batch("link set eth0 up\naddr add 169.254.9.2/24 dev eth0\n").expect("a link");
        let etcd = Etcd::start().expect("etcd starts");
        let options = Options::new("far").listen([169, 254, 9, 2].into());
        let server = far.enter(|| run(ApiServer::start(&etcd, options))).expect("it is ready");
        let list = async || {
            let client = server.client().await.expect("a client");
            Api::<ConfigMap>::default_namespaced(client).list(&ListParams::default()).await
        };
        assert!(near.enter(|| run(list())).is_ok());
        // From here no route leads there.
        assert!(
            run(async { tokio::time::timeout(Duration::from_secs(5), list()).await }).map_or(true, |it| it.is_err())
        );
    });
}

#[test]
fn policies_of_other_projects_can_be_stored() {
    run(async {
        let etcd = Etcd::start().expect("etcd starts");
        let server = ApiServer::start(&etcd, Options::new("policies")).await.expect("it is ready");
        let client = server.client().await.expect("a client");
        for calico in [Calico::V3, Calico::Stored] {
            manifests::apply(&client, "test", &calico.definitions()).await.expect("they are established");
        }
        manifests::apply(&client, "test", &crds::cluster_network_policies().expect("its project publishes it"))
            .await
            .expect("it is established");
        // Every kind that is read, with a field that no version knows, is stored as it is written.
        let kinds = ["NetworkPolicy", "StagedNetworkPolicy", "StagedKubernetesNetworkPolicy", "NetworkSet"];
        let global = ["Tier", "GlobalNetworkPolicy", "StagedGlobalNetworkPolicy", "GlobalNetworkSet"];
        for kind in kinds.into_iter().chain(global) {
            for version in ["projectcalico.org/v3", "crd.projectcalico.org/v1"] {
                let text = format!(
                    "apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}\nspec: {{order: 1.5, new: [a]}}"
                );
                let stored = manifests::apply(&client, "test", &text).await.expect("it is stored");
                assert_eq!(stored[0].data["spec"], serde_json::json!({ "order": 1.5, "new": ["a"] }));
                assert_eq!(stored[0].metadata.namespace.is_some(), kinds.contains(&kind));
            }
        }
        let policy = |priority: i64| {
            format!(
                "apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {{name: x}}
spec:
  tier: Admin
  priority: {priority}
  subject: {{namespaces: {{}}}}
  ingress: [{{action: Deny, from: [{{namespaces: {{}}}}]}}]
"
            )
        };
        manifests::apply(&client, "test", &policy(10)).await.expect("it is stored");
        let error = manifests::apply(&client, "test", &policy(-1)).await.expect_err("it is validated");
        assert!(format!("{error:#}").contains("spec.priority"), "{error:#}");
    });
}
