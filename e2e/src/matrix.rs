//! Every pair of pods, measured and drawn.

use std::fmt::Write as _;
use std::net::SocketAddr;

use crate::fabric::Fabric;
use crate::namespace::Namespace;
use crate::probe::{self, Observed};
use crate::world::Pod;

/// Where pods run, and what they answer.
pub trait Network: Sync {
    fn namespace(&self, pod: &Pod) -> Option<&Namespace>;

    fn answer(&self, pod: &Pod) -> String;
}

impl Network for Fabric {
    fn namespace(&self, pod: &Pod) -> Option<&Namespace> {
        self.pod(pod)
    }

    fn answer(&self, pod: &Pod) -> String {
        pod.title()
    }
}

/// How many connections are under way at once: closed ones only wait, so more of them cost little.
const AT_ONCE: usize = 48;

/// Ordered pairs of different pods.
pub fn pairs(pods: &[Pod]) -> Vec<(&Pod, &Pod)> {
    let title = |pod: &Pod| pod.title();
    pods.iter()
        .flat_map(|from| pods.iter().map(move |to| (from, to)))
        .filter(|(from, to)| title(from) != title(to))
        .collect()
}

/// One TCP connection for each pair over the IP version, in the order of the pairs.
pub fn measure(network: &impl Network, pairs: &[(&Pod, &Pod)], version: u8) -> Vec<Observed> {
    let one = |(from, to): &(&Pod, &Pod)| {
        let address = to.addresses.iter().find(|address| address.is_ipv4() == (version == 4));
        let (Some(namespace), Some(address)) = (network.namespace(from), address) else {
            return Observed::Wrong("no such pod or address".to_owned());
        };
        probe::tcp(namespace, SocketAddr::new(*address, to.port), &network.answer(to))
    };
    let mut observed = Vec::with_capacity(pairs.len());
    for chunk in pairs.chunks(AT_ONCE) {
        let chunk = std::thread::scope(|scope| {
            let probes: Vec<_> = chunk.iter().map(|pair| scope.spawn(|| one(pair))).collect();
            let ended = probes.into_iter().map(|probe| probe.join().expect("a probe does not panic"));
            ended.collect::<Vec<_>>()
        });
        observed.extend(chunk);
    }
    observed
}

/// Draws what was measured: `■` open, `·` closed, and `!` where the packet did not do what was expected (or went
/// astray). Rows are sources, columns destinations, both in the order of `pods`.
pub fn draw(pods: &[Pod], pairs: &[(&Pod, &Pod)], observed: &[Observed], expected: &[bool], colour: bool) -> String {
    let cells = observed.iter().zip(expected).map(|outcome| match outcome {
        (Observed::Open, true) => Cell::Open,
        (Observed::Closed, false) => Cell::Closed,
        _ => Cell::Different,
    });
    grid(pods, pairs, cells, colour)
}

#[derive(Debug, Clone, Copy)]
enum Cell {
    Open,
    Closed,
    Different,
}

fn grid(pods: &[Pod], pairs: &[(&Pod, &Pod)], cells: impl Iterator<Item = Cell>, colour: bool) -> String {
    let paint = |code: &str, text: &str| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    let width = pods.iter().map(|pod| pod.title().len()).max().unwrap_or_default();
    let mut text = format!("  {:width$}   ", "");
    for column in 1..=pods.len() {
        write!(text, "{column:>3}").expect("text");
    }
    text.push('\n');
    let mut cells = pairs.iter().zip(cells).peekable();
    for (row, from) in pods.iter().enumerate() {
        write!(text, "  {:width$} {:>2}", from.title(), row + 1).expect("text");
        for to in pods {
            let cell = cells.next_if(|((a, b), _)| std::ptr::eq(*a, from) && std::ptr::eq(*b, to));
            let cell = match cell.map(|(_, cell)| cell) {
                None => " ".to_owned(),
                Some(Cell::Open) => paint("32", "■"),
                Some(Cell::Closed) => paint("2", "·"),
                Some(Cell::Different) => paint("1;31", "!"),
            };
            write!(text, "  {cell}").expect("text");
        }
        text.push('\n');
    }
    text
}

/// What differs from what was expected, one line each.
pub fn differences(pairs: &[(&Pod, &Pod)], observed: &[Observed], expected: &[bool]) -> Vec<String> {
    let say = |allowed: bool| if allowed { "open" } else { "closed" };
    let all = pairs.iter().zip(observed.iter().zip(expected));
    all.filter_map(|((from, to), (observed, expected))| {
        let path = format!("{} -> {}", from.title(), to.title());
        match (observed, expected) {
            (Observed::Open, true) | (Observed::Closed, false) => None,
            (Observed::Open, false) | (Observed::Closed, true) => {
                Some(format!("{path}: policy says {}, packets say {}", say(*expected), say(!*expected)))
            }
            (Observed::Wrong(why), _) => Some(format!("{path}: {why}")),
        }
    })
    .collect()
}
