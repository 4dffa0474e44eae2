//! Transactions that are applied once, also when an answer is lost.
//!
//! After a broken connection or the change of etcd's leader it is unknown whether a transaction was applied. Each one therefore
//! writes the number of the commit to a key of this process, a slot, on the condition that the slot was not written since the
//! last commit that used it. Repeating the transaction is then safe: etcd applies it once, and a repetition finds its own number
//! in the slot, with the revision. A transaction that was given up cannot be applied after the next one that uses its slot.
//!
//! Slots belong to a lease: those of an ended process disappear.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use etcd_client::{Compare as Condition, CompareOp, PutOptions, Txn, TxnOp, TxnOpResponse};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::connection::{CallError, Connection};
use super::failure::Failure;
use super::keys::{Root, number, revision};
use super::leases::{Leases, id};
use crate::error::StoreError;
use crate::model::{Change, Compare, LeaseId, Outcome, Transaction};

/// Transactions of this process at the same time; others wait.
const MAX_CONCURRENT: usize = 32;
/// Of the slots. A commit ends long before.
const SLOT_TIME_TO_LIVE: Duration = Duration::from_secs(600);
/// Rounds of one commit: each but the last finds the slot or its lease changed, which only follows a commit that was given up.
const MAX_ROUNDS: usize = 8;

#[derive(Debug)]
pub(super) struct Commits {
    /// Distinguishes this process from all others.
    session: String,
    /// The slots that are not in use. The last one returned is used first, so that one writer uses one slot.
    free: Mutex<Vec<Slot>>,
    permits: Semaphore,
    lease: tokio::sync::Mutex<Option<(LeaseId, Instant)>>,
}

#[derive(Debug)]
struct Slot {
    name: Vec<u8>,
    /// Of the last commit.
    commit: u64,
    /// The revision at which the slot was last written, as far as known; 0: it does not exist.
    written: i64,
}

impl Commits {
    pub(super) fn new(root: &Root, session: String) -> Self {
        let slot = |index| Slot { name: root.own(&format!("commit/{session}/{index}")), commit: 0, written: 0 };
        let free = Mutex::new((0..MAX_CONCURRENT).rev().map(slot).collect());
        Self { session, free, permits: Semaphore::new(MAX_CONCURRENT), lease: tokio::sync::Mutex::new(None) }
    }

    /// Applies a transaction that [`check`](crate::limits::check) permits. Must run to its end.
    pub(super) async fn commit(
        &self,
        connection: &Connection,
        root: &Root,
        leases: &Leases,
        transaction: &Transaction,
    ) -> Result<Outcome, StoreError> {
        // A revision that no transaction can have: with etcd's 0 it would mean that the key is absent.
        let never = |it: &Compare| matches!(it, Compare::Modified(_, at) if *at == 0 || i64::try_from(*at).is_err());
        if transaction.compares.iter().any(never) {
            return Ok(Outcome::Conflict);
        }
        let conditions = transaction.compares.iter().map(|it| condition(root, it)).collect::<Vec<_>>();
        let changes = transaction.changes.iter().map(|it| change(root, it)).collect::<Result<Vec<_>, _>>()?;
        let deadline = connection.deadline();
        if changes.is_empty() {
            let check = Txn::new().when(conditions);
            let answer = connection
                .call_until(deadline, |client| {
                    let check = check.clone();
                    async move { client.kv_client().txn(check).await }
                })
                .await?;
            let now = answer.header().map_or(0, |it| revision(it.revision()));
            return Ok(if answer.succeeded() { Outcome::Committed(now) } else { Outcome::Conflict });
        }
        let waiting = tokio::time::timeout_at(deadline, self.permits.acquire()).await;
        let _permit = match waiting {
            Ok(permit) => permit.map_err(|_| StoreError::Closed)?,
            Err(_) => return Err(StoreError::Unavailable("too many transactions are waiting for etcd".to_owned())),
        };
        let slot = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut slot = slot.ok_or(StoreError::Closed)?;
        let outcome = self.commit_in(&mut slot, connection, leases, transaction, &conditions, &changes, deadline).await;
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
        outcome
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one commit, which are used only here")]
    async fn commit_in(
        &self,
        slot: &mut Slot,
        connection: &Connection,
        leases: &Leases,
        transaction: &Transaction,
        conditions: &[Condition],
        changes: &[TxnOp],
        deadline: Instant,
    ) -> Result<Outcome, StoreError> {
        slot.commit += 1;
        let commit = slot.commit.to_be_bytes();
        for _ in 0..MAX_ROUNDS {
            let lease = self.lease(connection, leases).await?;
            let put = PutOptions::new().with_lease(id(lease)?);
            let unchanged = Condition::mod_revision(&*slot.name, CompareOp::Equal, slot.written);
            let made = Txn::new()
                .when([conditions, &[unchanged]].concat())
                .and_then([changes, &[TxnOp::put(&*slot.name, commit, Some(put))]].concat())
                .or_else([TxnOp::get(&*slot.name, None)]);
            let answer = connection
                .call_until(deadline, |client| {
                    let made = made.clone();
                    async move { client.kv_client().txn(made).await }
                })
                .await;
            let answer = match answer {
                Ok(answer) => answer,
                Err(CallError::Failure(Failure::NoLease)) => {
                    for lease in transaction.changes.iter().filter_map(lease_of) {
                        if leases.is_gone(connection, lease).await? {
                            return Err(StoreError::NoLease(lease));
                        }
                    }
                    *self.lease.lock().await = None;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if answer.succeeded() {
                slot.written = answer.header().map_or(0, |it| it.revision());
                return Ok(Outcome::Committed(revision(slot.written)));
            }
            let found = answer.op_responses().into_iter().find_map(|it| match it {
                TxnOpResponse::Get(mut found) => found.take_kvs().pop(),
                _ => None,
            });
            let written = found.as_ref().map_or(0, |it| it.mod_revision());
            if found.is_some_and(|it| it.value() == commit) {
                slot.written = written;
                return Ok(Outcome::Committed(revision(written)));
            }
            if written == slot.written {
                return Ok(Outcome::Conflict);
            }
            // An earlier commit was applied after it was given up, or the slot has ended.
            slot.written = written;
        }
        Err(StoreError::Unavailable(format!("session {} of this process is written by another", self.session)))
    }

    /// The lease of the slots, which lasts for longer than a commit.
    async fn lease(&self, connection: &Connection, leases: &Leases) -> Result<LeaseId, StoreError> {
        let mut current = self.lease.lock().await;
        if let Some((lease, since)) = *current
            && since.elapsed() < SLOT_TIME_TO_LIVE / 2
        {
            return Ok(lease);
        }
        let now = Instant::now();
        let lease = leases.grant(connection, SLOT_TIME_TO_LIVE).await?;
        *current = Some((lease, now));
        Ok(lease)
    }
}

fn lease_of(change: &Change) -> Option<LeaseId> {
    match change {
        Change::Put { lease, .. } => *lease,
        Change::Delete(_) => None,
    }
}

fn condition(root: &Root, compare: &Compare) -> Condition {
    match compare {
        Compare::Absent(key) => Condition::create_revision(root.key(key), CompareOp::Equal, 0),
        Compare::Present(key) => Condition::create_revision(root.key(key), CompareOp::Greater, 0),
        Compare::Modified(key, at) => Condition::mod_revision(root.key(key), CompareOp::Equal, number(*at)),
    }
}

fn change(root: &Root, change: &Change) -> Result<TxnOp, StoreError> {
    Ok(match change {
        Change::Put { key, value, lease } => {
            let lease = lease.map(id).transpose()?;
            let options = lease.map(|lease| PutOptions::new().with_lease(lease));
            TxnOp::put(root.key(key), value.to_vec(), options)
        }
        Change::Delete(key) => TxnOp::delete(root.key(key), None),
    })
}
