//! The URL of a store on etcd.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The prefix of a URL without a path.
const DEFAULT_PREFIX: &str = "/hanse";
const DEFAULT_PORT: u16 = 2379;
/// A node that lost its leader answers reads after up to seven seconds: twice that.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);
/// Nodes in a URL: an etcd cluster has at most seven voting members, and proxies or learners beside them.
const MAX_HOSTS: usize = 16;
/// Longest prefix, in bytes. [`MAX_TRANSACTION_BYTES`](crate::MAX_TRANSACTION_BYTES) counts on it.
const MAX_PREFIX_BYTES: usize = 128;
/// Shortest and longest `timeout`, in seconds. An election of etcd takes one to two seconds.
const TIMEOUTS: std::ops::RangeInclusive<u64> = 2..=60;

/// A store on etcd: `etcd://HOST:PORT,HOST:PORT,…/PREFIX?NAME=VALUE&…` without TLS, `etcds://…` with TLS.
///
/// The port is 2379 and the prefix `/hanse` unless given. Stores with different prefixes do not see each other. The settings, of
/// which values may be percent-encoded:
///
/// | name | |
/// |---|---|
/// | `ca` | file of the certificate authorities that etcd's certificates are verified with (PEM); required with TLS |
/// | `cert`, `key` | files of the client certificate with its chain, and of its private key (PEM) |
/// | `server-name` | the name in etcd's certificates, if they do not name the hosts of the URL |
/// | `user`, `password-file` | user of etcd, and the file with its password; only with TLS or on loopback addresses |
/// | `timeout` | seconds within which an operation succeeds or fails, with all its retries: 2 to 60, by default 15 |
///
/// A URL contains no secret: it appears in logs and argument lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdUrl {
    pub tls: bool,
    /// Each with its port.
    pub hosts: Vec<String>,
    /// Begins with a slash, does not end with one.
    pub prefix: String,
    pub ca: Option<PathBuf>,
    /// The client certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    pub server_name: Option<String>,
    /// A user and the file of its password.
    pub user: Option<(String, PathBuf)>,
    pub timeout: Duration,
}

impl EtcdUrl {
    pub(crate) fn read(tls: bool, rest: &str) -> Result<Self, String> {
        let rest = rest.strip_prefix("//").ok_or("the URL of etcd begins with etcd:// or etcds://")?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        if hosts.contains('@') {
            return Err("the URL contains a user before @: use ?user=NAME&password-file=FILE".to_owned());
        }
        let hosts: Vec<String> = hosts.split(',').map(host).collect::<Result<_, _>>()?;
        if hosts.len() > MAX_HOSTS {
            return Err(format!("{} hosts: at most {MAX_HOSTS}", hosts.len()));
        }
        let prefix = match path.trim_end_matches('/') {
            "" => DEFAULT_PREFIX.to_owned(),
            path => path.to_owned(),
        };
        let permitted = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
        if prefix.len() > MAX_PREFIX_BYTES || !prefix.chars().all(permitted) || prefix.contains("//") {
            return Err(format!(
                "prefix {prefix:?}: at most {MAX_PREFIX_BYTES} letters, digits, '.', '_', '-' and single slashes"
            ));
        }
        let mut url = Self {
            tls,
            hosts,
            prefix,
            ca: None,
            certificate: None,
            server_name: None,
            user: None,
            timeout: DEFAULT_TIMEOUT,
        };
        url.settings(query)?;
        url.check()?;
        Ok(url)
    }

    fn settings(&mut self, query: &str) -> Result<(), String> {
        let (mut certificate, mut key, mut user, mut password) = (None, None, None, None);
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value).ok_or_else(|| format!("{name}: {value:?} is not percent-encoded UTF-8"))?;
            if value.is_empty() {
                return Err(format!("{name}: the value is missing: {name}=VALUE"));
            }
            if seen.contains(&name) {
                return Err(format!("{name} is given twice"));
            }
            seen.push(name);
            match name {
                "ca" => self.ca = Some(value.into()),
                "cert" => certificate = Some(PathBuf::from(value)),
                "key" => key = Some(PathBuf::from(value)),
                "server-name" => self.server_name = Some(value),
                "user" => user = Some(value),
                "password-file" => password = Some(PathBuf::from(value)),
                "timeout" => {
                    let seconds = value.parse().ok().filter(|it| TIMEOUTS.contains(it));
                    let seconds = seconds.ok_or_else(|| format!("timeout: {value:?} is not 2 to 60 seconds"))?;
                    self.timeout = Duration::from_secs(seconds);
                }
                "password" => return Err("password: a URL contains no secret: use password-file=FILE".to_owned()),
                _ => {
                    return Err(format!(
                        "unknown setting {name:?}: the settings are ca, cert, key, server-name, user, password-file, timeout"
                    ));
                }
            }
        }
        self.certificate = both(certificate, key, "cert and key")?;
        self.user = both(user, password, "user and password-file")?;
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        if self.tls && self.ca.is_none() {
            return Err("etcds: requires ca=FILE, the certificate authorities of etcd".to_owned());
        }
        if !self.tls && (self.ca.is_some() || self.certificate.is_some() || self.server_name.is_some()) {
            return Err("ca, cert, key and server-name require TLS: use etcds:// in place of etcd://".to_owned());
        }
        if !self.tls && self.user.is_some() && !self.hosts.iter().all(|host| is_loopback(host)) {
            return Err("user and password-file require TLS: use etcds:// in place of etcd://".to_owned());
        }
        Ok(())
    }
}

/// Both or neither.
fn both<A, B>(first: Option<A>, second: Option<B>, names: &str) -> Result<Option<(A, B)>, String> {
    match (first, second) {
        (Some(first), Some(second)) => Ok(Some((first, second))),
        (None, None) => Ok(None),
        _ => Err(format!("{names} are given together or not at all")),
    }
}

/// A host with its port.
fn host(text: &str) -> Result<String, String> {
    let wrong = || format!("host {text:?}: HOST:PORT, with an IPv6 address in brackets, and a comma between hosts");
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, port.parse::<u16>().map_err(|_| wrong())?),
        _ => (text, DEFAULT_PORT),
    };
    let is_valid = match name.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok()),
        None => !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')),
    };
    if is_valid && port != 0 { Ok(format!("{name}:{port}")) } else { Err(wrong()) }
}

fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16).and_then(|it| u8::try_from(it).ok());
            let (high, low) = (digit(rest.next())?, digit(rest.next())?);
            bytes.push(high << 4 | low);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// Encodes what would end a value.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '%' | '&' | '=' | '?' | '#' | ' ' => encoded.push_str(&format!("%{:02X}", u32::from(c))),
            c => encoded.push(c),
        }
    }
    encoded
}

impl fmt::Display for EtcdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "etcds" } else { "etcd" };
        write!(f, "{scheme}://{}{}", self.hosts.join(","), self.prefix)?;
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let timeout = (self.timeout != DEFAULT_TIMEOUT).then(|| self.timeout.as_secs().to_string());
        let settings = [
            ("ca", self.ca.as_ref().map(path)),
            ("cert", self.certificate.as_ref().map(|it| path(&it.0))),
            ("key", self.certificate.as_ref().map(|it| path(&it.1))),
            ("server-name", self.server_name.clone()),
            ("user", self.user.as_ref().map(|it| it.0.clone())),
            ("password-file", self.user.as_ref().map(|it| path(&it.1))),
            ("timeout", timeout),
        ];
        let given = settings.into_iter().filter_map(|(name, value)| Some((name, value?)));
        for (number, (name, value)) in given.enumerate() {
            write!(f, "{}{name}={}", if number == 0 { '?' } else { '&' }, encode(&value))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::StoreUrl;
    use super::*;

    fn read(text: &str) -> Result<EtcdUrl, String> {
        match text.parse::<StoreUrl>() {
            Ok(StoreUrl::Etcd(url)) => Ok(*url),
            Ok(other) => panic!("{text}: {other}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn reads_hosts_prefix_and_settings() {
        let url = read("etcd://a").unwrap();
        assert_eq!((url.tls, &*url.prefix, url.timeout), (false, "/hanse", Duration::from_secs(15)));
        assert_eq!(url.hosts, ["a:2379"]);
        let text = "etcds://e-1.local:12379,[2001:db8::1],[::1]:1/team/hanse/?ca=/c%20a&cert=c&key=k&server-name=e&user=u&\
                    password-file=/p&timeout=7";
        let url = read(text).unwrap();
        assert_eq!(url.hosts, ["e-1.local:12379", "[2001:db8::1]:2379", "[::1]:1"]);
        assert_eq!((url.tls, &*url.prefix, url.timeout), (true, "/team/hanse", Duration::from_secs(7)));
        assert_eq!((url.ca.clone(), url.certificate.clone()), (Some("/c a".into()), Some(("c".into(), "k".into()))));
        assert_eq!((url.user.clone(), url.server_name.clone()), (Some(("u".into(), "/p".into())), Some("e".into())));
        assert_eq!(read(&url.to_string()), Ok(url));
        assert!(read("etcd://127.0.0.1,[::1],localhost/?user=u&password-file=p").is_ok(), "loopback addresses");
    }

    #[test]
    fn refuses_what_is_wrong_and_says_what_to_do() {
        for (text, expected) in [
            ("etcd:a", "begins with etcd://"),
            ("etcd://", "HOST:PORT"),
            ("etcd://a,,b", "HOST:PORT"),
            ("etcd://a:0", "HOST:PORT"),
            ("etcd://::1", "in brackets"),
            ("etcd://u:s3cr3t@a", "password-file"),
            ("etcd://a/x y", "prefix"),
            ("etcd://a/x//y", "prefix"),
            ("etcd://a?tls=1", "unknown setting \"tls\""),
            ("etcd://a?password=s3cr3t", "password-file"),
            ("etcd://a?timeout=1", "2 to 60"),
            ("etcd://a?timeout=5&timeout=6", "twice"),
            ("etcd://a?ca=", "missing"),
            ("etcd://a?ca=%zz", "percent-encoded"),
            ("etcd://a?ca=x", "etcds://"),
            ("etcds://a", "ca=FILE"),
            ("etcds://a?ca=x&cert=y", "together"),
            ("etcd://a?user=x&password-file=y", "etcds://"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
            assert!(!error.contains("s3cr3t"), "{text}: {error}");
        }
    }
}
