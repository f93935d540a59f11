#!/usr/bin/env bash
# setup.sh [engine|clients|node]...   (default: engine clients)
# Idempotent. Into $REALWORLD (default: .realworld in the repository), which it makes: venv/ (engine and Python clients),
# tiny.gguf and mid.gguf, and on request npm/ (Node clients). Uses only pip's and npm's ordinary clients, pinned versions.
set -euo pipefail
[ $# -gt 0 ] || set -- engine clients
here=$(cd "$(dirname "$0")" && pwd)
dir=${REALWORLD:-$here/../../.realworld}; mkdir -p "$dir"; dir=$(cd "$dir" && pwd)
py=${PYTHON:-python3}
pipin() { # VENV package==version...
  local v=$dir/$1; shift
  [ -x "$v/bin/pip" ] || "$py" -m venv "$v"
  local stamp; stamp=$v/.have-$(echo "$*" | sha256sum | cut -c1-16)
  [ -e "$stamp" ] || { nice -n 10 "$v/bin/pip" install -q --disable-pip-version-check "$@" && touch "$stamp"; }
}
model() { # NAME SHA256-PREFIX make_tiny_gguf.py's options
  local f=$dir/$1.gguf sha=$2; shift 2
  [ -s "$f" ] || { "$dir/venv/bin/python" "$here/make_tiny_gguf.py" "$f.new" "$@" && mv "$f.new" "$f"; }
  [ "$(sha256sum < "$f" | cut -c1-12)" = "$sha" ] || { echo "$f: not the expected bytes (sha256 $sha...)" >&2; exit 1; }
}
for what; do case $what in
  engine)
    pipin venv xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
    model tiny 3aad8485bb48
    model mid 21a20d748715 --layers 6 --dim 256 --ff 512 --heads 8 ;;
  clients) pipin venv openai==3.54.0 anthropic==2.12.0 langchain-openai==1.7.3 ;;
  node)
    mkdir -p "$dir/npm"; [ -e "$dir/npm/package.json" ] || echo '{"private":true}' > "$dir/npm/package.json"
    [ -d "$dir/npm/node_modules/openai" ] && [ -d "$dir/npm/node_modules/@anthropic-ai/sdk" ] ||
      (cd "$dir/npm" && npm install --silent --no-fund --no-audit openai@6.49.0 @anthropic-ai/sdk@1.12.0) ;;
  *) echo "unknown part: $what" >&2; exit 2 ;;
esac; done
echo "ready: $dir"
