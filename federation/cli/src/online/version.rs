//! `hanse version`.

use std::path::Path;
use std::process::ExitCode;

use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::{call, with_client};
use crate::output::{self, Format};

/// Print the version of this command and, with a context file, of the hub.
#[derive(Debug, clap::Args)]
pub struct Version {
    /// Do not contact a hub.
    #[arg(long)]
    client: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Serialize)]
struct Versions {
    client: Client,
    #[serde(skip_serializing_if = "Option::is_none")]
    hub: Option<Hub>,
}

#[derive(Debug, Serialize)]
struct Client {
    version: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Hub {
    version: String,
    trust_domain: String,
}

impl Version {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let client = Client { version: env!("CARGO_PKG_VERSION") };
        // Printed before the call, which may fail.
        if self.output == Format::Table {
            output::line(format_args!("client  {}", client.version))?;
        }
        let hub = match context.filter(|_| !self.client) {
            None => Ok(None),
            Some(context) => with_client(Some(context), |mut client| async move {
                let pb::VersionResponse { version, trust_domain } = call(client.version(pb::VersionRequest {})).await?;
                Ok(Some(Hub { version, trust_domain }))
            }),
        };
        let (hub, failed) = match hub {
            Ok(hub) => (hub, None),
            Err(error) => (None, Some(error)),
        };
        match (self.output, &hub) {
            (Format::Table, Some(hub)) => {
                output::line(format_args!("hub     {} (trust domain {})", hub.version, hub.trust_domain))?;
            }
            (Format::Table, None) => {}
            (format, _) => output::object(format, "Version", &Versions { client, hub })?,
        }
        failed.map_or(Ok(ExitCode::SUCCESS), Err)
    }
}
