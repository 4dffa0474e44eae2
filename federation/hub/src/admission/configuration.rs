//! The ValidatingWebhookConfiguration: its webhooks, and its CA bundle with the certificates of all hubs.
//!
//! The object exists already, from the chart or the guide: a hub has no right to create one. A hub writes it only where it differs,
//! and with the version that it has read, so that hubs do not remove the certificates of each other.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use hanse_kubernetes::answered;
use hanse_runtime::retry::Backoff;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MatchCondition, RuleWithOperations, ServiceReference, ValidatingWebhook, ValidatingWebhookConfiguration,
    WebhookClientConfig,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use x509_parser::pem::Pem;

use super::certificate::{COMMON_NAME, Certificates};
use crate::management::Monitor;

/// The name of the configuration, unless another is given.
pub const CONFIGURATION: &str = "hanse-hub";
/// The path of the webhook.
pub(super) const PATH: &str = "/admit";
/// Identifies the set of webhooks: a hub does not change that of a later version.
const REVISION_ANNOTATION: &str = "hanse.dev/webhooks-revision";
const REVISION: u32 = 1;
/// Within this time, API servers give up. A review takes some milliseconds, and needs at most two requests and a write.
const ANSWER_SECONDS: i32 = 8;
/// Between two comparisons of the configuration.
const EVERY: Duration = Duration::from_secs(10);
/// API servers watch the configuration. This long after a certificate was added, they know it.
const SETTLED: Duration = Duration::from_secs(3);
/// Where another program removed the certificate of a hub this often, it will again: once is a mistake, which the hub repairs.
const MAX_OVERWRITTEN: usize = 2;
const OVERWRITTEN_WITHIN: Duration = Duration::from_secs(600);
/// Times that are remembered: one for each comparison within that time.
const MAX_TIMES: usize = 60;
/// Certificates in the bundle: two of each hub, and of hubs that ended without removing theirs. The newest ones are kept.
const MAX_CERTIFICATES: usize = 32;

/// Where API servers reach the webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Service {
        namespace: String,
        name: String,
    },
    /// `https://HOST:PORT`, for a hub outside of the cluster.
    Url {
        host: String,
        port: u16,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("'{0}' is not NAMESPACE/NAME of a Service")]
    Service(String),
    #[error("'{0}' is not https://HOST:PORT")]
    Url(String),
}

impl Address {
    /// # Errors
    /// When `text` is not `NAMESPACE/NAME`.
    pub fn service(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError::Service(text.to_owned());
        let (namespace, name) = text.split_once('/').ok_or_else(error)?;
        let is_name = |text: &str| hanse_identity::spiffe::check_label(text).is_ok();
        if !is_name(namespace) || !is_name(name) {
            return Err(error());
        }
        Ok(Self::Service { namespace: namespace.to_owned(), name: name.to_owned() })
    }

    /// # Errors
    /// When `text` is not `https://HOST:PORT`.
    pub fn url(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError::Url(text.to_owned());
        let rest = text.strip_prefix("https://").ok_or_else(error)?;
        let (host, port) = rest.rsplit_once(':').ok_or_else(error)?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
        if host.is_empty() || !host.bytes().all(allowed) {
            return Err(error());
        }
        Ok(Self::Url { host: host.to_owned(), port: port.parse().map_err(|_| error())? })
    }

    /// The name in the certificate.
    pub fn host(&self) -> String {
        match self {
            Self::Service { namespace, name } => format!("{name}.{namespace}.svc"),
            Self::Url { host, .. } => host.trim_matches(['[', ']']).to_owned(),
        }
    }

    fn client_config(&self) -> WebhookClientConfig {
        match self {
            Self::Service { namespace, name } => WebhookClientConfig {
                service: Some(ServiceReference {
                    namespace: namespace.clone(),
                    name: name.clone(),
                    path: Some(PATH.to_owned()),
                    port: Some(443),
                }),
                ..WebhookClientConfig::default()
            },
            Self::Url { host, port } => {
                WebhookClientConfig { url: Some(format!("https://{host}:{port}{PATH}")), ..Default::default() }
            }
        }
    }
}

/// The webhooks of the configuration, with all fields that an API server would fill in.
pub fn webhooks(address: &Address) -> Vec<ValidatingWebhook> {
    let rule = |resources: &[&str], operations: &[&str]| {
        let text = |all: &[&str]| Some(all.iter().map(|it| (*it).to_owned()).collect());
        RuleWithOperations {
            api_groups: text(&["hanse.dev"]),
            api_versions: text(&["*"]),
            operations: text(operations),
            resources: text(resources),
            scope: Some("*".to_owned()),
        }
    };
    let governed = ["tiers", "federatednetworkpolicies", "stagedfederatednetworkpolicies", "federatednetworksets"];
    let checked = ["memberclusters", "clustersets", "clusterjointokens"];
    // What changes neither spec nor labels is not reviewed: the operator adds and removes its finalizer also while no hub answers.
    let labels = |of: &str| format!("(has({of}.metadata.labels) ? {of}.metadata.labels : {{}})");
    let spec = "(has(object.spec) == has(oldObject.spec) && (!has(object.spec) || object.spec == oldObject.spec))";
    let changes =
        format!("request.operation != 'UPDATE' || !({spec} && {} == {})", labels("object"), labels("oldObject"));
    let condition = MatchCondition { name: "changes-spec-or-labels".to_owned(), expression: changes };
    vec![ValidatingWebhook {
        name: "policies.hanse.dev".to_owned(),
        admission_review_versions: vec!["v1".to_owned()],
        client_config: address.client_config(),
        failure_policy: Some("Fail".to_owned()),
        match_conditions: Some(vec![condition]),
        match_policy: Some("Equivalent".to_owned()),
        namespace_selector: Some(LabelSelector::default()),
        object_selector: Some(LabelSelector::default()),
        rules: Some(vec![
            rule(&governed, &["CREATE", "UPDATE", "DELETE"]),
            rule(&checked, &["CREATE", "UPDATE"]),
            rule(&["policyapprovals"], &["CREATE"]),
        ]),
        side_effects: "NoneOnDryRun".to_owned(),
        timeout_seconds: Some(ANSWER_SECONDS),
    }]
}

/// When another program changed the configuration, or removed the certificate of this hub from it.
#[derive(Debug, Default)]
struct Overwritten(VecDeque<tokio::time::Instant>);

impl Overwritten {
    fn note(&mut self, was_overwritten: bool, now: tokio::time::Instant) {
        if was_overwritten {
            self.0.push_back(now);
            self.0.truncate(MAX_TIMES);
        }
    }

    /// How often within [`OVERWRITTEN_WITHIN`].
    fn times(&mut self, now: tokio::time::Instant) -> usize {
        self.0.retain(|at| now.duration_since(*at) <= OVERWRITTEN_WITHIN);
        self.0.len()
    }
}

/// The webhooks without what hubs add for themselves.
fn without_certificates(webhooks: Option<&Vec<ValidatingWebhook>>) -> Vec<ValidatingWebhook> {
    let mut webhooks = webhooks.cloned().unwrap_or_default();
    webhooks.iter_mut().for_each(|it| it.client_config.ca_bundle = None);
    webhooks
}

fn has_certificate(found: &ValidatingWebhookConfiguration, pem: &str) -> bool {
    let mut bundles = found.webhooks.iter().flatten().map(|it| it.client_config.ca_bundle.as_ref());
    bundles.all(|it| it.is_some_and(|it| String::from_utf8_lossy(&it.0).contains(pem)))
}

/// Whether API servers can use the webhook of this hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It is not known yet.
    Unknown,
    /// They know the certificate that is served.
    Ready,
    /// They do not, and refuse all writes of the kinds of `hanse.dev`: the reason for programs, and for people.
    Failing { reason: &'static str, message: String },
}

/// Keeps the configuration.
#[derive(Clone)]
pub(super) struct Keeper {
    api: Api<ValidatingWebhookConfiguration>,
    name: String,
    address: Address,
    certificates: Arc<Certificates>,
    state: Arc<watch::Sender<State>>,
    /// Cancelled when the first certificate is served, which API servers know.
    settled: CancellationToken,
    monitor: Monitor,
}

impl Keeper {
    pub(super) fn new(
        client: Client,
        name: String,
        address: Address,
        certificates: Arc<Certificates>,
        monitor: &Monitor,
    ) -> (Self, watch::Receiver<State>) {
        let (state, receiver) = watch::channel(State::Unknown);
        let (api, state, settled) = (Api::all(client), Arc::new(state), CancellationToken::new());
        (Self { api, name, address, certificates, state, settled, monitor: monitor.clone() }, receiver)
    }

    /// Cancelled when API servers can use the webhook for the first time.
    pub(super) fn settled(&self) -> CancellationToken {
        self.settled.clone()
    }

    pub(super) async fn run(self, stop: CancellationToken) {
        let every = EVERY.min(self.certificates.lifetime() / 10).max(Duration::from_millis(100));
        let settled = SETTLED.min(self.certificates.lifetime() / 10);
        let mut backoff = Backoff::new(Duration::from_millis(200), every);
        let mut overwritten = Overwritten::default();
        // Since when the configuration has all certificates of this hub.
        let mut complete: Option<tokio::time::Instant> = None;
        loop {
            let made = self.reconcile().await;
            let pause = match &made {
                Ok(was_overwritten) => {
                    backoff.reset();
                    overwritten.note(*was_overwritten, tokio::time::Instant::now());
                    let since = *complete.get_or_insert_with(tokio::time::Instant::now);
                    let is_new = self.certificates.has_next() || !self.settled.is_cancelled();
                    if is_new && since.elapsed() < settled {
                        settled.saturating_sub(since.elapsed())
                    } else {
                        if self.certificates.advance() {
                            info!("certificate of the webhook renewed");
                        }
                        self.settled.cancel();
                        complete = None;
                        every
                    }
                }
                Err(_) => {
                    complete = None;
                    backoff.next_delay()
                }
            };
            self.report(made.map(drop), overwritten.times(tokio::time::Instant::now()));
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Makes the configuration what it should be. True: another program had changed it, or removed the certificate that is served.
    async fn reconcile(&self) -> anyhow::Result<bool> {
        let now = SystemTime::now();
        let own = self.certificates.known(now)?;
        let what = || format!("ValidatingWebhookConfiguration {}", self.name);
        let found = answered(self.api.get_opt(&self.name)).await.with_context(|| format!("read {}", what()))?;
        let found = found.with_context(|| format!("{} does not exist: create it, as the chart does", what()))?;
        let mut wanted = found.clone();
        let bundle = bundle(&found, &own, now);
        let annotations = wanted.metadata.annotations.get_or_insert_default();
        let revision = annotations.get(REVISION_ANNOTATION).and_then(|it| it.parse::<u32>().ok()).unwrap_or_default();
        if revision <= REVISION {
            annotations.insert(REVISION_ANNOTATION.to_owned(), REVISION.to_string());
            wanted.webhooks = Some(webhooks(&self.address));
        }
        if wanted.webhooks.as_ref().is_none_or(Vec::is_empty) {
            bail!(
                "{} contains no webhook, and its annotation {REVISION_ANNOTATION} is that of a later version: nothing is checked; remove the \
                 annotation",
                what()
            );
        }
        for webhook in wanted.webhooks.iter_mut().flatten() {
            webhook.client_config.ca_bundle = Some(ByteString(bundle.clone().into_bytes()));
        }
        let serving = self.certificates.serving().filter(|(end, _)| self.settled.is_cancelled() && *end > now);
        // Of the same revision, no hub writes anything else.
        let is_other = revision == REVISION
            && without_certificates(found.webhooks.as_ref()) != without_certificates(wanted.webhooks.as_ref());
        let was_overwritten = serving.is_some_and(|(_, pem)| is_other || !has_certificate(&found, &pem));
        if wanted != found {
            let replaced = answered(self.api.replace(&self.name, &PostParams::default(), &wanted)).await;
            replaced.with_context(|| format!("write {}", what()))?;
            info!(configuration = self.name, "webhook configuration written");
        }
        Ok(was_overwritten)
    }

    fn report(&self, made: anyhow::Result<()>, overwritten: usize) {
        let state = match made {
            Ok(()) if overwritten >= MAX_OVERWRITTEN => State::Failing {
                reason: "ConfigurationOverwritten",
                message: format!(
                    "another program changed the webhooks or the caBundle of the ValidatingWebhookConfiguration {} {overwritten} times \
                     within {} minutes; until the hub repairs them, API servers refuse writes, or check nothing: exclude them from what that \
                     program manages",
                    self.name,
                    OVERWRITTEN_WITHIN.as_secs() / 60
                ),
            },
            Ok(()) => State::Ready,
            Err(error) => {
                let error = format!("{error:#}");
                let expired = self.certificates.serving().is_none_or(|(end, _)| end <= SystemTime::now());
                let reason = if expired { "CertificateExpired" } else { "ConfigurationNotWritten" };
                let first = match expired {
                    true => "the certificate of the webhook has expired, and API servers do not know a new one",
                    false => "the configuration of the webhook cannot be updated",
                };
                State::Failing { reason, message: format!("{first}: {error}") }
            }
        };
        self.monitor.webhook(match &state {
            State::Failing { reason, message } => Some((*reason, &**message)),
            State::Unknown | State::Ready => None,
        });
        self.state.send_if_modified(|old| {
            let changed = *old != state;
            if changed && let State::Failing { message, .. } = &state {
                warn!(configuration = self.name, error = message, "API servers may refuse writes of hanse.dev");
            }
            *old = state;
            changed
        });
    }
}

/// The bundle: `own`, and those of other hubs that are valid.
fn bundle(found: &ValidatingWebhookConfiguration, own: &[String], now: SystemTime) -> String {
    let now = i64::try_from(crate::registry::seconds(now)).unwrap_or(i64::MAX);
    let mut others: Vec<(i64, String)> = Vec::new();
    for bytes in found.webhooks.iter().flatten().filter_map(|it| it.client_config.ca_bundle.as_ref()) {
        for pem in Pem::iter_from_buffer(&bytes.0).map_while(Result::ok) {
            let Ok(certificate) = pem.parse_x509() else { continue };
            let is_ours = certificate.subject().iter_common_name().any(|name| name.as_str() == Ok(COMMON_NAME));
            let end = certificate.validity().not_after.timestamp();
            let text = encoded(&pem.contents);
            if is_ours && end > now && !own.contains(&text) && !others.iter().any(|(_, it)| *it == text) {
                others.push((end, text));
            }
        }
    }
    others.sort_by(|one, other| other.cmp(one));
    others.truncate(MAX_CERTIFICATES.saturating_sub(own.len()));
    others.sort_by(|one, other| one.1.cmp(&other.1));
    let mut all: Vec<&str> = own.iter().chain(others.iter().map(|(_, text)| text)).map(String::as_str).collect();
    // The same set is the same text for all hubs.
    all.sort_unstable();
    all.concat()
}

/// A certificate in PEM, as [`Certificates`] writes it.
fn encoded(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http_body_util::{BodyExt as _, Full};
    use hyper::{Method, Request, Response};
    use kube::client::Body;

    use super::*;

    fn with_bundle(bundle: &str) -> ValidatingWebhookConfiguration {
        let mut webhooks = webhooks(&Address::Url { host: "127.0.0.1".to_owned(), port: 1 });
        webhooks[0].client_config.ca_bundle = Some(ByteString(bundle.as_bytes().to_vec()));
        ValidatingWebhookConfiguration { webhooks: Some(webhooks), ..Default::default() }
    }

    fn certificates(seconds: u64) -> (Vec<String>, SystemTime) {
        let lifetime = Duration::from_secs(seconds);
        let now = SystemTime::now();
        let made = Certificates::new("127.0.0.1".to_owned(), lifetime).expect("a certificate");
        (made.known(now).expect("known"), now)
    }

    #[test]
    fn bundle_keeps_valid_certificates_of_other_hubs() {
        let (own, now) = certificates(600);
        let (other, _) = certificates(600);
        let alone = bundle(&with_bundle("not PEM"), &own, now);
        assert_eq!(alone, own[0]);
        let both = bundle(&with_bundle(&other[0]), &own, now);
        assert!(both.contains(&own[0]) && both.contains(&other[0]));
        // The other hub writes the same.
        assert_eq!(bundle(&with_bundle(&both), &other, now), both);
        // Expired ones go.
        assert_eq!(bundle(&with_bundle(&both), &own, now + Duration::from_secs(700)), own[0]);
        let many: String = (0..40).map(|_| certificates(600).0.concat()).collect();
        let all = bundle(&with_bundle(&many), &own, now);
        assert_eq!(all.matches("BEGIN CERTIFICATE").count(), MAX_CERTIFICATES);
        assert!(all.contains(&own[0]));
    }

    #[tokio::test]
    async fn webhook_is_usable_when_api_servers_know_what_it_serves() {
        let stored = Arc::new(Mutex::new((with_bundle(""), None)));
        let server = Arc::clone(&stored);
        let server = tower::service_fn(move |request: Request<Body>| {
            let stored = Arc::clone(&server);
            async move {
                let is_write = request.method() == Method::PUT;
                let body = request.into_body().collect().await?.to_bytes();
                let mut stored = stored.lock().expect("not poisoned");
                if is_write {
                    *stored = (serde_json::from_slice(&body).expect("a configuration"), Some(SystemTime::now()));
                }
                let text = serde_json::to_vec(&stored.0).expect("JSON");
                Ok::<_, kube::Error>(Response::new(Full::new(bytes::Bytes::from(text))))
            }
        });
        // Its certificate is served a second after it was written.
        let made = Certificates::new("127.0.0.1".to_owned(), Duration::from_secs(10)).expect("a certificate");
        let (made, client) = (Arc::new(made), Client::new(server, "default"));
        let address = Address::Url { host: "127.0.0.1".to_owned(), port: 1 };
        let (keeper, _state) = Keeper::new(client, "hub".to_owned(), address, Arc::clone(&made), &Monitor::new("hub"));
        let (settled, stop) = (keeper.settled(), CancellationToken::new());
        let running = tokio::spawn(keeper.run(stop.clone()));
        tokio::time::timeout(Duration::from_secs(60), settled.cancelled()).await.expect("it is usable");
        let (found, written) = stored.lock().expect("not poisoned").clone();
        assert!(written.and_then(|at| at.elapsed().ok()).is_some_and(|it| it >= Duration::from_secs(1)), "{written:?}");
        let bundle = found.webhooks.and_then(|it| it[0].client_config.ca_bundle.clone()).expect("a bundle");
        let known = made.known(SystemTime::now()).expect("known");
        assert!(made.serving().is_some() && known.iter().any(|it| String::from_utf8_lossy(&bundle.0).contains(it)));
        stop.cancel();
        running.await.expect("no panic");
    }

    #[test]
    fn addresses_are_read() {
        let service = Address::service("hanse/hub-webhook").expect("a service");
        assert_eq!(service.host(), "hub-webhook.hanse.svc");
        assert_eq!(Address::url("https://[::1]:8443").expect("a URL").host(), "::1");
        for wrong in ["hub", "a/b/c", "A/b", ""] {
            Address::service(wrong).expect_err(wrong);
        }
        for wrong in ["http://a:1", "https://a", "https://a:x", "https://a/b:1", "https://u@h:1"] {
            Address::url(wrong).expect_err(wrong);
        }
    }
}
