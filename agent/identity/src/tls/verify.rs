//! Who is let in: the chain by webpki, the identity and revocation by us.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};

use super::provider;
use crate::keys::{Certificate, KeyError};
use crate::spiffe::{Identity, TrustDomain};

/// Whose certificates may be presented.
pub type Accept = Arc<dyn Fn(&Identity) -> bool + Send + Sync>;

/// Whether a certificate has been revoked, by its serial or its key. Evaluated at each handshake.
pub type Revocation = Arc<dyn Fn(&Certificate) -> bool + Send + Sync>;

/// What a peer must be: issued directly by one of the authorities, in the trust domain, accepted, not revoked.
#[derive(Clone)]
pub struct Trust {
    trust_domain: TrustDomain,
    roots: Arc<RootCertStore>,
    accept: Accept,
    revoked: Revocation,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

impl Trust {
    /// Trusts what `authority` issued directly, for the identities that `accept` allows.
    ///
    /// # Errors
    /// When `authority` cannot be a trust anchor.
    pub fn new(
        authority: &Certificate,
        accept: impl Fn(&Identity) -> bool + Send + Sync + 'static,
    ) -> Result<Self, KeyError> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.der.clone()).map_err(|_| KeyError::Certificate("it cannot be a trust anchor"))?;
        Ok(Self {
            trust_domain: authority.trust_domain.clone(),
            roots: Arc::new(roots),
            accept: Arc::new(accept),
            revoked: Arc::new(|_| false),
        })
    }

    /// Checks `revoked` too, at each handshake.
    #[must_use]
    pub fn with_revocation(self, revoked: impl Fn(&Certificate) -> bool + Send + Sync + 'static) -> Self {
        Self { revoked: Arc::new(revoked), ..self }
    }

    /// Whether it has been revoked since it was let in.
    pub(super) fn has_revoked(&self, certificate: &Certificate) -> bool {
        (self.revoked)(certificate)
    }

    /// Reads the certificate and checks what webpki does not: the identity and revocation.
    fn check(&self, end_entity: &CertificateDer<'_>) -> Result<(), Error> {
        let certificate =
            Certificate::from_der(end_entity).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if certificate.trust_domain != self.trust_domain || certificate.is_ca || !(self.accept)(&certificate.identity) {
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        if (self.revoked)(&certificate) {
            return Err(Error::InvalidCertificate(CertificateError::Revoked));
        }
        Ok(())
    }

    pub(super) fn client_verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, KeyError> {
        let webpki = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider())
            .build()
            .map_err(|_| KeyError::Certificate("it cannot verify clients"))?;
        Ok(Arc::new(Verifier { trust: self.clone(), webpki: Some(webpki) }))
    }

    pub(super) fn server_verifier(&self) -> Arc<dyn ServerCertVerifier> {
        Arc::new(Verifier { trust: self.clone(), webpki: None })
    }
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    /// Present where we verify clients.
    webpki: Option<Arc<dyn ClientCertVerifier>>,
}

pub(super) fn algorithms() -> WebPkiSupportedAlgorithms {
    provider().signature_verification_algorithms
}

fn not_spoken() -> Error {
    Error::General("only TLS 1.3 is spoken".to_owned())
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let webpki = self.webpki.as_ref().ok_or_else(|| Error::General("not a server".to_owned()))?;
        // What the peer sent beside its own certificate is not looked at: an authority issues leaves directly.
        webpki.verify_client_cert(end_entity, &[], now)?;
        self.trust.check(end_entity)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(not_spoken())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_directly(end_entity, &self.trust.roots, now)?;
        self.trust.check(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(not_spoken())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// A server's certificate, issued directly by one of `roots`, valid at `now`.
pub(super) fn verify_directly(
    end_entity: &CertificateDer<'_>,
    roots: &RootCertStore,
    now: UnixTime,
) -> Result<(), Error> {
    let parsed = ParsedCertificate::try_from(end_entity)?;
    rustls::client::verify_server_cert_signed_by_trust_anchor(&parsed, roots, &[], now, algorithms().all)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::ca::Ca;
    use crate::keys::{Credentials, Key, RequestedKey};

    const HOUR: Duration = Duration::from_secs(3_600);

    /// The authority's key can sign anything.
    fn forge(authority: &Ca, domain: &str, identity: &Identity) -> Certificate {
        let uri = TrustDomain::new(domain).unwrap().uri(identity);
        let issuer = authority.credentials().key.pair().unwrap();
        let issuer = rcgen::Issuer::from_ca_cert_der(&authority.certificate().der, issuer).unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.as_str().try_into().unwrap())];
        params.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = SystemTime::now().into();
        params.not_after = (SystemTime::now() + HOUR).into();
        let certificate = params.signed_by(&Key::generate().unwrap().pair().unwrap(), &issuer).unwrap();
        Certificate::from_der(certificate.der()).unwrap()
    }

    #[test]
    fn only_what_the_authority_issued_directly_is_let_in_and_only_in_its_time() {
        let (domain, now) = (TrustDomain::new("hanse.test").unwrap(), SystemTime::now());
        let (root, other) = (Ca::root(&domain, 2 * HOUR, now).unwrap(), Ca::root(&domain, HOUR, now).unwrap());
        let (a, b) = (Identity::cluster("a").unwrap(), Identity::cluster("b").unwrap());
        let key = Key::generate().unwrap();
        let below = root.issue_intermediate("a", &RequestedKey::of_key(&key).unwrap(), HOUR, now).unwrap();
        let below = Ca::new(Credentials::new(key, below).unwrap(), false).unwrap();
        let leaf = |ca: &Ca, identity: &Identity| ca.issue_credentials(identity, HOUR, now).unwrap().certificate;
        let (good, revoked) = (leaf(&root, &a), leaf(&root, &a));
        let serial = revoked.serial.clone();
        let accepted = a.clone();
        let trust = Trust::new(root.certificate(), move |identity| *identity == accepted).unwrap();
        let trust = trust.with_revocation(move |certificate| certificate.serial == serial);
        let (clients, servers) = (trust.client_verifier().unwrap(), trust.server_verifier());
        let check = |what: &str, certificate: &Certificate, at: SystemTime, expected: bool| {
            // The longest chain that a peer can present.
            let chain = [below.certificate().der.clone(), root.certificate().der.clone()];
            let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap());
            let client = clients.verify_client_cert(&certificate.der, &chain, at).is_ok();
            let name = ServerName::try_from("127.0.0.1").unwrap();
            let server = servers.verify_server_cert(&certificate.der, &chain, &name, &[], at).is_ok();
            assert_eq!((client, server), (expected, expected), "{what}");
        };
        let second = Duration::from_secs(1);
        check("a leaf of the root", &good, now, true);
        check("in its last second", &good, good.not_after - second, true);
        check("after its end", &good, good.not_after + second, false);
        check("before its time", &good, good.not_before - second, false);
        check("revoked", &revoked, now, false);
        check("not accepted", &leaf(&root, &b), now, false);
        check("of another root", &leaf(&other, &a), now, false);
        check("of an intermediate, which is shown along", &leaf(&below, &a), now, false);
        check("an intermediate itself", below.certificate(), now, false);
        assert!(trust.check(&below.certificate().der).is_err(), "whatever webpki says of an authority that is shown");
        check("of the root", &forge(&root, "hanse.test", &a), now + second, true);
        check("of the root in another trust domain", &forge(&root, "other.test", &a), now + second, false);
    }
}
