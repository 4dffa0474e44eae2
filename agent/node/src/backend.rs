//! The choice of the backend: the only place that names one.

use hanse_dataplane::nftables::Nftables;
use hanse_dataplane::{Backend, Error, Settings};

/// Opens the dataplane of the network namespace of the calling thread, with checked settings.
///
/// # Errors
/// When the kernel's dataplane is not available.
pub fn open(settings: Settings) -> Result<Box<dyn Backend>, Error> {
    Ok(Box::new(Nftables::new(settings)?))
}
