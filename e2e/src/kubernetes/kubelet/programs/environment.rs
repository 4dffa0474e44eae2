//! The environment of a container.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Service;
use serde_json::Value;

use super::super::workload::Start;
use super::volumes::Reader;

/// The variables of a container: where the API server is, the links of Services, those of `envFrom`, and those of `env`, which may use
/// earlier ones.
pub async fn variables(start: &Start<'_>, pod: &Value, container: &Value) -> anyhow::Result<BTreeMap<String, String>> {
    let reader = Reader::new(start, pod);
    let mut variables = BTreeMap::from([
        ("KUBERNETES_SERVICE_HOST".to_owned(), start.server.ip().to_string()),
        ("KUBERNETES_SERVICE_PORT".to_owned(), start.server.port().to_string()),
    ]);
    if pod["spec"]["enableServiceLinks"] != false {
        // The API server is reached where it listens, without a kube-proxy.
        let services = reader.services().await?;
        let others = services.iter().filter(|it| it.metadata.name.as_deref() != Some("kubernetes"));
        others.for_each(|service| link(&mut variables, service));
    }
    let list = |key: &str| container[key].as_array().into_iter().flatten();
    for from in list("envFrom") {
        let prefix = from["prefix"].as_str().unwrap_or_default();
        let values = match (&from["configMapRef"], &from["secretRef"]) {
            (Value::Null, secret) => reader.secret(secret).await?,
            (map, _) => reader.config_map(map).await?,
        };
        for (key, value) in values {
            variables.insert(format!("{prefix}{key}"), String::from_utf8_lossy(&value).into_owned());
        }
    }
    for variable in list("env") {
        let name = variable["name"].as_str().unwrap_or_default();
        let from = &variable["valueFrom"];
        let value = if from.is_null() {
            Some(expand(variable["value"].as_str().unwrap_or_default(), &variables))
        } else if let Some(path) = from["fieldRef"]["fieldPath"].as_str() {
            Some(field(start, pod, path)?)
        } else if !from["secretKeyRef"].is_null() {
            one(reader.secret(&from["secretKeyRef"]).await?, &from["secretKeyRef"])?
        } else if !from["configMapKeyRef"].is_null() {
            one(reader.config_map(&from["configMapKeyRef"]).await?, &from["configMapKeyRef"])?
        } else {
            bail!("variable {name}: this source is not simulated: {from}");
        };
        variables.extend(value.map(|value| (name.to_owned(), value)));
    }
    Ok(variables)
}

/// The variables of a Service, by which a pod finds it without DNS.
fn link(variables: &mut BTreeMap<String, String>, service: &Service) {
    let spec = service.spec.as_ref();
    let host = spec.and_then(|it| it.cluster_ip.as_deref()).filter(|it| !it.is_empty() && *it != "None");
    let (Some(host), Some(name)) = (host, service.metadata.name.as_deref()) else { return };
    let upper = |text: &str| text.to_uppercase().replace('-', "_");
    let name = upper(name);
    variables.insert(format!("{name}_SERVICE_HOST"), host.to_owned());
    for (at, port) in spec.into_iter().flat_map(|it| it.ports.iter().flatten()).enumerate() {
        let number = port.port.to_string();
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{number}", protocol.to_lowercase());
        if at == 0 {
            variables.insert(format!("{name}_SERVICE_PORT"), number.clone());
            variables.insert(format!("{name}_PORT"), url.clone());
        }
        if let Some(port) = &port.name {
            variables.insert(format!("{name}_SERVICE_PORT_{}", upper(port)), number.clone());
        }
        let prefix = format!("{name}_PORT_{number}_{protocol}");
        let parts = [("PROTO", protocol.to_lowercase()), ("PORT", number), ("ADDR", host.to_owned())];
        variables.extend(parts.map(|(part, value)| (format!("{prefix}_{part}"), value)));
        variables.insert(prefix, url);
    }
}

/// What the DNS of the cluster knows, as a file `hosts`: the Services that have an address when the program starts.
pub async fn hosts(start: &Start<'_>, pod: &Value) -> anyhow::Result<String> {
    let mut hosts = "127.0.0.1 localhost\n".to_owned();
    for service in Reader::new(start, pod).all_services().await? {
        let address = service.spec.as_ref().and_then(|it| it.cluster_ip.as_deref()).and_then(|it| it.parse().ok());
        let address: Option<IpAddr> = address;
        let (Some(address), Some(name), Some(namespace)) = (address, service.metadata.name, service.metadata.namespace)
        else {
            continue;
        };
        let of_namespace = if pod["metadata"]["namespace"] == namespace { &name } else { "" };
        let qualified = format!("{name}.{namespace}");
        hosts
            .push_str(&format!("{address} {qualified} {qualified}.svc {qualified}.svc.cluster.local {of_namespace}\n"));
    }
    Ok(hosts)
}

fn one(mut values: BTreeMap<String, Vec<u8>>, reference: &Value) -> anyhow::Result<Option<String>> {
    let (name, key) = (&reference["name"], reference["key"].as_str().unwrap_or_default());
    match values.remove(key) {
        Some(value) => Ok(Some(String::from_utf8(value).with_context(|| format!("key {key} of {name} is not text"))?)),
        None if reference["optional"] == true => Ok(None),
        None => bail!("{name} has no key {key}"),
    }
}

/// A field of the pod that the downward API offers.
///
/// # Errors
/// When it offers no such field.
pub fn field(start: &Start<'_>, pod: &Value, path: &str) -> anyhow::Result<String> {
    let join = |addresses: &[IpAddr]| addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
    let first = |addresses: &[IpAddr]| join(addresses.get(..1).unwrap_or_default());
    match path {
        "status.podIP" => return Ok(first(start.addresses)),
        "status.podIPs" => return Ok(join(start.addresses)),
        "status.hostIP" => return Ok(first(start.node_addresses)),
        "status.hostIPs" => return Ok(join(start.node_addresses)),
        _ => {}
    }
    let of_map = path.strip_suffix("']").and_then(|path| path.split_once("['"));
    if let Some((map @ ("metadata.labels" | "metadata.annotations"), key)) = of_map {
        let map = if map == "metadata.labels" { "labels" } else { "annotations" };
        return Ok(pod["metadata"][map][key].as_str().unwrap_or_default().to_owned());
    }
    let value = match path {
        "metadata.name" | "metadata.namespace" | "metadata.uid" | "spec.nodeName" | "spec.serviceAccountName" => {
            path.split('.').fold(pod, |value, key| &value[key]).as_str()
        }
        _ => None,
    };
    value.map(str::to_owned).with_context(|| format!("field {path} is not simulated"))
}

/// Replaces `$(NAME)` by the variable, where there is one; `$$` is a dollar.
pub fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let (mut expanded, mut rest) = (String::new(), text);
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at..];
        let name = rest.strip_prefix("$(").and_then(|it| it.split_once(')'));
        match name.map(|(name, after)| (variables.get(name), after)) {
            Some((Some(value), after)) => {
                expanded.push_str(value);
                rest = after;
            }
            _ => {
                expanded.push('$');
                rest = rest.strip_prefix("$$").unwrap_or(&rest[1..]);
            }
        }
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_expanded_as_kubernetes_does() {
        let variables = BTreeMap::from([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "$(A)".to_owned())]);
        for (text, expected) in [
            ("--a=$(A)", "--a=1"),
            ("$(A)$(B)", "1$(A)"),
            ("$(C) $A", "$(C) $A"),
            ("$$(A) $$", "$(A) $"),
            ("$(A", "$(A"),
            ("", ""),
        ] {
            assert_eq!(expand(text, &variables), expected, "{text}");
        }
    }
}
