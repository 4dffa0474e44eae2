# The image hanse-hub. Build it at the root of the repository: docker build --file deploy/images/hub.Dockerfile .
# For a release, give both images with their digests: --build-arg BUILD=…@sha256:… --build-arg RUNTIME=…@sha256:…
ARG BUILD=docker.io/library/rust:1.95-trixie
ARG RUNTIME=gcr.io/distroless/cc-debian13

FROM ${BUILD} AS build
WORKDIR /src
COPY . .
# The client of etcd is generated with protoc.
RUN apt-get update && apt-get install --yes --no-install-recommends protobuf-compiler
RUN cargo build --locked --release --bins --features hanse-hub/etcd -p hanse-hub -p hanse

FROM ${RUNTIME}
# `hanse` is there for `kubectl exec`: the image has no shell.
COPY --from=build /src/target/release/hanse-hub /usr/local/bin/hanse-hub
COPY --from=build /src/target/release/hanse /usr/local/bin/hanse
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/hanse-hub"]
