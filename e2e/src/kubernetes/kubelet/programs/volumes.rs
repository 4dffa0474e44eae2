//! The volumes of a pod, as folders.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service, ServiceAccount};
use kube::api::{Api, ListParams, PostParams};
use serde_json::Value;

use super::super::workload::Start;
use super::environment::field;

/// What a pod's folders of the machine itself are; all others of a node are folders of its own.
const MACHINE: [&str; 4] = ["/proc", "/sys", "/dev", "/lib/modules"];
const DEFAULT_MODE: u32 = 0o644;

/// Reads objects that a pod refers to, with the node's rights.
pub struct Reader<'a> {
    start: &'a Start<'a>,
    pod: &'a Value,
}

type Data = BTreeMap<String, Vec<u8>>;

impl<'a> Reader<'a> {
    pub fn new(start: &'a Start<'a>, pod: &'a Value) -> Self {
        Self { start, pod }
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        let namespace = self.pod["metadata"]["namespace"].as_str().unwrap_or_default();
        Api::namespaced(self.start.client.clone(), namespace)
    }

    /// Nothing where the reference is optional and there is no such Secret.
    pub async fn secret(&self, reference: &Value) -> anyhow::Result<Data> {
        let name = reference["name"].as_str().or(reference["secretName"].as_str()).unwrap_or_default();
        let secret: Option<Secret> = self.api().get_opt(name).await.with_context(|| format!("read Secret {name}"))?;
        ensure!(secret.is_some() || reference["optional"] == true, "Secret {name} does not exist");
        let data = secret.and_then(|secret| secret.data).unwrap_or_default();
        Ok(data.into_iter().map(|(key, value)| (key, value.0)).collect())
    }

    /// Nothing where the reference is optional and there is no such ConfigMap.
    pub async fn config_map(&self, reference: &Value) -> anyhow::Result<Data> {
        let name = reference["name"].as_str().unwrap_or_default();
        let map: Option<ConfigMap> =
            self.api().get_opt(name).await.with_context(|| format!("read ConfigMap {name}"))?;
        ensure!(map.is_some() || reference["optional"] == true, "ConfigMap {name} does not exist");
        let map = map.unwrap_or_default();
        let text = map.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.into_bytes()));
        let binary = map.binary_data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0));
        Ok(text.chain(binary).collect())
    }

    /// The Services of all namespaces.
    pub async fn all_services(&self) -> anyhow::Result<Vec<Service>> {
        let all: Api<Service> = Api::all(self.start.client.clone());
        Ok(all.list(&ListParams::default()).await.context("list Services")?.items)
    }

    /// The Services of the pod's namespace.
    pub async fn services(&self) -> anyhow::Result<Vec<Service>> {
        let services = self.api().list(&ListParams::default()).await.context("list Services")?;
        Ok(services.items)
    }

    /// A token of the pod's service account that ends with the pod.
    async fn token(&self, source: &Value) -> anyhow::Result<Vec<u8>> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let (spec, metadata) = (&self.pod["spec"], &self.pod["metadata"]);
        let account = spec["serviceAccountName"].as_str().unwrap_or("default");
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(source["audience"].as_str().map(str::to_owned).into_iter().collect()),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: text(&metadata["name"]),
                    uid: text(&metadata["uid"]),
                }),
                expiration_seconds: source["expirationSeconds"].as_i64(),
            }),
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = self.api();
        let answer = accounts.create_token_request(account, &PostParams::default(), &request).await;
        let answer = answer.with_context(|| format!("request a token of {account}"))?;
        Ok(answer.status.and_then(|status| status.token).context("the answer has no token")?.into_bytes())
    }
}

/// A folder, or a file, for every volume of the pod, by its name.
pub async fn prepare(scratch: &Path, start: &Start<'_>, pod: &Value) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut prepared = BTreeMap::new();
    for volume in pod["spec"]["volumes"].as_array().into_iter().flatten() {
        let name = volume["name"].as_str().unwrap_or_default();
        let path = one(scratch, start, pod, volume).await.with_context(|| format!("volume {name}"))?;
        prepared.insert(name.to_owned(), path);
    }
    Ok(prepared)
}

async fn one(scratch: &Path, start: &Start<'_>, pod: &Value, volume: &Value) -> anyhow::Result<PathBuf> {
    let name = volume["name"].as_str().unwrap_or_default();
    let group = pod["spec"]["securityContext"]["fsGroup"].as_u64().and_then(|it| u32::try_from(it).ok());
    if let Some(path) = volume["hostPath"]["path"].as_str() {
        if MACHINE.iter().any(|it| Path::new(path).starts_with(it)) {
            return Ok(path.into());
        }
        let directory = scratch.join("nodes").join(start.node).join(path.trim_start_matches('/'));
        let kind = volume["hostPath"]["type"].as_str().unwrap_or_default();
        ensure!(directory.exists() || matches!(kind, "" | "DirectoryOrCreate"), "host path {path} does not exist");
        create(&directory, 0o755, None)?;
        return Ok(directory);
    }
    if let Some(claim) = volume["persistentVolumeClaim"]["claimName"].as_str() {
        let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
        let directory = scratch.join("claims").join(start.cluster).join(namespace).join(claim);
        create(&directory, if group.is_some() { 0o2775 } else { 0o755 }, group)?;
        return Ok(directory);
    }
    let directory = scratch.join("volumes").join(pod["metadata"]["uid"].as_str().unwrap_or_default()).join(name);
    if !volume["emptyDir"].is_null() {
        create(&directory, 0o2777, group)?;
        return Ok(directory);
    }
    let reader = Reader::new(start, pod);
    let mode = |source: &Value| source["defaultMode"].as_u64().and_then(|it| u32::try_from(it).ok());
    let mut files = Vec::new();
    let source = ["secret", "configMap", "downwardAPI", "projected"].into_iter().find(|it| !volume[it].is_null());
    let Some(kind) = source else { bail!("this source is not simulated: {volume}") };
    let default = mode(&volume[kind]).unwrap_or(DEFAULT_MODE);
    if kind == "projected" {
        for source in volume[kind]["sources"].as_array().into_iter().flatten() {
            for kind in ["secret", "configMap", "downwardAPI", "serviceAccountToken"] {
                if !source[kind].is_null() {
                    read(&reader, kind, &source[kind], &mut files).await?;
                }
            }
        }
    } else {
        read(&reader, kind, &volume[kind], &mut files).await?;
    }
    create(&directory, 0o755, None)?;
    let user = pod["spec"]["securityContext"]["runAsUser"].as_u64().and_then(|it| u32::try_from(it).ok());
    for File { path, contents, mode, is_token } in files {
        let path = directory.join(path);
        create(path.parent().context("a file is in a folder")?, 0o755, None)?;
        fs::write(&path, contents).with_context(|| format!("write {}", path.display()))?;
        let mode = match (is_token, group) {
            // Those of whom it is, as the kubelet does: a token is for the user of the pod, where all containers have one.
            (true, None) if user.is_some() => 0o600,
            (_, Some(_)) => mode.unwrap_or(default) | 0o440,
            _ => mode.unwrap_or(default),
        };
        give(&path, user.filter(|_| is_token && group.is_none()), group)?;
        fs::set_permissions(&path, Permissions::from_mode(mode)).context("set the mode of a file")?;
    }
    Ok(directory)
}

struct File {
    path: String,
    contents: Vec<u8>,
    mode: Option<u32>,
    is_token: bool,
}

async fn read(reader: &Reader<'_>, kind: &str, source: &Value, files: &mut Vec<File>) -> anyhow::Result<()> {
    let mode = |item: &Value| item["mode"].as_u64().and_then(|it| u32::try_from(it).ok());
    let path = |item: &Value| item["path"].as_str().unwrap_or_default().to_owned();
    let items = source["items"].as_array().into_iter().flatten();
    match kind {
        "serviceAccountToken" => {
            let contents = reader.token(source).await?;
            files.push(File { path: path(source), contents, mode: None, is_token: true });
        }
        "downwardAPI" => {
            for item in items {
                let from = item["fieldRef"]["fieldPath"].as_str().context("only fields of the pod are simulated")?;
                let contents = field(reader.start, reader.pod, from)?.into_bytes();
                files.push(File { path: path(item), contents, mode: mode(item), is_token: false });
            }
        }
        _ => {
            let mut data =
                if kind == "secret" { reader.secret(source).await? } else { reader.config_map(source).await? };
            if source["items"].is_null() {
                let all = data.into_iter();
                files.extend(all.map(|(path, contents)| File { path, contents, mode: None, is_token: false }));
                return Ok(());
            }
            for item in items {
                let key = item["key"].as_str().unwrap_or_default();
                match data.remove(key) {
                    Some(contents) => {
                        files.push(File { path: path(item), contents, mode: mode(item), is_token: false });
                    }
                    None if source["optional"] == true => {}
                    None => bail!("{kind} has no key {key}"),
                }
            }
        }
    }
    Ok(())
}

fn create(directory: &Path, mode: u32, group: Option<u32>) -> anyhow::Result<()> {
    if directory.exists() {
        return Ok(());
    }
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    give(directory, None, group)?;
    let permissions = fs::set_permissions(directory, Permissions::from_mode(mode));
    permissions.with_context(|| format!("set the mode of {}", directory.display()))
}

fn give(path: &Path, user: Option<u32>, group: Option<u32>) -> anyhow::Result<()> {
    if !super::has_users() {
        return Ok(());
    }
    chown(path, user, group).with_context(|| format!("give {} to the pod's user", path.display()))
}
