# Build settings. A user sets: GGML_CUDA, GGML_VULKAN, GGML_METAL (and any other option of ggml),
# SUPERLLAMA_PORTABLE, SUPERLLAMA_PAGE. Everything else is fixed here.

option(SUPERLLAMA_PORTABLE "CPU code for every x86-64 or Arm machine, chosen when it starts" OFF)

if (NOT CMAKE_BUILD_TYPE)
    set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

set(BUILD_SHARED_LIBS     ON)
set(LLAMA_BUILD_COMMON    ON)
set(LLAMA_BUILD_TOOLS     ON)
set(LLAMA_BUILD_SERVER    ON)
set(LLAMA_BUILD_TESTS     OFF)
set(LLAMA_BUILD_EXAMPLES  OFF)
set(LLAMA_BUILD_APP       OFF)
set(LLAMA_BUILD_UI        OFF) # cmake/page.py has put the page where upstream's build looks first
set(LLAMA_USE_PREBUILT_UI OFF)
set(LLAMA_UI_GZIP         ${SUPERLLAMA_HAS_PAGE}) # a line of text goes to everyone, curl included
set(LLAMA_TOOLS_INSTALL   OFF)
set(LLAMA_BUILD_IS_DEV    OFF)
set(GGML_RPC              ON CACHE BOOL "ggml: RPC backend")

if (SUPERLLAMA_PORTABLE)
    set(GGML_BACKEND_DL       ON)
    set(GGML_CPU_ALL_VARIANTS ON)
    set(GGML_NATIVE           OFF)
endif()

# the version of upstream, whatever repository the build folder lies in
file(STRINGS ${CMAKE_SOURCE_DIR}/vendor/llama.cpp/UPSTREAM.toml _build REGEX "^build")
string(REGEX REPLACE ".*\"b([0-9]+)\"" "\\1" LLAMA_BUILD_NUMBER "${_build}")
set(LLAMA_BUILD_COMMIT superllama)
set(ENV{GIT_CEILING_DIRECTORIES} ${CMAKE_BINARY_DIR})

# no path of the machine that builds in the messages of asserts; with the cache, paths are relative anyway
find_program(SUPERLLAMA_CCACHE ccache)
if (NOT SUPERLLAMA_CCACHE AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=>)
endif()

# a compiler cache where there is one; paths below the source folder are made relative, so that
# another clone finds the same objects
set(GGML_CCACHE OFF)
find_program(SUPERLLAMA_ENV env)
if (SUPERLLAMA_CCACHE AND SUPERLLAMA_ENV)
    set(_launcher ${SUPERLLAMA_ENV} CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${SUPERLLAMA_CCACHE})
    foreach(lang C CXX CUDA)
        set(CMAKE_${lang}_COMPILER_LAUNCHER ${_launcher})
    endforeach()
endif()
