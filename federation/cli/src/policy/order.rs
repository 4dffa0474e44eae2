//! `hanse policy order`: the one order in which everything is asked.

use std::process::ExitCode;

use hanse_policy::evaluate;
use hanse_policy::model::{Order, Policy, StagedAction};
use serde::Serialize;

use super::load::{Loaded, Sources};
use crate::output::{self, Format};
use hanse_policy::explain::answer;

/// Prints the tiers and policies of each cluster in the order in which they are asked.
#[derive(Debug, clap::Args)]
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
    /// Policies name the tier, and no object defines it.
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
    selector: &'a str,
    ingress: bool,
    egress: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    staged: Option<&'static str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    host_only: bool,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let loaded = self.sources.load()?;
        let Loaded { policies, inventory, refused, .. } = &loaded;
        let mut table =
            output::table(["CLUSTER", "PHASE", "TIER", "ORDER", "DEFAULT", "POLICY", "ORDER", "TYPES", "NOTE"]);
        for cluster in inventory.clusters.keys() {
            for tier in evaluate::order(policies, cluster) {
                let line = TierLine {
                    cluster,
                    phase: answer::phase(tier.id.phase),
                    tier: &tier.id.name,
                    order: tier.order.0,
                    default_action: answer::default_name(tier.default),
                    missing: tier.missing,
                    policies: tier.policies.iter().copied().map(policy_line).collect(),
                };
                if self.output != Format::Table {
                    output::print(self.output, &line)?;
                    continue;
                }
                let place = [line.cluster, line.phase, line.tier].map(str::to_owned);
                let tier_order = if tier.missing { "no object".to_owned() } else { shown(tier.order) };
                let place = place.into_iter().chain([tier_order, line.default_action.to_owned()]);
                if tier.policies.is_empty() {
                    table.add_row(place.clone());
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
                    let own = [answer::policy_name(&policy.id), shown(policy.order), types.to_owned(), note];
                    table.add_row(place.clone().chain(own));
                }
            }
        }
        if self.output == Format::Table {
            println!("{table}");
        }
        Ok(if *refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn policy_line(policy: &Policy) -> PolicyLine<'_> {
    let (api_version, kind) = answer::api(policy.id.kind);
    PolicyLine {
        api_version,
        kind,
        namespace: policy.id.namespace.as_deref(),
        name: &policy.id.name,
        order: policy.order.0,
        selector: &policy.selector.canonical,
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
