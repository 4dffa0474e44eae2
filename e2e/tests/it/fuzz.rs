//! Bytes into every parser: selectors, manifests, and the wire.
//!
//! libFuzzer needs nightly Rust, so this is a fuzzer of its own. Inputs are mutated from seeds; in the place of coverage
//! is the [`Outcome`] of a target for an input: an input with a new one is kept and mutated further. A target
//! panics where a promise is broken.
//!
//! A run of a fixed number of inputs is part of the tests. `cargo xtask fuzz TARGET --seconds N` goes on for as long as it
//! is reported, and bounds the memory too. `HANSE_SEED` is where a run starts; the same one gives the same inputs.
//!
//! An input that breaks a promise is written below `target/tmp/`. It belongs into `fuzz/found/TARGET/` together with the
//! fix: every run begins with these inputs.

use std::collections::HashSet;
use std::hash::BuildHasher as _;
use std::os::unix::fs::FileExt as _;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::worlds::Random;

mod manifests;
mod selectors;
mod wire;

/// The longest input. Limits of the parsers that lie above it have tests of their own.
const MAX_INPUT_BYTES: usize = 64 * 1024;
/// How many inputs of either kind are kept to be mutated; 512 MiB at most, and seldom more than 8.
const MAX_KEPT: usize = 4096;
/// Peak resident memory of a long run, the harness and its inputs included.
const MAX_RESIDENT_KIB: u64 = 1024 * 1024;

trait Target {
    const NAME: &'static str;
    /// Inputs of the run that is part of the tests: a few seconds.
    const RUNS: u64;
    /// What grammar and formats are made of, to be put into inputs.
    const WORDS: &'static [&'static str];

    fn seeds() -> Vec<Vec<u8>>;

    /// # Panics
    /// When a promise is broken.
    fn run(input: &[u8]) -> Outcome;
}

/// What a target did with an input.
#[derive(Debug)]
struct Outcome {
    accepted: bool,
    /// How, in words, without digits and quoted text.
    how: String,
}

#[test]
fn selectors() {
    fuzz::<selectors::Selectors>();
}

#[test]
fn manifests() {
    fuzz::<manifests::Files>();
}

#[test]
fn wire() {
    fuzz::<wire::Messages>();
}

fn fuzz<T: Target>() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("HANSE_SEED").unwrap_or(20_261_126);
    let long = number("HANSE_FUZZ_SECONDS").map(Duration::from_secs);
    println!("{}: HANSE_SEED={seed}", T::NAME);
    let mut random = Random(seed);
    let mut run = Run::<T>::new(long.is_some());
    for input in T::seeds().into_iter().chain(found(T::NAME)) {
        run.judge(input);
    }
    let start = Instant::now();
    let goes_on = |inputs: u64| long.map_or(inputs < T::RUNS, |length| start.elapsed() < length);
    while goes_on(run.inputs) {
        let input = mutate(&mut random, &run.kept, T::WORDS);
        run.judge(input);
    }
    let Run { inputs, accepted, outcomes, slowest, .. } = &run;
    println!("{}: {inputs} inputs, {accepted} accepted, {} outcomes; {}", T::NAME, outcomes.len(), slowest.1);
    // A run that is all of one kind finds nothing.
    assert!(accepted * 20 >= *inputs && (inputs - accepted) * 20 >= *inputs, "{accepted} of {inputs} are accepted");
    if long.is_some()
        && let Some(peak) = peak_resident_kib()
    {
        assert!(peak <= MAX_RESIDENT_KIB, "{peak} KiB resident, of {MAX_RESIDENT_KIB}");
    }
}

/// Inputs to be mutated: those that were refused, and those that were accepted.
type Kept = [Vec<Vec<u8>>; 2];

struct Run<T> {
    /// Of a long run: the input that is judged, since a killed process cannot write it.
    current: Option<std::fs::File>,
    inputs: u64,
    accepted: u64,
    kept: Kept,
    outcomes: HashSet<String>,
    slowest: (Duration, String),
    target: std::marker::PhantomData<T>,
}

impl<T: Target> Run<T> {
    fn new(is_long: bool) -> Self {
        let (kept, outcomes, target) = (Kept::default(), HashSet::new(), std::marker::PhantomData);
        let current =
            is_long.then(|| std::fs::File::create(saved(T::NAME, "current")).expect("a file below target/tmp"));
        Self { current, inputs: 0, accepted: 0, kept, outcomes, slowest: Default::default(), target }
    }

    fn judge(&mut self, input: Vec<u8>) {
        if let Some(current) = &self.current {
            let written = current.write_all_at(&input, 0).and_then(|()| current.set_len(input.len() as u64));
            written.expect("the input is written");
        }
        let start = Instant::now();
        let outcome = catch_unwind(|| T::run(&input)).unwrap_or_else(|_| {
            let path = saved(T::NAME, &format!("{:016x}", hash(&input)));
            std::fs::write(&path, &input).expect("the input is written");
            panic!("{}: a promise is broken by the input {}", T::NAME, path.display());
        });
        if self.current.is_some() && start.elapsed() > self.slowest.0 {
            let report = format!("the slowest, of {} bytes, took {:?}", input.len(), start.elapsed());
            self.slowest = (start.elapsed(), report);
        }
        self.inputs += 1;
        self.accepted += u64::from(outcome.accepted);
        let is_new = self.outcomes.insert(format!("{} {}", outcome.accepted, without_particulars(&outcome.how)));
        let kept = &mut self.kept[usize::from(outcome.accepted)];
        if is_new && kept.len() < MAX_KEPT {
            kept.push(input);
        }
    }
}

fn saved(target: &str, what: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{target}-{what}"))
}

/// Inputs that once broke a promise.
fn found(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/fuzz/found").join(target);
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("it is part of the repository")).collect()
}

fn hash(input: &[u8]) -> u64 {
    std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default().hash_one(input)
}

/// Outcomes that differ in a number or a name are one.
fn without_particulars(text: &str) -> String {
    let mut inside = false;
    let kept = text.chars().filter(|character| {
        inside ^= *character == '"';
        !inside && !character.is_ascii_digit()
    });
    kept.take(4096).collect()
}

/// Linux only; on other systems memory is not bounded by this.
fn peak_resident_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?.parse().ok()
}

/// A range within `length`, short ones more often.
fn any_range(random: &mut Random, length: usize) -> std::ops::Range<usize> {
    let start = random.below(length + 1);
    let longest = if random.below(4) == 0 { length - start } else { (length - start).min(8) };
    start..start + random.below(longest + 1)
}

/// A few changes to one that was accepted, mostly: what was refused has its reason near its beginning.
fn mutate(random: &mut Random, kept: &Kept, words: &[&str]) -> Vec<u8> {
    /// Where sizes, ranges and encodings turn.
    const TURNS: &[u8] = &[0, 1, 4, 8, 0x0a, 0x10, 0x20, b'"', b'0', b'9', 0x7f, 0x80, 0xc3, 0xfe, 0xff];
    let pick = |random: &mut Random| {
        let accepted = kept[0].is_empty() || !kept[1].is_empty() && random.below(8) != 0;
        let kept = &kept[usize::from(accepted)];
        &kept[random.below(kept.len())]
    };
    let mut input = pick(random).clone();
    for _ in 0..[1, 1, 1, 2, 4][random.below(5)] {
        let at = random.below(input.len() + 1);
        match random.below(9) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = TURNS[random.below(TURNS.len())],
            2 => input.insert(at, TURNS[random.below(TURNS.len())]),
            3 => drop(input.drain(any_range(random, input.len()))),
            4 => {
                let copy = input[any_range(random, input.len())].to_vec();
                input.splice(at..at, copy);
            }
            5 => {
                let other = pick(random);
                let range = any_range(random, other.len());
                let gone = any_range(random, input.len());
                input.splice(gone, other[range].iter().copied());
            }
            6 => {
                let gone = if random.below(2) == 0 { at..at } else { any_range(random, input.len()) };
                input.splice(gone, words[random.below(words.len())].bytes());
            }
            7 if at < input.len() => {
                let word = words[random.below(words.len())].as_bytes();
                let end = (at + word.len()).min(input.len());
                input.splice(at..end, word.iter().copied());
            }
            _ => {
                // A number becomes another one.
                let digits = input.iter().position(|byte| byte.is_ascii_digit()).unwrap_or(at);
                let number = [0, 1, 255, 256, 65_535, 65_536, u64::MAX, random.next()][random.below(8)];
                let end = (digits + random.below(3)).min(input.len());
                input.splice(digits..end, number.to_string().into_bytes());
            }
        }
    }
    input.truncate(MAX_INPUT_BYTES);
    input
}
