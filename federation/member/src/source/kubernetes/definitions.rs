//! The CustomResourceDefinitions of the collections.
//!
//! With its definition, all objects of a kind are deleted. That is not the decision to delete a policy: it happens when an operator
//! of another system is uninstalled, or a chart with its definitions. Objects that disappear with their definition stay in force.

use std::collections::BTreeMap;

use futures::StreamExt as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::WatchParams;
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::watch;

use super::collection::{COLLECTIONS, DEFINITIONS, Raw};
use super::follow::{Follower, PAGE, Step};
use super::report::{Definition, Reports, State};
use hanse_kubernetes::{ANSWER_WITHIN, answered, message};

/// All definitions, by the name of the collection; `None` before they were listed.
pub type Definitions = Option<BTreeMap<String, Definition>>;

type Partial = PartialObjectMeta<CustomResourceDefinition>;

fn definition(of: &Partial) -> Definition {
    match (&of.metadata.deletion_timestamp, &of.metadata.uid) {
        (None, Some(uid)) => Definition::Present { uid: uid.clone() },
        _ => Definition::Terminating,
    }
}

/// Reads the definition of a collection. The answer is not older than any event that was received before.
///
/// # Errors
/// When the API server does not answer, or refuses.
pub async fn look_up(client: &Client, name: &str) -> Result<Definition, String> {
    let api: Api<Partial> = Api::all(client.clone());
    let found = answered(api.get_opt(name)).await.map_err(|error| format!("{error:#}"))?;
    Ok(found.as_ref().map_or(Definition::Absent, definition))
}

/// Why the API server refuses a watch of definitions, if it does. The client cannot read the refusal of a watch of metadata, which has
/// several lines.
async fn refusal(client: &Client) -> Option<String> {
    let api: Api<Raw> = Api::all_with(client.clone(), &DEFINITIONS);
    let parameters = WatchParams { timeout: Some(1), ..WatchParams::default() };
    let mut events = match tokio::time::timeout(ANSWER_WITHIN, api.watch(&parameters, "0")).await.ok()? {
        Ok(events) => events.boxed(),
        Err(error) => return Some(message(error)),
    };
    match tokio::time::timeout(ANSWER_WITHIN, events.next()).await.ok()?? {
        Err(error @ kube::Error::Api(_)) => Some(message(error)),
        Ok(_) | Err(_) => None,
    }
}

/// Follows the definitions of the collections.
pub async fn follow(client: Client, known: watch::Sender<Definitions>, reports: Reports) {
    let is_read = |name: &str| COLLECTIONS.iter().any(|it| it.is_custom && it.name() == name);
    let mut follower = Follower::<Partial>::new(Api::all(client.clone()), PAGE);
    let mut listing = BTreeMap::new();
    loop {
        let state = match follower.next().await {
            Step::Begin => {
                listing.clear();
                continue;
            }
            Step::Listed(page) => {
                let page = page.iter().map(|it| (it.name_any(), definition(it)));
                listing.extend(page.filter(|(name, _)| is_read(name)));
                continue;
            }
            Step::End => {
                known.send_replace(Some(std::mem::take(&mut listing)));
                State::Listed
            }
            Step::Changed(it) if is_read(&it.name_any()) => {
                let now = definition(&it);
                known.send_if_modified(|known| {
                    known.as_mut().is_some_and(|known| known.insert(it.name_any(), now.clone()).as_ref() != Some(&now))
                });
                State::Alive
            }
            Step::Deleted(it) => {
                known.send_if_modified(|known| {
                    known.as_mut().is_some_and(|known| known.remove(&it.name_any()).is_some())
                });
                State::Alive
            }
            Step::Changed(_) | Step::Alive => State::Alive,
            Step::Failed(failure) if failure.is_unreadable => {
                State::Failing(refusal(&client).await.unwrap_or(failure.message))
            }
            Step::Failed(failure) => State::Failing(failure.message),
        };
        if reports.state(DEFINITIONS, state).await.is_err() {
            return;
        }
    }
}
