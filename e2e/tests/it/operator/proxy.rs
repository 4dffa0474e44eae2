//! Commands with a kubeconfig reach API servers through a proxy, as `kubectl` does.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use hanse_e2e::go;
use hanse_e2e::kubernetes::{ApiServer, Etcd, Options, run};
use serde_json::{Value, json};

use super::text;

/// A name that is in the certificates of API servers, and that only the proxy knows.
const NAME: &str = "kubernetes.default.svc";

/// An HTTP proxy that connects to one server, whatever is requested.
struct Proxy {
    address: SocketAddr,
    /// The destinations, and the credentials, of all requests so far.
    seen: Arc<Mutex<Vec<(String, String)>>>,
}

impl Proxy {
    /// Ends with the process.
    fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let (address, seen) = (listener.local_addr().expect("an address"), Arc::default());
        let shared = Arc::clone(&seen);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let seen = Arc::clone(&shared);
                // What a client does not get, its command reports.
                std::thread::spawn(move || drop(tunnel(&client, server, &seen)));
            }
        });
        Self { address, seen }
    }

    /// The requests since the last call.
    fn take(&self) -> Vec<(String, String)> {
        std::mem::take(&mut *self.seen.lock().expect("no panic"))
    }
}

fn tunnel(mut client: &TcpStream, server: SocketAddr, seen: &Mutex<Vec<(String, String)>>) -> io::Result<()> {
    let (mut to, mut authorization) = (String::new(), String::new());
    for line in BufReader::new(client).lines() {
        let line = line?;
        if let Some(rest) = line.strip_prefix("CONNECT ") {
            to = rest.split(' ').next().unwrap_or_default().to_owned();
        } else if let Some((_, value)) =
            line.split_once(':').filter(|it| it.0.eq_ignore_ascii_case("proxy-authorization"))
        {
            authorization = value.trim().to_owned();
        } else if line.is_empty() {
            break;
        }
    }
    seen.lock().expect("no panic").push((to, authorization));
    let server = TcpStream::connect(server)?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let (mut from_server, mut to_client) = (server.try_clone()?, client.try_clone()?);
    let back = std::thread::spawn(move || {
        let copied = io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Write);
        copied
    });
    io::copy(&mut client, &mut &server)?;
    let _ = server.shutdown(Shutdown::Write);
    drop(back.join());
    Ok(())
}

#[test]
fn commands_reach_the_api_server_through_a_proxy() {
    run(async {
        let etcd = Etcd::start().expect("etcd starts");
        let server = ApiServer::start(&etcd, Options::new("management")).await.expect("it is ready");
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
        let applied = server.kubectl().expect("kubectl").args(["apply", "--server-side", "-f"]).arg(crds).output();
        assert!(applied.expect("it runs").status.success());
        let proxy = Proxy::start(server.address());
        let port = server.address().port();
        let url = format!("https://{NAME}:{port}");
        let admin: Value =
            serde_json::from_slice(&std::fs::read(server.kubeconfig()).expect("it is read")).expect("JSON");
        let kubeconfig = |name: &str, change: Value| {
            let mut config = admin.clone();
            for (key, value) in change.as_object().expect("an object") {
                config["clusters"][0]["cluster"][key] = value.clone();
            }
            server.write_kubeconfig(name, &config).expect("it is written")
        };
        let helm = go::Program::Helm.build().expect("Helm is built");
        let hanse = |kubeconfig: &Path, variables: &[(&str, &str)], arguments: &[&str]| {
            let mut command = Command::new(crate::system::programs().join("hanse"));
            for name in ["HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"] {
                command.env_remove(name).env_remove(name.to_lowercase());
            }
            command.env("PATH", helm.parent().expect("a folder")).env("HOME", server.path("home"));
            command.args(arguments).arg("--kubeconfig").arg(kubeconfig).envs(variables.iter().copied());
            text(&command.output().expect("it runs"))
        };
        let get = ["get", "tiers", "-o", "name"];
        let through = vec![(format!("{NAME}:{port}"), String::new())];

        // That of the kubeconfig, whatever the environment says.
        let declared = kubeconfig("declared", json!({"server": url, "proxy-url": format!("http://{}", proxy.address)}));
        for variables in [&[][..], &[("NO_PROXY", "*")], &[("HTTPS_PROXY", "http://127.0.0.1:1")]] {
            let (read, text) = hanse(&declared, variables, &get);
            assert!(read, "{variables:?}: {text}");
            assert_eq!(proxy.take(), through, "{variables:?}");
        }
        let password = format!("http://user:secret@{}", proxy.address);
        let (read, text) = hanse(&kubeconfig("password", json!({"server": url, "proxy-url": password})), &[], &get);
        assert!(read, "{text}");
        assert_eq!(proxy.take(), [(format!("{NAME}:{port}"), "Basic dXNlcjpzZWNyZXQ=".to_owned())]);

        // The client of install, join and uninstall, and Helm.
        let (removed, text) = hanse(&declared, &[], &["uninstall"]);
        assert!(!removed && text.contains("no Helm release hanse in namespace hanse"), "{text}");
        let seen = proxy.take();
        assert!(seen.len() > 1 && seen.iter().all(|it| *it == through[0]), "{seen:?}");

        // That of the environment, unless NO_PROXY excludes the server.
        let plain = kubeconfig("plain", json!({"server": url}));
        let of_environment = [("HTTPS_PROXY", &*proxy.address.to_string())];
        let (read, text) = hanse(&plain, &of_environment, &get);
        assert!(read, "{text}");
        assert_eq!(proxy.take(), through);
        let (read, text) = hanse(&plain, &[of_environment[0], ("NO_PROXY", ".svc")], &get);
        assert!(!read && text.contains("dns error"), "only the proxy knows the name: {text}");
        assert_eq!(proxy.take(), []);
        // An API server on this machine is never behind a proxy.
        let (read, text) = hanse(&server.kubeconfig(), &of_environment, &get);
        assert!(read, "{text}");
        assert_eq!(proxy.take(), []);
        let unsupported = kubeconfig("unsupported", json!({"server": url, "proxy-url": "ftp://user:secret@proxy"}));
        let (read, text) = hanse(&unsupported, &[], &get);
        assert!(!read && text.contains("proxy-url of cluster management") && text.contains("ftp"), "{text}");
        assert!(!text.contains("secret"), "{text}");
    });
}
