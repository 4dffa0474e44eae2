//! The page of metrics (`agent/runtime/METRICS.md`), compared with what the programs register.

use std::collections::BTreeMap;
use std::path::Path;

use hanse_runtime::metrics::Metrics;

/// Type and meaning.
type Described = (String, String);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root")
}

/// The metrics of the page, by section and name.
fn documented() -> BTreeMap<String, BTreeMap<String, Described>> {
    let text = std::fs::read_to_string(root().join("agent/runtime/METRICS.md")).expect("the page");
    let (mut section, mut found) = (String::new(), BTreeMap::<_, BTreeMap<_, _>>::new());
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title.to_owned();
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if let ["", name, kind, _, meaning, ""] = cells[..]
            && let Some(name) = name.strip_prefix("`hanse_")
        {
            let name = format!("hanse_{}", name.trim_end_matches('`'));
            let described = (kind.to_owned(), meaning.to_owned());
            let first = found.entry(section.clone()).or_default().insert(name.clone(), described);
            assert!(first.is_none(), "{name} is there twice");
        }
    }
    found
}

/// The metrics of a registry, from its text form.
fn registered(metrics: &Metrics) -> BTreeMap<String, Described> {
    let text = metrics.encode();
    let of = |line: &str, comment: &str| {
        let (name, value) = line.strip_prefix(comment)?.split_once(' ')?;
        Some((name.to_owned(), value.to_owned()))
    };
    let kinds: BTreeMap<String, String> = text.lines().filter_map(|line| of(line, "# TYPE ")).collect();
    let help = text.lines().filter_map(|line| of(line, "# HELP "));
    help.map(|(name, help)| {
        let kind = kinds[&name].clone();
        let suffix = if kind == "counter" { "_total" } else { "" };
        (format!("{name}{suffix}"), (kind, help.trim_end_matches('.').to_owned()))
    })
    .collect()
}

#[test]
fn the_page_lists_every_metric_with_its_type_and_meaning() {
    let (mut documented, common) = (documented(), registered(&Metrics::default()));
    assert_eq!(documented.remove("Every process").expect("the section"), common);
    type Register = fn(&Metrics);
    let programs: [(&str, Register); 3] = [
        ("hanse-hub", |metrics| drop(hanse_hub::metrics::HubMetrics::new(metrics))),
        ("hanse-member", |metrics| {
            drop(hanse_member::metrics::Metrics::new(metrics));
            drop(hanse_member::metrics::FlowMetrics::new(metrics));
        }),
        ("hanse-agent", |metrics| drop(hanse_agent::metrics::AgentMetrics::new(metrics))),
    ];
    for (program, register) in programs {
        let metrics = Metrics::default();
        register(&metrics);
        let mut own = registered(&metrics);
        own.retain(|name, _| !common.contains_key(name));
        assert_eq!(documented.remove(program).unwrap_or_default(), own, "the section of {program}");
    }
    assert!(documented.is_empty(), "sections of no program: {documented:?}");
}

#[test]
fn metrics_are_registered_in_the_modules_that_the_page_is_compared_with() {
    let modules = [
        "agent/node/src/metrics.rs",
        "agent/runtime/src/supervisor.rs",
        "federation/hub/src/metrics.rs",
        "federation/hub/src/operator/metrics.rs",
        "federation/member/src/metrics.rs",
    ];
    let (mut folders, mut found) = (vec![root().join("agent"), root().join("federation")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file");
                let registers = text.contains(".register(") && text.contains("prometheus_client");
                if registers {
                    found.push(path.strip_prefix(root()).expect("below the root").display().to_string());
                }
            }
        }
    }
    found.sort();
    assert_eq!(found, modules);
}
