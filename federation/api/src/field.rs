//! Errors that name a field.

use std::fmt::Display;

/// A field of an object: where its key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownField {
    pub path: String,
    pub name: String,
    /// What the type has in its place.
    pub known: &'static [&'static str],
}

/// An error in one field; `path` is as an API server writes it, `spec.ingress[0].ports[1].port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct FieldError {
    pub path: String,
    pub message: String,
}

/// The message for an unknown field in conversions that check for it themselves.
pub const NOT_KNOWN: &str = "is not known";

/// The start of the message for a field that only Calico Enterprise and Calico Cloud have.
const ENTERPRISE_FIELD: &str = "a field of Calico Enterprise, ";
/// These fields, each with one that the type has beside it in Calico.
const ENTERPRISE: [(&str, &str); 5] = [
    ("domains", "notNets"),
    ("allowedEgressDomains", "nets"),
    ("packetCapture", "performanceHints"),
    ("packetCaptures", "performanceHints"),
    ("dpi", "performanceHints"),
];

/// The message for a field of Calico Enterprise, if it is one. Another name is not suggested: no field here has that meaning.
fn enterprise_field(name: &str, known: &[&str]) -> Option<String> {
    let is_known = ENTERPRISE.iter().any(|(field, beside)| *field == name && known.contains(beside));
    is_known.then(|| format!("{ENTERPRISE_FIELD}`{name}`, which Hanse does not support and which allows nothing"))
}

impl FieldError {
    /// Whether the only error is that the field is unknown.
    pub fn is_of_unknown_field(&self) -> bool {
        self.message == NOT_KNOWN
            || self.message.starts_with("unknown field ")
            || self.message.starts_with(ENTERPRISE_FIELD)
    }
}

impl From<UnknownField> for FieldError {
    fn from(UnknownField { path, name, known }: UnknownField) -> Self {
        let message = match enterprise_field(&name, known) {
            Some(message) => message,
            None => unknown_field(&name, known),
        };
        Self { path, message }
    }
}

/// The message for an unknown field.
pub(crate) fn unknown_field(name: &str, known: &[&str]) -> String {
    let alike = |known: &&&str| strsim::damerau_levenshtein(&known.to_lowercase(), &name.to_lowercase()) <= 2;
    let meant = known
        .iter()
        .filter(|it| !it.starts_with('_'))
        .filter(|it| alike(it))
        .min_by_key(|known| strsim::damerau_levenshtein(known, name));
    match meant {
        Some(meant) => format!("unknown field `{name}`; did you mean `{meant}`?"),
        None => format!("unknown field `{name}`, expected one of `{}`", known.join("`, `")),
    }
}

/// Collects errors while a conversion walks an object.
#[derive(Debug, Default)]
pub struct Errors(pub Vec<FieldError>, Origin, bool);

/// Where an object comes from, and so by which rules it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Origin {
    /// An author, whose object must satisfy its schema.
    #[default]
    Author,
    /// The system that enforces it, which stored it in its own form.
    Storage,
}

impl Errors {
    /// For an object as its system stores it: see [`Errors::refuse`].
    pub fn of_stored() -> Self {
        Self(Vec::new(), Origin::Storage, false)
    }

    /// The same collection, for an object whose metadata an API server has accepted: it is not checked again, since an object that
    /// exists must not become unreadable because of the syntax of a name, label or annotation. `is_accepted`: whether that is so.
    pub fn with_accepted_metadata(self, is_accepted: bool) -> Self {
        Self(self.0, self.1, is_accepted)
    }

    pub fn has_accepted_metadata(&self) -> bool {
        self.2
    }

    pub fn is_stored(&self) -> bool {
        self.1 == Origin::Storage
    }

    /// An error about a value that the schema refuses although its meaning is clear. A stored object is in force as it is, and has
    /// no such errors.
    pub fn refuse(&mut self, path: &Path<'_>, message: impl Display) {
        if !self.is_stored() {
            self.add(path, message);
        }
    }

    /// An error about a value that has no meaning.
    pub fn add(&mut self, path: &Path<'_>, message: impl Display) {
        self.0.push(FieldError { path: path.to_string(), message: message.to_string() });
    }

    /// Adds the error of a part, and continues without the part.
    pub fn note<T>(&mut self, path: &Path<'_>, result: Result<T, impl Display>) -> Option<T> {
        result.map_err(|error| self.add(path, error)).ok()
    }
}

/// A place in an object, built on the stack while walking down.
#[derive(Debug, Clone, Copy)]
pub enum Path<'a> {
    Root(&'a str),
    Field(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl<'a> Path<'a> {
    pub fn field(&'a self, name: &'a str) -> Path<'a> {
        Path::Field(self, name)
    }

    pub fn index(&'a self, index: usize) -> Path<'a> {
        Path::Index(self, index)
    }
}

impl Display for Path<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Root(name) => f.write_str(name),
            Self::Field(parent, name) => write!(f, "{parent}.{name}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}
