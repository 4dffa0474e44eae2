//! Objects as an API server stores and sends them.

use std::fmt::Write as _;

use serde_json::Value;

use crate::decode::typed;
use crate::diagnostic::Reference;
use crate::document::{Node, Notes};
use crate::kind;
use crate::metadata::Metadata;

/// What the keys of annotations that are read start with. Others are as large as users make them, and repeat the fields of the
/// object, such as the environment of containers.
const READ_ANNOTATIONS: [&str; 2] = ["hanse.dev/", "projectcalico.org/"];

/// The JSON of an object without the fields that are not read; reading it gives the same object. `notes`: of the fields that were met
/// when the object was decoded.
pub(crate) fn used_text(reference: &Reference, node: Node<'_>, notes: &Notes) -> String {
    let mut text = String::with_capacity(512);
    let _ = write!(text, r#"{{"apiVersion":{},"kind":{}"#, quoted(&reference.api_version), quoted(&reference.kind));
    // Unknown fields of policies have a meaning: they are kept.
    let of_metadata = Notes::default();
    let is_strict = kind::is_strict(reference);
    if is_strict && let Some(metadata) = node.child("metadata") {
        // What cannot be decoded is kept.
        let _decoded = typed::<Metadata>(metadata.with_notes(&of_metadata));
    }
    let none = Notes::default();
    for (name, value) in notes.known_fields(node).filter(|(name, _)| !matches!(*name, "apiVersion" | "kind")) {
        let _ = write!(text, ",{}:", quoted(name));
        let notes = match (is_strict, name) {
            (false, _) => notes,
            (true, "metadata") => &of_metadata,
            (true, _) => &none,
        };
        let is_read = |path: &[&str]| match path {
            ["annotations", key] if name == "metadata" => READ_ANNOTATIONS.iter().any(|prefix| key.starts_with(prefix)),
            _ => true,
        };
        notes.write_known(value, &is_read, &mut text);
    }
    text.push('}');
    text
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The JSON of a policy of a namespace without its rules: it closes what they may close. `directions`: whether it decides ingress, and
/// egress. `None` if `text` is not JSON.
pub fn without_rules(text: &str, directions: [bool; 2]) -> Option<String> {
    let mut value: Value = serde_json::from_str(text).ok()?;
    let is_kubernetes =
        value.get("apiVersion").and_then(Value::as_str).is_some_and(|it| it.starts_with("networking.k8s.io/"));
    let fields = value.as_object_mut()?;
    let spec = fields.entry("spec").or_insert_with(|| Value::Object(serde_json::Map::new())).as_object_mut()?;
    let mut types = Vec::new();
    for (name, direction, is_decided) in [("ingress", "Ingress", directions[0]), ("egress", "Egress", directions[1])] {
        spec.remove(name);
        if is_decided {
            types.push(Value::from(direction));
            if !is_kubernetes {
                spec.insert(name.to_owned(), serde_json::json!([{"action": "Deny"}]));
            }
        }
    }
    spec.insert(if is_kubernetes { "policyTypes" } else { "types" }.to_owned(), types.into());
    Some(value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Manifests, read_bytes};
    use crate::object;

    fn used_fields(text: &str) -> Option<String> {
        let mut read = Manifests::of_api_server();
        read_bytes(&"stored".into(), text.as_bytes(), &mut read);
        read.take_used_fields()
    }

    fn read(text: &str) -> Manifests {
        let mut read = Manifests::default();
        read_bytes(&"stored".into(), text.as_bytes(), &mut read);
        read
    }

    /// The reduced text, which must read as the same object.
    fn reduced(text: &str) -> String {
        let reduced = used_fields(text).expect("an object that is read");
        let (before, after) = (read(text), read(&reduced));
        assert_eq!(before.diagnostics, [], "{text}");
        assert_eq!(after.diagnostics, [], "{reduced}");
        let [before, after] = [before, after].map(|it| it.objects.into_iter().map(|it| it.object).collect::<Vec<_>>());
        assert_eq!(before, after, "{reduced}");
        assert_eq!(before.len(), 1);
        reduced
    }

    #[test]
    fn keeps_only_the_used_fields_of_a_pod() {
        let pod = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","namespace":"n","uid":"u","labels":{"a":"b"},
            "creationTimestamp":"2026-01-01T00:00:00Z","annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{}"},
            "ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"r","uid":"u","controller":true}],
            "managedFields":[{"manager":"kubelet","fieldsV1":{"f:status":{}}}]},
            "spec":{"nodeName":"one","serviceAccountName":"s","volumes":[{"name":"v"}],"containers":[{"name":"c","image":"i",
            "env":[{"name":"PASSWORD","value":"secret"}],"ports":[{"name":"http","containerPort":80,"protocol":"TCP"}]}]},
            "status":{"phase":"Running","podIP":"10.0.0.1","podIPs":[{"ip":"10.0.0.1"}],"conditions":[{"type":"Ready"}]}}"#;
        let reduced = reduced(pod);
        for unused in ["secret", "managedFields", "volumes", "conditions", "last-applied", "image", "\"u\""] {
            assert!(!reduced.contains(unused), "{unused} in {reduced}");
        }
        for used in ["10.0.0.1", "\"http\"", "ReplicaSet", "\"one\"", "2026-01-01T00:00:00Z"] {
            assert!(reduced.contains(used), "{used} not in {reduced}");
        }
    }

    #[test]
    fn keeps_all_fields_of_policies_but_not_of_their_metadata() {
        let policy = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"p","namespace":"n",
            "managedFields":[{"manager":"kubectl"}],"annotations":{"hanse.dev/peers":"ClusterSet","other":"x"}},
            "spec":{"podSelector":{"matchLabels":{"a":"b"}},"policyTypes":["Ingress"],"ingress":[{"ports":[{"port":"http"}]}]}}"#;
        let reduced = reduced(policy);
        assert!(reduced.contains("hanse.dev/peers") && reduced.contains("\"http\""), "{reduced}");
        assert!(!reduced.contains("managedFields") && !reduced.contains("other"), "{reduced}");
        // A field of a later version stays in the text, and is reported when it is read.
        let later = policy.replace("\"policyTypes\"", "\"later\":1,\"policyTypes\"");
        let reduced = used_fields(&later).expect("an object");
        assert_eq!(read(&later).diagnostics.len(), 1);
        assert_eq!(read(&reduced).diagnostics.len(), 1, "{reduced}");
    }

    #[test]
    fn a_policy_without_rules_closes() {
        for (head, no_rules) in [
            (r#""apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy""#, 0),
            (r#""apiVersion":"projectcalico.org/v3","kind":"NetworkPolicy""#, 1),
            (r#""apiVersion":"crd.projectcalico.org/v1","kind":"NetworkPolicy""#, 1),
        ] {
            let selector =
                if no_rules == 0 { r#""podSelector":{"matchLabels":{"a":"b"}}"# } else { r#""selector":"a == 'b'""# };
            let rule = if no_rules == 0 { "{}" } else { r#"{"action":"Allow"}"# };
            let text = format!(
                r#"{{{head},"metadata":{{"name":"p","namespace":"n"}},"spec":{{{selector},"egress":[{rule},{rule}],"ingress":[]}}}}"#
            );
            let Some(object::Object::Policy(before)) = read(&text).objects.pop().map(|it| it.object) else {
                panic!("{text}")
            };
            let closed = without_rules(&text, before.directions()).expect("JSON");
            let read = read(&closed);
            assert_eq!(read.diagnostics, [], "{closed}");
            let Some(object::Object::Policy(closed)) = read.objects.into_iter().next().map(|it| it.object) else {
                panic!("{text}")
            };
            assert_eq!(
                (closed.directions(), closed.size().rules),
                (before.directions(), no_rules * before.directions().iter().filter(|it| **it).count())
            );
            assert_eq!(closed.local_id(), before.local_id());
        }
    }

    #[test]
    fn other_kinds_and_malformed_texts_have_no_used_fields() {
        for text in [
            "",
            "{",
            r#"{"apiVersion":"v1","kind":"Secret","metadata":{"name":"s"},"data":{"k":"dg=="}}"#,
            r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{"containers":1}}"#,
        ] {
            assert_eq!(used_fields(text), None, "{text}");
        }
    }
}
