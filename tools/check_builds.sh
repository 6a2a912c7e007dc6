#!/usr/bin/env bash
# Build every documented way and let each answer: tools/check_builds.sh [NAME...]
#
#   sdist     from the source distribution, without network, into a fresh environment
#   portable  -DSUPERLLAMA_PORTABLE=ON
#   nopage    -DSUPERLLAMA_PAGE=OFF
#   vulkan    that backend alone, where glslc is; no device is needed
#   cuda      its interface to ggml, where nvcc is (the rest is an hour, and none of it is touched by patches)
#
# Minutes with a compiler cache, an hour on two cores without. Folders of builds stay in build/check-*.
set -euo pipefail
cd "$(dirname "$0")/.."
names=("$@")
[ $# -gt 0 ] || names=(sdist portable nopage vulkan cuda)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
model=$(python -c 'import superllama; print(superllama.demo_model())')

step() { printf '\n==> %s\n' "$*"; }

build() { # NAME OPTION...
    local folder=build/check-$1
    shift
    cmake -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release "$@" >"$tmp/log" 2>&1 &&
        cmake --build "$folder" --target superllama-package >>"$tmp/log" 2>&1 || { tail -30 "$tmp/log"; return 1; }
}

answers() { # PROGRAM
    "$1" -m "$model" -no-cnv -p "The capital of France is" -n 16 --temp 0 2>/dev/null | tee "$tmp/answer"
    grep -q Paris "$tmp/answer"
}

for name in "${names[@]}"; do
    step "$name"
    case $name in
        sdist)
            # the build requirements are those of this environment: without network, pip can fetch none
            python -m pip install --quiet scikit-build-core cffi platformdirs cmake ninja
            git ls-files -z | xargs -0 cp --parents -t "$tmp" 2>/dev/null || true
            (cd "$tmp" && python -c "from scikit_build_core.build import build_sdist; build_sdist('$tmp')" >/dev/null)
            python -m venv --system-site-packages "$tmp/venv"
            python -c 'import sys; print(*[p for p in sys.path if p.endswith("site-packages")], sep="\n")' \
                >"$(ls -d "$tmp"/venv/lib/python*/site-packages)/these.pth"
            offline=(unshare --net --map-root-user)
            "${offline[@]}" true 2>/dev/null || offline=(env PIP_NO_INDEX=1)
            SUPERLLAMA_CACHE=$tmp/cache "${offline[@]}" "$tmp/venv/bin/python" -m pip install --quiet \
                --no-deps --no-build-isolation --ignore-installed "$tmp"/superllama-*.tar.gz
            answers "$tmp/venv/bin/superllama-completion"
            ;;
        portable)
            build portable -DSUPERLLAMA_PORTABLE=ON
            answers build/check-portable/bin/llama-completion
            ;;
        nopage)
            build nopage -DSUPERLLAMA_PAGE=OFF
            build/check-nopage/bin/llama-server -m "$model" --port 18431 >/dev/null 2>&1 &
            server=$!
            for _ in $(seq 60); do curl -sf http://127.0.0.1:18431/ >"$tmp/line" && break || sleep 1; done
            kill $server
            cat "$tmp/line"
            grep -q "without its page" "$tmp/line"
            ;;
        vulkan)
            if command -v glslc >/dev/null; then tools/wheel.sh vulkan; else echo "glslc is not here: not built"; fi
            ;;
        cuda)
            if command -v nvcc >/dev/null; then
                CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=80-virtual tools/wheel.sh cuda ggml-cuda.cu
            else
                echo "nvcc is not here: not built"
            fi
            ;;
        *)
            echo "check_builds: no such build: $name" >&2
            exit 2
            ;;
    esac
done
