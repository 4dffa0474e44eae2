//! What API servers refuse of Services and of containers' ports, and Hanse reads all the same: an object that is stored
//! somewhere in spite of it stays part of its cluster. `hanse policy check` refuses it.
//!
//! Sources: `ValidateService`, `ValidateServicePort` and `validateContainerPorts` of Kubernetes' core validation. A Service's
//! own name is not looked at: which names are valid depends on the version (KEP-5311).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::field::{Errors, Path};
use crate::kubernetes::{Container, PodSpec, Service, ServicePort, TargetPort, check_protocol};
use crate::names::{is_dns_label, port_name_error};

/// The ports of a pod, or of a pod template.
pub fn check_pod(spec: &PodSpec, path: &Path<'_>, errors: &mut Errors) {
    for (name, containers) in [("containers", &spec.containers), ("initContainers", &spec.init_containers)] {
        let list = path.field(name);
        for (index, container) in containers.iter().enumerate() {
            check_container(container, &list.index(index), errors);
        }
    }
}

fn check_container(container: &Container, path: &Path<'_>, errors: &mut Errors) {
    let ports = path.field("ports");
    let mut names = Names::default();
    for (index, port) in container.ports.iter().enumerate() {
        let path = ports.index(index);
        if port.container_port == 0 {
            errors.add(&path.field("containerPort"), "is missing, or 0, which is not a port (1–65535)");
        }
        check_protocol(port.protocol.as_deref(), &path, errors);
        let Some(name) = port.name.as_ref().filter(|name| !name.is_empty()) else { continue };
        check_port_name(name, &path.field("name"), errors);
        names.add(name, index, &path, &ports, errors);
    }
}

pub fn check_service(service: &Service, errors: &mut Errors) {
    let spec = &service.spec;
    let ports = Path::Root("spec.ports");
    let is_headless = spec.cluster_ip.as_deref() == Some("None");
    if spec.ports.is_empty() && !is_headless && spec.kind.as_deref() != Some("ExternalName") {
        errors.add(&ports, "is missing: only a headless Service or an ExternalName may have no ports");
    }
    let mut names = Names::default();
    let mut numbers: BTreeMap<(u16, &str), usize> = BTreeMap::new();
    for (index, port) in spec.ports.iter().enumerate() {
        let path = ports.index(index);
        match port.name.as_ref().filter(|name| !name.is_empty()) {
            None if spec.ports.len() > 1 => {
                errors.add(&path.field("name"), "is missing: a Service with several ports names each of them");
            }
            None => {}
            Some(name) => {
                if !is_dns_label(name) {
                    let message = format!("\"{name}\" is not a DNS label: at most 63 of a-z 0-9 -, no - at the ends");
                    errors.add(&path.field("name"), message);
                }
                names.add(name, index, &path, &ports, errors);
            }
        }
        check_service_port(port, &path, errors);
        let protocol = port.protocol.as_deref().filter(|protocol| !protocol.is_empty()).unwrap_or("TCP");
        if let Some(first) = numbers.get(&(port.port, protocol)) {
            errors.add(&path, format!("{}/{protocol} is the port of {} too", port.port, ports.index(*first)));
        }
        numbers.entry((port.port, protocol)).or_insert(index);
    }
}

fn check_service_port(port: &ServicePort, path: &Path<'_>, errors: &mut Errors) {
    if port.port == 0 {
        errors.add(&path.field("port"), "is missing, or 0, which is not a port (1–65535)");
    }
    check_protocol(port.protocol.as_deref(), path, errors);
    if let Some(TargetPort::Name(name)) = port.target() {
        check_port_name(name, &path.field("targetPort"), errors);
    }
}

fn check_port_name(name: &str, path: &Path<'_>, errors: &mut Errors) {
    if let Some(wrong) = port_name_error(name) {
        let number = name.parse::<u16>().is_ok_and(|number| number > 0);
        let hint = if number { "; write a number without quotes" } else { "" };
        errors.add(path, format!("\"{name}\" is not a port name: {wrong}{hint}"));
    }
}

/// Names of ports of one list, each with its index.
#[derive(Default)]
struct Names(BTreeMap<Arc<str>, usize>);

impl Names {
    fn add(&mut self, name: &Arc<str>, index: usize, path: &Path<'_>, list: &Path<'_>, errors: &mut Errors) {
        match self.0.get(name) {
            Some(first) => {
                errors.add(&path.field("name"), format!("\"{name}\" is the name of {} too", list.index(*first)))
            }
            None => drop(self.0.insert(Arc::clone(name), index)),
        }
    }
}
