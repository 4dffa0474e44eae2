//! `hanse install`: the hub with its operator, in the management cluster.

use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use super::helm::Helm;
use super::target::{Target, create_namespace, followed, hub_service, is_balanced, outside_host};
use super::{Settings, block_on, check_digest, print};
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
        let (installed, pods) = followed(&client, place, helm.install(&values, &settings)).await;
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
            return Err(error.context(format!("install the hub; ready: {pods}{why}")));
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
        Ok(ExitCode::SUCCESS)
    }
}
