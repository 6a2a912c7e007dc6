#include "api/budget_text.h"

#include "telemetry/memory.h"
#include "superllama-params.h"

#include <cmath>
#include <cstring>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace superllama {

const char * parse_number(const char * text, double * value) {
    const auto digits = [](const char * at) { return at + strspn(at, "0123456789"); };
    const char * end = digits(text);
    const bool whole = end != text;
    if (*end == '.') {
        const char * fraction = end + 1;
        end = digits(fraction);
        if (end == fraction) {
            return nullptr;
        }
    } else if (!whole) {
        return nullptr;
    }
    if (*end == 'e' || *end == 'E') {
        const char * exponent = end + 1 + (end[1] == '+' || end[1] == '-' ? 1 : 0);
        end = digits(exponent) != exponent ? digits(exponent) : end;
    }
    std::istringstream in(std::string(text, (size_t) (end - text)));
    in.imbue(std::locale::classic()); // the process may have another one, with a decimal comma
    return in >> *value ? end : nullptr;
}

bool parse_size(const char * text, uint64_t of, uint64_t * bytes, std::string * error) {
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

    double value = 0;
    const char * end = parse_number(text, &value);
    if (end != nullptr && std::isfinite(value)) {
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

uint64_t parse_budget(const char * text) {
    if (strcmp(text, "auto") == 0) {
        return 0;
    }
    uint64_t bytes = 0;
    std::string error;
    if (!parse_size(text, memory_telemetry().sample().host_total, &bytes, &error)) {
        throw std::invalid_argument(error + ", or auto");
    }
    if (bytes == 0) {
        throw std::invalid_argument(std::string("\"") + text +
                                    "\": a budget of 0 bytes holds nothing; write auto for the automatic one");
    }
    return bytes;
}

void parse_vram_budget(const char * text, uint64_t * bytes) {
    std::string rest = text;
    for (size_t d = 0; d < SUPERLLAMA_MAX_DEVICES; ++d) {
        const size_t comma = rest.find(',');
        const std::string one = rest.substr(0, comma);
        std::string error;
        bytes[d] = 0;
        if (one.find('%') != std::string::npos) {
            throw std::invalid_argument("\"" + one + "\": a budget of a device is a size, not a percentage");
        }
        if (one != "auto" && !parse_size(one.c_str(), 0, &bytes[d], &error)) {
            throw std::invalid_argument(error + ", or auto");
        }
        bytes[d] = one != "auto" && bytes[d] == 0 ? 1 : bytes[d];
        rest = comma == std::string::npos ? rest : rest.substr(comma + 1);
        if (comma != std::string::npos && d + 1 == SUPERLLAMA_MAX_DEVICES) {
            throw std::invalid_argument("more than " + std::to_string(SUPERLLAMA_MAX_DEVICES) + " sizes");
        }
    }
}

} // namespace superllama
