//! Questions about packets between pods and addresses that are live.

use std::sync::Arc;

use super::judge::Judge;
use crate::evaluate::Query;
use crate::explain::question::{Candidate, packet_between};
use crate::explain::{QueryEnd, Question, QuestionError};
use crate::indexed::LOCAL;
use crate::inventory::{EndpointId, EndpointKind};

impl Judge<'_> {
    /// The packet of a question. Services cannot be an end: their packets go to backends, which is known offline only.
    ///
    /// # Errors
    /// When the question names something that does not exist, or does not describe a packet.
    pub fn packet(&self, question: &Question) -> Result<Query, QuestionError> {
        let (from, to) = (self.candidate(&question.from)?, self.candidate(&question.to)?);
        packet_between(question, &from, &to)?.query_of(question)
    }

    fn candidate(&self, place: &QueryEnd) -> Result<Candidate, QuestionError> {
        let inventory = self.inventory;
        match place {
            QueryEnd::Address { ip } => Candidate::address(ip, |address| {
                let owner = |slot| (inventory.clusters[inventory.cluster_of(slot)].name.clone(), inventory.id_of(slot));
                let mut owners: Vec<_> = inventory.claimants(address).map(owner).collect();
                owners.sort_unstable();
                owners
            }),
            QueryEnd::Service { .. } => Err(QuestionError::Service(place.to_string())),
            QueryEnd::Pod { cluster, namespace, pod } => {
                let only = (inventory.clusters.len() == 2).then(|| &*inventory.clusters[LOCAL].name);
                let cluster = cluster.as_deref().or(only).ok_or(QuestionError::WhichCluster)?;
                let known = inventory.cluster_id(cluster).ok_or_else(|| QuestionError::Cluster(cluster.to_owned()))?;
                let id = EndpointId {
                    kind: EndpointKind::Pod,
                    namespace: Some(Arc::from(namespace.as_str())),
                    name: Arc::from(pod.as_str()),
                };
                let missing = || QuestionError::Pod(cluster.to_owned(), namespace.clone(), pod.clone(), String::new());
                let slot = inventory.endpoint(known, &id).ok_or_else(missing)?;
                let cluster = inventory.clusters[known].name.clone();
                // A pod on the host's network has its node's addresses, which no pod owns.
                let candidate = match inventory.host_addresses(slot) {
                    Some(addresses) => Candidate::running(cluster, None, addresses.to_vec()),
                    None => Candidate::running(cluster, Some(id), inventory.claimed(slot).to_vec()),
                };
                candidate.ok_or_else(|| QuestionError::NoAddress(place.to_string()))
            }
        }
    }
}
