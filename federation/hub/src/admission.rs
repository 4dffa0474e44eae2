//! The admission webhook of the management cluster. API servers call it before they store an object of `hanse.dev`.
//!
//! It refuses what the hub would not accept, with the messages of `hanse policy check`. Its failure policy is `Fail`, and its rules name
//! the kinds of `hanse.dev` only: without a hub, these kinds cannot be written, and all others are not affected.
//!
//! Users need the verb `use` on a tier (`tiers.hanse.dev`) for each change of a policy in it. The webhook records who sends a change
//! before it allows it: the operator then knows the author, which no field of an object states, and finishes the record in the audit
//! log. In a tier with `requireApproval`, a change takes effect when a user with the verb `approve`, who is not its author, creates a
//! PolicyApproval for it (`approval`).
//!
//! API servers authenticate with client certificates where an authority for them is given (`clients`). Without one, the port must be open
//! to API servers only: a forged review can add an author to a change and so exclude an approver, and names any user in the audit log, but
//! approves nothing: an approval counts where its PolicyApproval exists with the same spec (`approvals`).
//!
//! Each hub has its own key and a self-signed certificate, in memory only. It adds the certificate to the CA bundle of the
//! ValidatingWebhookConfiguration, serves it when API servers know it, and replaces it well before its end. No key is stored or shared,
//! and any number of hubs share one configuration.

mod access;
pub mod approval;
mod approvals;
mod buffers;
mod certificate;
mod clients;
mod configuration;
mod listener;
mod review;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hanse_runtime::health::Condition;
use hanse_runtime::shutdown::Shutdown;
use kube::Client;

use approvals::Approvals;
pub use certificate::Certificates;
pub use clients::ClientOptions;
use configuration::Keeper;
pub use configuration::{Address, AddressError, CONFIGURATION, State, webhooks};
use review::Reviewer;

use crate::management::Monitor;
use crate::metrics::HubMetrics;
use crate::registry::Registry;

/// How long a hub that has started waits for the use of its webhook before it is ready.
const USABLE_WITHIN: Duration = Duration::from_secs(30);

/// How the webhook is served.
#[derive(Debug, Clone)]
pub struct Options {
    pub listen: SocketAddr,
    /// Where API servers reach it.
    pub address: Address,
    /// The name of the ValidatingWebhookConfiguration, which exists.
    pub configuration: String,
    /// The validity of its certificates.
    pub lifetime: Duration,
    /// Which API servers may send reviews.
    pub clients: ClientOptions,
}

/// The running webhook.
#[derive(Debug, Clone)]
pub struct Admission {
    /// Where it listens.
    pub listening: SocketAddr,
    /// Whether API servers can use it.
    pub state: tokio::sync::watch::Receiver<State>,
    /// Cancelled when API servers can use it for the first time.
    pub settled: tokio_util::sync::CancellationToken,
}

impl Admission {
    /// Makes `usable` true, for good, when API servers can use the webhook for the first time: until then, their requests should go to
    /// other hubs. After [`USABLE_WITHIN`] it is true in any case, since members need this hub also while no API server answers.
    pub fn set_when_usable(&self, usable: Condition, shutdown: &Shutdown) {
        let (settled, stop) = (self.settled.clone(), shutdown.token());
        shutdown.spawn("readiness of the webhook", async move {
            tokio::select! {
                () = stop.cancelled() => return,
                () = settled.cancelled() => {}
                () = tokio::time::sleep(USABLE_WITHIN) => {}
            }
            usable.set(true);
        });
    }
}

/// Serves the webhook, and keeps its configuration in the API server, until the shutdown.
///
/// # Errors
/// When the address cannot be bound, or no certificate can be made.
pub async fn start(
    options: Options,
    client: Client,
    registry: Registry,
    metrics: &HubMetrics,
    monitor: &Monitor,
    shutdown: &Shutdown,
) -> anyhow::Result<Admission> {
    let certificates = Arc::new(Certificates::new(options.address.host(), options.lifetime)?);
    let reviewer = Reviewer::new(client.clone(), registry.clone(), metrics.clone(), monitor.clone());
    let listening = listener::serve(options.listen, Arc::clone(&certificates), options.clients, reviewer, shutdown);
    let listening = listening.await?;
    let (approvals, stop) = (Approvals::new(client.clone(), registry, monitor.clone()), shutdown.token());
    shutdown.supervise("approvals", move || approvals.clone().run(stop.clone()));
    let (keeper, state) = Keeper::new(client, options.configuration, options.address, certificates, monitor);
    let (stop, settled) = (shutdown.token(), keeper.settled());
    shutdown.supervise("configuration of the webhook", move || keeper.clone().run(stop.clone()));
    Ok(Admission { listening, state, settled })
}

#[cfg(test)]
mod tests {
    use hanse_runtime::health::Health;
    use tokio_util::sync::CancellationToken;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn hub_is_ready_when_its_webhook_is_usable_or_late() {
        let shutdown = Shutdown::default();
        for is_settled in [true, false] {
            let (health, settled) = (Health::default(), CancellationToken::new());
            let (_, state) = tokio::sync::watch::channel(State::Unknown);
            let listening = SocketAddr::from(([127, 0, 0, 1], 1));
            let admission = Admission { listening, state, settled: settled.clone() };
            admission.set_when_usable(health.condition("webhook"), &shutdown);
            tokio::time::sleep(USABLE_WITHIN - Duration::from_secs(1)).await;
            assert_eq!(health.waiting_for(), ["webhook"]);
            if is_settled {
                settled.cancel();
                tokio::time::sleep(Duration::from_millis(1)).await;
            } else {
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            assert!(health.waiting_for().is_empty(), "settled: {is_settled}");
        }
    }
}
