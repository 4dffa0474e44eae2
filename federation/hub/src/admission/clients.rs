//! The client certificates of API servers, where an authority for them is given.
//!
//! An API server presents the certificate that its file `--admission-control-config-file` names for the webhook. Any certificate of the
//! authority is accepted, unless names are given: an authority that also signs for others, such as that of the cluster, needs names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::certificate::Certificates;

/// How often the file of the authorities is compared with what is used.
const READ_EVERY: Duration = Duration::from_secs(10);
/// The largest file of authorities, in bytes: some twenty certificates.
const MAX_BYTES: u64 = 64 << 10;

/// Which API servers may send reviews.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientOptions {
    /// The file with their authorities, in PEM. `None`: all who reach the listener may.
    pub authorities: Option<PathBuf>,
    /// Common names of their certificates; empty: any.
    pub names: BTreeSet<String>,
}

/// How connections are accepted now.
pub(super) struct Acceptor {
    certificates: Arc<Certificates>,
    options: ClientOptions,
    now: Mutex<(TlsAcceptor, Vec<u8>)>,
}

impl Acceptor {
    /// # Errors
    /// When the authorities cannot be read.
    pub(super) fn new(certificates: Arc<Certificates>, options: ClientOptions) -> anyhow::Result<Self> {
        let pem = options.authorities.as_deref().map(read).transpose()?.unwrap_or_default();
        let acceptor = acceptor(&certificates, &options, &pem)?;
        Ok(Self { certificates, options, now: Mutex::new((acceptor, pem)) })
    }

    pub(super) fn current(&self) -> TlsAcceptor {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    pub(super) fn authenticates(&self) -> bool {
        self.options.authorities.is_some()
    }

    /// Whether the certificate of a client, which the authority has signed, is one of an API server.
    ///
    /// # Errors
    /// When it is not.
    pub(super) fn admit(&self, presented: Option<&[CertificateDer<'_>]>) -> anyhow::Result<()> {
        if self.options.names.is_empty() {
            return Ok(());
        }
        let der = presented.and_then(|chain| chain.first()).context("the client presents no certificate")?;
        let (_, certificate) = X509Certificate::from_der(der).context("read the certificate of the client")?;
        let name = certificate.subject().iter_common_name().next().and_then(|it| it.as_str().ok()).unwrap_or_default();
        ensure!(self.options.names.contains(name), "the client {name:?} is not one of --webhook-client-name");
        Ok(())
    }

    /// Follows the file until `stop`.
    pub(super) async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let Some(path) = self.options.authorities.clone() else { return };
        let mut is_failing = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(READ_EVERY) => {}
            }
            let replaced = self.read_again(&path);
            match &replaced {
                Ok(true) => info!(file = %path.display(), "authorities of API servers replaced"),
                Ok(false) => {}
                Err(error) if !is_failing => {
                    warn!(
                        error = format!("{error:#}"),
                        "authorities of API servers not replaced: the earlier ones are used"
                    );
                }
                Err(_) => {}
            }
            is_failing = replaced.is_err();
        }
    }

    fn read_again(&self, path: &Path) -> anyhow::Result<bool> {
        let pem = read(path)?;
        if self.now.lock().unwrap_or_else(PoisonError::into_inner).1 == pem {
            return Ok(false);
        }
        let acceptor = acceptor(&self.certificates, &self.options, &pem)?;
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = (acceptor, pem);
        Ok(true)
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let read = || -> anyhow::Result<Vec<u8>> {
        let size = std::fs::metadata(path)?.len();
        ensure!(size <= MAX_BYTES, "it has {size} bytes, and may have {MAX_BYTES}");
        Ok(std::fs::read(path)?)
    };
    read().with_context(|| format!("read {} (--webhook-client-ca)", path.display()))
}

fn acceptor(certificates: &Arc<Certificates>, options: &ClientOptions, pem: &[u8]) -> anyhow::Result<TlsAcceptor> {
    let builder = ServerConfig::builder();
    let builder = match &options.authorities {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let read = certificate.map_err(anyhow::Error::from).and_then(|it| Ok(roots.add(it)?));
                read.with_context(|| format!("read the certificates in {}", path.display()))?;
            }
            ensure!(PrivateKeyDer::from_pem_slice(pem).is_err(), "{} contains a private key", path.display());
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
            builder.with_client_cert_verifier(verifier.with_context(|| format!("use {}", path.display()))?)
        }
    };
    let resolver: Arc<Certificates> = Arc::clone(certificates);
    let mut config = builder.with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority() -> rcgen::CertifiedKey<rcgen::KeyPair> {
        rcgen::generate_simple_self_signed(vec!["authority".to_owned()]).expect("a certificate")
    }

    #[test]
    fn authorities_are_read_again() {
        hanse_identity::tls::install_provider();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("ca.pem");
        let certificates = Arc::new(Certificates::new("hub".to_owned(), Duration::from_secs(60)).expect("made"));
        let options = ClientOptions { authorities: Some(path.clone()), names: BTreeSet::new() };
        let opened = || Acceptor::new(Arc::clone(&certificates), options.clone());
        assert!(opened().is_err(), "there is no file");
        let (first, second) = (authority(), authority());
        for wrong in ["", "-----BEGIN CERTIFICATE-----\nAA", &(first.cert.pem() + &first.signing_key.serialize_pem())] {
            std::fs::write(&path, wrong).expect("written");
            assert!(opened().is_err(), "{wrong}");
        }
        std::fs::write(&path, first.cert.pem()).expect("written");
        let acceptor = opened().expect("read");
        assert!(acceptor.authenticates() && !acceptor.read_again(&path).expect("unchanged"));
        std::fs::write(&path, "").expect("written");
        assert!(acceptor.read_again(&path).is_err(), "an empty file admits no client, and is not taken over");
        std::fs::write(&path, first.cert.pem() + &second.cert.pem()).expect("written");
        assert!(acceptor.read_again(&path).expect("two authorities"));
        assert!(!acceptor.read_again(&path).expect("unchanged"));
    }

    #[test]
    fn names_restrict_the_clients_of_an_authority() {
        hanse_identity::tls::install_provider();
        let certificates = Arc::new(Certificates::new("hub".to_owned(), Duration::from_secs(60)).expect("made"));
        let with = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            Acceptor::new(Arc::clone(&certificates), ClientOptions { authorities: None, names }).expect("made")
        };
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "kube-apiserver");
        let key = rcgen::KeyPair::generate().expect("a key");
        let der = params.self_signed(&key).expect("a certificate").der().clone();
        let chain = [der];
        assert!(with(&[]).admit(Some(&chain)).is_ok() && with(&[]).admit(None).is_ok());
        assert!(with(&["other", "kube-apiserver"]).admit(Some(&chain)).is_ok());
        assert!(with(&["kube"]).admit(Some(&chain)).is_err());
        assert!(with(&["kube-apiserver"]).admit(None).is_err());
    }
}
