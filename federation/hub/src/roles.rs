//! What users may do. Checked at the API, on the record in the store: a certificate says who, never what.

use serde::{Deserialize, Serialize};

use crate::manifest::{Kind, ObjectId};

/// One role; a user has any number. Every role may view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    Viewer,
    /// Writes policies of these tiers (`*` for every tier).
    Author {
        tiers: Vec<String>,
    },
    /// Lets these clusters in and out (`*` for every cluster).
    Operator {
        clusters: Vec<String>,
    },
    Administrator,
}

/// What a call needs.
#[derive(Debug, Clone, Copy)]
pub enum Need<'a> {
    View,
    /// To let this cluster in or out.
    Operate(&'a str),
    /// To write this object; a policy with the tiers that it was and will be in.
    Write(&'a ObjectId, &'a [&'a str]),
    Administer,
}

/// Whether one of `roles` allows `need`.
pub fn allow(roles: &[Role], need: Need<'_>) -> bool {
    let within = |names: &[String], name: &str| names.iter().any(|n| n == "*" || n == name);
    roles.iter().any(|role| match (role, need) {
        (Role::Administrator, _) | (_, Need::View) => true,
        (Role::Operator { clusters }, Need::Operate(cluster)) => within(clusters, cluster),
        // One role must allow both ends of a move between tiers.
        (Role::Author { tiers: own }, Need::Write(id, tiers)) => match id.kind {
            Kind::FederatedNetworkPolicy => !tiers.is_empty() && tiers.iter().all(|tier| within(own, tier)),
            // A set is used by policies of any tier, so only those who may write all of them may change it.
            Kind::FederatedNetworkSet => own.iter().any(|tier| tier == "*"),
            Kind::MemberCluster | Kind::Tier => false,
        },
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_allows_its_own() {
        let id = |kind| ObjectId { kind, name: "x".into() };
        let policy = id(Kind::FederatedNetworkPolicy);
        let author = [Role::Author { tiers: vec!["a".into(), "b".into()] }];
        let every = [Role::Author { tiers: vec!["*".into()] }];
        let operator = [Role::Operator { clusters: vec!["train".into()] }];
        for (roles, need, allowed) in [
            (&[Role::Viewer][..], Need::View, true),
            (&[], Need::View, false),
            (&[Role::Viewer], Need::Operate("train"), false),
            (&[Role::Viewer], Need::Write(&policy, &["a"]), false),
            (&author, Need::Write(&policy, &["a"]), true),
            (&author, Need::Write(&policy, &["a", "b"]), true),
            (&author, Need::Write(&policy, &["a", "c"]), false),
            (&author, Need::Write(&policy, &[]), false),
            (&author, Need::Write(&id(Kind::Tier), &[]), false),
            (&author, Need::Write(&id(Kind::FederatedNetworkSet), &[]), false),
            (&author, Need::Operate("train"), false),
            (&every, Need::Write(&policy, &["z"]), true),
            (&every, Need::Write(&id(Kind::FederatedNetworkSet), &[]), true),
            (&every, Need::Write(&id(Kind::MemberCluster), &[]), false),
            (&operator, Need::Operate("train"), true),
            (&operator, Need::Operate("serve"), false),
            (&operator, Need::Write(&id(Kind::MemberCluster), &[]), false),
            (&operator, Need::Administer, false),
            (&[Role::Administrator], Need::Administer, true),
        ] {
            assert_eq!(allow(roles, need), allowed, "{roles:?} {need:?}");
        }
    }
}
