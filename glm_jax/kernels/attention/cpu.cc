// Attention of many queries on CPU and its gradient, called by XLA (jax.ffi). See cpu.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "../threads.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kBlock = 64;     // queries, and keys, of a block
constexpr int64_t kMaxLanes = 16;
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

  void Mask(int64_t row, int64_t first_key, float* scores) const {
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

// Weights whose 16 bits of hash are below the threshold are scaled, and the others become zero.
struct Dropout {
  uint32_t seed, threshold;
  float scale;

  bool is_on() const { return threshold < 1 << 16; }
  void OfHead(int64_t item) { seed = Mix(seed ^ static_cast<uint32_t>(item)); }
  uint32_t RowHash(int64_t row) const { return Mix(seed ^ static_cast<uint32_t>(row)); }
};

// One head of one row of the batch. Its rows are `row_stride` apart, other heads between them.
// `d_x` is the gradient of x.
struct Item {
  int64_t queries, keys, padded, head_dim, row_stride;
  const float *query, *key, *value, *d_out;
  float *out, *log_sums, *d_query, *d_key, *d_value;
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

// A head's keys and values with zeros up to whole blocks; transposed ones are [head_dim, padded].
struct Buffers {
  std::vector<float> keys, transposed_keys, values, transposed_values, query, d_out, sums, scores;

  explicit Buffers(const Item& t)
      : keys(t.padded * t.head_dim),
        transposed_keys(t.head_dim * t.padded),
        values(t.padded * t.head_dim),
        query(kBlock * t.head_dim),
        d_out(kBlock * t.head_dim),
        sums(kBlock * t.head_dim),
        scores(kBlock * kBlock) {
    for (int64_t i = 0; i < t.keys; ++i) {
      std::copy_n(t.key + i * t.row_stride, t.head_dim, keys.data() + i * t.head_dim);
      std::copy_n(t.value + i * t.row_stride, t.head_dim, values.data() + i * t.head_dim);
    }
    Transpose(t, keys, transposed_keys);
  }

  void TransposeValues(const Item& t) {
    transposed_values.resize(t.head_dim * t.padded);
    Transpose(t, values, transposed_values);
  }

  static void Transpose(const Item& t, const std::vector<float>& from, std::vector<float>& to) {
    // Lines of 16 keys at a time, so that both sides stay in the nearest cache.
    for (int64_t first = 0; first < t.padded; first += kMaxLanes) {
      for (int64_t d = 0; d < t.head_dim; ++d) {
        for (int64_t i = first; i < first + kMaxLanes; ++i) {
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

#define GLM_JAX_VARIANT_SOURCE "attention/cpu.inc"
#include "../variants.inc"

struct Job : glm_jax::Work {
  Item first;  // the batch's first head
  int64_t heads;
  void (*run)(const Item&);

  void Run(int64_t begin, int64_t end) override {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / heads, head = item % heads;
      const int64_t queries = row * first.queries * first.row_stride + head * first.head_dim;
      const int64_t keys = row * first.keys * first.row_stride + head * first.head_dim;
      Item t = first;
      t.query += queries, t.out += queries, t.d_out += queries, t.d_query += queries;
      t.key += keys, t.value += keys, t.d_key += keys, t.d_value += keys;
      t.log_sums += item * first.queries;
      t.dropout.OfHead(item);
      t.ranges.bounds += row * first.queries * first.ranges.per_row;
      run(t);
    }
  }
};

ffi::Error Start(ffi::ThreadPool pool, ffi::Span<const int64_t> q, ffi::Span<const int64_t> k,
                 ffi::Span<const int64_t> ranges, Item item, void (*run)(const Item&)) {
  if (q.size() != 4 || k.size() != 4 || ranges.size() != 3 || q[0] != k[0] || q[2] != k[2] ||
      q[3] != k[3] || q[3] % kMaxLanes || ranges[0] != q[0] || ranges[1] != q[1] ||
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
  glm_jax::RunOnThreads(pool, job, true);
  return ffi::Error::Success();
}

using FloatsIn = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;
using RangesIn = ffi::Buffer<ffi::S32>;
using SeedIn = ffi::Buffer<ffi::U32>;

Item Inputs(FloatsIn query, FloatsIn key, FloatsIn value, RangesIn ranges, SeedIn seed,
            int64_t dropout_threshold, float dropout_scale) {
  Item item = {};
  item.query = query.typed_data(), item.key = key.typed_data(), item.value = value.typed_data();
  item.ranges.bounds = ranges.typed_data();
  item.dropout = {seed.typed_data()[0], static_cast<uint32_t>(dropout_threshold), dropout_scale};
  return item;
}

ffi::Error Forward(ffi::ThreadPool pool, int64_t dropout_threshold, float dropout_scale,
                   int64_t max_vector_bits, FloatsIn query, FloatsIn key, FloatsIn value,
                   RangesIn ranges, SeedIn seed, FloatsOut out, FloatsOut log_sums) {
  Item item = Inputs(query, key, value, ranges, seed, dropout_threshold, dropout_scale);
  item.out = out->typed_data(), item.log_sums = log_sums->typed_data();
  return Start(pool, query.dimensions(), key.dimensions(), ranges.dimensions(), item,
               GLM_JAX_CHOOSE(max_vector_bits, ForwardItem));
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t dropout_threshold, float dropout_scale,
                    int64_t max_vector_bits, FloatsIn query, FloatsIn key, FloatsIn value,
                    RangesIn ranges, SeedIn seed, FloatsIn out, FloatsIn log_sums,
                    FloatsIn d_out, FloatsOut d_query, FloatsOut d_key, FloatsOut d_value) {
  Item item = Inputs(query, key, value, ranges, seed, dropout_threshold, dropout_scale);
  item.out = out.typed_data(), item.log_sums = log_sums.typed_data();
  item.d_out = d_out.typed_data(), item.d_query = d_query->typed_data();
  item.d_key = d_key->typed_data(), item.d_value = d_value->typed_data();
  return Start(pool, query.dimensions(), key.dimensions(), ranges.dimensions(), item,
               GLM_JAX_CHOOSE(max_vector_bits, BackwardItem));
}

// What both handlers are bound to first.
auto BindInputs() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<int64_t>("dropout_threshold")
      .Attr<float>("dropout_scale")
      .Attr<int64_t>("max_vector_bits")
      .Arg<FloatsIn>()
      .Arg<FloatsIn>()
      .Arg<FloatsIn>()
      .Arg<RangesIn>()
      .Arg<SeedIn>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxAttentionForward, Forward,
                              BindInputs().Ret<FloatsIn>().Ret<FloatsIn>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxAttentionBackward, Backward,
                              BindInputs()
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Ret<FloatsIn>()
                                  .Ret<FloatsIn>()
                                  .Ret<FloatsIn>());
