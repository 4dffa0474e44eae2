//! Private files on a volume of Kubernetes.
//!
//! When the group of a volume is not that of the pod (`fsGroup`), such as after the volume was restored from a snapshot, the kubelet gives
//! all of its files this group and the right to read and write for it, and sets the set-group-id bit of its folders. The hub refuses a key that its
//! group may read. Here the change is known to be the kubelet's, and only pods with this group have the volume.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::unistd::{getegid, geteuid, getgroups};

/// Takes the rights of the group away again from these files of a folder, if the kubelet has given them. Returns the files.
///
/// # Errors
/// When the mode of a file cannot be changed.
pub fn restrict_after_group_change(folder: &Path, names: &[&str]) -> io::Result<Vec<PathBuf>> {
    let Ok(of_folder) = fs::metadata(folder) else { return Ok(Vec::new()) };
    let mut restricted = Vec::new();
    for path in names.iter().map(|name| folder.join(name)) {
        // A link may lead to a file of another volume.
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_file() && is_of_kubelet(&of_folder, &metadata) {
            fs::set_permissions(&path, Permissions::from_mode(0o600))?;
            restricted.push(path);
        }
    }
    Ok(restricted)
}

fn is_of_kubelet(folder: &Metadata, file: &Metadata) -> bool {
    let group = file.gid();
    let is_own =
        || getegid().as_raw() == group || getgroups().unwrap_or_default().iter().any(|it| it.as_raw() == group);
    file.permissions().mode() & 0o777 == 0o660
        && file.uid() == geteuid().as_raw()
        && folder.permissions().mode() & 0o2007 == 0o2000
        && folder.gid() == group
        && is_own()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_change_of_the_kubelet_is_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("hub");
        fs::create_dir(&data).unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let key = data.join("ca.key");
        fs::write(&key, "key").unwrap();
        let mode_of = || fs::metadata(&key).unwrap().permissions().mode() & 0o777;
        for (of_folder, of_file, expected) in [
            (0o2770, 0o660, 0o600),
            (0o770, 0o660, 0o660),
            (0o2770, 0o640, 0o640),
            (0o2775, 0o660, 0o660),
            (0o2770, 0o664, 0o664),
            (0o2770, 0o600, 0o600),
        ] {
            mode(&data, of_folder);
            mode(&key, of_file);
            let restricted = restrict_after_group_change(&data, &["ca.key", "missing"]).unwrap();
            assert_eq!(mode_of(), expected, "folder {of_folder:o}, file {of_file:o}");
            assert_eq!(restricted.len(), usize::from(of_file != expected));
        }
        // A link is not followed.
        let elsewhere = folder.path().join("elsewhere");
        fs::rename(&key, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &key).unwrap();
        mode(&data, 0o2770);
        mode(&elsewhere, 0o660);
        assert!(restrict_after_group_change(&data, &["ca.key"]).unwrap().is_empty());
        assert_eq!(fs::metadata(&elsewhere).unwrap().permissions().mode() & 0o777, 0o660);
    }
}
