//! One object of the federation, from its author's bytes. Hub and members read each version once and keep the result beside
//! the bytes.

use crate::diagnostic::Diagnostic;
use crate::manifest::{Manifests, read_bytes};
use crate::object::Object;

/// Errors of one object that are reported.
const MAX_ERRORS: usize = 8;

/// An object as far as this version can read it.
#[derive(Debug, Clone)]
pub struct FederatedObject {
    object: Result<Object, String>,
    partial: Option<Object>,
}

impl FederatedObject {
    /// Reads the JSON of one object.
    pub fn read(json: &[u8]) -> Self {
        let mut read = Manifests::default();
        read_bytes(&"manifest".into(), json, &mut read);
        read.diagnostics.append(&mut read.refused_workloads);
        let partial = read.partial.pop().map(|it| it.object);
        if !read.diagnostics.is_empty() {
            return Self { object: Err(errors(&read.diagnostics)), partial };
        }
        let is_alone = read.objects.len() == 1 && read.skipped.is_empty() && read.workloads.is_empty();
        let object = read.objects.pop().map(|it| it.object).filter(|object| is_alone && object.is_federated());
        Self { object: object.ok_or_else(|| "is not one object of the federation".to_owned()), partial }
    }

    /// The object, read completely.
    ///
    /// # Errors
    /// Everything that is wrong, with the fields.
    pub fn object(&self) -> Result<&Object, &str> {
        self.object.as_ref().map_err(String::as_str)
    }

    /// The object; of a policy that cannot be read completely, what can be read, with the rest unknown.
    pub fn possible(&self) -> Option<&Object> {
        self.object.as_ref().ok().or(self.partial.as_ref())
    }
}

fn errors(diagnostics: &[Diagnostic]) -> String {
    let errors = diagnostics.iter().take(MAX_ERRORS).map(|it| match it.field.as_str() {
        "" => it.message.clone(),
        field => format!("{field}: {}", it.message),
    });
    errors.collect::<Vec<_>>().join("; ")
}
