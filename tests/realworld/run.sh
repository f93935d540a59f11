#!/usr/bin/env bash
# Sets up what is missing (REALWORLD, default .realworld in the repository) and runs failover.py with the same arguments
# against $EVERGATE_BIN. Ends with `N passed, N failed`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$here/setup.sh" engine clients
exec "${REALWORLD:-$here/../../.realworld}/venv/bin/python" "$here/failover.py" "$@"
