//! The root authority of the ClusterSet, and the certificate of the hub.
//!
//! `ca.key` (0600) and `ca.pem` are written once by `hanse-hub init`, or the key is in the store, encrypted
//! (`sealed.rs`). The leaf of the hub is in memory: each process issues its own
//! and replaces it after two thirds of its validity.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hanse_identity::ca::{Ca, CaError};
use hanse_identity::keys::{Certificate, Credentials, KeyError};
use hanse_identity::tls::CredentialStore;
use hanse_identity::{Identity, TrustDomain};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

const DAY: Duration = Duration::from_secs(86_400);

/// How long certificates are valid.
#[derive(Debug, Clone, Copy)]
pub struct Lifetimes {
    /// Of members and of the hub itself.
    pub leaf: Duration,
    /// Of users.
    pub user: Duration,
    /// Of the intermediates of clusters: nodes must be able to start during a long outage of the hub.
    pub intermediate: Duration,
    /// How long after its expiry a member's certificate may still be renewed.
    pub late_renewal: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self { leaf: DAY, user: DAY * 90, intermediate: DAY * 365, late_renewal: DAY * 30 }
    }
}

/// The lifetime of the root.
pub(crate) const ROOT: Duration = Duration::from_secs(86_400 * 3_650);

/// The root with its key. It issues all certificates that the hub trusts.
#[derive(Debug, Clone)]
pub struct Authority {
    ca: Arc<Ca>,
    pub lifetimes: Lifetimes,
}

impl Authority {
    /// Creates the root in `folder`.
    ///
    /// # Errors
    /// When files cannot be written, or signing fails.
    pub fn create(folder: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        let ca = Ca::root(trust_domain, ROOT, now)?;
        ca.credentials().key.write(&folder.join("ca.key"))?;
        ca.certificate().write(&folder.join("ca.pem"))?;
        Ok(Self { ca: Arc::new(ca), lifetimes: Lifetimes::default() })
    }

    /// Reads the root from `folder`.
    ///
    /// # Errors
    /// When files are absent, readable by others, or do not belong together.
    pub fn read(folder: &Path, lifetimes: Lifetimes) -> Result<Self, CaError> {
        let credentials = Credentials::read(&folder.join("ca.key"), &folder.join("ca.pem"))?;
        Ok(Self { ca: Arc::new(Ca::new(credentials, true)?), lifetimes })
    }

    /// The root that was read elsewhere.
    pub fn new(ca: Ca, lifetimes: Lifetimes) -> Self {
        Self { ca: Arc::new(ca), lifetimes }
    }

    /// Creates the root, with its certificate in `folder`, and its key nowhere.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_certificate(folder: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        let ca = Ca::root(trust_domain, ROOT, now)?;
        ca.certificate().write(&folder.join("ca.pem"))?;
        Ok(Self::new(ca, Lifetimes::default()))
    }

    pub fn ca(&self) -> &Ca {
        &self.ca
    }

    pub fn root(&self) -> &Certificate {
        self.ca.certificate()
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.root().trust_domain
    }

    /// A fresh leaf for this process.
    ///
    /// # Errors
    /// When signing fails.
    pub fn hub_credentials(&self) -> Result<Credentials, CaError> {
        self.ca.issue_credentials(&Identity::Hub, self.lifetimes.leaf, SystemTime::now())
    }

    /// Renews the leaf of the hub in `store`, until `stop`.
    pub async fn keep_fresh(self, store: CredentialStore, stop: CancellationToken) {
        loop {
            let wait = store.current().certificate.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait.max(Duration::from_millis(200))) => {}
            }
            let renewed = self.hub_credentials().map_err(|e| e.to_string());
            let replaced = renewed.and_then(|c| store.replace(c).map_err(|e: KeyError| e.to_string()));
            match replaced {
                Ok(()) => info!("hub certificate renewed"),
                Err(error) => error!(%error, "hub certificate not renewed"),
            }
        }
    }
}
