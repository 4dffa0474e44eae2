use hanse_api::assemble::Assembly;

use hanse_runtime::health::{Health, Writes};

use super::*;
use crate::source::kept::Kept;
use crate::source::{LastGood, Problems};

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a}\nstatus: {podIP: 10.0.0.1}\n";

struct World {
    folder: tempfile::TempDir,
    /// None while it is stopped: two sources cannot use one data directory.
    source: Option<LastGood<Directory>>,
    /// What its changes come to, which a member that starts again does not know.
    assembly: Assembly,
    problems: Problems,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let source = Some(Self::open(folder.path()));
        Self { folder, source, assembly: Assembly::new("c".into()), problems: Problems::default() }
    }

    fn open(folder: &Path) -> LastGood<Directory> {
        let directory = Directory::new(&folder.join("cluster"));
        LastGood::new(directory, Kept::open(&folder.join("data"), Writes::new(&Health::default())))
    }

    /// A member that starts again on the same files.
    fn source(&mut self) -> &mut LastGood<Directory> {
        self.source.as_mut().expect("it runs")
    }

    fn stop(&mut self) {
        self.source = None;
    }

    fn restart(&mut self) {
        self.stop();
        self.source = Some(Self::open(self.folder.path()));
        (self.assembly, self.problems) = (Assembly::new("c".into()), Problems::default());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("cluster").join(name)
    }

    /// Writes in place, like a shell. The modification time may be equal, so the length must differ.
    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("written");
    }

    /// The changes after two polls: pods, problems.
    fn settled(&mut self) -> Option<(Vec<String>, Vec<Diagnostic>)> {
        assert!(self.source().poll().is_none(), "it may be half written");
        self.look()
    }

    fn look(&mut self) -> Option<(Vec<String>, Vec<Diagnostic>)> {
        let changes = self.source().poll()?;
        self.assembly.update(changes.objects);
        let state = self.assembly.state();
        let pods = state.cluster.endpoints.keys().map(|id| id.name.to_string()).collect();
        self.problems.apply(changes.problems);
        Some((pods, self.problems.all().cloned().collect()))
    }
}

fn pod(name: &str, address: &str) -> String {
    POD.replace("name: p", &format!("name: {name}")).replace("10.0.0.1", address)
}

fn check(world: &mut World, pods: &[&str], problems: usize) -> Vec<Diagnostic> {
    let (found, told) = world.settled().expect("news");
    assert_eq!((found.iter().map(String::as_str).collect::<Vec<_>>(), told.len()), (pods.to_vec(), problems));
    assert!(world.look().is_none() && world.look().is_none(), "no more news");
    told
}

#[test]
fn broken_file_keeps_its_last_good_state() {
    let mut world = World::new();
    assert!(world.look().is_none(), "a directory that cannot be read is not an empty one");
    std::fs::create_dir(world.path("")).expect("made");
    world.write("pod.yaml", POD);
    assert_eq!(world.look().expect("the first look takes what is there"), (vec!["p".to_owned()], vec![]));
    world.write("pod.yaml", "apiVersion: v1\nkind: [\n");
    let told = check(&mut world, &["p"], 1);
    assert!(told[0].location.file.ends_with("pod.yaml") && told[0].location.line >= 2, "{told:?}");
    world.write("other.yaml", &pod("q", "10.0.0.2"));
    check(&mut world, &["p", "q"], 1);
    let (cluster, away) = (world.path(""), world.folder.path().join("away"));
    std::fs::rename(&cluster, &away).expect("renamed");
    let (pods, told) = world.look().expect("the problem is news");
    assert_eq!((pods.len(), told.len()), (2, 2), "what cannot be listed stays");
    assert!(world.look().is_none());
    std::fs::rename(&away, &cluster).expect("renamed");
    assert_eq!(world.look().expect("listed again").1.len(), 1);
    std::fs::remove_file(world.path("pod.yaml")).expect("removed");
    check(&mut world, &["q"], 0);
}

#[test]
fn keeps_last_good_state_across_restart() {
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    world.write("pod.yaml", POD);
    let first = world.source().poll().expect("read").revision;
    world.write("pod.yaml", "apiVersion: v1\nkind: [\n");
    world.restart();
    let read = world.source().poll().expect("read");
    assert!(read.revision > first, "revisions grow across a restart");
    assert_eq!((read.objects.len(), read.problems.len()), (1, 1));
    world.assembly.update(read.objects);
    // Gone while nobody looked, and here again, broken from the start.
    world.write("other.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: other}\n");
    std::fs::remove_file(world.path("pod.yaml")).expect("removed");
    check(&mut world, &[], 0);
    world.write("pod.yaml", "apiVersion: v1\nkind: [\n");
    check(&mut world, &[], 1);
    // What can be read of it is taken, though what is wrong with it stays the same.
    world.write("pod.yaml", &format!("{}---\n{POD}---\napiVersion: v1\nkind: [\n", pod("p", "10.0.0.9")));
    check(&mut world, &["p"], 2);
    world.write(
        "pod.yaml",
        &format!("{}---\n{}---\napiVersion: v1\nkind: [\n", pod("p", "10.0.0.9"), pod("q", "10.0.0.1")),
    );
    check(&mut world, &["p", "q"], 1);
    // A kept state that was damaged is none.
    world.write("pod.yaml", POD);
    check(&mut world, &["p"], 0);
    let kept = world.folder.path().join("data/source/objects.redb");
    world.stop();
    let mut bytes = std::fs::read(&kept).expect("kept");
    // Another address, which would be read as well.
    let address = b"podIP: 10.0.0.1";
    let places = bytes.windows(address.len()).enumerate().filter(|(_, it)| it == address).map(|(at, _)| at);
    let places: Vec<usize> = places.collect();
    assert!(!places.is_empty());
    places.into_iter().for_each(|at| bytes[at + address.len() - 1] = b'2');
    std::fs::write(&kept, bytes).expect("written");
    world.write("pod.yaml", "apiVersion: v1\nkind: [\n");
    world.restart();
    assert_eq!(world.look().expect("read").0.len(), 0);
}

/// Of a file that never was good the rest is taken, and a policy of which something is not known as far as it closes.
#[test]
fn policy_without_a_good_version_fails_closed() {
    let policy = |spec: &str| {
        let head = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: a}\n";
        format!("{head}spec: {spec}\n")
    };
    let rules = |world: &World| {
        let state = world.assembly.state();
        let policies = state.layer.policies.values();
        let rules = policies.map(|it| it.ingress.iter().flatten().map(|rule| rule.not_understood.is_some()).collect());
        rules.collect::<Vec<Vec<bool>>>()
    };
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    world.write("a.yaml", &format!("{POD}---\n{}", policy("{podSelector: {}, ingress: [{from: [], newer: 1}]}")));
    let (pods, told) = world.look().expect("read");
    assert_eq!((pods, told.len(), rules(&world)), (vec!["p".to_owned()], 1, vec![vec![true]]));
    world.write("a.yaml", &format!("{POD}---\n{}", policy("{podSelector: {}, ingress: [{from: []}]}")));
    check(&mut world, &["p"], 0);
    assert_eq!(rules(&world), [[false]]);
    // Where an earlier version is known, that is what holds; also where a slip makes another kind of it.
    for slip in [
        policy("{podSelector: {}, newer: 1, ingress: [{}, {}]}"),
        policy("{podSelector: {}}").replace("NetworkPolicy", "NetworkPolcy"),
    ] {
        world.write("a.yaml", &format!("{POD}---\n{slip}"));
        check(&mut world, &["p"], 1);
        assert_eq!(rules(&world), [[false]]);
    }
}

/// A link with a missing target behaves like a failed mount: neither its files nor its neighbours count as deleted.
#[test]
fn unreadable_path_keeps_its_objects() {
    use std::os::unix::fs::symlink;
    let mut world = World::new();
    std::fs::create_dir_all(world.path("../volume")).expect("made");
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    world.write("../volume/b.yaml", &pod("q", "10.0.0.2"));
    symlink("../volume", world.path("mounted")).expect("linked");
    symlink("../volume/b.yaml", world.path("c.yaml")).expect("linked");
    assert_eq!(world.look().expect("read").0, ["p", "q"]);
    let away = world.path("../away");
    std::fs::rename(world.path("../volume"), &away).expect("renamed");
    let (pods, told) = world.look().expect("the problems are news");
    assert_eq!((pods, told.len()), (vec!["p".to_owned(), "q".to_owned()], 2 + 1), "both links; q is there twice");
    assert!(world.look().is_none() && world.look().is_none());
    // An edit beside it is taken.
    world.write("a.yaml", &pod("r", "10.0.0.10"));
    let (pods, _) = world.settled().expect("news");
    assert_eq!(pods, ["q", "r"]);
    // A restart meanwhile.
    world.restart();
    assert_eq!(world.look().expect("read").0, ["q", "r"]);
    std::fs::rename(&away, world.path("../volume")).expect("renamed");
    let (pods, told) = world.look().expect("no problem is news");
    assert_eq!((pods, told.len()), (vec!["q".to_owned(), "r".to_owned()], 1));
}

#[test]
fn start_without_source_uses_last_good_state() {
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    world.write("b.yaml", &pod("q", "10.0.0.2"));
    assert_eq!(world.look().expect("read").0, ["p", "q"]);
    let (cluster, away) = (world.path(""), world.folder.path().join("away"));
    std::fs::rename(&cluster, &away).expect("renamed");
    world.restart();
    let (pods, told) = world.look().expect("what was kept");
    assert_eq!((pods, told.len()), (vec!["p".to_owned(), "q".to_owned()], 1), "{told:?}");
    assert!(world.look().is_none());
    std::fs::remove_file(away.join("a.yaml")).expect("removed");
    std::fs::rename(&away, &cluster).expect("renamed");
    assert_eq!(world.look().expect("the problem has gone").1, []);
    let (pods, _) = world.look().expect("what is gone twice is gone");
    assert_eq!(pods, ["q"]);
}

/// A volume that is not mounted leaves an empty directory, and so does a checkout that failed.
#[test]
fn empty_source_directory_keeps_its_objects() {
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    assert!(world.look().is_none(), "nothing was ever read: unknown, not empty");
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    world.write("b.yaml", &pod("q", "10.0.0.2"));
    assert_eq!(world.look().expect("read"), (vec!["p".to_owned(), "q".to_owned()], vec![]));
    for name in ["a.yaml", "b.yaml"] {
        std::fs::remove_file(world.path(name)).expect("removed");
    }
    world.write("README.md", "of no kind that is read");
    let (pods, told) = world.settled().expect("the problem is news");
    assert_eq!((pods.len(), told.len()), (2, 1), "{told:?}");
    assert!(told[0].message.contains("has no manifests"), "{told:?}");
    assert!(world.look().is_none() && world.look().is_none());
    world.restart();
    let (pods, told) = world.look().expect("what was kept");
    assert_eq!((pods.len(), told.len()), (2, 1), "{told:?}");
    // One of them is back: the other is gone.
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    assert_eq!(world.look().expect("the problem has gone").1, []);
    let (pods, told) = world.look().expect("what is gone twice is gone");
    assert_eq!((pods, told), (vec!["p".to_owned()], vec![]));
}

/// Below the source as well; one that is removed is removed.
#[test]
fn empty_subdirectory_keeps_its_objects() {
    let mut world = World::new();
    for directory in ["", "volume", "volume/deep"] {
        std::fs::create_dir(world.path(directory)).expect("made");
    }
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    world.write("volume/deep/b.yaml", &pod("q", "10.0.0.2"));
    assert_eq!(world.look().expect("read").0, ["p", "q"]);
    std::fs::remove_dir_all(world.path("volume/deep")).expect("removed");
    for _ in 0..2 {
        let (pods, told) = world.settled().expect("the problem is news");
        assert_eq!((pods, told.len()), (vec!["p".to_owned(), "q".to_owned()], 1), "{told:?}");
        assert!(told[0].location.file.ends_with("volume"), "the topmost that is empty: {told:?}");
        for _ in 0..4 {
            assert!(world.look().is_none(), "and it stays so");
        }
        world.restart();
        assert_eq!(world.look().expect("what was kept").1.len(), 1);
        // What is edited beside it is taken.
        world.write("a.yaml", &pod("p", "10.0.0.11"));
        assert_eq!(world.settled().expect("news").0, ["p", "q"]);
        std::fs::create_dir(world.path("volume/deep")).expect("made");
        world.write("volume/deep/b.yaml", &pod("q", "10.0.0.22"));
        assert_eq!(world.look().expect("the problem has gone").1, []);
        assert!(world.look().is_some() && world.look().is_none(), "what is new in it is taken when it settled");
        world.write("a.yaml", &pod("p", "10.0.0.1"));
        world.settled().expect("news");
        std::fs::remove_dir_all(world.path("volume/deep")).expect("removed");
    }
    std::fs::remove_dir(world.path("volume")).expect("removed");
    assert!(world.look().is_none());
    let (pods, told) = world.look().expect("what is gone twice is gone");
    assert_eq!((pods, told), (vec!["p".to_owned()], vec![]));
}

/// Not brought back when the source, or another one, cannot be read later.
#[test]
fn removes_files_deleted_while_stopped() {
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    world.write("b.yaml", &pod("q", "10.0.0.2"));
    assert_eq!(world.look().expect("read").0, ["p", "q"]);
    std::fs::remove_file(world.path("a.yaml")).expect("removed");
    world.restart();
    assert_eq!(world.look().expect("read").0, ["q"]);
    assert!(world.look().is_none());
    std::fs::rename(world.path(""), world.folder.path().join("away")).expect("renamed");
    world.restart();
    assert_eq!(world.look().expect("what was kept").0, ["q"]);
    let (cluster, data) = (world.folder.path().join("another"), world.folder.path().join("data"));
    world.stop();
    world.source = Some(LastGood::new(Directory::new(&cluster), Kept::open(&data, Writes::new(&Health::default()))));
    assert!(world.look().is_none(), "nothing is known of it");
}

#[test]
fn ignores_files_that_are_being_written() {
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    world.write("a.yaml", &format!("{}---\n{}", pod("p", "10.0.0.1"), pod("q", "10.0.0.2")));
    assert_eq!(world.look().expect("read").0.len(), 2);
    // Truncated, then written part by part.
    for text in ["", &pod("p", "10.0.0.1"), &format!("{}---\n{}", pod("p", "10.0.0.1"), pod("r", "10.0.0.22"))] {
        world.write("a.yaml", text);
        assert!(world.look().is_none(), "{text:?}");
    }
    let (pods, _) = world.look().expect("it settled");
    assert_eq!(pods, ["p", "r"]);
    // Moved away and written anew, as some editors save.
    std::fs::rename(world.path("a.yaml"), world.path("a.yaml~")).expect("renamed");
    assert!(world.look().is_none());
    world.write("a.yaml", &format!("{}# saved\n", pod("p", "10.0.0.1")));
    check(&mut world, &["p"], 0);
    // An empty file is no word of its author's.
    world.write("a.yaml", "\n");
    check(&mut world, &["p"], 1);
    world.restart();
    assert_eq!(world.look().expect("read").0, ["p"]);
}

#[test]
fn mounted_volume_is_replaced_atomically() {
    use std::os::unix::fs::symlink;
    let mut world = World::new();
    std::fs::create_dir_all(world.path("..1")).expect("made");
    std::fs::create_dir_all(world.path("..2")).expect("made");
    world.write("..1/a.yaml", &pod("p", "10.0.0.1"));
    world.write("..2/a.yaml", &pod("q", "10.0.0.1"));
    symlink("..1", world.path("..data")).expect("linked");
    symlink("..data/a.yaml", world.path("a.yaml")).expect("linked");
    assert_eq!(world.look().expect("read").0, ["p"]);
    symlink("..2", world.path("..next")).expect("linked");
    std::fs::rename(world.path("..next"), world.path("..data")).expect("swapped");
    check(&mut world, &["q"], 0);
}

/// As `cp -p` and `rsync --inplace --times` write it.
#[test]
fn edit_with_the_same_size_and_modification_time_is_read() {
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    let written = world.path("a.yaml").metadata().and_then(|it| it.modified()).expect("a time");
    assert_eq!(world.look().expect("read").0, ["p"]);
    world.write("a.yaml", &pod("q", "10.0.0.1"));
    let file = std::fs::File::options().write(true).open(world.path("a.yaml")).expect("opened");
    file.set_modified(written).expect("set");
    check(&mut world, &["q"], 0);
}

#[test]
fn file_that_the_system_fails_to_read_is_read_again_at_each_poll() {
    use std::os::unix::fs::PermissionsExt as _;
    if !nix::unistd::geteuid().is_root() {
        // The mode does not bind root, and only root can be another user.
        return;
    }
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    for path in [world.folder.path().to_owned(), world.path("")] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("set");
    }
    std::fs::set_permissions(world.path("a.yaml"), std::fs::Permissions::from_mode(0o600)).expect("set");
    // Another user, on a thread of its own; the file itself does not change.
    let as_other = |world: &mut World| {
        std::thread::scope(|scope| {
            let polling = scope.spawn(|| {
                nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65_534));
                world.look()
            });
            polling.join().expect("no panic")
        })
    };
    let (pods, problems) = as_other(&mut world).expect("read");
    assert_eq!((pods.len(), problems.len()), (0, 1), "{problems:?}");
    assert!(as_other(&mut world).is_none(), "the same problem");
    assert_eq!(world.look().expect("the problem has gone"), (vec!["p".to_owned()], vec![]));
    assert!(world.look().is_none());
}

#[test]
fn start_while_a_file_is_written_keeps_the_stored_version() {
    let mut world = World::new();
    std::fs::create_dir(world.path("")).expect("made");
    let whole = format!("{}---\n{}", pod("p", "10.0.0.1"), pod("q", "10.0.0.2"));
    world.write("a.yaml", &whole);
    assert_eq!(world.look().expect("read").0, ["p", "q"]);
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    world.restart();
    assert_eq!(world.look().expect("the stored version"), (vec!["p".to_owned(), "q".to_owned()], vec![]));
    world.write("a.yaml", &format!("{whole}---\n{}", pod("r", "10.0.0.3")));
    check(&mut world, &["p", "q", "r"], 0);
    // The file was edited while the member was stopped.
    world.write("a.yaml", &pod("p", "10.0.0.1"));
    world.restart();
    assert_eq!(world.look().expect("the stored version").0, ["p", "q", "r"]);
    assert_eq!(world.look().expect("the file settled"), (vec!["p".to_owned()], vec![]));
    assert!(world.look().is_none());
}
