# What our shared libraries show to the rest of a process: llama's, ggml's, gguf's, mtmd's and our own names, nothing of
# the C++ library or of what is compiled into them (httplib, nlohmann, miniaudio, stb). Another package's libraries may
# be in the process as well.

# superllama_exports(NAME TARGETS target... PREFIXES prefix... [NAMESPACES ns...] [SYMBOLS pattern...])
# The names that begin with a prefix, C functions as well as C++ functions and classes; what is in a namespace; patterns of
# mangled names. Calls within a library stay there. A name that another library of ours needs and does not get fails
# the build, not the first start.
function(superllama_exports name)
    if (NOT UNIX OR APPLE)
        return() # two-level names, or explicit exports: nothing to do
    endif()
    cmake_parse_arguments(arg "" "" "TARGETS;PREFIXES;NAMESPACES;SYMBOLS" ${ARGN})
    set(patterns ${arg_SYMBOLS})
    foreach(prefix ${arg_PREFIXES})
        list(APPEND patterns ${prefix}*)
        foreach(length [1-9] [1-9][0-9])           # of the whole name, before it: _Z12llama_decodeP...
            foreach(kind _Z _ZN _ZNK _ZT[VIS] _ZT[VIS]N)
                list(APPEND patterns ${kind}${length}${prefix}*)
            endforeach()
        endforeach()
    endforeach()
    foreach(namespace ${arg_NAMESPACES})
        string(LENGTH ${namespace} length)
        foreach(kind _ZN _ZNK _ZT[VIS]N)
            list(APPEND patterns ${kind}${length}${namespace}*)
        endforeach()
    endforeach()

    set(script ${CMAKE_BINARY_DIR}/exports/${name}.map)
    string(REPLACE ";" ";\n" lines "${patterns}")
    file(CONFIGURE OUTPUT ${script} CONTENT "{\nglobal:\n${lines};\nlocal:\n*;\n};\n" @ONLY)
    foreach(target ${arg_TARGETS})
        target_link_options(${target} PRIVATE -Wl,--version-script=${script} -Wl,-Bsymbolic-functions -Wl,-z,defs)
        set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${script})
    endforeach()
endfunction()
