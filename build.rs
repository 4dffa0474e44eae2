//! Compiles `proto/` with protox, so that nobody needs `protoc`.

const FILES: &[&str] = &[
    "proto/hanse/agent/v1/agent.proto",
    "proto/hanse/federation/v1/administration.proto",
    "proto/hanse/federation/v1/exchange.proto",
    "proto/hanse/federation/v1/question.proto",
    "proto/hanse/federation/v1/registration.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
