//! How a member reaches the API server of its cluster.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use hanse_runtime::retry::Backoff;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::sync::mpsc;

use super::collection::{COLLECTIONS, DEFINITIONS};
use super::follow::chain;
use super::{Report, State};

/// The longest time until the API server accepts a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// The API server of the cluster: that of the pod in which the member runs, or that of a kubeconfig file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// `None`: the service account of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// The context in the file; `None` for its current one.
    pub context: Option<String>,
}

impl Access {
    /// Connects to the API server.
    ///
    /// # Errors
    /// When the configuration cannot be read, or the API server does not answer, or not to this user.
    pub async fn check(&self) -> anyhow::Result<()> {
        let client = self.client().await?;
        let answered = tokio::time::timeout(CONNECT_WITHIN, client.apiserver_version()).await;
        answered.context("no answer")?.map(drop).map_err(|error| anyhow::anyhow!("{}", chain(&error)))
    }

    /// # Errors
    /// When the file, or what it names, cannot be read, or the process does not run in a pod.
    async fn config(&self) -> anyhow::Result<Config> {
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let file = || format!("read {} (--kubeconfig)", path.display());
                let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
                let kubeconfig = Kubeconfig::read_from(path).with_context(file)?;
                Config::from_custom_kubeconfig(kubeconfig, &options).await.with_context(file)?
            }
            None => Config::incluster().context(
                "the service account of the pod: give --kubeconfig where the member does not run in a pod of its cluster",
            )?,
        };
        config.connect_timeout = Some(CONNECT_WITHIN);
        Ok(config)
    }

    async fn client(&self) -> anyhow::Result<Client> {
        Client::try_from(self.config().await?).context("connect to the API server")
    }

    /// A client, as soon as the configuration can be read. `None`: the source has ended.
    pub(super) async fn connect(&self, reports: &mpsc::Sender<Report>) -> Option<Client> {
        let mut backoff = Backoff::default();
        loop {
            let error = match self.client().await {
                Ok(client) => return Some(client),
                Err(error) => format!("{error:#}"),
            };
            for collection in COLLECTIONS.iter().filter(|it| !it.is_custom).chain([&DEFINITIONS]) {
                reports.send(Report::State(*collection, State::Failing(error.clone()))).await.ok()?;
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }
}
