// Attention of many queries on CPU and its gradient, called by XLA (jax.ffi). See cpu.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "../threads.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kBlock = 64;     // queries, and keys, of a block
constexpr int64_t kMostLanes = 16;
constexpr float kLowest = -1e30f;  // the score of a key that is not seen; finite

// What each row sees: [start, end) of one or two ranges of keys.
struct Ranges {
  const int32_t* bounds;
  int64_t per_row;

  // Calls f(begin, end) for each range of a row, cut to the block from `first_key` on.
  template <class F>
  void ForRow(int64_t row, int64_t first_key, F f) const {
    for (int64_t i = 0; i < per_row; i += 2) {
      const int32_t* range = bounds + row * per_row + i;
      const int64_t begin = std::clamp<int64_t>(range[0] - first_key, 0, kBlock);
      const int64_t end = std::clamp<int64_t>(range[1] - first_key, 0, kBlock);
      if (begin < end) f(begin, end);
    }
  }

  void Hide(int64_t row, int64_t first_key, float* scores) const {
    bool is_seen[kBlock] = {}, is_whole = false;
    ForRow(row, first_key, [&](int64_t begin, int64_t end) {
      is_whole |= end - begin == kBlock;
      std::fill(is_seen + begin, is_seen + end, true);
    });
    if (is_whole) return;
    for (int64_t j = 0; j < kBlock; ++j) scores[j] = is_seen[j] ? scores[j] : kLowest;
  }
};

// A permutation of 32-bit numbers; see dropout.py.
template <class T>
inline T Mix(T x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Which weights are kept: those whose hash is at most `most`.
struct Dropout {
  uint32_t seed, most;
  float factor;  // of what is kept

  bool is_on() const { return most < UINT32_MAX; }
  void OfHead(int64_t item) { seed = Mix(seed ^ static_cast<uint32_t>(item)); }
  uint32_t Line(int64_t row) const { return Mix(seed ^ static_cast<uint32_t>(row)); }
};

// One head of one row of the batch. Its rows are `row_stride` apart, other heads between them.
struct Item {
  int64_t queries, keys, padded, head_dim, row_stride;
  const float *query, *key, *value, *gradient;
  float *out, *log_sums, *of_query, *of_key, *of_value;
  Ranges ranges;
  float factor;  // of scores
  Dropout dropout;
};

// A block of queries, and the blocks of keys that any of them sees, one after another.
struct Block {
  const float* query;  // [rows, head_dim], scaled
  int64_t first_row, rows, first_key, keys;
  Ranges ranges;

  bool Next() {
    for (first_key += kBlock; first_key < keys; first_key += kBlock) {
      bool is_seen = false;
      for (int64_t i = 0; i < rows && !is_seen; ++i) {
        ranges.ForRow(first_row + i, first_key, [&](int64_t, int64_t) { is_seen = true; });
      }
      if (is_seen) return true;
    }
    return false;
  }
};

// A head's keys and values with zeros up to whole blocks; turned ones are [head_dim, padded].
struct Buffers {
  std::vector<float> keys, plain_keys, values, turned_values, query, gradient, sums, scores;

  explicit Buffers(const Item& t)
      : keys(t.head_dim * t.padded),
        plain_keys(t.padded * t.head_dim),
        values(t.padded * t.head_dim),
        query(kBlock * t.head_dim),
        gradient(kBlock * t.head_dim),
        sums(kBlock * t.head_dim),
        scores(kBlock * kBlock) {
    for (int64_t i = 0; i < t.keys; ++i) {
      std::copy_n(t.key + i * t.row_stride, t.head_dim, plain_keys.data() + i * t.head_dim);
      std::copy_n(t.value + i * t.row_stride, t.head_dim, values.data() + i * t.head_dim);
    }
    Turn(t, plain_keys, keys);
  }

  void TurnValues(const Item& t) {
    turned_values.resize(t.head_dim * t.padded);
    Turn(t, values, turned_values);
  }

  static void Turn(const Item& t, const std::vector<float>& from, std::vector<float>& to) {
    // Lines of 16 keys at a time, so that both sides stay in the nearest cache.
    for (int64_t first = 0; first < t.padded; first += kMostLanes) {
      for (int64_t d = 0; d < t.head_dim; ++d) {
        for (int64_t i = first; i < first + kMostLanes; ++i) {
          to[d * t.padded + i] = from[i * t.head_dim + d];
        }
      }
    }
  }

  Block Load(const Item& t, int64_t first_row) {
    const int64_t rows = std::min(kBlock, t.queries - first_row);
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = t.query + (first_row + i) * t.row_stride;
      for (int64_t d = 0; d < t.head_dim; ++d) query[i * t.head_dim + d] = from[d] * t.factor;
    }
    return {query.data(), first_row, rows, -kBlock, t.keys, t.ranges};
  }
};

#define GLM_JAX_VECTOR_BYTES 16
#define GLM_JAX_BLOCK_VECTORS 4
#define GLM_JAX_BLOCK_ROWS 2
namespace portable {
#include "cpu_vectors.inc"
#include "cpu.inc"
}  // namespace portable
#undef GLM_JAX_VECTOR_BYTES
#undef GLM_JAX_BLOCK_VECTORS
#undef GLM_JAX_BLOCK_ROWS

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GLM_JAX_X86_VARIANTS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define GLM_JAX_VECTOR_BYTES 32
#define GLM_JAX_BLOCK_VECTORS 2
#define GLM_JAX_BLOCK_ROWS 6
namespace avx2 {
#include "cpu_vectors.inc"
#include "cpu.inc"
}  // namespace avx2
#undef GLM_JAX_VECTOR_BYTES
#undef GLM_JAX_BLOCK_VECTORS
#undef GLM_JAX_BLOCK_ROWS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define GLM_JAX_VECTOR_BYTES 64
#define GLM_JAX_BLOCK_VECTORS 4
#define GLM_JAX_BLOCK_ROWS 6
namespace avx512 {
#include "cpu_vectors.inc"
#include "cpu.inc"
}  // namespace avx512
#undef GLM_JAX_VECTOR_BYTES
#undef GLM_JAX_BLOCK_VECTORS
#undef GLM_JAX_BLOCK_ROWS
#pragma GCC pop_options
#endif

using Run = void (*)(const Item&);

Run Choose(int64_t widest, bool is_backward) {
#ifdef GLM_JAX_X86_VARIANTS
  if (widest >= 512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return is_backward ? avx512::BackwardItem : avx512::ForwardItem;
  }
  if (widest >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return is_backward ? avx2::BackwardItem : avx2::ForwardItem;
  }
#endif
  return is_backward ? portable::BackwardItem : portable::ForwardItem;
}

struct Job : glm_jax::Work {
  Item first;  // the batch's first head
  int64_t heads;
  ::Run run;

  void Run(int64_t begin, int64_t end) override {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / heads, head = item % heads;
      const int64_t queries = row * first.queries * first.row_stride + head * first.head_dim;
      const int64_t keys = row * first.keys * first.row_stride + head * first.head_dim;
      Item t = first;
      t.query += queries, t.out += queries, t.gradient += queries, t.of_query += queries;
      t.key += keys, t.value += keys, t.of_key += keys, t.of_value += keys;
      t.log_sums += item * first.queries;
      t.dropout.OfHead(item);
      t.ranges.bounds += row * first.queries * first.ranges.per_row;
      run(t);
    }
  }
};

ffi::Error Start(ffi::ThreadPool pool, ffi::Span<const int64_t> q, ffi::Span<const int64_t> k,
                 ffi::Span<const int64_t> ranges, Item item, Run run) {
  if (q.size() != 4 || k.size() != 4 || ranges.size() != 3 || q[0] != k[0] || q[2] != k[2] ||
      q[3] != k[3] || q[3] % kMostLanes || ranges[0] != q[0] || ranges[1] != q[1] ||
      (ranges[2] != 2 && ranges[2] != 4)) {
    return ffi::Error::InvalidArgument("attention: shapes do not belong together");
  }
  auto job = std::make_shared<Job>();
  item.queries = q[1], item.keys = k[1], item.head_dim = q[3], item.row_stride = q[2] * q[3];
  item.padded = (item.keys + kBlock - 1) / kBlock * kBlock;
  item.ranges.per_row = ranges[2];
  item.factor = 1 / std::sqrt(static_cast<float>(item.head_dim));
  job->first = item, job->heads = q[2], job->run = run;
  job->count = q[0] * q[2];
  glm_jax::DoOnThreads(pool, job, true);
  return ffi::Error::Success();
}

using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

ffi::Error Forward(ffi::ThreadPool pool, Floats query, Floats key, Floats value,
                   ffi::Buffer<ffi::S32> ranges, ffi::Buffer<ffi::U32> seed, FloatsOut out,
                   FloatsOut log_sums, int64_t most_kept, float kept_factor, int64_t widest) {
  Item item = {};
  item.query = query.typed_data(), item.key = key.typed_data(), item.value = value.typed_data();
  item.out = out->typed_data(), item.log_sums = log_sums->typed_data();
  item.ranges.bounds = ranges.typed_data();
  item.dropout = {seed.typed_data()[0], static_cast<uint32_t>(most_kept), kept_factor};
  return Start(pool, query.dimensions(), key.dimensions(), ranges.dimensions(), item,
               Choose(widest, false));
}

ffi::Error Backward(ffi::ThreadPool pool, Floats query, Floats key, Floats value,
                    ffi::Buffer<ffi::S32> ranges, ffi::Buffer<ffi::U32> seed, Floats out,
                    Floats log_sums, Floats gradient, FloatsOut of_query, FloatsOut of_key,
                    FloatsOut of_value, int64_t most_kept, float kept_factor, int64_t widest) {
  Item item = {};
  item.query = query.typed_data(), item.key = key.typed_data(), item.value = value.typed_data();
  item.out = out.typed_data(), item.log_sums = log_sums.typed_data();
  item.gradient = gradient.typed_data(), item.of_query = of_query->typed_data();
  item.of_key = of_key->typed_data(), item.of_value = of_value->typed_data();
  item.ranges.bounds = ranges.typed_data();
  item.dropout = {seed.typed_data()[0], static_cast<uint32_t>(most_kept), kept_factor};
  return Start(pool, query.dimensions(), key.dimensions(), ranges.dimensions(), item,
               Choose(widest, true));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxAttentionForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("most_kept")
                                  .Attr<float>("kept_factor")
                                  .Attr<int64_t>("widest"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxAttentionBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("most_kept")
                                  .Attr<float>("kept_factor")
                                  .Attr<int64_t>("widest"));
