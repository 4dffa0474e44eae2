//! The metrics registry that is passed down to every component.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::registry::Registry;

/// A shared Prometheus registry. Names are `hanse_<area>_<thing>_<unit>`; labels come from closed sets only.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("hanse");
        crate::supervisor::register(&mut registry);
        Self { registry: Arc::new(Mutex::new(registry)) }
    }
}

impl Metrics {
    /// Registers a component's metrics. The prefix `hanse_` and a counter's suffix `_total` are added.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The text exposition (OpenMetrics 1.0).
    pub fn encode(&self) -> String {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        text
    }
}
