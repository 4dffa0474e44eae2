//! Which objects the grant of a cluster permits.

use std::sync::Arc;

use hanse_policy::inventory::LabelGrant;

use crate::codec::object::Object;
use crate::model::{Grant, Refusal};

/// The label with a namespace's name.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

#[derive(Debug)]
pub(super) struct Granted {
    pub(super) grant: Arc<dyn Grant>,
    pub(super) labels: LabelGrant,
}

impl Granted {
    pub(super) fn new(grant: Arc<dyn Grant>) -> Self {
        Self { labels: grant.label_grant(), grant }
    }

    /// The object, or why it is refused.
    pub(super) fn permit(&self, export: Object) -> Result<Object, Refusal> {
        let labels = match &export {
            Object::Namespace { name, .. } if !self.grant.permits_namespace(name) => {
                return Err(Refusal::NamespaceNotGranted(name.clone()));
            }
            Object::Namespace { name, labels } => {
                // Kubernetes sets the label to the name, and policies select by it: another value is another namespace.
                if let Some((key, value)) = labels.iter().find(|(key, value)| **key == *NAME_LABEL && value != name) {
                    return Err(Refusal::LabelNotGranted(format!("{key}={value}")));
                }
                labels
            }
            Object::ServiceAccount { labels, .. } => labels,
            Object::Endpoint(endpoint) => {
                if let Some(address) = endpoint.addresses.iter().find(|a| !self.grant.permits_address(**a)) {
                    return Err(Refusal::AddressNotGranted(*address));
                }
                &endpoint.own
            }
            Object::LabelSet { labels } => labels,
            Object::Manifest { .. } | Object::Cluster { .. } => {
                return Err(Refusal::KindNotPublishable("federated objects".into()));
            }
        };
        let granted = |key: &str, value: &str| key == NAME_LABEL || self.grant.permits_label(key, value);
        match labels.iter().find(|(key, value)| !granted(key, value)) {
            Some((key, value)) => Err(Refusal::LabelNotGranted(format!("{key}={value}"))),
            None => Ok(export),
        }
    }
}
