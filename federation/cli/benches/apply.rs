//! What it costs to apply many policies: the command, over TLS, to a hub that keeps its store in a file.
//!
//! `apply [SHAPE…] [-o json]`. The budget of `many` is 3 s for `apply`. Wall time is the best of the runs, as the machine
//! may be busy; each run has a hub and a folder of its own.
//!
//! - `many`: 3,000 policies of one tier in one file: a dry run, applied, applied again, read, and deleted.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hanse_hub::server::{Hub, Options, default_store, init};
use hanse_identity::TrustDomain;
use hanse_runtime::shutdown::Shutdown;

const SHAPES: &[&str] = &["many"];
const RUNS: usize = 3;
const POLICIES: usize = 3_000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    let json = arguments.windows(2).any(|pair| pair == ["-o", "json"]);
    let named: Vec<&str> = SHAPES.iter().copied().filter(|shape| arguments.iter().any(|it| it == shape)).collect();
    for shape in if named.is_empty() { SHAPES.to_vec() } else { named } {
        let runs: Vec<Vec<(&str, f64)>> = (0..RUNS).map(|_| many()).collect();
        for (at, (metric, _)) in runs[0].iter().enumerate() {
            let value = runs.iter().map(|run| run[at].1).fold(f64::INFINITY, f64::min);
            if json {
                println!(r#"{{"bench":"apply","shape":"{shape}","metric":"{metric}","value":{value},"unit":"ms"}}"#);
            } else {
                println!("{shape:<13} {metric:<34} {value:>14.3} ms");
            }
        }
    }
}

fn many() -> Vec<(&'static str, f64)> {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, file) = (folder.path().join("hub"), folder.path().join("policies.yaml"));
    std::fs::write(&file, manifests()).expect("room");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("tokio");
    hanse_identity::tls::install_provider();
    let shutdown = Shutdown::default();
    let any = "127.0.0.1:0".parse().expect("an address");
    let domain = TrustDomain::new("hanse.test").expect("a domain");
    runtime.block_on(init(&data, &default_store(&data), &domain, any)).expect("a ClusterSet");
    // The store's last owner needs a moment to close the file.
    let deadline = Instant::now() + Duration::from_secs(20);
    let hub = loop {
        match runtime.block_on(Hub::start(Options::new(data.clone(), any, any), &shutdown)) {
            Ok(hub) => break hub,
            Err(error) if Instant::now() > deadline => panic!("{error:#}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let context = data.join("admin.context");
    let text = std::fs::read_to_string(&context).expect("the context");
    std::fs::write(&context, text.replace("127.0.0.1:0", &hub.address.to_string())).expect("the context");
    let file = file.to_string_lossy();
    let figures = vec![
        ("dry-run", hanse(&context, &["apply", "--dry-run", "-f", &file], "(dry run)")),
        ("apply", hanse(&context, &["apply", "-f", &file], "3001 applied: 3001 created")),
        ("apply-again", hanse(&context, &["apply", "-f", &file], "3001 applied: 3001 unchanged")),
        ("get", hanse(&context, &["get", "-f", &file, "-o", "json"], "policy-2999")),
        ("delete", hanse(&context, &["delete", "-f", &file], "3001 deleted")),
    ];
    runtime.block_on(shutdown.drain(Hub::DRAIN));
    figures
}

fn manifests() -> String {
    let mut text = String::from(
        "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {name: platform}\nspec: {order: 1, defaultAction: Pass}\n",
    );
    for number in 0..POLICIES {
        write!(
            text,
            "---\napiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {{name: policy-{number}}}\n\
             spec:\n  tier: platform\n  order: {number}\n  clusterSelector: env == 'prod'\n  selector: app == 'app-{}'\n  \
             types: [Ingress]\n  ingress:\n  - action: Allow\n    protocol: TCP\n    source: {{selector: \"role == 'r-{}'\"}}\n    \
             destination: {{ports: [8000]}}\n",
            number % 250,
            number % 40,
        )
        .expect("text");
    }
    text
}

/// Runs `hanse`, which must succeed and say `expected`. In milliseconds.
fn hanse(context: &Path, arguments: &[&str], expected: &str) -> f64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.env("HANSE_CONTEXT", context).args(arguments).stdin(Stdio::null());
    let start = Instant::now();
    let output = command.output().expect("hanse starts");
    let took = start.elapsed().as_secs_f64() * 1e3;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains(expected),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    took
}
