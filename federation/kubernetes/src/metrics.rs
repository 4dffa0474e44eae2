//! Whether a user of the cluster may read metrics: TokenReview for who it is, SubjectAccessReview for whether the user may.
//!
//! The right is the one of Kubernetes' own components: the verb `get` on the nonResourceURL `/metrics`.

use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use hanse_runtime::monitor::{METRICS_PATH, METRICS_VERB, Review, Unreviewed, Verdict};
use hanse_runtime::rate_limit::RateLimit;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::Instant;

use crate::{Access, answered_by};

/// Reviews by an API server.
#[derive(Debug, Clone)]
pub struct MetricsReview {
    access: Access,
    /// `None`: the API server's own.
    audience: Option<String>,
    warnings: Arc<Mutex<RateLimit<()>>>,
}

impl MetricsReview {
    /// `audience`: that tokens must be for; by default the API server's own, for which the tokens of service accounts in pods are.
    pub fn new(access: Access, audience: Option<String>) -> Self {
        Self { access, audience, warnings: Arc::new(Mutex::new(RateLimit::with_burst(1.0 / 60.0, 1.0))) }
    }

    async fn decide(&self, token: &str) -> Result<Verdict, Unreviewed> {
        // The credentials of this process may have been replaced.
        let client = self.access.client().await;
        let client = client.map_err(|error| self.unavailable("read the credentials", &format!("{error:#}")))?;
        let Some(user) = self.authenticate(client.clone(), token).await? else { return Ok(Verdict::Unauthenticated) };
        let name = user.username.clone().unwrap_or_default();
        Ok(if self.authorize(client, user).await? { Verdict::Allowed } else { Verdict::Forbidden { user: name } })
    }

    /// The user of a token that is valid.
    async fn authenticate(&self, client: Client, token: &str) -> Result<Option<UserInfo>, Unreviewed> {
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: self.audience.clone().map(|it| vec![it]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api: Api<TokenReview> = Api::all(client);
        let answer = answered_by(api.create(&PostParams::default(), &review)).await;
        let answer = answer.map_err(|error| self.failed("tokenreviews.authentication.k8s.io", error))?;
        let status = answer.status.unwrap_or_default();
        // An API server that does not check audiences returns none.
        let audiences = status.audiences.unwrap_or_default();
        let is_for = self.audience.as_ref().is_none_or(|audience| audiences.contains(audience));
        Ok(status.user.filter(|_| status.authenticated == Some(true) && is_for))
    }

    async fn authorize(&self, client: Client, user: UserInfo) -> Result<bool, Unreviewed> {
        let (path, verb) = (Some(METRICS_PATH.to_owned()), Some(METRICS_VERB.to_owned()));
        let spec = SubjectAccessReviewSpec {
            user: user.username,
            groups: user.groups,
            uid: user.uid,
            extra: user.extra,
            non_resource_attributes: Some(NonResourceAttributes { path, verb }),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let api: Api<SubjectAccessReview> = Api::all(client);
        let answer = answered_by(api.create(&PostParams::default(), &review)).await;
        let answer = answer.map_err(|error| self.failed("subjectaccessreviews.authorization.k8s.io", error))?;
        Ok(answer.status.is_some_and(|status| status.allowed && status.denied != Some(true)))
    }

    fn failed(&self, resource: &'static str, error: Option<kube::Error>) -> Unreviewed {
        match error {
            Some(kube::Error::Api(status)) if status.code == 403 => {
                self.warn("create", &status.message);
                Unreviewed::Unavailable(format!("this process may not create {resource}: give it this right"))
            }
            Some(error) => self.unavailable(resource, &crate::message(error)),
            None => self.unavailable(resource, "no answer in time"),
        }
    }

    fn unavailable(&self, doing: &str, error: &str) -> Unreviewed {
        self.warn(doing, error);
        Unreviewed::Unavailable("the API server does not answer".to_owned())
    }

    /// Logs why a token cannot be reviewed, once a minute at most: any client can cause it.
    fn warn(&self, doing: &str, error: &str) {
        if self.warnings.lock().unwrap_or_else(PoisonError::into_inner).allows((), Instant::now()) {
            tracing::warn!(doing, error, "tokens cannot be reviewed: metrics are not served to new callers");
        }
    }
}

impl Review for MetricsReview {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Verdict, Unreviewed>> {
        self.decide(token).boxed()
    }
}
