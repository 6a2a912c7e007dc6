// The size parser.

#include "check.h"
#include "api/budget_text.h"

using namespace superllama;

static uint64_t parsed(const char * text, uint64_t of = 1000) {
    uint64_t bytes = 0;
    std::string error;
    CHECK(parse_size(text, of, &bytes, &error));
    return bytes;
}

static void refused(const char * text) {
    uint64_t bytes = 7;
    std::string error;
    CHECK(!parse_size(text, 1000, &bytes, &error));
    CHECK(bytes == 7);
    CHECK(error.find(text) != std::string::npos && error.find("GiB") != std::string::npos);
}

int main() {
    CHECK(parsed("0") == 0);
    CHECK(parsed("1048576") == 1048576);
    CHECK(parsed("1.5KiB") == 1536);
    CHECK(parsed("8GiB") == 8ull << 30);
    CHECK(parsed("8G") == 8ull << 30);
    CHECK(parsed("512 MiB") == 512ull << 20);
    CHECK(parsed("2GB") == 2000000000);
    CHECK(parsed("60%") == 600);
    CHECK(parsed("100%") == 1000);
    for (const char * text : { "", "GiB", "-1", "8gib", "8 Gi", "101%", "1e30", "nan", "8GiBx", "%" }) {
        refused(text);
    }
    CHECK(parse_budget("auto") == 0);
    CHECK(parse_budget("1GiB") == 1ull << 30);
    CHECK(parse_budget("50%") > 0);
    printf("ok\n");
}
