//! `hanse policy explain`: the verdict of policy on packets, with the rules that decide.

use std::collections::BTreeSet;
use std::io::{BufRead, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use hanse_policy::explain::answer::AnswerVerdict;
use hanse_policy::explain::{AnswerLine, Explainer, QueryEnd, Question};
use serde::Serialize;

use super::answer::write_answer;
use super::input;
use super::live;
use super::load::Sources;
use crate::output::{self, Format};

/// Evaluate packets, and show which rule decides.
///
/// Each line of the queries has one line of output, in the same order. With --cluster, the answers come from directories of
/// manifests. Without it, they come from the members of the running federation: the member of the source evaluates egress, that
/// of the destination ingress.
///
/// The answer is the verdict of policy. Before all policy, the kernel also allows traffic from a node to its own pods.
///
/// Workloads that do not run are queried as "KIND/NAME", with --cluster only: "deployment/web", "raycluster/train/head". The
/// addresses of their pods are unknown: if rules for nets make a difference, the verdict is `depends`, and `dependsOn` explains
/// it. --pod-net limits the possible addresses.
///
/// A query to a Service, by name or by one of its addresses, has an answer for each backend, on the backend's port.
///
/// Exits 1 if a query has no answer, if no query has a known endpoint, if there are no queries, or if an object was refused.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
JSON, one object a line: {\"verdict\": \"allow|deny|depends\", \"egress\": {\"verdict\", \"trace\", \"decidedBy\"}, \
\"ingress\": …, \"staged\": …, \"form\", \"neitherEndKnown\": true, \"notRunning\": [\"CLUSTER/NAMESPACE/KIND/NAME\"], \
\"dependsOn\": \"…\", \"service\": {\"name\", \"headless\", \"backends\": [{\"to\", \"port\", \"answer\" or \"error\"}]}}, or \
{\"error\"}. Keys that do not apply are absent. `decidedBy` has each step that decides, where the verdict is `depends`.

Examples:
  printf %s '{\"from\":{\"namespace\":\"shop\",\"pod\":\"deployment/web\"},' \\
    '\"to\":{\"namespace\":\"shop\",\"pod\":\"deployment/db\"},\"port\":5432}' |
    hanse policy explain --cluster shop=manifests/ --queries -
  printf %s '{\"from\":{\"namespace\":\"shop\",\"pod\":\"deployment/web\"},' \\
    '\"to\":{\"service\":\"shop/db\"},\"port\":5432}' |
    hanse policy explain --cluster shop=manifests/ --queries - --pod-net 10.244.0.0/16")]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// Queries, one JSON object per line; `-` is standard input. `{"from":{"cluster","namespace","pod"}|{"ip"},
    /// "to":…|{"cluster","namespace","service"},"protocol":"TCP|UDP|SCTP|ICMP|ICMPv6|<number>","port":N,"sourcePort":N,"icmp":{"type","code"},
    /// "ipVersion":4|6}`. Defaults: protocol TCP, source port 40000, `icmp` an echo
    /// request, its code 0, and an IP version that both ends have.
    #[arg(long, value_name = "FILE.jsonl")]
    queries: PathBuf,
    /// Use the reference evaluator, which is slower and gives the same answers.
    #[arg(long, requires = "clusters")]
    reference: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Maximum length of a query. A longer line is malformed. A query has a few hundred bytes.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// Rows of a table that are printed together, in columns of one width: about 100 KiB.
const BLOCK_ROWS: usize = 500;
/// Queries in one request to a running federation.
const LIVE_QUERIES: usize = live::BATCH;

const NEITHER_END_KNOWN: &str = "neither end is a known endpoint: no policy applies";

#[derive(Serialize)]
struct ErrorLine {
    error: String,
}

/// Prints answers as they arrive.
struct Printer {
    output: Format,
    out: std::io::BufWriter<output::Stdout>,
    table: output::Table,
    /// For live answers: clusters, with Hanse's own streams there.
    own_streams: BTreeSet<(String, String)>,
    /// Notes on verdicts of the current block, which the table refers to by number.
    notes: Vec<String>,
    /// The number of the first of them.
    first_note: usize,
    /// The width of each column, once a block was printed.
    widths: Option<Vec<u16>>,
    /// Numbers of queries, of those without an answer, and of those without a known endpoint.
    questions: usize,
    unanswered: usize,
    about_nothing: usize,
    incomplete: bool,
}

impl Printer {
    fn new(output: Format) -> Self {
        Self {
            output,
            out: std::io::BufWriter::with_capacity(1 << 16, output::stdout()),
            table: output::table(["FROM", "TO", "VERDICT", "STAGED", "EGRESS", "INGRESS"]),
            own_streams: BTreeSet::new(),
            notes: Vec::new(),
            first_note: 1,
            widths: None,
            questions: 0,
            unanswered: 0,
            about_nothing: 0,
            incomplete: false,
        }
    }

    fn print(&mut self, question: Option<&Question>, mut answer: Result<AnswerLine<'_>, String>) -> anyhow::Result<()> {
        self.questions += 1;
        if let (Ok(line), Some(question)) = (&mut answer, question) {
            line.neither_end_known =
                [&question.from, &question.to].iter().all(|it| matches!(it, QueryEnd::Address { .. }))
                    && line.service.is_none()
                    && line.egress.verdict == AnswerVerdict::None
                    && line.ingress.verdict == AnswerVerdict::None;
        }
        self.unanswered += usize::from(answer.is_err());
        self.about_nothing += usize::from(answer.as_ref().is_ok_and(|line| line.neither_end_known));
        match (self.output, answer) {
            (Format::Table, answer) => self.add(question, answer)?,
            (format, Ok(line)) => write_answer(&mut self.out, format, self.incomplete, &line)?,
            (format, Err(error)) => output::write(&mut self.out, format, &ErrorLine { error })?,
        }
        Ok(())
    }

    /// Adds the rows of one answer.
    fn add(&mut self, question: Option<&Question>, answer: Result<AnswerLine<'_>, String>) -> anyhow::Result<()> {
        let end = |place: Option<&QueryEnd>, not_running: &[String]| {
            place.map_or(String::new(), |place| title(place, not_running))
        };
        let (from, to) = (question.map(|it| &it.from), question.map(|it| &it.to));
        match answer {
            Ok(line) => {
                for asked in &line.asked {
                    let streams = asked.own_streams.iter().cloned();
                    self.own_streams.extend(streams.map(|stream| (asked.cluster.clone(), stream)));
                }
                let to = match &line.service {
                    Some(service) => format!("service {}", service.name),
                    None => end(to, &line.not_running),
                };
                self.row(end(from, &line.not_running), to, &line);
                for backend in line.service.iter().flat_map(|service| &service.backends) {
                    match (&backend.answer, &backend.error) {
                        (Some(answer), _) => {
                            let to = title(&backend.to, &answer.not_running);
                            self.row(String::new(), format!("  {to}, port {}", backend.port), answer);
                        }
                        (None, error) => {
                            let error = format!("error: {}", error.as_deref().unwrap_or_default());
                            self.table.add_row([String::new(), format!("  {}", backend.to), error]);
                        }
                    }
                }
            }
            Err(error) => self.table.add_row([end(from, &[]), end(to, &[]), format!("error: {error}")]),
        }
        match self.table.row_count() >= BLOCK_ROWS {
            true => self.print_block(),
            false => Ok(()),
        }
    }

    fn row(&mut self, from: String, to: String, line: &AnswerLine<'_>) {
        let staged = line.staged.egress.is_some().then(|| line.staged.verdict.to_string());
        let staged = staged.unwrap_or_else(|| "-".to_owned());
        let depends_on = line.depends_on.as_ref().map(|note| format!("depends on {note}"));
        let note = depends_on.or_else(|| line.neither_end_known.then(|| NEITHER_END_KNOWN.to_owned()));
        let number = note.map(|note| {
            self.notes.push(note);
            format!(" [{}]", self.first_note + self.notes.len() - 1)
        });
        let verdict = format!("{}{}", line.verdict, number.unwrap_or_default());
        self.table.add_row([from, to, verdict, staged, line.egress.reason(), line.ingress.reason()]);
    }

    /// Prints the rows so far with their notes, so that memory does not grow with the number of queries.
    fn print_block(&mut self) -> anyhow::Result<()> {
        writeln!(self.out, "{}", self.table)?;
        for (number, note) in (self.first_note..).zip(&self.notes) {
            writeln!(self.out, "[{number}] {}", output::one_line(note))?;
        }
        self.first_note += self.notes.len();
        self.notes.clear();
        let widths = self.widths.get_or_insert_with(|| self.table.widths());
        self.table = output::continued(widths);
        Ok(self.out.flush()?)
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        if self.output == Format::Table {
            if !self.table.is_empty() || self.widths.is_none() {
                self.print_block()?;
            }
            if !self.own_streams.is_empty() {
                writeln!(self.out, "Evaluated before all tiers, Hanse's own streams:")?;
            }
            for (cluster, stream) in &self.own_streams {
                let line = format!("  {cluster}: {stream}");
                writeln!(self.out, "{}", output::one_line(&line))?;
            }
        }
        Ok(self.out.flush()?)
    }
}

/// An end of a packet, and whether it runs.
fn title(place: &QueryEnd, not_running: &[String]) -> String {
    let place = place.to_string();
    let found = not_running.iter().find_map(|it| {
        let (name, why) = it.split_once(" (").map_or((it.as_str(), None), |(name, why)| (name, why.strip_suffix(')')));
        name.strip_suffix(&*place).filter(|before| before.is_empty() || before.ends_with('/')).map(|_| why)
    });
    match found {
        None => place,
        Some(None) => format!("{place} (not running)"),
        Some(Some(why)) => format!("{place} (not running, {why})"),
    }
}

impl Arguments {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let mut input = input::open(&self.queries)?;
        let mut number = 0;
        let lines = std::iter::from_fn(|| next_line(&mut input, &mut number).transpose());
        let lines = lines.map(|line| line.with_context(|| format!("read {}", self.queries.display())));
        let mut printer = Printer::new(self.output);
        if self.sources.is_live()? {
            let answered = self.answer_live(context, lines, &mut printer);
            return self.end(answered, printer, None);
        }
        if self.queries == Path::new("-") && self.sources.stdin_uses() > 0 {
            anyhow::bail!("standard input (`-`) can be used once: read the queries or the manifests from a file");
        }
        let loaded = self.sources.load()?;
        printer.incomplete = loaded.is_incomplete();
        let explainer = Explainer::new(&loaded.policies, &loaded.inventory).by_reference(self.reference);
        let explainer = explainer.with_pod_nets(&self.sources.pod_nets);
        let answer_all = |printer: &mut Printer| {
            for line in lines {
                let question = self.read(&line?);
                let explained = question.as_ref().map_err(Clone::clone);
                let explained =
                    explained.and_then(|question| explainer.answer(question).map_err(|error| error.to_string()));
                let answer = explained.as_ref().map(|it| it.line()).map_err(Clone::clone);
                printer.print(question.as_ref().ok(), answer)?;
            }
            Ok(())
        };
        let answered = answer_all(&mut printer);
        self.end(answered, printer, loaded.incomplete_line())
    }

    /// Queries the members, in requests of the maximum size.
    fn answer_live(
        &self,
        context: Option<&Path>,
        mut lines: impl Iterator<Item = anyhow::Result<Line>>,
        printer: &mut Printer,
    ) -> anyhow::Result<()> {
        let mut session = live::Session::open(context)?;
        loop {
            let batch = lines.by_ref().take(LIVE_QUERIES).collect::<anyhow::Result<Vec<Line>>>()?;
            if batch.is_empty() {
                return Ok(());
            }
            let questions: Vec<Result<Question, String>> = batch.iter().map(|line| self.read(line)).collect();
            let queries: Vec<String> = batch.into_iter().map(|line| line.text).collect();
            session.explain(&queries, |at, answer| {
                let question = questions[at].as_ref();
                printer.print(question.ok(), question.map_err(Clone::clone).and(answer))
            })?;
        }
    }

    fn read(&self, line: &Line) -> Result<Question, String> {
        let malformed = |error| format!("malformed query: {}:{}: {error}", self.queries.display(), line.number);
        input::from_json(&line.text).map_err(malformed)
    }

    fn end(
        &self,
        answered: anyhow::Result<()>,
        mut printer: Printer,
        incomplete: Option<String>,
    ) -> anyhow::Result<ExitCode> {
        if answered.is_ok() && printer.questions == 0 {
            anyhow::bail!("{}: no queries found", self.queries.display());
        }
        // Among others, such a query is marked; alone it is a mistake.
        let all_about_nothing = printer.about_nothing == printer.questions;
        let failed = printer.unanswered > 0 || printer.incomplete || all_about_nothing;
        let printed = answered.and_then(|()| printer.finish()).and_then(|()| match self.output {
            Format::Table => incomplete.map_or(Ok(()), output::line),
            Format::Json | Format::Yaml => Ok(()),
        });
        output::exit(printed, failed)
    }
}

/// A line of the queries, with its number in the file.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    number: usize,
    text: String,
}

/// The next line that is not blank; `number` counts all lines. Invalid UTF-8 is replaced, so that only its own line has no
/// answer.
fn next_line(input: &mut impl BufRead, number: &mut usize) -> std::io::Result<Option<Line>> {
    loop {
        let mut bytes = Vec::new();
        if input.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes)? == 0 {
            return Ok(None);
        }
        if bytes.len() as u64 == MAX_LINE_BYTES && !bytes.ends_with(b"\n") {
            input.skip_until(b'\n')?;
        }
        *number += 1;
        let line = String::from_utf8_lossy(&bytes);
        let text = line.trim_start_matches('\u{feff}').trim_end();
        if !text.is_empty() {
            return Ok(Some(Line { number: *number, text: text.to_owned() }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_cannot_be_read_leaves_its_neighbours() {
        let long = "x".repeat(usize::try_from(MAX_LINE_BYTES).expect("small") + 7);
        let text = ["\u{feff}{\"a\":1}\r\n\n \n", &long, "\nb\n"].concat();
        let mut input = &[text.as_bytes(), b"\xff\nlast"].concat()[..];
        let mut number = 0;
        let mut next = || next_line(&mut input, &mut number).expect("in memory");
        let line = |number, text: &str| Some(Line { number, text: text.to_owned() });
        assert_eq!(next(), line(1, "{\"a\":1}"));
        assert_eq!(next().map(|line| (line.number, line.text.len() as u64)), Some((4, MAX_LINE_BYTES)));
        assert_eq!(next(), line(5, "b"));
        assert_eq!(next(), line(6, "\u{fffd}"));
        assert_eq!(next(), line(7, "last"));
        assert_eq!(next(), None);
    }
}
