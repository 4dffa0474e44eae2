//! hanse-agent: enforces one node's rule sets.
