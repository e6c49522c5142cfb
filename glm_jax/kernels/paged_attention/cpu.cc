// Attention of a row's new queries over keys in pages on CPU, called by XLA (jax.ffi). See cpu.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../threads.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMaxLanes = 16;
constexpr int64_t kMinSharedBytes = 1 << 16;  // of keys, that are worth waking a thread

// The pages of a row's keys, in order, are those of its table; each of its `queries` sees the
// first `lengths` positions.
struct Problem {
  int64_t queries, heads, pages, page_size, head_dim, table_size, bits;
  const float* query;                      // [batch, queries, heads, head_dim]
  const void *keys, *values;               // [heads, pages, page_size, head_dim]
  const float *key_scales, *value_scales;  // [heads, pages, page_size], or null
  const int32_t* lengths;                  // [batch, queries]
  const int32_t* tables;                   // [batch, table_size]
  float* out;                              // like query
};

// Neighbouring keys and values of a query.
template <class T>
struct Run {
  const T *keys, *values;
  const float *key_scales, *value_scales;
  int64_t count;
};

template <class T>
Run<T> MakeRun(const Problem& p, int64_t position, int64_t count) {
  return {static_cast<const T*>(p.keys) + position * p.head_dim,
          static_cast<const T*>(p.values) + position * p.head_dim,
          p.key_scales ? p.key_scales + position : nullptr,
          p.value_scales ? p.value_scales + position : nullptr, count};
}

template <class T>
void FindRuns(const Problem& p, int64_t row, int64_t head, int64_t length,
              std::vector<Run<T>>& runs) {
  runs.clear();
  const int64_t end = std::clamp<int64_t>(length, 0, p.table_size * p.page_size);
  for (int64_t begin = 0; begin < end; begin += p.page_size) {
    const int64_t page = p.tables[row * p.table_size + begin / p.page_size];
    const int64_t index = head * p.pages + std::clamp<int64_t>(page, 0, p.pages - 1);
    runs.push_back(MakeRun<T>(p, index * p.page_size, std::min(p.page_size, end - begin)));
  }
}

// Items are the queries of each head of each row: a head's keys stay in the cache for all of them.
template <class T, class F>
void ForEachQuery(const Problem& p, int64_t first, int64_t last, F attend) {
  std::vector<float> scores(p.page_size * p.table_size + kMaxLanes);
  std::vector<Run<T>> runs;
  for (int64_t item = first; item < last; ++item) {
    const int64_t row = item / (p.heads * p.queries), head = item / p.queries % p.heads;
    const int64_t query = row * p.queries + item % p.queries;
    const int64_t offset = (query * p.heads + head) * p.head_dim;
    float* out = p.out + offset;
    FindRuns(p, row, head, p.lengths[query], runs);
    if (runs.empty()) {
      std::fill(out, out + p.head_dim, 0.0f);
    } else {
      attend(p.query + offset, runs, p.head_dim, scores.data(), out);
    }
  }
}

#define GLM_JAX_VARIANT_SOURCE "paged_attention/cpu.inc"
#include "../variants.inc"

struct Job : glm_jax::Work {
  Problem problem;
  void (*run)(const Problem&, int64_t, int64_t);
  void Run(int64_t first, int64_t last) override { run(problem, first, last); }
};

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys,
                          ffi::AnyBuffer values, ffi::Buffer<ffi::S32> tables,
                          ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> key_scales,
                          ffi::Buffer<ffi::F32> value_scales, ffi::ResultBuffer<ffi::F32> out,
                          int64_t max_vector_bits) {
  const auto q = query.dimensions(), k = keys.dimensions(), t = tables.dimensions();
  const int64_t bytes = keys.size_bytes() / std::max<size_t>(1, keys.element_count());
  const bool has_scales = key_scales.element_count() > 0;
  if (q.size() != 4 || k.size() != 4 || t.size() != 2 || q[2] != k[0] || q[3] != k[3] ||
      k[1] < 1 || t[0] != q[0] || static_cast<int64_t>(lengths.element_count()) != q[0] * q[1] ||
      q[3] % kMaxLanes || values.element_count() != keys.element_count() ||
      key_scales.element_count() != value_scales.element_count() || (has_scales && bytes != 1) ||
      (bytes != 1 && bytes != 2 && bytes != 4)) {
    return ffi::Error::InvalidArgument("paged attention: shapes do not belong together");
  }
  auto job = std::make_shared<Job>();
  Problem& problem = job->problem;
  problem.queries = q[1], problem.heads = q[2], problem.head_dim = q[3];
  problem.pages = k[1], problem.page_size = k[2], problem.table_size = t[1];
  problem.bits = 8 * bytes;
  problem.query = query.typed_data();
  problem.keys = keys.untyped_data();
  problem.values = values.untyped_data();
  problem.key_scales = has_scales ? key_scales.typed_data() : nullptr;
  problem.value_scales = has_scales ? value_scales.typed_data() : nullptr;
  problem.lengths = lengths.typed_data();
  problem.tables = tables.typed_data();
  problem.out = out->typed_data();
  job->run = GLM_JAX_CHOOSE(max_vector_bits, RunItems);
  job->count = q[0] * q[1] * q[2];
  glm_jax::RunOnThreads(pool, job, static_cast<int64_t>(keys.size_bytes()) >= kMinSharedBytes);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxPagedAttention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("max_vector_bits"));
