//! The current problems of a source. They are reported as changes, so that the cost is proportional to what has changed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use hanse_api::Diagnostic;

/// The problems of one scope that are kept.
const MAX_OF_SCOPE: usize = 20;
/// The problems that are kept in all, at some 600 bytes each 12 MB. Where there are more, one of each further scope is kept.
const MAX_KEPT: usize = 20_000;
/// Of those, how many are in a report that has room for few.
const REPORTED_OF_SCOPE: usize = 2;

/// What has problems: a scope, or the object at a position of an origin. Scopes of many objects come first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scope {
    depth: usize,
    path: Arc<Path>,
    index: Option<u32>,
}

impl Scope {
    pub fn new(path: Arc<Path>, index: Option<u32>) -> Self {
        Self { depth: path.iter().count(), path, index }
    }
}

/// The problems of a scope now; none if it has none anymore.
#[derive(Debug, Clone)]
pub struct ProblemChange {
    pub scope: Scope,
    pub problems: Arc<[Diagnostic]>,
}

/// Keeps the first problems of a scope, and how many more there are. `kept`: the number of those that are kept already.
pub(super) fn limited(mut problems: Vec<Diagnostic>, kept: usize) -> Arc<[Diagnostic]> {
    let limit = if kept < MAX_KEPT { MAX_OF_SCOPE } else { 1 };
    if let Some(more) = problems.len().checked_sub(limit).filter(|more| *more > 0) {
        problems.truncate(limit);
        if let Some(last) = problems.last_mut() {
            last.message.push_str(&format!(" (and {more} more problems)"));
        }
    }
    problems.into()
}

/// All current problems.
#[derive(Debug, Default)]
pub struct Problems {
    scopes: BTreeMap<Scope, Arc<[Diagnostic]>>,
    count: usize,
}

impl Problems {
    pub fn apply(&mut self, changes: Vec<ProblemChange>) {
        for ProblemChange { scope, problems } in changes {
            self.count += problems.len();
            let before = match problems.is_empty() {
                true => self.scopes.remove(&scope),
                false => self.scopes.insert(scope, problems),
            };
            self.count -= before.map_or(0, |it| it.len());
        }
    }

    /// The number of all problems.
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    #[cfg(test)]
    pub fn all(&self) -> impl Iterator<Item = &Diagnostic> {
        self.scopes.values().flat_map(|problems| problems.iter())
    }

    /// A few problems of each scope, those of whole collections first.
    pub fn most_important(&self) -> impl Iterator<Item = &Diagnostic> {
        self.scopes.values().flat_map(|problems| problems.iter().take(REPORTED_OF_SCOPE))
    }
}

/// Logs the problems of a scope that it did not have before.
pub(super) fn log_new(before: &[Diagnostic], now: &[Diagnostic]) {
    let is_known =
        |it: &Diagnostic| before.iter().any(|known| (&known.location, &known.message) == (&it.location, &it.message));
    for it in now.iter().filter(|it| !is_known(it)) {
        let (file, line) = (&*it.location.file, it.location.line);
        tracing::warn!(file, line, field = it.field, problem = it.message, "manifest not used as written");
    }
}
