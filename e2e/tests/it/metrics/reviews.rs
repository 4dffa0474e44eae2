//! Metrics over TLS, for users whom a real API server authenticates and authorizes.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hanse_e2e::kubernetes::certificates::{Authority, Certified};
use hanse_e2e::kubernetes::{ApiServer, Options, TokenOptions, manifests, run, until};
use hanse_e2e::process::Process;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};

use crate::{chart, operator};

const PATIENCE: Duration = Duration::from_secs(60);
/// The longest time that an answer takes: a review, and its time limit.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// The name that the chart expects in the certificate.
pub(crate) const SERVER_NAME: &str = "hanse-metrics.hanse.svc";
/// The same for agents.
pub(crate) const AGENT_NAME: &str = "hanse-metrics-agents.hanse.svc";
/// Accounts: one that may read metrics, and others.
const ACCOUNTS: [&str; 3] = ["prometheus", "other", "gone"];

/// The status and the text that `/metrics` of a listener answers. Verifies the certificate.
pub(crate) fn scrape(to: SocketAddr, authority: &str, token: Option<&str>) -> anyhow::Result<(u16, String)> {
    scrape_as(to, SERVER_NAME, authority, token)
}

/// As [`scrape`], of a listener with a certificate for another name.
pub(crate) fn scrape_as(
    to: SocketAddr,
    name: &'static str,
    authority: &str,
    token: Option<&str>,
) -> anyhow::Result<(u16, String)> {
    hanse_identity::tls::install_provider();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes())?)?;
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let client = ClientConnection::new(Arc::new(config), ServerName::try_from(name)?)?;
    let tcp = TcpStream::connect_timeout(&to, ANSWER_WITHIN)?;
    tcp.set_read_timeout(Some(ANSWER_WITHIN))?;
    let mut stream = StreamOwned::new(client, tcp);
    let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n{token}\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| anyhow::anyhow!("not HTTP: {text}"))?, text))
}

/// What a listener answers to plain HTTP.
pub(crate) fn plain(to: SocketAddr, token: &str) -> String {
    let mut tcp = TcpStream::connect_timeout(&to, ANSWER_WITHIN).expect("connected");
    tcp.set_read_timeout(Some(ANSWER_WITHIN)).expect("set");
    let mut bytes = Vec::new();
    // The listener may close the connection at any time.
    let _ = write!(tcp, "GET /metrics HTTP/1.1\r\nHost: m\r\nAuthorization: Bearer {token}\r\n\r\n");
    let _ = tcp.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A Secret with the certificate of metrics, as cert-manager writes it.
pub(crate) fn secret(name: &str, authority: &Authority, server: &str) -> String {
    let Certified { certificate, key } = authority.server(&[server.to_owned()]).expect("a certificate");
    let encode = |text: &str| STANDARD.encode(text);
    let data = json!({"tls.crt": encode(&certificate), "tls.key": encode(&key), "ca.crt": encode(&authority.pem())});
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": name, "namespace": chart::NAMESPACE}, "data": data,
    })
    .to_string()
}

/// The rights of the chart, with metrics for the service account `prometheus`.
fn of_chart() -> Vec<Value> {
    let hub = chart::set(chart::set(chart::complete(), "member.enabled", json!(false)), "agent.enabled", json!(false));
    let reader = json!({"kind": "ServiceAccount", "name": "prometheus", "namespace": chart::NAMESPACE});
    let metrics = json!({"enabled": true, "tls": {"secretName": "metrics-tls"}, "readers": [reader]});
    let objects = chart::rendered(&chart::set(hub, "metrics", metrics));
    let kinds = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding"];
    objects.into_iter().filter(|it| it["kind"].as_str().is_some_and(|it| kinds.contains(&it))).collect()
}

/// A management cluster, and a hub without an operator that serves metrics.
struct World {
    server: ApiServer,
    folder: tempfile::TempDir,
    listen: SocketAddr,
    authority: Authority,
    hub: Option<Process>,
}

impl World {
    async fn start() -> Self {
        let (server, kubeconfig) = operator::management_with(Options::new("metrics"), &of_chart()).await;
        let client = server.client().await.expect("a client");
        for account in ACCOUNTS {
            let metadata = json!({"name": account, "namespace": chart::NAMESPACE});
            let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata});
            manifests::apply(&client, "test", &account.to_string()).await.expect("it is applied");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let ports = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let [hub, join, listen] = ports.map(|it| it.local_addr().expect("an address"));
        let authority = Authority::create("metrics").expect("an authority");
        let world = Self { server, folder, listen, authority, hub: None };
        world.certificate(&[SERVER_NAME.to_owned()]);
        let data = world.folder.path().join("hub");
        let program = |verb: &str| {
            let mut command = Command::new(crate::system::programs().join("hanse-hub"));
            command.arg(verb).arg(format!("--listen={hub}")).arg(format!("--join-listen={join}"));
            command.arg("--data").arg(&data);
            command
        };
        let made = program("init").output().expect("it runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut command = program("run");
        command.args(["--metrics-token-review", "--kubeconfig"]).arg(&kubeconfig);
        command.arg(format!("--metrics-listen={listen}"));
        command.arg("--metrics-certificate").arg(world.file("tls.crt"));
        command.arg("--metrics-key").arg(world.file("tls.key"));
        let log = world.folder.path().join("hub.log");
        let mut hub = Process::start_bound(command, &log).expect("it starts");
        assert!(hub.wait_for("hub is serving", PATIENCE), "{}", hub.log());
        Self { hub: Some(hub), ..world }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a certificate of the authority for these names.
    fn certificate(&self, names: &[String]) {
        let Certified { certificate, key } = self.authority.server(names).expect("a certificate");
        let write = |path: &Path, text: &str| {
            hanse_runtime::files::write_secret(path, text.as_bytes()).expect("written");
        };
        write(&self.file("tls.key"), &key);
        write(&self.file("tls.crt"), &certificate);
    }

    fn scrape(&self, token: &str) -> (u16, String) {
        let answer = scrape(self.listen, &self.authority.pem(), Some(token));
        answer.unwrap_or_else(|error| panic!("{error:#}\n{}", self.log()))
    }

    fn log(&self) -> String {
        self.hub.as_ref().map(Process::log).unwrap_or_default()
    }

    /// The answer to a token is this, as soon as the API server and the memory of the hub have followed.
    async fn until_answered(&self, token: &str, status: u16, words: &str) {
        let mut last = (0, String::new());
        let answered = until(PATIENCE, async || {
            last = self.scrape(token);
            last.0 == status && last.1.contains(words)
        });
        assert!(answered.await.is_some(), "not {status} {words}: {last:?}\n{}", self.log());
    }

    async fn token(&self, account: &str) -> String {
        self.server.token(chart::NAMESPACE, account, &TokenOptions::default()).await.expect("a token")
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        let output = self.server.kubectl().expect("kubectl").args(arguments).output().expect("it runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A token of `prometheus` that the key of the API server has signed, and that ends in `seconds`.
    fn signed(&self, seconds: i64) -> String {
        let get = ["-n", chart::NAMESPACE, "get", "serviceaccount", "prometheus", "-o", "jsonpath={.metadata.uid}"];
        let uid = self.kubectl(&get);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() as i64;
        let issuer = "https://kubernetes.default.svc.cluster.local";
        let account = json!({"name": "prometheus", "uid": uid});
        let claims = json!({
            "iss": issuer, "aud": [issuer], "sub": format!("system:serviceaccount:{}:prometheus", chart::NAMESPACE),
            "iat": now - 7_200, "nbf": now - 7_200, "exp": now + seconds,
            "kubernetes.io": {"namespace": chart::NAMESPACE, "serviceaccount": account},
        });
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let text = format!("{}.{}", encode(&json!({"alg": "ES256", "typ": "JWT"})), encode(&claims));
        let pem = std::fs::read(self.server.path("accounts.key")).expect("the key of service accounts");
        let der = rustls::pki_types::PrivatePkcs8KeyDer::from_pem_slice(&pem).expect("a key");
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der()).expect("a key");
        let signature = key.sign(&SystemRandom::new(), text.as_bytes()).expect("signed");
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }
}

#[test]
fn api_server_decides_who_reads_metrics() {
    run(async {
        let mut world = World::start().await;
        let prometheus = world.token("prometheus").await;
        world.until_answered(&prometheus, 200, "hanse_hub_clusters").await;
        let reason =
            "user \"system:serviceaccount:hanse:other\" needs the verb \"get\" on the nonResourceURL \"/metrics\"";
        world.until_answered(&world.token("other").await, 403, reason).await;
        for token in ["nonsense", "", &world.signed(-60), &world.signed(3_600).replace('.', "..")] {
            world.until_answered(token, 401, "missing or not valid").await;
        }
        // The one that has expired differs in its end only.
        world.until_answered(&world.signed(3_600), 200, "hanse_hub_clusters").await;
        let without = scrape(world.listen, &world.authority.pem(), None).expect("an answer");
        assert_eq!(without.0, 401, "{}", without.1);
        // A token ends with its account.
        let gone = world.token("gone").await;
        world.until_answered(&gone, 403, "hanse:gone").await;
        world.kubectl(&["-n", chart::NAMESPACE, "delete", "serviceaccount", "gone"]);
        world.until_answered(&gone, 401, "missing or not valid").await;
        // Another audience is not the API server's.
        let audiences = vec!["other".to_owned()];
        let other = TokenOptions { audiences, ..TokenOptions::default() };
        let other = world.server.token(chart::NAMESPACE, "prometheus", &other).await.expect("a token");
        world.until_answered(&other, 401, "missing or not valid").await;

        // Over TLS only, with a certificate that can be verified, and that is replaced.
        let answer = plain(world.listen, &prometheus);
        assert!(!answer.contains("HTTP/1.1") && !answer.contains("hanse_"), "{answer}");
        world.certificate(&["other.example".to_owned()]);
        let is_replaced = until(PATIENCE, async || scrape(world.listen, &world.authority.pem(), None).is_err()).await;
        assert!(is_replaced.is_some(), "{}", world.log());
        world.certificate(&[SERVER_NAME.to_owned()]);
        let is_back = until(PATIENCE, async || scrape(world.listen, &world.authority.pem(), None).is_ok()).await;
        assert!(is_back.is_some(), "{}", world.log());

        // Each right of the hub is needed, and named.
        let role = "clusterrole/hanse-metrics-review";
        let rules = world.kubectl(&["get", role, "-o", "jsonpath={.rules}"]);
        let all: Vec<Value> = serde_json::from_str(&rules).expect("JSON");
        assert_eq!(all.len(), 2);
        for (index, missing) in
            ["tokenreviews.authentication.k8s.io", "subjectaccessreviews.authorization.k8s.io"].into_iter().enumerate()
        {
            let mut fewer = all.clone();
            fewer.remove(index);
            world.kubectl(&["patch", role, "--type=merge", "-p", &json!({"rules": fewer}).to_string()]);
            let words = format!("this process may not create {missing}");
            // Tokens that are not known yet: a known one is allowed for a while.
            let mut last = String::new();
            let is_named = until(PATIENCE, async || {
                let (status, text) = world.scrape(&world.token("prometheus").await);
                last = text;
                // Of one source, one new token a second is reviewed.
                tokio::time::sleep(Duration::from_secs(1)).await;
                status == 503 && last.contains(&words)
            });
            assert!(is_named.await.is_some(), "without {missing}: {last}\n{}", world.log());
            world.kubectl(&["patch", role, "--type=merge", "-p", &json!({"rules": all}).to_string()]);
        }
        assert!(world.log().contains("tokens cannot be reviewed"), "{}", world.log());
        world.until_answered(&world.token("prometheus").await, 200, "hanse_hub_clusters").await;

        // Without the API server: who was allowed, is; others get no answer.
        let new = world.token("prometheus").await;
        world.server.kill().expect("killed");
        assert_eq!(world.scrape(&prometheus).0, 200);
        world.until_answered(&new, 503, "the API server does not answer").await;
        world.server.start_again().await.expect("it starts");
        world.until_answered(&new, 200, "hanse_hub_clusters").await;
        // No token is logged.
        let tokens = [&prometheus, &new, &gone];
        assert!(tokens.iter().all(|token| !world.log().contains(&***token)));
    });
}
