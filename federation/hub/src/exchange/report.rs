//! Reports of enforcement. The hub keeps them and shows them to administrators, so that counts, names and texts are limited.

use hanse_exchange::codec::read_digest;
use hanse_exchange::limits::{MAX_CLUSTERS, MAX_NAME_BYTES, MAX_PLAIN_BYTES};
use hanse_exchange::model::ReportedState;
use hanse_proto::bounded;
use hanse_proto::federation::v1 as pb;
use hanse_protocol::reason::{ExchangeProblem, Reason, wire as reasons};

/// Nodes of one cluster. Each is kept for status.
const MAX_NODES: usize = 16_384;
/// Errors, pods, policies or problems in the report of one cluster, each.
const MAX_ITEMS: usize = 65_536;
/// Bytes of the reason why a member cannot read a policy. What is longer is cut. Texts of other reasons have the bounds of
/// `hanse_protocol::reason`.
const MAX_TEXT_BYTES: usize = 2 << 10;

/// The report as it is kept. A report beyond the limits does not stop the cluster from publishing, but its enforcement is unknown
/// then.
pub fn read(bytes: &[u8]) -> pb::Realisation {
    let refused = |why: String| {
        let problem = Reason::Exchange(ExchangeProblem::ReportTooLarge(why));
        pb::Realisation { problems: vec![reasons::reason(&problem)], ..pb::Realisation::default() }
    };
    if bytes.len() > MAX_PLAIN_BYTES {
        return refused(format!("{} bytes, of {}", bytes.len(), MAX_PLAIN_BYTES));
    }
    // The kept parts are copies: a slice would keep the whole message.
    match bounded::decode::<pb::Realisation>(bytes) {
        Ok(mut report) => match check(&report) {
            Ok(()) => {
                cut_texts(&mut report);
                report
            }
            Err(why) => refused(why),
        },
        Err(status) => refused(status.message().to_owned()),
    }
}

/// The part of a report that the exchange uses.
pub fn state(report: &pb::Realisation) -> ReportedState {
    ReportedState {
        hub: report.hub.map(Into::into),
        received: report.received.map(Into::into),
        origins: report.origins.iter().map(|it| (it.origin.as_str().into(), read_digest(&it.digest))).collect(),
    }
}

fn check(realisation: &pb::Realisation) -> Result<(), String> {
    let of_nodes = |count: fn(&pb::NodePosition) -> usize| realisation.nodes.iter().map(count).sum::<usize>();
    let longest = |names: &mut dyn Iterator<Item = &String>| names.map(String::len).max().unwrap_or_default();
    let pods = || realisation.nodes.iter().flat_map(|node| &node.unenforced).filter_map(|it| it.pod.as_ref());
    let awaited = || realisation.policies.iter().flat_map(|policy| awaited(&policy.state));
    for (what, count, most) in [
        ("nodes", realisation.nodes.len(), MAX_NODES),
        ("errors of nodes", of_nodes(|node| node.errors.len()), MAX_ITEMS),
        ("pods that are not enforced", of_nodes(|node| node.unenforced.len()), MAX_ITEMS),
        ("policies", realisation.policies.len(), MAX_ITEMS),
        ("clusters that policies wait for", awaited().count(), MAX_ITEMS),
        ("origins", realisation.origins.len(), MAX_CLUSTERS),
        ("problems", realisation.problems.len(), MAX_ITEMS),
        ("files of nodes", of_nodes(|node| node.files.len()), MAX_ITEMS),
        ("bytes of a node's name", longest(&mut realisation.nodes.iter().map(|it| &it.node)), MAX_NAME_BYTES),
        ("bytes of a policy's name", longest(&mut realisation.policies.iter().map(|it| &it.policy)), MAX_NAME_BYTES),
        ("bytes of a cluster's name", longest(&mut awaited()), MAX_NAME_BYTES),
        ("bytes of an origin's name", longest(&mut realisation.origins.iter().map(|it| &it.origin)), MAX_NAME_BYTES),
        ("bytes of a pod's namespace", longest(&mut pods().map(|it| &it.namespace)), MAX_NAME_BYTES),
        ("bytes of a pod's name", longest(&mut pods().map(|it| &it.name)), MAX_NAME_BYTES),
    ] {
        if count > most {
            return Err(format!("{count} {what}, of {most}"));
        }
    }
    Ok(())
}

fn awaited(state: &Option<pb::policy_state::State>) -> &[String] {
    match state {
        Some(pb::policy_state::State::Waiting(waiting)) => &waiting.clusters,
        _ => &[],
    }
}

fn cut_texts(realisation: &mut pb::Realisation) {
    for node in &mut realisation.nodes {
        cut(&mut node.agent_version, MAX_NAME_BYTES);
        bound(&mut node.hooks, |it| reasons::hooks(&reasons::parse_hooks(it)));
        bound(&mut node.failure, |it| reasons::failure(&reasons::parse_failure(it)));
        for file in &mut node.files {
            *file = reasons::file(&reasons::parse_file(std::mem::take(file)));
        }
        for error in &mut node.errors {
            bound(&mut error.subject, |it| reasons::subject(&reasons::parse_subject(it)));
            error.at = error.at.take().and_then(reasons::parse_object).map(|it| reasons::object(&it));
            bound(&mut error.reason, |it| reasons::reason(&reasons::parse_reason(it)));
        }
        for pod in &mut node.unenforced {
            bound(&mut pod.finding, |it| reasons::finding(&reasons::parse_finding(it)));
        }
    }
    for policy in &mut realisation.policies {
        if let Some(pb::policy_state::State::Refused(why)) = &mut policy.state {
            cut(why, MAX_TEXT_BYTES);
        }
    }
    for problem in &mut realisation.problems {
        *problem = reasons::reason(&reasons::parse_reason(std::mem::take(problem)));
    }
}

/// Reads a value and writes it again, by which its texts are cut.
fn bound<T>(value: &mut Option<T>, again: impl FnOnce(T) -> T) {
    *value = value.take().map(again);
}

/// At most `most` bytes, with the mark that some are missing.
fn cut(text: &mut String, most: usize) {
    const MARK: &str = "…";
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most - MARK.len()));
        text.push_str(MARK);
        text.shrink_to_fit();
    }
}
