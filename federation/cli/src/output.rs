//! How results are printed. `README.md` of this crate documents the JSON.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use comfy_table::presets;
use hanse_runtime::text;
use hanse_runtime::text::{Items, Versioned};
pub use hanse_runtime::text::{Stdout, one_line, stdout};
use serde::Serialize;

/// `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Default)]
pub enum Format {
    #[default]
    Table,
    Json,
    Yaml,
}

/// `-o` of commands that list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Default)]
pub enum ListFormat {
    #[default]
    Table,
    /// Table with more columns.
    Wide,
    /// Names only, one per line.
    Name,
    Json,
    Yaml,
}

impl ListFormat {
    /// The data format; `None` for text.
    pub fn data(self) -> Option<Format> {
        match self {
            Self::Json => Some(Format::Json),
            Self::Yaml => Some(Format::Yaml),
            Self::Table | Self::Wide | Self::Name => None,
        }
    }
}

/// A table without borders, as `kubectl` prints them: two spaces between columns, none at the ends of lines.
#[derive(Debug)]
pub struct Table {
    table: comfy_table::Table,
    /// The heading is a ruler, which is not shown.
    is_continued: bool,
}

/// One cell. Control characters and line breaks of its text are escaped.
#[derive(Debug)]
pub struct Cell(String);

impl Cell {
    /// A cell of several lines.
    pub fn lines<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> Self {
        let texts: Vec<String> = texts.into_iter().map(|text| one_line(text.as_ref()).into_owned()).collect();
        Self(texts.join("\n"))
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::lines([text])
    }
}

/// A table without a heading and with minimum widths, to continue a table that was printed before.
pub fn continued(widths: &[u16]) -> Table {
    let rulers = widths.iter().map(|width| "-".repeat(usize::from(*width)));
    Table { is_continued: true, ..table(rulers) }
}

pub fn table<T: Into<Cell>>(headings: impl IntoIterator<Item = T>) -> Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(headings.into_iter().map(|heading| heading.into().0));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    Table { table, is_continued: false }
}

impl Table {
    pub fn add_row<T: Into<Cell>>(&mut self, row: impl IntoIterator<Item = T>) {
        self.table.add_row(row.into_iter().map(|cell| cell.into().0));
    }

    pub fn is_empty(&self) -> bool {
        self.row_count() == 0
    }

    pub fn row_count(&self) -> usize {
        self.table.row_count()
    }

    /// The widths of the columns.
    pub fn widths(&self) -> Vec<u16> {
        self.table.column_max_content_widths()
    }

    pub fn print(&self) -> anyhow::Result<()> {
        writeln!(stdout(), "{self}")?;
        Ok(())
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.table.trim_fmt();
        f.write_str(match self.is_continued {
            true => text.split_once('\n').map_or("", |(_, rows)| rows),
            false => &text,
        })
    }
}

/// Prints `value` as JSON on one line, or as a YAML document.
pub fn print<T: Serialize + ?Sized>(format: Format, value: &T) -> anyhow::Result<()> {
    let mut out = std::io::BufWriter::new(stdout());
    write(&mut out, format, value)?;
    Ok(out.flush()?)
}

/// Writes `value` as JSON on one line, or as a YAML document. `out` escapes: see [`stdout`].
pub fn write<T: Serialize + ?Sized>(out: &mut impl std::io::Write, format: Format, value: &T) -> anyhow::Result<()> {
    match format {
        Format::Yaml => out.write_all(text::yaml(value)?.as_bytes())?,
        Format::Json | Format::Table => {
            // As an I/O error, so that a closed pipe is recognised.
            serde_json::to_writer(&mut *out, value).map_err(std::io::Error::from)?;
            out.write_all(b"\n")?;
        }
    }
    Ok(())
}

/// Prints one object with its version and kind.
pub fn object<T: Serialize + ?Sized>(format: Format, kind: &'static str, object: &T) -> anyhow::Result<()> {
    print(format, &Versioned::new(kind, object))
}

/// Prints one object with its version and kind, and `items`.
pub fn list<T: Serialize>(format: Format, kind: &'static str, items: &[T]) -> anyhow::Result<()> {
    object(format, kind, &Items { items })
}

/// Reports a change: in words for people, as an object of kind `Result` for programs.
pub fn done<T: Serialize + ?Sized>(format: Format, value: &T, words: impl std::fmt::Display) -> anyhow::Result<()> {
    match format {
        Format::Table => line(words),
        format => object(format, "Result", value),
    }
}

/// Whether standard error has JSON: one object a line, of kind `Note` or `Error`.
static JSON_ERRORS: AtomicBool = AtomicBool::new(false);

/// Makes [`note`] and [`error`] write JSON. Called once, when the command line is known.
pub fn use_json_errors() {
    JSON_ERRORS.store(true, Ordering::Relaxed);
}

fn has_json_errors() -> bool {
    JSON_ERRORS.load(Ordering::Relaxed)
}

/// Writes a warning or progress to standard error.
pub fn note(message: impl std::fmt::Display) {
    #[derive(Serialize)]
    struct Note {
        message: String,
    }
    match has_json_errors() {
        true => to_standard_error("Note", &Note { message: message.to_string() }),
        false => text::note(message),
    }
}

/// Writes a warning or progress that has items: below it for people, in one message for programs.
pub fn note_list(message: impl std::fmt::Display, items: &[String]) {
    if has_json_errors() {
        return note(format_args!("{message} {}", items.join("; ")));
    }
    note(message);
    items.iter().for_each(|item| note(format_args!("  {item}")));
}

/// The command line is malformed, in a way that the parser does not know. The exit code is 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Writes the error that the command fails with, as the last line of standard error.
pub fn error(error: &anyhow::Error, exit_code: u8) {
    match has_json_errors() {
        true => {
            let causes = error.chain().skip(1).map(ToString::to_string).collect();
            error_object(error.to_string(), causes, exit_code);
        }
        false => text::note(format_args!("hanse: {error:#}")),
    }
}

/// Writes an error of the command line to standard error.
pub fn usage_error(error: &clap::Error) {
    // Where standard error is closed, the exit code remains.
    if !has_json_errors() {
        return drop(error.print());
    }
    let text = match error.kind() {
        clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a subcommand is required".to_owned(),
        _ => error.render().to_string(),
    };
    // Without the usage and the advice for people, on one line.
    let text = ["\n\nUsage:", "\n\nFor more information"]
        .iter()
        .fold(&*text, |text, end| text.split(end).next().unwrap_or(text));
    let text = text.strip_prefix("error: ").unwrap_or(text).split_whitespace().collect::<Vec<_>>().join(" ");
    error_object(text, Vec::new(), u8::try_from(error.exit_code()).unwrap_or(2));
}

fn error_object(error: String, causes: Vec<String>, exit_code: u8) {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Error {
        error: String,
        causes: Vec<String>,
        exit_code: u8,
    }
    to_standard_error("Error", &Error { error, causes, exit_code });
}

fn to_standard_error<T: Serialize>(kind: &'static str, object: &T) {
    let json = serde_json::to_string(&Versioned::new(kind, object));
    text::note(json.expect("strings and numbers are JSON"));
}

/// The exit code of a command after its answer was printed. A reader that closed the pipe (`| head`) does not change it.
///
/// # Errors
/// When the answer could not be printed for another reason.
pub fn exit(printed: anyhow::Result<()>, failed: bool) -> anyhow::Result<ExitCode> {
    match printed {
        Err(error) if !is_reader_gone(&error) => Err(error),
        _ => Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }),
    }
}

/// Whether printing failed because the reader closed the pipe.
pub fn is_reader_gone(error: &anyhow::Error) -> bool {
    let causes = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    causes.into_iter().any(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints a line of text. A closed pipe is an error, not a panic.
pub fn line(text: impl std::fmt::Display) -> anyhow::Result<()> {
    text::line(text)?;
    Ok(())
}

/// Prints one field of a description.
pub fn field(name: &str, value: impl std::fmt::Display) -> anyhow::Result<()> {
    line(format_args!("{:<14} {value}", format!("{name}:")))
}

/// A duration in its largest units: `0.3s`, `45s`, `5m12s`, `23h4m`, `12d`.
pub fn length(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1}s", time.as_secs_f64()),
        10..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3_600..172_800 => format!("{}h{}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// The time until `seconds` (since 1970; 0 is none), by this machine's clock.
pub fn left(seconds: u64) -> String {
    if seconds == 0 {
        return "-".to_owned();
    }
    let Some(at) = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)) else { return "-".to_owned() };
    match at.duration_since(SystemTime::now()) {
        Ok(left) => format!("{} left", length(left)),
        Err(error) => format!("expired {} ago", length(error.duration())),
    }
}

/// `1 pod`, `2 pods`.
pub fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
