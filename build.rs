//! Compiles `proto/` with protox, which needs no `protoc`, and generates the decoding limit of each message.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorSet};

const FILES: &[&str] = &[
    "proto/hanse/agent/v1/agent.proto",
    "proto/hanse/federation/v1/administration.proto",
    "proto/hanse/federation/v1/exchange.proto",
    "proto/hanse/federation/v1/question.proto",
    "proto/hanse/federation/v1/registration.proto",
    "proto/hanse/report/v1/report.proto",
];

/// What decoding a message may allocate, in MiB. Of what a service is sent: an answer of 4 MiB may name 10,000 pods with eight labels
/// each, which take 45 MiB.
const OF_REQUESTS: usize = 64;
/// What a service answers comes from who is trusted more: it only must not end the process. The largest is a change of an
/// interest that adds and removes 7 MiB of selections of 30 bytes, 250,000 each: 170 MiB.
const OF_RESPONSES: usize = 256;
/// Other requests.
const OTHER: &[(&str, usize)] = &[
    // The opening of a stream: selections of 7 MiB (85 MiB), 16,384 of the member's own and 4,096 origins.
    (".hanse.federation.v1.WatchRequest", 128),
    // 16,384 nodes (17 MiB), 65,536 errors (55 MiB) and as many pods (30 MiB), with their texts of 4 MiB.
    (".hanse.federation.v1.Realisation", 128),
    // 1,000 objects and 1,000 pods with a text of 512 bytes each; 2,000 flows.
    (".hanse.agent.v1.AgentToMember", 4),
    (".hanse.agent.v1.Flows", 4),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    let bounds = bounds(&descriptors);
    tonic_prost_build::configure().bytes(".").codec_path("crate::bounded::Codec").compile_fds(descriptors)?;
    std::fs::write(Path::new(&std::env::var("OUT_DIR")?).join("bounded.rs"), bounds)?;
    Ok(())
}

/// `Bounded` of each message.
fn bounds(descriptors: &FileDescriptorSet) -> String {
    let methods = descriptors.file.iter().flat_map(|file| &file.service).flat_map(|service| &service.method);
    let answers: BTreeSet<&str> = methods.map(|method| method.output_type()).collect();
    let mut text = String::new();
    for file in &descriptors.file {
        for message in &file.message_type {
            let name = format!(".{}.{}", file.package(), message.name());
            let other = OTHER.iter().find(|(of, _)| *of == name).map(|(_, most)| *most);
            let most = other.unwrap_or(if answers.contains(&*name) { OF_RESPONSES } else { OF_REQUESTS });
            let path = path(&name);
            writeln!(
                text,
                "impl bounded::Bounded for {path} {{\n    \
                     const SHAPE: &'static bounded::Shape = &bounded::Shape {{ size: size_of::<Self>(), fields: &[{}] }};\n    \
                     const MAX_DECODED_BYTES: usize = {most} << 20;\n}}",
                fields(message)
            )
            .expect("a string takes everything");
        }
    }
    text
}

fn fields(message: &DescriptorProto) -> String {
    let field = |it: &FieldDescriptorProto| {
        let repeated = it.label() == Label::Repeated;
        let kind = match (it.r#type(), repeated) {
            (Type::String | Type::Bytes, false) => "Text".to_owned(),
            (Type::String | Type::Bytes, true) => "Texts".to_owned(),
            (Type::Message, _) => {
                let entry =
                    message.nested_type.iter().find(|nested| it.type_name().ends_with(&format!(".{}", nested.name())));
                let shape = match entry {
                    // Of a map: two texts, and what a table of them takes besides.
                    Some(entry) => format!("&bounded::Shape {{ size: 64, fields: &[{}] }}", fields(entry)),
                    None => format!("<{} as bounded::Bounded>::SHAPE", path(it.type_name())),
                };
                format!("{}({shape})", if repeated { "Messages" } else { "Message" })
            }
            (_, true) => "Numbers".to_owned(),
            (_, false) => return None,
        };
        Some(format!("({}, bounded::Field::{kind})", it.number()))
    };
    message.field.iter().filter_map(field).collect::<Vec<_>>().join(", ")
}

/// Where the type of `.hanse.package.v1.Name` is.
fn path(name: &str) -> String {
    name.trim_start_matches(".hanse.").replace('.', "::")
}
