//! Rule expressions and their encoding (`linux/netfilter/nf_tables.h`).

use super::netlink::Attributes;

/// A register of 16 bytes; the 4-byte registers of a concatenation start at [`R32`].
pub const R1: u32 = 1;
/// The first 4-byte register: `R32 + n` is the n-th.
pub const R32: u32 = 8;
const VERDICT_REGISTER: u32 = 0;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Original = 0,
    Reply = 1,
}

/// Keys of connection tracking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ct {
    State = 0,
    Direction = 1,
    Status = 2,
    Mark = 3,
    Protocol = 10,
    ProtoSource = 11,
    ProtoDestination = 12,
    SourceV4 = 19,
    SourceV6 = 21,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meta {
    Mark = 3,
    InputInterfaceName = 6,
    NetfilterProtocol = 15,
    TransportProtocol = 16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    Equal = 0,
    NotEqual = 1,
    AtMost = 3,
    AtLeast = 5,
}

/// A set in a lookup: by name, or by number in the batch that creates it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetName {
    Named(String),
    /// An anonymous set: the index in [`super::render::Rule::anonymous`].
    Anonymous(usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expression {
    LoadMeta {
        key: Meta,
        register: u32,
    },
    SetMeta {
        key: Meta,
        register: u32,
    },
    LoadCt {
        key: Ct,
        direction: Option<Direction>,
        register: u32,
    },
    SetCtMark {
        register: u32,
    },
    LoadPayload {
        base: u32,
        offset: u32,
        length: u32,
        register: u32,
    },
    Bitwise {
        register: u32,
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    Compare {
        register: u32,
        operator: Compare,
        value: Vec<u8>,
    },
    Lookup {
        set: SetName,
        register: u32,
        invert: bool,
    },
    VerdictMap {
        map: String,
        register: u32,
    },
    /// The interface of the route to the source; 0 if it is not the one of the packet.
    FibSourceInterface {
        register: u32,
    },
    /// Adds the value of the register to a named set.
    AddToSet {
        set: String,
        register: u32,
    },
    Counter,
    /// Matches packets over a rate per second, with a burst of one second.
    Over {
        per_second: u32,
    },
    /// Copies the packet, or its first `bytes`, to the listener of the group.
    Log {
        group: u16,
        bytes: Option<u32>,
    },
    TcpReset,
    Verdict(Verdict),
}

impl Expression {
    pub fn encode(&self, anonymous: &dyn Fn(usize) -> (String, u32)) -> Attributes {
        let new = Attributes::default;
        let (name, data) = match self {
            Self::LoadMeta { key, register } => ("meta", new().u32(1, *register).u32(2, *key as u32)),
            Self::SetMeta { key, register } => ("meta", new().u32(2, *key as u32).u32(3, *register)),
            Self::LoadCt { key, direction, register } => {
                let data = new().u32(1, *register).u32(2, *key as u32);
                ("ct", direction.iter().fold(data, |data, direction| data.u8(3, *direction as u8)))
            }
            Self::SetCtMark { register } => ("ct", new().u32(2, Ct::Mark as u32).u32(4, *register)),
            Self::LoadPayload { base, offset, length, register } => {
                ("payload", new().u32(1, *register).u32(2, *base).u32(3, *offset).u32(4, *length))
            }
            Self::Bitwise { register, mask, xor } => {
                let length = u32::try_from(mask.len()).unwrap_or_default();
                let data = new().u32(1, *register).u32(2, *register).u32(3, length);
                ("bitwise", data.nest(4, &value(mask)).nest(5, &value(xor)))
            }
            Self::Compare { register, operator, value: bytes } => {
                ("cmp", new().u32(1, *register).u32(2, *operator as u32).nest(3, &value(bytes)))
            }
            Self::Lookup { set, register, invert } => {
                let data = match set {
                    SetName::Named(name) => new().text(1, name).u32(2, *register),
                    SetName::Anonymous(index) => {
                        let (name, id) = anonymous(*index);
                        new().text(1, &name).u32(2, *register).u32(4, id)
                    }
                };
                ("lookup", if *invert { data.u32(5, 1) } else { data })
            }
            Self::VerdictMap { map, register } => {
                ("lookup", new().text(1, map).u32(2, *register).u32(3, VERDICT_REGISTER))
            }
            Self::FibSourceInterface { register } => {
                const RESULT_INTERFACE: u32 = 1;
                const SOURCE_AND_INPUT: u32 = 1 | 8;
                ("fib", new().u32(1, *register).u32(2, RESULT_INTERFACE).u32(3, SOURCE_AND_INPUT))
            }
            Self::AddToSet { set, register } => {
                const ADD: u32 = 0;
                ("dynset", new().text(1, set).u32(3, ADD).u32(4, *register))
            }
            Self::Counter => ("counter", new()),
            Self::Over { per_second } => {
                const SECOND: u64 = 1;
                const PACKETS: u32 = 0;
                const INVERTED: u32 = 1;
                let rate = new().u64(1, u64::from(*per_second)).u64(2, SECOND);
                ("limit", rate.u32(3, *per_second).u32(4, PACKETS).u32(5, INVERTED))
            }
            Self::Log { group, bytes } => {
                ("log", bytes.iter().fold(new().u16(1, *group), |data, bytes| data.u32(3, *bytes)))
            }
            Self::TcpReset => ("reject", new().u32(1, 1)),
            Self::Verdict(verdict) => ("immediate", new().u32(1, VERDICT_REGISTER).nest(2, &verdict_data(verdict))),
        };
        Attributes::default().text(1, name).nest(2, &data)
    }
}

/// `NFTA_DATA_VALUE`.
pub fn value(bytes: &[u8]) -> Attributes {
    Attributes::default().bytes(1, bytes)
}

/// `NFTA_DATA_VERDICT`.
pub fn verdict_data(verdict: &Verdict) -> Attributes {
    let (code, chain): (i32, Option<&str>) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    let inner = Attributes::default().bytes(1, &code.to_be_bytes());
    let inner = chain.iter().fold(inner, |inner, chain| inner.text(2, chain));
    Attributes::default().nest(2, &inner)
}
