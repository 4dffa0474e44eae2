//! Settings of a daemon: from the command line, the environment and a file, in this order of precedence.
//!
//! Every long option of the subcommand `run` can be given in three ways: `--agent-listen 10.0.0.1:7500`,
//! `HANSE_MEMBER_AGENT_LISTEN=10.0.0.1:7500`, and `agent-listen: 10.0.0.1:7500` in the YAML file of `--config`. The first that is
//! given wins as a whole: lists are not merged. What is given nowhere has the default that `--help` shows.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches, ValueHint};
use serde::Deserialize;

/// The largest settings file: far above all options together.
const MAX_BYTES: u64 = 64 << 10;
/// The subcommand that takes settings.
const RUN: &str = "run";
const CONFIG: &str = "config";

/// A value of a settings file.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Value {
    List(Vec<Scalar>),
    One(Scalar),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Scalar {
    Bool(bool),
    Number(serde_yaml_ng::Number),
    Text(String),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

/// Reads the command line, the environment and the settings file of this process. Ends the process with a message where they
/// are wrong, and where help is requested.
pub fn parse<C: CommandFactory + FromArgMatches>() -> C {
    match parse_from(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    }
}

/// As [`parse`], of these arguments.
///
/// # Errors
/// What is wrong, in clap's form.
pub fn parse_from<C: CommandFactory + FromArgMatches>(mut arguments: Vec<OsString>) -> Result<C, clap::Error> {
    let mut command = with_settings(C::command());
    // The first reading only finds the file and what is given beside it.
    let early = command.clone().ignore_errors(true).try_get_matches_from(&arguments);
    let (mut file, mut injected) = (None, Vec::new());
    if let Ok(early) = &early
        && let Some(run) = early.subcommand_matches(RUN)
        && let Some(path) = run.get_one::<PathBuf>(CONFIG)
    {
        let settings = read(path).map_err(|text| command.error(ErrorKind::Io, text))?;
        injected =
            options(&command, run, path, settings).map_err(|text| command.error(ErrorKind::InvalidValue, text))?;
        file = Some(path.clone());
    }
    if let Some(at) = arguments.iter().skip(1).position(|argument| argument == RUN) {
        // Directly after the subcommand: what follows may end the options with `--`.
        let at = at + 2;
        arguments.splice(at..at, injected.iter().map(OsString::from));
    }
    let parsed = command.try_get_matches_from_mut(&arguments).and_then(|mut it| C::from_arg_matches_mut(&mut it));
    parsed.map_err(|error| match file {
        // The user has not typed this option: name the file.
        Some(file) if injected.iter().any(|option| mentions(&error, option)) => {
            let text = error.render().to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
            command.error(error.kind(), format!("in {}: {text}", file.display()))
        }
        _ => error.format(&mut command),
    })
}

/// Whether `error` is about an option that came from the file.
fn mentions(error: &clap::Error, option: &str) -> bool {
    let name = option.split_once('=').map_or(option, |(name, _)| name);
    error.context().any(|(_, value)| value.to_string().split([' ', '=']).any(|word| word == name))
}

/// Adds `--config` and the environment variables to `run`.
fn with_settings(command: Command) -> Command {
    let prefix = command.get_name().to_uppercase().replace('-', "_");
    let from_environment = |arg: Arg| {
        let Some(long) = arg.get_long() else { return arg };
        let variable = format!("{prefix}_{}", long.to_uppercase().replace('-', "_"));
        let arg = arg.env(variable).hide_env(true);
        // A variable has one value.
        if matches!(arg.get_action(), ArgAction::Append) { arg.value_delimiter(',') } else { arg }
    };
    command.mut_args(from_environment).mut_subcommand(RUN, |run| {
        let run = run.mut_args(from_environment);
        let config = Arg::new(CONFIG)
            .long(CONFIG)
            .env(format!("{prefix}_CONFIG"))
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .value_hint(ValueHint::FilePath)
            .help("Read settings from this YAML file");
        let after = format!(
            "Every option can also be set by an environment variable, such as {prefix}_DATA for --data, and in the YAML file of \
             --config, by its name without the dashes. Options take precedence over environment variables, and these over the \
             file. Options that can be repeated are lists: separated by commas in a variable, a YAML list in the file."
        );
        run.arg(config).after_help(after)
    })
}

fn read(path: &Path) -> Result<BTreeMap<String, Value>, String> {
    let failed = |error: std::io::Error| format!("read {}: {error}", path.display());
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > MAX_BYTES {
        return Err(format!("read {}: it has {size} bytes; a settings file has at most {MAX_BYTES}", path.display()));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(BTreeMap::new());
    }
    let failed = |error: serde_yaml_ng::Error| format!("read {}: {error}", path.display());
    // A map of another type would accept a key twice.
    let settings: serde_yaml_ng::Mapping = serde_yaml_ng::from_str(&text).map_err(failed)?;
    let read_one = |(name, value)| Ok((serde_yaml_ng::from_value(name)?, serde_yaml_ng::from_value(value)?));
    settings.into_iter().map(read_one).collect::<Result<_, _>>().map_err(failed)
}

/// The settings of the file as options, without those that are given on the command line or in the environment.
fn options(
    command: &Command,
    given: &ArgMatches,
    path: &Path,
    settings: BTreeMap<String, Value>,
) -> Result<Vec<String>, String> {
    let run = command.find_subcommand(RUN).expect("the command has `run`");
    let known =
        |name: &str| run.get_arguments().chain(command.get_arguments()).find(|arg| arg.get_long() == Some(name));
    let mut options = Vec::new();
    for (name, value) in settings {
        let at = || format!("{}: {name}", path.display());
        let Some(arg) = known(&name).filter(|arg| !["config", "help", "version"].contains(&arg.get_id().as_str()))
        else {
            let names: Vec<&str> = run.get_arguments().filter_map(Arg::get_long).filter(|it| *it != CONFIG).collect();
            return Err(format!("{}: unknown setting; the settings are: {}", at(), names.join(", ")));
        };
        let id = arg.get_id().as_str();
        let source = given.try_contains_id(id).ok().and_then(|_| given.value_source(id));
        let is_given = matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable));
        match (arg.get_action(), value) {
            (ArgAction::SetTrue, Value::One(Scalar::Bool(is_set))) => {
                if is_set && !is_given {
                    options.push(format!("--{name}"));
                }
            }
            (ArgAction::SetTrue, _) => return Err(format!("{}: expected true or false", at())),
            (ArgAction::Append, Value::List(values)) if !is_given => {
                options.extend(values.iter().map(|value| format!("--{name}={value}")));
            }
            (ArgAction::Append, Value::List(_)) => {}
            (_, Value::List(_)) => return Err(format!("{}: expected one value, not a list", at())),
            (_, Value::One(value)) if !is_given => options.push(format!("--{name}={value}")),
            (_, Value::One(_)) => {}
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "hanse-test", version)]
    struct Cli {
        #[arg(long, global = true, default_value = "text")]
        log_format: String,
        #[command(subcommand)]
        command: Sub,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Sub {
        Run(Run),
        Other,
    }

    #[derive(Debug, PartialEq, clap::Args)]
    struct Run {
        #[arg(long)]
        data: PathBuf,
        #[arg(long, required = true)]
        hub: Vec<String>,
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(5..=60))]
        lease_seconds: u64,
        #[arg(long)]
        listen: Option<SocketAddr>,
        #[arg(long)]
        no_flows: bool,
    }

    fn parse(file: Option<&str>, arguments: &[&str]) -> Result<(String, Run), String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("settings.yaml");
        let mut all: Vec<OsString> = ["hanse-test", RUN].map(OsString::from).to_vec();
        all.extend(arguments.iter().map(OsString::from));
        if let Some(file) = file {
            std::fs::write(&path, file).expect("written");
            all.extend([OsString::from("--config"), path.clone().into()]);
        }
        let cli: Cli = parse_from(all).map_err(|error| error.render().to_string())?;
        match cli.command {
            Sub::Run(run) => Ok((cli.log_format, run)),
            Sub::Other => panic!("run"),
        }
    }

    const FILE: &str =
        "data: /d\nhub: [a:1, 'b:2']\nlease-seconds: 40\nlisten: 127.0.0.1:1\nno-flows: true\nlog-format: json\n";

    #[test]
    fn takes_settings_from_the_file() {
        let (log_format, run) = parse(Some(FILE), &[]).expect("complete");
        let hub = vec!["a:1".to_owned(), "b:2".to_owned()];
        let listen = Some("127.0.0.1:1".parse().expect("an address"));
        assert_eq!(run, Run { data: "/d".into(), hub, lease_seconds: 40, listen, no_flows: true });
        assert_eq!(log_format, "json");
        assert!(parse(Some("# nothing\n"), &["--data", "d", "--hub", "x:1"]).is_ok());
    }

    #[test]
    fn prefers_options_to_the_file() {
        let given = ["--hub", "c:3", "--lease-seconds", "50", "--log-format", "text"];
        let (log_format, run) = parse(Some(FILE), &given).expect("complete");
        assert_eq!((run.hub, run.lease_seconds, &*log_format), (vec!["c:3".to_owned()], 50, "text"));
        // Defaults do not count as given.
        let (_, run) = parse(Some("lease-seconds: 41\n"), &["--data", "d", "--hub", "x:1"]).expect("complete");
        assert_eq!(run.lease_seconds, 41);
    }

    #[test]
    fn reports_the_file_and_the_key_of_a_wrong_setting() {
        for (file, expected) in [
            ("leases: 3\n", "settings.yaml: leases: unknown setting; the settings are: data, hub, lease-seconds"),
            ("config: x\n", "config: unknown setting"),
            ("lease-seconds: 4\n", "settings.yaml: invalid value '4' for '--lease-seconds"),
            ("lease-seconds: [4]\n", "lease-seconds: expected one value, not a list"),
            ("no-flows: 1\n", "no-flows: expected true or false"),
            ("listen: here\n", "settings.yaml: invalid value 'here' for '--listen"),
            ("lease-seconds: 10\nlease-seconds: 11\n", "duplicate"),
            ("data: {a: b}\n", "settings.yaml"),
            ("data: '--hub'\nhub: x\n", ""),
        ] {
            match parse(Some(file), &["--data", "d", "--hub", "x:1"]) {
                Err(error) => assert!(!expected.is_empty() && error.contains(expected), "{file}: {error}"),
                Ok(_) => assert!(expected.is_empty(), "{file}"),
            }
        }
        let missing = parse(Some("hub: a:1\n"), &[]).expect_err("data is missing");
        assert!(missing.contains("--data"), "{missing}");
        let absent = parse(None, &["--config", "/nonexistent/x.yaml"]).expect_err("absent");
        assert!(absent.contains("/nonexistent/x.yaml"), "{absent}");
    }

    #[test]
    fn adds_an_environment_variable_for_each_option() {
        let command = with_settings(Cli::command());
        let run = command.find_subcommand(RUN).expect("run");
        let variables: Vec<_> = run.get_arguments().filter_map(|arg| arg.get_env()?.to_str()).collect();
        let expected = ["DATA", "HUB", "LEASE_SECONDS", "LISTEN", "NO_FLOWS", "CONFIG"];
        assert_eq!(variables, expected.map(|name| format!("HANSE_TEST_{name}")));
    }
}
