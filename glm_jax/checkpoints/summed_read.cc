// Reads from a file, and sums what was read while the processor's cache has it; see summed_read.py.

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_VECTORS
#endif

namespace {

constexpr int64_t kReadBytes = 1 << 17;  // an eighth of a usual second-level cache

FOR_VECTORS void SumBlocks(const uint64_t* words, int64_t blocks, int64_t words_per_block,
                           uint64_t* sums) {
  for (int64_t b = 0; b < blocks; ++b) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < words_per_block; ++i) sum += words[b * words_per_block + i];
    sums[b] = sum;
  }
}

}  // namespace

// Reads `bytes` at an offset, and sums each whole block of 64-bit words modulo 2^64. Returns how
// many bytes there were, or minus an error number.
extern "C" int64_t ReadSummed(int file, int64_t offset, uint8_t* to, int64_t bytes,
                              int64_t block_bytes, uint64_t* sums) {
  int64_t done = 0, summed = 0;
  while (done < bytes) {
    const ssize_t count = pread(file, to + done, std::min(kReadBytes, bytes - done), offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return -errno;
    if (count == 0) break;
    done += count;
    const int64_t blocks = (done - summed) / block_bytes;
    SumBlocks(reinterpret_cast<const uint64_t*>(to + summed), blocks, block_bytes / 8, sums);
    sums += blocks;
    summed += blocks * block_bytes;
  }
  return done;
}
