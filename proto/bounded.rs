//! A bound on the memory that decoding a message allocates.
//!
//! An empty element of a list takes two bytes on the wire, and a hundred times as much in memory. Before a message is decoded,
//! [`cost`] computes an upper bound of the allocations, without allocating. A message above the limit of its type is refused.
//! [`Codec`] does this for every message of every service.
//!
//! `build.rs` generates the [`Bounded`] implementations from the descriptors.

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::Buf;
use tonic::Status;
use tonic::codec::{BufferSettings, DecodeBuf};
use tonic_prost::{ProstCodec, ProstEncoder};

/// Memory per element of a list, in sizes of an element. A `Vec` of one element has a capacity of four. A growing `Vec` allocates twice
/// its capacity, and keeps the previous buffer until the elements are moved: three sizes per element.
const GROWTH: usize = 4;
/// The overhead of the allocator for one allocation.
const ALLOCATION: usize = 32;
/// The size of a `String` or of `Bytes`, whichever is larger.
const TEXT: usize = 32;
/// The maximum nesting of groups and messages; prost refuses more.
const MAX_DEPTH: usize = 100;

/// A message with a limit for the memory that decoding allocates.
pub trait Bounded: Message + Default {
    const SHAPE: &'static Shape;
    /// The maximum number of bytes that decoding may allocate.
    const MAX_DECODED_BYTES: usize;
}

/// The fields of a message that allocate.
#[derive(Debug)]
pub struct Shape {
    /// The size of the decoded struct, without its allocations.
    pub size: usize,
    /// By field number.
    pub fields: &'static [(u32, Field)],
}

#[derive(Debug, Clone, Copy)]
pub enum Field {
    Text,
    Texts,
    Numbers,
    Message(&'static Shape),
    Messages(&'static Shape),
}

/// Decodes a message if the [`cost`] is within the limit of its type.
///
/// # Errors
/// When the cost exceeds the limit, or the bytes are not such a message.
pub fn decode<T: Bounded>(bytes: impl Buf + AsRef<[u8]>) -> Result<T, Status> {
    let (cost, len) = (cost(T::SHAPE, bytes.as_ref()), bytes.remaining());
    if cost > T::MAX_DECODED_BYTES {
        let most = T::MAX_DECODED_BYTES >> 20;
        return Err(Status::resource_exhausted(format!(
            "a message of {len} bytes that takes more than {most} MiB in memory"
        )));
    }
    T::decode(bytes).map_err(|error| Status::internal(error.to_string()))
}

/// An upper bound of the bytes that decoding allocates. Counts up to the first malformed field, where decoding stops.
pub fn cost(shape: &Shape, bytes: &[u8]) -> usize {
    let mut total = shape.size;
    scan(shape, bytes, MAX_DEPTH, &mut total);
    total
}

fn scan(shape: &Shape, mut bytes: &[u8], depth: usize, total: &mut usize) -> Option<()> {
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let number = u32::try_from(key >> 3).ok()?;
        let field = || shape.fields.iter().find(|(of, _)| *of == number).map(|(_, field)| *field);
        let mut add = |bytes: usize| *total = total.saturating_add(bytes);
        match key & 7 {
            0 => {
                varint(&mut bytes)?;
                if let Some(Field::Numbers) = field() {
                    add(GROWTH * size_of::<u64>());
                }
            }
            1 => bytes = bytes.get(8..)?,
            5 => bytes = bytes.get(4..)?,
            2 => {
                let len = usize::try_from(varint(&mut bytes)?).ok()?;
                // Decoding must not allocate more than the message contains.
                let (value, rest) = bytes.split_at_checked(len)?;
                bytes = rest;
                match field() {
                    None => {}
                    Some(Field::Text) => add(len + ALLOCATION),
                    Some(Field::Texts) => add(GROWTH * TEXT + len + ALLOCATION),
                    // Packed: one number takes at least a byte.
                    Some(Field::Numbers) => add(GROWTH * size_of::<u64>() * len),
                    Some(Field::Message(shape)) => scan(shape, value, depth.checked_sub(1)?, total)?,
                    Some(Field::Messages(shape)) => {
                        add(GROWTH * shape.size);
                        scan(shape, value, depth.checked_sub(1)?, total)?;
                    }
                }
            }
            // Start and end of a group. The fields between them are counted.
            3 | 4 => {}
            _ => return None,
        }
    }
    Some(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The codec of every service: encodes like prost, and decodes [`Bounded`] messages.
#[derive(Debug)]
pub struct Codec<E, D>(PhantomData<fn() -> (E, D)>);

impl<E, D> Default for Codec<E, D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<E, D> tonic::codec::Codec for Codec<E, D>
where
    E: Message + 'static,
    D: Bounded + Send + 'static,
{
    type Encode = E;
    type Decode = D;
    type Encoder = ProstEncoder<E>;
    type Decoder = Decoder<D>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<E, D>::raw_encoder(BufferSettings::default())
    }

    fn decoder(&mut self) -> Self::Decoder {
        Decoder(PhantomData)
    }
}

#[derive(Debug)]
pub struct Decoder<D>(PhantomData<fn() -> D>);

impl<D: Bounded> tonic::codec::Decoder for Decoder<D> {
    type Item = D;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<D>, Status> {
        let len = buffer.remaining();
        // The buffer itself, which is not copied.
        decode(buffer.copy_to_bytes(len)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use prost::bytes::Bytes;

    use super::*;
    use crate::federation::v1 as pb;
    use crate::report::v1::Pod;

    fn cost_of<T: Bounded>(message: &T) -> usize {
        cost(T::SHAPE, &message.encode_to_vec())
    }

    #[test]
    fn cost_counts_memory_and_not_wire_bytes() {
        let nodes = |count| pb::Realisation { nodes: vec![pb::NodePosition::default(); count], ..Default::default() };
        assert_eq!(nodes(1_000).encode_to_vec().len(), 2_000);
        let node = GROWTH * size_of::<pb::NodePosition>();
        assert_eq!(cost_of(&nodes(1_000)) - cost_of(&nodes(0)), 1_000 * node);
        // Messages within them, texts, and lists of texts.
        let pod = Some(Pod { namespace: "x".repeat(100), ..Default::default() });
        let pod = pb::UnenforcedPod { pod, ..Default::default() };
        let with_pods = pb::NodePosition { unenforced: vec![pod; 3], ..Default::default() };
        let pods = 3 * (GROWTH * size_of::<pb::UnenforcedPod>() + 100 + ALLOCATION);
        let with_pods = pb::Realisation { nodes: vec![with_pods], ..Default::default() };
        assert_eq!(cost_of(&with_pods) - cost_of(&nodes(0)), node + pods);
        let texts = pb::Keys { keys: vec!["abc".to_owned(); 2] };
        assert_eq!(cost_of(&texts) - size_of::<pb::Keys>(), 2 * (GROWTH * TEXT + 3 + ALLOCATION));
        // In one field, or in one field each.
        let packed = pb::Frame { upserts: Vec::new(), removals: vec![1; 100] };
        assert_eq!(cost_of(&packed) - size_of::<pb::Frame>(), 100 * GROWTH * 8);
        assert_eq!(cost(pb::Frame::SHAPE, &[16, 1].repeat(100)) - size_of::<pb::Frame>(), 100 * GROWTH * 8);
        let labels = [("k".to_owned(), "v".to_owned())].into();
        let pod = pb::PodInfo { labels, ..Default::default() };
        assert!(cost_of(&pod) - size_of::<pb::PodInfo>() >= GROWTH * 2 * size_of::<String>() + 2);
    }

    #[test]
    fn refuses_expensive_messages_before_decoding() {
        // The tag of `nodes` and a length of 0.
        let empty_nodes = |count: usize| Bytes::from([26, 0].repeat(count));
        let most = pb::Realisation::MAX_DECODED_BYTES / (GROWTH * size_of::<pb::NodePosition>());
        assert!((16_384..200_000).contains(&most), "{most}");
        assert_eq!(decode::<pb::Realisation>(empty_nodes(most - 1)).expect("within").nodes.len(), most - 1);
        let error = decode::<pb::Realisation>(empty_nodes(8 << 20)).expect_err("1.5 GB and more");
        assert_eq!(error.code(), tonic::Code::ResourceExhausted);
        // A defect at the end does not make the rest free.
        let defective = Bytes::from([&[26, 0].repeat(8 << 20)[..], &[0xff]].concat());
        assert_eq!(decode::<pb::Realisation>(defective).expect_err("as well").code(), tonic::Code::ResourceExhausted);
        // Nor do fields in a group, which are skipped, hide what comes after.
        let group = [&[0xfb, 1, 8, 1, 0xfc, 1][..], &[26, 0].repeat(8 << 20)].concat();
        assert_eq!(decode::<pb::Realisation>(&group[..]).expect_err("as well").code(), tonic::Code::ResourceExhausted);
        for defective in [&[26][..], &[26, 5, 0], &[0x80; 11], &[7], &[26, 0xff, 0xff, 0xff, 0xff, 0xff]] {
            assert!(cost(pb::Realisation::SHAPE, defective) < 2_000);
            assert!(decode::<pb::Realisation>(Bytes::copy_from_slice(defective)).is_err(), "{defective:?}");
        }
    }
}
