// The numbers of a server as Prometheus reads them.
#pragma once

#include "json.h"

#include <string>

namespace superllama {

// Lines in the text format, from what GET /superllama says. Names and units by Prometheus' conventions.
std::string prometheus_text(const common_json & status, int64_t n_refused);

} // namespace superllama
