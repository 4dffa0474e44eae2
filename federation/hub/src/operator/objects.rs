//! Custom resources as the hub's objects.

use std::time::Duration;

use bytes::Bytes;
use hanse_api::hanse::DefaultsSpec;
use hanse_kubernetes::change;
use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::resource::Resource;

/// While an object has it, its deletion waits for the hub.
pub const FINALIZER: &str = "hanse.dev/operator";

/// The defaults of the ClusterSet.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Defaults {
    /// The limits of a MemberCluster, by the names of their fields.
    limits: Vec<(&'static str, u64)>,
    token_seconds: Option<u64>,
}

impl Defaults {
    pub fn new(spec: Option<DefaultsSpec>) -> Self {
        let DefaultsSpec { limits, join_token_seconds } = spec.unwrap_or_default();
        let limits = [
            ("endpoints", limits.endpoints),
            ("labelSets", limits.label_sets),
            ("updatesPerSecond", limits.updates_per_second),
        ];
        let limits = limits.into_iter().filter_map(|(name, limit)| Some((name, limit?))).collect();
        Self { limits, token_seconds: join_token_seconds }
    }

    /// The lifetime of a join token.
    pub fn token_life(&self) -> Option<Duration> {
        self.token_seconds.map(Duration::from_secs)
    }

    /// Fills the limits that the spec of a MemberCluster does not state.
    fn fill(&self, spec: &mut Value) {
        for (name, limit) in &self.limits {
            let mut at = &mut *spec;
            for field in ["grants", "limits"] {
                if at.is_null() {
                    *at = json!({});
                }
                let Some(fields) = at.as_object_mut() else { return };
                at = fields.entry(field).or_insert(Value::Null);
            }
            if at.is_null() {
                *at = json!({});
            }
            let Some(limits) = at.as_object_mut() else { return };
            if limits.get(*name).is_none_or(Value::is_null) {
                limits.insert((*name).to_owned(), json!(limit));
            }
        }
    }
}

/// What `hanse apply` would send: name, labels and spec. The same object has always the same bytes.
pub fn manifest(resource: Resource, object: &DynamicObject, defaults: &Defaults) -> Bytes {
    let mut manifest = change::object(resource.name(), object);
    if resource == Resource::MemberCluster {
        defaults.fill(&mut manifest["spec"]);
    }
    manifest.sort_all_objects();
    Bytes::from(manifest.to_string())
}

#[cfg(test)]
mod tests {
    use hanse_api::hanse::LimitsSpec;

    use super::*;

    #[test]
    fn manifest_has_name_labels_and_spec_only() {
        let object = json!({
            "apiVersion": "hanse.dev/v1alpha1", "kind": "FederatedNetworkSet",
            "metadata": {
                "name": "n", "uid": "1", "generation": 2, "labels": {"b": "2", "a": "1"}, "annotations": {"x": "y"},
            },
            "spec": {"nets": ["10.0.0.0/8"]}, "status": {"nets": 1},
        });
        let object: DynamicObject = serde_json::from_value(object).expect("an object");
        let bytes = manifest(Resource::FederatedNetworkSet, &object, &Defaults::default());
        let expected = r#"{"apiVersion":"hanse.dev/v1alpha1","kind":"FederatedNetworkSet","metadata":{"labels":{"a":"1","b":"2"},"name":"n"},"spec":{"nets":["10.0.0.0/8"]}}"#;
        assert_eq!(std::str::from_utf8(&bytes), Ok(expected));
        crate::manifest::check(&bytes).expect("the hub reads it");
    }

    #[test]
    fn limits_of_the_cluster_set_fill_what_a_member_cluster_does_not_state() {
        let defaults = |endpoints, label_sets| {
            let limits = LimitsSpec { endpoints, label_sets, updates_per_second: None };
            Defaults::new(Some(DefaultsSpec { limits, join_token_seconds: None }))
        };
        let limits = |spec: Value, defaults: &Defaults| {
            let object = json!({
                "apiVersion": "hanse.dev/v1alpha1", "kind": "MemberCluster", "metadata": {"name": "a"}, "spec": spec,
            });
            let object: DynamicObject = serde_json::from_value(object).expect("an object");
            let bytes = manifest(Resource::MemberCluster, &object, defaults);
            crate::manifest::check(&bytes).expect("the hub reads it");
            serde_json::from_slice::<Value>(&bytes).expect("JSON")["spec"]["grants"]["limits"].clone()
        };
        assert_eq!(limits(json!({}), &defaults(Some(5), None)), json!({"endpoints": 5}));
        let own = json!({"grants": {"limits": {"endpoints": 7}}});
        assert_eq!(limits(own, &defaults(Some(5), Some(6))), json!({"endpoints": 7, "labelSets": 6}));
        assert_eq!(limits(json!({}), &Defaults::default()), Value::Null);
    }
}
