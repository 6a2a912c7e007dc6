# What our shared libraries show to the rest of a process: llama's, ggml's, gguf's, mtmd's and our own names, nothing of
# the C++ library or of what is compiled into them. Another package's libraries may be in the process as well.

if (UNIX AND NOT APPLE)
    # superllama_exports(MAP TARGETS...): the names in cmake/exports/MAP.map. Calls within a library stay there, and
    # a name that another library of ours needs and does not get fails the build, not the first start.
    function(superllama_exports map)
        set(script ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/exports/${map}.map)
        foreach(target ${ARGN})
            target_link_options(${target} PRIVATE -Wl,--version-script=${script} -Wl,-Bsymbolic-functions -Wl,-z,defs)
            set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${script})
        endforeach()
    endfunction()
else()
    function(superllama_exports) # two-level names, or explicit exports: nothing to do
    endfunction()
endif()
