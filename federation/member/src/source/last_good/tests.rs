use std::collections::VecDeque;

use hanse_api::assemble::{Assembly, key_of};
use hanse_api::manifest::{Manifests, read_bytes};
use hanse_runtime::health::{Health, Writes};

use super::super::problems::Problems;
use super::*;

/// A source that plays back batches of events.
#[derive(Debug, Default)]
struct Script(VecDeque<Vec<Event>>);

impl Source for Script {
    fn poll(&mut self, _: &mut Objects) -> Vec<Event> {
        self.0.pop_front().unwrap_or_default()
    }

    fn pause(&self, _: Duration) -> Duration {
        Duration::ZERO
    }
}

/// A member with the scripted source of an API server: each pod is an origin below `pods`.
struct World {
    folder: tempfile::TempDir,
    source: Option<LastGood<Script>>,
    assembly: Assembly,
    problems: Problems,
}

fn path(text: &str) -> Arc<Path> {
    Path::new(text).into()
}

fn pod(name: &str, address: u8) -> (Position, Vec<u8>, Box<Manifest>) {
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: a}}\nstatus: {{podIP: 10.0.0.{address}}}\n"
    );
    let mut read = Manifests::default();
    read_bytes(&"pod".into(), text.as_bytes(), &mut read);
    let manifest = read.objects.pop().expect("a pod");
    (Position { origin: path(&format!("pods/a/{name}")), index: 0 }, text.into_bytes(), Box::new(manifest))
}

/// A pod as a list or a watch reports it.
fn upsert(name: &str, address: u8) -> [Event; 2] {
    let (position, text, manifest) = pod(name, address);
    [Event::Upsert(position.clone(), manifest), Event::Keep(position.origin, text)]
}

fn retain(scope: &str) -> Event {
    Event::Retain(path(scope), vec![Diagnostic::of_file(Path::new(scope), "not readable".to_owned())])
}

fn list(pods: impl IntoIterator<Item = Event>) -> Vec<Event> {
    let begin = [Event::Relist(path("pods"))];
    begin.into_iter().chain(pods).chain([Event::Synced(path("pods")), Event::Synced(path(""))]).collect()
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let source = Some(LastGood::new(Script::default(), Kept::open(folder.path(), Writes::new(&Health::default()))));
        Self { folder, source, assembly: Assembly::new("c".into()), problems: Problems::default() }
    }

    fn restart(&mut self) {
        // Two sources cannot use one data directory.
        self.source = None;
        self.source =
            Some(LastGood::new(Script::default(), Kept::open(self.folder.path(), Writes::new(&Health::default()))));
        (self.assembly, self.problems) = (Assembly::new("c".into()), Problems::default());
    }

    /// The addresses of all pods, and the number of problems, where the batch changes anything.
    fn play(&mut self, batch: impl IntoIterator<Item = Event>) -> Option<(Vec<String>, usize)> {
        let source = self.source.as_mut()?;
        source.source.0.push_back(batch.into_iter().collect());
        let changes = source.poll()?;
        self.assembly.update(changes.objects);
        self.problems.apply(changes.problems);
        let endpoints = self.assembly.state().cluster.endpoints.values();
        let addresses = endpoints.flat_map(|it| &it.addresses).map(ToString::to_string).collect();
        Some((addresses, self.problems.len()))
    }
}

fn found(addresses: &[&str], problems: usize) -> Option<(Vec<String>, usize)> {
    Some((addresses.iter().map(|address| format!("10.0.0.{address}")).collect(), problems))
}

#[test]
fn not_synced_is_not_empty() {
    let mut world = World::new();
    assert_eq!(world.play([]), None);
    assert_eq!(world.play(upsert("p", 1)), None, "more may follow");
    assert_eq!(world.play([Event::Synced(path("pods"))]), None, "other collections are not synced");
    assert_eq!(world.play([Event::Synced(path(""))]), found(&["1"], 0));
    assert_eq!(world.play([]), None);
    // A cluster without pods is known to be empty.
    let mut world = World::new();
    assert_eq!(world.play(list([])), found(&[], 0));
}

#[test]
fn deletes_what_is_deleted_and_retains_what_cannot_be_read() {
    let mut world = World::new();
    world.play(list(upsert("p", 1).into_iter().chain(upsert("q", 2)))).expect("synced");
    assert_eq!(world.play([retain("pods/a/p")]), found(&["1", "2"], 1));
    assert_eq!(world.play([retain("pods/a/p")]), None, "the same problem is not a change");
    let (q, _, manifest) = pod("q", 2);
    assert_eq!(world.play([Event::Delete(q, Arc::unwrap_or_clone(key_of(&manifest)))]), found(&["1"], 1));
    // Readable again.
    let again = [Event::Release(path("pods/a/p"))].into_iter().chain(upsert("p", 3));
    assert_eq!(world.play(again), found(&["3"], 0));
    assert_eq!(world.play([Event::Remove(path("pods/a/p"))]), found(&[], 0));
}

#[test]
fn relist_deletes_what_is_gone_and_retains_one_object_that_does_not_decode() {
    let mut world = World::new();
    let pods = ["p", "q", "r"].into_iter().zip(1..).flat_map(|(name, address)| upsert(name, address));
    assert_eq!(world.play(list(pods)), found(&["1", "2", "3"], 0));
    // The watch ended with 410 Gone. Until the list is complete, nothing is gone.
    let begin = [Event::Relist(path("pods"))].into_iter().chain(upsert("p", 9));
    assert_eq!(world.play(begin), found(&["9", "2", "3"], 0));
    assert_eq!(world.play([retain("pods/a/r"), Event::Synced(path("pods"))]), found(&["9", "3"], 1));
}

#[test]
fn retains_a_collection_while_its_list_fails() {
    let mut world = World::new();
    world.play(list(upsert("p", 1))).expect("synced");
    assert_eq!(world.play([Event::Relist(path("pods")), retain("pods")]), found(&["1"], 1));
    // The next attempt succeeds.
    let next = [Event::Release(path("pods"))].into_iter().chain(list(upsert("q", 2)));
    assert_eq!(world.play(next), found(&["2"], 0));
}

#[test]
fn keeps_last_good_version_across_restart() {
    let mut world = World::new();
    world.play(list(upsert("p", 1).into_iter().chain(upsert("q", 2)))).expect("synced");
    world.restart();
    assert_eq!(world.play([]), None, "what was kept counts when the source cannot be read");
    assert_eq!(world.play([retain("pods"), Event::Synced(path(""))]), found(&["1", "2"], 1));
    // A restart while one does not decode, and another one was deleted.
    world.restart();
    assert_eq!(world.play(list([retain("pods/a/p")])), found(&["1"], 1));
    assert_eq!(world.play([]), None);
    world.restart();
    assert_eq!(world.play([retain("pods"), Event::Synced(path(""))]), found(&["1"], 1), "q is not brought back");
}

#[test]
fn takes_a_partial_object_only_without_a_good_version() {
    let partial = |name, address| {
        let (position, _, manifest) = pod(name, address);
        [retain(&position.origin.to_string_lossy()), Event::Partial(position, manifest)]
    };
    let mut world = World::new();
    assert_eq!(world.play(list(upsert("p", 1).into_iter().chain(partial("q", 2)))), found(&["1", "2"], 1));
    assert_eq!(world.play(partial("p", 3)), found(&["1", "2"], 2));
    world.restart();
    assert_eq!(world.play(list(partial("p", 3).into_iter().chain(partial("q", 4)))), found(&["1", "4"], 2));
}

/// A policy that was never readable is in force with what cannot be read unknown, also when the source is unreadable after a restart.
#[test]
fn keeps_a_partial_policy_across_restart() {
    let origin = path("networkpolicies.networking.k8s.io/a/p");
    let policy = |ingress: &str| {
        let text = format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: a}}\nspec: {{ingress: [{ingress}]}}\n"
        );
        let mut read = Manifests::default();
        read_bytes(&"policy".into(), text.as_bytes(), &mut read);
        let position = Position { origin: Arc::clone(&origin), index: 0 };
        match (read.objects.pop(), read.partial.pop()) {
            (Some(good), _) => vec![
                Event::Release(Arc::clone(&origin)),
                Event::Upsert(position, Box::new(good)),
                Event::Keep(Arc::clone(&origin), text.into_bytes()),
            ],
            (None, Some(partial)) => vec![
                Event::Retain(Arc::clone(&origin), read.diagnostics),
                Event::Partial(position, Box::new(partial)),
                Event::KeepPartial(Arc::clone(&origin), text.into_bytes()),
            ],
            (None, None) => panic!("{:?}", read.diagnostics),
        }
    };
    let found = |world: &World| {
        let policies = world.assembly.state().layer.policies.values();
        policies
            .flat_map(|it| it.ingress.iter().flatten())
            .map(|rule| rule.not_understood.is_some())
            .collect::<Vec<_>>()
    };
    let mut world = World::new();
    world.play(list(policy("{from: 7}"))).expect("synced");
    assert_eq!(found(&world), [true]);
    world.restart();
    world.play([retain("networkpolicies.networking.k8s.io"), Event::Synced(path(""))]).expect("restored");
    assert_eq!(found(&world), [true]);
    // A good version replaces it for good.
    world.play(policy("{}")).expect("a good version");
    world.play(policy("{from: 8}")).expect("another problem");
    assert_eq!(found(&world), [false]);
    world.restart();
    world.play([retain("networkpolicies.networking.k8s.io"), Event::Synced(path(""))]).expect("restored");
    assert_eq!(found(&world), [false]);
}

/// With many unreadable objects, a change costs what it touches.
#[test]
fn reports_only_the_problems_that_have_changed() {
    let mut world = World::new();
    let unreadable = (0..1_000).map(|number| retain(&format!("pods/a/{number}")));
    assert_eq!(world.play(list(unreadable)), found(&[], 1_000));
    let source = world.source.as_mut().expect("it runs");
    source.source.0.push_back(vec![retain("pods"), Event::Release(path("pods/a/7")), retain("pods/a/8")]);
    let changes = source.poll().expect("problems have changed");
    let changed: Vec<usize> = changes.problems.iter().map(|change| change.problems.len()).collect();
    assert_eq!(changed, [1, 0], "one more, and one less");
    world.problems.apply(changes.problems);
    assert_eq!(world.problems.len(), 1_000);
    let first = world.problems.most_important().next().expect("a problem");
    assert_eq!(&*first.location.file, "pods", "those of collections come first");
}

#[test]
fn limits_the_problems_of_one_object() {
    let mut world = World::new();
    let problems = |number: usize| {
        let problem = |number| Diagnostic::of_file(Path::new("pods/a/p"), format!("problem {number}"));
        Event::Retain(path("pods/a/p"), (0..number).map(problem).collect())
    };
    assert_eq!(world.play(list([problems(1_000), retain("pods/a/q")])), found(&[], 21));
    let reported: Vec<&str> = world.problems.most_important().map(|it| it.message.as_str()).collect();
    assert_eq!(reported, ["problem 0", "problem 1", "not readable"], "none hides those of other objects");
    let kept = &world.source.as_ref().expect("it runs").objects.retained[&path("pods/a/p")];
    assert_eq!(kept[19].message, "problem 19 (and 980 more problems)");
}
