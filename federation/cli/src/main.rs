//! `hanse`: the command-line tool of platform teams.
//!
//! Each group of commands is a module. [`policy`] reads directories of manifests; without `--cluster`, its `explain` and
//! `matrix` query the members of a running federation through the hub. [`install`] runs Helm. Commands print a table for people, or JSON or YAML for
//! programs. The keys of JSON and the exit codes are contracts: see `README.md` of this crate.

// Output may contain text from other parties. `hanse_runtime::text` escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use clap_complete::CompleteEnv;
use clap_complete::env::Shells;

mod completion;
mod install;
mod online;
mod output;
mod policy;

/// Zero-trust policy for a federation of Kubernetes clusters.
///
/// `hanse policy` reads directories of manifests and works without a hub. `hanse install`, `join` and `uninstall` call the API servers of
/// clusters, as the user of a kubeconfig. All other commands call a hub, as the user of a context file.
///
/// Exit codes: 0 success; 1 the answer is no, the command failed, or a manifest was refused; 2 the command line or an
/// expression is malformed.
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
  export HANSE_CONTEXT=./hub/admin.context      # written by hanse-hub init
  hanse token create --cluster train > train.token
  hanse apply -f policies/ --dry-run
  hanse apply -f policies/ && hanse wait -f policies/
  hanse status
  hanse describe fnp default-deny
  hanse node list --problems
  hanse policy lint --cluster train=manifests/train --federation policies/";

/// Options of every command.
#[derive(Debug, Clone, clap::Args)]
pub struct Globals {
    /// Context file: hub addresses, and the paths of CA, certificate and key.
    #[arg(long, global = true, env = "HANSE_CONTEXT", value_name = "FILE", value_parser = context_file)]
    context: Option<PathBuf>,
}

/// Accepts the empty string, which counts as not set.
fn context_file(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Evaluate policies and check manifests.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Manage the tokens that clusters join with.
    #[command(subcommand)]
    Token(online::token::Command),
    /// Manage the clusters of the ClusterSet.
    #[command(subcommand)]
    Cluster(online::cluster::Command),
    /// Manage users and their roles.
    #[command(subcommand)]
    User(online::user::Command),
    /// Show the audit log: changes and refused requests, newest first.
    Audit(online::audit::Audit),
    Apply(online::object::Apply),
    Get(online::object::Get),
    Delete(online::object::Delete),
    Describe(online::describe::Describe),
    Status(online::status::Status),
    /// Show the nodes of clusters.
    #[command(subcommand)]
    Node(online::node::Command),
    Wait(online::wait::Wait),
    Version(online::version::Version),
    Install(install::Install),
    Join(install::Join),
    Uninstall(install::Uninstall),
    /// Print the completion script of a shell.
    ///
    /// The script completes commands, options, and names from the hub of HANSE_CONTEXT. Load it when a shell starts:
    ///
    /// bash: source <(hanse completion bash)
    ///
    /// zsh: source <(hanse completion zsh)
    ///
    /// fish: hanse completion fish | source
    Completion {
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    // A shell that completes a command line calls with `COMPLETE` set: see `completion`.
    CompleteEnv::with_factory(Cli::command).var(COMPLETION_VARIABLE).complete();
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => {
            output::usage_error(&error);
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
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
        Command::Install(command) => command.run(),
        Command::Join(command) => command.run(),
        Command::Uninstall(command) => command.run(),
        Command::Completion { shell } => print_completion(shell),
    };
    outcome.unwrap_or_else(|error| {
        // A reader that closes the pipe (`| head`) is not a failure. Commands with a verdict handle this themselves.
        if output::is_reader_gone(&error) {
            return ExitCode::SUCCESS;
        }
        let code = if error.is::<output::UsageError>() { 2 } else { 1 };
        output::error(&error, code);
        ExitCode::from(code)
    })
}

/// Reads the command line, and turns JSON errors on where it has `-o json`.
fn parse() -> Result<Cli, clap::Error> {
    let mut command = Cli::command();
    let parsed = command.try_get_matches_from_mut(std::env::args_os()).and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command));
        cli.map(|cli| (cli, has_json_output(&matches)))
    });
    // A command line with an error has no matches.
    let is_json = match &parsed {
        Ok((_, is_json)) => *is_json,
        Err(error) => error.use_stderr() && wants_json_output(std::env::args()),
    };
    if is_json {
        output::use_json_errors();
    }
    parsed.map(|(cli, _)| cli)
}

fn has_json_output(matches: &ArgMatches) -> bool {
    if let Ok(Some(mut values)) = matches.try_get_raw("output") {
        return values.any(|value| value == "json");
    }
    matches.subcommand().is_some_and(|(_, matches)| has_json_output(matches))
}

/// Whether `-o json` is among the words of a command line, which may be malformed.
fn wants_json_output(words: impl Iterator<Item = String>) -> bool {
    let mut words = words.take_while(|word| word != "--").peekable();
    while let Some(word) = words.next() {
        // Short options without a value may come before: `-wo json`.
        let short = word.strip_prefix('-').filter(|rest| !rest.starts_with('-')).and_then(|rest| rest.split_once('o'));
        let value = match (word.strip_prefix("--output"), short) {
            (Some(value), _) => value,
            (None, Some((flags, value))) if flags.chars().all(|it| it == 'w') => value,
            (None, _) => continue,
        };
        let is_json = match value {
            "" => words.peek().is_some_and(|value| value == "json"),
            value => value.strip_prefix('=').unwrap_or(value) == "json",
        };
        if is_json {
            return true;
        }
    }
    false
}

const COMPLETION_VARIABLE: &str = "COMPLETE";

/// The script calls this program, found in `PATH`, for the candidates of each word.
fn print_completion(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    let (shells, name) = (Shells::builtins(), shell.to_string());
    let completer = shells.completer(&name).context("find the shell's completion script")?;
    completer.write_registration(COMPLETION_VARIABLE, "hanse", "hanse", "hanse", &mut script)?;
    std::io::stdout().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// The commands of `hanse` in lines of a shell, as words.
    fn commands(lines: &str) -> Vec<Vec<String>> {
        let (mut commands, mut word, mut quote) = (vec![Vec::new()], String::new(), None);
        let mut characters = lines.chars().peekable();
        while let Some(it) = characters.next() {
            match (quote, it) {
                (Some(open), it) if open == it => quote = None,
                (Some(_), it) => word.push(it),
                (None, '\'' | '"') => quote = Some(it),
                (None, '\\') => drop(characters.next_if_eq(&'\n')),
                (None, '#') if word.is_empty() => while characters.next_if(|it| *it != '\n').is_some() {},
                (None, it) if it.is_whitespace() || "|&;()>".contains(it) => {
                    if !word.is_empty() {
                        commands.last_mut().expect("never empty").push(std::mem::take(&mut word));
                    }
                    // What follows `>` is the name of a file.
                    if !matches!(it, ' ') {
                        commands.push(Vec::new());
                    }
                }
                (None, it) => word.push(it),
            }
        }
        commands.iter_mut().for_each(|words| words.retain(|it| it != "do"));
        commands.retain(|words| words.first().is_some_and(|it| it == "hanse"));
        commands
    }

    /// Help is wrapped at 100 columns or less: an example that is wrapped is not a command any more.
    fn check_examples(command: &clap::Command, count: &mut usize) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        if let Some((_, examples)) = help.split_once("Examples:\n") {
            for line in examples.lines() {
                assert!(line.chars().count() < 90, "{}: {line}", command.get_name());
            }
            let commands = commands(&format!("{examples}\n"));
            assert!(!commands.is_empty(), "{examples}");
            for words in commands {
                *count += 1;
                // A variable has the value of its name, in lower case.
                let words = words.iter().map(|it| it.strip_prefix('$').map_or_else(|| it.clone(), str::to_lowercase));
                let words: Vec<String> = words.collect();
                if let Err(error) = Cli::command().try_get_matches_from(&words) {
                    panic!("{words:?}: {error}");
                }
            }
        }
        command.get_subcommands().for_each(|command| check_examples(command, count));
    }

    #[test]
    fn examples_of_help_are_command_lines_that_are_not_wrapped() {
        let words = commands("  a | hanse get \\\n    \"x y\" > f && b # hanse c\n  for a in b; do hanse d; done\n");
        assert_eq!(words, [vec!["hanse", "get", "x y"], vec!["hanse", "d"]]);
        let mut count = 0;
        check_examples(&Cli::command(), &mut count);
        assert!(count > 40, "{count}");
    }

    #[test]
    fn json_output_is_recognised_in_a_malformed_command_line() {
        for (line, expected) in [
            ("get -o json --no-such-option", true),
            ("get -ojson x y z", true),
            ("get -o=json x y z", true),
            ("get -wo json x y z", true),
            ("status --output json --no-such-option", true),
            ("status --output=json --no-such-option", true),
            ("status -o yaml --no-such-option", false),
            ("status --no-such-option", false),
            ("status -o", false),
            ("policy selector --no-such-option -- -o json", false),
            ("apply -f foo json", false),
        ] {
            let words = line.split(' ').map(str::to_owned);
            assert_eq!(wants_json_output(words), expected, "{line}");
        }
    }
}
