//! Whether the store answers.
//!
//! While it does not, changes are refused at once, and members, agents and status go on from what the hub has read.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hanse_store::StoreError;
use tokio::time::Instant;
use tracing::{error, info};

#[derive(Debug)]
pub(super) struct Availability(Mutex<State>);

#[derive(Debug)]
struct State {
    answered: Instant,
    /// Why it does not answer.
    reason: Option<String>,
}

impl Default for Availability {
    fn default() -> Self {
        Self(Mutex::new(State { answered: Instant::now(), reason: None }))
    }
}

impl Availability {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the result of an operation. Any other error than this one is an answer.
    pub(super) fn note(&self, failure: Option<&StoreError>) {
        let mut state = self.state();
        match failure {
            Some(StoreError::Unavailable(reason)) => {
                if state.reason.is_none() {
                    error!(%reason, "store unavailable: changes are refused until it answers");
                }
                state.reason = Some(reason.clone());
            }
            _ => {
                if state.reason.take().is_some() {
                    let seconds = state.answered.elapsed().as_secs();
                    info!(seconds, "store available again");
                }
                state.answered = Instant::now();
            }
        }
    }

    /// # Errors
    /// `Unavailable` if the last operation found the store so.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let state = self.state();
        let Some(reason) = &state.reason else { return Ok(()) };
        Err(StoreError::Unavailable(format!("{reason} (for {} s)", state.answered.elapsed().as_secs())))
    }

    pub(super) fn unavailable_for(&self) -> Option<Duration> {
        let state = self.state();
        state.reason.is_some().then(|| state.answered.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn counts_from_the_last_answer_until_the_next() {
        let availability = Availability::default();
        availability.note(None);
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(availability.check().is_ok() && availability.unavailable_for().is_none());
        availability.note(Some(&StoreError::Unavailable("no leader".to_owned())));
        tokio::time::advance(Duration::from_secs(5)).await;
        availability.note(Some(&StoreError::Unavailable("no node".to_owned())));
        assert_eq!(availability.unavailable_for(), Some(Duration::from_secs(15)));
        let text = availability.check().unwrap_err().to_string();
        assert_eq!(text, "the store is unavailable: no node (for 15 s)");
        availability.note(Some(&StoreError::Limit("it answers")));
        assert!(availability.check().is_ok() && availability.unavailable_for().is_none());
    }
}
