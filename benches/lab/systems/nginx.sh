#!/usr/bin/env bash
# nginx as a plain HTTP load balancer at its fastest (unbuffered answers, upstream keep-alive).
# TLS=1 terminates TLS with the certificate in LAB_TLS
set -euo pipefail
d=${RUNDIR:-$(mktemp -d)}; mkdir -p "$d"/{body,proxy,f,u,s}
{ cat <<CFG
daemon off; user root; worker_processes ${WORKERS:-auto};
pid $d/nginx.pid; error_log $d/error.log error;
events { worker_connections 16384; }
http {
  access_log off; client_body_temp_path $d/body; proxy_temp_path $d/proxy; fastcgi_temp_path $d/f; uwsgi_temp_path $d/u; scgi_temp_path $d/s;
  client_max_body_size 0; tcp_nodelay on; keepalive_requests 100000000;
  upstream be { zone be 256k; least_conn;
CFG
IFS=,; for b in $BACKENDS; do echo "    server $b;"; done
cat <<CFG
    keepalive 1024; keepalive_requests 100000000; }
  server { listen 127.0.0.1:$LISTEN_PORT backlog=4096 ${TLS:+ssl};
    ${TLS:+ssl_certificate $LAB_TLS/cert.pem; ssl_certificate_key $LAB_TLS/key.pem;}
    location / { proxy_pass http://be; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; proxy_request_buffering off; } }
}
CFG
} > "$d/nginx.conf"
exec nginx -p "$d" -e "$d/error.log" -c "$d/nginx.conf"
