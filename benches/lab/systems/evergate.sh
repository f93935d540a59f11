#!/usr/bin/env bash
# evergate with every default on (probes, retries, resume, access log, metrics).
# EVERGATE_BIN: the binary (default: the repository's release build). THREADS: data-plane workers.
# TLS=1 terminates TLS with the certificate in LAB_TLS. RESUME: `mode` of `[pool.resume]`, to compare with. POOL: more
# settings of the pool, comma for a new line: POOL=[pool.retry],replay='"never"'. ACCESS_LOG: a path or "off" (default: a
# file in RUNDIR).
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
bin=${EVERGATE_BIN:-${CARGO_TARGET_DIR:-$root/target}/release/evergate}
d=${RUNDIR:-$(mktemp -d)}
log=${ACCESS_LOG:-$d/access.log}
admin=127.0.0.1:${ADMIN_PORT:-$((LISTEN_PORT + 1000))}
IFS=, read -ra backends <<< "$BACKENDS"
if [ -n "${TLS:-}${RESUME:-}${POOL:-}" ]; then # flags have neither: a file with the same meaning
  { cat <<CFG
workers = ${THREADS:-0}
[[listener]]
address = "127.0.0.1:$LISTEN_PORT"
CFG
    [ -z "${TLS:-}" ] || printf '[listener.tls]\ncertificate = "%s"\nkey = "%s"\n' "$LAB_TLS/cert.pem" "$LAB_TLS/key.pem"
    cat <<CFG
[admin]
address = "$admin"
[telemetry]
access_log = "$log"
[[pool]]
CFG
    printf 'backends = ['; printf '"http://%s", ' "${backends[@]}"; echo ']'
    [ -z "${POOL:-}" ] || tr , '\n' <<< "$POOL"
    [ -z "${RESUME:-}" ] || printf '[pool.resume]\nmode = "%s"\n' "$RESUME"
  } > "$d/evergate.toml"
  exec "$bin" run -c "$d/evergate.toml"
fi
flags=(--listen "127.0.0.1:$LISTEN_PORT" --admin "$admin" --access-log "$log")
[ -z "${THREADS:-}" ] || flags+=(--workers "$THREADS")
for b in "${backends[@]}"; do flags+=(--backend "http://$b"); done
exec "$bin" run "${flags[@]}"
