//! Readiness as a set of named conditions, each owned by one component.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// All conditions of a process. It is ready when every one holds.
#[derive(Debug, Clone, Default)]
pub struct Health {
    conditions: Arc<Mutex<Vec<Condition>>>,
}

/// One thing that must hold before the process is ready. It starts as not holding.
#[derive(Debug, Clone)]
pub struct Condition {
    name: &'static str,
    holds: Arc<AtomicBool>,
}

impl Health {
    /// Adds a condition.
    pub fn condition(&self, name: &'static str) -> Condition {
        let condition = Condition { name, holds: Arc::new(AtomicBool::new(false)) };
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner).push(condition.clone());
        condition
    }

    /// The names of the conditions that do not hold; empty when the process is ready.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        let conditions = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        conditions.iter().filter(|c| !c.holds()).map(|c| c.name).collect()
    }
}

impl Condition {
    pub fn set(&self, holds: bool) {
        self.holds.store(holds, Ordering::Release);
    }

    pub fn holds(&self) -> bool {
        self.holds.load(Ordering::Acquire)
    }
}
