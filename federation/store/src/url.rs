//! Where a store is, as a URL. The scheme chooses the implementation.

mod etcd;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use etcd::EtcdUrl;

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// The embedded store: one file, used by one process at a time.
    ///
    /// `file:PATH` is one file on this machine (`file:hub/hub.redb`, `file:///var/lib/hanse/hub.redb`): everything after the
    /// scheme is the path, without percent-encoding. A path that begins with two slashes is read as a URL with an empty host.
    File(PathBuf),
    /// etcd v3, used by any number of processes.
    Etcd(Box<EtcdUrl>),
}

/// Why a text is not the URL of a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreUrlError {
    #[error("a store is given as a URL: file:PATH or etcds://HOST:PORT,…/PREFIX?ca=FILE")]
    NoScheme,
    #[error("unknown store scheme {0:?}: this version supports file:, etcd: (without TLS) and etcds: (with TLS)")]
    Scheme(String),
    #[error("a file: URL names a file on this machine: file:PATH or file:///PATH")]
    Host,
    #[error("the path of the store is missing: file:PATH")]
    NoPath,
    #[error("{0}")]
    Etcd(String),
}

impl StoreUrl {
    /// The store in the file at `path`.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::File(path.into())
    }

    /// The file of an embedded store.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Etcd(_) => None,
        }
    }
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        let (scheme, rest) = text.split_once(':').ok_or(StoreUrlError::NoScheme)?;
        let is = |name: &str| scheme.eq_ignore_ascii_case(name);
        if is("etcd") || is("etcds") {
            let url = EtcdUrl::read(is("etcds"), rest).map_err(StoreUrlError::Etcd)?;
            return Ok(Self::Etcd(Box::new(url)));
        }
        if !is("file") {
            return Err(StoreUrlError::Scheme(scheme.chars().take(20).collect()));
        }
        let path = match rest.strip_prefix("//") {
            Some(rest) if rest.starts_with('/') => rest,
            Some(_) => return Err(StoreUrlError::Host),
            None => rest,
        };
        if path.is_empty() {
            return Err(StoreUrlError::NoPath);
        }
        Ok(Self::File(path.into()))
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Etcd(url) => url.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_urls_of_files() {
        for (text, path) in [
            ("file:hub/hub.redb", "hub/hub.redb"),
            ("file:/var/lib/hub.redb", "/var/lib/hub.redb"),
            ("file:///var/lib/hub.redb", "/var/lib/hub.redb"),
            ("FILE:a b:c", "a b:c"),
        ] {
            assert_eq!(text.parse(), Ok(StoreUrl::file(path)), "{text}");
        }
        let url = StoreUrl::file("/x/y");
        assert_eq!(url.to_string().parse(), Ok(url));
    }

    #[test]
    fn refuses_what_is_not_a_store() {
        for (text, expected) in [
            ("", StoreUrlError::NoScheme),
            ("hub/hub.redb", StoreUrlError::NoScheme),
            ("consul://127.0.0.1:8500", StoreUrlError::Scheme("consul".to_owned())),
            ("file://server/hub.redb", StoreUrlError::Host),
            ("file:", StoreUrlError::NoPath),
        ] {
            assert_eq!(text.parse::<StoreUrl>(), Err(expected), "{text}");
        }
    }
}
