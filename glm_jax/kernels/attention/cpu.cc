// Attention of few queries over a cache on CPU, called by XLA (jax.ffi). See cpu.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "../threads.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMostLanes = 16;
constexpr int64_t kLeastShared = 1 << 16;  // bytes of keys that are worth waking a thread

// Keys lie in blocks of `length` positions: of a cache with rows, block (row, head), where a
// query sees `ranges` of it; of one in pages, block (head, page), and a row's pages in order
// are those of its `table`, of which the query sees the first `ranges` positions.
struct Problem {
  int64_t batch, queries, heads, length, head_dim, bits;
  int64_t pages, table_size;               // 0 for a cache with rows
  const float* query;                      // [batch, queries, heads, head_dim]
  const void *keys, *values;               // [blocks, length, head_dim]
  const float *key_scales, *value_scales;  // [blocks, length], or null
  const int32_t* ranges;                   // [batch, queries, 2], or [batch] in pages
  const int32_t* tables;                   // [batch, table_size], or null
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
void FindRuns(const Problem& p, int64_t row, int64_t i, int64_t head, std::vector<Run<T>>& runs) {
  runs.clear();
  if (!p.pages) {
    const int32_t* range = p.ranges + (row * p.queries + i) * 2;
    const int64_t begin = std::clamp<int64_t>(range[0], 0, p.length);
    const int64_t end = std::clamp<int64_t>(range[1], begin, p.length);
    const int64_t block = row * p.heads + head;
    if (begin < end) runs.push_back(MakeRun<T>(p, block * p.length + begin, end - begin));
    return;
  }
  const int64_t end = std::clamp<int64_t>(p.ranges[row], 0, p.table_size * p.length);
  for (int64_t begin = 0; begin < end; begin += p.length) {
    const int64_t named = p.tables[row * p.table_size + begin / p.length];
    const int64_t block = head * p.pages + std::clamp<int64_t>(named, 0, p.pages - 1);
    runs.push_back(MakeRun<T>(p, block * p.length, std::min(p.length, end - begin)));
  }
}

// Items are the heads of each row of the batch; their queries share keys that are in cache.
template <class T, class F>
void EachQuery(const Problem& p, int64_t first, int64_t last, F attend) {
  std::vector<float> scores(p.length * std::max<int64_t>(1, p.table_size) + kMostLanes);
  std::vector<Run<T>> runs;
  for (int64_t item = first; item < last; ++item) {
    const int64_t row = item / p.heads, head = item % p.heads;
    for (int64_t i = 0; i < p.queries; ++i) {
      const int64_t place = ((row * p.queries + i) * p.heads + head) * p.head_dim;
      FindRuns(p, row, i, head, runs);
      if (runs.empty()) {
        std::fill(p.out + place, p.out + place + p.head_dim, 0.0f);
      } else {
        attend(p.query + place, runs, p.head_dim, scores.data(), p.out + place);
      }
    }
  }
}

#define GLM_JAX_VECTOR_BYTES 16
namespace portable {
#include "cpu_vectors.inc"
#include "cpu.inc"
}  // namespace portable
#undef GLM_JAX_VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GLM_JAX_X86_VARIANTS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define GLM_JAX_VECTOR_BYTES 32
namespace avx2 {
#include "cpu_vectors.inc"
#include "cpu.inc"
}  // namespace avx2
#undef GLM_JAX_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define GLM_JAX_VECTOR_BYTES 64
namespace avx512 {
#include "cpu_vectors.inc"
#include "cpu.inc"
}  // namespace avx512
#undef GLM_JAX_VECTOR_BYTES
#pragma GCC pop_options
#endif

auto Choose(int64_t widest) {
#ifdef GLM_JAX_X86_VARIANTS
  if (widest >= 512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512::DoItems;
  }
  if (widest >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::DoItems;
  }
#endif
  return portable::DoItems;
}

struct Job : glm_jax::Work {
  Problem problem;
  void (*run)(const Problem&, int64_t, int64_t);
  void Run(int64_t first, int64_t last) override { run(problem, first, last); }
};

bool AreCacheArrays(const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values,
                    const ffi::Buffer<ffi::F32>& key_scales,
                    const ffi::Buffer<ffi::F32>& value_scales, int64_t bytes) {
  return keys.dimensions().size() == 4 && values.element_count() == keys.element_count() &&
         key_scales.element_count() == value_scales.element_count() &&
         (!key_scales.element_count() || bytes == 1) && (bytes == 1 || bytes == 2 || bytes == 4);
}

// Fills in what the two kinds of cache have in common, and does the work.
ffi::Error Finish(ffi::ThreadPool pool, Problem problem, const ffi::Buffer<ffi::F32>& query,
                  const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values,
                  const ffi::Buffer<ffi::F32>& key_scales,
                  const ffi::Buffer<ffi::F32>& value_scales, float* out, int64_t widest) {
  const int64_t bytes = keys.size_bytes() / std::max<size_t>(1, keys.element_count());
  if (!AreCacheArrays(keys, values, key_scales, value_scales, bytes) ||
      problem.head_dim % kMostLanes) {
    return ffi::Error::InvalidArgument("attention: shapes do not belong together");
  }
  problem.bits = 8 * bytes;
  problem.query = query.typed_data();
  problem.keys = keys.untyped_data();
  problem.values = values.untyped_data();
  const bool has_scales = key_scales.element_count() > 0;
  problem.key_scales = has_scales ? key_scales.typed_data() : nullptr;
  problem.value_scales = has_scales ? value_scales.typed_data() : nullptr;
  problem.out = out;
  auto job = std::make_shared<Job>();
  job->problem = problem;
  job->run = Choose(widest);
  job->count = problem.batch * problem.heads;
  glm_jax::DoOnThreads(pool, job, static_cast<int64_t>(keys.size_bytes()) >= kLeastShared);
  return ffi::Error::Success();
}

ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys,
                     ffi::AnyBuffer values, ffi::Buffer<ffi::S32> ranges,
                     ffi::Buffer<ffi::F32> key_scales, ffi::Buffer<ffi::F32> value_scales,
                     ffi::ResultBuffer<ffi::F32> out, int64_t widest) {
  const auto q = query.dimensions(), k = keys.dimensions();
  if (q.size() != 4 || k.size() != 4 || q[0] != k[0] || q[2] != k[1] || q[3] != k[3] ||
      static_cast<int64_t>(ranges.element_count()) != 2 * q[0] * q[1]) {
    return ffi::Error::InvalidArgument("attention: shapes do not belong together");
  }
  Problem problem = {};
  problem.batch = q[0], problem.queries = q[1], problem.heads = q[2];
  problem.length = k[2], problem.head_dim = q[3];
  problem.ranges = ranges.typed_data();
  return Finish(pool, problem, query, keys, values, key_scales, value_scales, out->typed_data(),
                widest);
}

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys,
                          ffi::AnyBuffer values, ffi::Buffer<ffi::S32> tables,
                          ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> key_scales,
                          ffi::Buffer<ffi::F32> value_scales, ffi::ResultBuffer<ffi::F32> out,
                          int64_t widest) {
  const auto q = query.dimensions(), k = keys.dimensions(), t = tables.dimensions();
  if (q.size() != 3 || k.size() != 4 || t.size() != 2 || q[1] != k[0] || q[2] != k[3] ||
      k[1] < 1 || t[0] != q[0] || static_cast<int64_t>(lengths.element_count()) != q[0]) {
    return ffi::Error::InvalidArgument("paged attention: shapes do not belong together");
  }
  Problem problem = {};
  problem.batch = q[0], problem.queries = 1, problem.heads = q[1];
  problem.length = k[2], problem.head_dim = q[2];
  problem.pages = k[1], problem.table_size = t[1];
  problem.ranges = lengths.typed_data();
  problem.tables = tables.typed_data();
  return Finish(pool, problem, query, keys, values, key_scales, value_scales, out->typed_data(),
                widest);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxAttention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("widest"));

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
                                  .Attr<int64_t>("widest"));
