# The image hanse-agent. Build it at the root of the repository: docker build --file deploy/images/agent.Dockerfile .
# For a release, give both images with their digests: --build-arg BUILD=…@sha256:… --build-arg RUNTIME=…@sha256:…
ARG BUILD=docker.io/library/rust:1.95-trixie
ARG RUNTIME=gcr.io/distroless/cc-debian13

FROM ${BUILD} AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release --bins -p hanse-agent

FROM ${RUNTIME}
# Only root has an added capability of its pod: the chart adds NET_ADMIN, and drops all others.
COPY --from=build /src/target/release/hanse-agent /usr/local/bin/hanse-agent
USER 0:0
ENTRYPOINT ["/usr/local/bin/hanse-agent"]
