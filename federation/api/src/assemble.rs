//! The objects of one cluster, or of the federation, into inventory and policies.

mod candidates;
mod cluster;
mod duplicates;
mod federation;
pub mod planned;
pub mod rivals;

pub use self::candidates::{Candidates, ObjectChange, ObjectKey, Position};
pub use self::cluster::{Assembly, Changed, ClusterState, NAMESPACE_NAME_LABEL, assemble_cluster};
pub use self::duplicates::{duplicates, key_of};
pub use self::federation::{Federation, assemble_federation, overlapping_grants, without_tiers};
