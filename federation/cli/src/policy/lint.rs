//! `hanse policy lint`: likely mistakes.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::bail;
use clap::ValueEnum;
use hanse_api::document::{self, Node};
use hanse_api::files::read_file;
use hanse_api::{Diagnostic, SourceLocation};
use hanse_policy::evaluate::Direction;
use hanse_policy::lint::{About, CHECKS, Finding, NEEDING_PODS, Severity, lint, rules_left_out, without_pods};
use hanse_policy::model::{ClusterName, Phase};
use hanse_proto::federation::v1 as pb;
use serde::Serialize;
use serde_json::{Value, json};

use super::answer::write_answer;
use super::load::{Loaded, Sources, described};
use crate::online::{call, with_client};
use crate::output;
use hanse_policy::explain::answer;

/// Find likely mistakes.
///
/// A rule is reported as shadowed or impossible only if that is certain. For a cluster without pods and workloads, such as a
/// folder of policies, the checks that need them are not run; the output lists these checks.
///
/// Exits 1 if a finding is at least as severe as `--fail-on`, if an object was refused, or if there are neither policies nor pods.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy lint --cluster train=manifests/train --federation policies/
  hanse policy lint --cluster train=manifests/train \\
    --federation policies/ --fail-on warning -o sarif > lint.sarif
  hanse policy lint --cluster train=a --cluster serve=b \\
    --federation policies/ --stale serve
  hanse policy lint --cluster train=a --cluster serve=b \\
    --federation policies/ --ask-hub")]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// Treat this cluster's data as stale; repeatable.
    #[arg(long, value_name = "CLUSTER")]
    stale: Vec<String>,
    /// Query the hub for clusters whose data is stale or was never received.
    #[arg(long)]
    ask_hub: bool,
    /// Exit 1 for findings of at least this severity.
    #[arg(long, value_enum, default_value = "error")]
    fail_on: Level,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Default)]
enum Format {
    #[default]
    Table,
    Json,
    Yaml,
    /// SARIF 2.1.0, for code review tools.
    Sarif,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Level {
    Note,
    Warning,
    Error,
    Never,
}

#[derive(Serialize)]
struct FindingLine<'a> {
    id: &'static str,
    check: &'static str,
    severity: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tier: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
    message: &'a str,
    advice: &'static str,
}

impl Arguments {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let mut loaded = self.sources.load_any()?;
        let mut stale = self.stale.clone();
        if self.ask_hub {
            stale.extend(reported_stale(context)?);
        }
        for name in &self.stale {
            if !loaded.inventory.clusters.contains_key(name.as_str()) {
                bail!("--stale {name}: unknown cluster");
            }
        }
        for name in &stale {
            if let Some(cluster) = loaded.inventory.clusters.get_mut(name.as_str()) {
                cluster.stale = true;
            }
        }
        let mut findings = lint(&loaded.policies, &loaded.inventory, &loaded.hosts, &loaded.without_tier);
        let left_out = loaded.left_out.iter();
        findings.extend(left_out.map(|(policy, direction, field)| rules_left_out(policy.clone(), *direction, field)));
        let not_run = NotRun::new(&loaded)?;
        let mut lines_of_rules = RuleLines::default();
        let lines: Vec<FindingLine<'_>> = findings
            .iter()
            .map(|finding| {
                let (policy, rule) = match &finding.about {
                    About::Policy(policy, rule) => (Some(policy), *rule),
                    About::Tier(_) | About::Namespace(_) | About::Cluster => (None, None),
                };
                let place = place(&loaded, finding);
                FindingLine {
                    id: finding.check.id,
                    check: finding.check.name,
                    severity: severity(finding.check.severity),
                    cluster: finding.cluster.as_deref(),
                    policy: policy.map(answer::policy_name),
                    tier: match &finding.about {
                        About::Tier(tier) => Some(tier.name.to_string()),
                        _ => None,
                    },
                    namespace: match &finding.about {
                        About::Namespace(namespace) => Some(namespace.to_string()),
                        _ => None,
                    },
                    rule: rule.map(|(direction, index)| rule_name(direction, index)),
                    file: place.map(|place| place.file.to_string()),
                    line: place
                        .map(|place| rule.and_then(|rule| lines_of_rules.line(place, rule)).unwrap_or(place.line)),
                    message: &finding.message,
                    advice: finding.check.advice,
                }
            })
            .collect();
        let print = || -> anyhow::Result<()> {
            let format = match self.output {
                Format::Json => output::Format::Json,
                Format::Yaml => output::Format::Yaml,
                Format::Sarif => {
                    let sarif = sarif(&lines, &loaded.refusals, not_run.as_ref());
                    return Ok(writeln!(output::stdout(), "{}", serde_json::to_string_pretty(&sarif)?)?);
                }
                Format::Table => {
                    print_table(&lines)?;
                    not_run.as_ref().map_or(Ok(()), |it| output::line(&it.message))?;
                    return loaded.incomplete_line().map_or(Ok(()), output::line);
                }
            };
            let (mut out, incomplete) = (output::stdout(), loaded.is_incomplete());
            lines.iter().try_for_each(|line| write_answer(&mut out, format, incomplete, line))?;
            not_run.as_ref().map_or(Ok(()), |it| write_answer(&mut out, format, incomplete, it))
        };
        let fails = |finding: &Finding| match self.fail_on {
            Level::Note => true,
            Level::Warning => finding.check.severity >= Severity::Warning,
            Level::Error => finding.check.severity >= Severity::Error,
            Level::Never => false,
        };
        output::exit(print(), loaded.is_incomplete() || findings.iter().any(fails))
    }
}

/// Checks that were not run. In JSON the last line.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NotRun {
    not_run: Vec<&'static str>,
    clusters: Vec<String>,
    message: String,
}

impl NotRun {
    /// `None` if all clusters have pods.
    ///
    /// # Errors
    /// When there are neither pods nor policies: an empty result would look like a good one.
    fn new(loaded: &Loaded) -> anyhow::Result<Option<Self>> {
        let clusters = without_pods(&loaded.inventory);
        let clusters: Vec<String> = clusters.into_iter().map(ToString::to_string).collect();
        if clusters.is_empty() {
            return Ok(None);
        }
        let noun = if clusters.len() == 1 { "cluster" } else { "clusters" };
        let names = clusters.join(", ");
        let layers = [&loaded.policies.federation].into_iter().chain(loaded.policies.clusters.values());
        let is_empty = loaded.without_tier.is_empty() && layers.into_iter().all(|layer| layer.policies.is_empty());
        if is_empty && clusters.len() == loaded.inventory.clusters.len() {
            bail!("{noun} {names}: no policies, pods or workloads found");
        }
        let not_run: Vec<&str> = NEEDING_PODS.iter().map(|check| check.id).collect();
        let ids = not_run.join(", ");
        let message = format!("not run for {noun} {names}, without pods and workloads: {ids}");
        Ok(Some(Self { not_run, clusters, message }))
    }
}

/// The clusters whose data is stale at the hub, or was never received.
fn reported_stale(context: Option<&Path>) -> anyhow::Result<Vec<String>> {
    let status = with_client(context, |mut client| async move { call(client.status(pb::StatusRequest {})).await })?;
    let clusters = status.clusters.into_iter().filter(|cluster| cluster.lease != "live");
    Ok(clusters.map(|cluster| cluster.name).collect())
}

fn place<'l>(loaded: &'l Loaded, finding: &Finding) -> Option<&'l SourceLocation> {
    let cluster: Option<&ClusterName> = finding.cluster.as_ref();
    match &finding.about {
        About::Policy(policy, _) => loaded.place(policy),
        About::Tier(tier) => {
            let owner = cluster.filter(|_| tier.phase == Phase::Local);
            loaded.place_of(owner, "Tier", &tier.name)
        }
        About::Namespace(namespace) => loaded.place_of(cluster, "Namespace", namespace),
        About::Cluster => loaded.place_of(None, "MemberCluster", cluster?),
    }
}

/// The lines of rules, file by file.
#[derive(Default)]
struct RuleLines {
    files: HashMap<Arc<str>, HashMap<u32, ObjectLines>>,
}

/// The lines of an object's rules: of ingress, and of egress.
type ObjectLines = [Vec<u32>; 2];

impl RuleLines {
    /// Of a rule of the object that starts at `place`.
    fn line(&mut self, place: &SourceLocation, (direction, index): (Direction, u32)) -> Option<u32> {
        let objects = self.files.entry(place.file.clone()).or_insert_with(|| {
            // If the file has changed since it was read, the line of the object is used.
            let bytes = read_file(Path::new(&*place.file)).unwrap_or_default();
            let text = std::str::from_utf8(&bytes).unwrap_or_default();
            let mut objects = HashMap::new();
            for document in document::documents(text).flatten() {
                rules_of(document.root(), &mut objects);
            }
            objects
        });
        let [ingress, egress] = objects.get(&place.line)?;
        let lines = match direction {
            Direction::Ingress => ingress,
            Direction::Egress => egress,
        };
        lines.get(index as usize).copied()
    }
}

/// The rules of an object, or of those of a list, by the line on which the object starts.
fn rules_of(node: Node<'_>, objects: &mut HashMap<u32, ObjectLines>) {
    match node.child("items").filter(|items| items.is_sequence()) {
        Some(items) => items.items().for_each(|item| rules_of(item, objects)),
        None => {
            let lines = |direction| {
                let rules = node.child("spec").and_then(|spec| spec.child(direction));
                rules.into_iter().flat_map(Node::items).map(Node::line).collect()
            };
            objects.insert(node.line(), ["ingress", "egress"].map(lines));
        }
    }
}

/// Findings by severity, the most severe first, with the advice for each check once.
fn print_table(lines: &[FindingLine<'_>]) -> anyhow::Result<()> {
    if lines.is_empty() {
        return output::line("nothing found");
    }
    let mut sorted: Vec<&FindingLine<'_>> = lines.iter().collect();
    let rank = |line: &FindingLine<'_>| ["error", "warning", "note"].iter().position(|it| *it == line.severity);
    sorted.sort_by_key(|line| (rank(line), line.id));
    let mut table = output::table(["ID", "SEVERITY", "PLACE", "FINDING"]);
    let mut advice = BTreeMap::new();
    for line in sorted {
        let place = match (&line.file, line.line) {
            (Some(file), Some(at)) => format!("{file}:{at}"),
            _ => "-".to_owned(),
        };
        let subject = match (&line.policy, &line.tier) {
            (Some(policy), _) => {
                format!("{policy}{}: ", line.rule.as_ref().map_or(String::new(), |it| format!(" {it}")))
            }
            (None, Some(tier)) => format!("tier {tier}: "),
            (None, None) => String::new(),
        };
        let cluster = line.cluster.map_or(String::new(), |cluster| format!("cluster {cluster}: "));
        table.add_row([line.id, line.severity, &place, &format!("{cluster}{subject}{}", line.message)]);
        advice.insert(line.id, line.advice);
    }
    writeln!(output::stdout(), "{table}\n")?;
    for (id, advice) in advice {
        output::line(format_args!("{id}  {advice}"))?;
    }
    let many = |severity: &str| lines.iter().filter(|line| line.severity == severity).count();
    let counts = ["error", "warning", "note"].map(|severity| output::count(many(severity), severity));
    output::line("")?;
    output::line(counts.join(", "))
}

/// Refused objects make the run incomplete, which review tools show.
fn sarif(lines: &[FindingLine<'_>], refusals: &[Diagnostic], not_run: Option<&NotRun>) -> Value {
    let rules: Vec<Value> = CHECKS
        .iter()
        .map(|check| {
            json!({
                "id": check.id,
                "name": check.name,
                "shortDescription": {"text": check.name},
                "help": {"text": check.advice},
                "defaultConfiguration": {"level": severity(check.severity)},
            })
        })
        .collect();
    let results: Vec<Value> = lines
        .iter()
        .map(|line| {
            let tier = line.tier.as_ref().map(|tier| format!("tier {tier}"));
            let subject = [line.policy.as_deref(), tier.as_deref(), line.rule.as_deref()];
            let subject = subject.into_iter().flatten().collect::<Vec<_>>().join(" ");
            let text =
                if subject.is_empty() { line.message.to_owned() } else { format!("{subject}: {}", line.message) };
            let rule_index = CHECKS.iter().position(|check| check.id == line.id);
            let mut result =
                json!({"ruleId": line.id, "ruleIndex": rule_index, "level": line.severity, "message": {"text": text}});
            let location = match (&line.file, line.line) {
                (Some(file), Some(at)) => location(file, at),
                _ => json!({"logicalLocations": [{"name": line.cluster.unwrap_or("federation"), "kind": "namespace"}]}),
            };
            result["locations"] = json!([location]);
            result
        })
        .collect();
    let not_run = not_run.map(|it| json!({"level": "note", "message": {"text": it.message}}));
    let notifications: Vec<Value> = refusals
        .iter()
        .map(|refusal| {
            let text = format!("refused: {}", described(refusal));
            let location = location(&refusal.location.file, refusal.location.line);
            json!({"level": "error", "message": {"text": text}, "locations": [location]})
        })
        .chain(not_run)
        .collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {"name": "hanse", "version": env!("CARGO_PKG_VERSION"), "informationUri": env!("CARGO_PKG_REPOSITORY"), "rules": rules}},
            "invocations": [{
                "executionSuccessful": refusals.is_empty(),
                "toolExecutionNotifications": notifications,
            }],
            "results": results,
        }],
    })
}

fn location(file: &str, line: u32) -> Value {
    json!({"physicalLocation": {"artifactLocation": {"uri": uri(file)}, "region": {"startLine": line}}})
}

/// A path as a URI reference (RFC 3986), with reserved characters escaped. The tool resolves relative paths.
fn uri(path: &str) -> String {
    let mut uri = if path.starts_with('/') { "file://".to_owned() } else { String::new() };
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => uri.push(char::from(byte)),
            other => uri.push_str(&format!("%{other:02X}")),
        }
    }
    uri
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Note => "note",
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

fn rule_name(direction: Direction, index: u32) -> String {
    match direction {
        Direction::Ingress => format!("ingress[{index}]"),
        Direction::Egress => format!("egress[{index}]"),
    }
}
