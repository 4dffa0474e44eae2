//! The policy crate from outside.

mod selectors;
