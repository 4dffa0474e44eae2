//! `hanse install`: the hub with its operator, in the management cluster.

use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};

use super::helm::Helm;
use super::progress::{Report, followed};
use super::target::{Target, create_namespace, hub_service, is_balanced, name_of, outside_host, service_of};
use super::{Place, Settings, block_on, check_digest, print};
use crate::output;

/// Install the hub of a ClusterSet, with its operator, in the management cluster; or upgrade it.
///
/// The command carries the Helm chart of its version, and runs `helm` from PATH with the user of the kubeconfig. An upgrade keeps all values
/// that are not given. It also upgrades the definitions of custom resources.
///
/// Members of other clusters connect to the ports 7443 and 7444 of the hub's Service, which is a load balancer by default.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse install --kube-context management --registry $REGISTRY --hub-digest $DIGEST
  hanse install --registry $REGISTRY --hub-digest $DIGEST --set hub.service.type=NodePort
  hanse install --registry $REGISTRY --hub-digest $DIGEST --values hub.yaml --dry-run")]
pub struct Install {
    #[command(flatten, next_help_heading = "Cluster")]
    target: Target,
    #[command(flatten)]
    settings: Settings,
    /// Digest of the image `hanse-hub`.
    #[arg(long, value_name = "DIGEST", help_heading = "Release")]
    hub_digest: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Installed {
    namespace: String,
    release: String,
    /// Host at which other clusters reach the hub; `None`: there is none yet.
    address: Option<String>,
}

impl Install {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        block_on(self.install())
    }

    async fn install(self) -> anyhow::Result<ExitCode> {
        let Self { target, settings, hub_digest } = self;
        check_digest("--hub-digest", &hub_digest)?;
        let place = &settings.place;
        let helm = Helm::new(&target, place).await?;
        let client = target.open().await?;
        let is_upgrade = helm.values().await?.is_some();
        let mut values = json!({
            "image": {"registry": settings.registry},
            "hub": {"enabled": true, "image": {"digest": hub_digest}, "operator": {"enabled": true}},
        });
        // The type may have been changed since.
        if !is_upgrade {
            values["hub"]["service"] = json!({"type": "LoadBalancer"});
        }
        if settings.dry_run {
            return print(&helm.install(&values, &settings).await?);
        }
        create_namespace(&client, &place.namespace, false).await?;
        let doing = if is_upgrade { "upgrading" } else { "installing" };
        output::note(format_args!("{doing} the hub in namespace {} of {}", place.namespace, target.title()));
        let work = helm.install(&values, &settings);
        let (installed, progress) = followed(&client, place, Report::PodsAndWarnings, work).await;
        if let Err(error) = installed {
            let service = hub_service(&client, place).await.ok().flatten();
            let waits = service.is_some_and(|it| is_balanced(&it) && outside_host(&it).is_none());
            let why = match waits {
                true => {
                    " (the Service has no load balancer: without a controller for them, give --set hub.service.type=NodePort or \
                    ClusterIP, and addresses to `hanse join` with --hub and --join)"
                }
                false => "",
            };
            return Err(error.context(format!("install the hub ({}){why}", progress.text())));
        }
        let service = hub_service(&client, place).await?;
        let address = service.as_ref().and_then(outside_host);
        let installed =
            Installed { namespace: place.namespace.clone(), release: place.release.clone(), address: address.clone() };
        output::done(settings.output, &installed, format_args!("the hub runs in namespace {}", place.namespace))?;
        match address {
            Some(address) => {
                output::note(format_args!("other clusters reach it at {address}; next: `hanse join` for each"))
            }
            None => output::note(
                "its Service has no address for other clusters yet: `hanse join` needs one, or --hub and --join with the \
                 addresses at which they reach it",
            ),
        }
        let values = helm.values().await?.unwrap_or_default();
        if let Some(announced) = announced(&values, place) {
            output::note(format_args!(
                "its replicas announce {announced}, which members of other clusters cannot resolve: give each Service {}-hub-NUMBER a name \
                 that they can, and repeat the command with --set 'hub.advertise=$(POD_NAME).hub.example:7443' for names such as these",
                name_of(place)
            ));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What the replicas of the hub announce to members, if only the cluster of the hub can resolve it.
fn announced(values: &Value, place: &Place) -> Option<String> {
    let hub = &values["hub"];
    // A hub with the embedded store announces nothing.
    hub["etcd"]["url"].as_str().filter(|url| !url.is_empty())?;
    let configured = hub["advertise"].as_str().filter(|it| !it.is_empty()).map(str::to_owned);
    let announced = configured.unwrap_or_else(|| format!("$(POD_NAME).{}.svc:7443", place.namespace));
    let host = announced.rsplit_once(':').map_or(announced.as_str(), |(host, _)| host);
    service_of(host).is_some().then_some(announced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announced_name_of_a_service_is_reported() {
        let place = Place { namespace: "hubs".to_owned(), release: "hanse".to_owned() };
        for (hub, expected) in [
            (json!({"etcd": {"url": ""}, "advertise": ""}), None),
            (json!({"etcd": {"url": "etcd://etcd:2379"}, "advertise": ""}), Some("$(POD_NAME).hubs.svc:7443")),
            (json!({"etcd": {"url": "etcd://etcd:2379"}, "advertise": "hub.a.svc:1"}), Some("hub.a.svc:1")),
            (json!({"etcd": {"url": "etcd://etcd:2379"}, "advertise": "$(POD_NAME).hub.example:7443"}), None),
        ] {
            assert_eq!(announced(&json!({"hub": hub}), &place).as_deref(), expected, "{hub}");
        }
    }
}
