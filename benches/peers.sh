#!/bin/sh
# Builds llama.cpp, makes its weight files, and measures it beside Tandem. `benches/peers.sh --help` says how.
exec "${PYTHON:-python3}" "$(dirname "$0")/peers.py" "$@"
