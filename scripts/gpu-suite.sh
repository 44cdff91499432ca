#!/bin/sh
# Checks and measures a build of Tandem on this machine's NVIDIA GPU: scripts/gpu-suite.sh BINARY OUT [options].
# Needs Python 3.10 and the driver; docs/gpu.md says what else is used where it is there.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu/suite.py" "$@"
