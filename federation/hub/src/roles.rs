//! The roles of users, checked at the API. The certificate identifies the user; the roles are in the store.

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
    /// Approves changes of others in these tiers (`*` for every tier).
    Approver {
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
    /// To approve a change that concerns these tiers.
    Approve(&'a [&'a str]),
    Administer,
}

impl std::fmt::Display for Role {
    /// As `hanse user create --role` takes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Viewer => f.write_str("viewer"),
            Self::Author { tiers } => write!(f, "author={}", tiers.join(",")),
            Self::Approver { tiers } => write!(f, "approver={}", tiers.join(",")),
            Self::Operator { clusters } => write!(f, "operator={}", clusters.join(",")),
            Self::Administrator => f.write_str("administrator"),
        }
    }
}

impl Need<'_> {
    /// The smallest role that allows it; `None` is administrator.
    fn least(&self) -> Option<Role> {
        match self {
            Self::View => Some(Role::Viewer),
            Self::Operate(cluster) => Some(Role::Operator { clusters: vec![(*cluster).to_owned()] }),
            Self::Write(id, tiers) => match id.kind {
                // Without a tier, no author role applies.
                _ if id.kind.is_policy() && tiers.is_empty() => None,
                Kind::FederatedNetworkPolicy | Kind::StagedFederatedNetworkPolicy => {
                    let mut tiers: Vec<String> = tiers.iter().map(|tier| (*tier).to_owned()).collect();
                    tiers.dedup();
                    Some(Role::Author { tiers })
                }
                Kind::FederatedNetworkSet => Some(Role::Author { tiers: vec!["*".to_owned()] }),
                Kind::MemberCluster | Kind::Tier => None,
            },
            // Without a tier, no approver role applies.
            Self::Approve([]) => None,
            Self::Approve(tiers) => {
                Some(Role::Approver { tiers: tiers.iter().map(|tier| (*tier).to_owned()).collect() })
            }
            Self::Administer => None,
        }
    }
}

/// The message of a denial: the role that is needed, and the roles of the caller.
pub fn denial(who: &str, roles: &[Role], need: Need<'_>) -> String {
    /// Maximum length of the roles in a message.
    const MAX_BYTES: usize = 400;
    let clipped = |text: String| match text.char_indices().nth(MAX_BYTES) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    };
    let needed = match need.least() {
        Some(role) => format!("{} or {}", clipped(role.to_string()), Role::Administrator),
        None => Role::Administrator.to_string(),
    };
    let own: Vec<String> = roles.iter().map(ToString::to_string).collect();
    let own = if own.is_empty() { "no role".to_owned() } else { clipped(own.join(", ")) };
    format!("this needs the role {needed}; {who} has {own}")
}

/// Whether one of `roles` allows `need`.
pub fn allow(roles: &[Role], need: Need<'_>) -> bool {
    let within = |names: &[String], name: &str| names.iter().any(|n| n == "*" || n == name);
    roles.iter().any(|role| match (role, need) {
        (Role::Administrator, _) | (_, Need::View) => true,
        (Role::Operator { clusters }, Need::Operate(cluster)) => within(clusters, cluster),
        (Role::Approver { tiers: own }, Need::Approve(tiers)) => {
            !tiers.is_empty() && tiers.iter().all(|tier| within(own, tier))
        }
        // One role must allow both ends of a move between tiers.
        (Role::Author { tiers: own }, Need::Write(id, tiers)) => match id.kind {
            Kind::FederatedNetworkPolicy | Kind::StagedFederatedNetworkPolicy => {
                !tiers.is_empty() && tiers.iter().all(|tier| within(own, tier))
            }
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
    fn denial_names_the_role_that_is_needed() {
        let id = |kind| ObjectId { kind, name: "x".into() };
        let (policy, set, tier) = (id(Kind::FederatedNetworkPolicy), id(Kind::FederatedNetworkSet), id(Kind::Tier));
        for (need, needed) in [
            (Need::Write(&policy, &["b"]), "author=b or administrator"),
            (Need::Write(&policy, &["b", "b"]), "author=b or administrator"),
            (Need::Write(&policy, &["b", "c"]), "author=b,c or administrator"),
            (Need::Write(&policy, &[]), "administrator"),
            (Need::Write(&set, &[]), "author=* or administrator"),
            (Need::Write(&tier, &[]), "administrator"),
            (Need::Operate("train"), "operator=train or administrator"),
            (Need::Administer, "administrator"),
            (Need::Approve(&["b", "c"]), "approver=b,c or administrator"),
            (Need::Approve(&[]), "administrator"),
            (Need::View, "viewer or administrator"),
        ] {
            // The role that is named does allow it.
            if let Some(role) = need.least() {
                assert!(allow(&[role], need), "{needed}");
            }
            let expected = format!("this needs the role {needed}; user/ada has author=a, operator=serve");
            let roles = [Role::Author { tiers: vec!["a".into()] }, Role::Operator { clusters: vec!["serve".into()] }];
            assert_eq!(denial("user/ada", &roles, need), expected);
        }
        let long = denial("user/ada", &[Role::Author { tiers: vec!["x".repeat(9_999)] }], Need::Administer);
        assert!(long.len() < 600, "{long}");
        assert_eq!(
            denial("user/ada", &[], Need::Administer),
            "this needs the role administrator; user/ada has no role"
        );
    }

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
