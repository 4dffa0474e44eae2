//! Expressions that conversions make of the fields of policy APIs. They are about *effective* labels, as
//! [`crate::inventory::EffectiveLabels`] gives them.

use std::borrow::Cow;
use std::sync::Arc;

use super::expr::Expr;

/// The namespace of a pod or a NetworkSet.
pub const NAMESPACE: &str = "projectcalico.org/namespace";
/// The name of a pod's service account, whole.
pub const SERVICE_ACCOUNT: &str = "projectcalico.org/serviceaccount";
/// On pods only: `k8s`.
pub const ORCHESTRATOR: &str = "projectcalico.org/orchestrator";
pub const KUBERNETES: &str = "k8s";
/// Before each label of the namespace.
pub const NAMESPACE_PREFIX: &str = "pcns.";
/// Before each label of the service account.
pub const SERVICE_ACCOUNT_PREFIX: &str = "pcsa.";
/// Behind either prefix: the name of the namespace, or of the account, as if it were a label of it.
pub const NAME: &str = "projectcalico.org/name";

/// Before the key of a label of an object's own whose key is reserved: Kubernetes' selectors see it, Calico's do not. No
/// label has a key of this kind.
pub const OWN_PREFIX: &str = "pod//";
/// Behind [`NAMESPACE_PREFIX`]: the label `projectcalico.org/name` of a namespace, which only Kubernetes' selectors see.
pub const OWN_NAME: &str = "//projectcalico.org/name";

/// Under which key effective labels have a label of the object's own.
pub fn own_key(key: &str) -> Cow<'_, str> {
    if is_reserved_key(key) { format!("{OWN_PREFIX}{key}").into() } else { key.into() }
}

/// The key of the object's own label that becomes the effective label `key`; `None` if it is not an own label.
pub fn own_label(key: &str) -> Option<&str> {
    if is_reserved_key(key) { None } else { Some(key.strip_prefix(OWN_PREFIX).unwrap_or(key)) }
}

/// Converts a selector of an author. Keys with `//`, which effective labels use internally, are escaped so that they match no label.
pub fn of_author(selector: Expr) -> Expr {
    map_keys(&selector, &|key| key.replace("//", "///").into(), &|expr| expr.clone())
}

/// Whether a key is one that effective labels add, so that an object cannot set it by a label of its own.
pub fn is_reserved_key(key: &str) -> bool {
    key.starts_with(NAMESPACE_PREFIX)
        || key.starts_with(SERVICE_ACCOUNT_PREFIX)
        || matches!(key, NAMESPACE | SERVICE_ACCOUNT | ORCHESTRATOR)
}

/// All of `parts`; `all()` of none, and parts that are `all()` are left out.
pub fn all_of(parts: impl IntoIterator<Item = Expr>) -> Expr {
    let mut parts: Vec<Expr> = parts.into_iter().filter(|part| *part != Expr::All).collect();
    match parts.len() {
        0 => Expr::All,
        1 => parts.remove(0),
        _ => Expr::And(parts.into()),
    }
}

/// Any of `parts`; nothing at all of none.
pub fn any_of(parts: impl IntoIterator<Item = Expr>) -> Expr {
    let mut parts: Vec<Expr> = parts.into_iter().collect();
    match parts.len() {
        0 => not(Expr::All),
        1 => parts.remove(0),
        _ => Expr::Or(parts.into()),
    }
}

pub fn not(expr: Expr) -> Expr {
    Expr::Not(Arc::new(expr))
}

/// What lives in one namespace.
pub fn in_namespace(name: &str) -> Expr {
    Expr::Equal(NAMESPACE.into(), name.into())
}

/// What lives in some namespace.
pub fn has_namespace() -> Expr {
    Expr::Has(NAMESPACE.into())
}

/// Pods, and no network sets.
pub fn pods() -> Expr {
    Expr::Equal(ORCHESTRATOR.into(), KUBERNETES.into())
}

/// Pods of these service accounts, by name.
pub fn service_accounts<'a>(names: impl IntoIterator<Item = &'a str>) -> Expr {
    let mut names: Vec<Arc<str>> = names.into_iter().map(Arc::from).collect();
    names.sort();
    names.dedup();
    Expr::In(SERVICE_ACCOUNT.into(), names.into())
}

/// A `namespaceSelector`: what lives in the namespaces that `selector` selects. `all()` in it means whatever has a
/// namespace, `global()` whatever has none.
pub fn in_namespaces(selector: &Expr) -> Expr {
    prefixed(selector, NAMESPACE_PREFIX, &|expr| match expr {
        Expr::All => has_namespace(),
        Expr::Global => not(has_namespace()),
        other => other.clone(),
    })
}

/// The `namespaceSelector` of the subject of a policy. Subjects are pods, so `global()` matches each of them, as in any plain selector.
pub fn subject_in_namespaces(selector: &Expr) -> Expr {
    prefixed(selector, NAMESPACE_PREFIX, &|_| has_namespace())
}

/// A `serviceAccountSelector`: pods whose account `selector` selects.
pub fn with_service_account(selector: &Expr) -> Expr {
    prefixed(selector, SERVICE_ACCOUNT_PREFIX, &|expr| expr.clone())
}

fn prefixed(expr: &Expr, prefix: &str, constant: &dyn Fn(&Expr) -> Expr) -> Expr {
    map_keys(expr, &|key| format!("{prefix}{key}").into(), constant)
}

fn map_keys(expr: &Expr, key: &dyn Fn(&str) -> Arc<str>, constant: &dyn Fn(&Expr) -> Expr) -> Expr {
    let all = |parts: &Arc<[Expr]>| parts.iter().map(|part| map_keys(part, key, constant)).collect();
    match expr {
        Expr::All | Expr::Global => constant(expr),
        Expr::Has(k) => Expr::Has(key(k)),
        Expr::Equal(k, value) => Expr::Equal(key(k), value.clone()),
        Expr::NotEqual(k, value) => Expr::NotEqual(key(k), value.clone()),
        Expr::Contains(k, value) => Expr::Contains(key(k), value.clone()),
        Expr::StartsWith(k, value) => Expr::StartsWith(key(k), value.clone()),
        Expr::EndsWith(k, value) => Expr::EndsWith(key(k), value.clone()),
        Expr::In(k, values) => Expr::In(key(k), values.clone()),
        Expr::NotIn(k, values) => Expr::NotIn(key(k), values.clone()),
        Expr::Not(inner) => not(map_keys(inner, key, constant)),
        Expr::And(parts) => Expr::And(all(parts)),
        Expr::Or(parts) => Expr::Or(all(parts)),
    }
}

/// A Kubernetes `LabelSelector` (apimachinery's meaning): all of its parts; empty selects everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LabelSelector {
    pub match_labels: Vec<(Arc<str>, Arc<str>)>,
    pub match_expressions: Vec<Requirement>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    pub key: Arc<str>,
    pub operator: Operator,
    pub values: Vec<Arc<str>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    In,
    /// True where the key is absent.
    NotIn,
    Exists,
    DoesNotExist,
}

impl LabelSelector {
    /// Over its labels: `all()` when empty.
    pub fn to_expr(&self) -> Expr {
        self.over(&Arc::clone)
    }

    /// Over the effective labels of pods. It sees the pod's own labels and no others.
    fn over_pods(&self) -> Expr {
        self.over(&|key| match own_key(key) {
            Cow::Borrowed(_) => key.clone(),
            Cow::Owned(key) => key.into(),
        })
    }

    /// Over the labels of namespaces, as [`in_namespaces`] takes it.
    fn over_namespaces(&self) -> Expr {
        self.over(&|key| if &**key == NAME { OWN_NAME.into() } else { key.clone() })
    }

    fn over(&self, key_of: &dyn Fn(&Arc<str>) -> Arc<str>) -> Expr {
        let labels = self.match_labels.iter().map(|(key, value)| Expr::Equal(key_of(key), value.clone()));
        let expressions = self.match_expressions.iter().map(|Requirement { key, operator, values }| {
            let key = key_of(key);
            let set = || -> Arc<[Arc<str>]> {
                let mut values = values.clone();
                values.sort();
                values.dedup();
                values.into()
            };
            match operator {
                Operator::In => Expr::In(key, set()),
                Operator::NotIn => Expr::NotIn(key, set()),
                Operator::Exists => Expr::Has(key),
                Operator::DoesNotExist => not(Expr::Has(key)),
            }
        });
        all_of(labels.chain(expressions))
    }
}

/// Where the pods of a Kubernetes peer or subject live.
#[derive(Debug, Clone, Copy)]
pub enum Namespaces<'a> {
    Named(&'a str),
    Selected(&'a LabelSelector),
    /// Every namespace.
    Any,
}

/// The pods that `selector` selects in `namespaces`, and no network sets: peers and subjects of Kubernetes'
/// NetworkPolicy and ClusterNetworkPolicy.
pub fn kubernetes_pods(namespaces: Namespaces<'_>, selector: Option<&LabelSelector>) -> Expr {
    let namespace = match namespaces {
        Namespaces::Named(name) => in_namespace(name),
        Namespaces::Selected(selector) => in_namespaces(&selector.over_namespaces()),
        Namespaces::Any => Expr::All,
    };
    all_of([pods(), namespace, selector.map_or(Expr::All, LabelSelector::over_pods)])
}
