//! Callers with valid keys that claim another identity.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hanse_identity::ca::Ca;
use hanse_identity::keys::{Certificate, Credentials, Key};
use hanse_identity::tls::{
    Connections, CredentialStore, IncomingLimits, ServerTls, TlsClient, Trust, http2_server, incoming,
};
use hanse_identity::{Identity, TrustDomain};
use hanse_proto::federation::v1 as wire;
use hanse_proto::federation::v1::administration_client::AdministrationClient;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::support::{SOON, TestHub, open};

const HOUR: Duration = Duration::from_secs(3600);

/// What a stolen authority can sign: anything. Ours would refuse, so this goes past it.
fn forge(authority: &Ca, domain: &TrustDomain, identity: &Identity) -> Credentials {
    let key = Key::generate().unwrap();
    let pair = rcgen::KeyPair::from_pem(&key.to_pem()).unwrap();
    let issuer_key = rcgen::KeyPair::from_pem(&authority.credentials().key.to_pem()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&authority.certificate().der, issuer_key).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(domain.uri(identity).as_str().try_into().unwrap())];
    params.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = SystemTime::now().into();
    params.not_after = (SystemTime::now() + HOUR).into();
    let certificate = params.signed_by(&pair, &issuer).unwrap();
    Credentials::new(key, Certificate::from_der(certificate.der()).unwrap()).unwrap()
}

/// Whether a TLS server that shows `credentials`, and its authority along, is taken for the hub by `client`.
async fn is_taken_for_the_hub(client: &TlsClient, credentials: &Credentials, chain: &[Certificate]) -> bool {
    let certificates = std::iter::once(&credentials.certificate).chain(chain).map(|c| c.der.clone()).collect();
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(
        rcgen::KeyPair::from_pem(&credentials.key.to_pem()).unwrap().serialize_der(),
    );
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates, key.into())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        if let Ok(stream) = TlsAcceptor::from(Arc::new(config)).accept(stream).await {
            tokio::time::sleep(SOON).await;
            drop(stream);
        }
    });
    let taken = client.connect(&address).await.is_ok();
    serving.abort();
    taken
}

/// Whether the main listener of the hub accepts these credentials.
async fn is_served(test: &TestHub, credentials: Credentials) -> bool {
    let channel = open(credentials, &test.folder.path().join("ca.pem"), &test.hub.address.to_string()).await;
    let Ok(channel) = channel else { return false };
    AdministrationClient::new(channel).status(wire::StatusRequest {}).await.is_ok()
}

#[tokio::test]
async fn an_intermediate_speaks_for_nobody_at_the_hub() {
    let test = TestHub::start().await;
    let (train, serve) = (test.member("train").await, test.member("serve").await);
    let domain = test.hub.authority.trust_domain();
    let authority = train.authority();
    for identity in ["hub", "user/admin", "cluster/serve", "cluster/train", "cluster/train/node/n"] {
        let identity: Identity = identity.parse().unwrap();
        let forged = forge(&authority, domain, &identity);
        assert!(!is_served(&test, forged.clone()).await, "{identity} at the hub");
        for client in [train.hub_client().unwrap(), serve.hub_client().unwrap()] {
            let chain = [authority.certificate().clone(), train.root().clone()];
            assert!(!is_taken_for_the_hub(&client, &forged, &chain).await, "{identity} as the hub");
        }
    }
    // The intermediate itself, shown as a leaf.
    assert!(!is_served(&test, authority.credentials().clone()).await);
    // The same machinery does take the hub for the hub, so that the refusals above mean something.
    let real = test.hub.authority.hub_credentials().unwrap();
    assert!(is_taken_for_the_hub(&train.hub_client().unwrap(), &real, &[]).await);
    // A member is not the hub either, though the root itself issued its certificate.
    assert!(!is_taken_for_the_hub(&serve.hub_client().unwrap(), &train.credentials().current(), &[]).await);
}

#[tokio::test]
async fn a_certificate_of_the_root_for_nobody_who_is_registered_is_not_served() {
    let test = TestHub::start().await;
    test.member("train").await;
    let ca = test.hub.authority.ca();
    for identity in ["user/admin", "user/nobody", "cluster/train", "cluster/nobody"] {
        let credentials = ca.issue_credentials(&identity.parse().unwrap(), HOUR, SystemTime::now()).unwrap();
        assert!(!is_served(&test, credentials).await, "{identity} with a key that is not registered");
    }
    let other = TestHub::start().await;
    let data = other.folder.path();
    let foreign = Credentials::read(&data.join("admin.key"), &data.join("admin.pem")).unwrap();
    assert!(!is_served(&test, foreign).await, "an administrator of another ClusterSet");
}

#[tokio::test]
async fn nobody_but_a_member_exchanges() {
    use hanse_proto::federation::v1::exchange_client::ExchangeClient;
    let test = TestHub::start().await;
    let data = test.folder.path();
    let admin = Credentials::read(&data.join("admin.key"), &data.join("admin.pem")).unwrap();
    let channel = open(admin, &data.join("ca.pem"), &test.hub.address.to_string()).await.unwrap();
    let mut client = ExchangeClient::new(channel);
    let refused = client.publish(tokio_stream::empty()).await.expect_err("a user is no cluster");
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    let refused = client.watch(tokio_stream::empty()).await.expect_err("a user is no cluster");
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
}

#[tokio::test]
async fn members_and_agents_know_only_their_own_intermediate() {
    let test = TestHub::start().await;
    let (train, serve) = (test.member("train").await, test.member("serve").await);
    let cluster = Identity::cluster("train").unwrap();
    let node = Identity::node("train", "n1").unwrap();
    let (ours, theirs) = (train.authority(), serve.authority());
    let issue = |ca: &Ca, identity: &Identity| ca.issue_credentials(identity, HOUR, SystemTime::now()).unwrap();

    // The member's listener for its agents.
    let accept = |identity: &Identity| matches!(identity, Identity::Node { .. });
    let trust = Trust::new(ours.certificate(), accept).unwrap();
    let store = CredentialStore::new(issue(&ours, &cluster)).unwrap();
    let (connections, stop) = (Connections::default(), CancellationToken::new());
    let tls = ServerTls::mutual(store, &trust).unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let listener = incoming(any, tls, IncomingLimits::default(), connections.clone(), stop.clone()).await.unwrap();
    let address = listener.address().to_string();
    let routes = tonic::service::Routes::default();
    tokio::spawn(http2_server().add_routes(routes).serve_with_incoming_shutdown(listener, stop.cancelled_owned()));

    // Whether the member lets this agent in. TLS 1.3 clients learn of a refusal only with the first answer.
    let enters = async |credentials: Credentials, authority: &Ca| {
        let trust = Trust::new(authority.certificate(), |identity| matches!(identity, Identity::Cluster(_))).unwrap();
        let client = TlsClient::mutual(CredentialStore::new(credentials).unwrap(), &trust).unwrap();
        let Ok(connection) = client.connect(&address).await else { return false };
        let answer = AdministrationClient::new(connection.channel).status(wire::StatusRequest {}).await;
        answer.is_err_and(|status| status.code() == tonic::Code::Unimplemented)
    };
    assert!(enters(issue(&ours, &node), &ours).await);
    assert!(!enters(issue(&ours, &node), &theirs).await, "an agent of serve does not take train for its member");
    let stranger = forge(&theirs, test.hub.authority.trust_domain(), &node);
    assert!(!enters(stranger, &ours).await, "serve's authority cannot make a node of train");
    let of_root = forge(test.hub.authority.ca(), test.hub.authority.trust_domain(), &node);
    assert!(!enters(of_root, &ours).await, "the root is not known here");
    assert!(!enters(issue(&ours, &cluster), &ours).await, "a member is no agent");
}
