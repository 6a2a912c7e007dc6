#!/usr/bin/env bash
# Builds superllama for the NVIDIA card that is here, runs the device tests, and bench.gpu: one Markdown table at the end.
#
#   bench/run_gpu.sh [--quick] [--computed] [--no-tests] [--out FILE] [--vocab FILE] [MODEL.gguf] [-- OPTION...]
#
#   --quick       three minutes: the build of an earlier run as it is, or else the wheels in dist/, or else a build; the
#                 smallest set of tests; two budgets, few tokens
#   --computed    no card: a Vulkan card that Mesa computes on the processor (tests/cards.py), with the build in build/
#                 and a model of 60 MB; to try this script and the bench, its numbers mean nothing
#   --no-tests    the table alone
#   --out FILE    the Markdown goes there too
#   --vocab FILE  GGUF whose vocabulary a random model gets; without, the demo model, which is downloaded once
#   MODEL.gguf    without one, a random mixture of experts of 4 GB is made, with --quick of 1 GB, and kept
#   -- OPTION...  for bench.gpu, such as --shares 40 --turns 5
#
# The build is kept in build-gpu/, beside the one for the processor, and made again where a source is newer. With a warm
# compiler cache all of it takes less than half an hour, most of it the table's 12 rows.
#
# Where no registry can be reached: PIP_NO_INDEX=1, and PIP_FIND_LINKS=FOLDER with wheels of what is not installed. Then
# packages and tools that are there are used, cmake and ninja of PATH too; what the tests need and is missing leaves the
# tests out. llama.cpp's source has to be in the cache folder (docs/install.md), or in vendor/llama.cpp/tree.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    printf 'run_gpu.sh: %s\n' "$*" >&2
    exit 1
}
step() { printf '\n==> %s (%d s)\n' "$*" "$SECONDS" >&2; }

given=("$@")
quick='' computed='' tests=yes out='' vocabulary='' model='' options=()
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=yes ;;
        --computed) computed=yes ;;
        --no-tests) tests='' ;;
        --out | --vocab)
            [ $# -gt 1 ] || fail "$1 names a file"
            if [ "$1" = --out ]; then out=$2; else vocabulary=$2; fi
            shift
            ;;
        --) shift && options=("$@") && break ;;
        -*) fail "there is no option $1: see the first lines of bench/run_gpu.sh; those of bench.gpu come after --" ;;
        *) [ -z "$model" ] || fail "one model at most: $model and $1 were given" && model=$1 ;;
    esac
    shift
done
for file in "$model" "$vocabulary"; do
    [ -z "$file" ] || [ -f "$file" ] || fail "there is no file $file"
done

# ---------------------------------------------------------------- a build

offline() { [ -n "${PIP_NO_INDEX:-}" ]; }
packages_here='import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")'
sees_card() {
    python -c 'import superllama; assert any(d.kind == "gpu" for d in superllama.devices())' 2>/dev/null
}
is_current() { # no source is newer
    [ -f build-gpu/built ] &&
        [ -z "$(find CMakeLists.txt cmake include patches pyproject.toml python src vendor/llama.cpp/UPSTREAM.toml \
            -type f -newer build-gpu/built -not -name '*.pyc' -print -quit)" ]
}

find_card() { # sets card, capability
    command -v nvidia-smi >/dev/null ||
        fail "there is no nvidia-smi, so no NVIDIA driver: this needs a machine with an NVIDIA card; without one," \
            "--computed tries the same on a card that Mesa computes, and 'pytest tests/model/test_device_tier.py' uses" \
            "RPC servers"
    card=$(nvidia-smi --query-gpu=name,memory.total,compute_cap --format=csv,noheader | head -n 1) ||
        fail "nvidia-smi cannot reach a card: ${card:-no output}; is the driver loaded, the device open to this user?"
    capability=${card##*, }
    [[ $capability =~ ^[0-9]+\.[0-9]+$ ]] ||
        fail "nvidia-smi names no compute capability, but '$card'; a newer driver does"
}

find_nvcc() { # sets nvcc
    nvcc=${CUDACXX:-$(command -v nvcc || true)}
    for folder in "${CUDA_HOME:-}" /usr/local/cuda; do
        [ -n "$nvcc" ] || [ ! -x "$folder/bin/nvcc" ] || nvcc=$folder/bin/nvcc
    done
    [ -n "$nvcc" ] ||
        fail "the card is there ($card), but no nvcc: install the CUDA toolkit, or name it with CUDACXX or CUDA_HOME"
    echo '#include <cublas_v2.h>' | "$nvcc" -x cu -E - >/dev/null 2>&1 ||
        fail "$nvcc finds no cublas_v2.h: install cuBLAS of the same toolkit, with its headers (libcublas-dev)"
}

install() { # WHAT...: with the packages of the tests where they can be had; offline, with the tools that are here
    local how=(python -m pip install --quiet)
    if offline; then
        ! python -c 'import scikit_build_core, cffi, platformdirs' 2>/dev/null || how+=(--no-build-isolation)
        "${how[@]}" "$@" gguf
        "${how[@]}" pytest hypothesis psutil || echo "run_gpu.sh: not all that the tests need is here" >&2
    else
        "${how[@]}" "$@" "superllama[test,bench]"
    fi
}

build() {
    find_nvcc
    step "build for $card; $("$nvcc" --version | grep release)"
    command -v ccache >/dev/null || echo 'run_gpu.sh: no ccache: every build compiles all kernels again' >&2
    CUDACXX=$nvcc CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${capability/./}" \
        install -Cbuild-dir=build-gpu .
    touch build-gpu/built
}

prepare() { # a superllama that sees the card, in PATH
    find_card
    if [ ! -x build-gpu/venv/bin/python ]; then
        python3 -m venv build-gpu/venv
        ! offline || python3 -c "$packages_here" >"$(echo build-gpu/venv/lib/python*/site-packages)/here.pth"
    fi
    export PATH=$PWD/build-gpu/venv/bin:$PATH SUPERLLAMA_BUILD=$PWD/build-gpu
    if sees_card && { [ -n "$quick" ] || is_current; }; then
        is_current || echo "run_gpu.sh: the build is older than its sources, and used as it is" >&2
        return
    fi
    local wheels=(dist/superllama-*.whl dist/superllama_cuda-*.whl)
    if [ -n "$quick" ] && [ -f "${wheels[0]}" ] && [ -f "${wheels[1]}" ]; then
        step "wheels: ${wheels[*]}"
        install "${wheels[@]}"
    else
        build
    fi
    sees_card || fail "superllama is installed in build-gpu/venv, but finds no card that it can use: see" \
        "'build-gpu/venv/bin/superllama doctor'"
}

if [ -n "$computed" ]; then
    if [ -z "${LIMITED_GPU_BYTES:-}" ]; then # once more, where it is seen
        exec python tests/cards.py "$0" "${given[@]}"
    fi
    sees_card || fail "the computed card cannot be used; see 'superllama doctor'"
else
    prepare
fi

# ---------------------------------------------------------------- tests, table

made_model() { # SIZE OPTION...: makes it if it is not there, and says where
    local folder=build-gpu size=$1 found
    shift
    [ -z "$computed" ] || folder=build
    local file=$folder/moe-$size.gguf
    if [ ! -f "$file" ]; then
        found=$vocabulary
        [ -n "$found" ] || found=$(python -c 'import superllama; print(superllama.demo_model())') ||
            fail "no demo model, whose vocabulary the bench's model would have: name a GGUF with --vocab, or a model"
        python bench/make_model.py --kind moe --size "$size" --vocab "$found" "$@" "$file.part" >&2
        mv "$file.part" "$file"
    fi
    echo "$file"
}

measure=(python -m bench.gpu)
chosen="gpu or card"
if [ -n "$quick" ]; then
    measure+=(--quick)
    chosen="gpu and test_logits_after_moves"
fi
if [ -n "$computed" ]; then
    [ -n "$model" ] || model=$(made_model 60MB --layers 6 --embd 256 --heads 4 --kv-heads 2 --experts 32 --active 4)
    measure+=(--prompts 16 --tokens 2 --turns 1)
    [ -z "$quick" ] || measure+=(--shares 60)
elif [ -z "$model" ] && [ -n "$quick" ]; then
    model=$(made_model 1GB)
elif [ -z "$model" ]; then
    model=$(made_model 4GB)
fi

said="Tests: left out."
failed=0
if [ -n "$tests" ] && ! python -c 'import pytest, hypothesis' 2>/dev/null; then
    said="Tests: left out, pytest is not installed."
elif [ -n "$tests" ]; then
    step "tests: $chosen"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    python -m pytest tests/model/test_{device_tier,device_memory,expert_banks,sent_ahead}.py -k "$chosen" 2>&1 |
        tee "$log" >&2 || failed=1
    said="Tests (\`pytest -k \"$chosen\"\` of devices): $(tail -n 1 "$log")"
fi

step "table"
{
    "${measure[@]}" --model "$model" "${options[@]}"
    printf '\n%s\n' "$said"
} | tee ${out:+"$out"}
step "done"
exit "$failed"
