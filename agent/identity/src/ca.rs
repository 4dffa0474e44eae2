//! A small certificate authority: the hub's root, and one intermediate per cluster for its own agents.
//!
//! It issues an identity only below its own: the root issues the hub, clusters, users and the clusters' intermediates; an
//! intermediate issues its cluster and that cluster's nodes. Verifiers do not rely on that (a stolen intermediate
//! can sign anything), they check the identity themselves: see [`crate::tls`].

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;

use crate::keys::{Certificate, Credentials, EARLY_START, Key, KeyError, RequestedKey};
use crate::spiffe::{Identity, TrustDomain};

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("sign the certificate")]
    Sign(#[source] rcgen::Error),
    #[error("{issuer} may not issue a certificate for {subject}")]
    NotBelow { issuer: Identity, subject: Identity },
    #[error("the certificate is not of an authority")]
    NotAnAuthority,
    #[error("the validity cannot be expressed")]
    Validity,
    #[error("the random generator failed")]
    Random,
}

/// A key that issues certificates, with its own certificate.
pub struct Ca {
    credentials: Credentials,
    issuer: Issuer<'static, KeyPair>,
    root: bool,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").field("credentials", &self.credentials).field("root", &self.root).finish()
    }
}

impl Ca {
    /// Makes the root of a ClusterSet. It carries the hub's identity as a name and is never presented as a leaf.
    ///
    /// # Errors
    /// When the random generator or signing fails.
    pub fn root(trust_domain: &TrustDomain, lifetime: Duration, now: SystemTime) -> Result<Self, CaError> {
        let key = Key::generate()?;
        let mut params = params(trust_domain, &Identity::Hub, lifetime, now)?;
        authority(&mut params, 1, &format!("Hanse ClusterSet {trust_domain}"));
        let certificate = params.self_signed(&key.pair()?).map_err(CaError::Sign)?;
        Self::new(Credentials::new(key, Certificate::from_der(certificate.der())?)?, true)
    }

    /// An authority from its stored certificate and key. `root` is whether it is the ClusterSet's own.
    ///
    /// # Errors
    /// When the certificate is not one of an authority.
    pub fn new(credentials: Credentials, root: bool) -> Result<Self, CaError> {
        if !credentials.certificate.is_ca {
            return Err(CaError::NotAnAuthority);
        }
        let issuer =
            Issuer::from_ca_cert_der(&credentials.certificate.der, credentials.key.pair()?).map_err(CaError::Sign)?;
        Ok(Self { credentials, issuer, root })
    }

    pub fn certificate(&self) -> &Certificate {
        &self.credentials.certificate
    }

    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// Issues a leaf for `identity` to the key of a checked request, valid from five minutes ago for `lifetime` from `now`.
    ///
    /// # Errors
    /// When `identity` is not below this authority, or signing fails.
    pub fn issue(
        &self,
        identity: &Identity,
        key: &RequestedKey,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Certificate, CaError> {
        let below = match (&self.certificate().identity, identity) {
            (_, Identity::Node { .. }) if self.root => false,
            (_, _) if self.root => true,
            (Identity::Cluster(own), Identity::Cluster(c) | Identity::Node { cluster: c, .. }) => own == c,
            _ => false,
        };
        if !below {
            return Err(self.not_below(identity));
        }
        let mut params = params(&self.certificate().trust_domain, identity, lifetime, now)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, key)
    }

    /// Issues a leaf with a key made here.
    ///
    /// # Errors
    /// As [`Self::issue`].
    pub fn issue_credentials(
        &self,
        identity: &Identity,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Credentials, CaError> {
        let key = Key::generate()?;
        let certificate = self.issue(identity, &RequestedKey::of_key(&key)?, lifetime, now)?;
        Ok(Credentials::new(key, certificate)?)
    }

    /// Issues the intermediate of `cluster` to the key of a checked request. It may issue leaves only.
    ///
    /// # Errors
    /// When this authority is not the root, or signing fails.
    pub fn issue_intermediate(
        &self,
        cluster: &str,
        key: &RequestedKey,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Certificate, CaError> {
        let identity = Identity::cluster(cluster).map_err(KeyError::from)?;
        if !self.root {
            return Err(self.not_below(&identity));
        }
        let mut params = params(&self.certificate().trust_domain, &identity, lifetime, now)?;
        authority(&mut params, 0, &format!("Hanse cluster {cluster}"));
        self.sign(params, key)
    }

    fn sign(&self, params: CertificateParams, key: &RequestedKey) -> Result<Certificate, CaError> {
        let certificate = params.signed_by(key.spki(), &self.issuer).map_err(CaError::Sign)?;
        let der: &CertificateDer<'_> = certificate.der();
        Ok(Certificate::from_der(der)?)
    }

    fn not_below(&self, subject: &Identity) -> CaError {
        CaError::NotBelow { issuer: self.certificate().identity.clone(), subject: subject.clone() }
    }
}

fn authority(params: &mut CertificateParams, below: u8, name: &str) {
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, name);
}

fn params(
    trust_domain: &TrustDomain,
    identity: &Identity,
    lifetime: Duration,
    now: SystemTime,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let uri = trust_domain.uri(identity);
    params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().map_err(CaError::Sign)?)];
    params.not_before = now.checked_sub(EARLY_START).ok_or(CaError::Validity)?.into();
    params.not_after = now.checked_add(lifetime).ok_or(CaError::Validity)?.into();
    params.use_authority_key_identifier_extension = true;
    // Random, since a serial derived from the key would be the same for each renewal.
    let mut serial = [0_u8; 16];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| CaError::Random)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn issues_only_below_itself() {
        let now = SystemTime::now();
        let domain = TrustDomain::new("hanse.local").unwrap();
        let root = Ca::root(&domain, DAY, now).unwrap();
        let key = Key::generate().unwrap();
        let requested = RequestedKey::from_request(&key.request().unwrap()).unwrap();
        let intermediate = root.issue_intermediate("train", &requested, DAY, now).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&intermediate.der).unwrap();
        let constraints = parsed.basic_constraints().unwrap().unwrap().value;
        assert_eq!((constraints.ca, constraints.path_len_constraint), (true, Some(0)), "no authority is below it");
        let intermediate = Ca::new(Credentials::new(key, intermediate).unwrap(), false).unwrap();

        let identity = |path: &str| path.parse::<Identity>().unwrap();
        let check = |ca: &Ca, path: &str| ca.issue_credentials(&identity(path), DAY, now).is_ok();
        assert_eq!(["hub", "cluster/a", "user/a"].map(|path| check(&root, path)), [true; 3]);
        assert!(!check(&root, "cluster/a/node/b"));
        assert_eq!(["cluster/train", "cluster/train/node/b"].map(|path| check(&intermediate, path)), [true; 2]);
        let refused = ["hub", "cluster/a", "user/a", "cluster/a/node/b"];
        assert_eq!(refused.map(|path| check(&intermediate, path)), [false; 4]);
        assert!(intermediate.issue_intermediate("train", &requested, DAY, now).is_err());
    }

    #[test]
    fn a_request_gives_its_key_and_nothing_else() {
        let key = Key::generate().unwrap();
        let mut request = key.request().unwrap();
        assert_eq!(RequestedKey::from_request(&request).unwrap().public(), key.public());
        let last = request.len() - 1;
        request[last] ^= 1;
        assert!(RequestedKey::from_request(&request).is_err(), "the proof of possession is checked");
    }

    #[test]
    fn a_renewed_certificate_has_a_serial_of_its_own_and_starts_early() {
        let now = SystemTime::now();
        let root = Ca::root(&TrustDomain::new("hanse.local").unwrap(), DAY, now).unwrap();
        let key = Key::generate().unwrap();
        let requested = RequestedKey::of_key(&key).unwrap();
        let [first, second] = [(); 2].map(|()| root.issue(&Identity::Hub, &requested, DAY, now).unwrap());
        assert_ne!(first.serial, second.serial);
        assert!(first.not_before <= now - EARLY_START);
        assert!(first.renew_at() > now && first.renew_at() < first.not_after);
    }

    #[test]
    fn no_secret_is_formatted() {
        let key = Key::generate().unwrap();
        let text = format!("{key:?}");
        assert!(text.len() < 100 && text.contains(&key.public().to_string()), "{text}");
        // A key without its line breaks; bytes would be shown as numbers.
        let line = key.to_pem().replace('\n', " ");
        let error = Key::from_pem(line.as_bytes()).unwrap_err();
        let text = format!("{error:?} ") + &format!("{:#}", anyhow::Error::from(error));
        assert!(text.len() < 200 && !text.contains("PRIVATE") && !text.contains("80, 82, 73"), "{text}");
    }
}
