//! Documents as Kubernetes' own decoder reads them: `e2e/oracle` is a program that is built of it.
//!
//! Documents are generated from a seed (`HANSE_SEED`), in every style that YAML has, and then damaged. Reading may differ from
//! Kubernetes' in one way only: it refuses what Kubernetes would pass over in silence.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::sync::Arc;

use hanse_api::document;
use hanse_api::{Manifests, assemble_cluster, read_bytes};
use serde::Deserialize;
use serde_json::Value;

use crate::worlds::Random;

mod write;

/// What became of a document.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Answer {
    json: Option<Value>,
    json_error: String,
    /// With its defaults.
    object: Option<Value>,
    object_error: String,
}

fn seed() -> u64 {
    let seed = std::env::var("HANSE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_261_129);
    println!("HANSE_SEED={seed}");
    seed
}

fn ask(documents: &[String]) -> Vec<Answer> {
    let program = hanse_e2e::go::Program::Oracle.build().unwrap_or_else(|error| panic!("{error:#}"));
    let mut oracle = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut input = oracle.stdin.take().expect("it is piped");
    let output = BufReader::new(oracle.stdout.take().expect("it is piped"));
    let answers = std::thread::scope(|scope| {
        scope.spawn(move || {
            for document in documents {
                writeln!(input, "{}", Value::from(document.as_str())).expect("the oracle reads");
            }
        });
        output.lines().map(|line| serde_json::from_str(&line.expect("UTF-8")).expect("an answer")).collect()
    });
    assert!(oracle.wait().expect("it ends").success());
    answers
}

/// What we refuse and Kubernetes does not; a wrong key only where a later one takes its mapping's place.
const STRICTER: [&str; 6] = [
    "duplicate ",
    "after the end of the document",
    "a second document",
    "nested deeper",
    "repeat more than",
    "a key must be a plain text",
];

fn alike(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Number(ours), Value::Number(theirs)) => {
            let both = ours.as_f64().zip(theirs.as_f64());
            // The answer's fractions are read back without the last bit.
            ours == theirs
                || both.is_some_and(|(ours, theirs)| (ours - theirs).abs() <= ours.abs() * 4.0 * f64::EPSILON)
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(ours, theirs)| alike(ours, theirs))
        }
        (Value::Object(ours), Value::Object(theirs)) => {
            let pair = |(key, ours): (&String, &Value)| theirs.get(key).is_some_and(|theirs| alike(ours, theirs));
            ours.len() == theirs.len() && ours.iter().all(pair)
        }
        (ours, theirs) => ours == theirs,
    }
}

#[test]
fn values_are_those_of_kubernetes() {
    let mut random = Random(seed());
    let mut documents: Vec<String> = Vec::new();
    for number in 0..6_000 {
        let mut text = write::document(&mut random);
        if number % 2 == 1 {
            text = write::damaged(&mut random, text);
        }
        // Where a file is cut is tested elsewhere: the oracle reads one document.
        if !text.lines().any(|line| line.starts_with("---")) && !text.starts_with('%') && !text.contains("\n%") {
            documents.push(text);
        }
    }
    let answers = ask(&documents);
    assert_eq!(answers.len(), documents.len());
    let (mut accepted, mut refused, mut stricter) = (0, 0, 0);
    let mut wrong = Vec::new();
    for (text, answer) in documents.iter().zip(answers) {
        let read: Result<Vec<_>, _> = document::documents(text).collect();
        let ours = match &read {
            Ok(read) => match read.iter().find_map(|document| document.faults.first()) {
                Some(fault) => Err(fault.to_string()),
                None => Ok(read.first().map_or(Value::Null, |document| document.root().to_value())),
            },
            Err(error) => Err(error.to_string()),
        };
        match (ours, &answer.json) {
            (Ok(ours), Some(theirs)) if alike(&ours, theirs) => accepted += 1,
            (Err(_), None) => refused += 1,
            (Err(error), Some(_)) if STRICTER.iter().any(|it| error.contains(it)) => stricter += 1,
            (ours, theirs) => {
                let theirs = theirs.as_ref().map_or(answer.json_error.clone(), Value::to_string);
                wrong.push(format!("{text}\n{text:?}\nours   {ours:?}\ntheirs {theirs}"));
            }
        }
    }
    println!("{accepted} accepted by both, {refused} refused by both, {stricter} refused by us only");
    report(&wrong);
    assert!(accepted > 1_500 && refused > 500 && stricter < refused, "the documents are of one sort");
}

/// # Panics
/// When there is a difference.
fn report(wrong: &[String]) {
    let first: Vec<&str> = wrong.iter().take(8).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} are read otherwise; the first:\n{}", wrong.len(), first.join("\n\n"));
}

fn read(text: &str) -> Manifests {
    let mut read = Manifests::default();
    read_bytes(&Arc::from("file"), text.as_bytes(), &mut read);
    read
}

/// What is read of an object, and what it comes to mean.
fn meaning(read: &Manifests) -> String {
    let state = assemble_cluster(&"c".into(), read.objects.clone());
    format!("{:?} {:?}", state.layer, state.cluster)
}

/// An object is read as the one that Kubernetes stores, in which every default is written.
#[test]
fn objects_are_those_of_kubernetes() {
    let mut random = Random(seed());
    let documents: Vec<String> = (0..4_000).map(|_| write::object(&mut random)).collect();
    let answers = ask(&documents);
    assert_eq!(answers.len(), documents.len());
    let (mut accepted, mut refused) = (0, 0);
    let mut wrong = Vec::new();
    for (text, answer) in documents.iter().zip(answers) {
        let ours = read(text);
        let theirs = answer.object.as_ref().map(|stored| read(&stored.to_string()));
        match (ours.diagnostics.is_empty(), theirs.as_ref().map(|theirs| theirs.diagnostics.is_empty())) {
            (true, Some(true)) if meaning(&ours) == theirs.as_ref().map_or(String::new(), meaning) => accepted += 1,
            // By the decoder, or by the validation that follows.
            (false, None | Some(false)) => refused += 1,
            (..) => wrong.push(format!(
                "{text}\nours   {:?}\ntheirs {:?}{}\n       {:?}",
                ours.diagnostics,
                answer.object.as_ref().map(Value::to_string),
                answer.object_error,
                theirs.map(|theirs| theirs.diagnostics),
            )),
        }
    }
    println!("{accepted} accepted, {refused} refused by both");
    report(&wrong);
    assert!(accepted > 1_000 && refused > 300, "the objects are of one sort");
}
