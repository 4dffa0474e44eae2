//! The listeners for health, readiness and metrics: plain HTTP/1.1, read only.
//!
//! Health (`/healthz`, `/readyz`) answers with one word. Metrics (`/metrics`) need no token on a loopback address, and a
//! bearer token elsewhere.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::files;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::shutdown::Shutdown;

/// Connections served at once; more wait in the kernel's backlog. 64 × about 20 KiB of buffers is 1.3 MiB.
const MAX_CONNECTIONS: usize = 64;
/// The shortest token that is accepted, in bytes: 128 bits in base 64 have 22.
const MIN_TOKEN_BYTES: usize = 22;
/// A connection is closed after this long, so that an idle one does not keep a place.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(10);

/// What a listener answers.
#[derive(Debug, Clone)]
pub enum Page {
    /// `/healthz` and `/readyz`.
    Health(Health),
    /// `/metrics`, with the bearer token that it requires, if any.
    Metrics(Metrics, Option<Arc<Zeroizing<String>>>),
}

impl Page {
    /// Metrics that require the token in `token_file`, if one is given.
    ///
    /// # Errors
    /// When the file cannot be read, others can read it, or it has no token of [`MIN_TOKEN_BYTES`].
    pub fn metrics(metrics: &Metrics, token_file: Option<&Path>) -> Result<Self, MonitorError> {
        let token = token_file.map(|path| {
            let failed = |error| MonitorError::Token(path.to_owned(), error);
            let bytes = files::read_secret(path).map_err(failed)?;
            let text =
                std::str::from_utf8(&bytes).map_err(|e| failed(io::Error::new(io::ErrorKind::InvalidData, e)))?;
            let token = text.trim();
            if token.len() < MIN_TOKEN_BYTES {
                let short = format!("the token has {} bytes, and needs at least {MIN_TOKEN_BYTES}", token.len());
                return Err(failed(io::Error::new(io::ErrorKind::InvalidData, short)));
            }
            Ok(Arc::new(Zeroizing::new(token.to_owned())))
        });
        Ok(Self::Metrics(metrics.clone(), token.transpose()?))
    }
}

/// Why a listener did not start.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error("serving metrics on {0} needs a token: set --metrics-token-file, or use a loopback address")]
    NotLoopback(SocketAddr),
    #[error("read the metrics token in {0}")]
    Token(PathBuf, #[source] io::Error),
    #[error("listen on {0}")]
    Listen(SocketAddr, #[source] io::Error),
}

/// Binds `address` and serves `page` until the shutdown. Returns the bound address.
///
/// # Errors
/// When the address cannot be bound, or metrics without a token would be served beyond loopback.
pub async fn serve(address: SocketAddr, page: Page, shutdown: &Shutdown) -> Result<SocketAddr, MonitorError> {
    if matches!(page, Page::Metrics(_, None)) && !address.ip().is_loopback() {
        return Err(MonitorError::NotLoopback(address));
    }
    let listener = TcpListener::bind(address).await.map_err(|e| MonitorError::Listen(address, e))?;
    let bound = listener.local_addr().map_err(|e| MonitorError::Listen(address, e))?;
    let serving = (Arc::new(listener), page, shutdown.token());
    shutdown.supervise("health and metrics", move || {
        let (listener, page, stop) = serving.clone();
        accept(listener, page, stop)
    });
    Ok(bound)
}

async fn accept(listener: Arc<TcpListener>, page: Page, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let page = page.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&page, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(CONNECTION_LIFETIME, connection).await;
            drop(place);
        });
    }
}

fn answer<B>(page: &Page, request: &Request<B>) -> Response<Full<Bytes>> {
    let (status, text) = match (page, request.uri().path()) {
        (Page::Health(_), "/healthz") => (StatusCode::OK, "ok".to_owned()),
        (Page::Health(health), "/readyz") if health.waiting_for().is_empty() => (StatusCode::OK, "ready".to_owned()),
        (Page::Health(_), "/readyz") => (StatusCode::SERVICE_UNAVAILABLE, "waiting".to_owned()),
        (Page::Metrics(metrics, token), "/metrics") => match token {
            Some(token) if !bearer_matches(request, token) => (StatusCode::UNAUTHORIZED, "token".to_owned()),
            _ => (StatusCode::OK, metrics.encode()),
        },
        _ => (StatusCode::NOT_FOUND, "nothing".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn bearer_matches<B>(request: &Request<B>, token: &str) -> bool {
    let value = request.headers().get(header::AUTHORIZATION).and_then(|v| v.as_bytes().strip_prefix(b"Bearer "));
    value.is_some_and(|value| verify_slices_are_equal(value, token.as_bytes()).is_ok())
}
