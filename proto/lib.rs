//! The wire types, generated from `proto/`, and a bound on the memory that decoding allocates.
//!
//! Each process converts wire types into domain types in one module, and uses only the domain types elsewhere.

#![allow(clippy::all, clippy::allow_attributes, missing_debug_implementations, reason = "generated code")]

pub mod bounded;

pub mod federation {
    pub mod v1 {
        tonic::include_proto!("hanse.federation.v1");
    }
}

pub mod agent {
    pub mod v1 {
        tonic::include_proto!("hanse.agent.v1");
    }
}

pub mod report {
    pub mod v1 {
        tonic::include_proto!("hanse.report.v1");
    }
}

include!(concat!(env!("OUT_DIR"), "/bounded.rs"));
