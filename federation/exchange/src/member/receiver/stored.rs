//! The snapshot that outlives restarts.

use std::collections::BTreeMap;

use bytes::Bytes;
use hanse_policy::model::ClusterName;
use prost::Message as _;

use super::super::model::Change;
use super::Receiver;
use super::problem::Check;
use crate::codec::{object, selection};
use crate::model::Position;

#[derive(Clone, PartialEq, prost::Message)]
struct StoredOrigin {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    epoch: u64,
    #[prost(uint64, tag = "3")]
    revision: u64,
    #[prost(fixed64, tag = "4")]
    view: u64,
    #[prost(bytes = "bytes", repeated, tag = "5")]
    objects: Vec<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Stored {
    #[prost(message, optional, tag = "1")]
    hub: Option<StoredOrigin>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    in_force: Vec<Bytes>,
    #[prost(uint64, tag = "3")]
    in_force_epoch: u64,
    #[prost(uint64, tag = "4")]
    in_force_revision: u64,
    #[prost(message, repeated, tag = "5")]
    origins: Vec<StoredOrigin>,
    /// Encoded selections.
    #[prost(bytes = "vec", repeated, tag = "6")]
    interest: Vec<Vec<u8>>,
}

impl Receiver {
    /// From what [`Self::store`] returned; `None` when it cannot be read. Everything is handed out as changes.
    pub fn restore(bytes: &[u8]) -> Option<Self> {
        Self::restore_into(bytes, Self::default())
    }

    /// As [`Self::restore`], and takes only manifests that `check` does not refuse.
    pub fn restore_checked(bytes: &[u8], check: impl Check + 'static) -> Option<Self> {
        Self::restore_into(bytes, Self::checked(check))
    }

    fn restore_into(bytes: &[u8], mut receiver: Self) -> Option<Self> {
        let stored = Stored::decode(bytes).ok()?;
        if let Some(hub) = stored.hub {
            receiver.hub.restore(Position { epoch: hub.epoch, revision: hub.revision }, hub.objects)?;
        }
        let in_force_at = Position { epoch: stored.in_force_epoch, revision: stored.in_force_revision };
        receiver.hub.restore_in_force(stored.in_force, in_force_at);
        receiver.complete_interest = stored.interest.iter().filter_map(|bytes| selection::decode(bytes)).collect();
        for (name, record) in &receiver.hub.clusters {
            receiver.changes.push(Change::Cluster { name: name.clone(), record: Some(record.clone()) });
        }
        for it in stored.origins {
            let name = ClusterName::from(it.name);
            let staged = it.objects.into_iter().map(|bytes| Some((object::id_of(&bytes)?, Some(Box::from(&*bytes)))));
            let staged: BTreeMap<u64, Option<Box<[u8]>>> = staged.collect::<Option<_>>()?;
            let origin = receiver.origins.entry(name.clone()).or_default();
            origin.apply(&name, true, staged, None, &mut receiver.changes).ok()?;
            origin.position = Position { epoch: it.epoch, revision: it.revision };
            origin.view = it.view;
        }
        receiver.changes.extend(receiver.hub.manifests_in_force());
        Some(receiver)
    }

    pub fn store(&self) -> Vec<u8> {
        let hub = self.hub.position.map(|position| StoredOrigin {
            name: String::new(),
            epoch: position.epoch,
            revision: position.revision,
            view: 0,
            objects: self.hub.objects().cloned().collect(),
        });
        let origins = self.origins.iter().map(|(name, origin)| StoredOrigin {
            name: name.to_string(),
            epoch: origin.position.epoch,
            revision: origin.position.revision,
            view: origin.view,
            objects: origin.objects().map(Bytes::copy_from_slice).collect(),
        });
        let stored = Stored {
            hub,
            in_force: self.hub.in_force_objects().cloned().collect(),
            in_force_epoch: self.hub.in_force_at.epoch,
            in_force_revision: self.hub.in_force_at.revision,
            origins: origins.collect(),
            interest: self.complete_interest.iter().map(selection::encode).collect(),
        };
        stored.encode_to_vec()
    }
}
