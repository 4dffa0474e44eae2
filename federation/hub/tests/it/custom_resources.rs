//! The custom resource definitions: up to date, structural, documented, and of the kinds that are read.

use std::collections::BTreeSet;
use std::path::Path;

use hanse_hub::custom_resources::{Definition, definitions, write};
use hanse_hub::manifest::Kind;
use serde_json::Value;

/// Kinds that only the operator reads.
const OF_OPERATOR: [&str; 2] = ["ClusterJoinToken", "ClusterSet"];
/// The kind that only the webhook reads: no manifest, and without a status, since it ends when it takes effect.
const OF_WEBHOOK: &str = "PolicyApproval";
/// Short names of kinds that every API server has, and of Calico's.
const TAKEN: &[&str] = &[
    "cj", "cm", "cnp", "cr", "crd", "cs", "csr", "deploy", "ds", "ep", "ev", "gnp", "hep", "hpa", "ing", "limits",
    "netpol", "no", "np", "ns", "pc", "pdb", "po", "pv", "pvc", "quota", "rc", "rs", "sa", "sc", "snp", "sgnp", "sts",
    "svc", "vac",
];

#[test]
fn files_are_up_to_date() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    write(definitions(), &deploy.join("crds"), true).expect("run `cargo xtask crds`");
    let of_chart = definitions().into_iter().map(Definition::kept_by_helm).collect();
    write(of_chart, &deploy.join("chart/files/crds"), true).expect("run `cargo xtask crds`");
}

#[test]
fn check_finds_a_file_that_differs_is_missing_or_is_left_over() {
    let directory = tempfile::tempdir().expect("a directory");
    let check = || write(definitions(), directory.path(), true).map_err(|error| error.to_string());
    assert!(check().is_err_and(|error| error.contains("tiers.hanse.dev.yaml")), "missing");
    write(definitions(), directory.path(), false).expect("written");
    check().expect("just written");
    let left_over = directory.path().join("old.yaml");
    std::fs::write(&left_over, "a: b\n").expect("written");
    assert!(check().is_err_and(|error| error.contains("old.yaml")));
    write(definitions(), directory.path(), false).expect("written");
    assert!(!left_over.exists());
    let tiers = directory.path().join("tiers.hanse.dev.yaml");
    let text = std::fs::read_to_string(&tiers).expect("read").replace("Baseline", "Basement");
    std::fs::write(&tiers, text).expect("written");
    assert!(check().is_err_and(|error| error.contains("tiers.hanse.dev.yaml not up to date")));
}

#[test]
fn every_kind_that_is_read_has_a_definition() {
    let defined: BTreeSet<String> = definitions()
        .iter()
        .map(|it| it.object["spec"]["names"]["kind"].as_str().expect("a kind").to_owned())
        .collect();
    let read = Kind::ALL.iter().map(|kind| kind.name()).chain(OF_OPERATOR).chain([OF_WEBHOOK]);
    assert_eq!(defined, read.map(str::to_owned).collect());
    for kind in defined.iter().filter(|kind| *kind != OF_WEBHOOK) {
        let manifest =
            format!("apiVersion: hanse.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: default}}\nspec: {{wrong: 1}}\n");
        let mut read = hanse_api::Manifests::default();
        hanse_api::read_bytes(&"manifest".into(), manifest.as_bytes(), &mut read);
        let unknown = read.diagnostics.iter().any(|it| it.field == "spec.wrong");
        assert!(unknown, "{kind}: {:?}", read.diagnostics);
    }
}

#[test]
fn definitions_have_what_kubectl_shows() {
    let mut short_names = BTreeSet::new();
    for definition in definitions() {
        let spec = &definition.object["spec"];
        let (names, version) = (&spec["names"], &spec["versions"][0]);
        let kind = names["kind"].as_str().expect("a kind");
        assert_eq!((&spec["scope"], &names["categories"]), (&Value::from("Cluster"), &serde_json::json!(["hanse"])));
        for short in names["shortNames"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            assert!(short_names.insert(short.to_owned()) && !TAKEN.contains(&short), "{kind}: {short}");
        }
        let has_status = kind != OF_WEBHOOK;
        assert_eq!(version["subresources"]["status"].is_object(), has_status, "{kind}");
        let columns = version["additionalPrinterColumns"].as_array().expect("columns");
        assert_eq!(columns.last().map(|it| &it["name"]), Some(&Value::from("Age")), "{kind}");
        let schema = &version["schema"]["openAPIV3Schema"];
        for column in columns {
            let path = column["jsonPath"].as_str().expect("a path");
            let (fields, kind_of_condition) = match path.split_once("[?(@.type=='") {
                Some((fields, rest)) => (fields, rest.split_once('\'').map(|(kind, _)| kind)),
                None => (path, None),
            };
            if fields == ".metadata.creationTimestamp" {
                continue;
            }
            let found = fields.split('.').skip(1).try_fold(schema, |at, field| at["properties"].get(field));
            let found = found.unwrap_or_else(|| panic!("{kind}: no field {path}"));
            // The documentation of the conditions names each of them.
            if let Some(condition) = kind_of_condition {
                let about = found["description"].as_str().unwrap_or_default();
                assert!(about.contains(&format!("`{condition}`")), "{kind}: {condition}");
            }
        }
        if !has_status {
            continue;
        }
        let conditions = &schema["properties"]["status"]["properties"]["conditions"];
        assert_eq!(conditions["x-kubernetes-list-type"], "map", "{kind}");
        assert_eq!(conditions["x-kubernetes-list-map-keys"], serde_json::json!(["type"]), "{kind}");
        assert!(schema["properties"]["status"]["properties"]["observedGeneration"].is_object(), "{kind}");
    }
}

#[test]
fn every_field_is_documented_and_bounded() {
    let mut fields = 0;
    for definition in definitions() {
        let schema = &definition.object["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        check_schema(&definition.name, schema, true, &mut fields);
    }
    assert!(fields > 250, "{fields} fields");
}

/// Of an API server's structural schemas, what is not checked elsewhere: one type each, no references, nothing that is both an
/// object of known fields and a map.
fn check_schema(path: &str, schema: &Value, is_field: bool, fields: &mut usize) {
    *fields += usize::from(is_field);
    let keywords = schema.as_object().unwrap_or_else(|| panic!("{path}: not a schema"));
    for keyword in ["$ref", "oneOf", "allOf", "not", "default", "nullable", "title", "const", "type_"] {
        assert!(!keywords.contains_key(keyword), "{path}: {keyword}");
    }
    let is_number_or_text = schema["x-kubernetes-int-or-string"] == true;
    assert!(schema["type"].is_string() != is_number_or_text, "{path}: {schema}");
    if is_field {
        let description = schema["description"].as_str().unwrap_or_default();
        assert!(description.len() > 8 && description.ends_with(['.', ')']), "{path}: {description:?}");
        assert!(!description.contains('\n'), "{path}");
    }
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        assert!(rule["rule"].is_string() && rule["message"].is_string(), "{path}: {rule}");
    }
    match schema["type"].as_str() {
        Some("object") => {
            let (properties, map) = (schema.get("properties"), schema.get("additionalProperties"));
            assert!(properties.is_some() != map.is_some(), "{path}: {schema}");
            for (name, field) in properties.and_then(Value::as_object).into_iter().flatten() {
                check_schema(&format!("{path}.{name}"), field, true, fields);
            }
            for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                assert!(schema["properties"].get(required).is_some(), "{path}: {required}");
            }
            map.into_iter().for_each(|values| check_schema(&format!("{path}[key]"), values, false, fields));
        }
        Some("array") => {
            assert!(schema["maxItems"].is_u64(), "{path}: without a bound, rules of CEL cost too much");
            check_schema(&format!("{path}[]"), &schema["items"], false, fields);
        }
        Some("string") => {
            let is_bounded = ["maxLength", "enum", "format"].into_iter().any(|keyword| keywords.contains_key(keyword));
            assert!(is_bounded || path.ends_with("annotations[key]"), "{path}: {schema}");
        }
        _ => {}
    }
}
