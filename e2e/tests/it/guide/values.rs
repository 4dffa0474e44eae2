//! The values of the chart on the pages of the guide.

use serde::Deserialize as _;
use serde_json::Value;

use super::{guide, read};
use crate::chart::{list, rendered, value_sets};

/// The YAML documents of a page.
fn documents(page: &str) -> Vec<Value> {
    let text = read(&guide().join(page));
    let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let documents = blocks.flat_map(serde_yaml_ng::Deserializer::from_str);
    documents.map(|document| Value::deserialize(document).expect("YAML")).collect()
}

/// `Kind name` of what the chart renders.
fn objects(values: &Value) -> Vec<String> {
    let name = |it: &Value| {
        format!("{} {}", it["kind"].as_str().unwrap_or_default(), it["metadata"]["name"].as_str().unwrap_or_default())
    };
    rendered(values).iter().map(name).collect()
}

#[test]
fn examples_of_gitops_render() {
    let documents = documents("gitops.md");
    let of = |kind: &str| documents.iter().find(|it| it["kind"] == kind).expect("an example");
    let application = &of("Application")["spec"];
    // Names of objects, and the namespace of the commands, are those of the release `hanse`.
    assert_eq!(application["source"]["helm"]["releaseName"], "hanse");
    assert_eq!(application["destination"]["namespace"], "hanse");
    let hub = objects(&application["source"]["helm"]["valuesObject"]);
    let release = of("HelmRelease");
    assert_eq!((&release["metadata"]["name"], &release["metadata"]["namespace"]), (&"hanse".into(), &"hanse".into()));
    let member = objects(&release["spec"]["values"]);
    for (objects, expected) in [
        (&hub, ["StatefulSet hanse-hub", "CustomResourceDefinition tiers.hanse.dev"]),
        (&member, ["Deployment hanse-member", "DaemonSet hanse-agent"]),
    ] {
        for name in expected {
            assert!(objects.iter().any(|it| it == name), "{name}: {objects:?}");
        }
    }
    assert!(!hub.iter().any(|it| it.contains("hanse-member")) && !member.iter().any(|it| it.contains("hanse-hub")));
}

/// The example of names for replicas: the announced address of each is the name of its Service.
#[test]
fn replicas_have_the_names_that_they_announce() {
    let documents = documents("install.md");
    let example = documents.iter().find(|it| it["hub"]["advertise"].is_string()).expect("the example");
    let mut values = value_sets()["etcd"].clone();
    for (key, value) in example["hub"].as_object().expect("values") {
        values["hub"][key] = value.clone();
    }
    let objects = rendered(&values);
    let hub = objects.iter().find(|it| it["kind"] == "StatefulSet").expect("the hub");
    let container = &hub["spec"]["template"]["spec"]["containers"][0];
    let announced =
        list(container, "args").find_map(|it| it.as_str()?.strip_prefix("--advertise=")).expect("it is set");
    let services: Vec<&Value> = objects.iter().filter(|it| it["kind"] == "Service").collect();
    assert_eq!(services.len(), 4);
    for service in services {
        let name = service["metadata"]["name"].as_str().expect("a name");
        let host = service["metadata"]["annotations"]["external-dns.alpha.kubernetes.io/hostname"].as_str();
        match name {
            "hanse-hub" => assert_eq!(host, Some("hub.example")),
            replica => {
                let address = announced.replace("$(POD_NAME)", replica);
                assert_eq!(host.map(|host| format!("{host}:7443")), Some(address));
            }
        }
        assert_eq!(service["spec"]["loadBalancerSourceRanges"][0], "192.0.2.0/24");
    }
}
