//! Connection marks, over ctnetlink (`linux/netfilter/nfnetlink_conntrack.h`).

use std::io;

use super::netlink::{ACK, Attributes, DUMP, Netlink, attributes};

const SUBSYSTEM: u16 = 1 << 8;
const NEW: u16 = 0;
const GET: u16 = 1;
const TUPLE_ORIGINAL: u16 = 1;
const MARK: u16 = 8;
const ZONE: u16 = 18;
const MARK_MASK: u16 = 21;

/// Clears the bits of `mask` in the mark of every connection whose mark is `stale`.
pub fn clear_marks(netlink: &mut Netlink, mask: u32, stale: impl Fn(u32) -> bool) -> io::Result<()> {
    let dumped = netlink.query(SUBSYSTEM | GET, DUMP, 0, &Attributes::default())?;
    for connection in dumped {
        let parts = attributes(&connection.body);
        let mark = parts.get(&MARK).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let Some(tuple) = parts.get(&TUPLE_ORIGINAL).filter(|_| mark & mask != 0 && stale(mark)) else { continue };
        let mut change = Attributes::default().nest(TUPLE_ORIGINAL, &Attributes(tuple.to_vec()));
        if let Some(zone) = parts.get(&ZONE) {
            change = change.bytes(ZONE, zone);
        }
        change = change.u32(MARK, 0).u32(MARK_MASK, mask);
        match netlink.query(SUBSYSTEM | NEW, ACK, connection.family, &change) {
            Ok(_) => {}
            // It ended in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
