//! The driver against the real kernel: real packets in network namespaces show every verdict.

mod connections;
mod differential;
mod flows;
mod learned;
mod lifecycle;
mod net;
mod probes;
mod verdicts;
