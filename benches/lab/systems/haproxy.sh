#!/usr/bin/env bash
# HAProxy as a plain HTTP load balancer at its fastest: default buffers, no replay buffering, connection reuse.
# TLS=1 terminates TLS with the certificate in LAB_TLS
set -euo pipefail
f=${RUNDIR:-$(mktemp -d)}/haproxy.cfg
{ cat <<CFG
global
    maxconn 9800
    ${THREADS:+nbthread $THREADS}
defaults
    mode http
    timeout connect 1s
    timeout client 600s
    timeout server 600s
    option http-no-delay
    http-reuse always
frontend fe
    bind 127.0.0.1:$LISTEN_PORT ${TLS:+ssl crt $LAB_TLS/both.pem alpn http/1.1}
    default_backend be
backend be
    balance ${BALANCE:-leastconn}
    option httpchk GET /health
    default-server check inter 1s pool-max-conn -1
CFG
i=0; IFS=,; for b in $BACKENDS; do i=$((i+1)); echo "    server s$i $b"; done; } > "$f"
exec haproxy -db -f "$f"
