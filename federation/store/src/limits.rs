//! The limits of a transaction, which are the same for every store.

use std::collections::HashSet;

use crate::error::StoreError;
use crate::model::{Change, MAX_TRANSACTION_BYTES, MAX_TRANSACTION_PARTS, MAX_VALUE_BYTES, Transaction};

/// Refuses a transaction that not every store can apply.
pub(crate) fn check(transaction: &Transaction) -> Result<(), StoreError> {
    if transaction.changes.len() > MAX_TRANSACTION_PARTS || transaction.compares.len() > MAX_TRANSACTION_PARTS {
        return Err(StoreError::Limit("a transaction has at most 127 changes and 127 comparisons"));
    }
    let mut keys = HashSet::new();
    let mut bytes = 0;
    for change in &transaction.changes {
        if !keys.insert(change.key()) {
            return Err(StoreError::Limit("a transaction changes a key once"));
        }
        if matches!(change, Change::Put { value, .. } if value.len() > MAX_VALUE_BYTES) {
            return Err(StoreError::Limit("a value has at most 1 MiB"));
        }
        bytes += change.size();
    }
    if bytes > MAX_TRANSACTION_BYTES {
        return Err(StoreError::Limit("a transaction has at most 1.25 MiB"));
    }
    Ok(())
}
