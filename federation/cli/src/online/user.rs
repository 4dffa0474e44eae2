//! `hanse user`: users and their roles.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use hanse_identity::context::Context;
use hanse_identity::keys::{Certificate, Credentials, Key};
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::role::Role as Wire;
use hanse_runtime::files;
use serde::Serialize;

use super::{call, read_context, time, with_client};
use crate::completion;
use crate::output::{self, Format};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a user, or replace the key and the roles of one.
    ///
    /// The key is generated on this machine and never leaves it. The command writes NAME.context, NAME.key, NAME.pem and
    /// NAME.ca.pem into the directory. The user needs these four files and nothing else.
    #[command(after_help = "\
Examples:
  hanse user create ada --role author=platform,security --out ./ada
  hanse user create ops --role operator=train --role viewer --out ./ops")]
    Create {
        #[arg(value_parser = user_name)]
        name: String,
        /// viewer, author=TIER[,TIER…], approver=TIER[,TIER…], operator=CLUSTER[,CLUSTER…] or administrator; repeatable. `*` means all
        /// tiers or clusters. Every role includes viewer.
        #[arg(long = "role", value_name = "ROLE", required = true, add = completion::roles())]
        roles: Vec<Role>,
        /// Directory for the user's files. It is created if absent, readable by its owner only.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Overwrite existing files.
        #[arg(long)]
        force: bool,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// List users with their roles.
    List {
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Revoke a user. Open connections are closed at once.
    Revoke {
        #[arg(add = completion::users())]
        name: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
}

fn user_name(text: &str) -> Result<String, String> {
    hanse_identity::Identity::user(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// A role as written on the command line.
#[derive(Debug, Clone)]
pub struct Role(Wire);

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (role, names) = text.split_once('=').unwrap_or((text, ""));
        let names: Vec<String> = names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        Ok(Self(match (role, names.is_empty()) {
            ("viewer", true) => Wire::Viewer(pb::Viewer {}),
            ("administrator", true) => Wire::Administrator(pb::Administrator {}),
            ("author", false) => Wire::Author(pb::Author { tiers: names }),
            ("approver", false) => Wire::Approver(pb::Approver { tiers: names }),
            ("operator", false) => Wire::Operator(pb::Operator { clusters: names }),
            ("author", true) => {
                return Err("tiers are missing: author=platform,security, or author=* for all".to_owned());
            }
            ("approver", true) => {
                return Err("tiers are missing: approver=platform,security, or approver=* for all".to_owned());
            }
            ("operator", true) => return Err("clusters are missing: operator=train, or operator=* for all".to_owned()),
            ("viewer" | "administrator", false) => return Err(format!("{role} has no names")),
            _ => {
                return Err("expected viewer, author=TIER, approver=TIER, operator=CLUSTER or administrator".to_owned());
            }
        }))
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct User {
    name: String,
    roles: Vec<String>,
    revoked: bool,
    certificate_expires_at: String,
}

impl Command {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        match self {
            Self::Create { name, roles, out, force, output } => create(context, &name, roles, &out, force, output)?,
            Self::List { output } => {
                let listed = with_client(context, |mut client| async move {
                    call(client.list_users(pb::ListUsersRequest {})).await
                })?;
                let users = listed.users.into_iter().map(|user| User {
                    name: user.name,
                    roles: user.roles.into_iter().map(|role| role_name(role.role)).collect(),
                    revoked: user.revoked,
                    certificate_expires_at: time(user.certificate_expires_at),
                });
                let users: Vec<User> = users.collect();
                if output != Format::Table {
                    output::list(output, "UserList", &users)?;
                    return Ok(ExitCode::SUCCESS);
                }
                let mut table = output::table(["NAME", "ROLES", "STATE", "CERTIFICATE UNTIL"]);
                for user in users {
                    let state = if user.revoked { "revoked" } else { "active" };
                    table.add_row([&user.name, &user.roles.join(" "), state, &user.certificate_expires_at]);
                }
                table.print()?;
            }
            Self::Revoke { name, output } => {
                let request = pb::RevokeUserRequest { name: name.clone() };
                let revoked =
                    with_client(context, |mut client| async move { call(client.revoke_user(request)).await })?;
                let closed = output::count(revoked.closed as usize, "connection");
                let done = serde_json::json!({"user": name, "result": "revoked", "closed": revoked.closed});
                output::done(output, &done, format_args!("user {name} revoked, {closed} closed"))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn create(
    context: Option<&Path>,
    name: &str,
    roles: Vec<Role>,
    out: &Path,
    force: bool,
    output: Format,
) -> anyhow::Result<()> {
    let own = context.context("no context file: set --context FILE or HANSE_CONTEXT")?;
    let own = read_context(own)?;
    hanse_identity::Identity::user(name).with_context(|| format!("invalid user name {name:?}"))?;
    let file = |suffix: &str| PathBuf::from(format!("{name}.{suffix}"));
    let paths = ["context", "key", "pem", "ca.pem"].map(|suffix| out.join(file(suffix)));
    // Checked before the hub changes anything: a key in use must not be overwritten.
    if let Some(there) = paths.iter().find(|path| path.exists() && !force) {
        bail!("{} exists: use --force to overwrite it", there.display());
    }
    files::private_folder(out).with_context(|| format!("make {}", out.display()))?;
    let key = Key::generate()?;
    let request = pb::CreateUserRequest {
        name: name.to_owned(),
        roles: roles.into_iter().map(|Role(role)| pb::Role { role: Some(role) }).collect(),
        request: key.request()?.into(),
    };
    let created = with_client(context, |mut client| async move { call(client.create_user(request)).await })?;
    let credentials = Credentials::new(key, Certificate::from_der(&created.certificate)?)?;
    let [context_path, key_path, certificate_path, ca_path] = &paths;
    credentials.key.write(key_path)?;
    credentials.certificate.write(certificate_path)?;
    let ca = std::fs::read_to_string(context.and_then(Path::parent).unwrap_or(Path::new(".")).join(&own.ca));
    let ca = Certificate::from_pem(ca.context("read the root's certificate")?.as_bytes())?;
    anyhow::ensure!(
        *ca.der == *created.root,
        "the root certificate of the hub is not the one that this context trusts"
    );
    ca.write(ca_path)?;
    let theirs = Context { ca: file("ca.pem"), certificate: file("pem"), key: file("key"), ..own };
    let text = serde_json::to_string_pretty(&theirs)? + "\n";
    files::write_secret(context_path, text.as_bytes()).with_context(|| format!("write {}", context_path.display()))?;
    let shown = context_path.display();
    let done = serde_json::json!({"user": name, "result": "created", "context": context_path});
    output::done(output, &done, format_args!("user {name} created; to use it:"))?;
    match output {
        Format::Table => ["".to_owned(), format!("  export HANSE_CONTEXT={shown}")].iter().try_for_each(output::line),
        _ => Ok(()),
    }
}

fn role_name(role: Option<Wire>) -> String {
    match role {
        Some(Wire::Viewer(_)) => "viewer".to_owned(),
        Some(Wire::Author(author)) => format!("author={}", author.tiers.join(",")),
        Some(Wire::Approver(approver)) => format!("approver={}", approver.tiers.join(",")),
        Some(Wire::Operator(operator)) => format!("operator={}", operator.clusters.join(",")),
        Some(Wire::Administrator(_)) => "administrator".to_owned(),
        None => "unknown to this version".to_owned(),
    }
}
