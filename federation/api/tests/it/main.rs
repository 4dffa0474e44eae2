//! Manifests as people write them, through the whole reader.

mod assembly;
mod calico;
mod cluster_network_policy;
mod hanse;
mod network_policy;
mod reading;
mod selections;
mod stored;
mod workloads;

/// The fields that reading `text` complains of, in their order.
fn refusals(text: &str) -> Vec<String> {
    let mut read = hanse_api::Manifests::default();
    hanse_api::read_bytes(&"file.yaml".into(), text.as_bytes(), &mut read);
    read.diagnostics.into_iter().map(|diagnostic| diagnostic.field).collect()
}
