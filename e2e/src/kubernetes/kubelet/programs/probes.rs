//! Readiness, liveness and startup probes of one container.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::super::workload::Start;
use crate::namespace::Namespace;
use crate::probe;

/// How often the probes' times are looked at.
const TICK: Duration = Duration::from_millis(50);

/// Runs until it is dropped.
pub struct Probes {
    states: Arc<States>,
    thread: Option<JoinHandle<()>>,
}

struct States {
    stop: AtomicBool,
    ready: AtomicBool,
    live: AtomicBool,
}

struct Probe {
    target: SocketAddr,
    /// None for a probe that only connects.
    path: Option<String>,
    delay: Duration,
    period: Duration,
    /// How many results in a row count.
    successes: u64,
    failures: u64,
}

/// One probe's results.
struct Progress {
    probe: Probe,
    next: Instant,
    successes: u64,
    failures: u64,
}

impl Probes {
    /// # Errors
    /// When a probe is of a sort that is not simulated.
    pub fn start(start: &Start<'_>, container: &Value) -> anyhow::Result<Self> {
        let read = |key: &str| match &container[key] {
            Value::Null => Ok(None),
            probe => Probe::read(start, container, probe)
                .map(Some)
                .with_context(|| format!("{key} of {}", container["name"])),
        };
        let probes = [read("startupProbe")?, read("livenessProbe")?, read("readinessProbe")?];
        let [startup, _, readiness] = &probes;
        let ready = startup.is_none() && readiness.is_none();
        let states = Arc::new(States {
            stop: AtomicBool::new(false),
            ready: AtomicBool::new(ready),
            live: AtomicBool::new(true),
        });
        let (shared, network) = (Arc::clone(&states), Arc::clone(start.node_network));
        let needed = probes.iter().any(Option::is_some);
        let thread = needed.then(|| std::thread::spawn(move || run(&network, probes, &shared)));
        Ok(Self { states, thread })
    }

    pub fn is_ready(&self) -> bool {
        self.states.ready.load(Ordering::Relaxed)
    }

    pub fn is_live(&self) -> bool {
        self.states.live.load(Ordering::Relaxed)
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.states.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic has shown itself already.
            drop(thread.join());
        }
    }
}

impl Probe {
    fn read(start: &Start<'_>, container: &Value, probe: &Value) -> anyhow::Result<Self> {
        let (http, tcp) = (&probe["httpGet"], &probe["tcpSocket"]);
        let action = if http.is_null() { tcp } else { http };
        if action.is_null() {
            bail!("only httpGet and tcpSocket are simulated: {probe}");
        }
        if http["scheme"].as_str().is_some_and(|scheme| scheme != "HTTP") {
            bail!("only the scheme HTTP is simulated: {probe}");
        }
        let named = |name: &str| {
            let ports = container["ports"].as_array().into_iter().flatten();
            ports.clone().find(|port| port["name"] == name).and_then(|port| port["containerPort"].as_u64())
        };
        let port = action["port"].as_u64().or_else(|| named(action["port"].as_str()?));
        let port =
            port.and_then(|port| u16::try_from(port).ok()).with_context(|| format!("no port {}", action["port"]))?;
        let host: Option<IpAddr> = action["host"].as_str().and_then(|host| host.parse().ok());
        let host = host.or_else(|| start.addresses.first().copied()).context("the pod has no address")?;
        let number = |key: &str, default: u64| probe[key].as_u64().unwrap_or(default);
        Ok(Self {
            target: SocketAddr::new(host, port),
            path: (!http.is_null()).then(|| http["path"].as_str().unwrap_or("/").to_owned()),
            delay: Duration::from_secs(number("initialDelaySeconds", 0)),
            period: Duration::from_secs(number("periodSeconds", 10).max(1)),
            successes: number("successThreshold", 1),
            failures: number("failureThreshold", 3),
        })
    }

    fn succeeds(&self, network: &Namespace) -> bool {
        match &self.path {
            Some(path) => probe::http_ok(network, self.target, path),
            None => network.enter(|| TcpStream::connect_timeout(&self.target, probe::PATIENCE).is_ok()),
        }
    }
}

impl Progress {
    fn new(probe: Probe) -> Self {
        let next = Instant::now() + probe.delay;
        Self { probe, next, successes: 0, failures: 0 }
    }

    /// The verdict after a probe that was due, once enough of its results in a row are the same.
    fn step(&mut self, network: &Namespace) -> Option<bool> {
        if Instant::now() < self.next {
            return None;
        }
        if self.probe.succeeds(network) {
            (self.successes, self.failures) = (self.successes + 1, 0);
        } else {
            (self.successes, self.failures) = (0, self.failures + 1);
        }
        self.next = Instant::now() + self.probe.period;
        match (self.successes >= self.probe.successes, self.failures >= self.probe.failures) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }
}

fn run(network: &Namespace, probes: [Option<Probe>; 3], states: &States) {
    let [mut startup, mut liveness, mut readiness] = probes.map(|probe| probe.map(Progress::new));
    while !states.stop.load(Ordering::Relaxed) {
        std::thread::park_timeout(TICK);
        if let Some(progress) = &mut startup {
            match progress.step(network) {
                Some(true) => {
                    startup = None;
                    if readiness.is_none() {
                        states.ready.store(true, Ordering::Relaxed);
                    }
                }
                Some(false) => states.live.store(false, Ordering::Relaxed),
                None => {}
            }
            continue;
        }
        if let Some(false) = liveness.as_mut().and_then(|it| it.step(network)) {
            states.live.store(false, Ordering::Relaxed);
        }
        if let Some(ready) = readiness.as_mut().and_then(|it| it.step(network)) {
            states.ready.store(ready, Ordering::Relaxed);
        }
    }
}
