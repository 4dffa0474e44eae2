//! The commands in the guide exist, with their options.

use std::collections::BTreeMap;

use super::pages;
use crate::english;
use crate::system::programs;

const PROGRAMS: [&str; 4] = ["hanse", "hanse-hub", "hanse-member", "hanse-agent"];

/// The commands of code blocks and code spans that begin with one of the programs, and what follows up to the end of the command.
fn commands(text: &str) -> Vec<String> {
    let mut code = Vec::new();
    let mut fenced = false;
    let text = text.replace("\\\n", " ");
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if fenced || line.starts_with("    ") {
            code.push(line.trim().to_owned());
        } else {
            code.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    let parts = code.iter().flat_map(|it| it.split(['|', ';', '&', '(', ')', '>', '<']));
    let parts =
        parts.map(|it| it.split(" -- ").last().unwrap_or_default().split(" # ").next().unwrap_or_default().trim());
    parts
        .filter(|it| PROGRAMS.iter().any(|program| it.starts_with(&format!("{program} "))))
        .map(str::to_owned)
        .collect()
}

/// What is wrong with a command, if anything.
fn fault(command: &str, help: &BTreeMap<String, String>) -> Option<String> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let is_command = |count: &usize| help.contains_key(&words[..*count].join(" "));
    let plain = words.iter().enumerate().skip(1).take_while(|(_, word)| !word.starts_with('-')).count() + 1;
    let depth = (1..=plain).rev().find(is_command)?;
    let title = words[..depth].join(" ");
    let text = &help[&title];
    if text.contains("\nCommands:\n") {
        let is_help = words.get(depth).is_none_or(|word| word.starts_with('-'));
        if !is_help {
            return Some(format!("{command}: {title} has no such command"));
        }
    }
    let options = words[depth..].iter().filter(|word| word.starts_with('-') && **word != "-");
    let known = |option: &&&str| {
        let name = option.split('=').next().unwrap_or_default();
        *name == *"--help" || text.split(|it: char| it.is_whitespace() || ",=<[".contains(it)).any(|it| it == name)
    };
    let unknown = options.into_iter().find(|option| !known(option));
    unknown.map(|option| format!("{command}: {title} has no option {option}"))
}

fn all_help() -> BTreeMap<String, String> {
    let mut texts = Vec::new();
    for program in PROGRAMS {
        english::help(&programs().join(program), &[], &mut texts);
    }
    texts.into_iter().collect()
}

#[test]
fn commands_of_the_guide_exist() {
    let help = all_help();
    let mut count = 0;
    let mut found = Vec::new();
    for (page, text) in pages().iter().filter(|(page, _)| !page.starts_with("reference")) {
        let commands = commands(text);
        count += commands.len();
        found.extend(commands.iter().filter_map(|it| fault(it, &help)).map(|fault| format!("{page}: {fault}")));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert!(count > 15, "{count} commands");
    for wrong in ["hanse policy guess x", "hanse status --loud", "hanse frobnicate", "hanse-hub run --operators"] {
        assert!(fault(wrong, &help).is_some(), "{wrong} is found");
    }
}
