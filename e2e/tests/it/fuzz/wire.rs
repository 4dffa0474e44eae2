//! The wire: what decodes and is accepted encodes to bytes that mean the same, and what the hub accepts of a member every
//! other member can read. The first byte of an input says which message the rest is.

use bytes::Bytes;
use hanse_exchange::codec::{self, frame, object};
use hanse_exchange::interest::{self, OWN};
use hanse_exchange::message::{RefusedParts, WatchRequest};
use hanse_proto::agent::v1 as agent;
use hanse_proto::federation::v1 as pb;
use hanse_protocol::{Assembled, Assembler, encode};
use hanse_ruleset::{Delta, RuleSet};
use prost::Message as _;

use super::{Outcome, Target};

pub struct Messages;

impl Target for Messages {
    const NAME: &'static str = "wire";
    const RUNS: u64 = 60_000;
    const WORDS: &'static [&'static str] = &[
        "\x08\x01",
        "\x10\x00",
        "\x12\x00",
        "\x1a\x00",
        "\x0a\x04\x0a\x00\x00\x01",
        "\u{0}\u{0}\u{0}\u{0}",
        "app == 'x'",
        "all()",
        "has(a)",
        "web",
        "default",
        "0123456789abcdef",
        "\x1a\x10",
        "\x22\x02\x08\x01",
        "{\"kind\":\"Tier\"}",
    ];

    fn seeds() -> Vec<Vec<u8>> {
        let tagged = |tag: u8, bytes: Vec<u8>| [vec![tag], bytes].concat();
        let mut seeds: Vec<Vec<u8>> = objects().iter().map(|object| tagged(0, object.encode_to_vec())).collect();
        // The hub refuses what it does not use itself, since it would relay it to members who cannot read it.
        for (protocol, number) in [(6, 65_536), (256, 80)] {
            let body = pb::object_update::Body::Endpoint(pb::Endpoint {
                name: "pod-1".to_owned(),
                ports: vec![pb::NamedPort { name: "http".to_owned(), protocol, port: number }],
                ..pb::Endpoint::default()
            });
            seeds.push(tagged(0, pb::ObjectUpdate { id: 9, body: Some(body), ..Default::default() }.encode_to_vec()));
        }
        let upserts: Vec<Bytes> = objects().iter().map(|object| object.encode_to_vec().into()).collect();
        seeds.push(tagged(1, pb::Frame { upserts, removals: vec![1, 2, u64::MAX] }.encode_to_vec()));
        let selection = |selector: &str, clusters| pb::Selection {
            clusters: Some(clusters),
            selector: selector.to_owned(),
            port_names: vec!["http".to_owned()],
        };
        let named = pb::selection::Clusters::Named(pb::Clusters { names: vec!["a".to_owned(), "b".to_owned()] });
        let selections = vec![
            selection("app == 'x' && pcns.team in {'a', \"b\"}", named),
            selection("", pb::selection::Clusters::All(pb::AllClusters {})),
        ];
        seeds.push(tagged(2, pb::OwnInterest { selections }.encode_to_vec()));
        seeds.push(tagged(3, messages(&encode(&delta()))));
        let manifest = serde_json::json!({
            "apiVersion": "hanse.dev/v1alpha1", "kind": "FederatedNetworkPolicy", "metadata": {"name": "p"},
            "spec": {"tier": "platform", "selector": "app == 'x'", "types": ["Ingress"]},
        });
        seeds.push(tagged(4, manifest.to_string().into_bytes()));
        let cluster = serde_json::json!({
            "apiVersion": "hanse.dev/v1alpha1", "kind": "MemberCluster", "metadata": {"name": "c"},
            "spec": {"labels": {"env": "prod"}, "grants": {"cidrs": ["10.0.0.0/8"], "namespaces": ["*"]}},
        });
        seeds.push(tagged(4, cluster.to_string().into_bytes()));
        seeds
    }

    fn run(input: &[u8]) -> Outcome {
        let (&which, bytes) = input.split_first().unwrap_or((&0, &[]));
        let read = match which % 5 {
            0 => export(bytes),
            1 => frame(bytes),
            2 => interest(bytes),
            3 => rule_set(bytes),
            _ => manifest(bytes),
        };
        let (accepted, how) = match read {
            Ok(how) => (true, how),
            Err(how) => (false, how),
        };
        Outcome { accepted, how: format!("{} {how}", which % 5) }
    }
}

/// One object that a member publishes: the hub checks it, and relays its bytes as they are.
fn export(bytes: &[u8]) -> Result<String, String> {
    let update = object::decode_export(bytes).ok_or("no id")?;
    let exported = update.object.map_err(|error| format!("{error:?}"))?;
    let relayed = object::decode(bytes).expect("what the hub relays is an object");
    assert_eq!((update.id, update.revision), (relayed.id, relayed.revision));
    assert_eq!(relayed.object.as_ref(), Ok(&exported), "what the hub accepts members can read");
    let again = object::decode_export(&object::encode(update.id, update.revision, &exported)).expect("an id");
    assert_eq!(again.object.as_ref(), Ok(&exported));
    Ok(match exported {
        object::Object::Endpoint(it) => format!("endpoint {} {}", it.addresses.len().min(3), it.ports.len().min(3)),
        object::Object::Namespace { .. } => "namespace".to_owned(),
        object::Object::ServiceAccount { .. } => "account".to_owned(),
        object::Object::LabelSet { .. } => "labels".to_owned(),
        other => panic!("members do not publish {other:?}"),
    })
}

fn frame(bytes: &[u8]) -> Result<String, String> {
    let read = frame::read(&Bytes::copy_from_slice(bytes)).map_err(|error| format!("{error:?}"))?;
    let mut whole = frame::Frame::default();
    for bytes in frame::cut(&read.upserts, &read.removals) {
        let part = frame::read(&bytes).expect("a frame of ours is within the limit");
        whole.upserts.extend(part.upserts);
        whole.removals.extend(part.removals);
    }
    assert_eq!(whole, read);
    Ok(format!("frame {} {}", read.upserts.len().min(3), read.removals.len().min(3)))
}

fn interest(bytes: &[u8]) -> Result<String, String> {
    let own = pb::OwnInterest::decode(bytes).map_err(|_| "no interest")?;
    let own = pb::WatchRequest { message: Some(pb::watch_request::Message::Own(own)) };
    let Some(WatchRequest::Own(own)) = codec::watch::decode_request(own) else { panic!("it is read as an interest") };
    let read = |selections| {
        let mut refused = RefusedParts::default();
        (interest::read("own", selections, OWN, &mut refused), refused.total)
    };
    let (interest, refused) = read(own);
    // What it is read as is sent on, and read back as the same.
    let sent = read(interest.iter().map(|wanted| (&**wanted).into()).collect());
    assert_eq!(sent, (interest.clone(), 0));
    Ok(format!("interest {} {}", interest.len().min(4), refused.min(2)))
}

/// A stream of messages to an agent.
fn rule_set(mut bytes: &[u8]) -> Result<String, String> {
    let (mut assembler, mut found) = (Assembler::default(), Vec::new());
    while !bytes.is_empty() {
        let message = agent::MemberToAgent::decode_length_delimited(&mut bytes).map_err(|_| "no message")?;
        match assembler.receive(message).map_err(|error| error.to_string())? {
            Assembled::Nothing => {}
            Assembled::Position { .. } => found.push("position".to_owned()),
            Assembled::Delta(delta) => {
                let once = reassembled(&delta);
                assert_eq!(reassembled(&once), once);
                let whole = Delta { base: None, ..*delta };
                found.push(match RuleSet::default().apply(&whole) {
                    Ok(_) => "applied".to_owned(),
                    Err(error) => error.to_string(),
                });
            }
        }
    }
    found.truncate(3);
    if found.is_empty() { Err("nothing whole".to_owned()) } else { Ok(found.join(", ")) }
}

fn reassembled(delta: &Delta) -> Delta {
    let mut assembler = Assembler::default();
    for message in encode(delta) {
        if let Assembled::Delta(delta) = assembler.receive(message).expect("what is encoded is read") {
            return *delta;
        }
    }
    panic!("an encoded delta ends");
}

fn manifest(bytes: &[u8]) -> Result<String, String> {
    hanse_hub::manifest::check(bytes).map(|checked| format!("{:?}", checked.id.kind))
}

fn messages(of: &[agent::MemberToAgent]) -> Vec<u8> {
    of.iter().flat_map(|message| message.encode_length_delimited_to_vec()).collect()
}

fn objects() -> Vec<pb::ObjectUpdate> {
    use pb::object_update::Body;
    let pair = |key: &str, value: &str| pb::Pair { key: key.to_owned(), value: value.to_owned() };
    let port = |name: &str, protocol, port| pb::NamedPort { name: name.to_owned(), protocol, port };
    let bodies = [
        Body::Namespace(pb::Namespace { name: "web".to_owned(), labels: vec![pair("team", "a")] }),
        Body::ServiceAccount(pb::ServiceAccount { namespace: 1, name: "default".to_owned(), labels: Vec::new() }),
        Body::LabelSet(pb::LabelSet { labels: vec![pair("app", "x"), pair("tier", "")] }),
        Body::Endpoint(pb::Endpoint {
            namespace: 1,
            name: "pod-0".to_owned(),
            service_account: 2,
            label_set: 3,
            labels: vec![pair("index", "0")],
            addresses: vec![vec![10, 0, 0, 1].into(), vec![0xfd; 16].into()],
            ports: vec![port("http", 6, 80), port("dns", 17, 53)],
            node: "n1".to_owned(),
        }),
    ];
    let update = |(id, body)| pb::ObjectUpdate { id, revision: id, features: Vec::new(), body: Some(body) };
    (1..).zip(bodies).map(update).collect()
}

/// Something of everything.
fn delta() -> Delta {
    use hanse_ruleset::*;
    let id = |name: &str| SetId::of_meaning(&[name]);
    let address = |last| std::net::IpAddr::from([10, 0, 0, last]);
    let sets = [
        Set { id: id("a"), members: Members::Addresses([address(1), address(2)].into()) },
        Set { id: id("n"), members: Members::Nets(["10.0.0.0/8".parse().expect("a net")].into()) },
        Set {
            id: id("s"),
            members: Members::Sockets([SocketAddress { address: address(3), protocol: 6, port: 80 }].into()),
        },
    ];
    let peer = Peer {
        nets: vec!["fd00::/8".parse().expect("a net")],
        in_sets: vec![vec![id("a"), id("n")]],
        ports: vec![PortRange { first: 80, last: 90 }],
        port_sets: vec![id("s")],
        ..Peer::default()
    };
    let rule = Rule {
        action: Action::Allow,
        index: 3,
        unknown: false,
        family: Some(Family::V4),
        protocol: Some(6),
        not_protocol: None,
        icmp: Some(Icmp { kind: 8, code: Some(0) }),
        not_icmp: None,
        source: peer.clone(),
        destination: peer,
    };
    let policy = Policy { name: "c/web/p".into(), rules: vec![rule] };
    let tier = Tier { name: "default".into(), policies: vec![policy.id()], default: TierDefault::Deny };
    let chain = Chain { phases: vec![Phase { name: "Local".into(), tiers: vec![tier] }], profile_allows: true };
    let endpoint = LocalEndpoint {
        id: EndpointId { namespace: "web".into(), name: "pod-0".into() },
        addresses: vec![address(1)],
        ingress: chain.id(),
        egress: chain.id(),
        egress_to_node: chain.id(),
    };
    let stream = OwnStream { name: "hub".into(), from: Vec::new(), to: Vec::new(), protocol: 6, port: 7443 };
    let node = NodeConfig {
        pod_ranges: vec!["10.0.0.0/24".parse().expect("a net")],
        node_addresses: vec![address(254)],
        unknown_pods: UnknownPods::Deny,
        enforcement: Enforcement::Observe,
        own_streams: vec![stream],
    };
    let mut rules = RuleSet { node, hub_revision: 3, local_revision: 4, ..RuleSet::default() };
    rules.sets.extend(sets.map(|set| (set.id, set.into())));
    rules.policies.insert(policy.id(), policy.into());
    rules.chains.insert(chain.id(), chain.into());
    rules.endpoints.insert(endpoint.id.clone(), endpoint.into());
    Delta::between(None, &rules)
}
