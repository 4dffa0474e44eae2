//! Whether the bearer of a token may read metrics, as another system decides: a [`Review`], with limits and a short memory.
//!
//! A scrape takes a review only now and then. Verdicts are kept for a short time, below hashes of the tokens, so that a withdrawn right
//! ends soon. While no review is possible, bearers that were allowed before are, for some minutes: monitoring goes on while an API
//! server restarts. All others are refused.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use futures::future::BoxFuture;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::rate_limit::RateLimit;

/// The path of metrics, and the nonResourceURL of the right to read them.
pub const METRICS_PATH: &str = "/metrics";
/// The verb of that right.
pub const METRICS_VERB: &str = "get";
/// The largest token, in bytes: a service-account token has about 1 KiB.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// How long a bearer is allowed without another review.
const ALLOWED_FOR: Duration = Duration::from_secs(30);
/// How long one is refused. A right that was just given is soon seen.
const REFUSED_FOR: Duration = Duration::from_secs(5);
/// How long after the last review that allowed it a bearer is allowed while no review is possible.
const ALLOWED_WITHOUT_REVIEW_FOR: Duration = Duration::from_secs(600);
/// Verdicts that are kept, of valid tokens and as many of others: 2 × 256 × about 300 bytes is 150 KiB.
const MAX_VERDICTS: usize = 256;
/// Reviews at once of tokens that were not allowed before, which any client can send.
const NEW_REVIEWS: usize = 4;
/// Reviews at once of tokens that were, so that they need not wait for those.
const REPEATED_REVIEWS: usize = 4;
/// The longest time for one review, in which it also waits for its turn.
const REVIEW_WITHIN: Duration = Duration::from_secs(4);
/// Reviews of tokens that were not allowed before, of one source in a second; a burst of ten.
const NEW_PER_SECOND: f64 = 1.0;
/// The longest name of a user that is kept and shown, in bytes.
const MAX_USER_BYTES: usize = 256;

/// What a review decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Allowed,
    /// The token is valid, and its user lacks the right.
    Forbidden {
        user: String,
    },
    /// The token is not valid, or no longer.
    Unauthenticated,
}

/// Why there is no verdict. The text is sent to the caller, who is not authenticated: it must not contain more than is needed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreviewed {
    #[error("{0}")]
    Unavailable(String),
    #[error("many unknown tokens of this source are reviewed: try again later")]
    TooMany,
}

/// Reviews tokens.
pub trait Review: Debug + Send + Sync {
    /// Whether the bearer of `token` may `get` [`METRICS_PATH`].
    ///
    /// # Errors
    /// When this cannot be decided now. An implementation logs the details.
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Verdict, Unreviewed>>;
}

/// Verdicts of a [`Review`], within limits.
#[derive(Debug, Clone)]
pub struct Reviews {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    review: Box<dyn Review>,
    /// Of tokens that are valid. Invalid ones, of which there are any number, are kept apart and cannot displace them.
    valid: Mutex<Verdicts>,
    invalid: Mutex<Verdicts>,
    new: Semaphore,
    repeated: Semaphore,
    rate: Mutex<RateLimit<Arc<str>>>,
}

/// The SHA-256 of a token.
type Hash = [u8; 32];

/// The newest verdicts, at most [`MAX_VERDICTS`].
#[derive(Debug, Default)]
struct Verdicts {
    all: HashMap<Hash, (Verdict, Instant)>,
}

impl Verdicts {
    fn insert(&mut self, hash: Hash, verdict: Verdict, now: Instant) {
        if self.all.len() >= MAX_VERDICTS && !self.all.contains_key(&hash) {
            let oldest = self.all.iter().min_by_key(|(_, (_, at))| *at).map(|(hash, _)| *hash);
            oldest.map(|hash| self.all.remove(&hash));
        }
        self.all.insert(hash, (verdict, now));
    }
}

impl Reviews {
    pub fn new(review: impl Review + 'static) -> Self {
        let shared = Shared {
            review: Box::new(review),
            valid: Mutex::default(),
            invalid: Mutex::default(),
            new: Semaphore::new(NEW_REVIEWS),
            repeated: Semaphore::new(REPEATED_REVIEWS),
            rate: Mutex::new(RateLimit::new(NEW_PER_SECOND)),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Whether the bearer of `token` may read metrics. `source` is where the request comes from.
    ///
    /// # Errors
    /// When no review is possible, and the bearer was not allowed shortly before.
    pub async fn decide(&self, token: &str, source: Arc<str>) -> Result<Verdict, Unreviewed> {
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            return Ok(Verdict::Unauthenticated);
        }
        let hash: Hash = digest(&SHA256, token.as_bytes()).as_ref().try_into().expect("SHA-256 has 32 bytes");
        let now = Instant::now();
        let known = self.known(&hash);
        if let Some((verdict, at)) = &known {
            let lasts = if *verdict == Verdict::Allowed { ALLOWED_FOR } else { REFUSED_FOR };
            if now.duration_since(*at) < lasts {
                return Ok(verdict.clone());
            }
        }
        let was_allowed = known.is_some_and(|(verdict, at)| {
            verdict == Verdict::Allowed && now.duration_since(at) < ALLOWED_WITHOUT_REVIEW_FOR
        });
        let shared = &self.shared;
        let turns = if was_allowed { &shared.repeated } else { &shared.new };
        if !was_allowed && !shared.rate.lock().unwrap_or_else(PoisonError::into_inner).allows(source, now) {
            return Err(Unreviewed::TooMany);
        }
        let reviewing = async {
            let _turn = turns.acquire().await;
            shared.review.review(token).await
        };
        match tokio::time::timeout(REVIEW_WITHIN, reviewing).await {
            Ok(Ok(verdict)) => {
                let verdict = bounded(verdict);
                self.keep(hash, verdict.clone());
                Ok(verdict)
            }
            _ if was_allowed => Ok(Verdict::Allowed),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Unreviewed::Unavailable("no answer in time".to_owned())),
        }
    }

    fn known(&self, hash: &Hash) -> Option<(Verdict, Instant)> {
        let in_one =
            |verdicts: &Mutex<Verdicts>| verdicts.lock().unwrap_or_else(PoisonError::into_inner).all.get(hash).cloned();
        in_one(&self.shared.valid).or_else(|| in_one(&self.shared.invalid))
    }

    fn keep(&self, hash: Hash, verdict: Verdict) {
        let (of, other) = match verdict {
            Verdict::Unauthenticated => (&self.shared.invalid, &self.shared.valid),
            Verdict::Allowed | Verdict::Forbidden { .. } => (&self.shared.valid, &self.shared.invalid),
        };
        other.lock().unwrap_or_else(PoisonError::into_inner).all.remove(&hash);
        of.lock().unwrap_or_else(PoisonError::into_inner).insert(hash, verdict, Instant::now());
    }
}

fn bounded(verdict: Verdict) -> Verdict {
    match verdict {
        Verdict::Forbidden { mut user } => {
            user.truncate(user.floor_char_boundary(MAX_USER_BYTES));
            Verdict::Forbidden { user }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Decides by the token's text, and counts.
    #[derive(Debug, Clone, Default)]
    struct Fake {
        reviews: Arc<AtomicUsize>,
        answer: Arc<Mutex<Option<Result<Verdict, Unreviewed>>>>,
    }

    impl Fake {
        fn answers(&self, answer: Option<Result<Verdict, Unreviewed>>) {
            *self.answer.lock().expect("not poisoned") = answer;
        }

        fn count(&self) -> usize {
            self.reviews.load(Ordering::Relaxed)
        }
    }

    impl Review for Fake {
        fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Verdict, Unreviewed>> {
            self.reviews.fetch_add(1, Ordering::Relaxed);
            let answer = self.answer.lock().expect("not poisoned").clone();
            Box::pin(async move {
                match answer {
                    Some(answer) => answer,
                    None if token == "silent" => std::future::pending().await,
                    None if token.starts_with("bad") => Ok(Verdict::Unauthenticated),
                    None => Ok(Verdict::Allowed),
                }
            })
        }
    }

    fn source(name: &str) -> Arc<str> {
        name.into()
    }

    #[tokio::test(start_paused = true)]
    async fn verdicts_are_kept_for_a_short_time() {
        let fake = Fake::default();
        let reviews = Reviews::new(fake.clone());
        let decide = async |token: &str| reviews.decide(token, source("a")).await;
        assert_eq!(decide("good").await, Ok(Verdict::Allowed));
        assert_eq!(decide("bad").await, Ok(Verdict::Unauthenticated));
        let forbidden = Verdict::Forbidden { user: "u".repeat(1_000) };
        fake.answers(Some(Ok(forbidden)));
        let Ok(Verdict::Forbidden { user }) = decide("other").await else { panic!("not forbidden") };
        assert_eq!(user.len(), MAX_USER_BYTES);
        assert_eq!((decide("good").await, decide("bad").await), (Ok(Verdict::Allowed), Ok(Verdict::Unauthenticated)));
        assert_eq!(fake.count(), 3);

        // The right is given, and withdrawn.
        fake.answers(None);
        tokio::time::advance(REFUSED_FOR).await;
        assert_eq!(decide("other").await, Ok(Verdict::Allowed));
        assert_eq!(fake.count(), 4);
        fake.answers(Some(Ok(Verdict::Unauthenticated)));
        tokio::time::advance(ALLOWED_FOR).await;
        assert_eq!(decide("other").await, Ok(Verdict::Unauthenticated));
        let down = Err(Unreviewed::Unavailable("down".to_owned()));
        fake.answers(Some(down.clone()));
        tokio::time::advance(REFUSED_FOR).await;
        assert_eq!(decide("other").await, down, "it is no longer valid");
        assert_eq!(decide("").await, Ok(Verdict::Unauthenticated));
        assert_eq!(decide(&"x".repeat(MAX_TOKEN_BYTES + 1)).await, Ok(Verdict::Unauthenticated));
    }

    #[tokio::test(start_paused = true)]
    async fn allowed_bearers_outlast_an_api_server_that_does_not_answer() {
        let fake = Fake::default();
        let reviews = Reviews::new(fake.clone());
        let decide = async |token: &str| reviews.decide(token, source("a")).await;
        assert_eq!(decide("good").await, Ok(Verdict::Allowed));
        let down = Err(Unreviewed::Unavailable("down".to_owned()));
        fake.answers(Some(down.clone()));
        assert_eq!(decide("new").await, down);
        tokio::time::advance(ALLOWED_WITHOUT_REVIEW_FOR - Duration::from_secs(1)).await;
        assert_eq!((decide("good").await, fake.count()), (Ok(Verdict::Allowed), 3));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(decide("good").await, down);
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_tokens_keep_no_place_from_known_ones() {
        let fake = Fake::default();
        let reviews = Reviews::new(fake.clone());
        assert_eq!(reviews.decide("good", source("prometheus")).await, Ok(Verdict::Allowed));
        tokio::time::advance(ALLOWED_FOR).await;
        // As many reviews without an answer as are made at once.
        let silent = (0..NEW_REVIEWS).map(|i| {
            let (reviews, source) = (reviews.clone(), source(&format!("client {i}")));
            tokio::spawn(async move { reviews.decide("silent", source).await })
        });
        let silent: Vec<_> = silent.collect();
        while fake.count() < 1 + NEW_REVIEWS {
            tokio::task::yield_now().await;
        }
        let began = Instant::now();
        assert_eq!(reviews.decide("good", source("prometheus")).await, Ok(Verdict::Allowed));
        assert_eq!(began.elapsed(), Duration::ZERO);
        for task in silent {
            assert!(matches!(task.await.expect("no panic"), Err(Unreviewed::Unavailable(_))));
        }
        assert_eq!(began.elapsed(), REVIEW_WITHIN);

        // One source, and any number of tokens.
        let mut refused = 0;
        for i in 0..MAX_VERDICTS * 2 {
            refused +=
                usize::from(reviews.decide(&format!("bad {i}"), source("one")).await == Err(Unreviewed::TooMany));
        }
        assert!(refused > MAX_VERDICTS, "{refused}");
        for i in 0..MAX_VERDICTS * 2 {
            let verdict = reviews.decide(&format!("bad {i}"), source(&format!("client {i}"))).await;
            assert_eq!(verdict, Ok(Verdict::Unauthenticated));
        }
        assert_eq!(reviews.shared.invalid.lock().expect("not poisoned").all.len(), MAX_VERDICTS);
        let before = fake.count();
        assert_eq!(reviews.decide("good", source("prometheus")).await, Ok(Verdict::Allowed));
        assert_eq!(fake.count(), before, "it is still known");
    }
}
