//! TLS, client certificates, users and passwords.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use etcd_client::{Client, ConnectOptions, Permission, PermissionType};
use hanse_store::{StoreError, Transaction, create, open};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};

use super::nodes::{Nodes, SOON};
use super::{client, key, next, prefix, put, with};

type Ca = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Ca {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
    CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap()
}

/// Writes a certificate and its key as `NAME.pem` and `NAME.key`.
fn issue(folder: &Path, name: &str, ca: &Ca) -> (PathBuf, PathBuf) {
    let mut parameters = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    // Without a common name, which etcd would take for a user.
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let key = KeyPair::generate().unwrap();
    let certificate = parameters.signed_by(&key, ca).unwrap();
    let paths = (folder.join(format!("{name}.pem")), folder.join(format!("{name}.key")));
    std::fs::write(&paths.0, certificate.pem()).unwrap();
    secret(&paths.1, &key.serialize_pem());
    paths
}

fn secret(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

#[tokio::test]
async fn tls_verifies_etcd_and_presents_a_client_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let (ca, other) = (authority("etcd"), authority("another"));
    let (ca_file, other_file) = (folder.path().join("ca.pem"), folder.path().join("other.pem"));
    std::fs::write(&ca_file, ca.pem()).unwrap();
    std::fs::write(&other_file, other.pem()).unwrap();
    let (server, server_key) = issue(folder.path(), "server", &ca);
    let (own, own_key) = issue(folder.path(), "client", &ca);
    let (stranger, stranger_key) = issue(folder.path(), "stranger", &other);
    let extra = [
        "--cert-file".to_owned(),
        server.display().to_string(),
        "--key-file".to_owned(),
        server_key.display().to_string(),
        "--client-cert-auth".to_owned(),
        "--trusted-ca-file".to_owned(),
        ca_file.display().to_string(),
    ];
    let nodes = Nodes::start_with(&extra, true).await;
    let settings = format!("ca={}&cert={}&key={}&timeout=3", ca_file.display(), own.display(), own_key.display());
    let url = nodes.url_with(&settings);
    let store = create(&url).await.unwrap();
    let revision = put(&*store, "a", "1").await;
    assert_eq!(next(&mut store.watch(prefix(&[]), revision - 1).await.unwrap()).await.unwrap()[0].revision, revision);

    let refused =
        async |change: &dyn Fn(&mut hanse_store::EtcdUrl)| open(&with(&url, |it| change(it))).await.unwrap_err();
    let error = refused(&|it| it.ca = Some(other_file.clone())).await;
    assert!(matches!(&error, StoreError::Unavailable(text) if text.contains("certificate")), "{error}");
    let error = refused(&|it| it.certificate = None).await;
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    let error = refused(&|it| it.certificate = Some((stranger.clone(), stranger_key.clone()))).await;
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    let error = refused(&|it| it.server_name = Some("etcd.example".to_owned())).await;
    assert!(matches!(&error, StoreError::Unavailable(text) if text.contains("certificate")), "{error}");
    assert!(open(&with(&url, |it| it.server_name = Some("localhost".to_owned()))).await.is_ok());
    // Without TLS, a node does not answer.
    let error = refused(&|it| (it.tls, it.ca, it.certificate) = (false, None, None)).await;
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    let error = refused(&|it| it.ca = Some(own_key.with_extension("absent"))).await;
    assert!(matches!(&error, StoreError::Settings(text) if text.contains("client.absent")), "{error}");
    let error = refused(&|it| it.ca = Some(std::env::current_exe().unwrap().with_file_name("nothing"))).await;
    assert!(matches!(error, StoreError::Settings(_)), "{error}");
    std::fs::set_permissions(&own_key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = refused(&|_| ()).await;
    assert!(
        matches!(&error, StoreError::Settings(text) if text.contains("client.key") && text.contains("0600")),
        "{error}"
    );
}

/// Creates root, and a user with a role for the keys of a store.
async fn administer(client: &mut Client, prefix: &str, password: &str) {
    client.user_add("root", "root-password", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.role_add("hanse").await.unwrap();
    let keys = Permission::new(PermissionType::Readwrite, format!("{prefix}:")).with_prefix();
    client.role_grant_permission("hanse", keys).await.unwrap();
    client.user_add("hanse", password, None).await.unwrap();
    client.user_grant_role("hanse", "hanse").await.unwrap();
    client.auth_enable().await.unwrap();
}

#[tokio::test]
async fn a_user_authenticates_again_when_its_token_ends_or_rights_change() {
    let folder = tempfile::tempdir().unwrap();
    let password = folder.path().join("password");
    secret(&password, "first password\n");
    let extra = ["--auth-token-ttl", "2", "--bcrypt-cost", "4"].map(str::to_owned);
    let nodes = Nodes::start_with(&extra, false).await;
    let url = nodes.url_with(&format!("user=hanse&password-file={}&timeout=8", password.display()));
    let hanse_store::StoreUrl::Etcd(parts) = &url else { panic!("{url}") };
    let error = open(&url).await.unwrap_err();
    assert!(matches!(&error, StoreError::Denied(text) if text.contains("not enabled")), "{error}");
    administer(&mut client(&nodes, 0, ConnectOptions::new()).await, &parts.prefix, "first password").await;

    let store = create(&url).await.unwrap();
    let first = put(&*store, "a", "1").await;
    let mut watch = store.watch(prefix(&[]), first - 1).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap()[0].revision, first);
    // The token ends while nothing uses it; nodes look for ended ones once a second.
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    put(&*store, "b", "2").await;
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    let mut another = store.watch(prefix(&[]), first).await.unwrap();
    assert_eq!(next(&mut another).await.unwrap()[0].key.name(), "b");
    assert_eq!(next(&mut watch).await.unwrap()[0].key.name(), "b");
    let lease = store.grant_lease(SOON).await.unwrap();
    store.commit(Transaction::default().put_with_lease(key(&["l"]), "", lease)).await.unwrap();

    // Any change of users or rights gives etcd's store of them a new revision.
    let mut root = client(&nodes, 1, ConnectOptions::new().with_user("root", "root-password")).await;
    root.role_add("another").await.unwrap();
    put(&*store, "c", "3").await;

    // A new password, in the file that is read for each connection.
    root.user_change_password("hanse", "second password").await.unwrap();
    secret(&password, "second password\n");
    put(&*store, "d", "4").await;
    assert!(open(&url).await.is_ok());
    secret(&password, "wrong\n");
    let error = open(&url).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, StoreError::Denied(_)) && !text.contains("wrong"), "{text}");
    let elsewhere = with(&url, |it| it.prefix.push('x'));
    secret(&password, "second password\n");
    let error = open(&elsewhere).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied(_)), "{error}");
    let error = open(&with(&url, |it| it.user = None)).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied(_)), "{error}");

    // The right to read and to write is the least one: neither is enough alone.
    let mut grant = async |kind: PermissionType| {
        let keys = Permission::new(kind, format!("{}:", parts.prefix)).with_prefix();
        root.role_grant_permission("hanse", keys).await.unwrap();
    };
    grant(PermissionType::Read).await;
    let error = store.commit(Transaction::default().put(key(&["x"]), "")).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied(_)), "{error}");
    assert!(open(&url).await.is_ok(), "it may read");
    grant(PermissionType::Write).await;
    let error = open(&url).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied(_)), "{error}");
    grant(PermissionType::Readwrite).await;
    put(&*store, "e", "5").await;

    // Without the right to read, a watch ends with an error.
    root.user_revoke_role("hanse", "hanse").await.unwrap();
    let error = store.watch(prefix(&[]), first).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied(_)), "{error}");
    let error = store.commit(Transaction::default().put(key(&["x"]), "")).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied(_)), "{error}");
}
