//! Frames: encoded updates and removals of objects, at most [`MAX_FRAME_BYTES`] each.
//!
//! An update is encoded once and is the same bytes in every frame that has it.

use bytes::Bytes;
use hanse_proto::bounded;
use hanse_proto::federation::v1 as pb;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::DecodeError;
use crate::limits::MAX_FRAME_BYTES;

/// A frame's contents. The updates are slices of its bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frame {
    pub upserts: Vec<Bytes>,
    pub removals: Vec<u64>,
}

/// Cuts encoded updates and removals into frames.
pub fn cut(upserts: impl IntoIterator<Item: AsRef<[u8]>>, removals: &[u64]) -> Vec<Bytes> {
    // Written directly, without a copy of the updates in a `pb::Frame`: other streams wait while a snapshot of 300,000 objects is cut.
    // A tag and a length of at most four bytes before each update; at most ten bytes for each removal, and their tag and length.
    let (mut frames, mut frame) = (Vec::new(), Vec::new());
    let mut cut = |frame: &mut Vec<u8>| {
        if !frame.is_empty() {
            frames.push(Bytes::from(std::mem::take(frame)));
        }
    };
    for update in upserts {
        let update = update.as_ref();
        if frame.len() + update.len() + 5 > MAX_FRAME_BYTES {
            cut(&mut frame);
        }
        encode_key(1, WireType::LengthDelimited, &mut frame);
        encode_varint(update.len() as u64, &mut frame);
        frame.extend_from_slice(update);
    }
    let mut removals = removals;
    while !removals.is_empty() {
        let fit = (MAX_FRAME_BYTES.saturating_sub(frame.len() + 8) / 10).min(removals.len());
        let (first, rest) = removals.split_at(fit);
        prost::encoding::uint64::encode_packed(2, first, &mut frame);
        removals = rest;
        if !removals.is_empty() {
            cut(&mut frame);
        }
    }
    cut(&mut frame);
    frames
}

/// Reads a frame.
///
/// # Errors
/// When it exceeds a limit or is not a frame.
pub fn read(bytes: &Bytes) -> Result<Frame, DecodeError> {
    if bytes.len() > MAX_FRAME_BYTES {
        return Err(DecodeError::Malformed(format!("frame: {} bytes, of {MAX_FRAME_BYTES}", bytes.len())));
    }
    let frame: pb::Frame = bounded::decode(bytes.clone())
        .map_err(|status| DecodeError::Malformed(format!("frame: {}", status.message())))?;
    Ok(Frame { upserts: frame.upserts, removals: frame.removals })
}

/// How many objects a frame updates or removes.
pub fn count(bytes: &Bytes) -> usize {
    read(bytes).map_or(0, |frame| frame.upserts.len() + frame.removals.len())
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn frames_are_what_prost_encodes_and_within_the_limit() {
        let updates: Vec<Vec<u8>> = (0..3_000_usize).map(|at| vec![at as u8; at % 1_300]).collect();
        let removals: Vec<u64> = (0..250_000_u64).map(|at| u64::MAX - at).collect();
        for (updates, removals, count) in [
            (&updates[..0], &removals[..0], 0),
            (&updates[..3], &removals[..0], 1),
            (&updates[..0], &removals[..3], 1),
            (&updates[..3], &removals[..3], 1),
            (&updates[..], &removals[..], 5),
        ] {
            let frames = cut(updates, removals);
            assert_eq!(frames.len(), count);
            let mut all = Frame::default();
            for bytes in &frames {
                assert!(bytes.len() <= MAX_FRAME_BYTES, "{}", bytes.len());
                let frame = read(bytes).expect("a frame");
                let encoded = pb::Frame { upserts: frame.upserts.clone(), removals: frame.removals.clone() };
                assert_eq!(encoded.encode_to_vec(), &bytes[..], "as prost encodes it");
                all.upserts.extend(frame.upserts);
                all.removals.extend(frame.removals);
            }
            assert!(all.upserts.iter().eq(updates) && all.removals == removals);
        }
    }
}
