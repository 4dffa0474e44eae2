//! The agent's enforcing thread, and what it tells of it, against the real kernel, in network namespaces; and what the program
//! says.

mod command;
mod enforcer;
mod flows;
#[path = "../../../dataplane/tests/it/net.rs"]
#[expect(dead_code, reason = "the same node and pods as the dataplane's tests, of which these need a part")]
mod net;
