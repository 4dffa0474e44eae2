//! Policies and inventory in, per-node rule sets and a report out.
