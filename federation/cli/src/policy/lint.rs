//! `hanse policy lint`: what is written and probably not meant.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::ValueEnum;
use hanse_policy::evaluate::Direction;
use hanse_policy::lint::{CHECKS, Finding, Severity, lint};
use serde::Serialize;
use serde_json::{Value, json};

use super::load::Sources;
use crate::output;
use hanse_policy::explain::answer;

/// Exits 1 when a finding is at least as severe as `--fail-on`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// The least severity that makes the command fail.
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
    rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
    message: &'a str,
    advice: &'static str,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let loaded = self.sources.load()?;
        let findings = lint(&loaded.policies, &loaded.inventory);
        let lines: Vec<FindingLine<'_>> = findings
            .iter()
            .map(|finding| {
                let place = finding.policy.as_ref().and_then(|policy| loaded.place(policy));
                FindingLine {
                    id: finding.check.id,
                    check: finding.check.name,
                    severity: severity(finding.check.severity),
                    cluster: finding.cluster.as_deref(),
                    policy: finding.policy.as_ref().map(answer::policy_name),
                    rule: finding.rule.map(|(direction, index)| rule_name(direction, index)),
                    file: place.map(|place| place.file.to_string()),
                    line: place.map(|place| place.line),
                    message: &finding.message,
                    advice: finding.check.advice,
                }
            })
            .collect();
        match self.output {
            Format::Json => lines.iter().try_for_each(|line| output::print(output::Format::Json, line))?,
            Format::Yaml => lines.iter().try_for_each(|line| output::print(output::Format::Yaml, line))?,
            Format::Sarif => println!("{}", serde_json::to_string_pretty(&sarif(&lines))?),
            Format::Table => print_table(&lines),
        }
        let fails = |finding: &Finding| match self.fail_on {
            Level::Note => true,
            Level::Warning => finding.check.severity >= Severity::Warning,
            Level::Error => finding.check.severity >= Severity::Error,
            Level::Never => false,
        };
        let failed = loaded.refused > 0 || findings.iter().any(fails);
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn print_table(lines: &[FindingLine<'_>]) {
    let mut table = output::table(["ID", "SEVERITY", "PLACE", "POLICY", "FINDING"]);
    let mut advice = BTreeMap::new();
    for line in lines {
        let place = match (&line.file, line.line) {
            (Some(file), Some(at)) => format!("{file}:{at}"),
            _ => format!("cluster {}", line.cluster.unwrap_or("-")),
        };
        let rule = line.rule.as_ref().map_or(String::new(), |rule| format!(" {rule}"));
        let policy = line.policy.clone().unwrap_or_else(|| "-".to_owned()) + &rule;
        table.add_row([line.id, line.severity, &place, &policy, line.message]);
        advice.insert(line.id, line.advice);
    }
    if lines.is_empty() {
        println!("nothing found");
        return;
    }
    println!("{table}\n");
    for (id, advice) in advice {
        println!("{id}  {advice}");
    }
}

fn sarif(lines: &[FindingLine<'_>]) -> Value {
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
            let subject =
                [line.policy.as_deref(), line.rule.as_deref()].into_iter().flatten().collect::<Vec<_>>().join(" ");
            let text =
                if subject.is_empty() { line.message.to_owned() } else { format!("{subject}: {}", line.message) };
            let mut result = json!({"ruleId": line.id, "level": line.severity, "message": {"text": text}});
            let location = match (&line.file, line.line) {
                (Some(file), Some(at)) => {
                    json!({"physicalLocation": {"artifactLocation": {"uri": file}, "region": {"startLine": at}}})
                }
                _ => json!({"logicalLocations": [{"name": line.cluster.unwrap_or("federation"), "kind": "namespace"}]}),
            };
            result["locations"] = json!([location]);
            result
        })
        .collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {"name": "hanse", "version": env!("CARGO_PKG_VERSION"), "informationUri": env!("CARGO_PKG_REPOSITORY"), "rules": rules}},
            "results": results,
        }],
    })
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
