#!/usr/bin/env bash
# Random steps under sanitizers: budgets, evictions, cancellations, failing reads, saved and loaded states, moves over two
# RPC servers; every logit is compared with stock's. Then tests from Python, whose calls could give the library memory
# that is not theirs any more.
#
#   tools/stress.sh [STEPS [asan|tsan]]     10000 of each kind, on dense, MoE, sliding-window and hybrid models
#
# Builds the library and the programs with AddressSanitizer and UndefinedBehaviorSanitizer in build/asan, with
# ThreadSanitizer in build/tsan. Needed: the tests' programs (cmake --build build --target superllama-tests), the package
# with the extras "test" and "llm", built in build (pip install -e), GCC. An hour or two on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${1:-10000}
case ${2:-both} in
    asan | tsan) kinds=("$2") ;;
    both) kinds=(asan tsan) ;;
    *) echo "stress.sh: no such sanitizer: $2; there are asan and tsan" >&2 && exit 2 ;;
esac
models=(llama-dense llama-moe gemma3-dense gpt-oss-moe falcon-h1-dense lfm2-dense qwen3next-moe)
tmp=$(mktemp -d)
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true; rm -rf "$tmp"' EXIT

# registered once for the life of the process: they are no leaks
printf 'leak:%s\n' ggml_backend_rpc_add_server ggml_backend_rpc_buffer_type ibv_get_device_list >"$tmp/known"
export LSAN_OPTIONS=suppressions=$tmp/known:print_suppressions=0

gcc -O1 -shared -fPIC tests/fault_shim.c -o "$tmp/shim.so" -ldl
build/tests/native/make-arch-models -o "$tmp/" >/dev/null 2>&1
# a vocabulary of letters, for answers of which every one has a text of its own
PYTHONPATH=tests python3 -c "import pathlib, sys, tiny_model; tiny_model.write_llama(pathlib.Path(sys.argv[1]))" "$tmp/tiny.gguf"
endpoints=(127.0.0.1:18541 127.0.0.1:18542)

serve() { # PROGRAM: whose kernels are those of the clients, for every logit is compared
    if [ ${#servers[@]} -gt 0 ]; then
        kill "${servers[@]}"
        wait "${servers[@]}" || true # they have the ports until they end
    fi
    servers=()
    for port in 18541 18542; do
        "$1" -H 127.0.0.1 -p $port -t 1 >/dev/null 2>&1 &
        servers+=($!)
    done
    for port in 18541 18542; do
        until (: >/dev/tcp/127.0.0.1/$port) 2>/dev/null; do sleep 0.1; done
    done
}

run() { # LIBRARY PROGRAM MODEL N [ENDPOINT...]
    local library=$1 program=$2 model=$3
    shift 3
    printf '%s %s: ' "$(basename "$program")" "$(basename "$model" .gguf)"
    if [ $# -eq 1 ]; then
        LD_PRELOAD="$(gcc -print-file-name=lib"$library".so) $tmp/shim.so" FAULT_PATH=$model "$program" "$model" "$1" 1
    else
        "$program" "$model" "$1" 1 "${@:2}"
    fi
}

# Races that are none: what the C library frees of a thread that has ended, locks with a timeout that are not seen, and
# values of upstream's that are written as they are read.
printf 'race:%s\n' _dl_deallocate_tls superllama::lifecycle::hold common_log_set_verbosity_thold \
    server_queue::terminate >"$tmp/known-races"

python_beside() { # KIND: the package with the library of that kind
    local kind=$1 package=$tmp/$1/superllama
    mkdir -p "$package"
    ln -s "$PWD"/python/superllama/* "$PWD/build/_ffi.abi3.so" "$package/"
    ln -s "$PWD/build/$kind/bin" "$package/lib"
    ln -s "$PWD/build/bin" "$package/bin"
    # not the package that is installed in place, whose finder comes first
    echo 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]' \
        >"$tmp/$kind/sitecustomize.py"
}

from_python() { # KIND TESTS FILE...
    local kind=$1 tests=$2
    shift 2
    # with what throws: the sanitizer looks for it before the package brings it
    LD_PRELOAD="$(gcc -print-file-name=lib"$kind".so) $(gcc -print-file-name=libstdc++.so)" \
        LD_LIBRARY_PATH=$PWD/build/$kind/bin PYTHONPATH=$tmp/$kind \
        ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=suppressions=$tmp/known-races \
        python3 -m pytest -q -p no:xdist -k "$tests" "$@"
}

for kind in "${kinds[@]}"; do
    flags="-fsanitize=address,undefined -fno-sanitize=enum" # upstream compares enums with numbers that they do not have
    [ $kind = asan ] || flags=-fsanitize=thread
    printf '\n==> %s\n' "$flags"
    # OpenMP's runtime is not instrumented: ThreadSanitizer would not see its barriers
    cmake -S . -B build/$kind -G Ninja -DCMAKE_BUILD_TYPE=Release -DSUPERLLAMA_PAGE=OFF -DGGML_OPENMP=OFF \
        "-DCMAKE_C_FLAGS=$flags -g1" "-DCMAKE_CXX_FLAGS=$flags -g1" \
        -DCMAKE_C_FLAGS_RELEASE="-O1 -DNDEBUG" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" >/dev/null
    cmake --build build/$kind --target stress-layers stress-devices stress-engine kv-schedule ggml-rpc-server \
        superllama-engine >/dev/null
    serve build/$kind/bin/ggml-rpc-server
    for model in "${models[@]}"; do
        run $kind build/$kind/tests/native/stress-layers "$tmp/$model.gguf" "$steps"
        run $kind build/$kind/tests/native/stress-devices "$tmp/$model.gguf" "$steps" "${endpoints[@]}"
    done
    for model in llama-dense gemma3-dense falcon-h1-dense; do # cells of a paged cache, with their layers
        build/$kind/tests/native/kv-schedule -m "$tmp/$model.gguf" --spill-dir "$tmp" --rpc ${endpoints[0]} \
            --steps "$((steps / 10))" --page 16 --budget-pages 66 --together 0 --async 1
    done
    build/$kind/tests/native/stress-engine "$tmp/tiny.gguf" "$steps"
    python_beside $kind
    from_python $kind "not fork and not server" tests/unit/test_budgets.py tests/engine/test_lifetime.py tests/engine/test_llm.py
    from_python $kind budgets_change tests/model/test_dynamic_layers.py
done
