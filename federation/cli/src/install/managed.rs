//! Which program manages the objects of a release: Helm knows only its own releases, and GitOps would install again what is removed.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use hanse_kubernetes::answered;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;

use super::Place;
use super::target::{JOIN_SECRET, RELEASE, Target, name_of, pods_of_release};

/// The workloads of all releases.
const LABEL: &str = "app.kubernetes.io/name=hanse";
/// The Lease of the hub's operator, which has no label.
pub const OPERATOR_LEASE: &str = "hanse-hub-operator";
/// Programs that write the status of workloads, or restart them.
const CONTROLLERS: [&str; 2] = ["kube-controller-manager", "kubectl-rollout"];

/// The operator withdraws a policy when the policy is deleted, and not when its definition is. Kinds have full names here: on OpenShift,
/// `mc` is also a MachineConfig.
const REMOVAL_OF_CUSTOM_RESOURCES: [&str; 4] = [
    "if the ClusterSet has custom resources, delete its policies and tiers while the hub runs: `kubectl delete \
     federatednetworkpolicies.hanse.dev,stagedfederatednetworkpolicies.hanse.dev --all`, then `kubectl delete \
     federatednetworksets.hanse.dev,tiers.hanse.dev --all`. Each command waits until its objects are gone; in a tier with requireApproval, \
     deletions wait for approvals",
    "wait until `hanse status` shows that each cluster that still has agents enforces the revision of the hub: a cluster that is removed \
     before keeps the policies that it has received",
    "remove the clusters, which revokes them, and the settings: `kubectl delete clusterjointokens.hanse.dev,memberclusters.hanse.dev --all`, \
     then `kubectl delete clustersets.hanse.dev --all`",
    "when all of these objects are gone, delete the definitions: `kubectl delete --ignore-not-found $(kubectl get crd -o name | grep \
     '\\.hanse\\.dev$')`. If only the definitions are deleted, the policies stay in force in all clusters. Without a hub, the finalizer \
     hanse.dev/operator has to be removed from each object by hand",
];

/// The workloads of a release, and what applied them.
#[derive(Debug)]
pub struct Managed {
    place: Place,
    /// `DaemonSet hanse-agent`, in this order.
    workloads: Vec<String>,
    has_agents: bool,
    has_member: bool,
    has_hub: bool,
    managers: BTreeSet<Manager>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Manager {
    ArgoCd(String),
    /// The object of Flux, with its namespace.
    Flux(String),
    /// Namespace and name of a Helm release.
    Helm(String, String),
    /// An owner of fields, as `metadata.managedFields` names it.
    Other(String),
}

impl std::fmt::Display for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ArgoCd(application) => write!(f, "Argo CD (Application {application})"),
            Self::Flux(object) => write!(f, "Flux ({object})"),
            Self::Helm(namespace, release) => write!(f, "Helm (release {release} of namespace {namespace})"),
            Self::Other(owner) => f.write_str(owner),
        }
    }
}

impl Manager {
    fn of(metadata: &ObjectMeta) -> Vec<Self> {
        let label = |key: &str| metadata.labels.as_ref().and_then(|it| it.get(key)).cloned();
        let annotation = |key: &str| metadata.annotations.as_ref().and_then(|it| it.get(key)).cloned();
        // APPLICATION:GROUP/KIND:NAMESPACE/NAME
        let tracked = annotation("argocd.argoproj.io/tracking-id");
        let tracked = tracked.and_then(|it| it.split(':').next().map(str::to_owned));
        if let Some(application) = tracked.or_else(|| label("argocd.argoproj.io/instance")) {
            return vec![Self::ArgoCd(application)];
        }
        for (kind, group) in
            [("HelmRelease", "helm.toolkit.fluxcd.io"), ("Kustomization", "kustomize.toolkit.fluxcd.io")]
        {
            if let Some(name) = label(&format!("{group}/name")) {
                let namespace = label(&format!("{group}/namespace")).unwrap_or_default();
                return vec![Self::Flux(format!("{kind} {namespace}/{name}"))];
            }
        }
        let release = annotation("meta.helm.sh/release-namespace").zip(annotation("meta.helm.sh/release-name"));
        if let Some((namespace, release)) = release {
            return vec![Self::Helm(namespace, release)];
        }
        let owners = metadata.managed_fields.iter().flatten().filter(|it| it.subresource.is_none());
        let owners = owners.filter_map(|it| it.manager.clone()).filter(|it| !CONTROLLERS.contains(&it.as_str()));
        owners
            .map(|owner| match owner.as_str() {
                // With the tracking by the label app.kubernetes.io/instance.
                "argocd-controller" => Self::ArgoCd(label("app.kubernetes.io/instance").unwrap_or_default()),
                _ => Self::Other(owner),
            })
            .collect()
    }
}

/// All releases of the cluster that have workloads.
pub async fn releases(client: &Client) -> anyhow::Result<Vec<Managed>> {
    let mut found = BTreeMap::<(String, String), Managed>::new();
    add::<StatefulSet>(client, &mut found).await?;
    add::<Deployment>(client, &mut found).await?;
    add::<DaemonSet>(client, &mut found).await?;
    Ok(found.into_values().collect())
}

async fn add<K>(client: &Client, found: &mut BTreeMap<(String, String), Managed>) -> anyhow::Result<()>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let (api, kind): (Api<K>, _) = (Api::all(client.clone()), K::kind(&()));
    let listed = answered(api.list(&ListParams::default().labels(LABEL))).await;
    for object in listed.with_context(|| format!("look for each {kind} of Hanse"))? {
        let (namespace, labels) = (object.namespace().unwrap_or_default(), object.labels());
        // Argo CD may overwrite the latter.
        let release = labels.get(RELEASE).or_else(|| labels.get("app.kubernetes.io/instance"));
        let release = release.cloned().unwrap_or_default();
        let component = labels.get("app.kubernetes.io/component").map_or("", String::as_str);
        let release = found.entry((namespace.clone(), release.clone())).or_insert_with(|| Managed {
            place: Place { namespace, release },
            workloads: Vec::new(),
            has_agents: false,
            has_member: false,
            has_hub: false,
            managers: BTreeSet::new(),
        });
        release.workloads.push(format!("{kind} {}", object.name_any()));
        release.has_agents |= component == "agent";
        release.has_member |= component == "member";
        release.has_hub |= component == "hub";
        release.managers.extend(Manager::of(object.meta()));
    }
    Ok(())
}

/// Why a release without a history cannot be removed, and how it is.
pub fn without_history(releases: &[Managed], place: &Place, target: &Target) -> String {
    let Place { namespace, release } = place;
    let missing = format!("no Helm release {release} in namespace {namespace} of {}", target.title());
    if let Some(found) = releases.iter().find(|it| it.place == *place) {
        return format!("{missing}, but {}. Nothing was removed. {}", found.description(), found.removal());
    }
    let others: Vec<String> = releases.iter().map(Managed::command).collect();
    match others.is_empty() {
        true => format!("{missing}, and no workload of Hanse in any namespace"),
        false => format!("{missing}. Releases of Hanse in this cluster: {}", others.join("; ")),
    }
}

/// Why a Helm release must not be removed by another program than the one that installs it again; `None`: it may be.
pub fn installed_again(releases: &[Managed], place: &Place) -> Option<String> {
    let found = releases.iter().find(|it| it.place == *place)?;
    let by = found.managers.iter().find(|it| matches!(it, Manager::ArgoCd(_) | Manager::Flux(_)))?;
    Some(format!(
        "{by} manages the release {}, and would install it again. Nothing was removed. {}",
        place.release,
        found.removal()
    ))
}

impl Managed {
    fn description(&self) -> String {
        let managers: Vec<String> = self.managers.iter().map(ToString::to_string).collect();
        let by = if managers.is_empty() { "an unknown program".to_owned() } else { managers.join(", ") };
        format!("{}, installed by {by}", self.workloads.join(", "))
    }

    /// How to name the release.
    fn command(&self) -> String {
        let Place { namespace, release } = &self.place;
        format!("--namespace {namespace} --release {release}")
    }

    /// What to do instead.
    fn removal(&self) -> String {
        let Place { namespace, release } = &self.place;
        let elsewhere = self.managers.iter().find_map(|it| match it {
            Manager::Helm(namespace, release) => Some((namespace, release)),
            _ => None,
        });
        match elsewhere {
            Some((of, name)) if (of, name) == (namespace, release) => {
                return "The history of the release, Secrets with the type helm.sh/release.v1, is missing: install the release again with \
                        the same values, and repeat the command."
                    .to_owned();
            }
            Some((of, name)) => {
                return format!("Remove that release: `hanse uninstall --namespace {of} --release {name}`.");
            }
            None => {}
        }
        let name = name_of(&self.place);
        let mut steps = Vec::new();
        if self.has_agents {
            steps.push(format!(
                "set the value agent.cleanup=true of the chart there, apply it, and wait for `kubectl --namespace {namespace} rollout status \
                 daemonset/{name}-agent`: this removes the rules of all nodes"
            ));
        }
        if self.has_hub {
            steps.extend(REMOVAL_OF_CUSTOM_RESOURCES.map(str::to_owned));
        }
        steps.push("delete the objects of the release with that program".to_owned());
        let delete = format!("kubectl --namespace {namespace} delete --ignore-not-found");
        let mut rest = vec![format!("`{delete} secrets,configmaps --selector {RELEASE}={release}`")];
        if self.has_hub {
            rest.push(format!("`{delete} pvc --selector {}`", pods_of_release(&self.place)));
            rest.push(format!("`{delete} lease {OPERATOR_LEASE}`"));
        }
        if self.has_member {
            rest.push(format!("`{delete} lease {name}-member`"));
            rest.push(format!("`{delete} secret {JOIN_SECRET}`"));
        }
        steps.push(format!("delete what it keeps, and what the programs created: {}", rest.join(", ")));
        let steps: Vec<String> =
            steps.iter().enumerate().map(|(index, step)| format!("({}) {step}", index + 1)).collect();
        format!("To remove the release: {}.", steps.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn place() -> Place {
        Place { namespace: "hanse".to_owned(), release: "hanse".to_owned() }
    }

    fn release(metadata: Value) -> Managed {
        let metadata: ObjectMeta = serde_json::from_value(metadata).expect("metadata");
        Managed {
            place: place(),
            workloads: vec!["DaemonSet hanse-agent".to_owned()],
            has_agents: true,
            has_member: true,
            has_hub: true,
            managers: Manager::of(&metadata).into_iter().collect(),
        }
    }

    #[test]
    fn manager_is_known_by_its_marks() {
        let fields = |manager: &str, subresource: Value| json!({"manager": manager, "operation": "Apply", "subresource": subresource});
        for (metadata, named) in [
            (
                json!({"annotations": {"argocd.argoproj.io/tracking-id": "mesh:apps/DaemonSet:hanse/hanse-agent"}}),
                "Argo CD (Application mesh)",
            ),
            (json!({"labels": {"argocd.argoproj.io/instance": "mesh"}}), "Argo CD (Application mesh)"),
            (
                json!({
                    "labels": {"app.kubernetes.io/instance": "hanse"},
                    "managedFields": [fields("argocd-controller", Value::Null)],
                }),
                "Argo CD (Application hanse)",
            ),
            (
                json!({"labels": {"helm.toolkit.fluxcd.io/name": "hanse", "helm.toolkit.fluxcd.io/namespace": "flux"}}),
                "Flux (HelmRelease flux/hanse)",
            ),
            (
                json!({"managedFields": [
                    fields("kubectl-client-side-apply", Value::Null), fields("kube-controller-manager", json!("status")),
                ]}),
                "installed by kubectl-client-side-apply.",
            ),
            (json!({}), "an unknown program"),
        ] {
            let text = without_history(&[release(metadata.clone())], &place(), &Target::default());
            assert!(text.contains(named) && text.contains("Nothing was removed"), "{metadata}: {text}");
            for step in [
                "agent.cleanup=true",
                "kubectl get crd",
                "finalizer hanse.dev/operator",
                "secrets,configmaps --selector chart.hanse.dev/release=hanse`",
                "pvc --selector app.kubernetes.io/name=hanse,app.kubernetes.io/instance=hanse`",
                "lease hanse-member`",
                "lease hanse-hub-operator`",
                "secret hanse-join`",
            ] {
                assert!(text.contains(step), "{step}: {text}");
            }
        }
    }

    /// With its definition, an object is deleted without the policies in force, and a cluster that is removed first keeps them.
    #[test]
    fn objects_are_deleted_before_their_definitions() {
        let text = release(json!({})).removal();
        let order = [
            "kubectl delete federatednetworkpolicies.hanse.dev,stagedfederatednetworkpolicies.hanse.dev --all`",
            "kubectl delete federatednetworksets.hanse.dev,tiers.hanse.dev --all`",
            "`hanse status`",
            "kubectl delete clusterjointokens.hanse.dev,memberclusters.hanse.dev --all`",
            "kubectl delete clustersets.hanse.dev --all`",
            "kubectl delete --ignore-not-found $(kubectl get crd -o name | grep '\\.hanse\\.dev$')`",
            "delete the objects of the release",
        ];
        let found = order.map(|it| text.find(it).unwrap_or_else(|| panic!("{it}: {text}")));
        assert!(found.is_sorted(), "{text}");
        let without_hub = Managed { has_hub: false, ..release(json!({})) }.removal();
        assert!(!without_hub.contains("hanse.dev --all"), "{without_hub}");
    }

    #[test]
    fn other_releases_are_named() {
        let helm = |namespace: &str| {
            release(json!({"annotations": {
                "meta.helm.sh/release-namespace": namespace, "meta.helm.sh/release-name": "hanse",
            }}))
        };
        let text = |place: &Place, found: &[Managed]| without_history(found, place, &Target::default());
        assert!(text(&place(), &[helm("other")]).contains("hanse uninstall --namespace other --release hanse"));
        assert!(text(&place(), &[helm("hanse")]).contains("is missing"));
        let second = Place { namespace: "hanse".to_owned(), release: "second".to_owned() };
        assert!(text(&second, &[helm("hanse")]).contains("--namespace hanse --release hanse"));
        assert!(text(&second, &[]).contains("no workload"));
    }

    #[test]
    fn release_of_gitops_is_not_removed_by_another_program() {
        let flux = release(json!({"labels": {"helm.toolkit.fluxcd.io/name": "hanse"}}));
        assert!(installed_again(&[flux], &place()).is_some_and(|it| it.contains("would install it again")));
        let helm =
            json!({"annotations": {"meta.helm.sh/release-namespace": "hanse", "meta.helm.sh/release-name": "hanse"}});
        assert_eq!(installed_again(&[release(helm)], &place()), None);
    }
}
