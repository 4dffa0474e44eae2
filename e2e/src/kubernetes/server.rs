//! One kube-apiserver, with an authority, users and audit log of its own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, ListParams, PostParams};
use kube::core::Request;
use serde_json::Value;

use super::certificates::{Authority, Certified};
use super::etcd::Etcd;
use super::kubeconfig::{Credentials, client, kubeconfig, write_private};
use super::programs;
use super::scratch::Scratch;
use crate::go;
use crate::process::Process;

/// How long a server may take to be ready. With an idle machine it takes some five seconds.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a server may take to end its requests when it is stopped.
const GRACE: Duration = Duration::from_secs(30);
/// Ports below those that the kernel gives to connections, so that a server finds its port free when it starts again.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// The address of the service `kubernetes`, the first of the range.
const SERVICE: &str = "10.96.0.1";
/// Another program may take the port between the search for it and the start.
const ATTEMPTS: usize = 5;

/// Health is the only thing that a caller without credentials may see.
const AUTHENTICATION: &str = "apiVersion: apiserver.config.k8s.io/v1beta1
kind: AuthenticationConfiguration
anonymous:
  enabled: true
  conditions: [{path: /livez}, {path: /readyz}, {path: /healthz}]
";

/// Who did what to which object, once for each request. Health and leases would be most of it.
pub const AUDIT_POLICY: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  nonResourceURLs: [/livez*, /readyz*, /healthz*]
- level: None
  resources: [{group: coordination.k8s.io, resources: [leases]}]
- level: Metadata
";

/// How an API server is started.
#[derive(Debug, Clone)]
pub struct Options {
    /// The name of the cluster, and of its prefix in etcd.
    pub name: String,
    /// Where it listens, in the network namespace in which it starts. Pods and other namespaces need an address other than loopback.
    pub address: IpAddr,
    /// Further DNS names and addresses that its certificate is for.
    pub names: Vec<String>,
    /// An object `Policy` of `audit.k8s.io/v1`.
    pub audit_policy: String,
    /// Further flags. Of a flag that is given twice, the last one counts.
    pub arguments: Vec<String>,
}

impl Options {
    /// On loopback, which is enough for tests in one network namespace.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            address: Ipv4Addr::LOCALHOST.into(),
            names: Vec::new(),
            audit_policy: AUDIT_POLICY.to_owned(),
            arguments: Vec::new(),
        }
    }

    #[must_use]
    pub fn listen(mut self, address: IpAddr) -> Self {
        self.address = address;
        self
    }

    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }
}

/// What a token of a service account is for.
#[derive(Debug, Clone, Default)]
pub struct TokenOptions {
    /// Where it is not set, the API server itself.
    pub audiences: Vec<String>,
    /// At least 600; 3600 where it is not set.
    pub seconds: Option<i64>,
    /// The pod, node or secret with which it ends. A pod's token also names its node.
    pub bound: Option<BoundObjectReference>,
}

/// A kube-apiserver; dropped, it is killed and its files removed. RBAC and the node authorizer decide, NodeRestriction and the
/// default plugins admit, and every request is audited.
#[derive(Debug)]
pub struct ApiServer {
    options: Options,
    etcd: Arc<Etcd>,
    address: SocketAddr,
    authority: Authority,
    admin: Value,
    process: Option<Process>,
    directory: Scratch,
}

impl ApiServer {
    /// Starts a server in the caller's network namespace, and waits until it is ready.
    ///
    /// # Errors
    /// When the program is missing, or is not ready in time; the error contains the end of its log.
    pub async fn start(etcd: &Arc<Etcd>, options: Options) -> anyhow::Result<Self> {
        let authority = Authority::create(&format!("hanse-test-{}", options.name))?;
        let directory = Scratch::create(&options.name)?;
        let address = SocketAddr::new(options.address, 0);
        let admin = Value::Null;
        let mut server = Self { options, etcd: Arc::clone(etcd), address, authority, admin, process: None, directory };
        server.prepare()?;
        for _ in 1..ATTEMPTS {
            server.address.set_port(free_port(server.options.address)?);
            match server.start_again().await {
                Err(_) if server.log().contains("address already in use") => server.process = None,
                other => return other.map(|()| server),
            }
        }
        server.start_again().await?;
        Ok(server)
    }

    /// Keys, certificates and policies.
    fn prepare(&self) -> anyhow::Result<()> {
        let address = self.options.address.to_string();
        let mut names: Vec<String> = vec!["kubernetes".to_owned(), address, "127.0.0.1".to_owned(), "::1".to_owned()];
        let service = ["kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];
        names.extend(["localhost", SERVICE].into_iter().chain(service).map(str::to_owned));
        names.extend(self.options.names.iter().cloned());
        let server = self.authority.server(&names)?;
        let accounts = rcgen::KeyPair::generate().context("generate the key of service accounts")?;
        for (name, text) in [
            ("ca.crt", &self.authority.pem()),
            ("server.crt", &server.certificate),
            ("server.key", &server.key),
            ("accounts.key", &accounts.serialize_pem()),
            ("accounts.pub", &accounts.public_key_pem()),
            ("authentication.yaml", &AUTHENTICATION.to_owned()),
            ("audit-policy.yaml", &self.options.audit_policy),
        ] {
            write_private(&self.path(name), text)?;
        }
        Ok(())
    }

    /// Starts a server that was stopped, at the same address, with the objects that it had.
    ///
    /// # Errors
    /// When it is running, or is not ready in time.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "the API server of {} is running already", self.options.name);
        // The credentials name the port, which is known only now.
        self.admin = self.credentials(&self.authority.client("admin", &["system:masters"])?);
        write_private(&self.kubeconfig(), &self.admin.to_string())?;
        let process = Process::start_bound(self.command()?, &self.path("kube-apiserver.log"));
        self.process = Some(process.context("start kube-apiserver")?);
        self.wait_until_ready().await
    }

    fn command(&self) -> anyhow::Result<Command> {
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.path(name).display());
        let mut command = Command::new(programs::kubernetes("kube-apiserver")?);
        command.args([
            format!("--etcd-servers={}", self.etcd.url()),
            format!("--etcd-prefix=/{}", self.options.name),
            format!("--bind-address={}", self.address.ip()),
            format!("--advertise-address={}", self.address.ip()),
            format!("--secure-port={}", self.address.port()),
            file("tls-cert-file", "server.crt"),
            file("tls-private-key-file", "server.key"),
            file("client-ca-file", "ca.crt"),
            file("authentication-config", "authentication.yaml"),
            file("service-account-key-file", "accounts.pub"),
            file("service-account-signing-key-file", "accounts.key"),
            file("audit-policy-file", "audit-policy.yaml"),
            file("audit-log-path", "audit.log"),
        ]);
        command.args([
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            // An agent's DaemonSet asks for capabilities.
            "--allow-privileged=true",
        ]);
        let is_local = match self.address.ip() {
            IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
            IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
        };
        if is_local {
            // Endpoints with such an address are invalid.
            command.arg("--endpoint-reconciler-type=none");
        }
        command.args(&self.options.arguments);
        Ok(command)
    }

    async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let client = self.client().await?;
        let start = Instant::now();
        loop {
            let ended = self.process.as_mut().is_none_or(Process::has_ended);
            if !ended && ready(&client).await {
                return Ok(());
            }
            if ended || start.elapsed() >= PATIENCE {
                let state = if ended { "has ended" } else { "is not ready in time" };
                bail!("the API server of {} {state}:\n{}", self.options.name, self.log_end());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn name(&self) -> &str {
        &self.options.name
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    pub fn etcd(&self) -> &Arc<Etcd> {
        &self.etcd
    }

    /// The authority of the server's certificate and of the clients' certificates.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The folder of the server's files, which are removed with it. Tests may add theirs.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A file in [`Self::directory`].
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The administrator's kubeconfig, of the group `system:masters`.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("admin.kubeconfig")
    }

    /// A client of the administrator.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub async fn client(&self) -> anyhow::Result<kube::Client> {
        client(&self.admin).await
    }

    fn credentials(&self, certified: &Certified) -> Value {
        let credentials = Credentials::Certificate(certified.clone());
        kubeconfig(&self.options.name, &self.url(), &self.authority.pem(), &credentials)
    }

    /// The kubeconfig of a user with up to two groups.
    ///
    /// # Errors
    /// When there are more groups.
    pub fn user(&self, user: &str, groups: &[&str]) -> anyhow::Result<Value> {
        Ok(self.credentials(&self.authority.client(user, groups)?))
    }

    /// A token of a service account, which must exist.
    ///
    /// # Errors
    /// When the server refuses it.
    pub async fn token(&self, namespace: &str, account: &str, options: &TokenOptions) -> anyhow::Result<String> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await?, namespace);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(options.audiences.clone()),
                bound_object_ref: options.bound.clone(),
                expiration_seconds: options.seconds,
            }),
            ..TokenRequest::default()
        };
        let request = accounts.create_token_request(account, &PostParams::default(), &request).await;
        let request = request.with_context(|| format!("request a token of {namespace}/{account}"))?;
        request.status.and_then(|status| status.token).context("the token request was answered without a token")
    }

    /// The kubeconfig of a service account, which must exist, with a token of one hour.
    ///
    /// # Errors
    /// When the server refuses the token.
    pub async fn service_account(&self, namespace: &str, account: &str) -> anyhow::Result<Value> {
        let token = self.token(namespace, account, &TokenOptions::default()).await?;
        Ok(kubeconfig(&self.options.name, &self.url(), &self.authority.pem(), &Credentials::Token(token)))
    }

    /// Writes a kubeconfig to the server's folder, for a program that reads it from a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_kubeconfig(&self, name: &str, kubeconfig: &Value) -> anyhow::Result<PathBuf> {
        let path = self.path(&format!("{name}.kubeconfig"));
        write_private(&path, &kubeconfig.to_string())?;
        Ok(path)
    }

    /// Writes what a pod finds below `/var/run/secrets/kubernetes.io/serviceaccount`: `token`, `ca.crt` and `namespace`.
    ///
    /// # Errors
    /// When the server refuses the token, or a file cannot be written.
    pub async fn mount(
        &self,
        directory: &Path,
        namespace: &str,
        account: &str,
        options: &TokenOptions,
    ) -> anyhow::Result<()> {
        let token = self.token(namespace, account, options).await?;
        std::fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        for (name, text) in [("token", &token), ("ca.crt", &self.authority.pem()), ("namespace", &namespace.to_owned())]
        {
            write_private(&directory.join(name), text)?;
        }
        Ok(())
    }

    /// The variables with which a pod finds the server.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let (host, port) = (self.address.ip().to_string(), self.address.port().to_string());
        [("KUBERNETES_SERVICE_HOST", host), ("KUBERNETES_SERVICE_PORT", port)]
    }

    /// kubectl as the administrator. It runs in the namespace of the thread that starts it.
    ///
    /// # Errors
    /// When kubectl cannot be built.
    pub fn kubectl(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(programs::kubernetes("kubectl")?);
        command.env("KUBECONFIG", self.kubeconfig()).env("KUBECACHEDIR", self.path("kubectl-cache"));
        Ok(command)
    }

    /// Helm as the administrator, with no repositories or plugins of the user's.
    ///
    /// # Errors
    /// When Helm cannot be built.
    pub fn helm(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(go::Program::Helm.build()?);
        command.env("KUBECONFIG", self.kubeconfig());
        for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(name, self.path(&name.to_ascii_lowercase()));
        }
        Ok(command)
    }

    /// What the audit log contains so far: objects `Event` of `audit.k8s.io/v1`.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn audit(&self) -> anyhow::Result<Vec<Value>> {
        let text = std::fs::read_to_string(self.path("audit.log")).context("read the audit log")?;
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).context("read the audit log")).collect()
    }

    /// Requests the end, which takes as long as requests are under way.
    ///
    /// # Errors
    /// When it is not running.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.process.take().context("the API server is not running")?.stop(GRACE).context("stop the API server")?;
        Ok(())
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.take().context("the API server is not running")?.kill().context("kill the API server")?;
        Ok(())
    }

    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("kube-apiserver.log")).unwrap_or_default()
    }

    fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

async fn ready(client: &kube::Client) -> bool {
    let Ok(request) = Request::new("/readyz").list(&ListParams::default()) else { return false };
    client.request_text(request).await.is_ok_and(|text| text == "ok")
}

fn free_port(address: IpAddr) -> anyhow::Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let count = PORTS.end - PORTS.start;
    // Tests in several processes begin at different ports.
    let first = std::process::id().wrapping_mul(997) % u32::from(count);
    for _ in 0..count {
        let offset = (first + u32::from(NEXT.fetch_add(1, Ordering::Relaxed))) % u32::from(count);
        let port = PORTS.start + u16::try_from(offset).context("a port is below 65,536")?;
        if TcpListener::bind((address, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port from {} to {} is free on {address}", PORTS.start, PORTS.end)
}
