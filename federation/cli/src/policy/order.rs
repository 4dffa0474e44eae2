//! `hanse policy order`: the order in which policies are evaluated.

use std::io::Write as _;
use std::process::ExitCode;

use hanse_policy::evaluate;
use hanse_policy::model::{Order, Policy, StagedAction};
use serde::Serialize;

use super::answer::write_answer;
use super::load::{Loaded, Sources};
use crate::output::{self, Format};
use hanse_policy::explain::answer;

/// Show the tiers and policies of each cluster in evaluation order.
///
/// All kinds have one order: federated tiers of phase Guard; the tiers of the cluster (Calico tiers by their order, Admin
/// ClusterNetworkPolicies at 1,000, NetworkPolicies in tier `default` at 1,000,000, Baseline at 10,000,000); federated tiers of
/// phase Baseline. A packet that no tier decides is allowed by the profile of the pod.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
JSON, one tier a line: {\"cluster\", \"phase\", \"tier\", \"order\", \"defaultAction\", \"missing\", \"policies\": [{\"apiVersion\", \"kind\", \
\"namespace\", \"name\", \"order\", \"selector\": as written, \"effectiveSelector\": as it is evaluated, \"file\", \"line\", \"ingress\", \
\"egress\", \"staged\", \"hostOnly\"}]}.

Examples:
  hanse policy order --cluster train=manifests/train --federation policies/
  hanse policy order --cluster train=manifests/train -o json | jq .tier")]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TierLine<'a> {
    cluster: &'a str,
    phase: &'static str,
    tier: &'a str,
    order: Option<f64>,
    default_action: &'static str,
    /// Policies refer to the tier, and no object defines it.
    missing: bool,
    policies: Vec<PolicyLine<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyLine<'a> {
    api_version: &'static str,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    name: &'a str,
    order: Option<f64>,
    /// The fields that select the pods of the policy, as written.
    selector: &'a str,
    /// The selector as it is evaluated, over effective labels.
    effective_selector: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
    ingress: bool,
    egress: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    staged: Option<&'static str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    host_only: bool,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let loaded = self.sources.load_any()?;
        let layers = [&loaded.policies.federation].into_iter().chain(loaded.policies.clusters.values());
        if layers.into_iter().all(|layer| layer.policies.is_empty()) {
            anyhow::bail!("no policies found");
        }
        output::exit(self.print(&loaded), loaded.is_incomplete())
    }

    fn print(&self, loaded: &Loaded) -> anyhow::Result<()> {
        let Loaded { policies, inventory, .. } = loaded;
        let mut out = output::stdout();
        for (at, cluster) in inventory.clusters.keys().enumerate() {
            let headings = ["PHASE", "TIER", "ORDER", "ENDS IN", "POLICY", "ORDER", "TYPES", "PLACE", "SELECTOR"];
            let mut table = output::table(headings);
            for tier in evaluate::order(policies, cluster) {
                let line = TierLine {
                    cluster,
                    phase: answer::phase(tier.id.phase),
                    tier: &tier.id.name,
                    order: tier.order.0,
                    default_action: answer::default_name(tier.default),
                    missing: tier.missing,
                    policies: tier.policies.iter().map(|policy| policy_line(policy, loaded)).collect(),
                };
                if self.output != Format::Table {
                    write_answer(&mut out, self.output, loaded.is_incomplete(), &line)?;
                    continue;
                }
                let tier_order = if tier.missing { "no object".to_owned() } else { shown(tier.order) };
                let named = [line.phase.to_owned(), line.tier.to_owned(), tier_order, line.default_action.to_owned()];
                // The tier is printed once, before its first policy.
                let mut place = Some(named);
                if tier.policies.is_empty() {
                    table.add_row(place.take().into_iter().flatten());
                }
                for (policy, of) in tier.policies.iter().zip(&line.policies) {
                    let types = match (of.ingress, of.egress) {
                        (true, true) => "Ingress,Egress",
                        (true, false) => "Ingress",
                        (false, true) => "Egress",
                        (false, false) => "-",
                    };
                    let note = match (of.staged, of.host_only) {
                        (Some(staged), _) => format!("staged: {staged}"),
                        (None, true) => "hosts only".to_owned(),
                        (None, false) => String::new(),
                    };
                    let name = if note.is_empty() { String::new() } else { format!(" ({note})") };
                    let name = answer::policy_name(&policy.id) + &name;
                    let written = of.file.zip(of.line).map_or("-".to_owned(), |(file, line)| format!("{file}:{line}"));
                    let own = [name, shown(policy.order), types.to_owned(), written, of.selector.to_owned()];
                    table.add_row(place.take().unwrap_or_default().into_iter().chain(own));
                }
            }
            if self.output == Format::Table {
                let gap = if at == 0 { "" } else { "\n" };
                writeln!(out, "{gap}cluster {cluster}\n\n{table}")?;
            }
        }
        if let Some(line) = loaded.incomplete_line().filter(|_| self.output == Format::Table) {
            writeln!(out, "\n{line}")?;
        }
        Ok(())
    }
}

fn policy_line<'l>(policy: &'l Policy, loaded: &'l Loaded) -> PolicyLine<'l> {
    let (api_version, kind) = answer::api(policy.id.kind);
    let place = loaded.place(&policy.id);
    PolicyLine {
        api_version,
        kind,
        namespace: policy.id.namespace.as_deref(),
        name: &policy.id.name,
        order: policy.order.0,
        selector: policy.selector.shown(),
        effective_selector: &policy.selector.canonical,
        file: place.map(|place| &*place.file),
        line: place.map(|place| place.line),
        ingress: policy.ingress.is_some(),
        egress: policy.egress.is_some(),
        staged: policy.staged.map(|staged| match staged {
            StagedAction::Set => "Set",
            StagedAction::Delete => "Delete",
            StagedAction::Learn => "Learn",
            StagedAction::Ignore => "Ignore",
        }),
        host_only: policy.host_only,
    }
}

fn shown(order: Order) -> String {
    order.0.map_or_else(|| "last".to_owned(), |order| order.to_string())
}
