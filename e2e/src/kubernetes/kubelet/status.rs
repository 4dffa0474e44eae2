//! What a simulated node reports of its pods.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::sandbox::Sandbox;

/// What the containers of a pod do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Running,
    /// They wait for the next start, for this reason.
    Waiting(String),
    /// They ended, and will not start again.
    Ended {
        code: i32,
    },
}

/// Whether the server has the pod as ready.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|it| it.type_ == "Ready" && it.status == "True")
}

/// A strategic merge patch of the pod's status.
pub fn patch(pod: &Pod, host: &[IpAddr], sandbox: &Sandbox, state: &State, ready: bool) -> Value {
    let (started, addresses) = (sandbox.started, &sandbox.addresses);
    let restarts = (sandbox.starts - 1).max(0);
    let spec = pod.spec.as_ref();
    let containers = spec.map_or(&[][..], |spec| &spec.containers);
    let init = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    let conditions: Vec<Value> = [
        ("PodReadyToStartContainers", !matches!(state, State::Ended { .. })),
        ("Initialized", true),
        ("ContainersReady", ready),
        ("Ready", ready),
    ]
    .map(|(kind, status)| condition(pod, kind, status, state))
    .into();
    let sidecar = |container: &Container| container.restart_policy.as_deref() == Some("Always");
    let current = |container: &Container| container_status(container, state, ready, restarts, started);
    let done = |container: &Container| container_status(container, &State::Ended { code: 0 }, false, 0, started);
    let statuses: Vec<Value> = containers.iter().map(current).collect();
    let init: Vec<Value> = init.iter().map(|it| if sidecar(it) { current(it) } else { done(it) }).collect();
    json!({
        "metadata": { "uid": pod.metadata.uid },
        "status": {
            "phase": match state {
                State::Running | State::Waiting(_) => "Running",
                State::Ended { code: 0 } => "Succeeded",
                State::Ended { .. } => "Failed",
            },
            "conditions": conditions,
            "hostIP": host.first(),
            "hostIPs": ips(host),
            "podIP": addresses.first(),
            "podIPs": ips(addresses),
            "startTime": seconds(started),
            "containerStatuses": statuses,
            "initContainerStatuses": init,
        },
    })
}

fn ips(addresses: &[IpAddr]) -> Vec<Value> {
    addresses.iter().map(|address| json!({ "ip": address })).collect()
}

/// The time of the last transition stays where there was none.
fn condition(pod: &Pod, kind: &str, status: bool, state: &State) -> Value {
    let status = if status { "True" } else { "False" };
    let before = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let before = before.into_iter().flatten().find(|it| it.type_ == kind && it.status == status);
    let since = before.and_then(|it| it.last_transition_time.as_ref()).map(|time| time.0);
    let reason = match state {
        State::Ended { code: 0 } => Some("PodCompleted"),
        State::Ended { .. } => Some("PodFailed"),
        _ if status == "False" => Some("ContainersNotReady"),
        _ => None,
    };
    let since = seconds(since.unwrap_or_else(Timestamp::now));
    json!({ "type": kind, "status": status, "reason": reason, "lastTransitionTime": since })
}

fn container_status(container: &Container, state: &State, ready: bool, restarts: i32, started: Timestamp) -> Value {
    let started = seconds(started);
    let current = match state {
        State::Running => json!({ "running": { "startedAt": started } }),
        State::Waiting(message) => json!({ "waiting": { "reason": "CrashLoopBackOff", "message": message } }),
        State::Ended { code } => json!({ "terminated": {
            "exitCode": code,
            "reason": if *code == 0 { "Completed" } else { "Error" },
            "startedAt": started,
            "finishedAt": seconds(Timestamp::now()),
        } }),
    };
    let image = container.image.clone().unwrap_or_default();
    json!({
        "name": container.name,
        "image": image,
        "imageID": format!("simulated://{image}"),
        "containerID": format!("simulated://{}-{restarts}", container.name),
        "ready": ready,
        "started": *state == State::Running,
        "restartCount": restarts,
        "state": current,
    })
}

fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
