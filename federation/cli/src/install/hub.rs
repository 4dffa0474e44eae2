//! `hanse install`: the hub with its operator, in the management cluster.

use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;
use serde_json::json;

use super::helm::Helm;
use super::target::{Target, create_namespace, followed, hub_service, outside_host};
use super::{Settings, block_on, digest};
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
  hanse install --kube-context management --registry registry.example/hanse --hub-digest sha256:…
  hanse install --registry registry.example/hanse --hub-digest sha256:… --set hub.service.type=ClusterIP
  hanse install --registry registry.example/hanse --hub-digest sha256:… --values hub.yaml --dry-run | less")]
pub struct Install {
    #[command(flatten, next_help_heading = "Cluster")]
    target: Target,
    #[command(flatten)]
    settings: Settings,
    /// Digest of the image `hanse-hub`.
    #[arg(long, value_name = "DIGEST", value_parser = digest, help_heading = "Release")]
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
            return output::exit(output::line(helm.install(&values, &settings).await?), false);
        }
        create_namespace(&client, &place.namespace, false).await?;
        let doing = if is_upgrade { "upgrading" } else { "installing" };
        output::note(format_args!("{doing} the hub in namespace {} of {}", place.namespace, target.title()));
        let (installed, pods) = followed(&client, place, helm.install(&values, &settings)).await;
        installed.with_context(|| match pods.as_str() {
            "" => "install the hub".to_owned(),
            pods => format!("install the hub (pods that are ready: {pods})"),
        })?;
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
