#include "superllama-size.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

bool superllama_parse_size(const char * text, uint64_t of, uint64_t * bytes, std::string * error) {
    static const struct {
        const char * name;
        double factor;
    } units[] = {
        { "", 1 },
        { "B", 1 },
        { "K", 1024.0 },
        { "KiB", 1024.0 },
        { "M", 1048576.0 },
        { "MiB", 1048576.0 },
        { "G", 1073741824.0 },
        { "GiB", 1073741824.0 },
        { "T", 1099511627776.0 },
        { "TiB", 1099511627776.0 },
        { "KB", 1e3 },
        { "MB", 1e6 },
        { "GB", 1e9 },
        { "TB", 1e12 },
    };

    char * end = nullptr;
    const double value = strtod(text, &end);
    if (end != text && std::isfinite(value) && value >= 0) {
        while (*end == ' ') {
            ++end;
        }
        if (strcmp(end, "%") == 0 && value <= 100) {
            *bytes = (uint64_t) (value / 100.0 * (double) of);
            return true;
        }
        for (const auto & unit : units) {
            if (strcmp(end, unit.name) == 0 && value * unit.factor < 9.2e18) {
                *bytes = (uint64_t) (value * unit.factor);
                return true;
            }
        }
    }
    *error = std::string("\"") + text +
             "\" is not a size; write a number with KiB, MiB, GiB or TiB (powers of 1024), " +
             "KB, MB, GB or TB (powers of 1000), or a percentage up to 100%";
    return false;
}
