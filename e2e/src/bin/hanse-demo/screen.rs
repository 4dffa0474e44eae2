//! The output of the demo.

use std::io::IsTerminal as _;

/// Standard output, in colour on a terminal.
pub struct Screen {
    pub colour: bool,
}

impl Screen {
    pub fn new() -> Self {
        Self { colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }

    pub fn say(&self, text: &str) {
        println!("{text}");
    }

    pub fn title(&self, text: &str) {
        println!("\n{}", self.paint("1", text));
    }

    pub fn verdict(&self, text: &str, differences: &[String]) {
        if differences.is_empty() {
            println!("  {} {text}, all as policy demands", self.paint("32", "✔"));
        } else {
            println!("  {} {text}, {} differ from policy", self.paint("31", "✘"), differences.len());
            for difference in differences {
                println!("      {difference}");
            }
        }
    }

    pub fn claim(&self, text: &str, is_true: bool) {
        let mark = if is_true { self.paint("32", "✔") } else { self.paint("31", "✘ not true for the packets:") };
        println!("  {mark} {text}");
    }

    /// Prints a command's output, indented.
    pub fn quote(&self, text: &str) {
        for line in text.lines() {
            println!("  {}", line.trim_end());
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
