use std::net::Ipv4Addr;
use std::path::Path;

use http_body_util::BodyExt as _;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::authorization::MIN_TOKEN_BYTES;
use super::*;
use crate::files;

/// The status, the headers and the body of a response.
async fn call(page: &Page, method: &str, path: &str, authorization: &str) -> (u16, header::HeaderMap, String) {
    let mut request = Request::builder().method(method).uri(path);
    if !authorization.is_empty() {
        request = request.header(header::AUTHORIZATION, authorization);
    }
    let peer = Ipv4Addr::LOCALHOST.into();
    let response = answer(page, peer, &request.body(()).expect("a request")).await;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (status, headers, String::from_utf8(body.to_vec()).expect("text"))
}

#[tokio::test]
async fn metrics_are_open_metrics_text_for_reading_only() {
    let page = Page::Metrics(Metrics::default(), Authorization::Everyone);
    let (status, headers, body) = call(&page, "GET", "/metrics", "").await;
    assert_eq!((status, &headers[header::CONTENT_TYPE]), (200, &header::HeaderValue::from_static(OPEN_METRICS)));
    assert!(body.ends_with("# EOF\n") && body.contains("\nhanse_task_panics_total{task="), "{body}");
    assert_eq!(call(&page, "HEAD", "/metrics", "").await.0, 200);
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let (status, headers, body) = call(&page, method, "/metrics", "").await;
        assert_eq!((status, &headers[header::ALLOW], &*body), (405, &"GET, HEAD".parse().expect("a value"), "method"));
    }
    assert_eq!(call(&page, "GET", "/healthz", "").await.0, 404);
}

#[tokio::test]
async fn readiness_names_what_it_waits_for() {
    let health = Health::default();
    let (store, serving) = (health.condition("store"), health.condition("serving"));
    let page = Page::Health(health);
    let (status, headers, body) = call(&page, "GET", "/readyz", "").await;
    assert_eq!((status, &*body), (503, "waiting for: store, serving\n"));
    assert_eq!(headers[header::CONTENT_TYPE], TEXT);
    store.set(true);
    assert_eq!(call(&page, "GET", "/readyz", "").await.2, "waiting for: serving\n");
    serving.set(true);
    let (status, _, body) = call(&page, "GET", "/readyz", "").await;
    assert_eq!((status, &*body), (200, "ready"));
    assert_eq!(call(&page, "POST", "/readyz", "").await.0, 405);
}

#[tokio::test]
async fn token_file_can_be_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("token");
    let [old, new] = ["a".repeat(MIN_TOKEN_BYTES), "b".repeat(MIN_TOKEN_BYTES)];
    let write = |token: &str| files::write_secret(&path, format!("{token}\n").as_bytes()).expect("written");
    write(&old);
    let file = Arc::new(TokenFile::new(&path).expect("a token"));
    let page = Page::Metrics(Metrics::default(), Authorization::TokenFile(Arc::clone(&file)));
    let status = async |authorization: String| call(&page, "GET", "/metrics", &authorization).await.0;
    for (scheme, expected) in [("Bearer ", 200), ("bearer ", 200), ("BEARER  ", 200), ("Basic ", 401), ("", 401)] {
        assert_eq!(status(format!("{scheme}{old}")).await, expected, "{scheme}");
    }
    let (refused, headers, _) = call(&page, "GET", "/metrics", "").await;
    assert_eq!((refused, headers[header::WWW_AUTHENTICATE].as_bytes()), (401, &b"Bearer"[..]));
    write(&new);
    assert_eq!(status(format!("Bearer {old}")).await, 401);
    assert_eq!(status(format!("Bearer {new}")).await, 200);
    // A token that is too short admits no request.
    write("short");
    assert_eq!(status("Bearer short".to_owned()).await, 503);
    assert!(!file.warn(&io::ErrorKind::InvalidData.into()), "the request above has warned");
}

/// A certificate for `metrics.example` in `folder`, with options that serve it on a free port of loopback.
fn with_certificate(folder: &Path) -> (MetricsOptions, rustls::ClientConfig) {
    let made = rcgen::generate_simple_self_signed(vec!["metrics.example".to_owned()]).expect("a certificate");
    let [certificate, key] = ["tls.crt", "tls.key"].map(|name| folder.join(name));
    std::fs::write(&certificate, made.cert.pem()).expect("written");
    files::write_secret(&key, made.signing_key.serialize_pem().as_bytes()).expect("written");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let listen = Some("127.0.0.1:0".parse().expect("an address"));
    (MetricsOptions { listen, certificate: Some(certificate), key: Some(key), ..MetricsOptions::default() }, client)
}

/// Allows one token.
#[derive(Debug)]
struct One;

impl Review for One {
    fn review<'a>(&'a self, token: &'a str) -> futures::future::BoxFuture<'a, Result<Verdict, Unreviewed>> {
        let verdict = match token {
            "allowed" => Ok(Verdict::Allowed),
            "forbidden" => Ok(Verdict::Forbidden { user: "eve".to_owned() }),
            "down" => Err(Unreviewed::Unavailable("the API server does not answer".to_owned())),
            _ => Ok(Verdict::Unauthenticated),
        };
        Box::pin(async { verdict })
    }
}

async fn read_all(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    let mut text = Vec::new();
    let _ = stream.write_all(request.as_bytes()).await;
    let _ = stream.read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn beyond_loopback_metrics_need_tls_and_authorization() {
    let folder = tempfile::tempdir().expect("a folder");
    let (tls, _) = with_certificate(folder.path());
    let token = folder.path().join("token");
    files::write_secret(&token, "t".repeat(MIN_TOKEN_BYTES).as_bytes()).expect("written");
    let outside = Some("0.0.0.0:0".parse().expect("an address"));
    let plain = MetricsOptions { certificate: None, key: None, ..tls.clone() };
    let (metrics, shutdown) = (Metrics::default(), Shutdown::default());
    let with = |options: &MetricsOptions, review: bool, file: bool| MetricsOptions {
        listen: outside,
        token_review: review,
        token_file: file.then(|| token.clone()),
        ..options.clone()
    };
    for (options, is_served) in [
        (with(&plain, false, false), false),
        (with(&plain, false, true), false),
        (with(&plain, true, false), false),
        (with(&tls, false, false), false),
        (with(&tls, false, true), true),
        (with(&tls, true, false), true),
        (plain.clone(), true),
        (tls.clone(), true),
    ] {
        let served = serve_metrics(&options, &metrics, Ok(Reviews::new(One)), &shutdown).await;
        match served {
            Ok(address) => assert!(is_served && address.is_some(), "{options:?}"),
            Err(error) => assert!(!is_served && matches!(error, MonitorError::NotLoopback(_)), "{options:?}: {error}"),
        }
    }
    let without = serve_metrics(&with(&tls, true, false), &metrics, Err("no API server"), &shutdown).await;
    assert!(matches!(without, Err(MonitorError::NoReviews("no API server"))));
    shutdown.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn metrics_over_tls_are_for_reviewed_tokens() {
    let folder = tempfile::tempdir().expect("a folder");
    let (options, client) = with_certificate(folder.path());
    let options = MetricsOptions { token_review: true, ..options };
    let shutdown = Shutdown::default();
    let served = serve_metrics(&options, &Metrics::default(), Ok(Reviews::new(One)), &shutdown).await;
    let address = served.expect("served").expect("an address");
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let connect = async |name: &'static str| {
        let tcp = TcpStream::connect(address).await.expect("connected");
        connector.connect(ServerName::try_from(name).expect("a name"), tcp).await
    };
    assert!(connect("other.example").await.is_err(), "the certificate is for another name");
    for (token, status, reason) in [
        ("Authorization: Bearer allowed\r\n", "200", "# EOF"),
        (
            "Authorization: Bearer forbidden\r\n",
            "403",
            "user \"eve\" needs the verb \"get\" on the nonResourceURL \"/metrics\"",
        ),
        ("Authorization: Bearer down\r\n", "503", "the token cannot be reviewed: the API server does not answer"),
        ("Authorization: Bearer none\r\n", "401", "the bearer token is missing or not valid"),
        ("Authorization: Basic allowed\r\n", "401", "not valid"),
        ("", "401", "not valid"),
    ] {
        let stream = connect("metrics.example").await.expect("a handshake");
        let request = format!("GET /metrics HTTP/1.1\r\nHost: m\r\nConnection: close\r\n{token}\r\n");
        let text = read_all(stream, &request).await;
        assert!(text.starts_with(&format!("HTTP/1.1 {status} ")) && text.contains(reason), "{token}: {text}");
        assert_eq!(text.contains("hanse_"), status == "200", "{token}: {text}");
    }
    // Plain HTTP is not answered.
    let tcp = TcpStream::connect(address).await.expect("connected");
    let text = read_all(tcp, "GET /metrics HTTP/1.1\r\nHost: m\r\nAuthorization: Bearer allowed\r\n\r\n").await;
    assert!(!text.contains("HTTP/1.1") && !text.contains("hanse_"), "{text}");
    // A head that is too large.
    let stream = connect("metrics.example").await.expect("a handshake");
    let large = format!("GET /metrics HTTP/1.1\r\nHost: m\r\nAuthorization: Bearer {}\r\n\r\n", "x".repeat(64 << 10));
    assert!(!read_all(stream, &large).await.contains(" 200 "));
    shutdown.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn slow_clients_keep_no_place_from_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let (options, client) = with_certificate(folder.path());
    let shutdown = Shutdown::default();
    let served = serve_metrics(&options, &Metrics::default(), Err("none"), &shutdown).await;
    let address = served.expect("served").expect("an address");
    // More connections than there are places, which send nothing: only some are accepted.
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS * 2 {
        silent.push(TcpStream::connect(address).await.expect("connected"));
    }
    // Another source has a place at once.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.2:0".parse().expect("an address")).expect("bound");
    let tcp = socket.connect(address).await.expect("connected");
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let name = ServerName::try_from("metrics.example").expect("a name");
    let began = std::time::Instant::now();
    let stream = connector.connect(name.clone(), tcp).await.expect("a handshake");
    let request = "GET /metrics HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n";
    assert!(read_all(stream, request).await.starts_with("HTTP/1.1 200 "));
    assert!(began.elapsed() < HANDSHAKE_WITHIN, "it did not wait for the silent ones: {:?}", began.elapsed());
    // The silent ones are closed in time, and their source has places again.
    for mut stream in silent {
        let closed = tokio::time::timeout(CONNECTION_LIFETIME, stream.read(&mut [0; 64])).await;
        assert!(!matches!(closed, Err(_) | Ok(Ok(1..))), "{closed:?}");
    }
    let tcp = TcpStream::connect(address).await.expect("connected");
    let stream = connector.connect(name, tcp).await.expect("a handshake");
    assert!(read_all(stream, request).await.starts_with("HTTP/1.1 200 "));
    shutdown.drain(Duration::from_secs(5)).await;
}
