//! `hanse`: the command of platform teams.
//!
//! One module per group of commands. [`policy`] works offline, from directories of manifests; its `explain` and
//! `matrix` also query the members of a federation that runs, through its hub. Every command prints a table for people, and
//! `-o json|yaml` for programs; programs may rely on the latter and on the exit codes (0 done; 1 the answer is no, something
//! failed or a manifest is refused; 2 the command line or an expression is malformed; `wait` says its own).

// What others wrote is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

mod online;
mod output;
mod policy;

/// Zero-trust policy for a federation of Kubernetes clusters.
///
/// `hanse policy …` works on directories of manifests; everything else queries a hub, as the user of a context file.
/// Exit codes: 0 done; 1 the answer is no, something failed, or a manifest is refused; 2 the command line or an expression
/// is malformed.
#[derive(Debug, Parser)]
#[command(name = "hanse", version, propagate_version = true, disable_help_subcommand = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  export HANSE_CONTEXT=./hub/admin.context      # hanse-hub init makes it
  hanse token create --cluster train > train.token
  hanse apply -f policies/ --dry-run
  hanse apply -f policies/ && hanse wait -f policies/
  hanse status
  hanse describe fnp default-deny
  hanse node list --problems
  hanse policy lint --cluster train=manifests/train --federation policies/";

/// What every command may need.
#[derive(Debug, Clone, clap::Args)]
pub struct Globals {
    /// The context file: hub addresses, trust domain, and the paths of CA, certificate and key.
    #[arg(long, global = true, env = "HANSE_CONTEXT", value_name = "FILE", value_parser = context_file)]
    context: Option<PathBuf>,
}

/// Empty is as good as not set.
fn context_file(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Evaluate policies, and check manifests.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Tokens with which clusters join.
    #[command(subcommand)]
    Token(online::token::Command),
    /// The clusters of the ClusterSet.
    #[command(subcommand)]
    Cluster(online::cluster::Command),
    /// Who may do what at the hub.
    #[command(subcommand)]
    User(online::user::Command),
    /// Who changed what, and what was refused to whom; the newest first.
    Audit(online::audit::Audit),
    /// Write objects of the federation to the hub.
    Apply(online::object::Apply),
    /// Read objects of the federation from the hub.
    Get(online::object::Get),
    /// Delete objects of the federation.
    Delete(online::object::Delete),
    Describe(online::describe::Describe),
    Status(online::status::Status),
    /// The nodes of clusters.
    #[command(subcommand)]
    Node(online::node::Command),
    Wait(online::wait::Wait),
    /// Print the version of this command, and of the hub.
    Version(online::version::Version),
    /// Print the completion script of a shell.
    ///
    /// bash: source <(hanse completion bash). zsh: hanse completion zsh > "${fpath[1]}/_hanse".
    /// fish: hanse completion fish > ~/.config/fish/completions/hanse.fish
    Completion {
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let context = cli.globals.context.as_deref().filter(|path| !path.as_os_str().is_empty());
    let outcome = match cli.command {
        Command::Policy(command) => command.run(context),
        Command::Token(command) => command.run(context),
        Command::Cluster(command) => command.run(context),
        Command::User(command) => command.run(context),
        Command::Audit(command) => command.run(context),
        Command::Apply(command) => command.run(context),
        Command::Get(command) => command.run(context),
        Command::Delete(command) => command.run(context),
        Command::Describe(command) => command.run(context),
        Command::Status(command) => command.run(context),
        Command::Node(command) => command.run(context),
        Command::Wait(command) => command.run(context),
        Command::Version(command) => command.run(context),
        Command::Completion { shell } => print_completion(shell),
    };
    outcome.unwrap_or_else(|error| {
        // A reader that closed the pipe (`| head`) is not a failure. Commands with a verdict handle it themselves.
        if output::is_reader_gone(&error) {
            return ExitCode::SUCCESS;
        }
        output::note(format_args!("hanse: {error:#}"));
        ExitCode::FAILURE
    })
}

/// Into memory first: the generator panics when what it writes to fails.
fn print_completion(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "hanse", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}
