//! Makes a ClusterSet in a store that several replicas share, when all of them start at the same time.
//!
//! Each step changes the store only if no other replica has done so, and then continues with what the store contains. A replica that
//! is killed between two steps leaves nothing that another one, or a repetition, does not complete.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use hanse_identity::ca::Ca;
use hanse_identity::keys::{Credentials, Key, RequestedKey};
use hanse_identity::{Identity, TrustDomain};
use hanse_runtime::files;
use hanse_runtime::shutdown::Shutdown;
use hanse_store::{Store, StoreError, StoreUrl, Transaction};

use crate::authority::{Authority, Lifetimes};
use crate::registry::records::{self, UserRecord};
use crate::registry::{AuditAction, Clock, Registry, key, seconds};
use crate::roles::Role;
use crate::sealed::{self, UnlockKey};
use crate::server::write_context;
use crate::transfer;

/// Makes the ClusterSet, unless the store contains it. `data` receives the context file of the first administrator, if this call has
/// created that one: returns whether it has.
///
/// # Errors
/// When the store fails, or contains the ClusterSet of another trust domain, of another key file or without a sealed key.
pub async fn initialise(
    data: &Path,
    url: &StoreUrl,
    key_file: &Path,
    trust_domain: &TrustDomain,
    listen: SocketAddr,
) -> anyhow::Result<bool> {
    files::private_folder(data).with_context(|| format!("make {}", data.display()))?;
    let store = match hanse_store::open(url).await {
        Err(StoreError::Absent) => match hanse_store::create(url).await {
            Err(StoreError::Exists) => hanse_store::open(url).await,
            created => created,
        },
        opened => opened,
    };
    let store = store.with_context(|| format!("open the store {url}"))?;
    transfer::check_served(&*store).await.with_context(|| format!("open the store {url}"))?;
    seal_once(&*store, key_file, trust_domain).await.with_context(|| format!("fill the store {url}"))?;
    let authority = Authority::new(sealed::unseal(&*store, key_file).await?, Lifetimes::default());
    if authority.trust_domain() != trust_domain {
        bail!("the store {url} contains the ClusterSet {}: --trust-domain is {trust_domain}", authority.trust_domain());
    }
    let registry = Registry::open(store, Duration::from_secs(30), Clock::default(), &Shutdown::default()).await;
    let registry = registry.with_context(|| format!("fill the store {url}"))?;
    registry.bind(authority.root()).await.with_context(|| format!("fill the store {url}"))?;
    create_first_administrator(&registry, &authority, data, listen).await.context("make the administrator")
}

/// Puts a new authority into the store, if there is none.
async fn seal_once(store: &dyn Store, key_file: &Path, trust_domain: &TrustDomain) -> anyhow::Result<()> {
    if sealed::is_sealed(store).await? {
        return Ok(());
    }
    if store.read(&key(&["meta", "root"])?).await?.is_some() {
        bail!("it belongs to a ClusterSet whose key is not in the store: put it there with `hanse-hub store seal`");
    }
    let (unlock, _) = UnlockKey::read_or_create(key_file)?;
    let root = Ca::root(trust_domain, crate::authority::ROOT, SystemTime::now()).context("make the root")?;
    match sealed::seal(store, &root, &unlock).await {
        Ok(()) => Ok(()),
        // Another replica was first: its authority is the one.
        Err(_) if sealed::is_sealed(store).await? => Ok(()),
        Err(error) => Err(error),
    }
}

/// Registers the first administrator with a key of this folder, unless the store has users. The key is on disk before, so that a
/// repetition of an interrupted call issues its certificate.
async fn create_first_administrator(
    registry: &Registry,
    authority: &Authority,
    data: &Path,
    listen: SocketAddr,
) -> anyhow::Result<bool> {
    authority.root().write(&data.join("ca.pem"))?;
    let path = data.join("admin.key");
    let had_key = path.exists();
    let (key_of_admin, now) = (Key::read_or_generate(&path)?, SystemTime::now());
    let public = key_of_admin.public().to_string();
    let record = UserRecord {
        key: public.clone(),
        previous_key: None,
        roles: vec![Role::Administrator],
        revoked: false,
        certificate_expires_at: seconds(now + authority.lifetimes.user),
    };
    let audited = AuditAction::new(&Identity::Hub, "user.create", "user/admin");
    let made = registry.change(&audited, |snapshot| {
        let put = Transaction::default().put(key(&["user", "admin"])?, records::encode(&record));
        Ok(match snapshot.users.is_empty() {
            true => (put, true),
            false => (Transaction::default(), snapshot.users.get("admin").is_some_and(|it| it.key == public)),
        })
    });
    let (_, is_own) = made.await?;
    if !is_own {
        if !had_key {
            std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        return Ok(false);
    }
    let identity = Identity::user("admin")?;
    let request = RequestedKey::from_request(&key_of_admin.request()?)?;
    let certificate = authority.ca().issue(&identity, &request, authority.lifetimes.user, now)?;
    let credentials = Credentials::new(key_of_admin, certificate)?;
    credentials.certificate.write(&data.join("admin.pem"))?;
    write_context(data, authority.trust_domain(), listen)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str) -> TrustDomain {
        TrustDomain::new(name).unwrap()
    }

    #[tokio::test]
    async fn an_interrupted_call_is_completed_by_a_repetition() {
        let folder = tempfile::tempdir().unwrap();
        let (url, key_file) = (StoreUrl::file(folder.path().join("store.redb")), folder.path().join("unlock.key"));
        let listen: SocketAddr = "127.0.0.1:7443".parse().unwrap();
        let store = hanse_store::create(&url).await.unwrap();
        // Killed after the authority was made.
        seal_once(&*store, &key_file, &domain("hanse.test")).await.unwrap();
        let root = sealed::unseal(&*store, &key_file).await.unwrap().certificate().fingerprint();
        seal_once(&*store, &key_file, &domain("hanse.test")).await.unwrap();
        drop(store);
        let run = async |data: &str, domain: &TrustDomain| {
            let data = folder.path().join(data);
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            loop {
                match initialise(&data, &url, &key_file, domain, listen).await {
                    // The last owner of the file needs a moment.
                    Err(error) if format!("{error:#}").contains("in use") && tokio::time::Instant::now() < deadline => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    outcome => break outcome,
                }
            }
        };
        let own = domain("hanse.test");
        assert!(run("one", &own).await.unwrap());
        let at = |name: &str| folder.path().join("one").join(name);
        let certificate = hanse_identity::keys::Certificate::read(&at("ca.pem")).unwrap();
        assert_eq!(certificate.fingerprint(), root, "the authority of the interrupted call");
        assert!(!run("two", &own).await.unwrap() && !folder.path().join("two/admin.key").exists());
        // Killed before the context was written.
        std::fs::remove_file(at("admin.context")).unwrap();
        std::fs::remove_file(at("admin.pem")).unwrap();
        assert!(run("one", &own).await.unwrap() && at("admin.context").exists());
        Credentials::read(&at("admin.key"), &at("admin.pem")).unwrap();
        let error = run("one", &domain("other.test")).await.unwrap_err();
        assert!(format!("{error:#}").contains("contains the ClusterSet hanse.test"), "{error:#}");
    }
}
