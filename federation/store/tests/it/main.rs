//! One suite for every store, and the file's promise under `kill -9`.

mod crash;
mod damage;
#[cfg(feature = "etcd")]
mod etcd;
mod suite;
