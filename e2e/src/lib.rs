//! Clusters in network namespaces, simulation, and the tests that inspect packets.
