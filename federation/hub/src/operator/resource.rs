//! The kinds of custom resources that the operator reconciles.

use std::sync::Arc;

use kube::CustomResourceExt as _;
use kube::api::ApiResource;

use crate::custom_resources::{
    ClusterJoinToken, ClusterSet, FederatedNetworkPolicy, FederatedNetworkSet, MemberCluster,
    StagedFederatedNetworkPolicy, Tier,
};
use crate::manifest::{Kind, ObjectId};

/// A kind of `hanse.dev`. The order is that in which objects are applied; they are deleted in the opposite order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resource {
    ClusterSet,
    MemberCluster,
    Tier,
    FederatedNetworkSet,
    FederatedNetworkPolicy,
    StagedFederatedNetworkPolicy,
    ClusterJoinToken,
}

/// A custom resource.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub resource: Resource,
    pub name: Arc<str>,
}

impl Resource {
    pub const ALL: [Self; 7] = [
        Self::ClusterSet,
        Self::MemberCluster,
        Self::Tier,
        Self::FederatedNetworkSet,
        Self::FederatedNetworkPolicy,
        Self::StagedFederatedNetworkPolicy,
        Self::ClusterJoinToken,
    ];

    /// The kind of the hub's objects that custom resources of this kind become.
    pub fn kind(self) -> Option<Kind> {
        Some(match self {
            Self::MemberCluster => Kind::MemberCluster,
            Self::Tier => Kind::Tier,
            Self::FederatedNetworkSet => Kind::FederatedNetworkSet,
            Self::FederatedNetworkPolicy => Kind::FederatedNetworkPolicy,
            Self::StagedFederatedNetworkPolicy => Kind::StagedFederatedNetworkPolicy,
            Self::ClusterSet | Self::ClusterJoinToken => return None,
        })
    }

    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::MemberCluster => Self::MemberCluster,
            Kind::Tier => Self::Tier,
            Kind::FederatedNetworkSet => Self::FederatedNetworkSet,
            Kind::FederatedNetworkPolicy => Self::FederatedNetworkPolicy,
            Kind::StagedFederatedNetworkPolicy => Self::StagedFederatedNetworkPolicy,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::ClusterSet => "ClusterSet",
            Self::ClusterJoinToken => "ClusterJoinToken",
            Self::MemberCluster => Kind::MemberCluster.name(),
            Self::Tier => Kind::Tier.name(),
            Self::FederatedNetworkSet => Kind::FederatedNetworkSet.name(),
            Self::FederatedNetworkPolicy => Kind::FederatedNetworkPolicy.name(),
            Self::StagedFederatedNetworkPolicy => Kind::StagedFederatedNetworkPolicy.name(),
        }
    }

    pub fn api(self) -> ApiResource {
        match self {
            Self::ClusterSet => ClusterSet::api_resource(),
            Self::MemberCluster => MemberCluster::api_resource(),
            Self::Tier => Tier::api_resource(),
            Self::FederatedNetworkSet => FederatedNetworkSet::api_resource(),
            Self::FederatedNetworkPolicy => FederatedNetworkPolicy::api_resource(),
            Self::StagedFederatedNetworkPolicy => StagedFederatedNetworkPolicy::api_resource(),
            Self::ClusterJoinToken => ClusterJoinToken::api_resource(),
        }
    }

    /// The name of its CustomResourceDefinition.
    pub fn definition(self) -> String {
        format!("{}.hanse.dev", self.api().plural)
    }
}

impl Key {
    pub fn new(resource: Resource, name: &str) -> Self {
        Self { resource, name: name.into() }
    }

    pub fn of(id: &ObjectId) -> Self {
        Self { resource: Resource::of(id.kind), name: Arc::clone(&id.name) }
    }

    /// The hub's object that it becomes.
    pub fn object(&self) -> Option<ObjectId> {
        Some(ObjectId { kind: self.resource.kind()?, name: Arc::clone(&self.name) })
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.resource.name(), self.name)
    }
}
