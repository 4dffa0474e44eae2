//! The driver against the real kernel: every verdict here is what packets did, in network namespaces.

mod connections;
mod differential;
mod flows;
mod learned;
mod lifecycle;
mod net;
mod probes;
mod verdicts;
