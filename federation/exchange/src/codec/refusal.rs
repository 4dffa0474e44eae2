//! Why the hub refuses an object.

use hanse_proto::federation::v1 as pb;
use pb::refusal::Reason;

use crate::model::{Limit, Refusal};

pub(super) fn encode(id: u64, refusal: &Refusal) -> pb::Refusal {
    let reason = match refusal {
        Refusal::Malformed(why) => Some(Reason::Malformed(why.clone())),
        Refusal::FeatureUnknown(feature) => Some(Reason::FeatureUnknown(feature.clone())),
        Refusal::NamespaceNotGranted(name) => Some(Reason::NamespaceNotGranted(name.to_string())),
        Refusal::AddressNotGranted(address) => Some(Reason::AddressNotGranted(address.to_string())),
        Refusal::LabelNotGranted(label) => Some(Reason::LabelNotGranted(label.clone())),
        Refusal::AddressTaken(address) => Some(Reason::AddressTaken(address.to_string())),
        Refusal::ReferenceMissing(id) => Some(Reason::ReferenceMissing(*id)),
        Refusal::LimitExceeded(limit) => Some(Reason::LimitExceeded(limit.to_string())),
        Refusal::KindNotPublishable(kind) => Some(Reason::KindNotPublishable(kind.to_string())),
        Refusal::Unknown => None,
    };
    pb::Refusal { id, reason }
}

pub(super) fn decode(pb::Refusal { id, reason }: pb::Refusal) -> (u64, Refusal) {
    let address = |text: &str, of: fn(std::net::IpAddr) -> Refusal| text.parse().map_or(Refusal::Unknown, of);
    let refusal = match reason {
        Some(Reason::Malformed(why)) => Refusal::Malformed(why),
        Some(Reason::FeatureUnknown(feature)) => Refusal::FeatureUnknown(feature),
        Some(Reason::NamespaceNotGranted(name)) => Refusal::NamespaceNotGranted(name.into()),
        Some(Reason::AddressNotGranted(text)) => address(&text, Refusal::AddressNotGranted),
        Some(Reason::LabelNotGranted(label)) => Refusal::LabelNotGranted(label),
        Some(Reason::AddressTaken(text)) => address(&text, Refusal::AddressTaken),
        Some(Reason::ReferenceMissing(id)) => Refusal::ReferenceMissing(id),
        Some(Reason::LimitExceeded(what)) => {
            Limit::ALL.into_iter().find(|it| it.to_string() == what).map_or(Refusal::Unknown, Refusal::LimitExceeded)
        }
        Some(Reason::KindNotPublishable(kind)) => Refusal::KindNotPublishable(kind.into()),
        None => Refusal::Unknown,
    };
    (id, refusal)
}
