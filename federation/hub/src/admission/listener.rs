//! The HTTPS listener of the webhook: bounded connections, requests and times.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytes::Bytes;
use hanse_runtime::shutdown::Shutdown;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::certificate::Certificates;
use super::configuration::PATH;
use super::review::Reviewer;

/// Connections at once; API servers keep a few. More wait in the kernel. 128 × about 40 KiB of buffers is 5 MiB.
const MAX_CONNECTIONS: usize = 128;
/// The largest review: the new and the old object, of at most 3 MiB each as API servers limit requests, and what is around them.
const MAX_BODY_BYTES: usize = 7 << 20;
/// Reviews that are read and decided at once: 16 × 7 MiB is 112 MiB. Others wait.
const MAX_REVIEWS: usize = 16;
/// API servers give up after 8 s.
const REVIEW_WITHIN: Duration = Duration::from_secs(7);
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// A connection is closed after this time, and at the end of the certificate that was served last.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);
/// How long a request may take to arrive: its head, and the time between two requests.
const IDLE: Duration = Duration::from_secs(90);

struct Shared {
    certificates: Arc<Certificates>,
    acceptor: TlsAcceptor,
    reviewer: Reviewer,
    reviews: Semaphore,
}

/// Binds `address`, and serves reviews until the shutdown. Returns the bound address.
pub(super) async fn serve(
    address: SocketAddr,
    certificates: Arc<Certificates>,
    reviewer: Reviewer,
    shutdown: &Shutdown,
) -> anyhow::Result<SocketAddr> {
    let resolver: Arc<Certificates> = Arc::clone(&certificates);
    let mut config = ServerConfig::builder().with_no_client_auth().with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen for webhooks on {address}"))?;
    let bound = listener.local_addr().with_context(|| format!("listen for webhooks on {address}"))?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let shared = Arc::new(Shared { certificates, acceptor, reviewer, reviews: Semaphore::new(MAX_REVIEWS) });
    let serving = (Arc::new(listener), shared, shutdown.token());
    shutdown.supervise("webhook", move || {
        let (listener, shared, stop) = serving.clone();
        accept(listener, shared, stop)
    });
    Ok(bound)
}

async fn accept(listener: Arc<TcpListener>, shared: Arc<Shared>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, peer)) = accepted else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                ended = connection(stream, &shared) => if let Err(error) = ended {
                    debug!(%peer, error = format!("{error:#}"), "connection of an API server ended");
                }
            }
            drop(place);
        });
    }
}

async fn connection(stream: TcpStream, shared: &Arc<Shared>) -> anyhow::Result<()> {
    let handshake = tokio::time::timeout(HANDSHAKE_WITHIN, shared.acceptor.accept(stream));
    let stream = handshake.await.context("handshake not completed in time")?.context("handshake")?;
    let end = shared.certificates.serving().map(|(end, _)| end);
    let left = end.and_then(|end| end.duration_since(SystemTime::now()).ok()).unwrap_or_default();
    let handler = Arc::clone(shared);
    let service = service_fn(move |request| {
        let shared = Arc::clone(&handler);
        async move { Ok::<_, Infallible>(answer(&shared, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        ended = &mut connection => return ended.context("serve"),
        () = tokio::time::sleep(CONNECTION_LIFETIME.min(left)) => {}
    }
    // A request that is being answered ends first.
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(REVIEW_WITHIN, connection).await;
    Ok(())
}

async fn answer(shared: &Shared, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let plain = |status: StatusCode, text: &'static str| {
        let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != PATH {
        return plain(StatusCode::NOT_FOUND, "not found");
    }
    if request.method() != Method::POST {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "a review is a POST");
    }
    let review = async {
        let Ok(_place) = shared.reviews.acquire().await else {
            return Err(plain(StatusCode::SERVICE_UNAVAILABLE, "the hub is stopping"));
        };
        let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect().await;
        let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => plain(StatusCode::PAYLOAD_TOO_LARGE, "a review has at most 7 MiB"),
            None => plain(StatusCode::BAD_REQUEST, "the request cannot be read"),
        })?;
        let answer = shared.reviewer.review(&body.to_bytes()).await;
        answer.map_err(|_| plain(StatusCode::BAD_REQUEST, "not an AdmissionReview of admission.k8s.io/v1"))
    };
    match tokio::time::timeout(REVIEW_WITHIN, review).await {
        Err(_) => plain(StatusCode::SERVICE_UNAVAILABLE, "not decided in time"),
        Ok(Err(refused)) => refused,
        Ok(Ok(bytes)) => {
            let mut response = Response::new(Full::new(Bytes::from(bytes)));
            let json = header::HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            response
        }
    }
}
