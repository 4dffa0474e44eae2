//! `hanse policy explain`, offline and live: the format of questions, the packets that they describe, and the format of
//! answers.

pub mod answer;
mod explainer;
mod explanation;
pub mod question;

pub use answer::AnswerLine;
pub use explainer::{Explained, Explainer};
pub use explanation::Explanation;
pub use question::{
    Forwarded, Owners, Packet, ProtocolName, QueryEnd, Question, QuestionError, has_ports, protocol_name,
};
