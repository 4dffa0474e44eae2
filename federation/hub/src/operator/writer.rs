//! Writes to the API server.

use anyhow::Context as _;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client};
use serde_json::{Value, json};
use tracing::warn;

use super::metrics::OperatorMetrics;
use super::objects::FINALIZER;
use super::resource::{Key, Resource};
use super::tracked::Tracked;
use crate::management::{Monitor, OBJECT, Task};
use hanse_kubernetes::{RequestError, answered};

/// The owner of the fields that the operator writes.
pub const FIELD_MANAGER: &str = "hanse-operator";
/// Requests to the API server at the same time.
pub const CONCURRENT: usize = 8;

/// A write of one object.
#[derive(Debug)]
pub enum Write {
    /// A server-side apply of the status.
    Status(Value),
    /// A server-side apply of the finalizer.
    Finalizer(Value),
    /// A merge patch that removes the finalizer.
    Release(Value),
    /// A new object.
    Create(Value),
}

/// What the API server answered.
#[derive(Debug)]
pub enum Patched {
    Made(Box<DynamicObject>),
    /// The object is gone, replaced or already there: the watch reports it.
    Gone,
    /// It may answer differently later. Other objects are not affected.
    Refused(String),
    /// It did not answer.
    Failed(anyhow::Error),
}

/// Writes custom resources, and Events about them.
#[derive(Clone)]
pub struct Writer {
    pub client: Client,
    pub recorder: Recorder,
    pub metrics: OperatorMetrics,
    pub monitor: Monitor,
}

impl Write {
    pub fn status(key: &Key, object: &Tracked, status: Value) -> Self {
        let mut applied = applied(key, object);
        applied["status"] = status;
        Self::Status(applied)
    }

    pub fn finalizer(key: &Key, object: &Tracked) -> Self {
        let mut applied = applied(key, object);
        applied["metadata"]["finalizers"] = json!([FINALIZER]);
        Self::Finalizer(applied)
    }

    /// A merge patch that removes the finalizer from this version of an object. Not a server-side apply: that removes only what no other
    /// manager owns, and a backup that was restored with the finalizer owns it too.
    pub fn release(object: &Tracked) -> Self {
        let rest: Vec<&String> = object.finalizers.iter().filter(|it| *it != FINALIZER).collect();
        let (uid, version) = (&object.uid, &object.version);
        Self::Release(json!({"metadata": {"uid": uid, "resourceVersion": version, "finalizers": rest}}))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Status(_) => "status",
            Self::Finalizer(_) => "finalizer",
            Self::Release(_) => "release",
            Self::Create(_) => "create",
        }
    }
}

impl Write {
    /// What of an object it writes.
    fn part(&self) -> &'static str {
        match self {
            Self::Status(_) => "status",
            Self::Finalizer(_) | Self::Release(_) => "finalizer",
            Self::Create(_) => OBJECT,
        }
    }
}

/// An object of a server-side apply. With its UID, it is never created by it.
fn applied(key: &Key, object: &Tracked) -> Value {
    let metadata = json!({"name": *key.name, "uid": object.uid});
    json!({"apiVersion": "hanse.dev/v1alpha1", "kind": key.resource.name(), "metadata": metadata})
}

impl Writer {
    fn api(&self, resource: Resource) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &resource.api())
    }

    /// Sends writes, and returns the answer to each.
    pub async fn send(&self, writes: Vec<(Key, Write)>) -> Vec<(Key, Patched)> {
        let send = |(key, write)| async move {
            let patched = self.write(&key, write).await;
            (key, patched)
        };
        futures::stream::iter(writes).map(send).buffer_unordered(CONCURRENT).collect().await
    }

    /// Sends one write.
    pub async fn write(&self, key: &Key, write: Write) -> Patched {
        let (api, kind) = (self.api(key.resource), write.name());
        let task = Task::Write(key.resource.name(), write.part());
        let applying = PatchParams::apply(FIELD_MANAGER).force();
        let writing = async {
            Ok(match write {
                Write::Status(status) => api.patch_status(&key.name, &applying, &Patch::Apply(status)).await,
                Write::Finalizer(fields) => api.patch(&key.name, &applying, &Patch::Apply(fields)).await,
                Write::Release(rest) => api.patch(&key.name, &PatchParams::default(), &Patch::Merge(rest)).await,
                Write::Create(object) => {
                    let parameters = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..Default::default() };
                    match serde_json::from_value(object) {
                        Ok(object) => api.create(&parameters, &object).await,
                        Err(error) => Err(kube::Error::SerdeError(error)),
                    }
                }
            })
        };
        match answered(writing).await {
            Ok(Ok(object)) => {
                self.metrics.wrote(kind);
                self.monitor.succeeded(task, &key.name);
                Patched::Made(Box::new(object))
            }
            Ok(Err(kube::Error::Api(status))) => match status.code {
                404 | 409 => {
                    self.monitor.succeeded(task, &key.name);
                    Patched::Gone
                }
                _ => {
                    self.metrics.refused("api_server");
                    let why = if status.message.is_empty() { status.reason } else { status.message };
                    self.monitor.refused(task, &key.name, &why);
                    Patched::Refused(why)
                }
            },
            Ok(Err(error)) => self.failed(task, key, RequestError::new(error).into()),
            Err(error) => self.failed(task, key, error),
        }
    }

    fn failed(&self, task: Task, key: &Key, error: anyhow::Error) -> Patched {
        let error = error.context(format!("write {key} to the API server"));
        self.monitor.failed(task, &key.name, &error);
        Patched::Failed(error)
    }

    /// Reads one object again. `None`: it does not exist. A list, since the operator has no right to `get`.
    ///
    /// # Errors
    /// When the API server does not answer, or refuses.
    pub async fn read(&self, key: &Key) -> anyhow::Result<Option<DynamicObject>> {
        let only = ListParams::default().fields(&format!("metadata.name={}", key.name));
        let listed = answered(self.api(key.resource).list(&only)).await;
        Ok(listed.with_context(|| format!("read {key} from the API server"))?.items.pop())
    }

    /// An Event about a refusal. Where it cannot be written, the condition says the same.
    pub async fn publish(&self, key: &Key, reference: ObjectReference, reason: String, message: &str) {
        // At most 1 KiB.
        let note = message.chars().take(250).collect();
        let event =
            Event { type_: EventType::Warning, reason, note: Some(note), action: "Apply".to_owned(), secondary: None };
        match answered(self.recorder.publish(&event, &reference)).await {
            Ok(()) => {
                self.metrics.wrote("event");
                self.monitor.succeeded(Task::Event, "");
            }
            Err(error) => {
                self.monitor.failed(Task::Event, "", &error);
                self.metrics.refused("api_server");
                warn!(object = %key, error = format!("{error:#}"), "event not written");
            }
        }
    }
}

/// What an Event about an object refers to.
pub fn reference(key: &Key, object: &Tracked) -> ObjectReference {
    ObjectReference {
        api_version: Some("hanse.dev/v1alpha1".to_owned()),
        kind: Some(key.resource.name().to_owned()),
        name: Some(key.name.to_string()),
        uid: Some(object.uid.clone()),
        resource_version: Some(object.version.clone()),
        ..ObjectReference::default()
    }
}
