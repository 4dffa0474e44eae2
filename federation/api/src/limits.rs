//! Limits of manifests, also of the CRDs of `hanse.dev`.

/// Bounds of Calico's schema.
pub const MAX_HTTP_METHODS: usize = 20;
pub const MAX_HTTP_PATHS: usize = 20;
pub const MAX_HTTP_PATH_CHARACTERS: usize = 1024;
pub const MAX_RULES: usize = 1024;
pub const MAX_SELECTOR_CHARACTERS: usize = 1024;
pub const MAX_NETS: usize = 256;
/// Of a network set.
pub const MAX_SET_NETS: usize = 100_000;
/// The longest spelling of a net of a network set.
pub const MAX_SET_NET_CHARACTERS: usize = 43;
pub const MAX_PORTS: usize = 50;
/// Of a port's name that was stored before names were checked as Kubernetes checks them.
pub const MAX_STORED_PORT_NAME_BYTES: usize = 128;
/// Entries in each list of a MemberCluster.
pub const MAX_MEMBER_ENTRIES: usize = 4_096;
/// Of the lease of a cluster.
pub const LEASE_SECONDS: std::ops::RangeInclusive<u64> = 5..=86_400;
/// Of the lifetime of a join token: a week at most.
pub const TOKEN_SECONDS: std::ops::RangeInclusive<u64> = 1..=604_800;
