//! Settings of a daemon: from the command line, the environment and a file, in this order of precedence.
//!
//! Every long option of the subcommand `run` can be given in three ways: `--agent-listen 10.0.0.1:7500`,
//! `HANSE_MEMBER_AGENT_LISTEN=10.0.0.1:7500`, and `agent-listen: 10.0.0.1:7500` in the YAML file of `--config`. The first that is
//! given wins as a whole: lists are not merged. What is given nowhere has the default that `--help` shows. An empty variable counts as
//! absent.

mod file;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches, ValueHint};

use self::file::Takes;

/// The subcommand that takes settings.
const RUN: &str = "run";
const CONFIG: &str = "config";

/// An option that is not on the command line.
struct Injected {
    /// As on the command line.
    option: OsString,
    /// The option's name, with its dashes.
    name: String,
    /// The variable, or the file with the key.
    from: String,
}

/// Reads the command line, the environment and the settings file of this process. Ends the process with a message where they
/// are wrong, and where help is requested. `command_line_only`: options of `run` that are not settings.
pub fn parse<C: CommandFactory + FromArgMatches>(command_line_only: &[&str]) -> C {
    // A variable that is empty is usually an optional value of a template.
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    match parse_from(std::env::args_os().collect(), &variable, command_line_only) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    }
}

fn parse_from<C: CommandFactory + FromArgMatches>(
    mut arguments: Vec<OsString>,
    variable: &dyn Fn(&str) -> Option<OsString>,
    command_line_only: &[&str],
) -> Result<C, clap::Error> {
    let mut command = with_config(C::command());
    // The first reading only finds the subcommand and the file.
    let early = command.clone().ignore_errors(true).try_get_matches_from(&arguments);
    let run = early.as_ref().ok().and_then(|early| early.subcommand_matches(RUN));
    let path = run.and_then(|run| run.get_one::<PathBuf>(CONFIG).cloned());
    let path = path.or_else(|| variable(&variable_of(&command, CONFIG)).map(PathBuf::from)).filter(|_| run.is_some());
    let wrong = |text| command.clone().error(ErrorKind::InvalidValue, text);
    let settings = Settings { command: &command, arguments: &arguments, variable, command_line_only };
    let file = path.as_deref().map(|path| Ok((path, settings.read(path)?))).transpose().map_err(wrong)?;
    // Options of the program come before the subcommand, and those of `run` directly after it: what follows may end the options with `--`.
    let of_program = settings.injected(&command, file.as_ref()).map_err(wrong)?;
    let of_run = match (run, command.find_subcommand(RUN)) {
        (Some(_), Some(run)) => settings.injected(run, file.as_ref()).map_err(wrong)?,
        _ => Vec::new(),
    };
    if let Some(at) = arguments.iter().skip(1).position(|argument| argument == RUN) {
        let at = at + 2;
        arguments.splice(at..at, of_run.iter().map(|it| it.option.clone()));
    }
    let after_program = arguments.len().min(1);
    arguments.splice(after_program..after_program, of_program.iter().map(|it| it.option.clone()));
    let parsed = command.try_get_matches_from_mut(&arguments).and_then(|mut it| C::from_arg_matches_mut(&mut it));
    parsed.map_err(|error| {
        match of_program.iter().chain(&of_run).find(|injected| is_about(&error, &injected.name)) {
            // The user has not typed this option.
            Some(injected) => command.error(error.kind(), format!("{}: {}", injected.from, message(&error))),
            None => error.format(&mut command),
        }
    })
}

/// Whether an option is what is wrong.
fn is_about(error: &clap::Error, name: &str) -> bool {
    let names = |text: &str| text.split([' ', '=']).any(|word| word == name);
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(text)) => names(text),
        Some(ContextValue::Strings(texts)) => texts.iter().any(|text| names(text)),
        _ => false,
    }
}

/// The message of an error alone, without the usage.
fn message(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let ends = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|end| text.find(end)).min();
    text[..ends.unwrap_or(text.len())].trim_end().to_owned()
}

/// The environment variable of an option.
fn variable_of(command: &Command, long: &str) -> String {
    format!("{}_{long}", command.get_name()).to_uppercase().replace('-', "_")
}

/// Adds `--config` to `run`.
fn with_config(command: Command) -> Command {
    let (data, config) = (variable_of(&command, "data"), variable_of(&command, CONFIG));
    command.mut_subcommand(RUN, |run| {
        let arg = Arg::new(CONFIG)
            .long(CONFIG)
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .value_hint(ValueHint::FilePath)
            .help("Read settings from this YAML file");
        let after = format!(
            "Every option can also be set by an environment variable, such as {data} for --data and {config} for --config, and in \
             the YAML file of --config, by its name without the dashes. Options take precedence over environment variables, and \
             these over the file. Options that can be repeated are lists: separated by commas in a variable, a YAML list in the \
             file. An empty variable counts as absent.\n\nThe variable HANSE_LOG sets what is logged, by level and module, such as \
             debug, or info,hanse_identity=debug. Default: info."
        );
        run.arg(arg).after_help(after)
    })
}

struct Settings<'a> {
    command: &'a Command,
    arguments: &'a [OsString],
    variable: &'a dyn Fn(&str) -> Option<OsString>,
    command_line_only: &'a [&'a str],
}

impl Settings<'_> {
    /// The options of a command that are settings.
    fn known<'a>(&self, command: &'a Command) -> impl Iterator<Item = (&'a str, &'a Arg)> {
        let settings = command.get_arguments().filter_map(|arg| Some((arg.get_long()?, arg)));
        settings.filter(|(long, _)| ![CONFIG, "help", "version"].contains(long))
    }

    fn read(&self, path: &Path) -> Result<BTreeMap<String, Vec<String>>, String> {
        let run = self.command.find_subcommand(RUN).expect("the command has `run`");
        let known = || self.known(run).chain(self.known(self.command));
        file::read(path, &|name| match known().find(|(long, _)| *long == name) {
            Some((long, _)) if self.command_line_only.contains(&long) => Err(only_on_command_line(long)),
            Some((_, arg)) if matches!(arg.get_action(), ArgAction::Append) => Ok(Takes::List),
            Some(_) => Ok(Takes::One),
            None => {
                let names = known().map(|(long, _)| long).filter(|long| !self.command_line_only.contains(long));
                let names: Vec<&str> = names.collect();
                Err(format!("unknown setting; the settings are: {}", names.join(", ")))
            }
        })
    }

    /// The options of a command that the environment or the file has, and not the command line.
    fn injected(
        &self,
        command: &Command,
        file: Option<&(&Path, BTreeMap<String, Vec<String>>)>,
    ) -> Result<Vec<Injected>, String> {
        let mut injected = Vec::new();
        for (long, arg) in self.known(command) {
            let name = format!("--{long}");
            let is_name = |argument: &OsString| argument.to_str().is_some_and(|it| it.split('=').next() == Some(&name));
            if self.arguments.iter().any(is_name) {
                continue;
            }
            let variable = variable_of(self.command, long);
            let from_variable = (self.variable)(&variable).map(|value| match arg.get_action() {
                ArgAction::Append => items(&value),
                _ => vec![value],
            });
            let (values, from) = match (from_variable.filter(|values| !values.is_empty()), file) {
                (Some(_), _) if self.command_line_only.contains(&long) => {
                    return Err(format!("{variable}: {}", only_on_command_line(long)));
                }
                (Some(values), _) => (values, variable),
                (None, Some((path, settings))) => {
                    let Some(values) = settings.get(long) else { continue };
                    (values.iter().map(OsString::from).collect(), format!("{}: {long}", path.display()))
                }
                (None, None) => continue,
            };
            for value in values {
                let option = if matches!(arg.get_action(), ArgAction::SetTrue) {
                    match as_bool(&value.to_string_lossy()) {
                        Some(true) => name.clone().into(),
                        Some(false) => continue,
                        None => return Err(format!("{from}: expected true or false")),
                    }
                } else {
                    let mut option = OsString::from(format!("{name}="));
                    option.push(value);
                    option
                };
                injected.push(Injected { option, name: name.clone(), from: from.clone() });
            }
        }
        Ok(injected)
    }
}

fn only_on_command_line(long: &str) -> String {
    format!("--{long} is only an option of the command line")
}

/// The items of a list in a variable.
fn items(value: &OsString) -> Vec<OsString> {
    let text = value.to_string_lossy();
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(OsString::from).collect()
}

fn as_bool(text: &str) -> Option<bool> {
    match &*text.trim().to_ascii_lowercase() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// Parses an option of the form HOST:PORT, so that a mistake is found at the start.
///
/// # Errors
/// When there is no host or no port.
pub fn host_port(text: &str) -> Result<String, String> {
    let text = text.trim();
    let is_host = |host: &str| !host.is_empty() && !host.contains(|it: char| it.is_whitespace() || "/,".contains(it));
    match text.rsplit_once(':') {
        Some((host, port)) if is_host(host) && port.parse::<u16>().is_ok_and(|port| port > 0) => Ok(text.to_owned()),
        _ => Err("expected HOST:PORT, such as hub.example:7443 or [2001:db8::1]:7443".to_owned()),
    }
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
        #[arg(long, required = true, value_parser = host_port)]
        hub: Vec<String>,
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(5..=60))]
        lease_seconds: u64,
        #[arg(long)]
        listen: Option<SocketAddr>,
        #[arg(long)]
        no_flows: bool,
        #[arg(long)]
        restored: bool,
    }

    fn parse(file: Option<&str>, arguments: &[&str]) -> Result<(String, Run), String> {
        parse_with(file, &[], arguments)
    }

    fn parse_with(file: Option<&str>, variables: &[(&str, &str)], arguments: &[&str]) -> Result<(String, Run), String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("settings.yaml");
        let mut all: Vec<OsString> = ["hanse-test", RUN].map(OsString::from).to_vec();
        all.extend(arguments.iter().map(OsString::from));
        if let Some(file) = file {
            std::fs::write(&path, file).expect("written");
            all.extend([OsString::from("--config"), path.clone().into()]);
        }
        let variable = |name: &str| {
            let value = variables.iter().find(|(it, _)| name.strip_prefix("HANSE_TEST_") == Some(it));
            value.map(|(_, value)| OsString::from(value)).filter(|value| !value.is_empty())
        };
        let cli: Cli = parse_from(all, &variable, &["restored"]).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.render().to_string()
        })?;
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
        assert_eq!(run, Run { data: "/d".into(), hub, lease_seconds: 40, listen, no_flows: true, restored: false });
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
            ("x: {a: b}\n", "listen, no-flows, log-format at line 1"),
            ("config: x\n", "config: unknown setting"),
            ("lease-seconds: 4\n", "settings.yaml: lease-seconds: invalid value '4' for '--lease-seconds"),
            (
                "lease-seconds: [4]\n",
                "settings.yaml: lease-seconds: invalid type: sequence, expected one value at line 1",
            ),
            ("no-flows: 2\n", "settings.yaml: no-flows: expected true or false"),
            ("listen: here\n", "settings.yaml: listen: invalid value 'here' for '--listen"),
            ("lease-seconds: 10\nlease-seconds: 11\n", "lease-seconds: duplicate setting at line 2"),
            ("data: {a: b}\n", "settings.yaml: data: invalid type: map, expected one value at line 1"),
            (
                "lease-seconds: 10\ndata:\n",
                "settings.yaml: data: expected a value: remove the setting, or set it at line 2",
            ),
            ("hub: [x:1, ~]\n", "settings.yaml: hub[1]: expected a value"),
            ("hub: {a: b}\n", "settings.yaml: hub: expected a value or a list, not a map at line 1"),
            ("restored: true\n", "settings.yaml: restored: --restored is only an option of the command line"),
            ("data: '--hub'\nhub: x\n", ""),
        ] {
            match parse(Some(file), &["--data", "d", "--hub", "x:1"]) {
                Err(error) => {
                    assert!(!expected.is_empty() && error.contains(expected), "{file}: {error}");
                    assert!(error.matches("For more information").count() <= 1, "{file}: {error}");
                }
                Ok(_) => assert!(expected.is_empty(), "{file}"),
            }
        }
        let missing = parse(Some("hub: a:1\n"), &[]).expect_err("data is missing");
        assert!(missing.contains("--data"), "{missing}");
        let absent = parse(None, &["--config", "/nonexistent/x.yaml"]).expect_err("absent");
        assert!(absent.contains("/nonexistent/x.yaml"), "{absent}");
    }

    #[test]
    fn file_keeps_the_text_of_values_that_look_like_numbers() {
        for text in ["1e3", "1.10", "0x10", "12e0", "007", "'1e3'", "yes"] {
            let (_, run) = parse(Some(&format!("data: {text}\nhub: [1e3:1]\n")), &[]).expect("complete");
            let expected = Path::new(text.trim_matches('\''));
            assert_eq!((&*run.data, &*run.hub), (expected, &["1e3:1".to_owned()][..]));
        }
        for (text, expected) in [("true", true), ("yes", true), ("1", true), ("off", false), ("0", false)] {
            let file = format!("no-flows: {text}\n");
            assert_eq!(parse(Some(&file), &["--data", "d", "--hub", "x:1"]).expect("complete").1.no_flows, expected);
        }
    }

    #[test]
    fn prefers_options_to_the_environment_and_the_environment_to_the_file() {
        let variables = [
            ("DATA", "/e"),
            ("HUB", " e:1, e:2 ,,"),
            ("LEASE_SECONDS", "50"),
            ("LOG_FORMAT", "text"),
            ("NO_FLOWS", "0"),
        ];
        let (log_format, run) = parse_with(Some(FILE), &variables, &["--lease-seconds", "60"]).expect("complete");
        let hub = vec!["e:1".to_owned(), "e:2".to_owned()];
        let listen = Some("127.0.0.1:1".parse().expect("an address"));
        assert_eq!(run, Run { data: "/e".into(), hub, lease_seconds: 60, listen, no_flows: false, restored: false });
        assert_eq!(log_format, "text");
        // Empty is absent.
        let empty = ["DATA", "HUB", "LEASE_SECONDS", "LISTEN", "NO_FLOWS", "CONFIG", "LOG_FORMAT", "RESTORED"];
        let (_, run) = parse_with(Some(FILE), &empty.map(|name| (name, "")), &[]).expect("complete");
        assert_eq!((&*run.data, run.hub.len(), run.lease_seconds, run.no_flows), (Path::new("/d"), 2, 40, true));
        assert!(parse_with(None, &[("HUB", ", ")], &["--data", "d"]).is_err_and(|error| error.contains("--hub")));
        let missing = parse_with(None, &[("CONFIG", "/nonexistent/x.yaml")], &[]).expect_err("absent");
        assert!(missing.contains("/nonexistent/x.yaml"), "{missing}");
    }

    #[test]
    fn reports_the_variable_of_a_wrong_setting() {
        for (variable, value, expected) in [
            ("LISTEN", "foo", "error: HANSE_TEST_LISTEN: invalid value 'foo' for '--listen"),
            ("LEASE_SECONDS", "4", "HANSE_TEST_LEASE_SECONDS: invalid value '4'"),
            ("NO_FLOWS", "maybe", "HANSE_TEST_NO_FLOWS: expected true or false"),
            ("HUB", "a:1,b", "HANSE_TEST_HUB: invalid value 'b' for '--hub <HUB>': expected HOST:PORT"),
            ("RESTORED", "true", "HANSE_TEST_RESTORED: --restored is only an option of the command line"),
        ] {
            let given: &[&str] = if variable == "HUB" { &["--data", "d"] } else { &["--data", "d", "--hub", "x:1"] };
            let error = parse_with(None, &[(variable, value)], given).expect_err("wrong");
            assert!(error.contains(expected), "{error}");
            assert_eq!(error.matches("For more information").count(), 1, "{error}");
        }
        // The option is wrong, and not the variable, which does not count.
        let given = ["--data", "d", "--hub", "x:1", "--listen=foo"];
        let error = parse_with(None, &[("LISTEN", "127.0.0.1:1")], &given).expect_err("wrong");
        assert!(error.starts_with("error: invalid value 'foo'"), "{error}");
        assert!(parse(None, &["--data", "d", "--hub", "x:1", "--restored"]).expect("complete").1.restored);
    }

    #[test]
    fn address_has_a_host_and_a_port() {
        for good in ["hub:1", " 127.0.0.1:7443 ", "[::1]:7443", "a.b-c.example:65535"] {
            assert_eq!(host_port(good).as_deref(), Ok(good.trim()));
        }
        for bad in
            ["", "hub", "127.0.0.1", ":1", "hub:", "hub:0", "hub:65536", "hub:x", "a,b:1", "https://hub:1", "a b:1"]
        {
            assert!(host_port(bad).is_err(), "{bad}");
        }
    }
}
