//! Restart, drift, removal, and what the kernel refuses.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hanse_dataplane::nftables::{Config, Nftables};
use hanse_dataplane::{Backend as _, Found, Object};
use hanse_ruleset::{Action, Peer, Rule, RuleSet, SetId, TierDefault};

use crate::net::{Net, address, nft, passes};
use crate::verdicts::{Build, addresses, from_set, rule, to_port};

fn closed() -> Build {
    Build {
        pods: vec![2, 3],
        ingress: Some(vec![from_set(Action::Allow, "friends")]),
        sets: vec![addresses("friends", &["10.1.0.9", "fd01::9"])],
        ..Build::default()
    }
}

#[test]
fn restarted_agent_adopts_the_rules_in_force() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let rules = closed().rules();
    let mut driver = net.driver();
    assert_eq!(driver.adopt(Some(&rules)).expect("read"), Found::Nothing);
    driver.apply(&rules).expect("applied");
    drop(driver);
    // Enforcement outlives the agent.
    let _listener = net.listen("p3", "10.1.0.3:80");
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    let before = nft(&net, "-a list table inet hanse");
    let mut driver = net.driver();
    let found = Found::Rules { generation: rules.generation, digest: rules.digest() };
    assert_eq!(driver.adopt(Some(&rules)).expect("read"), found);
    assert_eq!(nft(&net, "-a list table inet hanse"), before, "adoption changes nothing");
    // All rules are written again, once; then only the difference: the policy's chain keeps its handle.
    driver.apply(&rules).expect("applied");
    let before = nft(&net, "-a list table inet hanse");
    let next = Build { pods: vec![2, 3, 4], number: 7, ..closed() }.rules();
    driver.apply(&next).expect("applied");
    let after = nft(&net, "-a list table inet hanse");
    let policy = before.lines().find(|line| line.contains("chain p4-")).expect("the policy's chain");
    assert!(after.lines().any(|line| line == policy), "the chain of the policy was written again");
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    // Rules that are not known stay, and the next generation replaces the whole table.
    drop(driver);
    let mut driver = net.driver();
    assert!(matches!(driver.adopt(None).expect("read"), Found::Rules { .. }));
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    let open = Build { pods: vec![2, 3], number: 8, ..Build::default() }.rules();
    driver.apply(&open).expect("applied");
    assert!(net.connect("p2", "10.1.0.3:80").is_some());
}

/// Interfaces that may bring any source are part of the rules.
#[test]
fn restarted_agent_writes_other_uplinks() {
    let net = Net::new();
    let rules = closed().rules();
    net.driver().apply(&rules).expect("applied");
    let config = Config { uplinks: vec!["up1".into()], flows: true, ..Config::default() };
    let mut driver = net.within("node", || Nftables::open(config).expect("netlink"));
    driver.adopt(Some(&rules)).expect("read");
    driver.apply(&rules).expect("applied");
    nft(&net, "get element inet hanse uplinks { up1 }");
}

/// Each change has as many rules and elements as before.
#[test]
fn restarted_agent_restores_changed_rules() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let rules = closed().rules();
    net.driver().apply(&rules).expect("applied");
    let _listener = net.listen("p3", "10.1.0.3:80");
    let whole = nft(&net, "list table inet hanse");
    let handles = nft(&net, "-a list chain inet hanse forward");
    let judge = handles.lines().find(|line| line.contains("jump judge4") && !line.contains("related"));
    let handle = judge.and_then(|line| line.rsplit(' ').next()).expect("a handle");
    let ingress = whole.split("10.1.0.3 : jump ").nth(1).and_then(|rest| rest.split([' ', ',']).next());
    let accepting =
        "delete element inet hanse ingress4 { 10.1.0.3 }; add element inet hanse ingress4 { 10.1.0.3 : accept }";
    assert!(ingress.is_some(), "{whole}");
    for damage in [
        // First: the others write the rule again, with another handle.
        format!("replace rule inet hanse forward handle {handle} accept"),
        accepting.to_owned(),
        "delete element inet hanse pods4 { 10.1.0.3 }; add element inet hanse pods4 { 10.9.0.3 }".to_owned(),
        "add table inet hanse { flags dormant; }".to_owned(),
    ] {
        nft(&net, &damage);
        let opens = !damage.contains("pods4");
        assert_eq!(net.connect("p2", "10.1.0.3:80").is_some(), opens, "{damage}: what it does");
        let mut driver = net.driver();
        driver.adopt(Some(&rules)).expect("read");
        assert!(driver.repair().expect("written"));
        assert!(net.connect("p2", "10.1.0.3:80").is_none(), "{damage}: not restored");
        assert_eq!(without_counts(&nft(&net, "list table inet hanse")), without_counts(&whole), "{damage}");
        assert!(!driver.repair().expect("looked"), "{damage}");
    }
}

#[test]
fn repairs_drift() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let rules = closed().rules();
    driver.apply(&rules).expect("applied");
    let _listener = net.listen("p3", "10.1.0.3:80");
    assert!(!driver.repair().expect("looked"), "nothing was changed");
    let whole = nft(&net, "list table inet hanse");
    let name = |prefix: &str, kind: &str| {
        let line = whole.lines().map(str::trim).find(|line| line.starts_with(&format!("{kind} {prefix}")));
        line.and_then(|line| line.split(' ').nth(1)).expect("in the table").to_owned()
    };
    let (policy, chain, friends) = (name("p4-", "chain"), name("c4-", "chain"), name("s4-", "set"));
    let handles = nft(&net, "-a list chain inet hanse forward");
    let judge = handles.lines().find(|line| line.contains("jump judge4") && !line.contains("related"));
    let handle = judge.and_then(|line| line.rsplit(' ').next()).expect("a handle").to_owned();
    // With the port that the damage opens; `None`: it opens nothing, and is repaired nevertheless.
    for (damage, opens) in [
        ("flush chain inet hanse forward".to_owned(), true),
        (format!("delete rule inet hanse forward handle {handle}"), true),
        ("insert rule inet hanse forward accept".to_owned(), false),
        (format!("insert rule inet hanse {policy} meta mark set 0x00100000 return"), true),
        (format!("flush chain inet hanse {policy}"), false),
        (format!("add element inet hanse {friends} {{ 10.1.0.2 }}"), true),
        (format!("delete element inet hanse {friends} {{ 10.1.0.9 }}"), false),
        ("delete element inet hanse ingress4 { 10.1.0.3 }".to_owned(), false),
        ("delete element inet hanse pods4 { 10.1.0.3 }".to_owned(), false),
        ("add element inet hanse uplinks { pod2 }".to_owned(), false),
        ("add chain inet hanse forward { policy drop; }".to_owned(), false),
        (format!("insert rule inet hanse {chain} accept"), true),
        ("add chain inet hanse more { type filter hook forward priority 10; }".to_owned(), false),
        ("add table inet hanse { flags dormant; }".to_owned(), true),
        ("flush chain inet hanse state".to_owned(), false),
        ("delete chain inet hanse prerouting".to_owned(), false),
        ("flush table inet hanse".to_owned(), true),
        ("delete table inet hanse".to_owned(), true),
        ("flush ruleset".to_owned(), true),
    ] {
        // A connection of its own for each: judged connections are not judged again.
        nft(&net, &damage);
        let ends_elsewhere = damage.contains("forward accept");
        if !ends_elsewhere {
            assert_eq!(net.connect("p2", "10.1.0.3:80").is_some(), opens, "{damage}: what it does");
        }
        assert!(driver.repair().expect("repaired"), "{damage}: not seen");
        assert!(net.connect("p2", "10.1.0.3:80").is_none(), "{damage}: not repaired");
        assert_eq!(without_counts(&nft(&net, "list table inet hanse")), without_counts(&whole), "{damage}");
        assert!(!driver.repair().expect("looked"), "{damage}: its own repair is not drift");
    }
    // A generation after the damage does not build on it.
    nft(&net, &format!("add element inet hanse {friends} {{ 10.1.0.2 }}"));
    driver.apply(&Build { number: 1, ..closed() }.rules()).expect("applied");
    assert!(net.connect("p2", "10.1.0.3:80").is_none(), "the next generation left the damage");
    // Tables of other programs are not changed.
    nft(&net, "add table inet other");
    assert!(!driver.repair().expect("looked"));
}

/// The table as text, without the parts that packets and generations change.
fn without_counts(table: &str) -> String {
    let mut text = String::new();
    for line in table.lines() {
        let line = line.split("counter packets").next().unwrap_or_default();
        let holds_epoch = line.contains("hanse/2") || line.contains("0x000") || line.contains("elements = { 0x");
        let is_note = line.contains("ct mark set");
        if !holds_epoch && !is_note {
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
    text
}

#[test]
fn closes_and_reports_refused_objects_and_applies_the_rest() {
    let mut net = Net::new();
    for pod in [2, 3, 4] {
        net.pod(pod);
    }
    let mut driver = net.driver();
    let _listeners =
        ["10.1.0.3:80", "10.1.0.4:80"].map(|at| net.listen(if at.contains(".3:") { "p3" } else { "p4" }, at));
    let open =
        |number| Build { pods: vec![2, 3, 4], ingress: Some(vec![rule(Action::Allow)]), number, ..Build::default() };
    driver.apply(&open(1).rules()).expect("applied");
    assert!(net.connect("p2", "10.1.0.3:80").is_some());
    // A rule with more expressions than the kernel accepts, for pod 3 alone.
    let wide = Rule {
        source: Peer { not_sets: vec![SetId::of_meaning(&["strangers"]); 100], ..Peer::default() },
        ..rule(Action::Allow)
    };
    let mut rules = (*Build { sets: vec![addresses("strangers", &["10.1.0.9"])], ..open(2) }.rules()).clone();
    let other =
        Build { ingress: Some(vec![wide]), sets: vec![addresses("strangers", &["10.1.0.9"])], ..open(2) }.rules();
    for (id, policy) in &other.policies {
        rules.policies.insert(*id, policy.clone());
    }
    let three = other.endpoints.iter().find(|(id, _)| &*id.name == "p3").expect("pod 3");
    // The default of the tier is Pass: the replacement of a refused policy must deny by itself.
    let mut chain = (*other.chains[&three.1.ingress]).clone();
    chain.phases.iter_mut().flat_map(|phase| &mut phase.tiers).for_each(|tier| tier.default = TierDefault::Pass);
    let mut endpoint = (**three.1).clone();
    endpoint.ingress = chain.id();
    rules.chains.insert(chain.id(), Arc::new(chain));
    rules.endpoints.insert(three.0.clone(), Arc::new(endpoint));
    // And an address that two endpoints claim.
    let mut twin = (**three.1).clone();
    twin.id.name = "twin".into();
    (twin.ingress, twin.addresses) = (twin.egress, vec![address("10.1.0.4")]);
    rules.endpoints.insert(twin.id.clone(), Arc::new(twin));
    let applied = driver.apply(&Arc::new(rules.clone())).expect("the rest applies");
    let refused: Vec<&Object> = applied.refused.iter().map(|it| &it.object).collect();
    let [Object::Policy { name, .. }, Object::Endpoint(id)] = refused[..] else { panic!("{applied:?}") };
    assert_eq!((&**name, &*id.namespace, &*id.name), ("ingress", "a", "twin"));
    assert!(applied.refused.iter().all(|it| !it.rejection.error.is_empty()));
    assert!(net.connect("p2", "10.1.0.3:80").is_none(), "what was refused is closed");
    assert!(net.connect("p2", "10.1.0.4:80").is_some(), "the rest applies");
    // It stays closed and reported in the next generation, and opens when it is gone.
    rules.generation.number = 3;
    let applied = driver.apply(&Arc::new(rules)).expect("applied");
    assert_eq!(applied.refused.len(), 2);
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    assert_eq!(driver.apply(&open(4).rules()).expect("applied").refused, []);
    assert!(net.connect("p2", "10.1.0.3:80").is_some());
}

#[test]
fn cleanup_removes_everything_and_cuts_no_connection() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let open = Build { pods: vec![2, 3], ingress: Some(vec![rule(Action::Allow)]), ..Build::default() };
    driver.apply(&open.rules()).expect("applied");
    let listener = net.listen("p3", "10.1.0.3:80");
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listener);
    driver.cleanup().expect("removed");
    driver.cleanup().expect("nothing to remove is fine");
    assert_eq!(nft(&net, "list ruleset").trim(), "");
    assert!(passes(&mut client, &mut server));
}

/// Counts packets of connections without the bits, and then sets them.
fn marking(net: &Net, bits: &str) {
    nft(net, "add table inet other");
    nft(net, "add chain inet other forward { type filter hook forward priority 10; }");
    nft(net, &format!("add rule inet other forward ct mark & {bits} == 0 counter ct mark set ct mark or {bits}"));
}

fn counted(net: &Net) -> u64 {
    let chain = nft(net, "list chain inet other forward");
    let count = chain.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("a count: {chain}"))
}

#[test]
fn cleanup_clears_the_marks_of_the_table_only() {
    const MASK: &str = "0x0000ff00";
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    // A bit of the default mask belongs to another program.
    marking(&net, "0x40000000");
    let config = Config { ct_mark_mask: 0x0000_ff00, ..Config::default() };
    let open = Build { pods: vec![2, 3], ingress: Some(vec![rule(Action::Allow)]), ..Build::default() };
    net.driver_with(config).apply(&open.rules()).expect("applied");
    let listener = net.listen("p3", "10.1.0.3:80");
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listener);
    assert!(passes(&mut client, &mut server) && counted(&net) == 1);
    for rules in [true, false] {
        net.driver().cleanup().expect("removed");
        assert!(passes(&mut client, &mut server));
        assert_eq!(counted(&net), 1, "its bit stays; with rules before: {rules}");
    }
    nft(&net, "flush chain inet other forward");
    nft(&net, &format!("add rule inet other forward ct mark & {MASK} != 0 counter"));
    assert!(passes(&mut client, &mut server));
    assert_eq!(counted(&net), 0, "bits of Hanse are cleared");
}

#[test]
fn restarted_agent_with_another_mask_clears_the_former_marks() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let rules = Build { pods: vec![2, 3], ingress: Some(vec![rule(Action::Allow)]), ..Build::default() }.rules();
    let with = |ct_mark_mask| net.driver_with(Config { ct_mark_mask, ..Config::default() });
    with(0x0000_ff00).apply(&rules).expect("applied");
    let listener = net.listen("p3", "10.1.0.3:80");
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listener);
    assert!(passes(&mut client, &mut server));
    let mut driver = with(0xffff_0000);
    driver.adopt(Some(&rules)).expect("read");
    driver.apply(&rules).expect("applied");
    nft(&net, "add table inet other");
    nft(&net, "add chain inet other forward { type filter hook forward priority 10; }");
    nft(&net, "add rule inet other forward ct mark & 0x0000ff00 != 0 counter");
    assert!(passes(&mut client, &mut server));
    assert_eq!(counted(&net), 0);
}

/// A generation whose objects all have other names than those of the one before; only pod 2 may reach pod 3.
fn flipping(number: u64) -> Arc<RuleSet> {
    let name = if number.is_multiple_of(2) { "even" } else { "odd" };
    let mut rules = vec![from_set(Action::Allow, name)];
    rules.extend((0..number % 3).map(|extra| to_port(Action::Deny, 1000 + extra as u16)));
    let sets = vec![addresses(name, &["10.1.0.2"])];
    Build { pods: vec![2, 3, 4], ingress: Some(rules), sets, number, ..Build::default() }.rules()
}

/// Not a test: the process that `killed_agent_leaves_a_complete_generation` starts and kills.
#[test]
fn applies_until_killed() {
    let Ok(namespace) = std::env::var("HANSE_TEST_NAMESPACE") else { return };
    let namespace = std::fs::File::open(namespace).expect("the namespace");
    nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("root");
    let mut driver = Nftables::open(Config { uplinks: vec!["up0".into()], ..Config::default() }).expect("netlink");
    driver.adopt(None).expect("read");
    for number in 1.. {
        driver.apply(&flipping(number)).expect("applied");
        let progress = std::fs::OpenOptions::new().append(true).open(std::env::var("HANSE_TEST_FILE").expect("set"));
        std::io::Write::write_all(&mut progress.expect("the file"), b".").expect("written");
    }
}

#[test]
fn killed_agent_leaves_a_complete_generation() {
    let mut net = Net::new();
    for pod in [2, 3, 4] {
        net.pod(pod);
    }
    let mut driver = net.driver();
    driver.apply(&flipping(0)).expect("applied");
    drop(driver);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("applied");
    std::fs::write(&file, b"").expect("written");
    let applied = || std::fs::metadata(&file).expect("there").len();
    let (allowed, forbidden) = (net.udp("p3", "10.1.0.3:5000"), net.udp("p3", "10.1.0.3:5001"));
    let done = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            net.within("p4", || {
                while !done.load(Ordering::Relaxed) {
                    let fresh = UdpSocket::bind("10.1.0.4:0").expect("bound");
                    sent.fetch_add(u64::from(fresh.send_to(b"flood", "10.1.0.3:5001").is_ok()), Ordering::Relaxed);
                }
            });
        });
        for turn in 0..20 {
            let before = applied();
            let mut agent = Command::new(std::env::current_exe().expect("this program"))
                .args(["--exact", "lifecycle::applies_until_killed"])
                .env("HANSE_TEST_NAMESPACE", format!("/run/netns/{}", net.name("node")))
                .env("HANSE_TEST_FILE", &file)
                .stdout(std::process::Stdio::null())
                .spawn()
                .expect("started");
            // It is killed while it applies the next: after as many as the turn has.
            let going = crate::net::until(|| (applied() > before + turn).then_some(()));
            agent.kill().expect("killed");
            agent.wait().expect("ended");
            assert!(going.is_some(), "it applies generations");
            assert!(net.datagram("p2", "10.1.0.2:4000", &allowed), "turn {turn}: what it left behind enforces");
        }
        done.store(true, Ordering::Relaxed);
    });
    forbidden.set_nonblocking(true).expect("set");
    let leaked = std::iter::from_fn(|| forbidden.recv_from(&mut [0; 16]).ok()).count();
    let sent = sent.into_inner();
    println!("killed 20 times in {} generations: {sent} forbidden packets sent, {leaked} received", applied());
    assert!(sent > 1000, "the flood is one");
    assert_eq!(leaked, 0);
}
