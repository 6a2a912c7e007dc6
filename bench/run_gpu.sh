#!/usr/bin/env bash
# Builds superllama with CUDA for the card that is here, runs the device tests and the benchmark of the device tier on it.
#
#   bench/run_gpu.sh [MODEL.gguf]
#
# Without a model it makes a random one of 1 GB. The build is kept in build-gpu/, beside the one for the processor; with
# a warm compiler cache all of it takes less than ten minutes. Prints Markdown.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    printf 'run_gpu.sh: %s\n' "$*" >&2
    exit 1
}
step() { printf '\n==> %s (%d s)\n' "$*" "$SECONDS"; }

[ $# -le 1 ] || fail "one model at most, $# were given"
model=${1:-}
[ -z "$model" ] || [ -f "$model" ] || fail "there is no file $model"

command -v nvidia-smi >/dev/null ||
    fail "there is no nvidia-smi, so no NVIDIA driver: this needs a machine with an NVIDIA card; without one, 'pytest" \
        "tests/model/test_device_tier.py' and 'python -m bench.device_tier' use RPC servers instead"
card=$(nvidia-smi --query-gpu=name,memory.total,compute_cap --format=csv,noheader | head -n 1) ||
    fail "nvidia-smi cannot reach a card: ${card:-no output}; is the driver loaded, and the device open to this user?"
capability=${card##*, }
[[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || fail "nvidia-smi names no compute capability, but '$card'; a newer driver does"

nvcc=${CUDACXX:-$(command -v nvcc || true)}
for folder in "${CUDA_HOME:-}" /usr/local/cuda; do
    [ -n "$nvcc" ] || [ ! -x "$folder/bin/nvcc" ] || nvcc=$folder/bin/nvcc
done
[ -n "$nvcc" ] ||
    fail "the card is there ($card), but no nvcc: install the CUDA toolkit, or name it with CUDACXX or CUDA_HOME"
echo '#include <cublas_v2.h>' | "$nvcc" -x cu -E - >/dev/null 2>&1 ||
    fail "$nvcc finds no cublas_v2.h: install cuBLAS of the same toolkit, with its headers (libcublas-dev)"
command -v ccache >/dev/null || printf 'run_gpu.sh: no ccache: every build compiles all kernels again\n' >&2

step "$card; $("$nvcc" --version | grep release)"
export CUDACXX=$nvcc SUPERLLAMA_BUILD=$PWD/build-gpu
if [ ! -x build-gpu/venv/bin/python ]; then
    python3 -m venv build-gpu/venv
fi
export PATH=$PWD/build-gpu/venv/bin:$PATH
CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${capability/./}" \
    pip install --quiet -Cbuild-dir=build-gpu ".[test,bench]"
python - <<'EOF'
import superllama
gpus = [d for d in superllama.devices() if d.kind == "gpu"]
assert gpus, "the build has CUDA, but finds no card that it can use"
EOF

step "tests"
pytest -q tests/model/test_device_tier.py

step "benchmark"
if [ -z "$model" ]; then
    model=build-gpu/dense-1gb.gguf
    vocabulary=$(python -c "import superllama; print(superllama.demo_model())")
    [ -f "$model" ] || python bench/make_model.py --kind dense --size 1GB --vocab "$vocabulary" "$model"
fi
timeout 180 python -m bench.device_tier --gpu --model "$model" --turns 10 --shares 0.5 1
step "done"
