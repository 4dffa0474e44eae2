//! `hanse policy explain`: what policy says of packets, and why.

use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use hanse_policy::evaluate::{View, evaluate};
use hanse_policy::prepared::Prepared;
use serde::Serialize;

use super::load::{Loaded, Sources};
use super::question::{Owners, Question};
use super::trace::{self, AnswerLine};
use crate::output::{self, Format};

/// Answers each line of the queries by one line, in the same order. Exits 1 when a query has no answer, or an object was
/// refused.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// Questions, one JSON object per line; `-` is standard input. `{"from":{"cluster","namespace","pod"}|{"ip"},
    /// "to":…,"protocol":"TCP|UDP|SCTP|ICMP|ICMPv6|<number>","port":N,"sourcePort":N,"icmp":{"type","code"},
    /// "ipVersion":4|6}`
    #[arg(long, value_name = "FILE.jsonl")]
    queries: PathBuf,
    /// Ask the reference evaluator, which looks everything up anew for each question. The answers are the same.
    #[arg(long)]
    reference: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct ErrorLine {
    error: String,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let loaded = self.sources.load()?;
        let Loaded { policies, inventory, refused, .. } = &loaded;
        let owners = Owners::new(inventory);
        let enforced = Prepared::new(policies, inventory, View::Enforced);
        let pending = loaded.has_staged().then(|| Prepared::new(policies, inventory, View::Pending));
        let mut table = output::table(["FROM", "TO", "VERDICT", "EGRESS", "INGRESS"]);
        if pending.is_some() {
            table.set_header(["FROM", "TO", "VERDICT", "STAGED", "EGRESS", "INGRESS"]);
        }
        let mut out = std::io::BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
        let form = if self.reference { "reference" } else { "prepared" };
        let mut unanswered = 0;
        for line in super::open(&self.queries)?.lines() {
            let line = line.with_context(|| format!("read {}", self.queries.display()))?;
            if line.trim().is_empty() {
                continue;
            }
            let asked = serde_json::from_str::<Question>(&line).map_err(|error| format!("malformed query: {error}"));
            let packet = asked
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|question| owners.packet(question).map_err(|error| error.to_string()));
            let packet = match packet {
                Ok(packet) => packet,
                Err(error) => {
                    unanswered += 1;
                    match self.output {
                        Format::Table => {
                            table.add_row([line.clone(), String::new(), format!("error: {error}")]);
                        }
                        format => super::write_line(&mut out, format, &ErrorLine { error })?,
                    }
                    continue;
                }
            };
            let ask = |prepared: &Prepared<'_>, view| match self.reference {
                true => evaluate(policies, inventory, &packet, view),
                false => prepared.evaluate(&packet),
            };
            let answer = ask(&enforced, View::Enforced);
            let staged = pending.as_ref().map(|pending| ask(pending, View::Pending));
            match (self.output, asked) {
                (Format::Table, Ok(question)) => {
                    let mut row = vec![question.from.to_string(), question.to.to_string()];
                    row.push(trace::verdict(answer.verdict).to_owned());
                    row.extend(staged.as_ref().map(|staged| trace::verdict(staged.verdict).to_owned()));
                    row.extend([trace::reason(answer.egress.as_ref()), trace::reason(answer.ingress.as_ref())]);
                    table.add_row(row);
                }
                (format, _) => super::write_line(&mut out, format, &AnswerLine::new(&answer, staged.as_ref(), form))?,
            }
        }
        if self.output == Format::Table {
            writeln!(out, "{table}")?;
        }
        out.flush()?;
        Ok(if unanswered == 0 && *refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
