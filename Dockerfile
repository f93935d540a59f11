# evergate as one static file in an otherwise empty image. Build from the repository's root:
#
#   docker build -t evergate .
#   docker run -p 8080:8080 -v ./config/minimal.toml:/etc/evergate/evergate.toml:ro evergate
#
# Why static glibc and not musl, and what was verified how: docs/docker.md.

FROM rust:1.95.0-bookworm AS build
# The image's own toolchain; rust-toolchain.toml's fmt and clippy are not needed here.
ENV RUSTUP_TOOLCHAIN=1.95.0
WORKDIR /src
COPY . .
# --target, even for the machine itself, keeps crt-static away from build scripts and procedural macros.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    target="$(rustc -vV | sed -n 's/^host: //p')" \
    && RUSTFLAGS="-C target-feature=+crt-static" CARGO_PROFILE_RELEASE_STRIP=debuginfo \
       cargo build --release --locked --target "$target" \
    && install -D "target/$target/release/evergate" /out/evergate \
    && ! readelf --program-headers /out/evergate | grep -q INTERP \
    && mkdir /out/state

FROM scratch
COPY --from=build /out/evergate /evergate
# For what should outlive the container: mount a volume here. Everything else may be read-only.
COPY --from=build --chown=65532:65532 /out/state /var/lib/evergate
USER 65532:65532
EXPOSE 8080 9901
STOPSIGNAL SIGTERM
# Asks the admin address of this container's own evergate; set it if the config moves it off 127.0.0.1:9901.
HEALTHCHECK --interval=5s --timeout=3s --start-period=5s --retries=3 CMD ["/evergate", "status", "--ready"]
ENTRYPOINT ["/evergate"]
CMD ["run", "-c", "/etc/evergate/evergate.toml"]
