//! Helm, with the chart that this program carries.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, bail};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use super::target::Target;
use super::{Place, Settings};

/// The files of the chart, by their path.
const CHART: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/chart.rs"));

/// Helm for one release of one cluster.
#[derive(Debug)]
pub struct Helm {
    target: Target,
    place: Place,
    /// The chart, and the values of one run.
    folder: TempDir,
    version: Version,
}

/// Major and minor version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl Version {
    const OLDEST: Self = Self(3, 14);

    /// Reads what `helm version` prints, such as `v3.14.0`.
    ///
    /// # Errors
    /// When it is too old.
    fn check(text: &str) -> anyhow::Result<Self> {
        let mut numbers = text.trim_start_matches('v').split('.').map(|it| it.parse::<u32>().unwrap_or(0));
        let version = Self(numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version < Self::OLDEST {
            bail!("Helm {text} is too old: 3.14 or newer is needed");
        }
        Ok(version)
    }

    /// The options of `helm upgrade` by which fields of the chart get its values also where another program has set them, such as the
    /// replicas after `kubectl scale`. Helm 3 overwrites them without an option; Helm 4 applies at the server, and refuses to, otherwise.
    fn overwriting(self) -> &'static [&'static str] {
        match self.0 {
            ..4 => &[],
            4.. => &["--server-side=true", "--force-conflicts"],
        }
    }
}

impl Helm {
    /// Finds Helm, and writes the chart to a temporary folder.
    pub async fn new(target: &Target, place: &Place) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("hanse-").tempdir().context("create a temporary folder")?;
        for (name, content) in CHART {
            let path = folder.path().join("chart").join(name);
            let write = || {
                std::fs::create_dir_all(path.parent().unwrap_or(folder.path()))?;
                std::fs::write(&path, content)
            };
            write().with_context(|| format!("write {}", path.display()))?;
        }
        let mut this = Self { target: target.clone(), place: place.clone(), folder, version: Version::OLDEST };
        this.version = Version::check(&this.run(&["version", "--template", "{{.Version}}"]).await?)?;
        Ok(this)
    }

    fn chart(&self) -> PathBuf {
        self.folder.path().join("chart")
    }

    async fn run<A: Into<OsString> + Clone>(&self, arguments: &[A]) -> anyhow::Result<String> {
        let mut command = Command::new("helm");
        command.args(arguments.iter().cloned().map(Into::into));
        command.args(["--namespace", &self.place.namespace]);
        if let Some(file) = &self.target.kubeconfig {
            command.arg("--kubeconfig").arg(file);
        }
        if let Some(context) = &self.target.kube_context {
            command.arg("--kube-context").arg(context);
        }
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = command.output().await.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                anyhow::anyhow!("`helm` is not in PATH: install Helm 3.14 or newer, or install the chart of deploy/chart another way")
            }
            _ => anyhow::Error::from(error).context("start helm"),
        })?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if !output.status.success() {
            let what = arguments.first().cloned().map(Into::into).unwrap_or_default();
            let why = text(&output.stderr);
            bail!("helm {}: {}", what.display(), why.strip_prefix("Error: ").unwrap_or(&why));
        }
        Ok(text(&output.stdout))
    }

    /// Installs the release, or upgrades it: then values that are not given stay. Returns what Helm prints.
    pub async fn install(&self, values: &Value, settings: &Settings) -> anyhow::Result<String> {
        let file = self.folder.path().join("values.json");
        std::fs::write(&file, values.to_string()).with_context(|| format!("write {}", file.display()))?;
        let (mut arguments, timeout) = (self.upgrade(), format!("{}s", settings.timeout));
        arguments.push("--install".into());
        match settings.dry_run {
            true => arguments.push("--dry-run=server".into()),
            false => arguments.extend(["--wait".into(), "--timeout".into(), timeout.into()]),
        }
        for file in [&file].into_iter().chain(&settings.values) {
            arguments.extend(["--values".into(), file.into()]);
        }
        for set in &settings.set {
            arguments.extend(["--set".into(), set.into()]);
        }
        self.run(&arguments).await
    }

    /// The beginning of an upgrade, in which values that are not given stay.
    fn upgrade(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            vec!["upgrade".into(), self.place.release.clone().into(), self.chart().into()];
        let flags = ["--reset-then-reuse-values", "--hide-notes"].iter().chain(self.version.overwriting());
        arguments.extend(flags.map(Into::into));
        arguments
    }

    /// Upgrades the release with more values, without waiting. All others stay.
    pub async fn set(&self, values: &[&str]) -> anyhow::Result<()> {
        let mut arguments = self.upgrade();
        for value in values {
            arguments.extend(["--set".into(), value.into()]);
        }
        self.run(&arguments).await.map(drop)
    }

    /// The state of the release, such as `deployed`; `None` if it does not exist.
    pub async fn status(&self) -> anyhow::Result<Option<String>> {
        match self.run(&["status", &self.place.release, "--output", "json"]).await {
            Ok(status) => {
                let status: Value = serde_json::from_str(&status).context("read the answer of `helm status`")?;
                Ok(Some(status["info"]["status"].as_str().unwrap_or_default().to_owned()))
            }
            Err(error) if format!("{error:#}").contains("release: not found") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The values of the release, with the defaults; `None` if it is not installed.
    ///
    /// # Errors
    /// Also when another operation of Helm was interrupted, or runs.
    pub async fn values(&self) -> anyhow::Result<Option<Value>> {
        let release = &self.place.release;
        match self.status().await?.as_deref() {
            None | Some("uninstalled") => Ok(None),
            Some(state) if state.starts_with("pending") => bail!(
                "release {release} is {state}: another Helm command runs, or was interrupted; if none runs: `helm rollback {release}`, or \
                 `helm uninstall {release}` where it was never installed, with --namespace {}",
                self.place.namespace
            ),
            Some(_) => self.kept_values().await.map(Some),
        }
    }

    /// The values of a release in any state.
    pub async fn kept_values(&self) -> anyhow::Result<Value> {
        let values = self.run(&["get", "values", &self.place.release, "--all", "--output", "json"]).await?;
        serde_json::from_str(&values).context("read the answer of `helm get values`")
    }

    /// Removes the objects of the release. Its values are kept until [`Self::purge`], so that the command can be repeated.
    pub async fn uninstall(&self, timeout: u64) -> anyhow::Result<()> {
        let timeout = format!("{timeout}s");
        self.run(&["uninstall", &self.place.release, "--keep-history", "--wait", "--timeout", &timeout]).await.map(drop)
    }

    /// Forgets a release that was removed.
    pub async fn purge(&self) -> anyhow::Result<()> {
        self.run(&["uninstall", &self.place.release, "--ignore-not-found"]).await.map(drop)
    }

    /// Other releases of the namespace.
    pub async fn others(&self) -> anyhow::Result<Vec<String>> {
        let releases = self.run(&["list", "--short"]).await?;
        Ok(releases.lines().filter(|it| *it != self.place.release).map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    fn read(folder: &Path, below: &Path, found: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let (path, kind) = entry.map(|it| (it.path(), it.file_type().expect("a type"))).expect("an entry");
            if kind.is_dir() {
                read(&path, below, found);
            } else {
                let name = path.strip_prefix(below).expect("it is below").display().to_string();
                found.insert(name, std::fs::read(&path).expect("it is read"));
            }
        }
    }

    #[test]
    fn helm_4_overwrites_fields_of_others_like_helm_3() {
        for (text, expected) in [
            ("v3.14.0", &[][..]),
            ("v3.21.4", &[]),
            ("v4.0.0-rc.1", &["--server-side=true", "--force-conflicts"]),
            ("v4.3.2", &["--server-side=true", "--force-conflicts"]),
        ] {
            assert_eq!(Version::check(text).expect("it is new enough").overwriting(), expected, "{text}");
        }
        for text in ["v3.13.9", "v2.17.0", ""] {
            let error = Version::check(text).expect_err(text).to_string();
            assert!(error.contains("3.14 or newer is needed"), "{error}");
        }
    }

    #[test]
    fn chart_is_that_of_the_repository() {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/chart");
        let mut expected = BTreeMap::new();
        read(&chart, &chart, &mut expected);
        let carried = CHART.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        assert!(expected.contains_key("templates/agent.yaml") && expected == carried, "build the command again");
    }
}
