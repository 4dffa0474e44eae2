//! The listener of the admission webhook: slow clients, client certificates, and floods of reviews that lead to nothing.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_hub::admission::{self, Address, Admission, ClientOptions};
use hanse_hub::management::Monitor;
use hanse_hub::metrics::HubMetrics;
use hanse_hub::registry::records::{ChangeAction, ChangeRecord, encode};
use hanse_hub::registry::{ChangeError, Registry, change_key};
use hanse_runtime::metrics::Metrics;
use hanse_runtime::shutdown::Shutdown;
use hanse_store::Transaction;
use kube::{Client, Config};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A review that is decided without the API server.
const REVIEW: &str = r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","kind":{"group":"other","version":"v1","kind":"Pod"},"operation":"CREATE","userInfo":{"username":"ada"}}}"#;

/// Accepts every server: these tests are about clients.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Chain and key of a client.
type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

async fn registry(shutdown: &Shutdown) -> Registry {
    let store = hanse_store::in_memory();
    Registry::open(store, Duration::from_secs(30), hanse_hub::registry::Clock::default(), shutdown).await.unwrap()
}

async fn start(clients: ClientOptions, shutdown: &Shutdown) -> Admission {
    hanse_identity::tls::install_provider();
    let client = Client::try_from(Config::new("https://127.0.0.1:1".parse().unwrap())).unwrap();
    let options = admission::Options {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        address: Address::url("https://127.0.0.1:443").unwrap(),
        configuration: "hanse-hub".to_owned(),
        lifetime: Duration::from_secs(3_600),
        clients,
    };
    let metrics = HubMetrics::new(&Metrics::default());
    admission::start(options, client, registry(shutdown).await, &metrics, &Monitor::new("hub"), shutdown).await.unwrap()
}

/// A connection from a loopback address.
async fn connect(
    to: SocketAddr,
    from: [u8; 4],
    identity: Option<Identity>,
) -> std::io::Result<TlsStream<tokio::net::TcpStream>> {
    let config = ClientConfig::builder().dangerous().with_custom_certificate_verifier(Arc::new(AnyServer));
    let config = match identity {
        Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
        None => config.with_no_client_auth(),
    };
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    let tcp = socket.connect(to).await?;
    let name = ServerName::IpAddress(IpAddr::from(Ipv4Addr::LOCALHOST).into());
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

/// Sends a review, and returns the answer.
async fn review(stream: TlsStream<tokio::net::TcpStream>) -> String {
    send(stream, REVIEW).await
}

async fn send(mut stream: TlsStream<tokio::net::TcpStream>, review: &str) -> String {
    let head = format!(
        "POST {} HTTP/1.1\r\nHost: hub\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{review}",
        "/admit",
        review.len()
    );
    let mut text = Vec::new();
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

fn is_decided(answer: &str) -> bool {
    answer.starts_with("HTTP/1.1 200 ") && answer.contains("is not known to this hub")
}

#[tokio::test]
async fn slow_reviews_keep_no_place_from_others() {
    let shutdown = Shutdown::default();
    let listening = start(ClientOptions::default(), &shutdown).await.listening;
    // Twice as many as are decided at once: each has sent a part of its review.
    let mut slow = Vec::new();
    for _ in 0..32 {
        let mut stream = connect(listening, [127, 0, 0, 1], None).await.unwrap();
        let part = "POST /admit HTTP/1.1\r\nHost: hub\r\nContent-Length: 1000000\r\n\r\n{";
        stream.write_all(part.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    let began = Instant::now();
    let answer = review(connect(listening, [127, 0, 0, 1], None).await.unwrap()).await;
    assert!(is_decided(&answer), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(2), "it waited for the slow ones: {:?}", began.elapsed());
    // Those are refused in time.
    let mut text = [0; 64];
    let count = tokio::time::timeout(Duration::from_secs(30), slow[0].read(&mut text)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&text[..count]).starts_with("HTTP/1.1 408 "));
    drop(slow);

    // One source cannot take all connections.
    let mut idle = Vec::new();
    for _ in 0..128 {
        idle.push(connect(listening, [127, 0, 0, 3], None).await);
    }
    assert!(idle.iter().any(Result::is_ok) && idle.iter().any(Result::is_err));
    let answer = review(connect(listening, [127, 0, 0, 4], None).await.unwrap()).await;
    assert!(is_decided(&answer), "{answer}");
    shutdown.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn reviews_that_would_take_much_memory_are_not_read() {
    let shutdown = Shutdown::default();
    let listening = start(ClientOptions::default(), &shutdown).await.listening;
    let with = |spec: &str| {
        let object = format!(r#","object":{{"metadata":{{"name":"a"}},"spec":{spec}}},"#);
        REVIEW.replacen(r#","operation""#, &(object + r#""operation""#), 1)
    };
    let list = |item: &str, bytes: usize| format!("[{}]", vec![item; bytes / (item.len() + 1)].join(","));
    // Small objects take a hundred times their text.
    for item in [r#"{"":0}"#, "[]", "0", "{}"] {
        let answer = send(connect(listening, [127, 0, 0, 1], None).await.unwrap(), &with(&list(item, 1 << 20))).await;
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.ends_with("too many fields"), "{item}: {answer}");
    }
    // The rules of a long policy, and a long text.
    let rule = r#"{"action":"Allow","source":{"selector":"app == 'client'"},"destination":{"ports":[8443]}}"#;
    for spec in [list(rule, 1 << 20), format!("\"{}\"", "x".repeat(6 << 20))] {
        let answer = send(connect(listening, [127, 0, 0, 1], None).await.unwrap(), &with(&spec)).await;
        assert!(is_decided(&answer), "{answer}");
    }
    shutdown.drain(Duration::from_secs(10)).await;
}

/// An authority for clients: its certificate in a file, and what signs.
fn authority(file: &Path) -> rcgen::CertifiedIssuer<'static, rcgen::KeyPair> {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    std::fs::write(file, issuer.pem()).unwrap();
    issuer
}

fn client(issuer: &rcgen::CertifiedIssuer<'static, rcgen::KeyPair>, name: &str) -> Identity {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, issuer).unwrap();
    (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
}

#[tokio::test]
async fn only_api_servers_of_the_authority_send_reviews() {
    let folder = tempfile::tempdir().unwrap();
    let [own, other] = ["own.pem", "other.pem"].map(|name| folder.path().join(name));
    let (issuer, stranger) = (authority(&own), authority(&other));
    for (names, admitted) in [(&[][..], &["kube-apiserver", "node"][..]), (&["kube-apiserver"], &["kube-apiserver"])] {
        let shutdown = Shutdown::default();
        let names = names.iter().map(|name: &&str| (*name).to_owned()).collect();
        let clients = ClientOptions { authorities: Some(own.clone()), names };
        let listening = start(clients, &shutdown).await.listening;
        let answer = async |identity| match connect(listening, [127, 0, 0, 1], identity).await {
            Ok(stream) => review(stream).await,
            Err(error) => error.to_string(),
        };
        for name in ["kube-apiserver", "node"] {
            let answered = answer(Some(client(&issuer, name))).await;
            assert_eq!(is_decided(&answered), admitted.contains(&name), "{name}: {answered}");
            let answered = answer(Some(client(&stranger, name))).await;
            assert!(!answered.contains("HTTP/1.1"), "{name}, of another authority: {answered}");
        }
        let answered = answer(None).await;
        assert!(!answered.contains("HTTP/1.1"), "without a certificate: {answered}");
        shutdown.drain(Duration::from_secs(10)).await;
    }
}

#[tokio::test]
async fn one_user_leaves_room_for_the_changes_of_others() {
    let shutdown = Shutdown::default();
    let registry = registry(&shutdown).await;
    let record = |who: &str, digest: usize| ChangeRecord {
        at: 0,
        who: who.to_owned(),
        action: ChangeAction::Apply,
        generation: 1,
        digest: digest.to_string(),
        proposed: false,
    };
    let refused = async |uid: &str, record: &ChangeRecord, words: &str| {
        let refused = registry.record_change(uid, record).await;
        assert!(matches!(&refused, Err(ChangeError::Limit(text)) if text.contains(words)), "{uid}: {refused:?}");
    };
    // Versions of one object, and authors of one version.
    for digest in 0..64 {
        registry.record_change("object", &record("mallory", digest)).await.unwrap();
    }
    refused("object", &record("ada", 64), "64 unfinished changes of this object").await;
    for author in 0..16 {
        registry.record_change("version", &record(&format!("user {author}"), 0)).await.unwrap();
    }
    refused("version", &record("ada", 0), "16 unfinished changes of this version").await;
    shutdown.drain(Duration::from_secs(10)).await;

    // A user who has sent as many as may be, and all of the room.
    for (users, refusals) in [
        (&["mallory"][..], &[("mallory", "5000 unfinished changes of user mallory")][..]),
        (
            &["a", "b", "c", "d"],
            &[("a", "5000 unfinished changes of user a"), ("ada", "20000 unfinished changes of all users")],
        ),
    ] {
        let store = hanse_store::in_memory();
        let all: Vec<(String, ChangeRecord)> = users
            .iter()
            .flat_map(|user| (0..5_000).map(move |number| (format!("{user} {number}"), record(user, 0))))
            .collect();
        for some in all.chunks(64) {
            let put = |transaction: Transaction, (uid, record): &(String, ChangeRecord)| {
                transaction.put(change_key(uid, &record.id()).unwrap(), encode(record))
            };
            store.commit(some.iter().fold(Transaction::default(), put)).await.unwrap();
        }
        let shutdown = Shutdown::default();
        let clock = hanse_hub::registry::Clock::default();
        let registry = Registry::open(store, Duration::from_secs(30), clock, &shutdown).await.unwrap();
        for (user, words) in refusals {
            let refused = registry.record_change("another", &record(user, 0)).await;
            assert!(matches!(&refused, Err(ChangeError::Limit(text)) if text.contains(words)), "{user}: {refused:?}");
        }
        if users.len() == 1 {
            registry.record_change("another", &record("ada", 0)).await.unwrap();
        }
        shutdown.drain(Duration::from_secs(10)).await;
    }
}
