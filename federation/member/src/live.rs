//! The evaluator of this member, shared with other threads.
//!
//! [`crate::world`] writes it, once for each compile; flows and questions read it. A reader keeps the lock for a short
//! batch at most, since updates of the nodes' rules wait for it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use hanse_compiler::Compiler;
use hanse_policy::evaluate::{End, Query};
use hanse_policy::evaluator::Judge;
use hanse_policy::model::ClusterName;
use hanse_ruleset::OwnStream;
use ipnet::IpNet;

/// Clones share the state.
#[derive(Debug, Clone)]
pub struct Live {
    state: Arc<RwLock<State>>,
}

/// What was compiled last.
#[derive(Debug)]
pub struct State {
    pub compiler: Compiler,
    /// Hanse's own streams, by node.
    pub own_streams: BTreeMap<Arc<str>, Vec<OwnStream>>,
    /// The ranges of pod addresses, by node.
    pub pod_ranges: BTreeMap<Arc<str>, Vec<IpNet>>,
    pub hub_revision: u64,
    pub local_revision: u64,
}

impl Live {
    pub fn new(cluster: ClusterName) -> Self {
        let state = State {
            compiler: Compiler::with_evaluator(cluster),
            own_streams: BTreeMap::new(),
            pod_ranges: BTreeMap::new(),
            hub_revision: 0,
            local_revision: 0,
        };
        Self { state: Arc::new(RwLock::new(state)) }
    }

    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether an address is in the ranges of the pods of a node. A node may have no ranges: its pods may have any address then.
    pub fn is_in_ranges(&self, node: &str, address: IpAddr) -> bool {
        let ranges = self.pod_ranges.get(node);
        ranges.is_some_and(|ranges| ranges.is_empty() || ranges.iter().any(|range| range.contains(&address)))
    }

    pub fn judge(&self) -> Judge<'_> {
        self.compiler.judge().expect("the compiler is made with an evaluator")
    }

    /// The stream of Hanse's own that a packet belongs to on the node of the local pod at `end`, if any.
    pub fn own_stream(&self, judge: &Judge<'_>, packet: &Query, end: &End) -> Option<&str> {
        let node = judge.node_of(end)??;
        let contain = |nets: &[IpNet], end: &End| nets.iter().any(|net| net.contains(&end.address));
        let is_it = |stream: &&OwnStream| {
            (stream.from.is_empty() || contain(&stream.from, &packet.source))
                && contain(&stream.to, &packet.destination)
                && (stream.protocol, stream.port) == (packet.protocol, packet.destination_port)
        };
        self.own_streams.get(node)?.iter().find(is_it).map(|stream| &*stream.name)
    }
}
