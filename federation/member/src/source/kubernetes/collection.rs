//! The collections of an API server that a member reads.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::DynamicResourceScope;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// All objects of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collection {
    /// Empty for the core group.
    pub group: &'static str,
    pub version: &'static str,
    pub plural: &'static str,
    pub kind: &'static str,
    /// A CustomResourceDefinition defines the kind, which may not exist.
    pub is_custom: bool,
}

const fn built_in(group: &'static str, version: &'static str, plural: &'static str, kind: &'static str) -> Collection {
    Collection { group, version, plural, kind, is_custom: false }
}

const fn custom(group: &'static str, version: &'static str, plural: &'static str, kind: &'static str) -> Collection {
    Collection { group, version, plural, kind, is_custom: true }
}

/// The form in which Calico stores its objects.
const CALICO_STORED: &str = "crd.projectcalico.org";
/// Calico's API, if it is installed as CustomResourceDefinitions. Where it is an aggregated API server, the stored objects are read.
const CALICO: &str = "projectcalico.org";

/// Every collection that is read.
pub const COLLECTIONS: &[Collection] = &[
    built_in("", "v1", "namespaces", "Namespace"),
    built_in("", "v1", "nodes", "Node"),
    built_in("", "v1", "pods", "Pod"),
    built_in("", "v1", "services", "Service"),
    built_in("", "v1", "serviceaccounts", "ServiceAccount"),
    built_in("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    built_in("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    custom("policy.networking.k8s.io", "v1alpha2", "clusternetworkpolicies", "ClusterNetworkPolicy"),
    custom(CALICO_STORED, "v1", "tiers", "Tier"),
    custom(CALICO_STORED, "v1", "networkpolicies", "NetworkPolicy"),
    custom(CALICO_STORED, "v1", "globalnetworkpolicies", "GlobalNetworkPolicy"),
    custom(CALICO_STORED, "v1", "stagednetworkpolicies", "StagedNetworkPolicy"),
    custom(CALICO_STORED, "v1", "stagedglobalnetworkpolicies", "StagedGlobalNetworkPolicy"),
    custom(CALICO_STORED, "v1", "stagedkubernetesnetworkpolicies", "StagedKubernetesNetworkPolicy"),
    custom(CALICO_STORED, "v1", "networksets", "NetworkSet"),
    custom(CALICO_STORED, "v1", "globalnetworksets", "GlobalNetworkSet"),
    custom(CALICO, "v3", "tiers", "Tier"),
    custom(CALICO, "v3", "networkpolicies", "NetworkPolicy"),
    custom(CALICO, "v3", "globalnetworkpolicies", "GlobalNetworkPolicy"),
    custom(CALICO, "v3", "stagednetworkpolicies", "StagedNetworkPolicy"),
    custom(CALICO, "v3", "stagedglobalnetworkpolicies", "StagedGlobalNetworkPolicy"),
    custom(CALICO, "v3", "stagedkubernetesnetworkpolicies", "StagedKubernetesNetworkPolicy"),
    custom(CALICO, "v3", "networksets", "NetworkSet"),
    custom(CALICO, "v3", "globalnetworksets", "GlobalNetworkSet"),
];

/// The definitions of the custom collections.
pub const DEFINITIONS: Collection =
    built_in("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition");

impl Collection {
    /// Its name, as `kubectl` accepts it: `pods`, `networkpolicies.networking.k8s.io`.
    pub fn name(&self) -> String {
        match self.group {
            "" => self.plural.to_owned(),
            group => format!("{}.{group}", self.plural),
        }
    }

    pub fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// Whether its objects are policies or sets of nets, which users may make as large as an API server stores.
    pub fn is_policy(&self) -> bool {
        !matches!(self.group, "" | "discovery.k8s.io" | "apiextensions.k8s.io")
    }

    /// The origin that marks that the collection was listed completely, and the scope of all its objects.
    pub fn origin(&self) -> Arc<Path> {
        Path::new(&self.name()).into()
    }
}

/// An object as the API server sends it.
#[derive(Debug, Clone)]
pub struct Raw {
    text: Box<RawValue>,
    /// Its name, namespace and resource version only.
    metadata: ObjectMeta,
    /// Items of lists of built-in kinds have neither `apiVersion` nor `kind`.
    has_kind: bool,
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Head<'a> {
            #[serde(borrow)]
            kind: Option<Cow<'a, str>>,
            metadata: Metadata,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            name: Option<String>,
            namespace: Option<String>,
            resource_version: Option<String>,
        }
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let head: Head<'_> = serde_json::from_str(text.get()).map_err(serde::de::Error::custom)?;
        let Metadata { name, namespace, resource_version } = head.metadata;
        let metadata = ObjectMeta { name, namespace, resource_version, ..ObjectMeta::default() };
        Ok(Self { has_kind: head.kind.is_some_and(|kind| !kind.is_empty()), metadata, text })
    }
}

impl Raw {
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    pub fn namespace(&self) -> Option<&str> {
        self.metadata.namespace.as_deref()
    }

    /// The JSON of the object, with `apiVersion` and `kind`.
    pub fn text(&self, of: &Collection) -> Cow<'_, str> {
        let text = self.text.get();
        match text.trim_start().strip_prefix('{') {
            Some(fields) if !self.has_kind => {
                let comma = if fields.trim_start().starts_with('}') { "" } else { "," };
                format!(r#"{{"apiVersion":"{}","kind":"{}"{comma}{fields}"#, of.api_version(), of.kind).into()
            }
            _ => text.into(),
        }
    }
}

impl Resource for Raw {
    type DynamicType = Collection;
    type Scope = DynamicResourceScope;

    fn kind(of: &Collection) -> Cow<'_, str> {
        of.kind.into()
    }

    fn group(of: &Collection) -> Cow<'_, str> {
        of.group.into()
    }

    fn version(of: &Collection) -> Cow<'_, str> {
        of.version.into()
    }

    fn plural(of: &Collection) -> Cow<'_, str> {
        of.plural.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use kube::core::{ObjectList, WatchEvent};

    use super::*;

    #[test]
    fn items_of_lists_get_the_kind_of_their_list() {
        let list = r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"7","continue":"next"},"items":[
            {"metadata":{"name":"a","namespace":"n","resourceVersion":"3"},"spec":{"nodeName":"one"}}]}"#;
        let list: ObjectList<Raw> = serde_json::from_str(list).expect("a list");
        let pod = &list.items[0];
        assert_eq!(
            (pod.namespace(), pod.name(), pod.metadata.resource_version.as_deref()),
            (Some("n"), "a", Some("3"))
        );
        let pods = COLLECTIONS.iter().find(|it| it.plural == "pods").expect("pods");
        let value: serde_json::Value = serde_json::from_str(&pod.text(pods)).expect("JSON");
        assert_eq!((&value["apiVersion"], &value["kind"]), (&"v1".into(), &"Pod".into()));
        assert_eq!(value["spec"]["nodeName"], "one");
    }

    #[test]
    fn objects_of_watches_are_left_as_they_are() {
        let event = r#"{"type":"ADDED","object":{"kind":"Pod","apiVersion":"v1","metadata":{"name":"a\u0062","labels":{"x":"\"y\""}}}}"#;
        let WatchEvent::Added(pod) = serde_json::from_str::<WatchEvent<Raw>>(event).expect("an event") else {
            panic!("another event");
        };
        assert_eq!(pod.name(), "ab");
        assert!(event.contains(&*pod.text(&COLLECTIONS[2])));
    }

    #[test]
    fn names_are_those_of_kubectl() {
        let names: std::collections::BTreeSet<String> = COLLECTIONS.iter().map(Collection::name).collect();
        assert_eq!(names.len(), COLLECTIONS.len());
        assert!(names.contains("pods") && names.contains("networkpolicies.networking.k8s.io"), "{names:?}");
    }
}
