//! The wire types of Hanse, generated from `proto/`, and the bound of what decoding costs. Nothing else lives here: each process converts them into domain types in one module and never lets them further.

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
