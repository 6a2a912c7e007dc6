// The size parser.

#include "check.h"
#include "api/budget_text.h"

#include <clocale>
#include <exception>
#include <locale>

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

// A host program's locale may have a decimal comma; sizes have a point. Installed locales differ: the comma is made
// here.
class comma : public std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
};

static void test_locale() {
    const std::locale before = std::locale::global(std::locale(std::locale::classic(), new comma));
    CHECK(parsed("1.5KiB") == 1536);
    std::locale::global(before);
    for (const char * name : { "de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8" }) {
        if (setlocale(LC_NUMERIC, name) != nullptr) {
            CHECK(parsed("1.5KiB") == 1536);
        }
    }
    setlocale(LC_NUMERIC, "C");
}

static void refused_budget(const char * text) {
    try {
        parse_budget(text);
        CHECK(false);
    } catch (const std::exception & e) {
        CHECK(std::string(e.what()).find("auto") != std::string::npos); // the hint
    }
}

int main() {
    test_locale();
    CHECK(parsed("0") == 0);
    CHECK(parsed("1048576") == 1048576);
    CHECK(parsed("1.5KiB") == 1536);
    CHECK(parsed("8GiB") == 8ull << 30);
    CHECK(parsed("8G") == 8ull << 30);
    CHECK(parsed("512 MiB") == 512ull << 20);
    CHECK(parsed("2GB") == 2000000000);
    CHECK(parsed("60%") == 600);
    CHECK(parsed("100%") == 1000);
    for (const char * text : { "", "GiB", "-1", "8gib", "8 Gi", "101%", "1e30", "nan", "inf", "0x10", "1,5GiB", "1.GiB",
                               ".GiB", "+1", "1e", " 1", "8GiBx", "%" }) {
        refused(text);
    }
    CHECK(parsed("1e3") == 1000);
    CHECK(parsed(".5KiB") == 512);
    CHECK(parse_budget("auto") == 0);
    CHECK(parse_budget("1GiB") == 1ull << 30);
    CHECK(parse_budget("50%") > 0);
    for (const char * text : { "", "0", "0GiB", "0%", "0.0", "AUTO" }) {
        refused_budget(text);
    }
    printf("ok\n");
}
