// Checksums: CRC-32C (Castagnoli, reflected polynomial 0x82F63B78, initial and final xor 0xFFFFFFFF; "123456789" -> E3069283)
// as in iSCSI and ext4, with the SSE4.2 instruction where the machine has it; and a 64-bit FNV-1a for fingerprints.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace qn {

// crc32c(b, crc32c(a)) == crc32c(a then b); the start value is 0.
uint32_t crc32c(std::span<const uint8_t> bytes, uint32_t crc = 0);
// The same on machines without the instruction; apart so that tests can reach it on every machine.
uint32_t crc32c_portable(std::span<const uint8_t> bytes, uint32_t crc = 0);
uint64_t fnv1a64(std::string_view bytes, uint64_t seed = 0xcbf29ce484222325ull);

}  // namespace qn
