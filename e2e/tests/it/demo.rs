//! The demo on real API servers, to its end.

use std::process::{Command, Stdio};

/// How many claims the demo makes.
const CLAIMS: usize = 24;

#[test]
fn demo_on_real_api_servers_claims_only_what_packets_show() {
    let manifests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let mut demo = Command::new(crate::system::programs().join("hanse-demo"));
    demo.args(["--kubernetes", "--once", "--programs"]).arg(crate::system::programs());
    let output = demo.arg("--manifests").arg(manifests).stdin(Stdio::null()).output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    print!("{text}");
    // Steps that were left out make no claim: each of these is a measured packet, or a matrix of them.
    assert_eq!(text.matches('✔').count(), CLAIMS, "{text}");
    assert!(text.contains("All namespaces and files are removed"), "{text}");
}
