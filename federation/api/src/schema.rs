//! Schemas of fields, for the CRDs: those that their types do not give. What a schema cannot express, `x-kubernetes-validations`
//! (CEL) does where its cost is within the limits of API servers; the rest is checked when an object is converted.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use crate::limits::{
    LEASE_SECONDS, MAX_HTTP_METHODS, MAX_HTTP_PATH_CHARACTERS, MAX_MEMBER_ENTRIES, MAX_NETS, MAX_PORTS,
    MAX_SELECTOR_CHARACTERS, MAX_SET_NET_CHARACTERS, MAX_SET_NETS, TOKEN_SECONDS,
};

const DNS_LABEL: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
const SUBDOMAIN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
const LABEL_VALUE: &str = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$";
/// With any spelling of an address, and zeros before the prefix.
const MAX_NET_CHARACTERS: usize = 64;
/// Names of service accounts in a rule, and values of a label in a grant: as many as one manifest of 256 KiB can have.
const MAX_NAMES: usize = 4_096;
const DUPLICATES: &str = "has duplicates";
const MAX_LIMIT: u64 = (1 << 53) - 1;

/// A rule of CEL, with the field that its error names.
fn validation(rule: &str, field: &str, message: &str) -> Value {
    match field {
        "" => json!({"rule": rule, "message": message}),
        field => json!({"rule": rule, "fieldPath": field, "message": message, "reason": "FieldValueInvalid"}),
    }
}

pub fn dns_label(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "minLength": 1, "maxLength": 63, "pattern": DNS_LABEL})
}

pub fn subdomain(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "minLength": 1, "maxLength": 253, "pattern": SUBDOMAIN})
}

pub fn trust_domain(_: &mut SchemaGenerator) -> Schema {
    let fixed = [validation("self == oldSelf", "", "cannot be changed")];
    json_schema!({
        "type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[a-z0-9._-]+$",
        "x-kubernetes-validations": fixed,
    })
}

pub fn immutable() -> Value {
    json!([validation("self == oldSelf", "", "cannot be changed: create another object")])
}

pub fn selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "maxLength": MAX_SELECTOR_CHARACTERS})
}

/// Without `global()`, which is for the namespaceSelector of a rule.
pub fn subject_selector(_: &mut SchemaGenerator) -> Schema {
    let message = "global() is for the namespaceSelector of a rule only";
    json_schema!({
        "type": "string", "maxLength": MAX_SELECTOR_CHARACTERS,
        "x-kubernetes-validations": [validation("!self.contains('global(')", "", message)],
    })
}

pub fn types(_: &mut SchemaGenerator) -> Schema {
    // Server-side apply fails with an internal error where a list of type `set` has duplicates.
    json_schema!({
        "type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "string", "enum": ["Ingress", "Egress"]},
        "x-kubernetes-validations": [validation("size(self) < 2 || self[0] != self[1]", "", DUPLICATES)],
    })
}

pub fn protocol(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "minimum": 1, "maximum": 255, "maxLength": 8, "pattern": "^(TCP|UDP|ICMP|ICMPv6|SCTP|UDPLite|[0-9]{1,3})$",
    })
}

pub fn ports(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_PORTS,
        "items": {
            "x-kubernetes-int-or-string": true,
            "minimum": 1, "maximum": 65_535, "maxLength": 15,
            "pattern": "^([0-9]{1,5}(:[0-9]{1,5})?|[a-z0-9]([-a-z0-9]*[a-z0-9])?)$",
        },
    })
}

pub fn nets(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_NETS,
        "items": {"type": "string", "maxLength": MAX_NET_CHARACTERS, "pattern": "^[0-9a-fA-F:.]+/[0-9]+$"},
    })
}

pub fn set_nets(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_SET_NETS,
        "items": {"type": "string", "maxLength": MAX_SET_NET_CHARACTERS, "pattern": "^[0-9a-fA-F:.]+(/[0-9]+)?$"},
    })
}

pub fn cidrs(_: &mut SchemaGenerator) -> Schema {
    let message = "is not a CIDR without bits beyond its prefix, such as 10.9.0.0/16 or 2001:db8::/64";
    let rule = "isCIDR(self) && cidr(self) == cidr(self).masked()";
    json_schema!({
        "type": "array", "maxItems": MAX_MEMBER_ENTRIES,
        "items": {
            "type": "string", "maxLength": MAX_NET_CHARACTERS,
            "x-kubernetes-validations": [validation(rule, "", message)],
        },
    })
}

/// Names of namespaces or service accounts, or `*`.
pub fn names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_NAMES, "items": {"type": "string", "minLength": 1, "maxLength": 253},
    })
}

pub fn http_methods(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_HTTP_METHODS, "items": {"type": "string", "maxLength": 32},
        "x-kubernetes-validations": [validation("self.all(one, self.exists_one(it, it == one))", "", DUPLICATES)],
    })
}

pub fn http_path(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "maxLength": MAX_HTTP_PATH_CHARACTERS, "pattern": "^/[^?# ]*$"})
}

pub fn http_path_validations() -> Value {
    json!([validation("has(self.exact) != has(self.prefix)", "", "must have one of exact and prefix")])
}

pub fn annotations(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "additionalProperties": {"type": "string"}})
}

/// Entries of a map of labels, of which none is the hub's own.
fn no_reserved_key() -> [Value; 1] {
    [validation("self.all(key, !key.startsWith('hanse.dev/'))", "", "keys that start with hanse.dev/ are reserved")]
}

pub fn cluster_labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object", "maxProperties": MAX_MEMBER_ENTRIES,
        "additionalProperties": {"type": "string", "maxLength": 63, "pattern": LABEL_VALUE},
        "x-kubernetes-validations": no_reserved_key(),
    })
}

pub fn label_values(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object", "maxProperties": MAX_MEMBER_ENTRIES,
        "additionalProperties": {"type": "array", "maxItems": MAX_NAMES, "items": {"type": "string", "maxLength": 63}},
        "x-kubernetes-validations": no_reserved_key(),
    })
}

pub fn limit(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "integer", "format": "int64", "minimum": 0, "maximum": MAX_LIMIT})
}

pub fn lease_seconds(_: &mut SchemaGenerator) -> Schema {
    let (first, last) = (LEASE_SECONDS.start(), LEASE_SECONDS.end());
    json_schema!({"type": "integer", "format": "int64", "minimum": first, "maximum": last})
}

pub fn token_seconds(_: &mut SchemaGenerator) -> Schema {
    let (first, last) = (TOKEN_SECONDS.start(), TOKEN_SECONDS.end());
    json_schema!({"type": "integer", "format": "int64", "minimum": first, "maximum": last})
}

/// Services and HTTP go with one direction each.
pub fn policy_validations() -> Value {
    let own_end = |direction: &str, end: &str| {
        let rule = format!(
            "!has(self.{direction}) || self.{direction}.all(rule, !has(rule.{end}) || !has(rule.{end}.services))"
        );
        let message = format!("services selects the peer, and is not allowed in the {end} of {direction} rules");
        validation(&rule, &format!(".{direction}"), &message)
    };
    let http = "!has(self.egress) || self.egress.all(rule, !has(rule.http))";
    json!([
        own_end("ingress", "destination"),
        own_end("egress", "source"),
        validation(http, ".egress", "http is for ingress rules only"),
    ])
}

pub fn rule_validations() -> Value {
    let is = |field: &str, values: &[&str]| {
        values.iter().map(|value| format!("self.{field} == {value}")).collect::<Vec<_>>().join(" || ")
    };
    let icmp = is("protocol", &["'ICMP'", "'ICMPv6'", "1", "58"]);
    let with_ports = is("protocol", &["'TCP'", "'UDP'", "'SCTP'", "6", "17", "132", "'6'", "'17'", "'132'"]);
    let ports = |end: &str, ports: &str| {
        let list = format!("self.{end}.{ports}");
        let rule = format!(
            "!has(self.{end}) || !has({list}) || size({list}) == 0 || (has(self.protocol) ? ({with_ports}) : \
             {list}.all(port, type(port) == string && port.find('[a-z]') != ''))"
        );
        validation(&rule, &format!(".{end}.{ports}"), "needs the protocol TCP, UDP or SCTP")
    };
    let family = |version: u8, protocol: &str| {
        format!(
            "!(has(self.ipVersion) && self.ipVersion == {version} && (has(self.protocol) && self.protocol == '{protocol}' \
             || has(self.notProtocol) && self.notProtocol == '{protocol}'))"
        )
    };
    let families = format!("{} && {}", family(6, "ICMP"), family(4, "ICMPv6"));
    let services = "!has(self.destination) || !has(self.destination.services) || (!has(self.destination.ports) || \
                    size(self.destination.ports) == 0) && (!has(self.destination.notPorts) || \
                    size(self.destination.notPorts) == 0)";
    let http = "!has(self.http) || !has(self.protocol) || self.protocol == 'TCP' || self.protocol == 6";
    json!([
        validation(
            &format!("!has(self.icmp) || (has(self.protocol) && ({icmp}))"),
            ".icmp",
            "needs the protocol ICMP or ICMPv6"
        ),
        validation(&families, ".ipVersion", "contradicts the IP version of the protocol"),
        validation("!has(self.http) || self.action == 'Allow'", ".http", "requires the action Allow"),
        validation(http, ".http", "requires the protocol TCP"),
        ports("source", "ports"),
        ports("source", "notPorts"),
        ports("destination", "ports"),
        ports("destination", "notPorts"),
        validation(services, ".destination.services", "is not allowed beside ports and notPorts"),
    ])
}

pub fn icmp_validations() -> Value {
    json!([validation("!has(self.code) || has(self.type)", ".code", "needs type beside it")])
}

pub fn entity_validations() -> Value {
    let texts =
        ["selector", "notSelector", "namespaceSelector"].map(|name| format!("has(self.{name}) && self.{name} != ''"));
    let lists = ["nets", "notNets"].map(|name| format!("has(self.{name}) && size(self.{name}) > 0"));
    let others = ["serviceAccounts", "clusterSelector"].map(|name| format!("has(self.{name})"));
    let given: Vec<String> = texts.into_iter().chain(lists).chain(others).collect();
    let rule = format!("!has(self.services) || !({})", given.join(" || "));
    json!([validation(&rule, ".services", "is not allowed beside selectors, nets and serviceAccounts")])
}
