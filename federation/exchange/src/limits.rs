//! Limits of the exchange that the hub and members must agree on: what one side may send, the other must read.
//!
//! Those of interests are in [`crate::interest`], beside what derives them.

/// Of the protocol.
pub const PROTOCOL: u32 = 1;
/// The greatest epoch and revision of a publisher: milliseconds since 1970 reach it in 285,000 years. A member that continues after
/// the greatest number still has numbers left.
pub const MAX_NUMBER: u64 = (1 << 53) - 1;
/// Most bytes of an encoded frame.
pub const MAX_FRAME_BYTES: usize = 1 << 20;
/// Most bytes of any message: an opening has an interest of 7 MiB, the member's own part of 2 MiB and 4,096 origins of 320
/// bytes (10.3 MiB), a change of interest adds and removes 7 MiB and names 4,096 clusters of 255 bytes (15 MiB).
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Most bytes of a message that names no interest.
pub const MAX_PLAIN_BYTES: usize = 4 << 20;
/// Most bytes of one object that a member publishes.
pub const MAX_EXPORT_BYTES: usize = 16 << 10;
/// Most bytes of one object of the hub: a manifest of 256 KiB and the names of 4,096 clusters of 65 bytes each, twice. The
/// clusters that selectors select may take more.
pub const MAX_HUB_OBJECT_BYTES: usize = 768 << 10;
/// Of one object that a member publishes: bytes of a name, of a label's key and value, and how many of each it may have.
pub const MAX_NAME_BYTES: usize = 253;
pub const MAX_LABEL_KEY_BYTES: usize = 512;
pub const MAX_LABEL_VALUE_BYTES: usize = 1 << 10;
pub const MAX_ADDRESSES: usize = 16;
pub const MAX_PORTS: usize = 256;
/// Labels of an endpoint's own, and labels of a label set, a namespace or an account.
pub const MAX_OWN_LABELS: usize = 64;
pub const MAX_SHARED_LABELS: usize = 256;
/// Most clusters of a ClusterSet.
pub const MAX_CLUSTERS: usize = 4_096;
/// The feature of a policy whose tier does not exist. No version has it, so that no member puts the policy into force: the last
/// version with a tier stays in force, if there is one.
pub const EXISTING_TIER: &str = "existing-tier";
/// The feature of a staged policy: a member that does not have it ignores the object, and enforces the same as without it.
pub const STAGED_POLICY: &str = "staged-policy";
/// The features that this version has.
pub const FEATURES: [&str; 1] = [STAGED_POLICY];
