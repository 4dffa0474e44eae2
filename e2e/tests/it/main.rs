//! Tests of the whole.

mod admission;
mod chart;
mod clusters;
mod crds;
mod demo;
mod dependencies;
mod english;
mod federation;
mod fuzz;
mod guards;
mod guide;
mod install;
mod kernel;
mod layout;
mod manifests;
mod metrics;
mod network;
mod nodes;
mod operator;
mod oracle;
mod presets;
mod readme;
mod simulation;
mod source;
mod system;

#[path = "../../../federation/store/tests/it/etcd/nodes.rs"]
#[expect(dead_code, reason = "the tests of the store use more of it")]
mod etcd_nodes;

#[path = "../../../federation/cli/tests/it/corpus/reading.rs"]
mod corpus;
#[path = "../../../federation/policy/tests/it/worlds.rs"]
mod worlds;
