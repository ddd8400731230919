#!/usr/bin/env bash
# Fill .gpu/ for benchmarks/gpu/run.sh (make gpu), on a machine with a network; it needs no GPU. It gets the commit and,
# for the part "trainer", shards, a tokenizer, and wheels of what main.py imports, except torch and transformers.
#
# PYTHON: where this repository is installed; its versions are used. VERSION: of Python on the GPU machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} VERSION=${VERSION:-3.12}
mkdir -p .gpu/whl
git describe --always --dirty >.gpu/commit

names="antlr4-python3-runtime|backoff|boto3|botocore|brotli|catalogue|coolname|cramjam|gql|graphql-core"
names+="|importlib.metadata|jmespath|lightning-utilities|mosaicml|mosaicml-cli|mosaicml-streaming|omegaconf"
names+="|prompt.toolkit|psutil|py-cpuinfo|python-dateutil|python-snappy|questionary|ruamel.yaml|s3transfer|six"
names+="|torchmetrics|validators|wcwidth|websockets|xxhash|zipp|zstd"
platforms=()
for glibc in 2014 1 _2_17 _2_27 _2_28 _2_31 _2_34; do platforms+=(--platform "manylinux${glibc}_x86_64"); done
# Only some versions of zstd have wheels.
"$PYTHON" -m pip freeze --all 2>/dev/null | grep -iE "^($names)==" | sed 's/^zstd==.*/zstd/' >.gpu/requirements.txt
"$PYTHON" -m pip download -qq --no-deps --only-binary=:all: --python-version "$VERSION" --implementation cp \
    "${platforms[@]}" -d .gpu/whl -r .gpu/requirements.txt

if [ ! -d .gpu/mds/512/val ]; then
    "$PYTHON" -m scripts.quickstart text .gpu
    "$PYTHON" train_tokenizer.py .gpu/text/c4-train.00000-of-00001.json.gz --out .gpu/tokenizer --vocab_size 1000 \
        --overwrite
    for length in 128 512; do
        "$PYTHON" convert_c4.py --out_root ".gpu/mds/$length" --splits train val --source .gpu/text \
            --tokenizer .gpu/tokenizer --max_seq_len "$length" --pack chunk --overwrite
    done
    rm -r .gpu/text
fi
echo "prepared: $(du -sh .gpu | cut -f1) in .gpu; copy this repository with .gpu to the GPU machine and run there:"
echo "    bash benchmarks/gpu/run.sh"
