//! The exchange with the grants and the registry of the hub: a cluster that publishes, and what others receive.

mod interests;
mod limits;
mod objects;
mod parts;
mod policies;
mod reports;

use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_exchange::codec;
use hanse_exchange::hub::{Exchange, PublishId, ReceiverId};
use hanse_exchange::interest::Wanted;
use hanse_exchange::limits::EXISTING_TIER;
use hanse_exchange::message::{PublishRequest, WatchRequest};
use hanse_exchange::model::{ClusterState, FederatedManifest, Federation, Lease, ManifestKind, Position};
use hanse_hub::exchange::derive::{Deriver, UNREADABLE};
use hanse_hub::exchange::report as report_of;
use hanse_hub::grants::MemberCluster;
use hanse_hub::manifest::{Kind, ObjectId};
use hanse_hub::registry::{Acceptance, Clock, Registry};
use hanse_policy::inventory::Labels;
use hanse_policy::model::{ClusterName, ClusterScope};
use hanse_proto::federation::v1 as pb;
use hanse_proto::report::v1 as reasons;
use hanse_protocol::reason::wire::parse_reason;
use hanse_protocol::reason::words::Words;
use hanse_store::{Key, Transaction, in_memory};
use pb::object_update::Body;
use pb::publish_request::Message as Request;
use pb::publish_response::Message as Response;
use pb::refusal::Reason;
use prost::Message as _;

use crate::support::{eventually, policy};

/// The exchange as connections use it: with encoded messages.
trait Wire {
    fn publish_wire(&mut self, id: PublishId, request: pb::PublishRequest) -> Result<Vec<pb::PublishResponse>, String>;
    fn watch_open_wire(&mut self, cluster: ClusterName, open: pb::WatchOpen) -> Result<ReceiverId, String>;
    fn next_wire(&mut self, id: ReceiverId) -> Option<pb::WatchResponse>;
}

impl Wire for Exchange {
    fn publish_wire(&mut self, id: PublishId, request: pb::PublishRequest) -> Result<Vec<pb::PublishResponse>, String> {
        let request = codec::publish::decode_request(request).map_err(|error| error.to_string())?;
        if let PublishRequest::Report(bytes) = &request {
            let state = report_of::state(&report_of::read(bytes));
            return self.publish_report(id, state).map(|()| Vec::new()).map_err(|error| error.to_string());
        }
        let answers = self.publish(id, request).map_err(|error| error.to_string())?;
        Ok(answers.into_iter().map(codec::publish::encode_response).collect())
    }

    fn watch_open_wire(&mut self, cluster: ClusterName, open: pb::WatchOpen) -> Result<ReceiverId, String> {
        let open = pb::WatchRequest { message: Some(pb::watch_request::Message::Open(open)) };
        let Some(WatchRequest::Open(open)) = codec::watch::decode_request(open) else { panic!("not an opening") };
        self.watch_open(cluster, open).map_err(|error| error.to_string())
    }

    fn next_wire(&mut self, id: ReceiverId) -> Option<pb::WatchResponse> {
        self.next(id).map(codec::watch::encode_response)
    }
}

fn grant(grants: serde_json::Value) -> MemberCluster {
    let manifest = serde_json::json!({
        "apiVersion": "hanse.dev/v1alpha1", "kind": "MemberCluster", "metadata": {"name": "train"},
        "spec": {"grants": grants}
    });
    MemberCluster::from_manifest(manifest.to_string().as_bytes()).unwrap()
}

/// A hub with one cluster of these grants, which publishes.
struct Publishing {
    exchange: Exchange,
    id: PublishId,
    revision: u64,
}

impl Publishing {
    fn new(grant: MemberCluster) -> Self {
        let mut exchange = Exchange::new();
        exchange.set_federation(federation(grant, 1));
        let id = exchange.publish_open("train".into());
        let mut it = Self { exchange, id, revision: 0 };
        it.open();
        it.batch(pb::begin::Kind::Snapshot(pb::Snapshot {}), &[], &[]);
        it
    }

    fn open(&mut self) -> Vec<Response> {
        self.say(Request::Open(pb::PublishOpen { protocol: 1, epoch: 1, ..Default::default() }))
    }

    /// The stream ends, and the next one is opened.
    fn reopen(&mut self) -> Vec<Response> {
        self.exchange.publish_close(self.id);
        self.id = self.exchange.publish_open("train".into());
        self.open()
    }

    fn say(&mut self, message: Request) -> Vec<Response> {
        let request = pb::PublishRequest { message: Some(message) };
        self.exchange.publish_wire(self.id, request).unwrap().into_iter().filter_map(|answer| answer.message).collect()
    }

    fn batch(&mut self, kind: pb::begin::Kind, upserts: &[(u64, Body)], removals: &[u64]) -> Vec<Response> {
        self.revision += 1;
        let upserts = upserts.iter().map(|(id, body)| {
            let body = Some(body.clone());
            pb::ObjectUpdate { id: *id, revision: self.revision, features: Vec::new(), body }.encode_to_vec().into()
        });
        let frame = pb::Frame { upserts: upserts.collect(), removals: removals.to_vec() };
        self.say(Request::Begin(pb::Begin { origin: String::new(), kind: Some(kind), needs_interest: 0 }));
        self.say(Request::Frame(frame.encode_to_vec().into()));
        let position = Some(pb::Position { epoch: 1, revision: self.revision });
        self.say(Request::End(pb::End { position, digest: bytes::Bytes::new(), view: 0 }))
    }

    fn delta(&mut self, upserts: &[(u64, Body)], removals: &[u64]) -> Vec<Response> {
        self.batch(pb::begin::Kind::Delta(pb::Delta {}), upserts, removals)
    }

    /// All current refusals, by ID.
    fn refusals(&self) -> Vec<(u64, String)> {
        let (total, list) = self.exchange.origin("train").unwrap().refusals(100);
        assert_eq!(total, list.len());
        list.into_iter().map(|(id, why)| (id, why.to_string())).collect()
    }
}

fn federation(grant: MemberCluster, revision: u64) -> Federation {
    let state = ClusterState {
        labels: Labels::new(),
        grant_token: revision,
        grant: Arc::new(grant),
        cidrs: Vec::new(),
        lease: Lease::Live,
        federated_allow_final: false,
        visible_to: None,
    };
    Federation {
        position: Position { epoch: 1, revision },
        clusters: [("serve".into(), state.clone()), ("train".into(), state)].into(),
        manifests: Default::default(),
    }
}

fn report(realisation: pb::Realisation) -> Request {
    Request::Realisation(realisation.encode_to_vec().into())
}

/// As the hub keeps a report.
fn kept(realisation: pb::Realisation) -> pb::Realisation {
    report_of::read(&realisation.encode_to_vec())
}

fn namespace(name: &str, labels: &[(&str, &str)]) -> Body {
    Body::Namespace(pb::Namespace { name: name.to_owned(), labels: pairs(labels) })
}

fn pairs(labels: &[(&str, &str)]) -> Vec<pb::Pair> {
    labels.iter().map(|(key, value)| pb::Pair { key: (*key).to_owned(), value: (*value).to_owned() }).collect()
}

/// An endpoint of namespace 1 with the address 10.1.0.`last`.
fn endpoint(last: u8) -> pb::Endpoint {
    pb::Endpoint {
        namespace: 1,
        name: format!("pod-{last}"),
        addresses: vec![vec![10, 1, 0, last].into()],
        ..pb::Endpoint::default()
    }
}

fn words(reason: &reasons::Reason) -> String {
    Words(&parse_reason(reason.clone())).to_string()
}

/// The ids that batches of `train` update and remove, in the order of their frames.
fn sent_of_train(exchange: &mut Exchange, id: ReceiverId) -> (Vec<u64>, Vec<u64>) {
    use pb::watch_response::Message;
    let (mut come, mut gone, mut of_train) = (Vec::new(), Vec::new(), false);
    loop {
        let Some(response) = exchange.next_wire(id) else {
            // Its interest is evaluated in parts.
            if exchange.is_building(id) {
                continue;
            }
            break;
        };
        match response.message {
            Some(Message::Begin(begin)) => of_train = begin.origin == "train",
            Some(Message::Frame(bytes)) if of_train => {
                let frame = pb::Frame::decode(bytes).unwrap();
                come.extend(frame.upserts.into_iter().map(|bytes| pb::ObjectUpdate::decode(bytes).unwrap().id));
                gone.extend(frame.removals);
            }
            _ => {}
        }
    }
    come.sort_unstable();
    (come, gone)
}

fn tier(name: &str) -> Vec<u8> {
    let metadata = serde_json::json!({"name": name});
    let tier = serde_json::json!({"apiVersion": "hanse.dev/v1alpha1", "kind": "Tier", "metadata": metadata, "spec": {"order": 1}});
    tier.to_string().into_bytes()
}

fn unenforced(namespace: &str, name: &str) -> pb::UnenforcedPod {
    let finding = reasons::Finding { kind: reasons::finding::Kind::Pending.into(), ..Default::default() };
    let pod = reasons::Pod { namespace: namespace.to_owned(), name: name.to_owned() };
    pb::UnenforcedPod { pod: Some(pod), finding: Some(finding) }
}
