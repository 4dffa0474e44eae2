//! The authority's key in the store, encrypted, so that each replica of the hub needs the store and a key file only.
//!
//! The key file has 32 random bytes. It encrypts the key of the authority with AES-256-GCM, bound to the authority's certificate,
//! and is used for nothing else. Who has the store alone cannot issue certificates; nor can who has the key file alone.

use std::path::Path;

use anyhow::{Context as _, bail};
use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hanse_identity::ca::Ca;
use hanse_identity::keys::{Certificate, Credentials, Key};
use hanse_runtime::files;
use hanse_store::{Compare, Outcome, Store, StoreUrl, Transaction};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::authority::{Authority, Lifetimes};
use crate::registry::{key, records};

const KEY_BYTES: usize = 32;

/// The content of a key file.
pub struct UnlockKey(RandomizedNonceKey);

impl std::fmt::Debug for UnlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UnlockKey")
    }
}

/// `authority/root`
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// PEM.
    certificate: String,
    /// The nonce and the encrypted key (PEM) with its tag, in base64.
    sealed_key: String,
}

impl UnlockKey {
    /// Reads a key file.
    ///
    /// # Errors
    /// When it cannot be read, others may read it, or it does not have 32 bytes.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes =
            files::read_provided_secret(path).with_context(|| format!("read the key file {}", path.display()))?;
        Self::new(&bytes).with_context(|| {
            let path = path.display();
            format!(
                "{path} has {} bytes; a key file has 32 random bytes: head -c 32 /dev/urandom > {path}",
                bytes.len()
            )
        })
    }

    /// Reads a key file, or makes one where there is none. True if it was made.
    ///
    /// # Errors
    /// As [`Self::read`], and when the file cannot be written.
    pub fn read_or_create(path: &Path) -> anyhow::Result<(Self, bool)> {
        if path.exists() {
            return Ok((Self::read(path)?, false));
        }
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        aws_lc_rs::rand::fill(&mut *bytes).context("the random generator failed")?;
        files::write_secret(path, &*bytes).with_context(|| format!("write the key file {}", path.display()))?;
        Ok((Self::new(&*bytes).context("the random generator failed")?, true))
    }

    fn new(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != KEY_BYTES {
            return None;
        }
        RandomizedNonceKey::new(&AES_256_GCM, bytes).ok().map(Self)
    }

    fn seal(&self, key: &Key, root: &Certificate) -> Option<String> {
        let mut bytes = Zeroizing::new(key.to_pem().as_bytes().to_vec());
        let nonce = self.0.seal_in_place_append_tag(bound_to(root), &mut *bytes).ok()?;
        Some(STANDARD.encode([nonce.as_ref().as_slice(), &bytes].concat()))
    }

    fn unseal(&self, sealed: &str, root: &Certificate) -> Option<Key> {
        let mut bytes = Zeroizing::new(STANDARD.decode(sealed).ok()?);
        let (nonce, sealed) = bytes.split_at_mut_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let pem = self.0.open_in_place(nonce, bound_to(root), sealed).ok()?;
        Key::from_pem(pem).ok()
    }
}

fn bound_to(root: &Certificate) -> Aad<Vec<u8>> {
    Aad::from([b"hanse authority/root 1 ", root.fingerprint().to_string().as_bytes()].concat())
}

/// Puts the authority into the store, where there is none yet.
///
/// # Errors
/// When the store contains one, or fails.
pub async fn seal(store: &dyn Store, authority: &Ca, unlock: &UnlockKey) -> anyhow::Result<()> {
    let name = key(&["authority", "root"])?;
    let sealed = unlock.seal(&authority.credentials().key, authority.certificate()).context("encrypt the key")?;
    let record = Record { certificate: authority.certificate().to_pem(), sealed_key: sealed };
    let put = Transaction::default().when(Compare::Absent(name.clone())).put(name, records::encode(&record));
    match store.commit(put).await.context("store the authority")? {
        Outcome::Committed(_) => Ok(()),
        Outcome::Conflict => bail!("the store already contains the authority's key"),
    }
}

/// Puts the authority of a folder into a store that belongs to it. It can be repeated.
///
/// # Errors
/// When files cannot be read, or the store fails, or belongs to another ClusterSet or contains another key.
pub async fn seal_folder(data: &Path, url: &StoreUrl, key_file: &Path) -> anyhow::Result<()> {
    let store = hanse_store::open(url).await.with_context(|| format!("open the store {url}"))?;
    if !data.join("ca.key").exists() && is_sealed(&*store).await? {
        // The key was never in the folder, or was deleted from it.
        unseal(&*store, key_file).await?;
        return Ok(());
    }
    let authority = Authority::read(data, Lifetimes::default()).context("read the root")?;
    let root = store.read(&key(&["meta", "root"])?).await.context("read the store")?;
    if root.is_none_or(|it| it.value != authority.root().fingerprint().to_string().as_bytes()) {
        bail!("the store {url} belongs to another ClusterSet than {}", data.display());
    }
    if is_sealed(&*store).await? {
        // Repeated with the same key file; with another one, this fails.
        unseal(&*store, key_file).await?;
        return Ok(());
    }
    let (unlock, _) = UnlockKey::read_or_create(key_file)?;
    seal(&*store, authority.ca(), &unlock).await
}

/// Whether the store contains an authority.
///
/// # Errors
/// When the store fails.
pub async fn is_sealed(store: &dyn Store) -> anyhow::Result<bool> {
    Ok(store.read(&key(&["authority", "root"])?).await?.is_some())
}

/// Reads the authority from the store.
///
/// # Errors
/// When the store contains none, it cannot be read, or the key file is another.
pub async fn unseal(store: &dyn Store, key_file: &Path) -> anyhow::Result<Ca> {
    let unlock = UnlockKey::read(key_file)?;
    let Some(entry) = store.read(&key(&["authority", "root"])?).await.context("read the authority")? else {
        bail!(
            "the store does not contain the authority's key: put it there with `hanse-hub store seal`, or start the hub \
             with --data and without --key-file"
        );
    };
    let record: Record = records::decode(&entry.value).context("read the authority in the store")?;
    let certificate =
        Certificate::from_pem(record.certificate.as_bytes()).context("read the authority in the store")?;
    let Some(key) = unlock.unseal(&record.sealed_key, &certificate) else {
        bail!("the key file {} does not unlock the authority's key in the store", key_file.display());
    };
    Ok(Ca::new(Credentials::new(key, certificate)?, true)?)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use hanse_identity::TrustDomain;
    use hanse_store::in_memory;

    use super::*;

    fn root() -> Ca {
        Ca::root(&TrustDomain::new("hanse.test").unwrap(), Duration::from_secs(86_400), SystemTime::now()).unwrap()
    }

    #[tokio::test]
    async fn only_the_key_file_unlocks_the_authority() {
        let folder = tempfile::tempdir().unwrap();
        let (file, other) = (folder.path().join("key"), folder.path().join("other"));
        let (unlock, made) = UnlockKey::read_or_create(&file).unwrap();
        assert!(made && !UnlockKey::read_or_create(&file).unwrap().1);
        assert!(UnlockKey::read_or_create(&other).unwrap().1);
        let (store, ca) = (in_memory(), root());
        assert!(unseal(&*store, &file).await.unwrap_err().to_string().contains("hanse-hub store seal"));
        seal(&*store, &ca, &unlock).await.unwrap();
        assert!(seal(&*store, &root(), &unlock).await.is_err(), "it is never replaced");
        let read = unseal(&*store, &file).await.unwrap();
        assert_eq!(read.certificate().fingerprint(), ca.certificate().fingerprint());
        assert_eq!(*read.credentials().key.to_pem(), *ca.credentials().key.to_pem());
        let error = unseal(&*store, &other).await.unwrap_err().to_string();
        assert!(error.contains("other does not unlock"), "{error}");
        // The key is not in the store in any readable form.
        let entry = store.read(&key(&["authority", "root"]).unwrap()).await.unwrap().unwrap();
        let text = String::from_utf8(entry.value.to_vec()).unwrap();
        assert!(!text.contains("PRIVATE KEY") && !text.contains(&ca.credentials().key.to_pem()[40..80]), "{text}");
        std::fs::write(&other, [1; 31]).unwrap();
        let error = format!("{:#}", unseal(&*store, &other).await.unwrap_err());
        assert!(error.contains("has 31 bytes"), "{error}");
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(format!("{:#}", unseal(&*store, &file).await.unwrap_err()).contains("0600"));
    }

    #[test]
    fn a_sealed_key_is_bound_to_its_certificate_and_its_bytes() {
        let unlock = UnlockKey::new(&[7; 32]).unwrap();
        let (one, two) = (root(), root());
        let sealed = unlock.seal(&one.credentials().key, one.certificate()).unwrap();
        assert!(unlock.unseal(&sealed, one.certificate()).is_some());
        assert!(unlock.unseal(&sealed, two.certificate()).is_none());
        assert!(UnlockKey::new(&[8; 32]).unwrap().unseal(&sealed, one.certificate()).is_none());
        let bytes = STANDARD.decode(&sealed).unwrap();
        for at in (0..bytes.len()).step_by(7) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(unlock.unseal(&STANDARD.encode(&changed), one.certificate()).is_none(), "byte {at}");
        }
        assert!(unlock.unseal("", one.certificate()).is_none());
        let again = unlock.seal(&one.credentials().key, one.certificate()).unwrap();
        assert_ne!(sealed, again, "each nonce is new");
    }
}
