# superllama_upstream(fetch | patch DEST | unpack DEST): calls cmake/upstream.py and stops on its error.
function(superllama_upstream)
    execute_process(
        COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/cmake/upstream.py ${ARGV}
        OUTPUT_VARIABLE out ERROR_VARIABLE err RESULT_VARIABLE rc OUTPUT_STRIP_TRAILING_WHITESPACE)
    if (rc)
        message(FATAL_ERROR "${err}")
    endif()
    if (ARGV0 STREQUAL "fetch")
        set(SUPERLLAMA_PRISTINE_TREE "${out}" PARENT_SCOPE)
    endif()
endfunction()

# the copy in the build tree follows the pin and the patches
file(GLOB _inputs CONFIGURE_DEPENDS patches/*.patch)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${_inputs} patches/series vendor/llama.cpp/UPSTREAM.toml cmake/upstream.py)
