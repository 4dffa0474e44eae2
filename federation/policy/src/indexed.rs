//! The inventory for many lookups, kept up to date change by change: endpoints by id and by address, and for each the
//! selectors that match it.
//!
//! It sees the ClusterSet as one cluster does, the *local* one: that cluster's labels are known first-hand, and its pods
//! win contested addresses. An endpoint takes some 200 bytes. A change costs what it touches.
//!
//! Two steps: setters record a change, and [`IndexedInventory::refresh`] brings the classes of labels up to date and
//! reports what each changed endpoint contributed before and contributes now. Between the two, lookups see the classes of
//! the last refresh.

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
