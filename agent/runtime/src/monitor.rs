//! The listeners for health, readiness and metrics: plain HTTP/1.1, read only.
//!
//! Health (`/healthz`, `/readyz`) answers with one word and tells nothing else. Metrics (`/metrics`) are for the loopback
//! address; elsewhere a bearer token is demanded.

use std::convert::Infallible;
use std::net::SocketAddr;
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

use crate::health::Health;
use crate::metrics::Metrics;
use crate::shutdown::Shutdown;

/// Connections served at once; more wait in the kernel's backlog. 64 × about 20 KiB of buffers is 1.3 MiB.
const MAX_CONNECTIONS: usize = 64;
/// A connection is closed after this long, so that an idle one does not hold a place.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(10);

/// What a listener answers.
#[derive(Debug, Clone)]
pub enum Page {
    /// `/healthz` and `/readyz`.
    Health(Health),
    /// `/metrics`, with the bearer token that it demands, if any.
    Metrics(Metrics, Option<Arc<Zeroizing<String>>>),
}

/// Why a listener did not start.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error("metrics on {0} need a token: only the loopback address serves them without one")]
    NotLoopback(SocketAddr),
    #[error("listen on {0}")]
    Listen(SocketAddr, #[source] std::io::Error),
}

/// Binds `address` and serves `page` until the shutdown. Returns the bound address.
///
/// # Errors
/// When the address cannot be bound, or metrics without a token would leave the machine.
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
