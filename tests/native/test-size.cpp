// The size parser.

#include "check.h"
#include "superllama-size.h"

static uint64_t size_of(const char * text, uint64_t of = 1000) {
    uint64_t bytes = 0;
    std::string error;
    CHECK(superllama_parse_size(text, of, &bytes, &error));
    return bytes;
}

int main() {
    CHECK(size_of("0") == 0 && size_of("123") == 123 && size_of("8GiB") == 8ull << 30 &&
          size_of("512MiB") == 512ull << 20);
    CHECK(size_of("1.5KiB") == 1536 && size_of("2 GB") == 2000000000 && size_of("60%") == 600 &&
          size_of("100%") == 1000);
    for (const char * bad : { "", "abc", "-1", "8Gib!", "101%", "nan", "inf", "1e30", "12 apples", "auto" }) {
        uint64_t bytes = 77;
        std::string error;
        CHECK(!superllama_parse_size(bad, 1000, &bytes, &error));
        CHECK(bytes == 77 && error.find(bad) != std::string::npos && error.find("MiB") != std::string::npos);
    }
    printf("ok\n");
}
