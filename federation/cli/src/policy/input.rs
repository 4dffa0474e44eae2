//! Files of JSON lines.

use std::io::BufRead;
use std::path::Path;

use anyhow::Context as _;
use hanse_api::decode::typed;
use hanse_api::document;
use hanse_api::field::FieldError;
use serde::de::DeserializeOwned;

/// Opens a file; `-` is standard input.
pub fn open(path: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if path == Path::new("-") {
        return Ok(Box::new(std::io::stdin().lock()));
    }
    let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    Ok(Box::new(std::io::BufReader::new(file)))
}

/// One line of a file of JSON as a value.
///
/// # Errors
/// The first error, with its column and field.
pub fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| {
        let column = error.column();
        // The reader of manifests reports the field, too.
        let document = document::documents(text).next().filter(|_| error.is_data()).and_then(Result::ok);
        let errors = document.and_then(|document| typed::<T>(document.root()).err());
        let message = match errors.and_then(|errors| errors.into_iter().next()) {
            Some(FieldError { path, message }) if path.is_empty() => message,
            Some(error) => error.to_string(),
            // serde_json reports every line as the first one.
            None => {
                let message = error.to_string();
                let place = format!(" at line {} column {column}", error.line());
                message.strip_suffix(&place).unwrap_or(&message).to_owned()
            }
        };
        format!("column {column}: {message}")
    })
}
