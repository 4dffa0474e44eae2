//! Manifests: a file of any bytes has places for all that is wrong with it, means the same as its own JSON, and what is
//! read of it can be assembled and judged, alike by both forms of the evaluator.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hanse_api::document;
use hanse_api::{Manifests, assemble_cluster, assemble_federation, read_bytes};
use hanse_policy::explain::{Explainer, Question};
use hanse_policy::inventory::Inventory;
use hanse_policy::model::PolicySet;

use super::{Outcome, Target};

pub struct Files;

impl Target for Files {
    const NAME: &'static str = "manifests";
    const RUNS: u64 = 6_000;
    const WORDS: &'static [&'static str] = &[
        "---\n",
        "...\n",
        "apiVersion: ",
        "kind: ",
        "metadata: {name: a}\n",
        "spec: ",
        "status: ",
        "items:\n",
        "List",
        "- ",
        "  ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "\"",
        "'",
        "&a ",
        "*a",
        "<<: *a\n",
        "!!str ",
        "|\n",
        ">-\n",
        "# ",
        "%YAML 1.2\n",
        "? ",
        "null",
        "~",
        "true",
        "yes",
        "on",
        "1_000",
        "0b1010",
        "!!int ",
        "!!binary ",
        "--- x\n",
        "---x\n",
        "generateName: a-",
        "\\\n",
        "\u{2028}",
        "0x10",
        "0o7",
        "007",
        "1e3",
        ".inf",
        "-1",
        "65535",
        "65536",
        "\t",
        "\r\n",
        "\u{feff}",
        "\u{85}",
        "podSelector",
        "namespaceSelector",
        "matchLabels",
        "matchExpressions",
        "ipBlock",
        "cidr",
        "except",
        "10.0.0.0/8",
        "::ffff:10.0.0.0/104",
        "fd00::/8",
        "ports",
        "endPort",
        "policyTypes",
        "Ingress",
        "Egress",
        "action: Pass",
        "networks",
        "nodes",
        "domainNames",
        "protocols",
        "destinationNamedPort",
        "notSelector",
        "serviceAccounts",
        "order",
    ];

    fn seeds() -> Vec<Vec<u8>> {
        let mut files = Vec::new();
        for folder in ["demo", "tests/it/fuzz/seeds"] {
            collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut files);
        }
        files.sort();
        files.iter().map(|path| std::fs::read(path).expect("it is part of the repository")).collect()
    }

    fn run(input: &[u8]) -> Outcome {
        let read = read(input);
        // YAML ends lines at either.
        let ends = input.iter().filter(|byte| matches!(byte, b'\n' | b'\r')).count();
        let lines = u32::try_from(ends + 1).expect("a short input");
        let places = read.diagnostics.iter().flat_map(|it| [it.location.line, it.start]);
        for line in places.chain(read.objects.iter().map(|it| it.location.line)) {
            assert!((1..=lines + 1).contains(&line), "line {line} of {lines}");
        }
        means_what_its_json_means(input, &read);
        judge(&read);
        let mut how: Vec<String> = read.objects.iter().map(|it| it.reference.kind.to_string()).collect();
        how.extend(read.diagnostics.iter().map(|it| format!("{}: {}", it.field, it.message)));
        how.sort();
        how.dedup();
        Outcome { accepted: read.diagnostics.is_empty() && !read.objects.is_empty(), how: how.join("\n") }
    }
}

fn read(input: &[u8]) -> Manifests {
    let mut read = Manifests::default();
    read_bytes(&Arc::from("file"), input, &mut read);
    read
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in folder.read_dir().expect("it is part of the repository") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => collect(&path, files),
            false => files.push(path),
        }
    }
}

/// The documents that can be read, written as JSON, are read as the same objects with the same complaints.
fn means_what_its_json_means(input: &[u8], read_first: &Manifests) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let documents: Vec<_> = document::documents(text).collect();
    let unreadable = documents.iter().filter(|document| document.is_err()).count();
    let read: Vec<_> = documents.into_iter().flatten().collect();
    // JSON has no key twice, and nothing that was left out.
    if read.iter().any(|document| !document.faults.is_empty()) {
        return;
    }
    let json: Vec<String> = read.iter().map(|document| document.root().to_value().to_string()).collect();
    // Beside a document that is none, `kubectl`'s JSON values in a row would be one text.
    let mut again = Manifests::default();
    for json in &json {
        read_bytes(&Arc::from("file"), json.as_bytes(), &mut again);
    }
    let objects = |read: &Manifests| read.objects.iter().map(|it| it.reference.clone()).collect::<Vec<_>>();
    assert_eq!(objects(read_first), objects(&again));
    let skipped = |read: &Manifests| read.skipped.iter().map(|it| it.object.clone()).collect::<Vec<_>>();
    assert_eq!(skipped(read_first), skipped(&again));
    assert_eq!(read_first.diagnostics.len(), again.diagnostics.len() + unreadable);
}

fn judge(read: &Manifests) {
    let state = assemble_cluster(&"c".into(), read.objects.clone());
    let federation = assemble_federation(&read.objects, ["c".into()]);
    let addresses: Vec<_> = state.cluster.endpoints.values().flat_map(|it| &it.addresses).copied().collect();
    let policies = PolicySet { federation: federation.layer, clusters: BTreeMap::from([("c".into(), state.layer)]) };
    let inventory =
        Inventory { clusters: BTreeMap::from([("c".into(), state.cluster)]), federated_sets: federation.sets };
    let Some(((from, to), protocol)) = addresses.first().zip(addresses.last()).zip([6, 17, 1].get(addresses.len() % 3))
    else {
        return;
    };
    let question = serde_json::json!({
        "from": {"ip": from}, "to": {"ip": to}, "protocol": protocol, "port": 80, "icmp": {"type": 8},
    });
    let question: Question = serde_json::from_value(question).expect("a question");
    let prepared = Explainer::new(&policies, &inventory);
    // Ends of two families do not make a packet.
    let Ok(answer) = prepared.explain(&question) else { return };
    let reference = Explainer::new(&policies, &inventory).by_reference(true);
    let said = reference.explain(&question).expect("it is a packet");
    assert_eq!((answer.enforced, answer.pending), (said.enforced, said.pending));
}
