#!/usr/bin/env bash
# start_engine.sh PORT [engine.py's options]: a real llama.cpp server on 127.0.0.1:PORT, in the foreground.
# REALWORLD: the folder setup.sh filled (default: .realworld in the repository). MODEL: another .gguf. Ready when GET /health answers 200.
set -euo pipefail
: "${1:?usage: start_engine.sh PORT [options]}"
port=$1; shift
here=$(cd "$(dirname "$0")" && pwd)
REALWORLD=${REALWORLD:-$here/../../.realworld}
exec "$REALWORLD/venv/bin/python" "$here/engine.py" --port "$port" --model "${MODEL:-$REALWORLD/tiny.gguf}" "$@"
