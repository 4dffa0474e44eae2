//! The objects of one cluster, or of the federation, into inventory and policies.

mod cluster;
mod duplicates;
mod federation;
pub mod planned;
pub mod rivals;

use std::collections::BTreeMap;

use hanse_policy::evaluate::Direction;
use hanse_policy::model::{ClusterName, PolicyId};

pub use self::cluster::{Assembly, Changed, ClusterState, NAMESPACE_NAME_LABEL, assemble_cluster};
pub use self::duplicates::duplicates;
pub use self::federation::{Federation, assemble_federation, overlapping_grants, without_tiers};
use crate::calico::{CalicoObject, Converted};
use crate::field::{Errors, FieldError};
use crate::hanse::ClusterLabels;
use crate::kubernetes::ServiceAccount;
use crate::manifest::Object;
use crate::metadata::check_metadata;

/// What is wrong with an object by itself.
pub fn validate(object: &Object) -> Vec<FieldError> {
    let mut errors = Errors::default();
    let cluster: ClusterName = "cluster".into();
    match object {
        Object::NetworkPolicy(policy) => drop(policy.convert(&cluster, &mut errors)),
        Object::ClusterNetworkPolicy(policy) => drop(policy.convert(&cluster, &BTreeMap::new(), &mut errors)),
        Object::Calico(object) => drop(object.convert(&cluster, &mut errors)),
        Object::FederatedNetworkPolicy(policy) => {
            drop(policy.convert(&ClusterLabels::new(), &BTreeMap::new(), &mut errors));
        }
        Object::Tier(tier) => drop(tier.convert(&mut errors)),
        Object::FederatedNetworkSet(set) => drop(set.convert(&mut errors)),
        Object::MemberCluster(member) => drop(member.convert(&mut errors)),
        Object::Namespace(namespace) => namespace.check(&mut errors),
        Object::Pod(pod) => pod.check(&mut errors),
        Object::Node(node) => node.check(&mut errors),
        Object::Service(service) => service.check(&mut errors),
        Object::EndpointSlice(slice) => slice.check(&mut errors),
        Object::ServiceAccount(ServiceAccount { metadata }) => check_metadata(metadata, &mut errors),
    }
    errors.0
}

/// The directions of which a policy has rules that its types leave out, so that they are in no policy of the model; with the field
/// that lists its directions.
pub fn rules_left_out(object: &Object, cluster: &ClusterName) -> Vec<(PolicyId, Direction, &'static str)> {
    let mut errors = Errors::default();
    let (policy, ingress, egress, field) = match object {
        Object::NetworkPolicy(it) => {
            let policy = it.convert(cluster, &mut errors);
            (policy, it.spec.ingress.is_empty(), it.spec.egress.is_empty(), "policyTypes")
        }
        Object::FederatedNetworkPolicy(it) => {
            let policy = it.convert(&ClusterLabels::new(), &BTreeMap::new(), &mut errors);
            (policy, it.spec.ingress.is_empty(), it.spec.egress.is_empty(), "types")
        }
        Object::Calico(object) => {
            let (ingress, egress, field) = match &**object {
                CalicoObject::Policy(_, it) => (it.spec.ingress.is_empty(), it.spec.egress.is_empty(), "types"),
                CalicoObject::StagedKubernetes(it) => {
                    (it.spec.ingress.is_empty(), it.spec.egress.is_empty(), "policyTypes")
                }
                CalicoObject::Tier(_) | CalicoObject::NetworkSet { .. } => return Vec::new(),
            };
            match object.convert(cluster, &mut errors) {
                Converted::Policy(policy) => (*policy, ingress, egress, field),
                Converted::Tier(_) | Converted::NetworkSet(..) => return Vec::new(),
            }
        }
        _ => return Vec::new(),
    };
    let directions = [
        (Direction::Ingress, !ingress && policy.ingress.is_none()),
        (Direction::Egress, !egress && policy.egress.is_none()),
    ];
    let left_out = directions.into_iter().filter(|(_, is_left_out)| *is_left_out);
    left_out.map(|(direction, _)| (policy.id.clone(), direction, field)).collect()
}
