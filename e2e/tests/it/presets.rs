//! The presets of `hanse policy scaffold`, all together and some alone, judged by packets.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;

use hanse_e2e::enforcement::Enforcement;
use hanse_e2e::fabric::Fabric;
use hanse_e2e::probe::{self, Listener, Observed};
use hanse_e2e::sandbox;
use hanse_e2e::world::{Cluster, Pod};

use crate::system::programs;

/// A named registry outside, something else outside, and where a cloud would hand out credentials; with each its IPv6 twin.
const REGISTRY: [&str; 2] = ["203.0.113.5", "2001:db8:5::5"];
const ELSEWHERE: [&str; 2] = ["203.0.113.99", "2001:db8:9::9"];
const METADATA: [&str; 2] = ["169.254.169.254", "fd00:ec2::254"];
const OUTSIDE_PORT: u16 = 443;

/// A cluster of one node. Pods: namespace, name, labels, port.
fn cluster(number: u8, namespaces: &[(&str, &str)], pods: &[(&str, &str, &str, u16)]) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: node-1}}\nspec: {{podCIDR: 10.{number}.1.0/24, podCIDRs: \
         [10.{number}.1.0/24, 'fd00:{number}:1::/64']}}\nstatus: {{addresses: [{{type: InternalIP, address: \
         192.168.{number}.1}}, {{type: InternalIP, address: 'fd00:{number}::1'}}]}}\n"
    );
    for (name, stage) in namespaces {
        text += &format!(
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{kubernetes.io/metadata.name: \
             {name}, stage: '{stage}'}}}}\n"
        );
    }
    for (at, (namespace, name, labels, port)) in (10..).zip(pods) {
        text += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n\
             spec: {{nodeName: node-1, containers: [{{name: main, ports: [{{name: main, containerPort: {port}, \
             protocol: TCP}}]}}]}}\nstatus: {{phase: Running, podIP: 10.{number}.1.{at}, podIPs: [{{ip: \
             10.{number}.1.{at}}}, {{ip: 'fd00:{number}:1::{at}'}}]}}\n"
        );
    }
    text
}

/// Who, to whom, on which port, whether it may, and why.
type Case<'a> = (&'a str, &'a str, u16, bool, &'a str);

#[test]
fn presets_allow_and_deny_the_documented_packets() {
    sandbox::test("presets::presets_allow_and_deny_the_documented_packets", || {
        let scratch = tempfile::tempdir().expect("a folder");
        let job = |name: &str| format!("batch.kubernetes.io/job-name: {name}");
        let (llama, other) = (job("llama"), job("other"));
        let train = cluster(
            40,
            &[("jobs", "train"), ("tenant", "train"), ("tuning", "finetune"), ("kube-system", "")],
            &[
                ("jobs", "llama-0", &llama, 29500),
                ("jobs", "llama-1", &llama, 29500),
                ("jobs", "other-0", &other, 29500),
                ("tenant", "llama-of-tenant", &llama, 29500),
                ("kube-system", "coredns", "k8s-app: kube-dns", 53),
                ("jobs", "loader", "models: write", 9000),
                ("jobs", "builder", "app: builder", 9000),
                ("tuning", "tuner", "models: read", 9000),
            ],
        );
        let serve = cluster(
            41,
            &[("llm", "inference"), ("shop", "prod"), ("models", "")],
            &[
                ("llm", "vllm", "models: read", 8000),
                ("llm", "router", "app: router", 8000),
                ("shop", "web", "app: web", 8000),
                ("models", "registry", "app: model-registry", 8080),
            ],
        );
        let mut clusters = Vec::new();
        for (name, text) in [("train", train), ("serve", serve)] {
            let directory = scratch.path().join(name);
            std::fs::create_dir(&directory).expect("a folder");
            std::fs::write(directory.join("cluster.yaml"), text).expect("manifests");
            clusters.push(Cluster::read(name, &directory).expect("manifests of a cluster"));
        }
        let federation = scratch.path().join("federation");
        std::fs::create_dir(&federation).expect("a folder");
        scaffold(&federation);

        let fabric = Fabric::build(&clusters).expect("the network");
        let mut outside = String::new();
        for [v4, v6] in [REGISTRY, ELSEWHERE, METADATA] {
            outside += &format!("addr add {v4}/32 dev lo\naddr add {v6}/128 dev lo nodad\n");
        }
        fabric.router().batch(&outside).expect("addresses outside");
        let pods: Vec<&Pod> = clusters.iter().flat_map(|cluster| &cluster.pods).collect();
        let find = |name: &str| *pods.iter().find(|pod| pod.name == name).expect("a pod of this world");
        let at = |pod: &Pod, port: u16| {
            Listener::start(fabric.pod(pod).expect("built"), port, &pod.name).expect("the port is free")
        };
        let mut listeners: Vec<Listener> = pods.iter().map(|pod| at(pod, pod.port)).collect();
        listeners.push(at(find("registry"), 8081));
        listeners.push(at(find("coredns"), 54));
        listeners.push(Listener::start(fabric.router(), OUTSIDE_PORT, "outside").expect("the port is free"));

        let cases: &[Case<'_>] = &[
            ("llama-0", "llama-1", 29500, true, "workers of one job"),
            ("other-0", "llama-0", 29500, false, "a worker of another job of the same stage"),
            ("llama-0", "other-0", 29500, false, "a worker to another job, though the stage is open"),
            ("other-0", "loader", 9000, true, "open within the stage: no policy closes it"),
            ("llama-of-tenant", "llama-0", 29500, false, "a worker of an equally named job of another namespace"),
            ("llama-0", "llama-of-tenant", 29500, false, "and to one"),
            ("llama-0", "coredns", 53, true, "a worker looks up a name"),
            ("builder", "coredns", 53, true, "others look up a name"),
            ("tuner", "llama-0", 29500, false, "fine-tuning to training"),
            ("llama-0", "vllm", 8000, false, "training to inference"),
            ("router", "vllm", 8000, true, "within inference"),
            ("web", "vllm", 8000, false, "production to inference"),
            ("vllm", "web", 8000, false, "inference to production"),
            ("loader", "registry", 8081, true, "a writer publishes, from another cluster"),
            ("loader", "registry", 8080, true, "a writer reads"),
            ("vllm", "registry", 8080, true, "a reader reads"),
            ("tuner", "registry", 8080, true, "a reader reads, from another cluster"),
            ("vllm", "registry", 8081, false, "a reader does not publish"),
            ("builder", "registry", 8080, false, "neither reader nor writer"),
            ("registry", "vllm", 8000, false, "the registry opens no connections"),
            ("builder", "a named registry", OUTSIDE_PORT, true, "out to a named registry"),
            ("builder", "elsewhere", OUTSIDE_PORT, false, "and to nothing else"),
            ("loader", "a named registry", OUTSIDE_PORT, false, "nor by others"),
            ("registry", "metadata", OUTSIDE_PORT, false, "the metadata address"),
        ];
        let measured = |cases: &[Case<'_>], enforced: bool| {
            let one = |(from, to, port, allowed, why): &Case<'_>, family: usize| {
                let (address, title): (IpAddr, &str) = match *to {
                    "a named registry" => (REGISTRY[family].parse().expect("an address"), "outside"),
                    "elsewhere" => (ELSEWHERE[family].parse().expect("an address"), "outside"),
                    "metadata" => (METADATA[family].parse().expect("an address"), "outside"),
                    pod => (find(pod).addresses[family], pod),
                };
                let inside = fabric.pod(find(from)).expect("built");
                let observed = probe::tcp(inside, SocketAddr::new(address, *port), title);
                let wanted = if *allowed || !enforced { Observed::Open } else { Observed::Closed };
                (observed != wanted).then(|| format!("{from} to {address}:{port} is {observed:?}: {why}"))
            };
            let wrong: Vec<String> = std::thread::scope(|scope| {
                let probes = cases.iter().flat_map(|case| [(case, 0), (case, 1)]);
                let probes: Vec<_> = probes.map(|(case, family)| scope.spawn(move || one(case, family))).collect();
                probes.into_iter().filter_map(|probe| probe.join().expect("a probe does not panic")).collect()
            });
            wrong
        };
        assert_eq!(measured(cases, false), Vec::<String>::new(), "before the presets everything is open");
        let mut enforcement = Enforcement::default();
        enforcement.apply(&fabric, &clusters, &federation).expect("applied");
        assert_eq!(measured(cases, true), Vec::<String>::new());

        // Alone, and with a policy of the cluster that opens everything: the guards apply, and close nothing else.
        for preset in ["default-deny", "stages", "model-registry"] {
            std::fs::remove_file(federation.join(format!("{preset}.yaml"))).expect("it was written");
        }
        render(&federation, "egress-registries", &["--set", &registries()]);
        let open = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: open, namespace: jobs}\n\
                    spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}\n";
        std::fs::write(scratch.path().join("train/open.yaml"), open).expect("a manifest");
        enforcement.apply(&fabric, &clusters, &federation).expect("applied");
        let cases: &[Case<'_>] = &[
            ("registry", "metadata", OUTSIDE_PORT, false, "the metadata address"),
            ("llama-1", "llama-0", 29500, true, "workers of one job"),
            ("other-0", "llama-0", 29500, false, "a worker of another job"),
            ("llama-of-tenant", "llama-0", 29500, false, "a worker of an equally named job of another namespace"),
            ("llama-0", "other-0", 29500, false, "out of the job"),
            ("llama-0", "llama-of-tenant", 29500, false, "out of the job, to an equally named one"),
            ("llama-0", "a named registry", OUTSIDE_PORT, false, "out of the job, to a registry"),
            ("llama-0", "coredns", 53, true, "a worker looks up a name"),
            ("builder", "a named registry", OUTSIDE_PORT, true, "out to a named registry"),
            ("builder", "elsewhere", OUTSIDE_PORT, false, "out to anything else, which the cluster opens"),
            ("registry", "elsewhere", OUTSIDE_PORT, false, "out to anything else, where nothing selects the pod"),
            ("builder", "coredns", 53, true, "others look up a name"),
            ("coredns", "elsewhere", OUTSIDE_PORT, true, "and the name server looks it up"),
            ("web", "vllm", 8000, true, "between pods nothing is closed"),
            ("loader", "registry", 8081, true, "between pods of two clusters nothing is closed"),
        ];
        assert_eq!(measured(cases, true), Vec::<String>::new());

        // The stages and the model registry alone close what they select, but for looking up names.
        std::fs::remove_file(scratch.path().join("train/open.yaml")).expect("it was written");
        for preset in ["gpu-collective", "egress-registries", "deny-metadata"] {
            std::fs::remove_file(federation.join(format!("{preset}.yaml"))).expect("it was written");
        }
        for preset in ["stages", "model-registry"] {
            render(&federation, preset, &[]);
            enforcement.apply(&fabric, &clusters, &federation).expect("applied");
            let cases: &[Case<'_>] = &[
                ("tuner", "coredns", 53, true, "names can be looked up"),
                ("tuner", "coredns", 54, false, "and no other port there"),
                ("tuner", "elsewhere", OUTSIDE_PORT, false, "what is selected is closed"),
            ];
            assert_eq!(measured(cases, true), Vec::<String>::new(), "{preset}");
            std::fs::remove_file(federation.join(format!("{preset}.yaml"))).expect("it was written");
        }
    });
}

fn registries() -> String {
    format!("nets={}/28,{}/64", REGISTRY[0].replace(".5", ".0"), REGISTRY[1].replace("::5", "::"))
}

fn scaffold(federation: &Path) {
    for (preset, arguments) in [
        ("tiers", &[][..]),
        ("default-deny", &[]),
        ("deny-metadata", &[]),
        ("stages", &[]),
        ("model-registry", &[]),
        ("gpu-collective", &["--set", "job=llama", "--set", "namespace=jobs"]),
        ("egress-registries", &["--set", &registries(), "--set", "from=app == 'builder'"]),
    ] {
        render(federation, preset, arguments);
    }
}

fn render(federation: &Path, preset: &str, arguments: &[&str]) {
    let mut command = Command::new(programs().join("hanse"));
    let output = command.args(["policy", "scaffold", preset]).args(arguments).output().expect("hanse runs");
    assert!(output.status.success(), "{preset}: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::write(federation.join(format!("{preset}.yaml")), output.stdout).expect("manifests");
}
