//! Join tokens: what they say, and what the hub keeps of them.
//!
//! `hanse-join.v1.<cluster>.<trust domain, base64url>.<root fingerprint>.<id>.<secret, base64url>`. The fingerprint lets the newcomer
//! recognise the hub; the secret lets the hub recognise the newcomer. The hub keeps only the secret's hash.

use crate::identity::{TrustDomain, check_label};
use crate::keys::Fingerprint;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

const PREFIX: &str = "hanse-join.v1";
/// Longest token, in characters: a label, a trust domain of 255 bytes and 200 more.
pub const MAX_TOKEN_BYTES: usize = 1024;

/// A join token. Its `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub cluster: String,
    pub trust_domain: TrustDomain,
    /// SHA-256 of the ClusterSet's root certificate.
    pub root: Fingerprint,
    pub id: String,
    secret: Zeroizing<[u8; 32]>,
}

/// Random bytes.
///
/// # Errors
/// When the random generator fails.
pub fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| "the random generator failed".to_owned())?;
    Ok(bytes)
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("cluster", &self.cluster).field("id", &self.id).finish_non_exhaustive()
    }
}

impl Token {
    /// Makes a new one.
    ///
    /// # Errors
    /// When the random generator fails.
    pub fn generate(cluster: &str, trust_domain: TrustDomain, root: Fingerprint) -> Result<Self, String> {
        let (id, secret) = (random::<8>()?, Zeroizing::new(random()?));
        let id = id.iter().map(|b| format!("{b:02x}")).collect();
        Ok(Self { cluster: cluster.to_owned(), trust_domain, root, id, secret })
    }

    /// The text that is handed over. A secret.
    pub fn to_text(&self) -> String {
        let domain = URL_SAFE_NO_PAD.encode(self.trust_domain.as_str());
        let secret = Zeroizing::new(URL_SAFE_NO_PAD.encode(*self.secret));
        format!("{PREFIX}.{}.{domain}.{}.{}.{}", self.cluster, self.root, self.id, *secret)
    }

    /// Reads a token's text; none when it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let parts: Vec<&str> = text.strip_prefix(PREFIX)?.strip_prefix('.')?.split('.').collect();
        let [cluster, domain, root, id, secret] = parts[..] else { return None };
        check_label(cluster).ok()?;
        let domain = String::from_utf8(URL_SAFE_NO_PAD.decode(domain).ok()?).ok()?;
        if id.len() != 16 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        Some(Self {
            cluster: cluster.to_owned(),
            trust_domain: TrustDomain::new(&domain).ok()?,
            root: Fingerprint::from_hex(root)?,
            id: id.to_owned(),
            secret: Zeroizing::new(Zeroizing::new(URL_SAFE_NO_PAD.decode(secret).ok()?).as_slice().try_into().ok()?),
        })
    }

    /// What the hub keeps of the secret.
    pub fn secret_hash(&self) -> Fingerprint {
        Fingerprint::of(&*self.secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_and_hides_its_secret() {
        let domain = TrustDomain::new("hanse.local").unwrap();
        let token = Token::generate("train", domain, Fingerprint::of(b"root")).unwrap();
        let text = token.to_text();
        assert_eq!(Token::parse(&format!("{text}\n")), Some(token.clone()));
        let secret = text.rsplit_once('.').unwrap().1;
        assert!(!format!("{token:?}").contains(secret));
        for wrong in ["", "hanse-join.v1", &text[..text.len() - 4], &text.replace("v1", "v2"), &"x".repeat(5000)] {
            assert_eq!(Token::parse(wrong), None, "{wrong}");
        }
    }
}
