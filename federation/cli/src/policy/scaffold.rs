//! `hanse policy scaffold`: presets for AI workloads, rendered as manifests to read, change and keep in a repository.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use hanse_api::manifest::{Manifests, read_bytes};

use super::load::described;
use crate::output;

struct Preset {
    name: &'static str,
    about: &'static str,
    parameters: &'static [(&'static str, Value)],
    template: &'static str,
}

/// The default of a parameter.
#[derive(Clone, Copy)]
enum Value {
    Usual(&'static str),
    /// Required; this is an example.
    Needed(&'static str),
}

use Value::{Needed, Usual};

const CLUSTERS: (&str, Value) = ("clusters", Usual("all()"));
/// Where NodeLocal DNSCache answers by default: as Kubernetes documents it, and as Kubespray installs it. Where kube-proxy uses
/// iptables it answers at the cluster address of kube-dns too, which differs from cluster to cluster.
const DNS_NETS: (&str, Value) = ("dnsNets", Usual("169.254.20.10/32, 169.254.25.10/32"));

const PRESETS: &[Preset] = &[
    Preset {
        name: "tiers",
        about: "the tiers of the other presets; apply it first",
        parameters: &[],
        template: include_str!("scaffold/tiers.yaml"),
    },
    Preset {
        name: "default-deny",
        about: "every pod closed in both directions unless a policy opens it; DNS stays open",
        parameters: &[CLUSTERS, DNS_NETS],
        template: include_str!("scaffold/default-deny.yaml"),
    },
    Preset {
        name: "deny-metadata",
        about: "no workload reaches the cloud's metadata addresses",
        parameters: &[CLUSTERS, ("from", Usual("all()"))],
        template: include_str!("scaffold/deny-metadata.yaml"),
    },
    Preset {
        name: "stages",
        about: "training, fine-tuning, inference and production kept apart by a namespace label",
        parameters: &[CLUSTERS, DNS_NETS, ("label", Usual("stage"))],
        template: include_str!("scaffold/stages.yaml"),
    },
    Preset {
        name: "model-registry",
        about: "who reads and who publishes models and data sets",
        parameters: &[
            CLUSTERS,
            DNS_NETS,
            ("registry", Usual("app == 'model-registry'")),
            ("readers", Usual("models == 'read'")),
            ("writers", Usual("models == 'write'")),
            ("readPort", Usual("8080")),
            ("writePort", Usual("8081")),
        ],
        template: include_str!("scaffold/model-registry.yaml"),
    },
    Preset {
        name: "gpu-collective",
        about: "the workers of one job of a namespace talk with each other only",
        parameters: &[
            CLUSTERS,
            DNS_NETS,
            ("namespace", Needed("jobs")),
            ("label", Usual("batch.kubernetes.io/job-name")),
            ("job", Needed("job")),
        ],
        template: include_str!("scaffold/gpu-collective.yaml"),
    },
    Preset {
        name: "egress-registries",
        about: "out of the clusters only to named registries, on HTTPS",
        parameters: &[CLUSTERS, DNS_NETS, ("from", Usual("all()")), ("nets", Needed("203.0.113.0/28"))],
        template: include_str!("scaffold/egress-registries.yaml"),
    },
];

/// Render a preset for AI workloads as manifests. Without PRESET, list the presets with their parameters.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Presets that restrict egress allow DNS on port 53: to the pods of kube-dns (also CoreDNS with its label) and of OpenShift's \
DNS, and to NodeLocal DNSCache at the addresses of `dnsNets`. Where kube-proxy uses iptables, NodeLocal DNSCache also answers \
at the cluster address of kube-dns: add this address of each such cluster. A DNS server with other labels requires another \
rule in the manifests. A list has addresses of one IP version: IPv6 addresses require another rule, too.

Examples:
  hanse policy scaffold
  for preset in tiers default-deny deny-metadata stages; do \\
    hanse policy scaffold $preset > policies/$preset.yaml; done
  hanse policy scaffold default-deny \\
    --set dnsNets=169.254.20.10/32,10.96.0.10/32 > policies/default-deny.yaml
  hanse policy scaffold gpu-collective --set namespace=jobs --set job=llama \\
    --set clusters=\"env == 'prod'\" | hanse apply -f -
  hanse policy scaffold egress-registries --set nets=203.0.113.0/28,2001:db8:5::/64")]
pub struct Arguments {
    #[arg(value_name = "PRESET")]
    preset: Option<String>,
    /// Parameter; repeatable.
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
}

fn assignment(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let Some(name) = &self.preset else {
            let mut table = output::table(["PRESET", "PARAMETERS", "WHAT IT DOES"]);
            for preset in PRESETS {
                let shown = preset.parameters.iter().map(|(name, value)| match value {
                    Needed(_) => format!("{name} (required)"),
                    Usual(value) => format!("{name}={value}"),
                });
                table.add_row([preset.name.into(), output::Cell::lines(shown), preset.about.into()]);
            }
            table.print()?;
            return Ok(ExitCode::SUCCESS);
        };
        let preset = PRESETS.iter().find(|preset| preset.name == name);
        let preset = preset.with_context(|| format!("unknown preset {name:?}; `hanse policy scaffold` lists all"))?;
        let given: BTreeMap<_, _> = self.set.into_iter().collect();
        if let Some(unknown) = given.keys().find(|name| preset.parameters.iter().all(|(known, _)| known != name)) {
            bail!("preset {name}: unknown parameter {unknown:?}");
        }
        for (parameter, value) in preset.parameters {
            match given.get(*parameter) {
                Some(given) if given.is_empty() => bail!("parameter {parameter}: the value is empty"),
                None if matches!(value, Needed(_)) => bail!("preset {name} requires --set {parameter}=…"),
                _ => {}
            }
        }
        // First each alone, so that the error names the parameter, then all together.
        for (parameter, value) in &given {
            if value.contains(['"', '\n']) {
                bail!("parameter {parameter}: double quotes and line breaks are not allowed");
            }
            let alone = [(parameter.clone(), value.clone())].into();
            if let Some(wrong) = wrong(&preset.render(&alone)) {
                bail!("parameter {parameter}: {value:?} does not give a valid manifest: {wrong}");
            }
        }
        let rendered = preset.render(&given);
        if let Some(wrong) = wrong(&rendered) {
            bail!("the combination of parameters does not give a valid manifest: {wrong}");
        }
        output::stdout().write_all(rendered.as_bytes())?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Preset {
    fn render(&self, given: &BTreeMap<String, String>) -> String {
        self.parameters.iter().fold(self.template.to_owned(), |text, (name, value)| {
            let (Usual(value) | Needed(value)) = value;
            text.replace(&format!("${{{name}}}"), given.get(*name).map_or(*value, String::as_str))
        })
    }
}

/// The first error of the manifests, if any.
fn wrong(text: &str) -> Option<String> {
    let mut read = Manifests::default();
    read_bytes(&"-".into(), text.as_bytes(), &mut read);
    read.diagnostics.first().map(described)
}
