// Slots that end while a batch is put together: nobody refers to them any more, and the others' places are right.

#include "check.h"
#include "server/batch.h"

#include <vector>

struct slot {
    int id;
    bool runs = true;
    int32_t i_batch = -1;
    std::vector<int32_t> spec_i_batch = {};
    bool is_cleared = false;

    bool is_processing() const { return runs; }
    void prompt_clear() { is_cleared = true; }
};

struct token {
    int id_slot;
    int number;
};

struct batch {
    std::vector<token> tokens;
    slot * slot_batched = nullptr;
    float alora_scale = -1.0f;

    int32_t size() const { return (int32_t) tokens.size(); }
};

static void test_first_ended() {
    std::vector<slot> slots{ { 0 }, { 1 }, { 2 } };
    batch taken{ { { 0, 10 }, { 0, 11 }, { 1, 20 }, { 2, 30 }, { 2, 31 }, { 2, 32 } }, &slots[0], 0.5f };
    slots[0].runs = false;
    slots[0].i_batch = 1;
    slots[1].i_batch = 2;
    slots[2].spec_i_batch = { 3, 4, 5 };
    superllama::leave_ended(slots, taken);
    CHECK(taken.size() == 4 && taken.tokens[0].number == 20 && taken.tokens[3].number == 32);
    CHECK(taken.slot_batched == &slots[1] && taken.alora_scale < 0);
    CHECK(slots[1].i_batch == 0 && slots[2].spec_i_batch == std::vector<int32_t>({ 1, 2, 3 }));
    CHECK(slots[0].is_cleared && !slots[1].is_cleared && !slots[2].is_cleared);
}

static void test_all_ended() {
    std::vector<slot> slots{ { 0 }, { 1 } };
    batch taken{ { { 1, 20 }, { 0, 10 } }, &slots[1] };
    slots[0].runs = slots[1].runs = false;
    superllama::leave_ended(slots, taken);
    CHECK(taken.size() == 0 && taken.slot_batched == nullptr);
}

// one that ended before the batch knew it as its first: its tokens are there, and no first slot
static void test_never_first() {
    std::vector<slot> slots{ { 0 }, { 1 } };
    batch taken{ { { 0, 10 } }, nullptr };
    slots[0].runs = false;
    superllama::leave_ended(slots, taken);
    CHECK(taken.size() == 0 && taken.slot_batched == nullptr && slots[0].is_cleared);
}

static void test_none_ended() {
    std::vector<slot> slots{ { 0 }, { 1 }, { 2, false } };
    batch taken{ { { 1, 20 }, { 0, 10 } }, &slots[1], 0.5f };
    slots[0].i_batch = 1;
    superllama::leave_ended(slots, taken);
    CHECK(taken.size() == 2 && taken.slot_batched == &slots[1] && taken.alora_scale > 0 && slots[0].i_batch == 1);
    CHECK(!slots[0].is_cleared && !slots[2].is_cleared); // whose cells a new request goes on from
}

int main() {
    test_first_ended();
    test_all_ended();
    test_never_first();
    test_none_ended();
    printf("ok\n");
}
