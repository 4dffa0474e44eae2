//! A hub, its administrator and members, in one process or two.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use hanse_hub::authority::Lifetimes;
use hanse_hub::registry::Clock;
use hanse_hub::server::{Hub, Options, default_store, init};
use hanse_identity::keys::{Certificate, Credentials, Key};
use hanse_identity::tls::{CredentialStore, TlsClient, Trust};
use hanse_identity::{Identity, TrustDomain};
use hanse_member::registration::{MemberIdentity, RegistrationError};
use hanse_proto::federation::v1 as wire;
use hanse_proto::federation::v1::administration_client::AdministrationClient;
use hanse_runtime::shutdown::Shutdown;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub type Admin = AdministrationClient<Channel>;

/// Everything here happens within this time.
pub const SOON: Duration = Duration::from_secs(20);

pub struct TestHub {
    pub folder: tempfile::TempDir,
    pub hub: Hub,
    pub shutdown: Shutdown,
    pub lifetimes: Lifetimes,
    pub lease: Duration,
    /// Seconds that the registry's clock is ahead.
    pub ahead: Arc<AtomicU64>,
}

impl TestHub {
    pub async fn start() -> Self {
        Self::start_with(Lifetimes::default()).await
    }

    pub async fn start_with(lifetimes: Lifetimes) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let domain = TrustDomain::new("hanse.test").unwrap();
        init(folder.path(), &default_store(folder.path()), &domain, "127.0.0.1:0".parse().unwrap()).await.unwrap();
        Self::open(folder, lifetimes, Duration::from_secs(30), Arc::default(), false).await
    }

    /// The same hub, started again with another lease.
    pub async fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self.restart().await
    }

    /// The same hub, started again after a copy of its store was made.
    pub async fn backed_up(self, to: &Path) -> Self {
        self.restart_with(|store| std::fs::copy(store, to), false).await
    }

    /// The same hub, started again from such a copy.
    pub async fn restored(self, from: &Path) -> Self {
        self.restart_with(|store| std::fs::copy(from, store), true).await
    }

    async fn open(
        folder: tempfile::TempDir,
        lifetimes: Lifetimes,
        lease: Duration,
        ahead: Arc<AtomicU64>,
        restored: bool,
    ) -> Self {
        let shutdown = Shutdown::default();
        let any = "127.0.0.1:0".parse().unwrap();
        let clock = ahead.clone();
        let deadline = tokio::time::Instant::now() + SOON;
        let hub = loop {
            let clock = clock.clone();
            let clock = Clock(Arc::new(move || SystemTime::now() + Duration::from_secs(clock.load(Ordering::SeqCst))));
            let options =
                Options { lifetimes, lease, clock, restored, ..Options::new(folder.path().to_owned(), any, any) };
            match Hub::start(options, &shutdown).await {
                Ok(hub) => break hub,
                // The store's last owner needs a moment to let go of the file.
                Err(error) if tokio::time::Instant::now() > deadline => panic!("{error:#}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        Self { folder, hub, shutdown, lifetimes, lease, ahead }
    }

    /// Stops it and starts another on the same files.
    pub async fn restart(self) -> Self {
        self.restart_with(|_| Ok(0), false).await
    }

    async fn restart_with(self, meanwhile: impl FnOnce(&Path) -> std::io::Result<u64>, restored: bool) -> Self {
        let Self { folder, hub, shutdown, lifetimes, lease, ahead } = self;
        shutdown.drain(SOON).await;
        drop(hub);
        let store = folder.path().join("hub.redb");
        let url = hanse_store::StoreUrl::file(&store);
        eventually("the store is closed", || async { hanse_store::open(&url).await.is_ok() }).await;
        meanwhile(&store).unwrap();
        Self::open(folder, lifetimes, lease, ahead, restored).await
    }

    pub fn advance(&self, time: Duration) {
        self.ahead.fetch_add(time.as_secs(), Ordering::SeqCst);
    }

    pub async fn admin(&self) -> Admin {
        let data = self.folder.path();
        let credentials = Credentials::read(&data.join("admin.key"), &data.join("admin.pem")).unwrap();
        connect(credentials, &data.join("ca.pem"), &self.hub.address.to_string()).await
    }

    /// A user of these roles, connected.
    pub async fn user(&self, name: &str, role: wire::role::Role) -> Admin {
        let key = Key::generate().unwrap();
        let request = wire::CreateUserRequest {
            name: name.to_owned(),
            roles: vec![wire::Role { role: Some(role) }],
            request: key.request().unwrap().into(),
        };
        let created = self.admin().await.create_user(request).await.unwrap().into_inner();
        let certificate = Certificate::from_der(&created.certificate).unwrap();
        let credentials = Credentials::new(key, certificate).unwrap();
        connect(credentials, &self.folder.path().join("ca.pem"), &self.hub.address.to_string()).await
    }

    pub async fn token(&self, cluster: &str, accept: bool) -> String {
        let request = wire::CreateTokenRequest { cluster: cluster.to_owned(), lifetime_seconds: 600, accept };
        self.admin().await.create_token(request).await.unwrap().into_inner().token
    }

    pub fn member_folder(&self, name: &str) -> PathBuf {
        self.folder.path().join("members").join(name)
    }

    pub async fn join(&self, folder: &str, cluster: &str, token: &str) -> Result<MemberIdentity, RegistrationError> {
        join(&self.member_folder(folder), cluster, token, &self.hub.join_address.to_string()).await
    }

    /// A cluster that has joined.
    pub async fn member(&self, cluster: &str) -> MemberIdentity {
        let token = self.token(cluster, true).await;
        self.join(cluster, cluster, &token).await.unwrap()
    }
}

pub async fn join(
    folder: &Path,
    cluster: &str,
    token: &str,
    address: &str,
) -> Result<MemberIdentity, RegistrationError> {
    std::fs::create_dir_all(folder).unwrap();
    let file = folder.join("token");
    hanse_runtime::files::write_secret(&file, token.as_bytes()).unwrap();
    let stop = CancellationToken::new();
    let join = [address.to_owned()];
    tokio::time::timeout(SOON, MemberIdentity::join(folder, cluster, &file, &join, false, &stop)).await.unwrap()
}

pub async fn connect(credentials: Credentials, root: &Path, address: &str) -> Admin {
    AdministrationClient::new(open(credentials, root, address).await.unwrap())
}

pub async fn open(credentials: Credentials, root: &Path, address: &str) -> anyhow::Result<Channel> {
    let root = Certificate::read(root)?;
    let trust = Trust::new(&root, |identity| *identity == Identity::Hub)?;
    let client = TlsClient::mutual(CredentialStore::new(credentials)?, &trust)?;
    Ok(client.connect(address).await?.channel)
}

/// Whether the hub serves this member now: the response is that a member is not a user.
pub async fn is_served(member: &MemberIdentity, address: &str) -> bool {
    let Ok(connection) = member.hub_client().unwrap().connect(address).await else { return false };
    let answer = AdministrationClient::new(connection.channel).status(wire::StatusRequest {}).await;
    answer.is_err_and(|status| status.code() == tonic::Code::PermissionDenied)
}

/// Polls until `check` is true.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + SOON;
    while !check().await {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn policy(name: &str, tier: &str) -> Vec<u8> {
    serde_json::json!({
        "apiVersion": "hanse.dev/v1alpha1", "kind": "FederatedNetworkPolicy", "metadata": {"name": name},
        "spec": {
            "tier": tier, "order": 10, "clusterSelector": "all()", "selector": "app == 'a'", "types": ["Ingress"],
            "ingress": [{"action": "Deny"}]
        }
    })
    .to_string()
    .into_bytes()
}

pub fn tier(name: &str) -> Vec<u8> {
    let (api, kind) = ("hanse.dev/v1alpha1", "Tier");
    let manifest =
        serde_json::json!({"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": {"order": 1}});
    manifest.to_string().into_bytes()
}

pub fn member_cluster(name: &str, cidrs: &[&str]) -> Vec<u8> {
    serde_json::json!({
        "apiVersion": "hanse.dev/v1alpha1", "kind": "MemberCluster", "metadata": {"name": name},
        "spec": {"labels": {"env": "prod"}, "grants": {"namespaces": ["*"], "cidrs": cidrs}}
    })
    .to_string()
    .into_bytes()
}

/// Also without its tier.
pub fn apply(manifest: Vec<u8>) -> wire::ApplyRequest {
    wire::ApplyRequest { manifest: manifest.into(), precondition: None, allow_missing_tier: true }
}
