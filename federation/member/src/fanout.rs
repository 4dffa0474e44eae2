//! The fan-out: sends to each agent the rule set of its node, as a delta to the rule set that the agent has.
//!
//! One delta is in flight per agent, and the next starts from the rule set that the agent acknowledged. A slow agent therefore receives
//! only the newest state, does not delay others, and costs the memory of one rule set, which is shared. An agent that keeps up receives
//! the delta of the compiler; for others a delta is computed.
//!
//! The certificate of an agent, issued by the cluster's own authority, identifies its node.

mod enrol;
mod nodes;
mod service;
mod state;
pub(crate) mod status;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hanse_identity::Identity;
#[cfg(test)]
use hanse_identity::instances::Instance;
use hanse_identity::tls::{
    Connections, CredentialStore, Incoming, IncomingLimits, PresentedAuthority, ServerTls, Trust, http2_server,
    incoming,
};
use hanse_proto::agent::v1::agents_server::AgentsServer;
use hanse_proto::agent::v1::enrolment_server::EnrolmentServer;
use hanse_runtime::shutdown::Shutdown;
use tokio_util::sync::CancellationToken;

pub use enrol::{
    Created, NodeToken, NodeTokenError, allow_node, create_node_token, list_node_tokens, list_nodes, revoke_node,
    revoke_node_token,
};
pub use nodes::NodeRecord;
pub use state::{Fanout, FanoutError, Readiness};
pub use status::{NodeStatus, RulesPosition};

use crate::flows::Inbox;
use crate::registration::MemberIdentity;

/// Enrolments per second of one address.
const ENROLMENTS_PER_SECOND: f64 = 5.0;
/// The maximum size of a message of an agent: 2,000 refusals and pods of about 300 bytes.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024;

impl Fanout {
    /// Opens both listeners and returns their addresses. Flows that agents report go to `flows`.
    ///
    /// # Errors
    /// When an address cannot be bound, or no certificate can be issued.
    pub async fn serve(
        &self,
        identity: &MemberIdentity,
        agents: SocketAddr,
        enrolment: SocketAddr,
        flows: Inbox,
        shutdown: &Shutdown,
    ) -> Result<(SocketAddr, SocketAddr), FanoutError> {
        let authority = identity.authority();
        let cluster = Identity::Cluster(Arc::clone(identity.cluster()));
        let credentials = authority.issue_credentials(&cluster, self.shared.lifetime, SystemTime::now())?;
        let credentials = CredentialStore::new(credentials)?;
        let own = Arc::clone(identity.cluster());
        let trust = Trust::new(
            authority.certificate(),
            move |identity| matches!(identity, Identity::Node { cluster, .. } if *cluster == own),
        )?;
        let mutual = ServerTls::mutual(credentials.clone(), &trust)?;
        // Node tokens name the newest authority.
        let newest = identity.clone();
        let presented = PresentedAuthority::new(move || newest.authority().certificate().der.clone());
        let anonymous = ServerTls::anonymous(credentials.clone(), presented)?;
        let stop = shutdown.token();
        let listen = async |address, tls, limits| -> Result<Incoming, FanoutError> {
            let listening = incoming(address, tls, limits, Connections::default(), stop.clone()).await;
            listening.map_err(|error| FanoutError::Listen(address, error))
        };
        let agents = listen(agents, mutual, IncomingLimits::default()).await?;
        // Clients are not authenticated: few connections, each short.
        let limits = IncomingLimits {
            connections: 256,
            per_address: Some(64),
            per_network: Some(128),
            stalls_after: Duration::from_secs(5),
            per_second: Some(ENROLMENTS_PER_SECOND),
            lifetime: Some(Duration::from_secs(30)),
            ..IncomingLimits::default()
        };
        let enrolment = listen(enrolment, anonymous, limits).await?;
        let addresses = (agents.address(), enrolment.address());
        let service = service::Service::new(self.clone(), identity.clone(), flows, stop.clone());
        let server = AgentsServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let until = stop.clone().cancelled_owned();
        let server = http2_server().add_service(server).serve_with_incoming_shutdown(agents, until);
        shutdown.essential("listener for agents", server);
        let service = enrol::Service { fanout: self.clone(), identity: identity.clone() };
        let enrol = EnrolmentServer::new(service).max_decoding_message_size(16 * 1024);
        let until = stop.clone().cancelled_owned();
        // An agent sends one request.
        let mut server = http2_server().max_concurrent_streams(2);
        let server = server.add_service(enrol).serve_with_incoming_shutdown(enrolment, until);
        shutdown.essential("listener for enrolment", server);
        let (fanout, until) = (self.clone(), stop.clone());
        shutdown.supervise("revocation of nodes", move || {
            let (fanout, until) = (fanout.clone(), until.clone());
            async move { fanout.follow_revocations(until).await }
        });
        let renewing = (identity.clone(), cluster, self.shared.lifetime, credentials, stop);
        shutdown.supervise("renewal of the certificate for agents", move || {
            let (identity, cluster, lifetime, credentials, stop) = renewing.clone();
            renew(identity, cluster, lifetime, credentials, stop)
        });
        Ok(addresses)
    }
}

/// Renews the certificate for agents.
async fn renew(
    identity: MemberIdentity,
    cluster: Identity,
    lifetime: Duration,
    credentials: CredentialStore,
    stop: CancellationToken,
) {
    loop {
        let wait = credentials.current().certificate.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait.max(Duration::from_secs(1))) => {}
        }
        let issued = identity.authority().issue_credentials(&cluster, lifetime, SystemTime::now());
        let replaced = issued
            .map_err(|error| error.to_string())
            .and_then(|new| credentials.replace(new).map_err(|error| error.to_string()));
        if let Err(error) = replaced {
            tracing::error!(error, "certificate for agents not renewed");
        }
    }
}

#[cfg(test)]
fn instance_of_test(number: u8) -> Instance {
    Instance::new(&[number; 16], SocketAddr::from(([192, 0, 2, number], 1)))
}

#[cfg(test)]
mod tests;
