//! The agent's enforcing thread against the real kernel, in network namespaces.

mod enforcer;
#[path = "../../../dataplane/tests/it/net.rs"]
#[expect(dead_code, reason = "the same node and pods as the dataplane's tests, of which these need a part")]
mod net;
