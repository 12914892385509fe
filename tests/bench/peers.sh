#!/usr/bin/env bash
# Make the environments of the peers that the benchmarks compare with: peers.sh FOLDER
set -euo pipefail
python3.11 -m venv "$1/trl"
"$1/trl/bin/pip" install --quiet torch==2.13.0
"$1/trl/bin/pip" install --quiet trl peft
