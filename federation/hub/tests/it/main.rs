//! The hub over real TLS on the loopback address: joining, renewing, revoking, administering, and `kill -9`.

mod administer;
mod approvals;
mod before_the_token;
mod custom_resources;
#[cfg(feature = "etcd")]
#[path = "../../../store/tests/it/etcd/nodes.rs"]
#[expect(dead_code, reason = "the tests of the store use more of it")]
mod etcd_nodes;
#[cfg(feature = "etcd")]
#[path = "../../../store/tests/it/etcd/proxy.rs"]
#[expect(dead_code, reason = "the tests of the store use more of it")]
mod etcd_proxy;
mod exchange;
mod hostile_reports;
mod impostors;
mod join;
mod objects;
mod process;
#[cfg(feature = "etcd")]
mod replicas;
#[cfg(feature = "etcd")]
#[path = "replicas/failover.rs"]
mod replicas_failover;
#[cfg(feature = "etcd")]
#[path = "replicas/registration.rs"]
mod replicas_registration;
mod store;
mod support;
mod webhook;
