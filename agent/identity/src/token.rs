//! Tokens of clusters and of nodes.
//!
//! `hanse-join.v1.<cluster>.<trust domain, base64url>.<authority's fingerprint>.<id>.<secret, base64url>`; of a node it begins with
//! `hanse-node.v1`. The fingerprint authenticates the hub, or the member, to the newcomer; the secret authenticates the
//! newcomer. The hub and the member store only the hash of the secret.

use crate::keys::Fingerprint;
use crate::spiffe::{TrustDomain, check_label};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

/// Who presents a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// A cluster, to its hub.
    Cluster,
    /// A node, to its cluster's member.
    Node,
}

/// Why a text is not a token of the expected kind. The message contains nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("something that is not a token")]
    Malformed,
    #[error(
        "a node token (`hanse-node.v1…`), for `hanse-agent run`; a cluster joins with a cluster token from `hanse token create`"
    )]
    OfNode,
    #[error(
        "a cluster token (`hanse-join.v1…`), for `hanse-member run` and `join`; a node enrols with a node token from \
         `hanse-member node-token create`"
    )]
    OfCluster,
}

impl TokenKind {
    const ALL: [Self; 2] = [Self::Cluster, Self::Node];

    /// What the text of a token begins with, before the first part that differs between tokens.
    pub fn label(self) -> &'static str {
        match self {
            Self::Cluster => "hanse-join.v1",
            Self::Node => "hanse-node.v1",
        }
    }
}

/// Longest token, in characters: a label, a trust domain of 255 bytes and 200 more.
pub const MAX_TOKEN_BYTES: usize = 1024;

/// A join token. Its `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub kind: TokenKind,
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
    pub fn generate(
        kind: TokenKind,
        cluster: &str,
        trust_domain: TrustDomain,
        root: Fingerprint,
    ) -> Result<Self, String> {
        let (id, secret) = (random::<8>()?, Zeroizing::new(random()?));
        let id = id.iter().map(|b| format!("{b:02x}")).collect();
        Ok(Self { kind, cluster: cluster.to_owned(), trust_domain, root, id, secret })
    }

    /// The text that is handed over. A secret.
    pub fn to_text(&self) -> String {
        let domain = URL_SAFE_NO_PAD.encode(self.trust_domain.as_str());
        let secret = Zeroizing::new(URL_SAFE_NO_PAD.encode(*self.secret));
        format!("{}.{}.{domain}.{}.{}.{}", self.kind.label(), self.cluster, self.root, self.id, *secret)
    }

    /// Reads the text of a token of this kind.
    ///
    /// # Errors
    /// When it is not a token, or one of the other kind.
    pub fn parse(kind: TokenKind, text: &str) -> Result<Self, TokenError> {
        let token = Self::parse_any(text).ok_or(TokenError::Malformed)?;
        match (kind, token.kind) {
            (TokenKind::Cluster, TokenKind::Node) => Err(TokenError::OfNode),
            (TokenKind::Node, TokenKind::Cluster) => Err(TokenError::OfCluster),
            (TokenKind::Cluster, TokenKind::Cluster) | (TokenKind::Node, TokenKind::Node) => Ok(token),
        }
    }

    fn parse_any(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let (kind, rest) = TokenKind::ALL
            .into_iter()
            .find_map(|kind| Some((kind, text.strip_prefix(kind.label())?.strip_prefix('.')?)))?;
        let parts: Vec<&str> = rest.split('.').collect();
        let [cluster, domain, root, id, secret] = parts[..] else { return None };
        check_label(cluster).ok()?;
        let domain = String::from_utf8(URL_SAFE_NO_PAD.decode(domain).ok()?).ok()?;
        if id.len() != 16 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        Some(Self {
            kind,
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
        for kind in TokenKind::ALL {
            let domain = TrustDomain::new("hanse.local").unwrap();
            let token = Token::generate(kind, "train", domain, Fingerprint::of(b"root")).unwrap();
            let text = token.to_text();
            assert_eq!(Token::parse(kind, &format!("{text}\n")), Ok(token.clone()));
            let secret = text.rsplit_once('.').unwrap().1;
            assert!(!format!("{token:?}").contains(secret));
            let other = text.replace("v1", "v2");
            for wrong in ["", "hanse-join.v1", "hanse-node.v1.", &text[..text.len() - 4], &other, &"x".repeat(5000)] {
                assert_eq!(Token::parse(kind, wrong), Err(TokenError::Malformed), "{wrong}");
            }
        }
    }

    #[test]
    fn token_of_the_other_kind_is_named_as_such() {
        let text = |kind| {
            let domain = TrustDomain::new("hanse.local").unwrap();
            Token::generate(kind, "train", domain, Fingerprint::of(b"root")).unwrap().to_text()
        };
        let (cluster, node) = (text(TokenKind::Cluster), text(TokenKind::Node));
        assert!(cluster.starts_with("hanse-join.v1.train.") && node.starts_with("hanse-node.v1.train."));
        assert_eq!(Token::parse(TokenKind::Cluster, &node), Err(TokenError::OfNode));
        assert_eq!(Token::parse(TokenKind::Node, &cluster), Err(TokenError::OfCluster));
    }
}
