//! The output of the demo.

use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Standard output, in colour on a terminal.
pub struct Screen {
    pub colour: bool,
    /// Measurements that differed from policy.
    wrong: AtomicUsize,
}

impl Screen {
    pub fn new() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { colour, wrong: AtomicUsize::new(0) }
    }

    /// How many measurements differed from policy so far.
    pub fn wrong(&self) -> usize {
        self.wrong.load(Ordering::Relaxed)
    }

    pub fn say(&self, text: &str) {
        println!("{text}");
    }

    pub fn title(&self, text: &str) {
        println!("\n{}", self.paint("1", text));
    }

    pub fn verdict(&self, text: &str, differences: &[String]) {
        self.wrong.fetch_add(differences.len(), Ordering::Relaxed);
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
        self.wrong.fetch_add(usize::from(!is_true), Ordering::Relaxed);
        let mark = if is_true { self.paint("32", "✔") } else { self.paint("31", "✘ not true for the packets:") };
        println!("  {mark} {text}");
    }

    /// Claims `success`, with the milliseconds that it took, or `failure` where it did not happen.
    pub fn claim_within(&self, took: Option<Duration>, failure: &str, success: impl FnOnce(u128) -> String) {
        match took {
            Some(took) => self.claim(&success(took.as_millis()), true),
            None => self.claim(failure, false),
        }
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
