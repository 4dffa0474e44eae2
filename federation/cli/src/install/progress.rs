//! What happens in the namespace of a release while a command waits: the readiness of its pods, and the warnings of its events.

use std::collections::{BTreeMap, BTreeSet};

use hanse_kubernetes::answered;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

use super::target::{name_of, pods_of_release};
use super::{LOOK_EVERY, Place};
use crate::output;

/// Events in a page of a list, and the pages that are read. API servers keep events for an hour.
const PAGE: u32 = 500;
const PAGES: usize = 4;
/// The different warnings that are reported: each node may have one of its own.
const WARNINGS: usize = 20;
/// The warnings that an error contains, the last ones, and the characters of each.
const IN_ERROR: usize = 3;
const CHARACTERS: usize = 400;
/// What pods of a release report until others of its pods are ready: agents wait for the certificate that the member writes. Such a
/// warning explains an error only.
const EXPECTED: [&str; 2] = ["FailedMount", "Unhealthy"];

/// What was seen while a command waited.
#[derive(Debug, Default)]
pub struct Progress {
    /// The pods of the release: `hub 1/1, agent 2/3 (ImagePullBackOff)`. Empty: there are none.
    pods: String,
    /// Warnings, the last one at the end.
    warnings: Vec<String>,
}

impl Progress {
    /// For an error: what is ready, and the last warnings.
    pub fn text(&self) -> String {
        let pods = if self.pods.is_empty() { "no pods exist" } else { &self.pods };
        let last = &self.warnings[self.warnings.len().saturating_sub(IN_ERROR)..];
        let warnings: String = last.iter().map(|it| format!("; warning of {it}")).collect();
        format!("pods that are ready: {pods}{warnings}")
    }
}

/// What [`followed`] reports meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    PodsAndWarnings,
    /// The caller reports pods itself.
    Warnings,
}

/// Runs `work`, and reports changes in the namespace of a release meanwhile.
pub async fn followed<T>(
    client: &Client,
    place: &Place,
    report: Report,
    work: impl Future<Output = T>,
) -> (T, Progress) {
    let mut warnings = Warnings::start(client, place).await;
    let mut progress = Progress::default();
    let mut work = std::pin::pin!(work);
    let result = loop {
        tokio::select! {
            result = &mut work => break result,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        // A read that fails is tried again; what Helm reports is the result.
        if let Ok(now) = pods(client, place).await
            && now != progress.pods
        {
            if report == Report::PodsAndWarnings && !now.is_empty() {
                output::note(format_args!("  ready: {now}"));
            }
            progress.pods = now;
        }
        for warning in warnings.new_ones().await.into_iter().filter(|it| !it.is_expected) {
            output::note(format_args!("  warning of {}", warning.text));
        }
    };
    warnings.new_ones().await;
    progress.warnings = warnings.texts;
    (result, progress)
}

/// What the pods of a release do, in words.
async fn pods(client: &Client, place: &Place) -> anyhow::Result<String> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &place.namespace);
    let labels = pods_of_release(place);
    let list = answered(api.list(&ListParams::default().labels(&labels))).await?;
    let mut components = BTreeMap::<String, (usize, usize, Option<String>)>::new();
    for pod in list.items.iter().filter(|it| it.metadata.deletion_timestamp.is_none()) {
        let component = pod.labels().get("app.kubernetes.io/component").cloned().unwrap_or_default();
        let (ready, all, why) = components.entry(component).or_default();
        let Some(status) = &pod.status else { continue };
        let conditions = || status.conditions.iter().flatten();
        let is_ready = conditions().any(|it| it.type_ == "Ready" && it.status == "True");
        (*ready, *all) = (*ready + usize::from(is_ready), *all + 1);
        if !is_ready && why.is_none() {
            let containers =
                status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
            let waiting = containers.filter_map(|it| it.state.as_ref()?.waiting.as_ref()?.reason.clone()).next();
            let unscheduled = conditions().find(|it| it.type_ == "PodScheduled" && it.status == "False");
            *why = waiting.or_else(|| unscheduled.and_then(|it| it.message.clone().or_else(|| it.reason.clone())));
        }
    }
    let text = |(component, (ready, all, why)): (String, (usize, usize, Option<String>))| match why {
        Some(why) => format!("{component} {ready}/{all} ({why})"),
        None => format!("{component} {ready}/{all}"),
    };
    Ok(components.into_iter().map(text).collect::<Vec<_>>().join(", "))
}

/// The warnings about objects of a release, since the start.
struct Warnings {
    api: Api<Event>,
    /// The name of the release's objects, which is a part of the names of their pods and claims.
    name: String,
    /// Events by UID, with the version that was read: a repeated event is the same object.
    seen: BTreeMap<String, String>,
    /// Reason and message without the name of the object: each node may have a pod with the same warning.
    said: BTreeSet<(String, String)>,
    texts: Vec<String>,
    /// Events cannot be read, which was reported.
    failed: bool,
}

#[derive(Debug)]
struct Warning {
    text: String,
    is_expected: bool,
}

impl Warnings {
    async fn start(client: &Client, place: &Place) -> Self {
        let mut this = Self {
            api: Api::namespaced(client.clone(), &place.namespace),
            name: name_of(place),
            seen: BTreeMap::new(),
            said: BTreeSet::new(),
            texts: Vec::new(),
            failed: false,
        };
        // Those of an earlier command explain nothing, unless they are repeated.
        if let Ok(events) = this.list().await {
            this.seen = events.iter().filter_map(version).collect();
        }
        this
    }

    async fn list(&self) -> anyhow::Result<Vec<Event>> {
        let (mut found, mut parameters) = (Vec::new(), ListParams::default().fields("type=Warning").limit(PAGE));
        for _ in 0..PAGES {
            let page = answered(self.api.list(&parameters)).await?;
            parameters.continue_token = page.metadata.continue_.filter(|it| !it.is_empty());
            found.extend(page.items);
            if parameters.continue_token.is_none() {
                break;
            }
        }
        Ok(found)
    }

    async fn new_ones(&mut self) -> Vec<Warning> {
        let events = match self.list().await {
            Ok(events) => events,
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    output::note(format_args!("  warnings of the namespace cannot be shown: {error:#}"));
                }
                return Vec::new();
            }
        };
        let mut found = Vec::new();
        for event in &events {
            let Some((uid, version)) = version(event) else { continue };
            let is_known = self.seen.insert(uid, version.clone()).is_some_and(|known| known == version);
            let name = event.involved_object.name.as_deref().unwrap_or_default();
            if is_known || !name.contains(&self.name) || self.texts.len() >= WARNINGS {
                continue;
            }
            let (reason, text) = (event.reason.as_deref().unwrap_or_default(), text(event));
            let message = event.message.as_deref().unwrap_or_default().replace(name, "");
            if self.said.insert((reason.to_owned(), message)) {
                self.texts.push(text.clone());
                found.push(Warning { text, is_expected: EXPECTED.contains(&reason) });
            }
        }
        found
    }
}

fn version(event: &Event) -> Option<(String, String)> {
    Some((event.metadata.uid.clone()?, event.metadata.resource_version.clone()?))
}

/// `StatefulSet hanse-hub: FailedCreate: exceeded quota …`, on one line.
fn text(event: &Event) -> String {
    let of = &event.involved_object;
    let [kind, name] = [&of.kind, &of.name].map(|it| it.as_deref().unwrap_or_default());
    let [reason, message] = [&event.reason, &event.message].map(|it| it.as_deref().unwrap_or_default());
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut text = format!("{kind} {name}: {reason}: {message}");
    if let Some((end, _)) = text.char_indices().nth(CHARACTERS) {
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(kind: &str, name: &str, reason: &str, message: &str) -> Event {
        let event = json!({
            "metadata": {}, "involvedObject": {"kind": kind, "name": name}, "reason": reason, "message": message,
        });
        serde_json::from_value(event).expect("an event")
    }

    #[test]
    fn warning_is_one_short_line() {
        let refused = event("StatefulSet", "hanse-hub", "FailedCreate", "create Pod\nhanse-hub-0: exceeded quota");
        assert_eq!(text(&refused), "StatefulSet hanse-hub: FailedCreate: create Pod hanse-hub-0: exceeded quota");
        let long = text(&event("Pod", "hanse-hub-0", "Failed", &"ö".repeat(10_000)));
        assert_eq!(long.chars().count(), CHARACTERS + 1);
    }

    #[test]
    fn error_has_pods_and_the_last_warnings() {
        let none = Progress::default();
        assert_eq!(none.text(), "pods that are ready: no pods exist");
        let warnings = (1..=9).map(|it| format!("Pod {it}: Failed: it")).collect();
        let text = Progress { pods: "hub 0/1".to_owned(), warnings }.text();
        assert!(text.starts_with("pods that are ready: hub 0/1; warning of Pod 7: "), "{text}");
        assert!(text.ends_with("warning of Pod 9: Failed: it"), "{text}");
    }
}
