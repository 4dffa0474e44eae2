//! Who a process or a person is: SPIFFE IDs as a type.
//!
//! `spiffe://<trust-domain>/hub`, `…/cluster/<name>`, `…/cluster/<name>/node/<node>`, `…/user/<name>`.
//! A value of [`Identity`] is well formed by construction; text that is not one of these shapes has no identity.
//! Source: SPIFFE-ID specification, sections 2.1 to 2.3 (lower-case trust domain, no empty or dotted segments).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The authority part of a SPIFFE ID: lower-case letters, digits, dots, dashes and underscores, at most 255 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// One party of a ClusterSet, without its trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Identity {
    /// Any replica of the hub.
    Hub,
    /// The members (one or more replicas) of a cluster.
    Cluster(Arc<str>),
    /// One node's agent of a cluster.
    Node { cluster: Arc<str>, node: Arc<str> },
    /// A person or a program that uses the administration API.
    User(Arc<str>),
}

/// Why text is not an identity of this ClusterSet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("'{0}' is not a trust domain: use 1 to 255 of a-z, 0-9, '.', '-', '_'")]
    TrustDomain(String),
    #[error("'{0}' is not a name: {1}")]
    Name(String, &'static str),
    #[error("'{0}' is not a SPIFFE ID of Hanse")]
    Shape(String),
    #[error("'{0}' belongs to another trust domain than '{1}'")]
    OtherDomain(String, TrustDomain),
}

/// Longest URI that is looked at, in bytes (SPIFFE-ID, section 2.3 allows 2,048).
pub const MAX_URI_BYTES: usize = 2048;

impl TrustDomain {
    /// # Errors
    /// When a byte is not allowed, or the length is 0 or more than 255.
    pub fn new(name: &str) -> Result<Self, IdentityError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > 255 || !name.bytes().all(allowed) {
            return Err(IdentityError::TrustDomain(name.chars().take(64).collect()));
        }
        Ok(Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE ID of `identity` in this trust domain.
    pub fn uri(&self, identity: &Identity) -> String {
        format!("spiffe://{self}/{identity}")
    }

    /// The identity that `uri` names in this trust domain.
    ///
    /// # Errors
    /// When `uri` is of another trust domain, or of none of the four shapes.
    pub fn parse_uri(&self, uri: &str) -> Result<Identity, IdentityError> {
        let (domain, identity) = split_uri(uri)?;
        if domain != *self {
            return Err(IdentityError::OtherDomain(uri.to_owned(), self.clone()));
        }
        Ok(identity)
    }
}

/// The trust domain and identity that a SPIFFE ID names.
///
/// # Errors
/// When `uri` is not a SPIFFE ID of one of the four shapes.
pub fn split_uri(uri: &str) -> Result<(TrustDomain, Identity), IdentityError> {
    let shape = || IdentityError::Shape(uri.chars().take(128).collect());
    if uri.len() > MAX_URI_BYTES {
        return Err(shape());
    }
    let (domain, path) = uri.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')).ok_or_else(shape)?;
    Ok((TrustDomain::new(domain)?, path.parse()?))
}

impl Identity {
    /// # Errors
    /// When `name` is not a DNS label (RFC 1123, at most 63 bytes).
    pub fn cluster(name: &str) -> Result<Self, IdentityError> {
        check_label(name)?;
        Ok(Self::Cluster(name.into()))
    }

    /// # Errors
    /// When a name is not a DNS label or subdomain (RFC 1123, at most 63 and 253 bytes).
    pub fn node(cluster: &str, node: &str) -> Result<Self, IdentityError> {
        check_label(cluster)?;
        check_subdomain(node)?;
        Ok(Self::Node { cluster: cluster.into(), node: node.into() })
    }

    /// # Errors
    /// When `name` is not a DNS subdomain (RFC 1123, at most 253 bytes).
    pub fn user(name: &str) -> Result<Self, IdentityError> {
        check_subdomain(name)?;
        Ok(Self::User(name.into()))
    }

    /// The cluster that a member or an agent belongs to.
    pub fn cluster_name(&self) -> Option<&str> {
        match self {
            Self::Cluster(cluster) | Self::Node { cluster, .. } => Some(cluster),
            Self::Hub | Self::User(_) => None,
        }
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    /// Parses the path of a SPIFFE ID, without its leading slash.
    fn from_str(path: &str) -> Result<Self, Self::Err> {
        let segments: Vec<&str> = path.split('/').take(6).collect();
        match segments[..] {
            ["hub"] => Ok(Self::Hub),
            ["cluster", cluster] => Self::cluster(cluster),
            ["cluster", cluster, "node", node] => Self::node(cluster, node),
            ["user", name] => Self::user(name),
            _ => Err(IdentityError::Shape(path.chars().take(128).collect())),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub => f.write_str("hub"),
            Self::Cluster(cluster) => write!(f, "cluster/{cluster}"),
            Self::Node { cluster, node } => write!(f, "cluster/{cluster}/node/{node}"),
            Self::User(name) => write!(f, "user/{name}"),
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// # Errors
/// When `name` is not a DNS label: RFC 1123, 1 to 63 of a-z, 0-9 and inner dashes.
pub fn check_label(name: &str) -> Result<(), IdentityError> {
    let error = |why| IdentityError::Name(name.chars().take(64).collect(), why);
    if name.is_empty() || name.len() > 63 {
        return Err(error("use 1 to 63 bytes"));
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return Err(error("use a-z, 0-9 and '-'"));
    }
    if name.starts_with('-') || name.ends_with('-') {
        return Err(error("start and end with a letter or digit"));
    }
    Ok(())
}

/// # Errors
/// When `name` is not a DNS subdomain: labels joined by dots, at most 253 bytes.
pub fn check_subdomain(name: &str) -> Result<(), IdentityError> {
    if name.len() > 253 {
        return Err(IdentityError::Name(name.chars().take(64).collect(), "use at most 253 bytes"));
    }
    name.split('.').try_for_each(check_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_reads_back() {
        let domain = TrustDomain::new("hanse.local").unwrap();
        for identity in [
            Identity::Hub,
            Identity::cluster("train").unwrap(),
            Identity::node("train", "node-1.example").unwrap(),
            Identity::user("ada").unwrap(),
        ] {
            assert_eq!(domain.parse_uri(&domain.uri(&identity)).unwrap(), identity);
        }
    }

    #[test]
    fn other_shapes_have_no_identity() {
        let domain = TrustDomain::new("hanse.local").unwrap();
        for uri in [
            "",
            "spiffe://hanse.local",
            "spiffe://hanse.local/",
            "spiffe://hanse.local/hub/",
            "spiffe://hanse.local//hub",
            "spiffe://other.local/hub",
            "spiffe://HANSE.local/hub",
            "https://hanse.local/hub",
            "spiffe://hanse.local/cluster/",
            "spiffe://hanse.local/cluster/A",
            "spiffe://hanse.local/cluster/a/node/",
            "spiffe://hanse.local/cluster/a/node/b/c",
            "spiffe://hanse.local/cluster/../hub",
            "spiffe://hanse.local/cluster/%61",
            "spiffe://hanse.local/user/a?x=1",
            "spiffe://user@hanse.local/hub",
            "spiffe://hanse.local:1/hub",
        ] {
            assert!(domain.parse_uri(uri).is_err(), "{uri}");
        }
    }
}
