//! Programs in Go that tests compare with. Each is built once and kept outside the checkout.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};

/// The program whose module is in `source`: from the cache, or built now, which downloads what it needs.
///
/// The cache is `$XDG_CACHE_HOME/hanse/go` (`~/.cache` where that is not set). The name of a program includes the version of
/// Go and the contents of its module, so that a change of either builds another one.
///
/// # Errors
/// When Go is missing, or the build fails.
pub fn build(source: &Path) -> anyhow::Result<PathBuf> {
    let name = source.file_name().context("the module's folder has a name")?.to_string_lossy();
    let cache = cache()?.join("hanse/go");
    fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
    let program = cache.join(format!("{name}-{}", key(source)?));
    // Several tests, or several checkouts, may want it at once.
    let lock = File::create(cache.join(format!("{name}.lock"))).context("create the cache's lock")?;
    lock.lock().context("lock the cache")?;
    if program.is_file() {
        return Ok(program);
    }
    let unfinished = program.with_extension("unfinished");
    let mut go = Command::new("go");
    go.args(["build", "-trimpath", "-buildvcs=false", "-mod=readonly", "-o"]).arg(&unfinished).arg(".");
    let output = go.current_dir(source).stdin(Stdio::null()).output().context("start go build")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "build {}: {}", source.display(), errors.trim());
    fs::rename(&unfinished, &program).context("name the program in the cache")?;
    Ok(program)
}

fn cache() -> anyhow::Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = from("XDG_CACHE_HOME").or_else(|| Some(from("HOME")?.join(".cache")));
    cache.context("neither XDG_CACHE_HOME nor HOME is set")
}

/// Of the toolchain that the module gets, and of the module.
fn key(source: &Path) -> anyhow::Result<String> {
    let version = Command::new("go").args(["env", "GOVERSION", "GOOS", "GOARCH"]).current_dir(source).output();
    let version = match version {
        Ok(output) if output.status.success() => output.stdout,
        Ok(output) => bail!("go env: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => {
            return Err(error)
                .context("start go: install Go 1.26 or later from https://go.dev/dl, or run `cargo xtask test`");
        }
    };
    let mut files: Vec<PathBuf> = source.read_dir()?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|it| it == "go" || it == "mod" || it == "sum"));
    files.sort();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&version);
    for file in files {
        let contents = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        for part in [file.file_name().unwrap_or_default().as_encoded_bytes(), &contents] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}
