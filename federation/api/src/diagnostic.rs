//! What is wrong with a manifest, and where.

use std::path::Path;
use std::sync::Arc;

use smol_str::SmolStr;

/// A line of a file; one-based.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceLocation {
    pub file: Arc<str>,
    pub line: u32,
}

/// An error, with its location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    pub location: SourceLocation,
    /// The field's path; empty where the error is not about a field.
    pub field: String,
    pub message: String,
    /// The object, as far as it is known.
    pub object: Option<Reference>,
    /// The line on which the object starts, or where one could not be read.
    pub start: u32,
    /// What the document is instead of an object, where it does not claim to be one.
    pub not_object: Option<NotObject>,
}

impl Diagnostic {
    /// A diagnostic of a whole file or directory.
    pub fn of_file(path: &Path, message: String) -> Self {
        let location = SourceLocation { file: path.to_string_lossy().into(), line: 1 };
        Self { location, field: String::new(), message, object: None, start: 1, not_object: None }
    }
}

/// Documents that folders in Git contain beside manifests. An offline command may ignore them with a note. The source of a running
/// cluster may not: the document may have been a policy a moment ago.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NotObject {
    /// A template, such as Helm's: it has actions between `{{` and `}}` and is not an object before they are rendered.
    Template,
    /// A document that names no kind, such as `values.yaml`, `kustomization.yaml` or a dashboard.
    WithoutKind,
    /// A patch that a kustomization of the folder names.
    Patch,
}

/// Names an object as it is written. Short texts are kept in place: every object has one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Reference {
    pub api_version: SmolStr,
    pub kind: SmolStr,
    pub namespace: Option<SmolStr>,
    pub name: SmolStr,
}
