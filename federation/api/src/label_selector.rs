//! Label selectors of the Kubernetes API, which several kinds of policy share.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_policy::inventory::Labels;
use hanse_policy::selector::build;
use serde::Deserialize;

use crate::decode::null_as_default;
use crate::field::{Errors, NOT_KNOWN, Path};
use crate::names::{label_key_error, label_value_error};

/// `other` has the fields that this version does not know; the conversion reports them, and everything that is malformed.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LabelSelector {
    #[serde(default, deserialize_with = "null_as_default")]
    pub match_labels: Labels,
    #[serde(default, deserialize_with = "null_as_default")]
    pub match_expressions: Vec<Requirement>,
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Requirement {
    pub key: Arc<str>,
    pub operator: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub values: Vec<Arc<str>>,
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

impl LabelSelector {
    /// As people write it, in one line.
    pub fn written(&self) -> String {
        let quoted = |text: &Arc<str>| if text.is_empty() { "''".to_owned() } else { text.to_string() };
        let listed = |texts: Vec<String>| texts.join(", ");
        let mut fields = Vec::new();
        if !self.match_labels.is_empty() {
            let labels = self.match_labels.iter().map(|(key, value)| format!("{key}: {}", quoted(value)));
            fields.push(format!("matchLabels: {{{}}}", listed(labels.collect())));
        }
        if !self.match_expressions.is_empty() {
            let expressions = self.match_expressions.iter().map(|Requirement { key, operator, values, .. }| {
                let values = listed(values.iter().map(quoted).collect());
                let values = if values.is_empty() { values } else { format!(", values: [{values}]") };
                format!("{{key: {key}, operator: {operator}{values}}}")
            });
            fields.push(format!("matchExpressions: [{}]", listed(expressions.collect())));
        }
        format!("{{{}}}", listed(fields))
    }
}

impl LabelSelector {
    /// With the API machinery's validation.
    pub fn convert(&self, path: &Path<'_>, errors: &mut Errors) -> build::LabelSelector {
        for name in self.other.keys() {
            errors.add(&path.field(name), NOT_KNOWN);
        }
        let labels_path = path.field("matchLabels");
        for (key, value) in &self.match_labels {
            if let Some(why) = label_key_error(key) {
                errors.add(&labels_path, format!("\"{key}\": {why}"));
            }
            if let Some(why) = label_value_error(value) {
                errors.add(&labels_path, format!("\"{value}\": {why}"));
            }
        }
        let expressions_path = path.field("matchExpressions");
        let mut match_expressions = Vec::new();
        for (index, requirement) in self.match_expressions.iter().enumerate() {
            let path = expressions_path.index(index);
            for name in requirement.other.keys() {
                errors.add(&path.field(name), NOT_KNOWN);
            }
            if let Some(why) = label_key_error(&requirement.key) {
                errors.add(&path.field("key"), format!("\"{}\": {why}", requirement.key));
            }
            let (values_path, has_values) = (path.field("values"), !requirement.values.is_empty());
            let operator = match requirement.operator.as_str() {
                "In" => build::Operator::In,
                "NotIn" => build::Operator::NotIn,
                "Exists" => build::Operator::Exists,
                "DoesNotExist" => build::Operator::DoesNotExist,
                other => {
                    let message = format!("\"{other}\" is not one of In, NotIn, Exists, DoesNotExist");
                    errors.add(&path.field("operator"), message);
                    continue;
                }
            };
            match operator {
                build::Operator::In | build::Operator::NotIn if !has_values => {
                    errors.add(&values_path, "is missing: In and NotIn require a value");
                }
                build::Operator::Exists | build::Operator::DoesNotExist if has_values => {
                    errors.add(&values_path, "must be absent for Exists and DoesNotExist");
                }
                _ => {}
            }
            for (index, value) in requirement.values.iter().enumerate() {
                if let Some(why) = label_value_error(value) {
                    errors.add(&values_path.index(index), format!("\"{value}\": {why}"));
                }
            }
            let (key, values) = (requirement.key.clone(), requirement.values.clone());
            match_expressions.push(build::Requirement { key, operator, values });
        }
        let match_labels = self.match_labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        build::LabelSelector { match_labels, match_expressions }
    }
}

/// Fields that select pods, without those that are not given: `{podSelector: {}}`.
pub fn written_fields<const N: usize>(fields: [(&str, Option<&LabelSelector>); N]) -> String {
    let fields = fields.into_iter().filter_map(|(name, it)| Some(format!("{name}: {}", it?.written())));
    format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
}

/// A peer with its place in its rule: `from[1] {podSelector: {}}`.
pub fn written_peer(path: &Path<'_>, fields: &str) -> String {
    let path = path.to_string();
    format!("{} {fields}", path.rsplit('.').next().unwrap_or_default())
}
