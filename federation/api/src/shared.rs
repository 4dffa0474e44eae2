//! Texts and labels that many objects have, each kept once.

use std::collections::HashSet;
use std::sync::Arc;

use hanse_policy::inventory::SharedLabels;

use crate::inventory::{ContainerPort, Pod};
use crate::object::Object;

/// Below this number of values nothing is looked for that is no longer used.
const FEW: usize = 1_024;

/// Values that objects share. Pods of one workload have the same labels, account, owner and ports, and those of a node its name.
#[derive(Debug, Default)]
pub struct Shared {
    texts: HashSet<Arc<str>>,
    labels: HashSet<SharedLabels>,
    ports: HashSet<Arc<[ContainerPort]>>,
    /// The number of values at which unused ones are removed.
    sweep_at: usize,
}

impl Shared {
    /// Replaces values of an object by equal ones of earlier objects.
    pub fn share(&mut self, object: &mut Object) {
        let Object::Pod(pod) = object else { return };
        let Pod { id, controller, labels, service_account, ports, node, .. } = &mut **pod;
        match self.labels.get(labels) {
            Some(known) => labels.clone_from(known),
            None => drop(self.labels.insert(labels.clone())),
        }
        match self.ports.get(ports) {
            Some(known) => ports.clone_from(known),
            None => drop(self.ports.insert(Arc::clone(ports))),
        }
        for text in [&mut id.namespace, controller, node].into_iter().flatten().chain([service_account]) {
            match self.texts.get(text) {
                Some(known) => text.clone_from(known),
                None => drop(self.texts.insert(Arc::clone(text))),
            }
        }
        if self.len() > self.sweep_at.max(FEW) {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.labels.retain(SharedLabels::is_shared);
            self.ports.retain(|ports| Arc::strong_count(ports) > 1);
            // As many again may come before the next look.
            self.sweep_at = 2 * self.len();
        }
    }

    fn len(&self) -> usize {
        self.texts.len() + self.labels.len() + self.ports.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Manifests, read_bytes};

    fn pod(name: &str, app: &str) -> Object {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: a, labels: {{app: {app}}}}}\nspec:\n  nodeName: one\n  \
             containers: [{{name: c, ports: [{{containerPort: 80, name: {app}}}]}}]\n"
        );
        let mut read = Manifests::default();
        read_bytes(&"pod".into(), text.as_bytes(), &mut read);
        read.objects.pop().expect("a pod").object
    }

    #[test]
    fn keeps_equal_values_once_and_drops_unused_ones() {
        let mut shared = Shared::default();
        let mut objects: Vec<Object> = ["a", "b"].into_iter().map(|name| pod(name, "web")).collect();
        objects.iter_mut().for_each(|object| shared.share(object));
        let [Object::Pod(a), Object::Pod(b)] = &objects[..] else { panic!("two pods") };
        assert!(a.labels.is_shared() && std::ptr::eq(&*a.labels, &*b.labels));
        assert!(a.node.as_ref().zip(b.node.as_ref()).is_some_and(|(a, b)| Arc::ptr_eq(a, b)));
        assert!(a.ports.len() == 1 && Arc::ptr_eq(&a.ports, &b.ports));
        for number in 0..10_000 {
            shared.share(&mut pod("c", &format!("app-{number}")));
        }
        assert!(shared.len() <= FEW + 1, "{}", shared.labels.len());
        assert!(shared.labels.contains(&a.labels), "what is used stays");
    }
}
