// Which folder superllama keeps files in that it can make again; python/superllama/_cache.py follows the same rules.
//
// $SUPERLLAMA_CACHE, with ~ for the home folder; else `superllama` in the user's cache folder, which is $XDG_CACHE_HOME
// or .cache in the home folder; where that cannot be written, a folder of this user's in the temporary one. A variable
// that has to name a whole path and does not is ignored: the working directory is nobody's cache.
#pragma once

#include <string>
#include <vector>

namespace superllama {

struct cache_place {
    std::string path;
    bool asked_for; // by SUPERLLAMA_CACHE
};

// In the order in which they are to be tried. They need not exist.
std::vector<cache_place> cache_places();

} // namespace superllama
