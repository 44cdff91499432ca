# syntax=docker/dockerfile:1
# Tandem for CPUs: one binary on the C library it was built with.
#
#   docker build --tag tandem:latest .
#   docker run --read-only --volume /path/to/models:/models:ro --publish 8000:8000 tandem:latest serve /models/model.gguf
#
# The same binary is in the image of Dockerfile.cuda, beside NVIDIA's libraries.

ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --package tandem-server --bin tandem \
    && install -D --strip target/release/tandem /out/tandem

FROM debian:bookworm-slim
COPY --from=build /out/tandem /usr/local/bin/tandem
# Fails here and not in a pod if a library is missing.
RUN ["/usr/local/bin/tandem", "--version"]

# Nobody in particular, as in the manifests. Nothing is written outside of mounted volumes, so the root can be read-only.
USER 65532:65532
WORKDIR /
# HTTP, metrics, and the first two ports of a group.
EXPOSE 8000 9090 7400 7401
ENTRYPOINT ["/usr/local/bin/tandem"]
CMD ["--help"]
