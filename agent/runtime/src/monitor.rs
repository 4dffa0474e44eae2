//! The listeners for health, readiness and metrics: HTTP/1.1, read only.
//!
//! Health (`/healthz`) answers with one word, readiness (`/readyz`) also with what the process waits for. Metrics (`/metrics`) are served
//! over plain HTTP on a loopback address only. Elsewhere they need TLS and a bearer token, which is that of a file, or one that
//! [`Reviews`] allow.
//!
//! A client cannot keep places from others for long: connections are limited in number, in all and for each source, and in time.

mod authorization;
mod certificate;
mod options;
mod reviews;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub use authorization::{Authorization, TokenFile};
pub use certificate::{CertificateError, ServedCertificate};
pub use options::MetricsOptions;
pub use reviews::{MAX_TOKEN_BYTES, METRICS_PATH, METRICS_VERB, Review, Reviews, Unreviewed, Verdict};

use crate::health::Health;
use crate::metrics::Metrics;
use crate::places::Places;
use crate::shutdown::Shutdown;

/// Connections served at once; more wait in the kernel's backlog. 64 × about 60 KiB of buffers is 4 MiB.
const MAX_CONNECTIONS: usize = 64;
/// Of these, from one source. A Prometheus server opens one or two.
const MAX_OF_ONE_SOURCE: usize = 16;
/// The longest time of a TLS handshake.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(3);
/// How long the head of a request may take to arrive.
const HEAD_WITHIN: Duration = Duration::from_secs(3);
/// A connection is closed after this long, so that an idle one does not keep a place. Longer than a review takes.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(15);
/// The largest head of a request, in bytes: a token, and what is around it.
const MAX_HEAD_BYTES: usize = 16 * 1024;
const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a listener answers.
#[derive(Debug, Clone)]
pub enum Page {
    /// `/healthz` and `/readyz`.
    Health(Health),
    /// `/metrics`, and who may read them.
    Metrics(Metrics, Authorization),
}

/// Why a listener did not start.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error(
        "serving metrics on {0} needs TLS and authorization: set --metrics-certificate and --metrics-key, and --metrics-token-review \
         or --metrics-token-file; or use a loopback address"
    )]
    NotLoopback(SocketAddr),
    #[error("--metrics-token-review needs an API server: {0}")]
    NoReviews(&'static str),
    #[error("read the metrics token in {0}")]
    Token(PathBuf, #[source] io::Error),
    #[error("serve metrics with --metrics-certificate and --metrics-key")]
    Certificate(#[source] CertificateError),
    #[error("listen on {0}")]
    Listen(SocketAddr, #[source] io::Error),
}

/// Binds `address` and serves health and readiness until the shutdown. Returns the bound address.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve_health(
    address: SocketAddr,
    health: &Health,
    shutdown: &Shutdown,
) -> Result<SocketAddr, MonitorError> {
    serve(address, Page::Health(health.clone()), None, shutdown).await
}

/// Serves metrics as `options` say until the shutdown. Returns the bound address, if there is one. `reviews`: for
/// `--metrics-token-review`, or why this process has none.
///
/// # Errors
/// When the address cannot be bound, a file cannot be used, or metrics would be served beyond loopback without TLS or to everyone.
pub async fn serve_metrics(
    options: &MetricsOptions,
    metrics: &Metrics,
    reviews: Result<Reviews, &'static str>,
    shutdown: &Shutdown,
) -> Result<Option<SocketAddr>, MonitorError> {
    let Some(address) = options.listen else { return Ok(None) };
    let authorization = match &options.token_file {
        _ if options.token_review => Authorization::Reviews(reviews.map_err(MonitorError::NoReviews)?),
        Some(path) => {
            let file = TokenFile::new(path).map_err(|error| MonitorError::Token(path.clone(), error))?;
            Authorization::TokenFile(Arc::new(file))
        }
        None => Authorization::Everyone,
    };
    let certificate = options.certificate.as_deref().zip(options.key.as_deref());
    let certificate = certificate.map(|(chain, key)| ServedCertificate::read(chain, key)).transpose();
    let certificate = certificate.map_err(MonitorError::Certificate)?.map(Arc::new);
    let is_open = matches!(authorization, Authorization::Everyone) || certificate.is_none();
    if is_open && !address.ip().is_loopback() {
        return Err(MonitorError::NotLoopback(address));
    }
    serve(address, Page::Metrics(metrics.clone(), authorization), certificate, shutdown).await.map(Some)
}

async fn serve(
    address: SocketAddr,
    page: Page,
    certificate: Option<Arc<ServedCertificate>>,
    shutdown: &Shutdown,
) -> Result<SocketAddr, MonitorError> {
    let tls = certificate.as_ref().map(|it| it.config()).transpose().map_err(MonitorError::Certificate)?;
    let tls = tls.map(TlsAcceptor::from);
    let listener = TcpListener::bind(address).await.map_err(|e| MonitorError::Listen(address, e))?;
    let bound = listener.local_addr().map_err(|e| MonitorError::Listen(address, e))?;
    if let Some(certificate) = certificate {
        let stop = shutdown.token();
        shutdown.supervise("certificate of metrics", move || Arc::clone(&certificate).follow(stop.clone()));
    }
    let serving = (Arc::new(listener), Served { page, tls }, shutdown.token());
    shutdown.supervise("health and metrics", move || {
        let (listener, served, stop) = serving.clone();
        accept(listener, served, stop)
    });
    Ok(bound)
}

/// What a listener serves, and how.
#[derive(Clone)]
struct Served {
    page: Page,
    tls: Option<TlsAcceptor>,
}

async fn accept(listener: Arc<TcpListener>, served: Served, stop: CancellationToken) {
    let places = Places::new(MAX_CONNECTIONS, MAX_OF_ONE_SOURCE);
    loop {
        let free = places.free().await;
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, peer)) = accepted else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Some(place) = places.take(free, peer.ip()) else { continue };
        let served = served.clone();
        tokio::spawn(async move {
            let connection = connection(stream, peer.ip(), served);
            let _ = tokio::time::timeout(CONNECTION_LIFETIME, connection).await;
            drop(place);
        });
    }
}

async fn connection(stream: TcpStream, peer: IpAddr, served: Served) {
    match served.tls {
        None => answer_all(stream, peer, &served.page).await,
        Some(tls) => {
            if let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_WITHIN, tls.accept(stream)).await {
                answer_all(stream, peer, &served.page).await;
            }
        }
    }
}

async fn answer_all(stream: impl AsyncRead + AsyncWrite + Unpin, peer: IpAddr, page: &Page) {
    let service = service_fn(move |request| async move { Ok::<_, Infallible>(answer(page, peer, &request).await) });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    // Nothing can be done about a client that disconnects.
    let _ = connection.await;
}

async fn answer<B>(page: &Page, peer: IpAddr, request: &Request<B>) -> Response<Full<Bytes>> {
    let text = |status, text: &str| (status, TEXT, text.to_owned());
    let (status, kind, body) = match (page, request.uri().path()) {
        _ if ![Method::GET, Method::HEAD].contains(request.method()) => text(StatusCode::METHOD_NOT_ALLOWED, "method"),
        (Page::Health(_), "/healthz") => text(StatusCode::OK, "ok"),
        (Page::Health(health), "/readyz") => match &*health.waiting_for() {
            [] => text(StatusCode::OK, "ready"),
            conditions => text(StatusCode::SERVICE_UNAVAILABLE, &format!("waiting for: {}\n", conditions.join(", "))),
        },
        (Page::Metrics(metrics, authorization), METRICS_PATH) => {
            match authorization.check(request.headers(), peer).await {
                Ok(()) => (StatusCode::OK, OPEN_METRICS, metrics.encode()),
                Err((status, reason)) => text(status, &format!("{reason}\n")),
            }
        }
        _ => text(StatusCode::NOT_FOUND, "nothing"),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    match status {
        StatusCode::METHOD_NOT_ALLOWED => {
            headers.insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
        }
        StatusCode::UNAUTHORIZED => {
            headers.insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        _ => {}
    }
    response
}

#[cfg(test)]
mod tests;
