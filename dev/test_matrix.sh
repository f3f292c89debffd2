#!/bin/sh
# The tests on the corners of what is supported, each in an environment of its own below .matrix/ (some 6 GiB each):
#   make test-matrix
#   MATRIX="3.13/5.24.*/newest" TESTS="tests/test_generation.py" make test-matrix     (Python/transformers/torch)
set -u
cd "$(dirname "$0")/.." || exit 2
tests=${TESTS:-tests/test_generation.py tests/test_modeling.py tests/test_positions.py tests/test_rollout.py
    tests/test_tokens.py tests/test_attention.py tests/test_tower.py tests/test_backbones.py tests/test_adapters.py
    tests/test_custom_generate.py tests/test_pipeline.py tests/test_training.py tests/test_planning.py}
failed=""
for corner in ${MATRIX:-3.11/5.17.*/2.11.* 3.12/newest/newest 3.13/5.17.*/newest 3.13/newest/newest}; do
    python=${corner%%/*} rest=${corner#*/}
    set -- ".[dev]"
    [ "${rest%%/*}" = newest ] || set -- "$@" "transformers==${rest%%/*}"
    [ "${rest#*/}" = newest ] || set -- "$@" "torch==${rest#*/}"
    folder=.matrix/$(echo "$corner" | tr -d '*' | tr / -)
    grep -vE '^(torch|torchvision|transformers|tokenizers|huggingface|hf|triton|nvidia|cuda)' constraints.txt >constraints.matrix
    "python$python" -m venv "$folder" &&
        "$folder/bin/pip" install --quiet --disable-pip-version-check --upgrade --constraint constraints.matrix \
            --editable "$@" &&
        OMP_NUM_THREADS=1 "$folder/bin/pytest" -q $tests || failed="$failed $corner"
    rm -f constraints.matrix
    echo "$corner: $("$folder/bin/pip" list 2>/dev/null | grep -E '^(torch|transformers) ' | tr -s ' ' | tr '\n' ' ')"
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
