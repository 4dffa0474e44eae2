//! Names for shell completion, from the hub.
//!
//! A shell calls `hanse` with the words of a command line. Each function returns the candidates for one argument, of which
//! the engine keeps those with the prefix that was typed. Without a context, or where no hub answers in time, there are no
//! candidates and no message: a prompt is not the place for an error.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use clap_complete::engine::{ArgValueCandidates, ArgValueCompleter, CompletionCandidate};
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::administration_client::AdministrationClient;

use crate::online::kind::{KINDS, kind_of, name_of};
use crate::online::{Client, MAX_ANSWER_BYTES, call, connect_once};

/// How long a prompt may wait for a hub.
const TIME_LIMIT: Duration = Duration::from_secs(1);
/// How many pages of nodes are read.
const MAX_NODE_PAGES: usize = 4;

pub fn clusters() -> ArgValueCandidates {
    ArgValueCandidates::new(|| candidates(async |mut client| cluster_names(&mut client).await))
}

pub fn users() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        candidates(async |mut client| {
            let users = call(client.list_users(pb::ListUsersRequest {})).await?.users;
            Ok(users.into_iter().filter(|it| !it.revoked).map(|it| it.name).collect())
        })
    })
}

pub fn tokens() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        candidates(async |mut client| {
            let tokens = call(client.list_tokens(pb::ListTokensRequest {})).await?.tokens;
            Ok(tokens.into_iter().map(|it| it.id).collect())
        })
    })
}

/// Roles as `hanse user create --role` takes them, with the names of tiers and clusters.
pub fn roles() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let mut roles: Vec<CompletionCandidate> =
            ["viewer", "administrator", "author=*", "approver=*", "operator=*"].map(CompletionCandidate::new).into();
        roles.extend(candidates(async |mut client| {
            let tiers = object_names(&mut client, pb::ObjectKind::Tier).await?;
            let clusters = cluster_names(&mut client).await?;
            let authors = tiers.into_iter().flat_map(|tier| [format!("author={tier}"), format!("approver={tier}")]);
            Ok(authors.chain(clusters.into_iter().map(|it| format!("operator={it}"))).collect())
        }));
        roles
    })
}

/// Kinds of objects, by their short names.
pub fn kinds() -> ArgValueCandidates {
    ArgValueCandidates::new(|| KINDS.iter().map(|(_, short, _)| CompletionCandidate::new(*short)).collect())
}

/// What `hanse describe` describes: a kind, or KIND/NAME.
pub fn described_kinds() -> ArgValueCompleter {
    ArgValueCompleter::new(|word: &OsStr| {
        if let Some(names) = names_after_kind(word) {
            return names;
        }
        let kinds = KINDS.iter().map(|(_, short, _)| *short).chain(["cluster", "node"]);
        with_prefix(kinds.map(CompletionCandidate::new).collect(), word)
    })
}

/// The names of a kind, where the word begins with `KIND/`, as it is written.
fn names_after_kind(word: &OsStr) -> Option<Vec<CompletionCandidate>> {
    let (written, _) = word.to_str()?.split_once('/')?;
    let kind = kind_of(written).ok()?;
    let names = candidates(async |mut client| {
        let names = object_names(&mut client, kind).await?;
        Ok(names.into_iter().map(|name| format!("{written}/{name}")).collect())
    });
    Some(with_prefix(names, word))
}

fn with_prefix(mut candidates: Vec<CompletionCandidate>, word: &OsStr) -> Vec<CompletionCandidate> {
    let word = word.as_encoded_bytes();
    candidates.retain(|it| it.get_value().as_encoded_bytes().starts_with(word));
    candidates
}

/// Names of the kind that the command line has before.
pub fn names() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let words: Vec<String> = words().into_iter().filter_map(|word| word.into_string().ok()).collect();
        // After the program and the subcommand.
        for word in words.iter().skip(2) {
            if let Ok(kind) = kind_of(word) {
                return candidates(async |mut client| object_names(&mut client, kind).await);
            }
            match word.as_str() {
                "cluster" => return candidates(async |mut client| cluster_names(&mut client).await),
                "node" => return candidates(async |mut client| node_names(&mut client).await),
                _ => {}
            }
        }
        Vec::new()
    })
}

/// What `hanse wait` waits for: policies by name, other objects as KIND/NAME.
pub fn targets() -> ArgValueCompleter {
    ArgValueCompleter::new(|word: &OsStr| {
        if let Some(names) = names_after_kind(word) {
            return names;
        }
        let all = candidates(async |mut client| {
            let objects = call(client.get(pb::GetRequest::default())).await?.objects;
            let target = |it: pb::Object| match it.kind() {
                pb::ObjectKind::FederatedNetworkPolicy => it.name,
                kind => format!("{}/{}", name_of(kind.into()), it.name),
            };
            Ok(objects.into_iter().map(target).collect())
        });
        with_prefix(all, word)
    })
}

async fn cluster_names(client: &mut Client) -> anyhow::Result<Vec<String>> {
    let listed = call(client.list_clusters(pb::ListClustersRequest::default())).await?;
    Ok(listed.clusters.into_iter().map(|it| it.name).collect())
}

async fn object_names(client: &mut Client, kind: pb::ObjectKind) -> anyhow::Result<Vec<String>> {
    let request = pb::GetRequest { kind: kind.into(), name: String::new() };
    Ok(call(client.get(request)).await?.objects.into_iter().map(|it| it.name).collect())
}

async fn node_names(client: &mut Client) -> anyhow::Result<Vec<String>> {
    let (mut request, mut names) = (pb::ListNodesRequest::default(), Vec::new());
    for _ in 0..MAX_NODE_PAGES {
        let page = call(client.list_nodes(request.clone())).await?;
        let ids = page.nodes.into_iter().filter_map(|it| it.id);
        let before = names.len();
        names.extend(ids.map(|it| {
            let name = format!("{}/{}", it.cluster, it.node);
            request.after = Some(it);
            name
        }));
        if !page.more || names.len() == before {
            break;
        }
    }
    Ok(names)
}

fn candidates(read: impl AsyncFnOnce(Client) -> anyhow::Result<Vec<String>>) -> Vec<CompletionCandidate> {
    let Some(context) = context() else { return Vec::new() };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    let names = runtime.block_on(async {
        let names = async {
            let client = AdministrationClient::new(connect_once(&context).await?);
            read(client.max_decoding_message_size(MAX_ANSWER_BYTES)).await
        };
        tokio::time::timeout(TIME_LIMIT, names).await
    });
    // Resolving a name may take longer, in a thread.
    runtime.shutdown_background();
    let names = names.ok().and_then(Result::ok).unwrap_or_default();
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// The words to complete: the shell passes them after `--`.
fn words() -> Vec<OsString> {
    std::env::args_os().skip_while(|word| word != "--").skip(1).collect()
}

/// The context file of the command line to complete, or of the environment.
fn context() -> Option<PathBuf> {
    let words = words();
    let separate = words.windows(2).find(|pair| pair[0] == "--context").map(|pair| pair[1].clone());
    let joined = || words.iter().find_map(|word| word.to_str()?.strip_prefix("--context=").map(OsString::from));
    let context = separate.or_else(joined).or_else(|| std::env::var_os("HANSE_CONTEXT"))?;
    Some(PathBuf::from(context)).filter(|path| !path.as_os_str().is_empty())
}
