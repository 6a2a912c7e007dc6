# The package: superllama/bin (programs), superllama/lib (libraries), superllama/_ffi (the binding).
# Nothing of upstream's own install() rules is used: this component is all that a wheel contains.

set(programs llama-cli llama-completion llama-server llama-bench llama-perplexity llama-quantize ggml-rpc-server)
set(impl_libs llama-cli-impl llama-completion-impl llama-server-impl llama-bench-impl llama-perplexity-impl llama-quantize-impl)
set(libraries ggml-base ggml llama llama-common mtmd superllama-engine ${impl_libs})

# names of our own, no version links: another package's libllama in the same process cannot be taken for ours,
# and a wheel, which knows no symbolic links, holds no file twice
foreach(lib ${libraries})
    string(REGEX REPLACE "^(llama|ggml)" "superllama-\\1" name ${lib})
    string(REGEX REPLACE "^mtmd" "superllama-mtmd" name ${name})
    set_target_properties(${lib} PROPERTIES OUTPUT_NAME ${name})
    foreach(property VERSION SOVERSION PUBLIC_HEADER PRIVATE_HEADER)
        set_property(TARGET ${lib} PROPERTY ${property})
    endforeach()
endforeach()

# backends: linked libraries, or modules that ggml looks for beside the program
set(backends)
foreach(backend cpu rpc cuda vulkan metal blas hip sycl)
    string(TOUPPER ${backend} upper)
    if (TARGET ggml-${backend})
        list(APPEND backends ggml-${backend})
    elseif (GGML_${upper} AND NOT (backend STREQUAL cpu AND SUPERLLAMA_PORTABLE))
        message(FATAL_ERROR "GGML_${upper} was asked for, but this machine cannot build it; see the messages above")
    endif()
endforeach()
get_property(_all DIRECTORY ${CMAKE_BINARY_DIR}/llama.cpp/ggml/src PROPERTY BUILDSYSTEM_TARGETS)
if (SUPERLLAMA_PORTABLE)
    foreach(target ${_all})
        if (target MATCHES "^ggml-cpu-" AND NOT target MATCHES "-feats$")
            list(APPEND backends ${target})
        endif()
    endforeach()
endif()
foreach(backend ${backends})
    set_property(TARGET ${backend} PROPERTY VERSION)
    set_property(TARGET ${backend} PROPERTY SOVERSION)
    if (NOT GGML_BACKEND_DL)
        set_target_properties(${backend} PROPERTIES OUTPUT_NAME superllama-${backend})
    endif()
endforeach()

superllama_exports(ggml TARGETS ggml-base ggml ${backends} PREFIXES ggml_ gguf_ quantize_ dequantize_ iq2xs_ iq3xs_)
superllama_exports(llama TARGETS llama PREFIXES llama_ llm_ LLM_ superllama_ NAMESPACES superllama)
superllama_exports(mtmd TARGETS mtmd PREFIXES mtmd_ clip_)
superllama_exports(programs TARGETS ${impl_libs} PREFIXES llama_)
superllama_exports(engine TARGETS superllama-engine PREFIXES superllama_engine_ superllama_request_ superllama_chat_template_)
superllama_exports(common TARGETS llama-common
    PREFIXES   common_ fs_ glob_match json_schema_to_grammar llama_ parse_cpu_ postprocess_cpu_ set_process_priority string_
    NAMESPACES console hf_cache jinja superllama
    SYMBOLS    _ZNK11common_json3getI* _ZN5jinja16global_from_jsonI*) # begin with the type that they return

if (APPLE)
    set(origin @loader_path)
else()
    set(origin $ORIGIN)
endif()
set_target_properties(${libraries} ${backends} PROPERTIES INSTALL_RPATH "${origin};${origin}/../lib")
set_target_properties(${programs} PROPERTIES INSTALL_RPATH ${origin}/../lib)

add_custom_target(superllama-package ALL DEPENDS ${programs} ${libraries} ${backends})

if (NOT SKBUILD_STATE MATCHES "^(wheel|editable)$")
    return() # without pip: the programs and libraries only
endif()

install(TARGETS ${programs}  RUNTIME DESTINATION superllama/bin COMPONENT superllama)
install(TARGETS ${libraries}
    LIBRARY DESTINATION superllama/lib COMPONENT superllama
    RUNTIME DESTINATION superllama/bin COMPONENT superllama)
set(backend_dir superllama/lib)
if (GGML_BACKEND_DL)
    set(backend_dir superllama/bin)
endif()
install(TARGETS ${backends}
    LIBRARY DESTINATION ${backend_dir} COMPONENT superllama
    RUNTIME DESTINATION superllama/bin COMPONENT superllama)

# ---------------------------------------------------------------- facts of the build, for `superllama doctor`

get_target_property(definitions cpp-httplib INTERFACE_COMPILE_DEFINITIONS)
set(facts "{}")
function(fact name)
    if (${ARGN})
        set(value true)
    else()
        set(value false)
    endif()
    string(JSON facts SET "${facts}" ${name} ${value})
    set(facts "${facts}" PARENT_SCOPE)
endfunction()
fact(https "CPPHTTPLIB_OPENSSL_SUPPORT" IN_LIST definitions)
fact(page SUPERLLAMA_HAS_PAGE)
fact(openmp GGML_OPENMP_ENABLED)
fact(portable SUPERLLAMA_PORTABLE)
string(JSON facts SET "${facts}" compiler "\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\"")
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/_build.json CONTENT "${facts}\n" @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/_build.json DESTINATION superllama COMPONENT superllama)

# ---------------------------------------------------------------- binding

set(ffi ${CMAKE_CURRENT_SOURCE_DIR}/python/superllama/_ffi)
add_custom_command(
    OUTPUT  ${CMAKE_BINARY_DIR}/_ffi.c
    COMMAND ${Python_EXECUTABLE} -m cffi.gen_src read-sources superllama._ffi ${ffi}.cdef.txt ${ffi}.csrc.c ${CMAKE_BINARY_DIR}/_ffi.c
    DEPENDS ${ffi}.cdef.txt ${ffi}.csrc.c
    VERBATIM)
python_add_library(_ffi MODULE USE_SABI 3.10 WITH_SOABI ${CMAKE_BINARY_DIR}/_ffi.c)
target_link_libraries(_ffi PRIVATE llama)
target_compile_options(_ffi PRIVATE $<$<C_COMPILER_ID:GNU,Clang,AppleClang>:-Wno-deprecated-declarations>)
set_target_properties(_ffi PROPERTIES
    INSTALL_RPATH ${origin}/lib LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR} C_VISIBILITY_PRESET hidden)
install(TARGETS _ffi LIBRARY DESTINATION superllama COMPONENT superllama)
