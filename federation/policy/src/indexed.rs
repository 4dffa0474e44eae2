//! An incremental inventory with indexes: endpoints by id and by address, and the selectors that match each endpoint.
//!
//! It represents the view of one cluster, the *local* one: the labels of its endpoints are always known, and its pods own contested
//! addresses. An endpoint takes about 200 bytes. The cost of a change is proportional to the change.
//!
//! A change has two steps: setters record it, and [`IndexedInventory::refresh`] updates the classes of labels and reports the previous and
//! the new contribution of each changed endpoint. In between, lookups use the classes of the last refresh.

mod addresses;
mod id_set;
mod inventory;
mod matches;
mod model;
mod nets;
mod refresh;

pub use id_set::IdSet;
pub use inventory::IndexedInventory;
pub use matches::{ClassId, FastMap, KeyId, Match, PairId, SelectorId, SelectorIndex};
pub use model::{
    Addresses, ClusterId, ClusterRecord, Contribution, FEDERATION, IndexedCluster, LOCAL, Members, NodeIndex,
    ServiceKey, Slot, SlotId,
};
pub use nets::NetTable;
