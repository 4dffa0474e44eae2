//! Pod templates: where an object has one, and what becomes of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_policy::inventory::{Labels, Stopped};

use crate::document::Node;
use crate::kubernetes::PodSpec;

/// One kind of pod that a workload makes.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    /// What distinguishes it from the other templates of its object.
    pub part: Option<String>,
    /// The labels of its pods, as far as they are known before they run.
    pub labels: Labels,
    /// Those of them that the controller sets, by which its pods are recognised.
    pub identity: Labels,
    /// Keys of labels that the controller sets when the pods run.
    pub run_time_labels: BTreeSet<Arc<str>>,
    /// Those of them that it sets on every pod.
    pub certain_labels: BTreeSet<Arc<str>>,
    /// Its pods get ports that are not known before they run.
    pub run_time_ports: bool,
    pub spec: PodSpec,
    pub stopped: Option<Stopped>,
}

/// A template as it is found in an object.
pub(super) struct Found<'n> {
    pub part: Option<String>,
    pub node: Node<'n>,
    pub path: String,
    /// The node is the pod's spec, without metadata around it.
    pub bare: bool,
    /// What the workload gives to all its pods, and a template may replace.
    pub inherited: Labels,
    pub identity: Labels,
    pub run_time_labels: BTreeSet<Arc<str>>,
    pub certain_labels: BTreeSet<Arc<str>>,
    pub run_time_ports: bool,
    pub stopped: Option<Stopped>,
    /// Ports that the controller adds where no container has one of this name.
    pub ports: Vec<(Option<&'static str>, u16)>,
}
