//! Rights of users of the management cluster, by SubjectAccessReview: the verbs `use` and `approve` on `tiers.hanse.dev`.

use anyhow::Context as _;
use hanse_kubernetes::answered;
use k8s_openapi::api::authentication::v1::UserInfo;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};

use crate::management::{Monitor, Task};

/// What a user does with a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    /// Writes policies into it, changes or deletes those in it.
    Use,
    /// Approves changes of others.
    Approve,
}

impl Verb {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Use => "use",
            Self::Approve => "approve",
        }
    }
}

/// Queries the API server for rights.
#[derive(Clone)]
pub(super) struct Access {
    api: Api<SubjectAccessReview>,
    monitor: Monitor,
}

impl Access {
    pub(super) fn new(client: Client, monitor: Monitor) -> Self {
        Self { api: Api::all(client), monitor }
    }

    /// Whether `user` may. `tier`: `None` for all tiers, which a rule with `resourceNames` does not allow.
    ///
    /// # Errors
    /// When the API server does not answer: this allows nothing.
    pub(super) async fn allows(&self, user: &UserInfo, verb: Verb, tier: Option<&str>) -> anyhow::Result<bool> {
        let attributes = ResourceAttributes {
            group: Some("hanse.dev".to_owned()),
            version: Some("v1alpha1".to_owned()),
            resource: Some("tiers".to_owned()),
            verb: Some(verb.name().to_owned()),
            name: tier.map(str::to_owned),
            ..ResourceAttributes::default()
        };
        let spec = SubjectAccessReviewSpec {
            user: user.username.clone(),
            groups: user.groups.clone(),
            uid: user.uid.clone(),
            extra: user.extra.clone(),
            resource_attributes: Some(attributes),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let answer = answered(self.api.create(&PostParams::default(), &review)).await;
        match &answer {
            Ok(_) => self.monitor.succeeded(Task::Review, ""),
            Err(error) => self.monitor.failed(Task::Review, "", error),
        }
        let answer = answer.with_context(|| format!("check the verb {} on tiers.hanse.dev", verb.name()))?;
        Ok(answer.status.is_some_and(|status| status.allowed && status.denied != Some(true)))
    }
}
