//! kube-controller-manager and kube-scheduler of a test cluster.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use kube::api::Api;

use super::server::ApiServer;
use super::{programs, until};
use crate::process::Process;

/// How long controllers may take to work. With an idle machine they take some three seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// The controllers of one cluster, and its scheduler where one was started; dropped, they are killed.
#[derive(Debug)]
pub struct Controllers {
    manager: Process,
    scheduler: Option<Process>,
}

impl Controllers {
    /// Starts every controller, and waits until namespaces get their service account and the authority's certificate.
    ///
    /// # Errors
    /// When the program is missing, or the controllers do not work in time; the error contains the end of its log.
    pub async fn start(server: &ApiServer) -> anyhow::Result<Self> {
        let kubeconfig = component(server, "kube-controller-manager")?;
        let mut command = Command::new(programs::kubernetes("kube-controller-manager")?);
        let file = |flag: &str, path: PathBuf| format!("--{flag}={}", path.display());
        command.args([
            file("kubeconfig", kubeconfig),
            file("root-ca-file", server.path("ca.crt")),
            file("service-account-private-key-file", server.path("accounts.key")),
        ]);
        // Every controller has its own service account, with its own rights. There is no port, so that any number of them run.
        command.args(["--use-service-account-credentials=true", "--leader-elect=false", "--secure-port=0"]);
        let log = server.path("kube-controller-manager.log");
        let manager = Process::start_bound(command, &log).context("start kube-controller-manager")?;
        let mut started = Self { manager, scheduler: None };
        let client = server.client().await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
        let maps: Api<ConfigMap> = Api::namespaced(client, "default");
        let works = until(PATIENCE, async || {
            started.manager.has_ended()
                || (accounts.get("default").await.is_ok() && maps.get("kube-root-ca.crt").await.is_ok())
        });
        if works.await.is_none() || started.manager.has_ended() {
            bail!("the controllers of {} do not work:\n{}", server.name(), end(&started.manager));
        }
        Ok(started)
    }

    /// Starts the scheduler, which places pods on the nodes that are ready.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn start_scheduler(&mut self, server: &ApiServer) -> anyhow::Result<()> {
        let mut command = Command::new(programs::kubernetes("kube-scheduler")?);
        command.arg(format!("--kubeconfig={}", component(server, "kube-scheduler")?.display()));
        command.args(["--leader-elect=false", "--secure-port=0"]);
        let scheduler = Process::start_bound(command, &server.path("kube-scheduler.log"));
        self.scheduler = Some(scheduler.context("start kube-scheduler")?);
        Ok(())
    }

    pub fn manager(&self) -> &Process {
        &self.manager
    }

    pub fn scheduler(&self) -> Option<&Process> {
        self.scheduler.as_ref()
    }
}

/// The kubeconfig of a component, by the user that the default roles name.
fn component(server: &ApiServer, name: &str) -> anyhow::Result<PathBuf> {
    server.write_kubeconfig(name, &server.user(&format!("system:{name}"), &[])?)
}

fn end(process: &Process) -> String {
    let log = process.log();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}
