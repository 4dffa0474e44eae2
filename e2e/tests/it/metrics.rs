//! The page of metrics (`agent/runtime/METRICS.md`), compared with what the programs register.

pub(crate) mod reviews;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use hanse_runtime::metrics::Metrics;
use serde_json::Value;

use crate::chart;

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
    for (program, register) in PROGRAMS {
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

type Register = fn(&Metrics);

/// What registers the metrics of each program.
const PROGRAMS: [(&str, Register); 3] = [
    ("hanse-hub", |metrics| drop(hanse_hub::metrics::HubMetrics::new(metrics))),
    ("hanse-member", |metrics| {
        drop(hanse_member::metrics::Metrics::new(metrics));
        drop(hanse_member::metrics::FlowMetrics::new(metrics));
    }),
    ("hanse-agent", |metrics| drop(hanse_agent::metrics::AgentMetrics::new(metrics))),
];

/// The series that the programs export from their start, by name: the pairs of label and value.
fn exported() -> BTreeMap<String, BTreeSet<(String, String)>> {
    let mut series = BTreeMap::<String, BTreeSet<(String, String)>>::new();
    for (_, register) in PROGRAMS {
        let metrics = Metrics::default();
        register(&metrics);
        for line in metrics.encode().lines().filter(|line| !line.starts_with('#')) {
            let (name, rest) = line.split_once(['{', ' ']).expect("a series");
            let labels = rest.rsplit_once('}').map_or("", |(labels, _)| labels);
            let pairs = labels.split(',').filter_map(|pair| pair.split_once('='));
            let pairs = pairs.map(|(label, value)| (label.to_owned(), value.trim_matches('"').to_owned()));
            series.entry(name.to_owned()).or_default().extend(pairs);
        }
    }
    series
}

/// Labels that Prometheus adds to a target.
const OF_TARGETS: [&str; 4] = ["instance", "job", "namespace", "pod"];
/// The functions and words that expressions use.
const WORDS: [&str; 12] =
    ["sum", "min", "max", "count", "rate", "increase", "histogram_quantile", "vector", "absent", "by", "or", "s"];

/// Checks the names of metrics and labels in an expression, and the labels in its legend.
fn check(expression: &str, legend: &str, series: &BTreeMap<String, BTreeSet<(String, String)>>) -> Result<(), String> {
    let (mut at, mut labels, mut grouped) = (expression, BTreeSet::new(), BTreeSet::new());
    let mut names = 0;
    let is_name = |it: char| it.is_ascii_alphanumeric() || it == '_';
    while let Some(first) = at.chars().next() {
        if first == '[' {
            // A range.
            at = at.split_once(']').ok_or("a range does not end")?.1;
            continue;
        }
        if !first.is_ascii_alphabetic() {
            at = &at[first.len_utf8()..];
            continue;
        }
        let end = at.find(|it| !is_name(it)).unwrap_or(at.len());
        let (word, rest) = at.split_at(end);
        at = rest;
        if !word.starts_with("hanse_") {
            if !WORDS.contains(&word) {
                return Err(format!("{word} is not known"));
            }
            if word == "by" {
                let list =
                    at.trim_start().strip_prefix('(').and_then(|it| it.split_once(')')).ok_or("by without a list")?;
                grouped.extend(list.0.split(',').map(|it| it.trim().to_owned()));
                at = list.1;
            }
            continue;
        }
        let of_metric = series.get(word).ok_or_else(|| format!("no program exports {word}"))?;
        names += 1;
        labels.extend(of_metric.iter().map(|(label, _)| label.clone()));
        let Some(selector) = at.strip_prefix('{') else { continue };
        let (selector, rest) = selector.split_once('}').ok_or("a selector does not end")?;
        at = rest;
        for matcher in selector.split(',') {
            let (label, value) = matcher.split_once('=').ok_or_else(|| format!("{matcher} is not a matcher"))?;
            let pair = (label.trim().to_owned(), value.trim_matches('"').to_owned());
            if !of_metric.contains(&pair) {
                return Err(format!("{word} has no series with {matcher}"));
            }
        }
    }
    if names == 0 {
        return Err("it contains no metric".to_owned());
    }
    labels.extend(OF_TARGETS.map(str::to_owned));
    let in_legend = legend.split("{{").skip(1).filter_map(|it| it.split_once("}}")).map(|(label, _)| label.to_owned());
    let in_legend: BTreeSet<String> = in_legend.collect();
    match grouped.difference(&labels).chain(in_legend.difference(&grouped)).next() {
        Some(label) => Err(format!("no metric in it has the label {label}, or it is not grouped by it")),
        None => Ok(()),
    }
}

#[test]
fn expressions_with_other_names_are_found() {
    let series = exported();
    for (expression, legend) in [
        ("hanse_hub_clusters", ""),
        ("max(hanse_hub_clusters{state=\"never heard\"}) > 0", ""),
        (
            "sum by (state, pod) (rate(hanse_hub_joins_total[5m])) or sum by (state) (hanse_hub_clusters)",
            "{{pod}} {{state}}",
        ),
        ("histogram_quantile(0.99, sum by (le) (rate(hanse_agent_apply_seconds_bucket[$__rate_interval])))", ""),
    ] {
        assert_eq!(check(expression, legend, &series), Ok(()), "{expression}");
    }
    for (expression, legend) in [
        ("hanse_hub_cluster", ""),
        ("hanse_hub_joins", ""),
        ("hanse_hub_clusters{status=\"live\"}", ""),
        ("hanse_hub_clusters{state=\"dead\"}", ""),
        ("sum by (cluster) (hanse_hub_clusters)", ""),
        ("sum by (state) (hanse_hub_clusters)", "{{outcome}}"),
        ("histogram_quantile(0.99, sum by (le) (hanse_hub_clusters))", ""),
        ("sum(other_metric)", ""),
        ("vector(0)", ""),
    ] {
        assert!(check(expression, legend, &series).is_err(), "{expression}");
    }
}

#[test]
fn dashboard_and_alerts_use_metrics_that_exist() {
    let series = exported();
    let path = root().join("deploy/chart/files/dashboards/hanse.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("it is read")).expect("JSON");
    let list = |value: &Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let mut expressions = Vec::new();
    let (mut ids, mut places) = (BTreeSet::new(), BTreeSet::new());
    for panel in list(&dashboard, "panels") {
        let title = panel["title"].as_str().expect("a title").to_owned();
        assert!(ids.insert(panel["id"].to_string()) && places.insert(panel["gridPos"].to_string()), "{title}");
        let targets = list(&panel, "targets");
        assert_eq!(targets.is_empty(), panel["type"] == "row", "{title}");
        for target in targets {
            let text = |key: &str| target[key].as_str().expect("a text").to_owned();
            expressions.push((title.clone(), text("expr"), text("legendFormat")));
        }
    }
    let panels = expressions.len();
    let objects = chart::rendered(&chart::value_sets()["all options"]);
    let rule = objects.iter().find(|it| it["kind"] == "PrometheusRule").expect("a rule");
    for alert in list(&rule["spec"], "groups").iter().flat_map(|group| list(group, "rules")) {
        let text = |key: &str| alert[key].as_str().expect("a text").to_owned();
        expressions.push((text("alert"), text("expr"), String::new()));
    }
    // Alerts of the operator belong to releases with one.
    let of_operator = |objects: &[Value]| -> Vec<String> {
        let rules = objects.iter().filter(|it| it["kind"] == "PrometheusRule");
        let groups = rules.flat_map(|rule| list(&rule["spec"], "groups"));
        let alerts = groups.flat_map(|group| list(&group, "rules"));
        let named = alerts.filter_map(|it| Some((it["alert"].as_str()?.to_owned(), it["expr"].to_string())));
        named.filter(|(_, expression)| expression.contains("hanse_hub_operator_")).map(|(name, _)| name).collect()
    };
    assert_eq!(of_operator(&objects), ["HanseOperatorNotLeading", "HanseOperatorStuck", "HanseOperatorProblems"]);
    let without =
        chart::set(chart::value_sets()["all options"].clone(), "hub.operator", serde_json::json!({"enabled": false}));
    let without = chart::set(without, "hub.webhook", serde_json::json!({"enabled": false}));
    assert_eq!(of_operator(&chart::rendered(&without)), [""; 0]);
    assert!(panels > 40 && expressions.len() >= panels + 10, "{} expressions", expressions.len());
    for (at, expression, legend) in &expressions {
        assert_eq!(check(expression, legend, &series), Ok(()), "{at}: {expression}");
    }
    // What an operator looks for is there.
    for area in ["clusters", "agents", "refused", "store", "admission", "panics", "flows", "unequal"] {
        assert!(expressions[..panels].iter().any(|(_, expression, _)| expression.contains(area)), "{area}");
    }
}
