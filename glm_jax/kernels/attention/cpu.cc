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

struct Problem {
  int64_t batch, queries, heads, length, head_dim, bits;
  const float* query;                      // [batch, queries, heads, head_dim]
  const void *keys, *values;               // [batch, heads, length, head_dim]
  const float *key_scales, *value_scales;  // [batch, heads, length], or null
  const int32_t* ranges;                   // [batch, queries, 2]
  float* out;                              // like query
};

// Items are the heads of each row of the batch; their queries share keys that are in cache.
template <class T, class F>
void RunItems(const Problem& p, int64_t first, int64_t last, F attend) {
  std::vector<float> scores(p.length + kMostLanes);
  for (int64_t item = first; item < last; ++item) {
    const int64_t row = item / p.heads, head = item % p.heads;
    for (int64_t i = 0; i < p.queries; ++i) {
      const int32_t* range = p.ranges + (row * p.queries + i) * 2;
      const int64_t begin = std::clamp<int64_t>(range[0], 0, p.length);
      const int64_t end = std::clamp<int64_t>(range[1], begin, p.length);
      const int64_t place = ((row * p.queries + i) * p.heads + head) * p.head_dim;
      if (begin == end) {
        std::fill(p.out + place, p.out + place + p.head_dim, 0.0f);
        continue;
      }
      const int64_t key = item * p.length + begin;
      attend(p.query + place, static_cast<const T*>(p.keys) + key * p.head_dim,
             static_cast<const T*>(p.values) + key * p.head_dim,
             p.key_scales ? p.key_scales + key : nullptr,
             p.value_scales ? p.value_scales + key : nullptr, end - begin, p.head_dim,
             scores.data(), p.out + place);
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
    return avx512::Run;
  }
  if (widest >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::Run;
  }
#endif
  return portable::Run;
}

struct Job : glm_jax::Work {
  Problem problem;
  void (*run)(const Problem&, int64_t, int64_t);
  void Run(int64_t first, int64_t last) override { run(problem, first, last); }
};

ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys,
                     ffi::AnyBuffer values, ffi::Buffer<ffi::S32> ranges,
                     ffi::Buffer<ffi::F32> key_scales, ffi::Buffer<ffi::F32> value_scales,
                     ffi::ResultBuffer<ffi::F32> out, int64_t widest) {
  const auto q = query.dimensions(), k = keys.dimensions();
  const size_t bytes = keys.size_bytes() / std::max<size_t>(1, keys.element_count());
  if (q.size() != 4 || k.size() != 4 || values.element_count() != keys.element_count() ||
      q[0] != k[0] || q[2] != k[1] || q[3] != k[3] || q[3] % kMostLanes ||
      static_cast<int64_t>(ranges.element_count()) != 2 * q[0] * q[1] ||
      key_scales.element_count() != value_scales.element_count() ||
      (key_scales.element_count() && bytes != 1) || (bytes != 1 && bytes != 2 && bytes != 4)) {
    return ffi::Error::InvalidArgument("attention: shapes do not belong together");
  }
  auto job = std::make_shared<Job>();
  const bool has_scales = key_scales.element_count() > 0;
  job->problem = {q[0], q[1], q[2], k[2], q[3], static_cast<int64_t>(8 * bytes),
                  query.typed_data(), keys.untyped_data(), values.untyped_data(),
                  has_scales ? key_scales.typed_data() : nullptr,
                  has_scales ? value_scales.typed_data() : nullptr, ranges.typed_data(),
                  out->typed_data()};
  job->run = Choose(widest);
  job->count = q[0] * q[2];
  glm_jax::DoOnThreads(pool, job, keys.size_bytes() >= kLeastShared);
  return ffi::Error::Success();
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
