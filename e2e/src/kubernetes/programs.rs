//! The programs of a test cluster. `KUBEBUILDER_ASSETS`, a folder with etcd, kube-apiserver and kubectl, is used where it is set.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::go;

/// A program of the control plane, or kubectl.
///
/// # Errors
/// When Go is missing or too old, or the build fails.
pub fn kubernetes(name: &str) -> anyhow::Result<PathBuf> {
    match asset(name) {
        Some(program) => Ok(program),
        None => Ok(go::Program::Kubernetes.build()?.with_file_name(name)),
    }
}

/// # Errors
/// When no etcd is installed.
pub fn etcd() -> anyhow::Result<PathBuf> {
    asset("etcd").or_else(|| find("etcd")).context(
        "etcd is missing: install Debian's package etcd-server, or set KUBEBUILDER_ASSETS to a folder with etcd",
    )
}

fn asset(name: &str) -> Option<PathBuf> {
    let program = Path::new(&std::env::var_os("KUBEBUILDER_ASSETS")?).join(name);
    program.is_file().then_some(program)
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|program| program.is_file())
}
