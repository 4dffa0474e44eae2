//! The ClusterSet: settings of the hub.

use anyhow::Context as _;
use hanse_api::hanse::ClusterSetSpec;
use hanse_api::limits::LEASE_SECONDS;
use serde_json::Value;
use tokio::time::Instant;

use super::Reconciler;
use crate::custom_resources::ClusterSetStatus;
use crate::manifest::ObjectId;
use crate::operator::condition::{Answer, Refusal, conditions, json};
use crate::operator::members;
use crate::operator::objects::Defaults;
use crate::operator::resource::{Key, Resource};
use crate::operator::tracked::{Details, Refused, Tracked};
use crate::registry::Snapshot;
use crate::registry::records::Settings;

/// The name of the only ClusterSet.
pub const NAME: &str = "default";

/// The settings of a ClusterSet, or why the hub does not use it.
pub fn decide(name: &str, spec: &Result<Box<ClusterSetSpec>, String>, trust_domain: &str) -> Result<Settings, Refusal> {
    let refused = |reason, message| Err(Refusal { reason, message });
    if name != NAME {
        let message = format!("metadata.name: a management cluster has one ClusterSet, with the name {NAME}");
        return refused("NotTheClusterSet", message);
    }
    let spec = spec.as_ref().map_err(|error| Refusal { reason: "Invalid", message: error.clone() })?;
    if spec.trust_domain != trust_domain {
        let given = &spec.trust_domain;
        let message = format!(
            "spec.trustDomain: \"{given}\" is not the trust domain of this hub, {trust_domain}, which cannot be changed"
        );
        return refused("TrustDomainMismatch", message);
    }
    if let Some(seconds) = spec.lease_seconds.filter(|it| !LEASE_SECONDS.contains(it)) {
        let (least, most) = (LEASE_SECONDS.start(), LEASE_SECONDS.end());
        return refused("Invalid", format!("spec.leaseSeconds: {seconds} is not between {least} and {most}"));
    }
    Ok(Settings { lease_seconds: spec.lease_seconds })
}

impl Reconciler {
    /// Uses the settings of the ClusterSet. What is refused changes nothing: the last accepted version stays in force.
    pub(super) async fn configure(&mut self) -> anyhow::Result<()> {
        let trust_domain = self.administration.trust_domain();
        let revision = self.registry.snapshot().revision;
        let mut used = None;
        for (key, it) in self.tracked.iter_mut().filter(|(key, _)| key.resource == Resource::ClusterSet) {
            let Details::ClusterSet(spec) = &it.details else { continue };
            if it.is_leaving || !it.has_finalizer() {
                continue;
            }
            match decide(&key.name, spec, &trust_domain) {
                Ok(settings) => {
                    let defaults = spec.as_ref().ok().and_then(|it| it.defaults.clone());
                    it.refused = None;
                    used = Some((settings, Defaults::new(defaults)));
                }
                Err(refusal) => {
                    if it.refused.as_ref().is_none_or(|it| it.refusal != refusal) {
                        self.writer.metrics.refused("hub");
                        it.refused = Some(Refused::new(refusal, revision, true, None, Instant::now()));
                    }
                }
            }
        }
        let Some((settings, defaults)) = used else { return Ok(()) };
        self.set_defaults(defaults);
        if self.registry.snapshot().settings.as_ref() != Some(&settings) {
            self.administration
                .operate_settings(Some(&settings))
                .await
                .context("write the settings of the ClusterSet")?;
        }
        Ok(())
    }

    /// MemberClusters that do not state a limit have another one now.
    fn set_defaults(&mut self, defaults: Defaults) {
        if defaults == self.defaults {
            return;
        }
        self.defaults = defaults;
        let clusters = self.tracked.iter_mut().filter(|(key, _)| key.resource == Resource::MemberCluster);
        clusters.for_each(|(_, it)| Tracked::outdate(it));
    }

    /// Without a ClusterSet, the hub has the settings of its command line.
    pub(super) async fn unconfigure(&mut self, key: &Key) -> anyhow::Result<()> {
        if &*key.name == NAME {
            self.set_defaults(Defaults::default());
            self.administration.operate_settings(None).await.context("remove the settings of the ClusterSet")?;
        }
        Ok(())
    }
}

/// The status of a ClusterSet.
pub fn status(
    snapshot: &Snapshot,
    tracked: &Tracked,
    root_fingerprint: String,
    (named, without_resource): &(Vec<ObjectId>, usize),
) -> Value {
    let ready = match &tracked.refused {
        Some(Refused { refusal: Refusal { reason, message }, .. }) => Answer::new("Ready", false, reason, message),
        None if snapshot.settings.is_none() => {
            Answer::new("Ready", false, "Pending", "the hub does not use these settings yet")
        }
        None => Answer::new("Ready", true, "Ready", "the hub uses these settings"),
    };
    let synchronized = match without_resource {
        0 => Answer::new("Synchronized", true, "Synchronized", "every object of the hub has a custom resource"),
        count => {
            let text = "objects of the hub without a custom resource, which stay in force";
            Answer::new("Synchronized", false, "ObjectsWithoutResource", format!("{text}: {count}"))
        }
    };
    let (connected, accepted) = members::count(snapshot);
    json(&ClusterSetStatus {
        observed_generation: tracked.generation,
        conditions: conditions(vec![ready, synchronized], tracked.generation, &tracked.status),
        clusters: Some(format!("{connected}/{accepted}")),
        root_fingerprint: Some(root_fingerprint),
        objects_without_resource: named.iter().map(ToString::to_string).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_trust_domain_is_refused() {
        let spec = |trust_domain: &str, lease_seconds| {
            Ok(Box::new(ClusterSetSpec {
                trust_domain: trust_domain.to_owned(),
                lease_seconds,
                ..ClusterSetSpec::default()
            }))
        };
        let reason = |name, spec| decide(name, &spec, "a.example").map_err(|it| it.reason);
        assert_eq!(reason(NAME, spec("a.example", Some(60))), Ok(Settings { lease_seconds: Some(60) }));
        assert_eq!(reason(NAME, spec("b.example", None)), Err("TrustDomainMismatch"));
        assert_eq!(reason("other", spec("a.example", None)), Err("NotTheClusterSet"));
        assert_eq!(reason(NAME, spec("a.example", Some(1))), Err("Invalid"));
        assert_eq!(reason(NAME, Err("spec: no".to_owned())), Err("Invalid"));
    }
}
