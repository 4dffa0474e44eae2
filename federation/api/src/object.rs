//! One object of a kind that is read: decoded, validated and converted at once.

use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId};
use hanse_policy::model::{PolicyId, PolicyKind, Tier};
use serde::de::DeserializeOwned;

use crate::calico;
use crate::cluster_network_policy::ClusterNetworkPolicy;
use crate::decode::typed;
use crate::diagnostic::Reference;
use crate::document::Node as Value;
use crate::field::{Errors, FieldError, Path};
use crate::hanse::{self, ClusterJoinTokenSpec, ClusterSetSpec, Member};
use crate::inventory::{EndpointSlice, Namespace, Node, Pod, Service, ServiceAccount};
use crate::kind;
use crate::kubernetes;
use crate::metadata::{Metadata, check_metadata};
use crate::network_policy::{self, NetworkPolicy};
use crate::policy::{FederatedPolicy, LocalPolicy};
use crate::strict;
use crate::unreadable;

#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    Namespace(Namespace),
    Node(Node),
    ServiceAccount(ServiceAccount),
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(EndpointSlice),
    /// A tier of the cluster.
    Tier(Tier),
    /// A policy of the cluster, of any kind.
    Policy(Box<LocalPolicy>),
    /// A network set of the cluster, with or without a namespace.
    NetworkSet(EndpointId, Box<Endpoint>),
    FederatedTier(Tier),
    /// A policy of the federation, enforced or staged.
    FederatedPolicy(Box<FederatedPolicy>),
    FederatedNetworkSet(EndpointId, Box<Endpoint>),
    Member(Box<Member>),
    /// For the operator.
    ClusterSet(Box<ClusterSetSpec>),
    /// For the operator.
    ClusterJoinToken(Box<ClusterJoinTokenSpec>),
}

impl Object {
    /// Whether its kind has a namespace. Of other kinds a namespace in the metadata is ignored.
    pub fn is_namespaced(&self) -> bool {
        match self {
            Self::ServiceAccount(_) | Self::Pod(_) | Self::Service(_) | Self::EndpointSlice(_) => true,
            Self::Policy(policy) => policy.local_id().namespace.is_some(),
            Self::NetworkSet(id, _) => id.namespace.is_some(),
            Self::Namespace(_)
            | Self::Node(_)
            | Self::Tier(_)
            | Self::FederatedTier(_)
            | Self::FederatedPolicy(_)
            | Self::FederatedNetworkSet(..)
            | Self::Member(_)
            | Self::ClusterSet(_)
            | Self::ClusterJoinToken(_) => false,
        }
    }

    /// Whether it belongs to the federation, and not to one cluster.
    pub fn is_federated(&self) -> bool {
        matches!(
            self,
            Self::FederatedTier(_)
                | Self::FederatedPolicy(_)
                | Self::FederatedNetworkSet(..)
                | Self::Member(_)
                | Self::ClusterSet(_)
                | Self::ClusterJoinToken(_)
        )
    }

    /// The name where it may differ from the one in the manifest: Calico stores some objects under another name.
    pub(crate) fn own_name(&self) -> Option<&Arc<str>> {
        match self {
            Self::Policy(policy) => Some(&policy.local_id().name),
            Self::Tier(tier) => Some(&tier.id.name),
            Self::NetworkSet(id, _) => Some(&id.name),
            _ => None,
        }
    }

    pub(crate) fn is_policy(&self) -> bool {
        matches!(self, Self::Policy(_) | Self::FederatedPolicy(_))
    }

    /// The policy that is in force of one of which nothing can be read. `None` if the object is not an enforced policy, or is one of
    /// the federation without a readable tier.
    pub(crate) fn unread_policy(
        reference: &Reference,
        node: Value<'_>,
        defaults: Defaults<'_>,
        why: &FieldError,
    ) -> Option<Self> {
        let kind = kind::enforced_policy(reference)?;
        let name = if reference.name.is_empty() { defaults.name? } else { &reference.name };
        let name = match reference.api_version.as_str() {
            calico::CRD_API_VERSION => calico::name_of_stored(name),
            _ => name,
        };
        let is_global = matches!(
            kind,
            PolicyKind::ClusterNetworkPolicy
                | PolicyKind::CalicoGlobalNetworkPolicy
                | PolicyKind::FederatedNetworkPolicy
        );
        let namespace = (!is_global).then(|| match (&reference.namespace, defaults.namespace) {
            (Some(namespace), _) => namespace.as_str().into(),
            (None, Some(namespace)) => Arc::clone(namespace),
            (None, None) => "default".into(),
        });
        let spec = node.child("spec");
        let tier = match spec.and_then(|spec| spec.child("tier")) {
            None if matches!(kind, PolicyKind::CalicoNetworkPolicy | PolicyKind::CalicoGlobalNetworkPolicy) => {
                Some("default")
            }
            tier => tier.and_then(Value::text).filter(|_| kind != PolicyKind::ClusterNetworkPolicy),
        };
        let (tier, order) = match kind {
            PolicyKind::KubernetesNetworkPolicy => (Some("default"), Some(network_policy::ORDER)),
            _ => (tier, None),
        };
        let policy =
            unreadable::unread(PolicyId { cluster: None, kind, namespace, name: name.into() }, tier, order, why);
        Some(match kind {
            PolicyKind::FederatedNetworkPolicy => {
                tier.filter(|tier| !tier.is_empty())?;
                Self::FederatedPolicy(Box::new(FederatedPolicy::new(policy, None, Vec::new())))
            }
            _ => Self::Policy(Box::new(LocalPolicy::new(policy))),
        })
    }

    /// Makes unknown what errors of a policy concern.
    pub(crate) fn restrict(&mut self, errors: &[FieldError]) {
        match self {
            Self::Policy(policy) => policy.restrict(errors),
            Self::FederatedPolicy(policy) => policy.restrict(errors),
            _ => {}
        }
    }

    /// Makes the rules of a policy unknown that have one of these fields.
    pub(crate) fn mark_unknown(&mut self, paths: &[String]) {
        match self {
            Self::Policy(policy) => policy.mark_unknown(paths),
            Self::FederatedPolicy(policy) => policy.mark_unknown(paths),
            _ => {}
        }
    }
}

/// An object, and what API servers refuse of it although it is read.
pub(crate) struct Converted {
    pub object: Object,
    pub not_storable: Vec<FieldError>,
}

/// The parts of an object's metadata that its manifest leaves to the API server or to `kubectl`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Defaults<'a> {
    /// The name of an object that has none.
    pub name: Option<&'a str>,
    /// The namespace of an object of a namespaced kind that names none.
    pub namespace: Option<&'a Arc<str>>,
    /// An API server has accepted the object, see [`Errors::with_accepted_metadata`].
    pub is_accepted: bool,
}

/// Why an object is refused, and the object as far as it was converted. Without an object, it could not be decoded.
#[derive(Debug)]
pub(crate) struct Refused {
    pub errors: Vec<FieldError>,
    pub object: Option<Object>,
}

impl From<Vec<FieldError>> for Refused {
    fn from(errors: Vec<FieldError>) -> Self {
        Self { errors, object: None }
    }
}

impl Defaults<'_> {
    fn apply(self, metadata: &mut Metadata, is_namespaced: bool) {
        if let Some(name) = self.name {
            name.clone_into(&mut metadata.name);
        }
        if let Some(namespace) = self.namespace
            && is_namespaced
            && metadata.namespace.as_deref().is_none_or(str::is_empty)
        {
            metadata.namespace = Some(Arc::clone(namespace));
        }
    }
}

/// Reads an object. `None`: a kind that Hanse does not read.
pub(crate) fn read(
    reference: &Reference,
    node: Value<'_>,
    defaults: Defaults<'_>,
) -> Result<Option<Converted>, Refused> {
    let read = Reader { node, defaults };
    let (api_version, kind) = (reference.api_version.as_str(), reference.kind.as_str());
    let object = match (api_version, kind) {
        ("v1", "Namespace") => read.convert(|it: kubernetes::Namespace, errors| {
            it.check(errors);
            Object::Namespace(it.convert())
        }),
        ("v1", "Node") => read.convert(|it: kubernetes::Node, errors| {
            it.check(errors);
            Object::Node(it.convert())
        }),
        ("v1", "ServiceAccount") => read.convert(|it: kubernetes::ServiceAccount, errors| {
            check_metadata(&it.metadata, errors);
            Object::ServiceAccount(it.convert())
        }),
        ("v1", "Pod") => return read.pod().map(Some),
        ("v1", "Service") => return read.service().map(Some),
        ("discovery.k8s.io/v1", "EndpointSlice") => read.convert(|it: kubernetes::EndpointSlice, errors| {
            it.check(errors);
            Object::EndpointSlice(it.convert())
        }),
        ("networking.k8s.io/v1", "NetworkPolicy") => {
            read.convert(|it: NetworkPolicy, errors| Object::Policy(Box::new(it.convert(errors))))
        }
        ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy") => {
            read.convert(|it: ClusterNetworkPolicy, errors| Object::Policy(Box::new(it.convert(errors))))
        }
        (hanse::API_VERSION, "FederatedNetworkPolicy") => read
            .convert(|it: hanse::FederatedNetworkPolicy, errors| Object::FederatedPolicy(Box::new(it.convert(errors)))),
        (hanse::API_VERSION, "StagedFederatedNetworkPolicy") => {
            read.convert(|it: hanse::StagedFederatedNetworkPolicy, errors| {
                Object::FederatedPolicy(Box::new(it.convert(errors)))
            })
        }
        (hanse::API_VERSION, "Tier") => {
            read.convert(|it: hanse::Tier, errors| Object::FederatedTier(it.convert(errors)))
        }
        (hanse::API_VERSION, "FederatedNetworkSet") => read.convert(|it: hanse::FederatedNetworkSet, errors| {
            let (id, set) = it.convert(errors);
            Object::FederatedNetworkSet(id, Box::new(set))
        }),
        (hanse::API_VERSION, "MemberCluster") => {
            read.convert(|it: hanse::MemberCluster, errors| Object::Member(Box::new(it.convert(errors))))
        }
        (hanse::API_VERSION, "ClusterSet") => read.convert(|it: hanse::ClusterSet, errors| {
            it.check(errors);
            Object::ClusterSet(Box::new(it.spec))
        }),
        (hanse::API_VERSION, "ClusterJoinToken") => read.convert(|it: hanse::ClusterJoinToken, errors| {
            it.check(errors);
            Object::ClusterJoinToken(Box::new(it.spec))
        }),
        (calico::API_VERSION | calico::CRD_API_VERSION, _) => {
            match calico::read(reference, kind, node, defaults.is_accepted)? {
                Some(object) => read.calico(object),
                None => return Ok(None),
            }
        }
        _ => return Ok(None),
    };
    Ok(Some(Converted { object: object?, not_storable: Vec::new() }))
}

/// An API type with metadata.
trait Wire: DeserializeOwned {
    const IS_NAMESPACED: bool;

    fn metadata_mut(&mut self) -> &mut Metadata;
}

macro_rules! wire {
    ($($kind:ty: $is_namespaced:literal),* $(,)?) => {
        $(impl Wire for $kind {
            const IS_NAMESPACED: bool = $is_namespaced;

            fn metadata_mut(&mut self) -> &mut Metadata {
                &mut self.metadata
            }
        })*
    };
}

wire!(
    kubernetes::Namespace: false,
    kubernetes::Node: false,
    kubernetes::ServiceAccount: true,
    kubernetes::Pod: true,
    kubernetes::Service: true,
    kubernetes::EndpointSlice: true,
    NetworkPolicy: true,
    ClusterNetworkPolicy: false,
    hanse::FederatedNetworkPolicy: false,
    hanse::StagedFederatedNetworkPolicy: false,
    hanse::Tier: false,
    hanse::FederatedNetworkSet: false,
    hanse::MemberCluster: false,
    hanse::ClusterSet: false,
    hanse::ClusterJoinToken: false,
);

struct Reader<'a> {
    node: Value<'a>,
    defaults: Defaults<'a>,
}

impl Reader<'_> {
    fn decode<W: Wire>(&self) -> Result<W, Vec<FieldError>> {
        let mut wire: W = typed(self.node)?;
        self.defaults.apply(wire.metadata_mut(), W::IS_NAMESPACED);
        Ok(wire)
    }

    fn convert<W: Wire>(&self, convert: impl FnOnce(W, &mut Errors) -> Object) -> Result<Object, Refused> {
        let mut errors = Errors::default().with_accepted_metadata(self.defaults.is_accepted);
        let object = convert(self.decode()?, &mut errors);
        if errors.0.is_empty() { Ok(object) } else { Err(Refused { errors: errors.0, object: Some(object) }) }
    }

    fn pod(&self) -> Result<Converted, Refused> {
        let mut not_storable = Errors::default();
        let object = self.convert(|it: kubernetes::Pod, errors| {
            it.check(errors);
            strict::check_pod(&it.spec, &Path::Root("spec"), &mut not_storable);
            Object::Pod(Box::new(it.convert()))
        })?;
        Ok(Converted { object, not_storable: not_storable.0 })
    }

    fn service(&self) -> Result<Converted, Refused> {
        let mut not_storable = Errors::default();
        let object = self.convert(|it: kubernetes::Service, errors| {
            it.check(errors);
            strict::check_service(&it, &mut not_storable);
            Object::Service(Box::new(it.convert()))
        })?;
        Ok(Converted { object, not_storable: not_storable.0 })
    }

    fn calico(&self, mut object: calico::CalicoObject) -> Result<Object, Refused> {
        let is_namespaced = object.is_namespaced();
        self.defaults.apply(object.metadata_mut(), is_namespaced);
        let mut errors = Errors::default().with_accepted_metadata(self.defaults.is_accepted);
        let object = match object.convert(&mut errors) {
            calico::Converted::Tier(tier) => Object::Tier(tier),
            calico::Converted::Policy(policy) => Object::Policy(policy),
            calico::Converted::NetworkSet(id, set) => Object::NetworkSet(id, set),
        };
        if errors.0.is_empty() { Ok(object) } else { Err(Refused { errors: errors.0, object: Some(object) }) }
    }
}
