// Address space that costs memory only where it is written.
#pragma once

#include <cstddef>
#include <cstdint>

uint8_t * llama_kv_reserve(size_t size); // null on failure
void llama_kv_unreserve(uint8_t * base, size_t size);
void llama_kv_discard(uint8_t * at, size_t size); // reads as zero afterwards; both multiples of the system's page
size_t llama_kv_system_page();
