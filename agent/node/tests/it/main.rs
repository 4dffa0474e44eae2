//! The enforcer thread and flow reports, against the real kernel in network namespaces and against a fake backend; and the program's
//! output.

mod command;
mod enforcer;
mod fake;
mod flows;
#[path = "../../../dataplane/tests/it/net.rs"]
#[expect(dead_code, reason = "the same node and pods as the dataplane's tests, of which these need a part")]
mod net;
mod recovery;
