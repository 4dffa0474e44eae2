//! The Service at which agents reach the leader of several members.
//!
//! The Service has no selector: the leader writes its only EndpointSlice. All members can then be ready, so that a rollout and a
//! PodDisruptionBudget work as for other Deployments, and a change of the leader is one write.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use hanse_kubernetes::{Access, answered};
use hanse_runtime::health::Writes;
use hanse_runtime::retry::Backoff;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::api_server::Reported;
use crate::leadership::Leadership;

/// The interval between checks of the EndpointSlice.
const CHECK_EVERY: Duration = Duration::from_secs(60);
/// The owner of the fields that the member writes.
const FIELD_MANAGER: &str = "hanse-member";

/// The Service of agents, and where this process serves them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentService {
    pub namespace: String,
    pub name: String,
    /// The address of this process for agents.
    pub address: IpAddr,
}

impl AgentService {
    /// The name of the EndpointSlice.
    pub fn slice(&self) -> String {
        format!("{}-leader", self.name)
    }

    /// `uid`: of the Service, with which the EndpointSlice is deleted.
    fn endpoint_slice(&self, uid: &str, agents: SocketAddr, enrolment: SocketAddr) -> serde_json::Value {
        let address_type = if self.address.is_ipv4() { "IPv4" } else { "IPv6" };
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": self.slice(),
                "namespace": self.namespace,
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": self.name, "uid": uid}],
                "labels": {
                    "kubernetes.io/service-name": self.name,
                    "endpointslice.kubernetes.io/managed-by": FIELD_MANAGER,
                },
            },
            "addressType": address_type,
            "endpoints": [{"addresses": [self.address], "conditions": {"ready": true, "serving": true, "terminating": false}}],
            "ports": [
                {"name": "agents", "port": agents.port(), "protocol": "TCP"},
                {"name": "enrol", "port": enrolment.port(), "protocol": "TCP"},
            ],
        })
    }
}

/// Keeps the Service pointed at this process while it leads, until `stop`.
pub async fn keep_endpoints(
    access: Access,
    service: AgentService,
    (agents, enrolment): (SocketAddr, SocketAddr),
    leadership: Leadership,
    writes: Writes,
    stop: CancellationToken,
) {
    let mut reported = Reported::new(writes, "the EndpointSlice of the Service of agents");
    let mut backoff = Backoff::default();
    let mut is_written = false;
    loop {
        let written = match leadership.is_certain() {
            true => write(&access, &service, agents, enrolment).await,
            false => Err(anyhow::anyhow!("the Lease was not renewed: another process may lead")),
        };
        reported.note(&written);
        let wait = match written {
            Ok(()) => {
                if !is_written {
                    tracing::info!(service = service.name, address = %service.address, "Service of agents points at this member");
                }
                is_written = true;
                backoff.reset();
                CHECK_EVERY
            }
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    namespace = service.namespace,
                    slice = service.slice(),
                    "EndpointSlice of the Service of agents not written: agents may not find this member"
                );
                is_written = false;
                backoff.next_delay()
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn write(
    access: &Access,
    service: &AgentService,
    agents: SocketAddr,
    enrolment: SocketAddr,
) -> anyhow::Result<()> {
    let client = access.client().await?;
    // Services are listed anyway: this needs no further right.
    let services: Api<Service> = Api::namespaced(client.clone(), &service.namespace);
    let only = ListParams::default().fields(&format!("metadata.name={}", service.name));
    let found = answered(services.list(&only)).await?.items.into_iter().next();
    let uid = found.and_then(|it| it.metadata.uid);
    let uid = uid.with_context(|| format!("Service {}/{} does not exist", service.namespace, service.name))?;
    let api: Api<EndpointSlice> = Api::namespaced(client, &service.namespace);
    let slice = service.endpoint_slice(&uid, agents, enrolment);
    answered(api.patch(&service.slice(), &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(slice))).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slice_belongs_to_the_service_and_is_ready() {
        let service =
            AgentService { namespace: "hanse".to_owned(), name: "m".to_owned(), address: [192, 0, 2, 1].into() };
        let slice = service.endpoint_slice("1", ([0, 0, 0, 0], 7500).into(), ([0, 0, 0, 0], 7501).into());
        let slice: EndpointSlice = serde_json::from_value(slice).expect("an EndpointSlice");
        let labels = slice.metadata.labels.expect("labels");
        assert_eq!((labels["kubernetes.io/service-name"].as_str(), &*slice.address_type), ("m", "IPv4"));
        let ports: Vec<_> = slice.ports.into_iter().flatten().map(|port| (port.name, port.port)).collect();
        assert_eq!(ports, [(Some("agents".to_owned()), Some(7500)), (Some("enrol".to_owned()), Some(7501))]);
    }
}
