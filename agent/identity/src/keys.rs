//! Private keys, certificates and the requests that lead from one to the other.
//!
//! A [`Key`] is never formatted: its `Debug` shows the hash of its public half. Files with a key have mode 0600.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use rustls_pki_types::pem::{Error as PemError, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::spiffe::{Identity, IdentityError, TrustDomain, split_uri};
use hanse_runtime::files;

/// Validity starts this much early, so that a clock which is slow by less does not refuse a new certificate.
pub const EARLY_START: Duration = Duration::from_secs(300);

/// Largest certificate or request that is parsed, in bytes. Ours are below 1 KiB.
pub const MAX_DER_BYTES: usize = 8 * 1024;

/// SHA-256 of something that is compared or listed: a public key (its SubjectPublicKeyInfo) or a certificate (its DER).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

/// A certificate's serial number as in the certificate, without leading zeros.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Serial(pub Arc<[u8]>);

/// Why key material could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the key cannot be read")]
    Key(#[source] rcgen::Error),
    #[error("the PEM text cannot be read: {0}")]
    Pem(&'static str),
    #[error("the certificate cannot be read: {0}")]
    Certificate(&'static str),
    #[error("the certificate names no identity")]
    Identity(#[from] IdentityError),
    #[error("the request cannot be read: {0}")]
    Request(&'static str),
    #[error("the certificate is not for this key")]
    Mismatch,
    #[error("{0}")]
    File(String, #[source] std::io::Error),
}

/// In our own words: the error quotes lines of what was read, which may be a key.
fn pem_error(error: PemError) -> KeyError {
    KeyError::Pem(match error {
        PemError::MissingSectionEnd { .. } => "a section has no last line",
        PemError::IllegalSectionStart { .. } => "the first line of a section is malformed",
        PemError::Base64Decode(_) => "a section is not Base64",
        PemError::NoItemsFound => "it has no section of the wanted kind",
        _ => "it is malformed",
    })
}

/// A private key (ECDSA P-256), made here and never sent anywhere.
#[derive(Clone)]
pub struct Key {
    pkcs8: Arc<Zeroizing<Vec<u8>>>,
    public: Fingerprint,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key(public {})", self.public)
    }
}

impl Key {
    /// # Errors
    /// When the random generator fails.
    pub fn generate() -> Result<Self, KeyError> {
        Self::from_pair(rcgen::KeyPair::generate().map_err(KeyError::Key)?)
    }

    fn from_pair(pair: rcgen::KeyPair) -> Result<Self, KeyError> {
        use rcgen::PublicKeyData as _;
        let public = Fingerprint::of(&pair.subject_public_key_info());
        Ok(Self { pkcs8: Arc::new(Zeroizing::new(pair.serialize_der())), public })
    }

    /// # Errors
    /// When `pem` contains no PKCS #8 key of a known kind.
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(pem_error)?;
        Self::from_pair(rcgen::KeyPair::try_from(&der).map_err(KeyError::Key)?)
    }

    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(pem("PRIVATE KEY", &self.pkcs8))
    }

    /// # Errors
    /// When the file cannot be read, others may read it, or it contains no key.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let bytes = files::read_secret(path).map_err(|e| KeyError::File(format!("read {}", path.display()), e))?;
        Self::from_pem(&bytes)
    }

    /// Reads the key at `path`, or makes one there (mode 0600) when there is none.
    ///
    /// # Errors
    /// As [`Self::read`], and when the file cannot be written.
    pub fn read_or_generate(path: &Path) -> Result<Self, KeyError> {
        if path.exists() {
            return Self::read(path);
        }
        let key = Self::generate()?;
        key.write(path)?;
        Ok(key)
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), KeyError> {
        files::write_secret(path, self.to_pem().as_bytes())
            .map_err(|e| KeyError::File(format!("write {}", path.display()), e))
    }

    /// The hash of the public key (SubjectPublicKeyInfo).
    pub fn public(&self) -> Fingerprint {
        self.public
    }

    /// A certificate signing request (PKCS #10): the public key and the proof of possession of its private half.
    /// It carries no name, since who we are is not ours to say.
    ///
    /// # Errors
    /// When signing fails.
    pub fn request(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let request = params.serialize_request(&self.pair()?).map_err(KeyError::Key)?;
        Ok(request.der().to_vec())
    }

    pub(crate) fn pair(&self) -> Result<rcgen::KeyPair, KeyError> {
        rcgen::KeyPair::try_from(&PrivatePkcs8KeyDer::from(self.pkcs8.as_slice())).map_err(KeyError::Key)
    }

    pub(crate) fn to_rustls(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.pkcs8.to_vec()).into()
    }
}

/// The public key of a request whose proof of possession has been checked. Nothing else is taken from a request.
#[derive(Debug, Clone)]
pub struct RequestedKey {
    spki: rcgen::SubjectPublicKeyInfo,
    public: Fingerprint,
}

impl RequestedKey {
    /// Checks a PKCS #10 request.
    ///
    /// # Errors
    /// When it is too large, malformed, not signed by its own key, or of a kind other than ECDSA P-256, P-384 or Ed25519.
    pub fn from_request(der: &[u8]) -> Result<Self, KeyError> {
        if der.len() > MAX_DER_BYTES {
            return Err(KeyError::Request("it is larger than 8 KiB"));
        }
        let (rest, request) =
            X509CertificationRequest::from_der(der).map_err(|_| KeyError::Request("it is not PKCS #10"))?;
        if !rest.is_empty() {
            return Err(KeyError::Request("bytes follow it"));
        }
        request.verify_signature().map_err(|_| KeyError::Request("its proof of possession is wrong"))?;
        let raw = request.certification_request_info.subject_pki.raw;
        let spki = rcgen::SubjectPublicKeyInfo::from_der(raw)
            .map_err(|_| KeyError::Request("its key is of an unknown kind"))?;
        let algorithm = rcgen::PublicKeyData::algorithm(&spki);
        if ![&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519].contains(&algorithm)
        {
            return Err(KeyError::Request("its key is not ECDSA P-256, P-384 or Ed25519"));
        }
        Ok(Self { spki, public: Fingerprint::of(raw) })
    }

    pub(crate) fn of_key(key: &Key) -> Result<Self, KeyError> {
        use rcgen::PublicKeyData as _;
        let der = key.pair()?.subject_public_key_info();
        Ok(Self { spki: rcgen::SubjectPublicKeyInfo::from_der(&der).map_err(KeyError::Key)?, public: key.public() })
    }

    /// The hash of the public key (SubjectPublicKeyInfo).
    pub fn public(&self) -> Fingerprint {
        self.public
    }

    pub(crate) fn spki(&self) -> &rcgen::SubjectPublicKeyInfo {
        &self.spki
    }
}

/// A certificate and what we read from it. Reading checks no signature.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub der: CertificateDer<'static>,
    pub trust_domain: TrustDomain,
    pub identity: Identity,
    pub serial: Serial,
    /// The hash of its public key.
    pub public: Fingerprint,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Whether it may issue others.
    pub is_ca: bool,
}

impl Certificate {
    /// # Errors
    /// When it is malformed, or its subject alternative names are not exactly one URI that is an identity.
    pub fn from_der(der: &[u8]) -> Result<Self, KeyError> {
        if der.len() > MAX_DER_BYTES {
            return Err(KeyError::Certificate("it is larger than 8 KiB"));
        }
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|_| KeyError::Certificate("it is not X.509"))?;
        if !rest.is_empty() {
            return Err(KeyError::Certificate("bytes follow it"));
        }
        let names = parsed
            .subject_alternative_name()
            .map_err(|_| KeyError::Certificate("it repeats its alternative names"))?
            .ok_or(KeyError::Certificate("it has no alternative name"))?;
        let [GeneralName::URI(uri)] = names.value.general_names[..] else {
            return Err(KeyError::Certificate("its alternative names are not exactly one URI"));
        };
        let (trust_domain, identity) = split_uri(uri)?;
        let time = |time: x509_parser::time::ASN1Time| {
            u64::try_from(time.timestamp())
                .ok()
                .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
                .ok_or(KeyError::Certificate("its validity is before 1970 or too far away"))
        };
        let serial = parsed.raw_serial();
        let zeros = serial.iter().take_while(|b| **b == 0).count();
        Ok(Self {
            der: CertificateDer::from(der.to_vec()),
            trust_domain,
            identity,
            serial: Serial(serial[zeros..].into()),
            public: Fingerprint::of(parsed.public_key().raw),
            not_before: time(parsed.validity().not_before)?,
            not_after: time(parsed.validity().not_after)?,
            is_ca: parsed.is_ca(),
        })
    }

    /// # Errors
    /// As [`Self::from_der`], and when `pem` contains no certificate.
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        Self::from_der(&CertificateDer::from_pem_slice(pem).map_err(pem_error)?)
    }

    /// # Errors
    /// As [`Self::from_pem`], and when the file cannot be read.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let bytes = std::fs::read(path).map_err(|e| KeyError::File(format!("read {}", path.display()), e))?;
        Self::from_pem(&bytes)
    }

    /// Writes it as PEM, atomically.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), KeyError> {
        files::write_atomic(path, self.to_pem().as_bytes(), 0o644)
            .map_err(|e| KeyError::File(format!("write {}", path.display()), e))
    }

    pub fn to_pem(&self) -> String {
        pem("CERTIFICATE", &self.der)
    }

    /// The hash of the whole certificate: what a join token pins.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }

    /// When it should be renewed: two thirds through its validity, from when it was issued.
    pub fn renew_at(&self) -> SystemTime {
        let issued = self.not_before + EARLY_START;
        issued + self.not_after.duration_since(issued).unwrap_or_default() * 2 / 3
    }
}

/// A certificate with its private key.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub key: Key,
    pub certificate: Certificate,
}

impl Credentials {
    /// # Errors
    /// When the certificate is not for the key.
    pub fn new(key: Key, certificate: Certificate) -> Result<Self, KeyError> {
        if key.public() != certificate.public {
            return Err(KeyError::Mismatch);
        }
        Ok(Self { key, certificate })
    }

    /// # Errors
    /// When a file cannot be read, or the two do not belong together.
    pub fn read(key: &Path, certificate: &Path) -> Result<Self, KeyError> {
        Self::new(Key::read(key)?, Certificate::read(certificate)?)
    }

    pub fn identity(&self) -> &Identity {
        &self.certificate.identity
    }

    /// Reads both from one file, as [`Self::write_file`] wrote it.
    ///
    /// # Errors
    /// When the file cannot be read, others may read it, or its parts do not belong together.
    pub fn read_file(path: &Path) -> Result<Self, KeyError> {
        let bytes = files::read_secret(path).map_err(|e| KeyError::File(format!("read {}", path.display()), e))?;
        Self::from_pem(&bytes)
    }

    /// Reads both from one text, as [`Self::to_pem`] returns it.
    ///
    /// # Errors
    /// When one is missing or malformed, or the two do not belong together.
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        Self::new(Key::from_pem(pem)?, Certificate::from_pem(pem)?)
    }

    /// The key and the certificate.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let key = self.key.to_pem();
        Zeroizing::new(format!("{}{}", key.as_str(), self.certificate.to_pem()))
    }

    /// Writes key and certificate into one file (mode 0600), so that no crash can leave one without the other.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_file(&self, path: &Path) -> Result<(), KeyError> {
        files::write_secret(path, self.to_pem().as_bytes())
            .map_err(|e| KeyError::File(format!("write {}", path.display()), e))
    }
}

impl Fingerprint {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let bytes = from_hex(text)?;
        Some(Self(bytes.try_into().ok()?))
    }
}

impl Serial {
    /// Reads hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        Some(Self(from_hex(text)?.into()))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) || text.len() > 128 {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}

/// RFC 7468 text: 64 characters a line.
fn pem(label: &str, der: &[u8]) -> String {
    let body = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(der));
    let mut text = String::with_capacity(body.len() + body.len() / 64 + 2 * label.len() + 40);
    text.push_str(&format!("-----BEGIN {label}-----\n"));
    for start in (0..body.len()).step_by(64) {
        text.push_str(&body[start..body.len().min(start + 64)]);
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}
