//! What is known about the replicas of the hub.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use hanse_exchange::hubs::weight;
use hanse_exchange::model::Position;
use hanse_identity::token;

/// The addresses, and what is known about each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// Sent by the hub.
    pub(super) announced: BTreeSet<String>,
    /// All addresses, the preferred one first.
    pub(super) ranked: Vec<String>,
    /// Those with an open Publish stream.
    pub(super) reached: BTreeMap<String, ReachedHub>,
}

/// A replica to which the member publishes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ReachedHub {
    /// Distinguishes streams to one address.
    pub(super) stream: u64,
    /// Empty: of a hub that does not send it.
    pub(super) replica: Bytes,
    pub(super) hub: Option<Position>,
}

impl View {
    /// Whether another address leads to the same replica, and is used instead: announced addresses before others, then by name.
    pub(super) fn is_covered(&self, address: &str, replica: &Bytes) -> bool {
        let order = |address: &str| (!self.announced.contains(address), address.to_owned());
        !replica.is_empty()
            && self
                .reached
                .iter()
                .any(|(other, it)| other != address && it.replica == *replica && order(other) < order(address))
    }

    pub(super) fn rank(&mut self, cluster: &str, configured: &BTreeSet<String>) {
        let all: BTreeSet<&String> = configured.iter().chain(&self.announced).collect();
        self.ranked = all.into_iter().cloned().collect();
        self.ranked.sort_by_key(|address| std::cmp::Reverse(weight(cluster, address)));
    }
}

/// Between 0 and 1.
pub(super) fn random_fraction() -> f64 {
    // Without randomness TLS fails as well.
    let number = token::random::<4>().map_or(0, u32::from_le_bytes);
    f64::from(number) / f64::from(u32::MAX)
}
