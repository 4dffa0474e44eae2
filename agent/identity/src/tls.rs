//! Mutual TLS 1.3 with SPIFFE identities.
//!
//! Promises: only TLS 1.3, over aws-lc-rs, with the hybrid X25519MLKEM768 key exchange preferred; a peer's certificate is issued
//! *directly* by one of the given authorities, so that an intermediate cannot impersonate others at the hub; the identity is
//! checked here, since name constraints do not bind URIs in rustls; revoked serials and keys are refused; sessions are
//! not resumed, so that every connection is verified; a connection ends when either certificate does.
//!
//! The two shapes of trust:
//! - towards the hub, and at the hub: the authority is the ClusterSet's root ([`Trust::new`] with it);
//! - between a member and its agents: the authority is that cluster's intermediate, which is the only one they know.

mod cause;
mod client;
mod connection;
mod refusals;
mod server;
mod verify;

use std::fmt;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{SignatureScheme, SupportedProtocolVersion};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;

pub use cause::Cause;
pub use client::{ClientError, Connection, PinnedRoot, TlsClient};
pub use connection::{Connections, Peer, host_of, peer, peer_identity};
pub use server::{Incoming, IncomingLimits, ServerTls, http2_server, incoming};
pub use verify::{Accept, Revocation, Trust};

use crate::keys::{Certificate, Credentials, KeyError};

/// The application protocol of every link (RFC 9113).
const ALPN: &[u8] = b"h2";
const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// The one TLS provider: aws-lc-rs, hybrid post-quantum key exchange first.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| {
            use rustls::crypto::aws_lc_rs::kx_group::{SECP256R1, X25519, X25519MLKEM768};
            let mut provider = rustls::crypto::aws_lc_rs::default_provider();
            provider.kx_groups = vec![X25519MLKEM768, X25519, SECP256R1];
            Arc::new(provider)
        })
        .clone()
}

/// Makes aws-lc-rs the provider of every library in the process that uses the default.
pub fn install_provider() {
    // An error means that it is installed already.
    let _ = CryptoProvider::install_default(Arc::unwrap_or_clone(provider()));
}

/// Our certificate and key, replaceable while connections are open. New connections use the newest.
#[derive(Debug, Clone)]
pub struct CredentialStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    current: ArcSwap<Loaded>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Loaded {
    credentials: Credentials,
    certified: Arc<CertifiedKey>,
}

impl CredentialStore {
    /// # Errors
    /// When the key cannot be used for TLS.
    pub fn new(credentials: Credentials) -> Result<Self, KeyError> {
        let current = ArcSwap::from_pointee(Loaded::new(credentials)?);
        Ok(Self { shared: Arc::new(Shared { current, changed: watch::Sender::new(()) }) })
    }

    pub fn current(&self) -> Credentials {
        self.shared.current.load().credentials.clone()
    }

    /// Uses `credentials` for connections from now on, and wakes those who [`Self::subscribe`]d.
    ///
    /// # Errors
    /// When the key cannot be used for TLS.
    pub fn replace(&self, credentials: Credentials) -> Result<(), KeyError> {
        self.shared.current.store(Arc::new(Loaded::new(credentials)?));
        self.shared.changed.send_replace(());
        Ok(())
    }

    /// Sees each replacement: the moment to open a new connection before the old one ends.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.shared.changed.subscribe()
    }
}

impl Loaded {
    fn new(credentials: Credentials) -> Result<Self, KeyError> {
        let key = provider()
            .key_provider
            .load_private_key(credentials.key.to_rustls())
            .map_err(|_| KeyError::Certificate("its key is of a kind that TLS does not use"))?;
        let certified = Arc::new(CertifiedKey::new(vec![credentials.certificate.der.clone()], key));
        Ok(Self { credentials, certified })
    }
}

/// The authority of a listener whose clients know it by a hash. It is read at each handshake, since it may be renewed.
#[derive(Clone)]
pub struct PresentedAuthority(Arc<dyn Fn() -> CertificateDer<'static> + Send + Sync>);

impl PresentedAuthority {
    pub fn new(newest: impl Fn() -> CertificateDer<'static> + Send + Sync + 'static) -> Self {
        Self(Arc::new(newest))
    }

    /// One that stays.
    pub fn fixed(authority: &Certificate) -> Self {
        let der = authority.der.clone();
        Self::new(move || der.clone())
    }
}

impl fmt::Debug for PresentedAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PresentedAuthority").finish_non_exhaustive()
    }
}

/// Presents our certificate, followed by `authority` where clients need it.
#[derive(Debug)]
struct Presents {
    store: CredentialStore,
    authority: Option<PresentedAuthority>,
}

impl Presents {
    fn certified(&self) -> Arc<CertifiedKey> {
        let certified = self.store.shared.current.load().certified.clone();
        let Some(authority) = &self.authority else { return certified };
        let chain = certified.cert.iter().cloned().chain([(authority.0)()]).collect();
        Arc::new(CertifiedKey::new(chain, certified.key.clone()))
    }
}

impl ResolvesServerCert for Presents {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }
}

impl ResolvesClientCert for Presents {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
