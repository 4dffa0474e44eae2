//! The listeners for health, readiness and metrics: plain HTTP/1.1, read only.
//!
//! Health (`/healthz`) answers with one word, readiness (`/readyz`) also with what the process waits for. Metrics (`/metrics`) need no
//! token on a loopback address, and a bearer token elsewhere.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::files;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::rate_limit::RateLimit;
use crate::shutdown::Shutdown;

/// Connections served at once; more wait in the kernel's backlog. 64 × about 20 KiB of buffers is 1.3 MiB.
const MAX_CONNECTIONS: usize = 64;
/// The shortest token that is accepted, in bytes: 128 bits in base 64 have 22.
const MIN_TOKEN_BYTES: usize = 22;
/// A connection is closed after this long, so that an idle one does not keep a place.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(10);
const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a listener answers.
#[derive(Debug, Clone)]
pub enum Page {
    /// `/healthz` and `/readyz`.
    Health(Health),
    /// `/metrics`, with the file of the bearer token that it requires, if any.
    Metrics(Metrics, Option<Arc<TokenFile>>),
}

/// The file of a bearer token.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    /// Of the warning that it cannot be read: any client can cause one.
    warnings: Mutex<RateLimit<()>>,
}

impl TokenFile {
    /// Whether a request has the token. A request without one reads no file.
    fn admits<B>(&self, request: &Request<B>) -> io::Result<bool> {
        let header = request.headers().get(header::AUTHORIZATION).map(header::HeaderValue::as_bytes);
        let Some((scheme, sent)) = header.and_then(|it| it.split_at_checked(b"Bearer ".len())) else {
            return Ok(false);
        };
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return Ok(false);
        }
        let token = read_token(&self.path)?;
        Ok(verify_slices_are_equal(sent.trim_ascii(), token.as_bytes()).is_ok())
    }

    /// Logs that the file cannot be read, once a minute at most. Returns whether it did.
    fn warn(&self, error: &io::Error) -> bool {
        let allowed =
            self.warnings.lock().unwrap_or_else(PoisonError::into_inner).allows((), tokio::time::Instant::now());
        if allowed {
            tracing::warn!(%error, "metrics not served: the file of the token cannot be read");
        }
        allowed
    }
}

impl Page {
    /// Metrics that require the token in `token_file`, if one is given. The file is read at each request, so that it can be replaced.
    ///
    /// # Errors
    /// When the file cannot be read, others can read it, or it has no token of [`MIN_TOKEN_BYTES`].
    pub fn metrics(metrics: &Metrics, token_file: Option<&Path>) -> Result<Self, MonitorError> {
        if let Some(path) = token_file {
            read_token(path).map_err(|error| MonitorError::Token(path.to_owned(), error))?;
        }
        let token_file = token_file.map(|path| {
            let warnings = Mutex::new(RateLimit::with_burst(1.0 / 60.0, 1.0));
            Arc::new(TokenFile { path: path.to_owned(), warnings })
        });
        Ok(Self::Metrics(metrics.clone(), token_file))
    }
}

fn read_token(path: &Path) -> io::Result<Zeroizing<String>> {
    let bytes = files::read_provided_secret(path)?;
    let text = std::str::from_utf8(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let token = text.trim();
    if token.len() < MIN_TOKEN_BYTES {
        let short = format!("the token has {} bytes, and needs at least {MIN_TOKEN_BYTES}", token.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, short));
    }
    Ok(Zeroizing::new(token.to_owned()))
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
    let text = |status, text: &str| (status, TEXT, text.to_owned());
    let (status, kind, body) = match (page, request.uri().path()) {
        _ if ![Method::GET, Method::HEAD].contains(request.method()) => text(StatusCode::METHOD_NOT_ALLOWED, "method"),
        (Page::Health(_), "/healthz") => text(StatusCode::OK, "ok"),
        (Page::Health(health), "/readyz") => match &*health.waiting_for() {
            [] => text(StatusCode::OK, "ready"),
            conditions => text(StatusCode::SERVICE_UNAVAILABLE, &format!("waiting for: {}\n", conditions.join(", "))),
        },
        (Page::Metrics(metrics, token_file), "/metrics") => {
            match token_file.as_ref().map(|file| (file, file.admits(request))) {
                None | Some((_, Ok(true))) => (StatusCode::OK, OPEN_METRICS, metrics.encode()),
                Some((_, Ok(false))) => text(StatusCode::UNAUTHORIZED, "token"),
                Some((file, Err(error))) => {
                    file.warn(&error);
                    text(StatusCode::SERVICE_UNAVAILABLE, "token file")
                }
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
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    /// The status, the headers and the body of a response.
    async fn call(page: &Page, method: &str, path: &str, authorization: &str) -> (u16, header::HeaderMap, String) {
        let mut request = Request::builder().method(method).uri(path);
        if !authorization.is_empty() {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let response = answer(page, &request.body(()).expect("a request"));
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        (status, headers, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn metrics_are_open_metrics_text_for_reading_only() {
        let page = Page::metrics(&Metrics::default(), None).expect("a page");
        let (status, headers, body) = call(&page, "GET", "/metrics", "").await;
        assert_eq!((status, &headers[header::CONTENT_TYPE]), (200, &header::HeaderValue::from_static(OPEN_METRICS)));
        assert!(body.ends_with("# EOF\n") && body.contains("\nhanse_task_panics_total{task="), "{body}");
        assert_eq!(call(&page, "HEAD", "/metrics", "").await.0, 200);
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            let (status, headers, body) = call(&page, method, "/metrics", "").await;
            assert_eq!(
                (status, &headers[header::ALLOW], &*body),
                (405, &"GET, HEAD".parse().expect("a value"), "method")
            );
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
        let page = Page::metrics(&Metrics::default(), Some(&path)).expect("a page");
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
        let Page::Metrics(_, Some(file)) = &page else { panic!("another page") };
        assert!(!file.warn(&io::ErrorKind::InvalidData.into()), "the request above has warned");
    }
}
