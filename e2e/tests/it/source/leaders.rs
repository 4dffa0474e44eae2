//! Leaders that follow each other, with the state in Secrets and caches of their own.

use hanse_member::state::SecretName;
use serde_json::json;

use super::*;

const NAMESPACE: &str = "default";

/// The Secrets of a state, and how to reach them.
struct Leaders<'a> {
    world: &'a World,
    access: Access,
    name: SecretName,
}

impl<'a> Leaders<'a> {
    async fn new(world: &'a World) -> Self {
        install_provider();
        let name = SecretName { namespace: NAMESPACE.to_owned(), name: "m".to_owned() };
        for secret in name.secrets() {
            let metadata = json!({"name": secret, "namespace": NAMESPACE});
            world.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata}).to_string()).await;
        }
        let administrator = world.server.user("state", &["system:masters"]).expect("a user");
        let kubeconfig = world.server.write_kubeconfig("state", &administrator).expect("written");
        Self { world, access: Access { kubeconfig: Some(kubeconfig), context: None }, name }
    }

    fn folder(&self, name: &str) -> std::path::PathBuf {
        let folder = self.world.folder.path().join(name);
        std::fs::create_dir(&folder).expect("a folder");
        folder
    }

    /// A leader with empty caches.
    fn next(&self, name: &str) -> Member {
        let (data, access, of) = (self.folder(name), self.access.clone(), self.name.clone());
        let of_source = Access { kubeconfig: Some(self.world.kubeconfig.clone()), context: None };
        Member::start_with(move || {
            let writes = Writes::new(&Health::default());
            let state = State::lead(&data, &access, &of, &writes).expect("the state is read");
            assert!(!state.claim_caches().expect("claimed"), "they are empty");
            Location::Kubernetes(of_source).open(&state, writes).expect("a source")
        })
    }

    /// Waits until the state contains this.
    async fn until_stored(&self, file: &str, is: impl Fn(&str) -> bool) {
        let folder = self.folder(&format!("reader-{file}"));
        State::locate(&folder, Some((&self.access, &self.name))).expect("written");
        let state = State::of_member(&folder).expect("the state is read");
        let mut last = String::new();
        let stored = until(PATIENCE, async || {
            state.refresh().expect("read");
            let bytes = state.read(&format!("source/{file}")).expect("read").unwrap_or_default();
            last = String::from_utf8(bytes).expect("text");
            is(&last)
        });
        assert!(stored.await.is_some(), "{file}: {last}");
    }

    async fn forget_all(&self) {
        let folder = self.folder("commands");
        State::locate(&folder, Some((&self.access, &self.name))).expect("written");
        let state = State::of_member(&folder).expect("the state is read");
        let forgotten = std::thread::spawn(move || source::forget(&state, Vec::new(), true));
        let ended = until(PATIENCE, async || forgotten.is_finished()).await;
        assert!(ended.is_some(), "the member takes the request");
        forgotten.join().expect("it does not panic").expect("the member takes the request");
    }
}

pub(super) async fn is_never_synced(member: &mut Member, why: &str) {
    for _ in 0..60 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!member.view().is_synced, "{why}: {:?}", member.last.policies());
    }
}

#[test]
fn objects_of_a_kind_that_was_deleted_between_leaders_are_missing() {
    run(async {
        let world = World::new("leaders").await;
        world.define_calico().await;
        world.apply(&calico_policy("one")).await;
        let sorted = |it: &View| it.policies().into_iter().collect::<BTreeSet<_>>();
        let are = |names: &[&str]| -> BTreeSet<String> { names.iter().map(|it| (*it).to_owned()).collect() };
        let leaders = Leaders::new(&world).await;
        let mut member = leaders.next("first");
        member.until("the first list", |it| sorted(it) == are(&["closed", "one"])).await;
        leaders.until_stored("definitions.json", |it| it.contains(CALICO_NAME)).await;
        drop(member);
        // While the definition exists, the next one reads its objects.
        let mut member = leaders.next("second");
        member.until("the first list", |it| sorted(it) == are(&["closed", "one"])).await;
        drop(member);
        // No process has seen the deletion, and none knows the policy.
        world.delete_definition().await;
        let mut member = leaders.next("third");
        is_never_synced(&mut member, "a policy is missing").await;
        world.define_calico().await;
        world.apply(&calico_policy("two")).await;
        is_never_synced(&mut member, "it may still be missing").await;
        leaders.forget_all().await;
        member.until("the current objects", |it| sorted(it) == are(&["closed", "two"])).await;
        // A leader that sees it stores the policy for the next one.
        world.delete_definition().await;
        member.until("a kept policy", |it| it.has_problem(&[CALICO_NAME, "1 object kept in force"])).await;
        leaders.until_stored("texts.json", |it| it.contains(CALICO_NAME)).await;
        drop(member);
        let mut member = leaders.next("fourth");
        let is_kept = |it: &View| {
            sorted(it) == are(&["closed", "two"]) && it.has_problem(&[CALICO_NAME, "1 object kept in force"])
        };
        member.stays("a kept policy", is_kept).await;
    });
}
