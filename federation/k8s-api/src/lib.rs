//! Manifests of every kind Hanse reads, and their conversion into the policy model.
