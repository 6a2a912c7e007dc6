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

# superllama_page(TREE): the server's page, or a stand-in, into a tree -> SUPERLLAMA_HAS_PAGE; see cmake/page.py
function(superllama_page tree)
    execute_process(
        COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/cmake/page.py put ${tree} ${SUPERLLAMA_PAGE}
        OUTPUT_VARIABLE out ERROR_VARIABLE err RESULT_VARIABLE rc OUTPUT_STRIP_TRAILING_WHITESPACE)
    if (rc)
        message(FATAL_ERROR "${err}")
    elseif (out STREQUAL "page")
        set(SUPERLLAMA_HAS_PAGE ON PARENT_SCOPE)
    else()
        message(WARNING "the server is built without its page: ${out}")
        set(SUPERLLAMA_HAS_PAGE OFF PARENT_SCOPE)
    endif()
endfunction()

# the copy in the build tree follows the pin and the patches
file(GLOB _inputs CONFIGURE_DEPENDS patches/*.patch)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${_inputs} patches/series vendor/llama.cpp/UPSTREAM.toml cmake/upstream.py cmake/page.py)
