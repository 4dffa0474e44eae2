//! hanse-hub: registry, trust, exchange and policy distribution of a ClusterSet.
