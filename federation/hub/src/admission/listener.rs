//! The HTTPS listener of the webhook: bounded connections, requests and times.
//!
//! A request takes one of the few places for reviews when all of it has arrived, so that slow clients keep none. Where API servers are
//! not authenticated, one source can neither take all connections and memory nor send reviews at any rate.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use hanse_runtime::places::{Places, source_of};
use hanse_runtime::rate_limit::RateLimit;
use hanse_runtime::shutdown::Shutdown;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::buffers::{Buffer, Buffers};
use super::certificate::Certificates;
use super::clients::{Acceptor, ClientOptions};
use super::configuration::PATH;
use super::review::Reviewer;

/// Connections at once; API servers keep a few. More wait in the kernel. 128 × about 40 KiB of buffers is 5 MiB.
const MAX_CONNECTIONS: usize = 128;
/// Of these, from one source: all API servers may have one address.
const MAX_OF_ONE_SOURCE: usize = 96;
/// The largest review: the new and the old object, of at most 3 MiB each as API servers limit requests, and what is around them.
const MAX_BODY_BYTES: usize = 7 << 20;
/// The memory of all requests that arrive and are decided, and that of one source. Most requests have some KiB.
const MAX_BUFFERED_BYTES: usize = 96 << 20;
const MAX_BUFFERED_OF_ONE_SOURCE: usize = 64 << 20;
/// The memory of all reviews that are decided, as values instead of text, and that of one source.
/// A policy with all that API servers add to it takes some 10 MiB.
const MAX_DECIDED_BYTES: usize = 256 << 20;
const MAX_DECIDED_OF_ONE_SOURCE: usize = 128 << 20;
/// Reviews that are decided at once. Others wait.
const MAX_REVIEWS: usize = 16;
/// How long a request may take to arrive.
const ARRIVES_WITHIN: Duration = Duration::from_secs(3);
/// Reviews of one source that is not authenticated: at this rate it cannot fill the records of unfinished changes
/// (`registry::MAX_CHANGES`) before the operator removes those that led to nothing: 1,000 + 300 s × 50 is 16,000.
const REVIEWS_PER_SECOND: f64 = 50.0;
const REVIEWS_AT_ONCE: f64 = 1_000.0;
/// How often a source above its rate tries again.
const TRY_AGAIN: Duration = Duration::from_millis(50);
/// API servers give up after 8 s.
const REVIEW_WITHIN: Duration = Duration::from_secs(7);
/// A review that has begun is decided within this part of that time, or reported.
const DECIDED_WITHIN: Duration = Duration::from_millis(6_500);
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// A connection is closed after this time, and at the end of the certificate that was served last.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);
/// How long a request may take to arrive: its head, and the time between two requests.
const IDLE: Duration = Duration::from_secs(90);

struct Shared {
    certificates: Arc<Certificates>,
    acceptor: Arc<Acceptor>,
    reviewer: Reviewer,
    reviews: Semaphore,
    buffers: Arc<Buffers>,
    values: Arc<Buffers>,
    rates: Mutex<RateLimit<IpAddr>>,
}

/// Binds `address`, and serves reviews until the shutdown. Returns the bound address.
pub(super) async fn serve(
    address: SocketAddr,
    certificates: Arc<Certificates>,
    clients: ClientOptions,
    reviewer: Reviewer,
    shutdown: &Shutdown,
) -> anyhow::Result<SocketAddr> {
    let acceptor = Arc::new(Acceptor::new(Arc::clone(&certificates), clients)?);
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen for webhooks on {address}"))?;
    let bound = listener.local_addr().with_context(|| format!("listen for webhooks on {address}"))?;
    let (following, stop) = (Arc::clone(&acceptor), shutdown.token());
    shutdown.supervise("authorities of API servers", move || Arc::clone(&following).follow(stop.clone()));
    let shared = Arc::new(Shared {
        certificates,
        acceptor,
        reviewer,
        reviews: Semaphore::new(MAX_REVIEWS),
        buffers: Buffers::new(MAX_BUFFERED_BYTES, MAX_BUFFERED_OF_ONE_SOURCE),
        values: Buffers::new(MAX_DECIDED_BYTES, MAX_DECIDED_OF_ONE_SOURCE),
        rates: Mutex::new(RateLimit::with_burst(REVIEWS_PER_SECOND, REVIEWS_AT_ONCE)),
    });
    let serving = (Arc::new(listener), shared, shutdown.token());
    shutdown.supervise("webhook", move || {
        let (listener, shared, stop) = serving.clone();
        accept(listener, shared, stop)
    });
    Ok(bound)
}

async fn accept(listener: Arc<TcpListener>, shared: Arc<Shared>, stop: CancellationToken) {
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
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                ended = connection(stream, source_of(peer.ip()), &shared) => if let Err(error) = ended {
                    debug!(%peer, error = format!("{error:#}"), "connection of an API server ended");
                }
            }
            drop(place);
        });
    }
}

async fn connection(stream: TcpStream, source: IpAddr, shared: &Arc<Shared>) -> anyhow::Result<()> {
    let handshake = tokio::time::timeout(HANDSHAKE_WITHIN, shared.acceptor.current().accept(stream));
    let stream = handshake.await.context("handshake not completed in time")?.context("handshake")?;
    shared.acceptor.admit(stream.get_ref().1.peer_certificates())?;
    let end = shared.certificates.serving().map(|(end, _)| end);
    let left = end.and_then(|end| end.duration_since(SystemTime::now()).ok()).unwrap_or_default();
    let handler = Arc::clone(shared);
    let service = service_fn(move |request| {
        let shared = Arc::clone(&handler);
        async move { Ok::<_, Infallible>(answer(&shared, source, request).await) }
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

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response
}

async fn answer(shared: &Shared, source: IpAddr, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.uri().path() != PATH {
        return plain(StatusCode::NOT_FOUND, "not found");
    }
    if request.method() != Method::POST {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "a review is a POST");
    }
    let decided_by = tokio::time::Instant::now() + DECIDED_WITHIN;
    let review = async {
        let mut buffer = shared.buffers.buffer(source);
        let arriving = tokio::time::timeout(ARRIVES_WITHIN, arrive(request.into_body(), &mut buffer)).await;
        let late = |_| plain(StatusCode::REQUEST_TIMEOUT, "the request did not arrive in time");
        let body = arriving.map_err(late)??;
        let memory = memory_of(&body);
        if memory > MAX_DECIDED_OF_ONE_SOURCE {
            return Err(plain(StatusCode::PAYLOAD_TOO_LARGE, "the objects in the review have too many fields"));
        }
        while !shared.acceptor.authenticates() && !shared.allows(source) {
            tokio::time::sleep(TRY_AGAIN).await;
        }
        // Before the place, so that a source that waits for memory keeps none from others.
        let mut values = shared.values.buffer(source);
        values.take(memory).await;
        let Ok(_place) = shared.reviews.acquire().await else {
            return Err(plain(StatusCode::SERVICE_UNAVAILABLE, "the hub is stopping"));
        };
        let Ok(answer) = tokio::time::timeout_at(decided_by, shared.reviewer.review(&body)).await else {
            shared.reviewer.not_decided_in_time();
            return Err(plain(StatusCode::SERVICE_UNAVAILABLE, "not decided in time"));
        };
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

/// The most memory that the values of a review take, in bytes, with the copies that are made of them: a small object in JSON takes a
/// hundred times its text. Marks in strings are counted as well.
fn memory_of(body: &[u8]) -> usize {
    /// Texts are copied.
    const OF_BYTE: usize = 4;
    /// An object: a node for 11 entries, and room for 4 where it is read.
    const OF_OBJECT: usize = 2_048;
    /// A list, and a further value of a list or an object.
    const OF_VALUE: usize = 512;
    let of = |byte: &u8| match byte {
        b'{' => OF_OBJECT,
        b'[' | b',' => OF_VALUE,
        _ => 0,
    };
    body.len() * OF_BYTE + body.iter().map(of).sum::<usize>()
}

/// Reads a whole request, as memory for it is free.
async fn arrive(mut body: Incoming, buffer: &mut Buffer) -> Result<Bytes, Response<Full<Bytes>>> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| plain(StatusCode::BAD_REQUEST, "the request cannot be read"))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > MAX_BODY_BYTES {
            return Err(plain(StatusCode::PAYLOAD_TOO_LARGE, "a review has at most 7 MiB"));
        }
        buffer.take(data.len()).await;
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.freeze())
}

impl Shared {
    /// Whether a source may have another review now.
    fn allows(&self, source: IpAddr) -> bool {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates.allows(source, tokio::time::Instant::now())
    }
}
