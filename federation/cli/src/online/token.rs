//! `hanse token`: the tokens that clusters join with.

use std::path::Path;
use std::process::ExitCode;

use clap::Subcommand;
use hanse_identity::token::TokenKind;
use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::kind::label;
use super::{call, time, with_client};
use crate::completion;
use crate::output::{self, Format};

/// A week, the maximum of the hub.
const MAX_SECONDS: u64 = 604_800;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a single-use token for one cluster, and print it.
    ///
    /// The token is a secret. It is printed once; the hub stores only its hash. A cluster token begins with `hanse-join.v1`, a
    /// node token, from `hanse-member node-token create`, with `hanse-node.v1`.
    #[command(after_help = "\
Examples:
  (umask 077; hanse token create --cluster train > train.token)
  hanse-member run --cluster train --token-file train.token …")]
    Create {
        /// Name of the cluster.
        #[arg(long, value_parser = label, add = completion::clusters())]
        cluster: String,
        /// Validity of the token in seconds.
        #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=MAX_SECONDS))]
        seconds: u64,
        /// Issue no certificate before `hanse cluster accept`.
        #[arg(long)]
        wait_for_accept: bool,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// List valid tokens, without their secrets.
    List {
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Revoke a token. A cluster that has joined with it is not affected.
    Revoke {
        /// ID of the token.
        #[arg(add = completion::tokens())]
        id: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Token {
    id: String,
    /// What the token begins with. The hub has no tokens of nodes: those are their member's.
    #[serde(rename = "type")]
    kind: &'static str,
    cluster: String,
    expires_at: String,
    #[serde(skip)]
    expires_seconds: u64,
    accepts_at_once: bool,
    used: bool,
    created_by: String,
}

impl Command {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        match self {
            Self::Create { cluster, seconds, wait_for_accept, output } => {
                let request = pb::CreateTokenRequest { cluster, lifetime_seconds: seconds, accept: !wait_for_accept };
                let created =
                    with_client(context, |mut client| async move { call(client.create_token(request)).await })?;
                match output {
                    // Alone on its line, to be redirected into a file.
                    Format::Table => output::line(created.token)?,
                    format => {
                        output::object(format, "Token", &serde_json::json!({"id": created.id, "token": created.token}))?
                    }
                }
            }
            Self::List { output } => {
                let listed = with_client(context, |mut client| async move {
                    call(client.list_tokens(pb::ListTokensRequest {})).await
                })?;
                let tokens: Vec<Token> = listed
                    .tokens
                    .into_iter()
                    .map(|token| Token {
                        id: token.id,
                        kind: TokenKind::Cluster.label(),
                        cluster: token.cluster,
                        expires_at: time(token.expires_at),
                        expires_seconds: token.expires_at,
                        accepts_at_once: token.accept,
                        used: !token.bound_key.is_empty(),
                        created_by: token.created_by,
                    })
                    .collect();
                if output != Format::Table {
                    output::list(output, "TokenList", &tokens)?;
                    return Ok(ExitCode::SUCCESS);
                }
                let mut table = output::table(["ID", "TYPE", "CLUSTER", "EXPIRES", "ACCEPTS", "USED", "BY"]);
                for token in tokens {
                    let expires = format!("{} ({})", token.expires_at, output::left(token.expires_seconds));
                    let accepts = if token.accepts_at_once { "at once" } else { "by operator" };
                    let used = if token.used { "yes" } else { "no" };
                    table.add_row([
                        token.id.as_str(),
                        token.kind,
                        &token.cluster,
                        &expires,
                        accepts,
                        used,
                        &token.created_by,
                    ]);
                }
                match table.is_empty() {
                    true => output::line("no valid tokens; `hanse token create --cluster NAME` creates one")?,
                    false => table.print()?,
                }
            }
            Self::Revoke { id, output } => {
                let request = pb::RevokeTokenRequest { id: id.clone() };
                with_client(context, |mut client| async move { call(client.revoke_token(request)).await })?;
                let done = serde_json::json!({"token": id, "result": "revoked"});
                output::done(output, &done, format_args!("token {id} revoked"))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
