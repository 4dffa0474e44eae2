//! Places for connections of a listener: a limit in all, and one for each source, so that one source cannot take all of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The places of one listener.
#[derive(Debug, Clone)]
pub struct Places {
    free: Arc<Semaphore>,
    of_one_source: usize,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A place that a connection has until it is dropped.
#[derive(Debug)]
pub struct Place {
    source: IpAddr,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
    _permit: OwnedSemaphorePermit,
}

impl Places {
    /// `all`: connections at once. `of_one_source`: of these, from one address, or from one /64 of IPv6.
    pub fn new(all: usize, of_one_source: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(all)), of_one_source, taken: Arc::default() }
    }

    /// Waits until a place is free. To be called before a connection is accepted, so that further ones wait in the kernel.
    pub async fn free(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.free).acquire_owned().await.expect("the semaphore is never closed")
    }

    /// Takes the free place for a connection from `address`, unless its source has all that it may have.
    pub fn take(&self, permit: OwnedSemaphorePermit, address: IpAddr) -> Option<Place> {
        let source = source_of(address);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // At most as many entries as there are places.
        let count = taken.entry(source).or_default();
        if *count >= self.of_one_source {
            return None;
        }
        *count += 1;
        Some(Place { source, taken: Arc::clone(&self.taken), _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.source);
            }
        }
    }
}

/// What counts as one source: a host of IPv6 usually has a /64.
pub fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !0 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_source_cannot_take_the_places_of_others() {
        let places = Places::new(4, 2);
        let take = async |address: &str| places.take(places.free().await, address.parse().expect("an address"));
        let first = take("192.0.2.1").await;
        let mapped = take("::ffff:192.0.2.1").await;
        assert!(first.is_some() && mapped.is_some());
        assert!(take("192.0.2.1").await.is_none(), "the source has both of its places");
        let of_a_network = [take("2001:db8::1").await, take("2001:db8::ffff:0:0:2").await];
        assert!(of_a_network.iter().all(Option::is_some), "a refused connection takes no place");
        assert!(futures::FutureExt::now_or_never(places.free()).is_none(), "all places are taken");
        drop(of_a_network);
        assert!(take("2001:db8::3").await.is_some() && take("2001:db8:0:1::3").await.is_some());
        drop(first);
        assert!(take("192.0.2.1").await.is_some());
        drop(mapped);
        assert!(places.taken.lock().expect("not poisoned").is_empty(), "sources without a connection are forgotten");
    }
}
