//! The file of the last rule set, which is used only when its checksum matches.
//!
//! Format: a header line, the BLAKE3 hash of the rest, then the length-delimited messages of a delta from nothing.

use std::io;
use std::path::Path;

use hanse_proto::agent::v1 as wire;
use hanse_protocol::{Assembled, Assembler, encode};
use hanse_ruleset::{Delta, RuleSet};
use hanse_runtime::files::write_atomic;
use prost::Message as _;

const HEADER: &[u8] = b"hanse-ruleset/1\n";

pub fn write(path: &Path, rules: &RuleSet) -> io::Result<()> {
    let mut body = Vec::new();
    for message in encode(&Delta::between(None, rules)) {
        message.encode_length_delimited(&mut body).map_err(io::Error::other)?;
    }
    let bytes = [HEADER, blake3::hash(&body).as_bytes(), &body].concat();
    write_atomic(path, &bytes, 0o600)
}

/// `None` when there is no file, or when it is damaged, which is logged.
pub fn read(path: &Path) -> Option<RuleSet> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "snapshot not read");
            return None;
        }
    };
    let rules = parse(&bytes);
    if rules.is_none() {
        tracing::warn!(path = %path.display(), "snapshot ignored: it is damaged");
    }
    rules
}

fn parse(bytes: &[u8]) -> Option<RuleSet> {
    let (hash, mut body) = bytes.strip_prefix(HEADER)?.split_at_checked(32)?;
    if blake3::hash(body).as_bytes() != hash {
        return None;
    }
    let mut assembler = Assembler::default();
    while !body.is_empty() {
        let message = wire::MemberToAgent::decode_length_delimited(&mut body).ok()?;
        if let Assembled::Delta(delta) = assembler.receive(message).ok()? {
            return RuleSet::default().apply(&delta).ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hanse_ruleset::{Generation, Members, Set, SetId};

    use super::*;

    #[test]
    fn reads_only_files_with_a_valid_checksum() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("snapshot");
        assert_eq!(read(&path), None);
        let id = SetId::of_meaning(&["x"]);
        let members = Members::Addresses((0..30_000u32).map(|n| std::net::Ipv4Addr::from(n).into()).collect());
        let mut rules =
            RuleSet { generation: Generation { term: 3, number: 7 }, hub_revision: 5, ..RuleSet::default() };
        rules.sets.insert(id, Arc::new(Set { id, members }));
        write(&path, &rules).expect("written");
        assert_eq!(read(&path), Some(rules));
        let whole = std::fs::read(&path).expect("read");
        for damage in [0, HEADER.len() + 3, whole.len() / 2, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[damage] ^= 1;
            assert_eq!(parse(&bytes), None, "byte {damage}");
        }
        assert_eq!(parse(&whole[..whole.len() - 1]), None);
    }
}
