//! The proxy to an API server, as `kubectl` chooses it: `proxy-url` of the kubeconfig, or else that of the environment.
//!
//! The client library reads HTTPS_PROXY too, but not NO_PROXY, and accepts no address without a scheme. Rules and order are those of Go's
//! `golang.org/x/net/http/httpproxy`, which `kubectl` and Helm use.

use std::net::IpAddr;

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use kube::config::Kubeconfig;

/// The variables of the environment, of which the capital ones take precedence.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    https: Option<String>,
    http: Option<String>,
    no: String,
}

/// What a proxy may be for.
#[derive(Debug, Clone, Copy)]
pub struct Destination<'a> {
    pub is_https: bool,
    /// A name or an address; IPv6 addresses may be in brackets.
    pub host: &'a str,
    /// `None` for that of the scheme.
    pub port: Option<u16>,
}

impl Environment {
    pub fn of_process() -> Self {
        Self::from(|name| std::env::var(name).ok())
    }

    fn from(variable: impl Fn(&str) -> Option<String>) -> Self {
        let first = |names: [&str; 2]| names.into_iter().filter_map(&variable).find(|value| !value.is_empty());
        Self {
            https: first(["HTTPS_PROXY", "https_proxy"]),
            http: first(["HTTP_PROXY", "http_proxy"]),
            no: first(["NO_PROXY", "no_proxy"]).unwrap_or_default(),
        }
    }

    /// The URL of the proxy, in a form that the client library accepts; `None`: connect directly.
    ///
    /// # Errors
    /// As [`url`]. The error names the variable.
    pub fn proxy(&self, to: Destination<'_>) -> anyhow::Result<Option<String>> {
        let (name, proxy) = match to.is_https {
            true => ("HTTPS_PROXY", &self.https),
            false => ("HTTP_PROXY", &self.http),
        };
        let Some(proxy) = proxy.as_ref().filter(|_| !self.is_direct(to)) else { return Ok(None) };
        let has_scheme = proxy.contains("://");
        let proxy = if has_scheme { proxy.clone() } else { format!("http://{proxy}") };
        url(&proxy).map(Some).with_context(|| format!("read the proxy of the environment ({name})"))
    }

    /// Whether the environment has no proxy for a destination: NO_PROXY names it, or it is on this machine.
    fn is_direct(&self, to: Destination<'_>) -> bool {
        let host = to.host.trim_matches(['[', ']']).to_ascii_lowercase();
        let address = host.parse::<IpAddr>().ok();
        let port = to.port.unwrap_or(if to.is_https { 443 } else { 80 });
        let is_named = |entry: &str| {
            if entry == "*" {
                return true;
            }
            if let (Ok(net), Some(address)) = (entry.parse::<IpNet>(), address) {
                return net.contains(&address);
            }
            let (name, of_port) = split_port(entry);
            if of_port.is_some_and(|it| it.parse() != Ok(port)) {
                return false;
            }
            if let Ok(named) = name.parse::<IpAddr>() {
                return address == Some(named);
            }
            // `*.example` and `.example` are the names below it, and `example` is that name, too.
            let domain = name.strip_prefix('*').filter(|it| it.starts_with('.')).unwrap_or(name);
            match domain.strip_prefix('.') {
                Some(domain) => is_below(&host, domain),
                None => !domain.is_empty() && (host == domain || is_below(&host, domain)),
            }
        };
        host == "localhost"
            || address.is_some_and(|it| it.is_loopback())
            || self.no.split(',').map(|it| it.trim().to_ascii_lowercase()).any(|entry| is_named(&entry))
    }
}

/// Whether a name is in a domain, and not the domain itself.
fn is_below(host: &str, domain: &str) -> bool {
    !domain.is_empty() && host.strip_suffix(domain).is_some_and(|it| it.len() > 1 && it.ends_with('.'))
}

/// An entry of NO_PROXY, without its port. Of an IPv6 address, a port is known by the brackets.
fn split_port(entry: &str) -> (&str, Option<&str>) {
    if let Some((address, rest)) = entry.strip_prefix('[').and_then(|it| it.split_once(']')) {
        return (address, rest.strip_prefix(':'));
    }
    match entry.split_once(':') {
        Some((name, port)) if !port.contains(':') => (name, Some(port)),
        _ => (entry, None),
    }
}

/// Takes `proxy-url` of the context's cluster out of a kubeconfig.
///
/// A placeholder takes its place: without one, the client library would use the proxy of the environment, also where NO_PROXY excludes
/// it. The caller sets the proxy of the configuration afterwards.
///
/// # Errors
/// As [`url`].
pub fn take(kubeconfig: &mut Kubeconfig, context: Option<&str>) -> anyhow::Result<Option<String>> {
    const PLACEHOLDER: &str = "http://localhost";
    let context = context.or(kubeconfig.current_context.as_deref());
    let of_context = kubeconfig.contexts.iter().find(|it| Some(it.name.as_str()) == context);
    let cluster = of_context.and_then(|it| it.context.as_ref()).map(|it| it.cluster.clone());
    let mut taken = None;
    for named in &mut kubeconfig.clusters {
        let Some(it) = &mut named.cluster else { continue };
        let declared = it.proxy_url.replace(PLACEHOLDER.to_owned()).filter(|url| !url.is_empty());
        // Of clusters with the same name, the first one counts.
        if Some(&named.name) == cluster.as_ref() && taken.is_none() {
            taken = Some(declared);
        }
    }
    let doing = || format!("read proxy-url of cluster {}", cluster.as_deref().unwrap_or_default());
    taken.flatten().map(|declared| url(&declared).with_context(doing)).transpose()
}

/// Checks the URL of a proxy. Errors do not contain it, since it may contain a password.
///
/// # Errors
/// When its scheme is not supported, or its user and password cannot be sent as they are.
fn url(text: &str) -> anyhow::Result<String> {
    let Some((scheme, rest)) = text.split_once("://") else {
        bail!("it has no scheme: write http://, https:// or socks5:// before its host");
    };
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        // Names are resolved by the proxy in both cases.
        "socks5" | "socks5h" => "socks5",
        "http" => "http",
        "https" => "https",
        other => bail!("its scheme {other} is not supported: http, https and socks5 are"),
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let (user, host) = authority.rsplit_once('@').map_or(("", authority), |(user, host)| (user, host));
    if host.is_empty() {
        bail!("it has no host");
    }
    if !user.is_empty() && scheme == "socks5" {
        bail!("it has a user, which is supported for http and https only");
    }
    // The client library sends it without decoding it, which the proxy would refuse.
    if user.contains('%') {
        bail!("its user or password has a character that must be encoded by %, which is not supported");
    }
    Ok(format!("{scheme}://{authority}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        let find = |name: &str| variables.iter().find(|(it, _)| *it == name).map(|(_, value)| (*value).to_owned());
        Environment::from(find)
    }

    fn to(text: &str) -> Destination<'_> {
        let (scheme, rest) = text.split_once("://").expect("a URL");
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, Some(port.parse().expect("a port"))),
            _ => (rest, None),
        };
        Destination { is_https: scheme == "https", host, port }
    }

    #[test]
    fn environment_has_a_proxy_for_each_scheme() {
        let both = environment(&[("HTTPS_PROXY", "proxy.example:3128"), ("http_proxy", "http://other.example")]);
        for (server, expected) in [
            ("https://api.example:6443", Some("http://proxy.example:3128")),
            ("http://api.example", Some("http://other.example")),
            // Those of this machine are never reached by a proxy.
            ("https://localhost:6443", None),
            ("https://127.0.0.1:6443", None),
            ("https://[::1]:6443", None),
        ] {
            assert_eq!(both.proxy(to(server)).expect("it is read").as_deref(), expected, "{server}");
        }
        let capital = environment(&[("https_proxy", "http://small"), ("HTTPS_PROXY", "socks5h://capital:1080")]);
        assert_eq!(capital.proxy(to("https://a")).expect("it is read").as_deref(), Some("socks5://capital:1080"));
        let empty = environment(&[("HTTPS_PROXY", ""), ("https_proxy", "http://small")]);
        assert_eq!(empty.proxy(to("https://a")).expect("it is read").as_deref(), Some("http://small"));
        assert_eq!(Environment::default().proxy(to("https://a")).expect("it is read"), None);
    }

    #[test]
    fn no_proxy_excludes_names_addresses_nets_and_ports() {
        for (no, server, is_direct) in [
            ("api.example", "https://api.example:6443", true),
            ("api.example", "https://API.example", true),
            ("example", "https://api.example", true),
            ("example", "https://notexample", false),
            (".example", "https://api.example", true),
            (".api.example", "https://api.example", false),
            ("*.example", "https://api.example", true),
            ("*.api.example", "https://api.example", false),
            ("api.example:6443", "https://api.example:6443", true),
            ("api.example:443", "https://api.example:6443", false),
            ("api.example:443", "https://api.example", true),
            ("10.0.0.0/8", "https://10.1.2.3:6443", true),
            ("10.0.0.0/8", "https://11.1.2.3:6443", false),
            ("10.1.2.3", "https://10.1.2.3", true),
            ("10.1.2.3:443", "https://10.1.2.3:6443", false),
            ("2001:db8::/32", "https://[2001:db8::1]:6443", true),
            ("2001:db8::1", "https://[2001:db8::1]:6443", true),
            ("[2001:db8::1]:443", "https://[2001:db8::1]:6443", false),
            (" other , api.example ", "https://api.example", true),
            ("*", "https://api.example", true),
            ("", "https://api.example", false),
            (",.,:", "https://api.example", false),
        ] {
            let proxied = environment(&[("HTTPS_PROXY", "http://proxy"), ("NO_PROXY", no)]).proxy(to(server));
            assert_eq!(proxied.expect("it is read").is_none(), is_direct, "{no:?}: {server}");
        }
    }

    #[test]
    fn unsupported_proxies_are_refused_without_their_password() {
        for (text, named) in [
            ("ftp://user:secret@proxy", "ftp"),
            ("socks5://user:secret@proxy", "http and https only"),
            ("http://user:secret%40@proxy", "%"),
            ("http://", "no host"),
        ] {
            let error = environment(&[("HTTPS_PROXY", text)]).proxy(to("https://a")).expect_err(text);
            let error = format!("{error:#}");
            assert!(error.contains(named) && error.contains("HTTPS_PROXY") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn proxy_of_the_context_is_taken() {
        let text = "apiVersion: v1
kind: Config
current-context: one
contexts:
- {name: one, context: {cluster: one, user: user}}
- {name: two, context: {cluster: two, user: user}}
clusters:
- {name: one, cluster: {server: 'https://one.example', proxy-url: 'http://proxy.example:3128'}}
- {name: two, cluster: {server: 'https://two.example'}}
";
        let taken = |context| {
            let mut kubeconfig = Kubeconfig::from_yaml(text).expect("a kubeconfig");
            let taken = take(&mut kubeconfig, context).expect("it is read");
            let clusters = kubeconfig.clusters.iter().filter_map(|it| it.cluster.as_ref());
            assert!(clusters.clone().count() == 2 && clusters.into_iter().all(|it| it.proxy_url.is_some()));
            taken
        };
        assert_eq!(taken(None).as_deref(), Some("http://proxy.example:3128"));
        assert_eq!(taken(Some("two")), None);
        assert_eq!(taken(Some("missing")), None);
    }
}
