//! Embeds the Helm chart, so that `hanse install` needs no download.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn files(folder: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    // A change of a folder is a new file, or one that is gone.
    println!("cargo::rerun-if-changed={}", folder.display());
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => files(&entry.path(), found)?,
            false => found.push(entry.path()),
        }
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/chart").canonicalize()?;
    let mut found = Vec::new();
    files(&chart, &mut found)?;
    found.sort();
    let mut code = String::from("&[\n");
    for path in found {
        let name = path.strip_prefix(&chart).map_err(io::Error::other)?;
        writeln!(code, "({:?}, include_bytes!({:?})),", name.display().to_string(), path.display().to_string())
            .map_err(io::Error::other)?;
    }
    code.push(']');
    let folder = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("Cargo sets OUT_DIR"))?;
    fs::write(Path::new(&folder).join("chart.rs"), code)
}
