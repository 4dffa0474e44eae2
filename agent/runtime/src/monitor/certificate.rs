//! The certificate of metrics, from files that another program replaces, such as cert-manager through a mounted Secret.
//!
//! A certificate of a process's own identity would not do: it names a SPIFFE ID and no host, which Prometheus cannot verify.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, version};
use tokio_util::sync::CancellationToken;

use crate::files;

/// How often the files are compared with what is served. Kubernetes takes about a minute to replace the files of a Secret.
const READ_EVERY: Duration = Duration::from_secs(10);
/// The largest file of a certificate chain, in bytes: some ten certificates.
const MAX_CHAIN_BYTES: u64 = 64 * 1024;

/// Why a certificate cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("{0} does not contain a certificate in PEM")]
    Chain(PathBuf),
    #[error("{0} does not contain a private key in PEM")]
    Key(PathBuf),
    #[error("the certificate in {0} and the key in {1} cannot be used together")]
    Pair(PathBuf, PathBuf, #[source] rustls::Error),
    #[error("TLS 1.3 is not available")]
    Tls(#[source] rustls::Error),
}

/// The certificate that is served now, and where the next one will be.
#[derive(Debug)]
pub struct ServedCertificate {
    chain: PathBuf,
    key: PathBuf,
    /// `None` until the files exist.
    served: Mutex<Option<Served>>,
}

#[derive(Debug)]
struct Served {
    key: Arc<CertifiedKey>,
    /// The hash of both files, so that the key is not kept a second time.
    hash: Vec<u8>,
}

impl ServedCertificate {
    /// Reads the certificate chain and its key. Where the files do not exist yet, handshakes fail until they do: a process does not wait
    /// for the certificate of its metrics.
    ///
    /// # Errors
    /// When a file cannot be read, others can read the key, or the two do not belong together.
    pub fn read(chain: &Path, key: &Path) -> Result<Self, CertificateError> {
        let served = match load(chain, key, None) {
            Err(CertificateError::Read(path, error)) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(file = %path.display(), "metrics not served until their certificate and its key exist");
                None
            }
            loaded => loaded?,
        };
        Ok(Self { chain: chain.to_owned(), key: key.to_owned(), served: Mutex::new(served) })
    }

    /// Serves what is in the files now. Returns whether this is another certificate.
    ///
    /// # Errors
    /// As [`Self::read`]: the earlier certificate is served until the files are complete.
    pub fn read_again(&self) -> Result<bool, CertificateError> {
        let hash = self.served.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|it| it.hash.clone());
        let next = load(&self.chain, &self.key, hash.as_deref())?;
        let is_another = next.is_some();
        if let Some(next) = next {
            *self.served.lock().unwrap_or_else(PoisonError::into_inner) = Some(next);
        }
        Ok(is_another)
    }

    /// Follows the files until `stop`.
    pub(super) async fn follow(self: Arc<Self>, stop: CancellationToken) {
        // That the files do not exist yet has been logged.
        let mut is_failing = self.served.lock().unwrap_or_else(PoisonError::into_inner).is_none();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(READ_EVERY) => {}
            }
            let read = self.read_again();
            match &read {
                Ok(true) => tracing::info!(certificate = %self.chain.display(), "certificate of metrics replaced"),
                Ok(false) => {}
                Err(error) if !is_failing => {
                    let error = anyhow::Chain::new(error).map(ToString::to_string).collect::<Vec<_>>().join(": ");
                    tracing::warn!(error, "certificate of metrics not replaced: the earlier one is served");
                }
                Err(_) => {}
            }
            is_failing = read.is_err();
        }
    }

    /// How a listener uses it.
    pub(super) fn config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, CertificateError> {
        let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
        let builder = builder.with_protocol_versions(&[&version::TLS13]).map_err(CertificateError::Tls)?;
        let resolver: Arc<Self> = Arc::clone(self);
        let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A connection is not resumed.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for ServedCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.as_ref().map(|it| Arc::clone(&it.key))
    }
}

/// Reads both files; `None` where they have the hash `known`.
fn load(chain: &Path, key: &Path, known: Option<&[u8]>) -> Result<Option<Served>, CertificateError> {
    let failed = |path: &Path, error| CertificateError::Read(path.to_owned(), error);
    let size = std::fs::metadata(chain).map_err(|error| failed(chain, error))?.len();
    if size > MAX_CHAIN_BYTES {
        let large = io::Error::new(io::ErrorKind::InvalidData, format!("it has {size} bytes, and may have 65536"));
        return Err(failed(chain, large));
    }
    let chain_pem = std::fs::read(chain).map_err(|error| failed(chain, error))?;
    let key_pem = files::read_provided_secret(key).map_err(|error| failed(key, error))?;
    let hash = [digest(&SHA256, &chain_pem), digest(&SHA256, &key_pem)];
    let hash = hash.iter().flat_map(|it| it.as_ref()).copied().collect::<Vec<u8>>();
    if known == Some(&hash) {
        return Ok(None);
    }
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&chain_pem)
        .collect::<Result<_, _>>()
        .map_err(|_| CertificateError::Chain(chain.to_owned()))?;
    if certificates.is_empty() {
        return Err(CertificateError::Chain(chain.to_owned()));
    }
    let private = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|_| CertificateError::Key(key.to_owned()))?;
    let pair = CertifiedKey::from_der(certificates, private, &default_provider())
        .map_err(|error| CertificateError::Pair(chain.to_owned(), key.to_owned(), error))?;
    Ok(Some(Served { key: Arc::new(pair), hash }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_is_replaced_when_both_of_its_files_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let [chain, key] = ["tls.crt", "tls.key"].map(|name| folder.path().join(name));
        let make = || rcgen::generate_simple_self_signed(vec!["metrics.example".to_owned()]).expect("a certificate");
        let write_chain = |pem: &str| std::fs::write(&chain, pem).expect("written");
        let write_key = |pem: &str| files::write_secret(&key, pem.as_bytes()).expect("written");
        let (first, second) = (make(), make());
        // Another program writes the files later.
        let served = ServedCertificate::read(&chain, &key).expect("not there yet");
        assert!(served.served.lock().expect("not poisoned").is_none());
        write_chain(&first.cert.pem());
        assert!(matches!(served.read_again(), Err(CertificateError::Read(..))));
        write_key(&first.signing_key.serialize_pem());
        assert!(served.read_again().expect("complete"));
        let der = || served.served.lock().expect("not poisoned").as_ref().expect("served").key.cert[0].to_vec();
        assert!(!served.read_again().expect("unchanged"));
        assert_eq!(der(), first.cert.der().to_vec());

        // Between the two files, and with a broken one, the earlier certificate is served.
        write_chain(&second.cert.pem());
        assert!(matches!(served.read_again(), Err(CertificateError::Pair(..))));
        for broken in ["", "-----BEGIN CERTIFICATE-----\nAA"] {
            write_chain(broken);
            assert!(matches!(served.read_again(), Err(CertificateError::Chain(_))), "{broken}");
        }
        write_chain(&"x".repeat(MAX_CHAIN_BYTES as usize + 1));
        assert!(matches!(served.read_again(), Err(CertificateError::Read(..))));
        assert_eq!(der(), first.cert.der().to_vec());
        write_chain(&second.cert.pem());
        write_key(&second.signing_key.serialize_pem());
        assert!(served.read_again().expect("complete"));
        assert_eq!(der(), second.cert.der().to_vec());

        // Others may not read the key.
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).expect("set");
        assert!(matches!(ServedCertificate::read(&chain, &key), Err(CertificateError::Read(..))));
    }
}
