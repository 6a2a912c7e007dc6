// Strings in a text, where a backslash takes what follows it.
#pragma once

#include <string>

namespace superllama {

// From the character that opens one, to the one that ends it.
inline size_t skip_to(const std::string & text, size_t at, char end) {
    for (++at; at < text.size() && text[at] != end; ++at) {
        at += text[at] == '\\' ? 1 : 0;
    }
    return at;
}

} // namespace superllama
