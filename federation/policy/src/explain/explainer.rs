//! Answering questions over a whole inventory.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::answer::{AnswerLine, AnswerVerdict, BackendLine, ServiceLine};
use super::explanation::Explanation;
use super::question::{Forwarded, Owners, Packet, QueryEnd, Question, QuestionError};
use crate::evaluate::{Answer, End, Query, Verdict, View, evaluate};
use crate::inventory::Inventory;
use crate::model::{ClusterName, PolicySet};
use crate::placement::{Case, Placement, dependence};
use crate::prepared::Prepared;
use crate::workload::relevant_keys;

/// Answers questions about a set of policies and an inventory.
#[derive(Debug)]
pub struct Explainer<'a> {
    policies: &'a PolicySet,
    inventory: &'a Inventory,
    owners: Owners<'a>,
    enforced: Prepared<'a>,
    /// When something is staged.
    pending: Option<Prepared<'a>>,
    placement: Placement<'a>,
    /// The label keys that policies name.
    keys: BTreeSet<&'a str>,
    reference: bool,
}

/// The answer to a question: one explanation, or one for each address that a pod without one may get, or for each backend of
/// a service.
#[derive(Debug)]
pub struct Explained {
    not_running: Vec<String>,
    of: Of,
}

#[derive(Debug)]
enum Of {
    Packet(Explanation),
    Addresses {
        cases: Vec<Case>,
        explanations: Vec<Explanation>,
    },
    /// More addresses than are tried.
    TooMany(Explanation),
    Service {
        forwarded: Forwarded,
        backends: Vec<Result<Explained, QuestionError>>,
    },
}

impl Explained {
    /// As it is printed.
    pub fn line(&self) -> AnswerLine<'_> {
        let line = match &self.of {
            Of::Packet(explanation) => explanation.line(),
            Of::TooMany(explanation) => AnswerLine {
                verdict: AnswerVerdict::Depends,
                depends_on: Some("the address: rules name more nets than are tried".to_owned()),
                ..explanation.line()
            },
            Of::Addresses { cases, explanations } => {
                let lines: Vec<AnswerLine<'_>> = explanations.iter().map(Explanation::line).collect();
                let depends_on = |verdict: &dyn Fn(&Explanation) -> Verdict| {
                    dependence(cases, &explanations.iter().map(verdict).collect::<Vec<_>>())
                };
                let enforced = depends_on(&|it| it.enforced.verdict);
                let staged = || depends_on(&|it| it.pending.as_ref().unwrap_or(&it.enforced).verdict);
                let depends_on =
                    enforced.or_else(|| staged().map(|text| format!("{text}, when what is staged is committed")));
                let all = AnswerLine::of_all(&lines);
                AnswerLine { depends_on, ..all.unwrap_or_else(|| AnswerLine::joined(None, None)) }
            }
            Of::Service { forwarded, backends } => of_service(forwarded, backends),
        };
        AnswerLine { not_running: self.not_running.clone(), ..line }
    }
}

fn of_service<'e>(forwarded: &Forwarded, backends: &'e [Result<Explained, QuestionError>]) -> AnswerLine<'e> {
    let answers = backends.iter().map(|it| it.as_ref().map(Explained::line).map_err(ToString::to_string));
    let lines: Vec<BackendLine<'e>> = forwarded
        .backends
        .iter()
        .zip(answers)
        .map(|((to, port), answer)| {
            let error = answer.as_ref().err().cloned();
            BackendLine { to: to.clone(), port: *port, answer: answer.ok(), error }
        })
        .collect();
    let answered: Vec<AnswerLine<'e>> = lines.iter().filter_map(|line| line.answer.clone()).collect();
    let mut all = AnswerLine::of_all(&answered).unwrap_or_else(|| AnswerLine::joined(None, None));
    if answered.len() < lines.len() {
        all.verdict = AnswerVerdict::Depends;
    }
    let depends_on = (all.verdict == AnswerVerdict::Depends).then(|| {
        let one = |line: &BackendLine<'_>| {
            let said = line.answer.as_ref().map_or("no answer".to_owned(), |answer| answer.verdict.to_string());
            format!("{}:{} {said}", line.to, line.port)
        };
        let shown: Vec<String> = lines.iter().take(3).map(one).collect();
        let more = match lines.len().saturating_sub(3) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        // One backend says itself what it depends on.
        let own = answered.first().filter(|_| lines.len() == 1).and_then(|answer| answer.depends_on.clone());
        own.unwrap_or_else(|| format!("the backend: {}{more}", shown.join(", ")))
    });
    let service = ServiceLine { name: forwarded.service.clone(), headless: forwarded.headless, backends: lines };
    AnswerLine { depends_on, service: Some(service), ..all }
}

impl<'a> Explainer<'a> {
    pub fn new(policies: &'a PolicySet, inventory: &'a Inventory) -> Self {
        Self {
            policies,
            inventory,
            owners: Owners::new(inventory),
            enforced: Prepared::new(policies, inventory, View::Enforced),
            pending: policies.has_staged().then(|| Prepared::new(policies, inventory, View::Pending)),
            placement: Placement::new(policies, inventory, &[]),
            keys: relevant_keys([policies]),
            reference: false,
        }
    }

    /// Uses the reference evaluator. The answers are the same.
    pub fn by_reference(self, reference: bool) -> Self {
        Self { reference, ..self }
    }

    /// Pods that do not run yet get their addresses in these nets.
    pub fn with_pod_nets(self, nets: &[IpNet]) -> Self {
        Self { placement: Placement::new(self.policies, self.inventory, nets), ..self }
    }

    pub fn has_staged(&self) -> bool {
        self.pending.is_some()
    }

    /// The packet of a question.
    ///
    /// # Errors
    /// When the question names something that does not exist, or does not describe a packet.
    pub fn packet(&self, question: &Question) -> Result<Query, QuestionError> {
        self.owners.packet(question)
    }

    /// # Errors
    /// When the question names something that does not exist, or does not describe a packet.
    pub fn explain(&self, question: &Question) -> Result<Explanation, QuestionError> {
        Ok(self.explain_packet(&self.owners.packet(question)?))
    }

    /// Answers a question that may be about workloads that do not run, or about a service.
    ///
    /// # Errors
    /// When the question names something that does not exist, or does not describe a packet.
    pub fn answer(&self, question: &Question) -> Result<Explained, QuestionError> {
        if let Some(forwarded) = self.owners.forwarded(question)? {
            let of_family = match &question.to {
                QueryEnd::Address { ip } => {
                    ip.parse::<IpAddr>().ok().map(|it| if it.to_canonical().is_ipv4() { 4 } else { 6 })
                }
                _ => None,
            };
            let answer = |(place, port): &(QueryEnd, u16)| {
                let (to, port) = (place.clone(), question.port.map(|_| *port));
                let ip_version = question.ip_version.or(of_family);
                self.answer_place(&Question { to, port, ip_version, ..question.clone() })
            };
            let mut backends: Vec<_> = forwarded.backends.iter().map(answer).collect();
            if !backends.is_empty() && backends.iter().all(Result::is_err) {
                // No backend has an answer, and so the question has none.
                return backends.swap_remove(0);
            }
            let not_running = self.owners.not_running(&question.from, &self.keys).into_iter().collect();
            return Ok(Explained { not_running, of: Of::Service { forwarded, backends } });
        }
        self.answer_place(question)
    }

    fn answer_place(&self, question: &Question) -> Result<Explained, QuestionError> {
        let packet = self.owners.packet_of_spots(question)?;
        let ends = [&question.from, &question.to];
        let not_running = ends.into_iter().filter_map(|place| self.owners.not_running(place, &self.keys)).collect();
        Ok(Explained { not_running, of: self.of_packet(&packet)? })
    }

    fn of_packet(&self, packet: &Packet) -> Result<Of, QuestionError> {
        let (source, destination) = (&packet.source, &packet.destination);
        let query = |case: &Case| packet.query(case.source.clone(), case.destination.clone());
        let cases = self.placement.cases(source, destination, packet.ip_version == 4);
        Ok(match cases {
            Some(cases) if cases.is_empty() => return Err(QuestionError::NoFreeAddress(packet.ip_version)),
            Some(cases) if cases.len() > 1 => {
                let explanations = cases.iter().map(|case| self.explain_packet(&query(case))).collect();
                Of::Addresses { cases, explanations }
            }
            Some(cases) => Of::Packet(self.explain_packet(&query(&cases[0]))),
            None => {
                let some = self.placement.cases_of(source, destination, &Default::default(), packet.ip_version == 4);
                Of::TooMany(self.explain_packet(&query(&some.expect("one case")[0])))
            }
        })
    }

    /// An address as an end of a packet, with the pod that owns it: of several clusters' pods that of `prefer`.
    pub fn end(&self, address: IpAddr, prefer: &ClusterName) -> End {
        self.owners.of(address, prefer)
    }

    pub fn explain_packet(&self, packet: &Query) -> Explanation {
        let form = if self.reference { "reference" } else { "prepared" };
        let pending = self.pending.as_ref().map(|pending| self.evaluate(pending, packet, View::Pending));
        Explanation { enforced: self.evaluate(&self.enforced, packet, View::Enforced), pending, form }
    }

    fn evaluate(&self, prepared: &Prepared<'_>, packet: &Query, view: View) -> Answer {
        match self.reference {
            true => evaluate(self.policies, self.inventory, packet, view),
            false => prepared.evaluate(packet),
        }
    }
}
