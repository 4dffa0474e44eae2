//! The certificates of one hub's webhook: the one that is served, and the one that will be.
//!
//! A certificate is served from the moment at which API servers know it, or if there is no other. The next one is made after two
//! thirds of the validity of the one that is served, so that a third is left to make it known.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// Validity starts earlier than now, for API servers whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// The common name of each certificate, by which those of other hubs are known.
pub(super) const COMMON_NAME: &str = "hanse-hub webhook";

/// A certificate with its key.
#[derive(Debug, Clone)]
struct Issued {
    key: Arc<CertifiedKey>,
    pem: String,
    /// The end of its validity.
    end: SystemTime,
    /// When the next one is made.
    renew: SystemTime,
}

#[derive(Debug, Default)]
struct Pair {
    serving: Option<Issued>,
    next: Option<Issued>,
}

/// The certificates of this process.
#[derive(Debug)]
pub struct Certificates {
    host: String,
    lifetime: Duration,
    pair: Mutex<Pair>,
}

impl Certificates {
    /// `host`: the DNS name or address by which API servers reach the webhook.
    ///
    /// # Errors
    /// When no certificate for it can be made.
    pub fn new(host: String, lifetime: Duration) -> anyhow::Result<Self> {
        let this = Self { host, lifetime, pair: Mutex::default() };
        let first = this.issue(SystemTime::now())?;
        this.pair.lock().unwrap_or_else(PoisonError::into_inner).serving = Some(first);
        Ok(this)
    }

    fn issue(&self, now: SystemTime) -> anyhow::Result<Issued> {
        let key = KeyPair::generate().context("generate the key of the webhook")?;
        let mut params = CertificateParams::new(vec![self.host.clone()])
            .with_context(|| format!("make a certificate for {}", self.host))?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, COMMON_NAME);
        // Certificates of the same name are distinguished by their keys.
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let end = now + self.lifetime;
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = end.into();
        let certificate = params.self_signed(&key).context("sign the certificate of the webhook")?;
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signing = any_supported_type(&private).context("read the key of the webhook")?;
        let chain = vec![CertificateDer::from(certificate.der().to_vec())];
        let renew = now + self.lifetime * 2 / 3;
        Ok(Issued { key: Arc::new(CertifiedKey::new(chain, signing)), pem: certificate.pem(), end, renew })
    }

    /// The certificates that API servers must know at `now`, in PEM: the one that is served, and the next one, which is made where it
    /// is due.
    ///
    /// # Errors
    /// When no certificate can be made.
    pub fn known(&self, now: SystemTime) -> anyhow::Result<Vec<String>> {
        let (is_due, ends) = {
            let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
            let newest = pair.next.as_ref().or(pair.serving.as_ref());
            (newest.is_none_or(|it| it.renew <= now), newest.map(|it| it.end))
        };
        if is_due {
            let next = self.issue(now)?;
            let mut pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
            // What did not become known in time is replaced.
            if pair.next.is_none() || ends.is_none_or(|end| end < next.end) {
                pair.next = Some(next);
            }
        }
        let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        let all = [&pair.serving, &pair.next].into_iter().flatten();
        Ok(all.filter(|it| it.end > now).map(|it| it.pem.clone()).collect())
    }

    /// Serves the next certificate, which API servers know. Returns whether there is one.
    pub fn advance(&self) -> bool {
        let mut pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        match pair.next.take() {
            Some(next) => {
                pair.serving = Some(next);
                true
            }
            None => false,
        }
    }

    pub fn has_next(&self) -> bool {
        self.pair.lock().unwrap_or_else(PoisonError::into_inner).next.is_some()
    }

    /// The end of the validity of the certificate that is served, and its PEM.
    pub fn serving(&self) -> Option<(SystemTime, String)> {
        let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        pair.serving.as_ref().map(|it| (it.end, it.pem.clone()))
    }

    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        pair.serving.as_ref().map(|it| Arc::clone(&it.key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_certificate_is_known_before_it_is_served() {
        let hour = Duration::from_secs(3_600);
        let certificates = Certificates::new("hub.example".to_owned(), hour * 3).expect("a certificate");
        let start = SystemTime::now();
        let first = certificates.known(start).expect("known");
        assert_eq!(first, [certificates.serving().expect("served").1]);
        assert!(!certificates.advance(), "there is no other");
        assert_eq!(certificates.known(start + hour).expect("known"), first);

        // Both are known, and the first one is served until the second one is known.
        let both = certificates.known(start + hour * 2 + hour / 2).expect("known");
        assert_eq!((both.len(), &both[0]), (2, &first[0]));
        assert_eq!(certificates.serving().expect("served").1, first[0]);
        assert!(certificates.advance());
        assert_eq!(certificates.serving().expect("served").1, both[1]);

        // One that did not become known is replaced before its end, and expired ones are not named.
        let third = certificates.known(start + hour * 5).expect("known");
        assert_eq!((third.len(), &third[0]), (2, &both[1]));
        let late = certificates.known(start + hour * 8).expect("known");
        assert_eq!(late.len(), 1);
        assert!(!both.contains(&late[0]) && !third.contains(&late[0]));
    }
}
