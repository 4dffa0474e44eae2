//! `hanse audit`: changes, with the manifests before and after them, and refused requests.

use std::path::Path;
use std::process::ExitCode;

use hanse_proto::federation::v1 as pb;
use serde::Serialize;
use serde_json::Value;

use super::{call, time, with_client};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub struct Audit {
    /// Maximum number of records.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
    /// Only records of this object, such as FederatedNetworkPolicy/web or cluster/train.
    #[arg(long)]
    object: Option<String>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Serialize)]
struct Record {
    number: u64,
    at: String,
    who: String,
    action: String,
    object: String,
    outcome: String,
    /// The manifest before the change.
    #[serde(skip_serializing_if = "Value::is_null")]
    before: Value,
    /// The manifest after the change.
    #[serde(skip_serializing_if = "Value::is_null")]
    after: Value,
}

/// A manifest as an object; as text where it was cut.
fn manifest(text: String) -> Value {
    match text.as_str() {
        "" => Value::Null,
        json => serde_json::from_str(json).unwrap_or(Value::String(text)),
    }
}

impl Audit {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let request = pb::ListAuditRequest { limit: self.limit, object: self.object.unwrap_or_default() };
        let listed = with_client(context, |mut client| async move { call(client.list_audit(request)).await })?;
        let records = listed.records.into_iter().map(|it| Record {
            number: it.number,
            at: time(it.at),
            who: it.who,
            action: it.action,
            object: it.object,
            outcome: it.outcome,
            before: manifest(it.before),
            after: manifest(it.after),
        });
        let records: Vec<Record> = records.collect();
        if self.output != Format::Table {
            output::list(self.output, "AuditRecordList", &records)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut table = output::table(["AT", "WHO", "ACTION", "OBJECT", "OUTCOME"]);
        for it in &records {
            table.add_row([&it.at, &it.who, &it.action, &it.object, &it.outcome]);
        }
        table.print()?;
        Ok(ExitCode::SUCCESS)
    }
}
