# The image hanse-member. Build it at the root of the repository: docker build --file deploy/images/member.Dockerfile .
# For a release, give both images with their digests: --build-arg BUILD=…@sha256:… --build-arg RUNTIME=…@sha256:…
ARG BUILD=docker.io/library/rust:1.95-trixie
ARG RUNTIME=gcr.io/distroless/cc-debian13

FROM ${BUILD} AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release --bins -p hanse-member

FROM ${RUNTIME}
COPY --from=build /src/target/release/hanse-member /usr/local/bin/hanse-member
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/hanse-member"]
