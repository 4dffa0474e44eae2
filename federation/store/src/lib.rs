//! Revisions, compare-and-swap, prefix watch and leases over an embedded file or memory.
