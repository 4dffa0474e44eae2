//! The opening side. A [`Connection`] is one TLS connection and never reconnects by itself, so that its owner decides when
//! state must be resumed.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};

use super::cause::{Cause, Stranger};
use super::connection::{BoundedStream, CountedSocket, Peer, STALLED};
use super::server::key_exchange;
use super::verify::{algorithms, verify_directly};
use super::{ALPN, CredentialStore, Presents, Trust, VERSIONS, provider};
use crate::keys::{Certificate, Fingerprint, KeyError};
use crate::spiffe::Identity;

/// Opening a connection, with its handshake, takes at most this long.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("connect to {0}")]
    Connect(String, #[source] Cause),
    #[error("open HTTP/2 to {0}")]
    Http2(String, #[source] tonic::transport::Error),
    #[error("the certificate of {0} cannot be read")]
    Certificate(String, #[source] KeyError),
}

impl ClientError {
    /// Whether another attempt may succeed without a change on this side.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Connect(_, cause) => cause.is_passing(),
            Self::Http2(..) => true,
            Self::Certificate(..) => false,
        }
    }

    /// Whether the server's certificate is from an authority that is not trusted here.
    pub fn is_of_other_authority(&self) -> bool {
        matches!(self, Self::Connect(_, Cause::OtherAuthority))
    }

    /// Whether nothing listens at the address.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Connect(_, Cause::Refused))
    }
}

/// Opens connections to one kind of server.
#[derive(Clone)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    credentials: Option<CredentialStore>,
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsClient").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

/// One open connection.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Fails for good when the connection has ended.
    pub channel: Channel,
    /// The server. `peer.ends_at` is when the connection will end by itself: open the next before.
    pub peer: Peer,
}

impl TlsClient {
    /// Presents `credentials` (the newest at each connection) to servers that `trust` accepts.
    ///
    /// # Errors
    /// When TLS 1.3 is not available.
    pub fn mutual(credentials: CredentialStore, trust: &Trust) -> Result<Self, KeyError> {
        let presents = Presents { store: credentials.clone(), authority: None };
        let config = builder(trust.server_verifier())?.with_client_cert_resolver(Arc::new(presents));
        Ok(Self::finish(config, Some(credentials)))
    }

    /// Presents nothing: only for joining, enrolling and late renewal.
    ///
    /// # Errors
    /// When TLS 1.3 is not available.
    pub fn anonymous(trust: &Trust) -> Result<Self, KeyError> {
        Ok(Self::finish(builder(trust.server_verifier())?.with_no_client_auth(), None))
    }

    /// Presents nothing, and trusts the authority with this fingerprint, which the server must send along.
    ///
    /// # Errors
    /// When TLS 1.3 is not available.
    pub fn pinned(root: PinnedRoot) -> Result<Self, KeyError> {
        Ok(Self::finish(builder(Arc::new(root))?.with_no_client_auth(), None))
    }

    fn finish(mut config: ClientConfig, credentials: Option<CredentialStore>) -> Self {
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Self { config: Arc::new(config), credentials }
    }

    /// Opens a connection to `address`, which is `host:port`.
    ///
    /// # Errors
    /// When the server cannot be reached, is not who it should be, or refuses us.
    pub async fn connect(&self, address: &str) -> Result<Connection, ClientError> {
        tokio::time::timeout(CONNECT_TIME, self.open(address))
            .await
            .map_err(|_| ClientError::Connect(address.to_owned(), Cause::Time))?
    }

    pub(super) async fn shake_hands(&self, tcp: TcpStream) -> io::Result<TlsStream<CountedSocket>> {
        // The verifier looks at the identity in the certificate, never at this name.
        let name = ServerName::IpAddress(tcp.peer_addr()?.ip().into());
        TlsConnector::from(self.config.clone()).connect(name, CountedSocket::from(tcp)).await
    }

    async fn open(&self, address: &str) -> Result<Connection, ClientError> {
        let failed = |cause| ClientError::Connect(address.to_owned(), cause);
        let of_tcp = |error| failed(Cause::of_tcp(error));
        let found = tokio::net::lookup_host(address).await.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => failed(Cause::Malformed),
            _ => failed(Cause::Name(error)),
        })?;
        let tcp = TcpStream::connect(&*found.collect::<Vec<_>>()).await.map_err(of_tcp)?;
        tcp.set_nodelay(true).map_err(of_tcp)?;
        let remote = tcp.peer_addr().map_err(of_tcp)?;
        // Read before the handshake: a certificate replaced meanwhile ends later, never earlier.
        let own = self.credentials.as_ref().map(|c| c.current().certificate.not_after);
        let stream = self.shake_hands(tcp).await.map_err(|error| failed(Cause::of_tls(error)))?;
        let session = stream.get_ref().1;
        let der = session.peer_certificates().and_then(|chain| chain.first());
        let unread = |e| ClientError::Certificate(address.to_owned(), e);
        let der = der.ok_or(KeyError::Certificate("none was sent")).map_err(unread)?;
        let certificate = Certificate::from_der(der).map_err(unread)?;
        let peer = Peer {
            ends_at: own.map_or(certificate.not_after, |own| own.min(certificate.not_after)),
            certificate: Some(Arc::new(certificate)),
            address: remote,
            key_exchange: key_exchange(session.negotiated_key_exchange_group()),
            closed: CancellationToken::new(),
            failure: Arc::default(),
        };
        let stream = Mutex::new(Some(BoundedStream::new(stream, peer.clone(), None, STALLED)));
        let connector = tower::service_fn(move |_: Uri| {
            let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
            async move {
                stream
                    .map(TokioIo::new)
                    .ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection has ended"))
            }
        });
        // The connector below speaks TLS. With the scheme `https` here, the library would use its own TLS in builds that include it.
        let channel = Endpoint::from_static("http://hanse.invalid")
            .origin(Uri::from_static("https://hanse.invalid"))
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .connect_with_connector(connector)
            .await
            .map_err(|e| match peer.failure() {
                Some(failure) => failed(Cause::Other(io::Error::other(failure))),
                None => ClientError::Http2(address.to_owned(), e),
            })?;
        Ok(Connection { channel, peer })
    }
}

fn builder(
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, KeyError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)
        .map_err(|_| KeyError::Certificate("TLS 1.3 is not available"))?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

/// Trusts whatever authority has this fingerprint, to have directly issued a certificate for `expected`: how a newcomer
/// recognises the hub (or its member) before it knows the authority itself.
#[derive(Debug, Clone)]
pub struct PinnedRoot {
    fingerprint: Fingerprint,
    expected: Identity,
}

impl PinnedRoot {
    /// `fingerprint` is the SHA-256 of the authority's certificate (DER).
    pub fn new(fingerprint: Fingerprint, expected: Identity) -> Self {
        Self { fingerprint, expected }
    }
}

impl ServerCertVerifier for PinnedRoot {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let stranger = if intermediates.is_empty() { Stranger::NoAuthority } else { Stranger::OtherAuthority };
        let authority =
            intermediates.iter().take(4).find(|der| Fingerprint::of(der) == self.fingerprint).ok_or(stranger)?;
        let bad = |_| Error::InvalidCertificate(CertificateError::BadEncoding);
        let trust_domain = Certificate::from_der(authority).map_err(bad)?.trust_domain;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        verify_directly(end_entity, &roots, now)?;
        let certificate = Certificate::from_der(end_entity).map_err(bad)?;
        if certificate.is_ca || certificate.identity != self.expected || certificate.trust_domain != trust_domain {
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::ca::Ca;
    use crate::spiffe::TrustDomain;

    #[test]
    fn a_newcomer_takes_only_whom_it_expects_of_the_authority_whose_hash_it_knows() {
        let (hour, now) = (Duration::from_secs(3_600), SystemTime::now());
        let domain = TrustDomain::new("hanse.test").unwrap();
        let [root, other] = [(); 2].map(|()| Ca::root(&domain, hour, now).unwrap());
        let cluster = Identity::cluster("a").unwrap();
        let leaf = |ca: &Ca, identity: &Identity| ca.issue_credentials(identity, hour, now).unwrap().certificate;
        let pinned = PinnedRoot::new(root.certificate().fingerprint(), Identity::Hub);
        let check = |what: &str, leaf: &Certificate, shown: &Certificate, at: SystemTime, expected: bool| {
            let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap());
            let name = ServerName::try_from("127.0.0.1").unwrap();
            let taken = pinned.verify_server_cert(&leaf.der, std::slice::from_ref(&shown.der), &name, &[], at);
            assert_eq!(taken.is_ok(), expected, "{what}");
        };
        let hub = leaf(&root, &Identity::Hub);
        check("the hub", &hub, root.certificate(), now, true);
        check("after its end", &hub, root.certificate(), hub.not_after + Duration::from_secs(1), false);
        check("a member", &leaf(&root, &cluster), root.certificate(), now, false);
        check("the hub of another root", &leaf(&other, &Identity::Hub), other.certificate(), now, false);
        check("another root's leaf beside the root", &leaf(&other, &Identity::Hub), root.certificate(), now, false);
    }

    /// What is said of a connection that cannot be opened, with what is behind it.
    async fn said(client: &TlsClient, address: &str) -> (String, bool) {
        let error = client.connect(address).await.expect_err("no such server");
        let passing = error.is_passing();
        let causes = std::iter::successors(std::error::Error::source(&error), |it| it.source());
        (causes.fold(error.to_string(), |text, it| format!("{text}: {it}")), passing)
    }

    #[tokio::test]
    async fn failed_connection_says_what_is_wrong_and_what_to_check() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        use tokio::net::TcpListener;
        use tonic::service::Routes;

        use crate::tls::{Connections, IncomingLimits, PresentedAuthority, ServerTls, http2_server, incoming};

        let (hour, now) = (Duration::from_secs(3_600), SystemTime::now());
        let domain = TrustDomain::new("hanse.test").unwrap();
        let [root, other] = [(); 2].map(|()| Ca::root(&domain, 9 * hour, now).unwrap());
        let user = Identity::user("ada").unwrap();
        let credentials = |at| CredentialStore::new(root.issue_credentials(&Identity::Hub, hour, at).unwrap()).unwrap();
        let client = |ca: &Ca, expected: Identity| {
            let trust = Trust::new(ca.certificate(), move |identity| *identity == expected).unwrap();
            let own = ca.issue_credentials(&user, hour, now).unwrap();
            TlsClient::mutual(CredentialStore::new(own).unwrap(), &trust).unwrap()
        };
        let pinned =
            |ca: &Ca| TlsClient::pinned(PinnedRoot::new(ca.certificate().fingerprint(), Identity::Hub)).unwrap();
        let stop = CancellationToken::new();
        let serve = async |tls: ServerTls| {
            let any = "127.0.0.1:0".parse().unwrap();
            let limits = IncomingLimits::default();
            let listener = incoming(any, tls, limits, Connections::default(), stop.clone()).await.unwrap();
            let address = listener.address().to_string();
            let serving = http2_server().add_routes(Routes::default());
            tokio::spawn(serving.serve_with_incoming_shutdown(listener, stop.clone().cancelled_owned()));
            address
        };
        let trust = Trust::new(root.certificate(), |_| true).unwrap();
        let main = serve(ServerTls::mutual(credentials(now), &trust).unwrap()).await;
        let early = serve(ServerTls::mutual(credentials(now + 2 * hour), &trust).unwrap()).await;
        let late = serve(ServerTls::mutual(credentials(now - 2 * hour), &trust).unwrap()).await;
        let joining = ServerTls::anonymous(credentials(now), PresentedAuthority::fixed(root.certificate())).unwrap();
        let joining = serve(joining).await;
        // An address that was free a moment ago.
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = plain.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let (mut stream, _) = plain.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4_096]).await;
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await.unwrap();
            let _ = stream.read(&mut [0; 4_096]).await;
        });
        let hub = client(&root, Identity::Hub);
        for (client, address, expected, passing) in [
            (&hub, free.as_str(), "connection refused: nothing listens there", true),
            (&hub, &http, "does not speak TLS", false),
            (&hub, "nowhere", "not HOST:PORT", false),
            (&hub, "no-such-host.invalid:7443", "cannot be resolved", true),
            (&client(&other, Identity::Hub), &main, "authority that is not trusted here", false),
            (&client(&root, user.clone()), &main, "not the one that belongs there", false),
            (&hub, &early, "check this machine's clock", false),
            (&hub, &late, "check this machine's clock", false),
            (&pinned(&root), &main, "is this the listener for newcomers (--join-listen", false),
            (&pinned(&other), &joining, "another authority than the token names", false),
        ] {
            let (text, is_passing) = said(client, address).await;
            assert!(text.contains(expected) && text.contains(address), "{expected}: {text}");
            assert_eq!(is_passing, passing, "{text}");
        }
        let (text, _) = said(&hub, &late).await;
        let ended = hanse_runtime::moment::rfc3339(now - hour);
        assert!(text.contains(&format!("ended at {ended}")) && text.contains("this machine's clock says 2"), "{text}");
        for client in [&hub, &pinned(&root)] {
            let address = if std::ptr::eq(client, &hub) { &main } else { &joining };
            client.connect(address).await.expect("who should meet there does");
        }
        stop.cancel();
    }
}
