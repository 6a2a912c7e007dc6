// The proof of a shared secret: HMAC-SHA256 by the vectors of RFC 4231, and both sides of the conversation.

#include "check.h"
#include "io/rpc_secret.h"

#include <cstring>
#include <string>
#include <vector>

using namespace superllama;

static std::string hex(const rpc_digest & digest) {
    std::string text;
    for (uint8_t byte : digest) {
        char two[3];
        snprintf(two, sizeof(two), "%02x", byte);
        text += two;
    }
    return text;
}

static void test_vectors() {
    CHECK(hex(hmac_sha256(std::string(20, '\x0b'), "Hi There")) ==
          "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    CHECK(hex(hmac_sha256("Jefe", "what do ya want for nothing?")) ==
          "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    CHECK(hex(hmac_sha256(std::string(20, '\xaa'), std::string(50, '\xdd'))) ==
          "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
    CHECK(hex(hmac_sha256(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First")) ==
          "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

static void test_same() {
    const rpc_digest a = hmac_sha256("a", "b");
    CHECK(same_digest(a, a));
    for (size_t i = 0; i < a.size(); ++i) {
        rpc_digest b = a;
        b[i] ^= 0x80;
        CHECK(!same_digest(a, b));
    }
}

// What one side says, in turns with what it hears: the other side is `replies`, one for each message it is sent.
static std::string said_by_client(const std::string & secret, const std::vector<std::string> & replies) {
    std::string said, heard;
    size_t next = 0;
    const rpc_wire wire = {
        [&](const void * data, size_t bytes) {
            said.append((const char *) data, bytes);
            heard += next < replies.size() ? replies[next++] : "";
            return true;
        },
        [&](void * data, size_t bytes) {
            if (heard.size() < bytes) {
                return false;
            }
            memcpy(data, heard.data(), bytes);
            heard.erase(0, bytes);
            return true;
        },
    };
    const std::string why = prove_to_server(wire, secret);
    CHECK(said.find(secret) == std::string::npos || secret.empty());
    return why;
}

static std::string message(const std::string & content) {
    const uint64_t bytes = content.size();
    return std::string((const char *) &bytes, sizeof(bytes)) + content;
}

static void test_a_server_that_knows_nothing() {
    const std::string secret = "0123456789abcdef";
    const std::string number = message(std::string(32, 'n'));
    CHECK(said_by_client("", {}).find("none was given") != std::string::npos);
    CHECK(said_by_client(secret, {}).find("ended") != std::string::npos);
    CHECK(said_by_client(secret, { message("short") }).find("ended") != std::string::npos);
    CHECK(said_by_client(secret, { number, message(std::string(33, '\0')) }).find("refuses") != std::string::npos);
    CHECK(said_by_client(secret, { number, message(std::string(33, '\1')) }).find("does not know") !=
          std::string::npos);
}

int main() {
    test_vectors();
    test_same();
    test_a_server_that_knows_nothing();
    puts("ok");
    return 0;
}
