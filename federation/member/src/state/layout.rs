//! Which Secret contains which file.
//!
//! `NAME` contains the files of the member itself and the tokens of nodes, `NAME-nodes-0` to `NAME-nodes-f` the records of nodes, by the
//! first digit of the hash of the node's name, and `NAME-kept` the objects that are kept although their kind was deleted. An API server
//! accepts a Secret of at most 1 MiB. The record of a node takes some 0.3 KB at first, and 1.6 KB with all of its former keys: the 16
//! Secrets have room for some 10,000 nodes.

use std::fmt;

/// The number of Secrets with records of nodes.
pub const NODE_SECRETS: usize = 16;
/// The largest sum of the values of a Secret that API servers accept, in bytes.
pub const MAX_SECRET_BYTES: usize = 1 << 20;
/// The certificate of the ClusterSet's root, which is not secret.
pub const ROOT: &str = "root.pem";
const NODES: &str = "nodes";
/// The folders that are in the first Secret, or in that of kept objects, and the beginnings of their keys there.
const TOKENS: (&str, &str) = ("node-tokens", "node-token.");
const KEPT: &str = "source";

/// The namespace and name of the first Secret of a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretName {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl SecretName {
    /// The names of all Secrets. The first one is last: it is initialised last.
    pub fn secrets(&self) -> Vec<String> {
        let of_nodes = (0..NODE_SECRETS).map(|digit| format!("{}-nodes-{digit:x}", self.name));
        of_nodes.chain([format!("{}-kept", self.name), self.name.clone()]).collect()
    }

    /// The Secret and the key of a file.
    pub fn place(&self, file: &str) -> (String, String) {
        match file.split_once('/') {
            Some((NODES, record)) => {
                let digit = record.chars().next().filter(char::is_ascii_hexdigit).unwrap_or('0');
                (format!("{}-nodes-{}", self.name, digit.to_ascii_lowercase()), record.to_owned())
            }
            Some((folder, token)) if folder == TOKENS.0 => (self.name.clone(), format!("{}{token}", TOKENS.1)),
            Some((KEPT, file)) => (format!("{}-kept", self.name), file.to_owned()),
            _ => (self.name.clone(), file.replace('/', ".")),
        }
    }

    /// The Secrets that contain the files of a folder, and the beginning of the keys of these.
    pub fn places(&self, folder: &str) -> (Vec<String>, &'static str) {
        match folder {
            NODES => (self.secrets().into_iter().take(NODE_SECRETS).collect(), ""),
            folder if folder == TOKENS.0 => (vec![self.name.clone()], TOKENS.1),
            _ => (Vec::new(), ""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_in_one_secret_of_the_state() {
        let name = SecretName { namespace: "hanse".to_owned(), name: "m".to_owned() };
        let secrets = name.secrets();
        assert_eq!((secrets.len(), secrets.last()), (NODE_SECRETS + 2, Some(&"m".to_owned())));
        for (file, secret, key) in [
            ("member.pem", "m", "member.pem"),
            ("node-tokens/0a.json", "m", "node-token.0a.json"),
            ("nodes/0a.json", "m-nodes-0", "0a.json"),
            ("nodes/fa.json", "m-nodes-f", "fa.json"),
            ("source/forget.json", "m-kept", "forget.json"),
        ] {
            assert_eq!(name.place(file), (secret.to_owned(), key.to_owned()), "{file}");
            assert!(secrets.contains(&secret.to_owned()), "{file}");
        }
        assert_eq!(name.places("node-tokens"), (vec!["m".to_owned()], "node-token."));
        assert_eq!(name.places("nodes").0.len(), NODE_SECRETS);
    }
}
