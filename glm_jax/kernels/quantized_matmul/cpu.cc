// Products with quantised weights on CPU, called by XLA (jax.ffi). See cpu.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GLM_JAX_X86_VARIANTS 1
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kColumns = 16;  // of a strip

struct Shape {
  int64_t rows, inputs, outputs, padded_outputs, groups, bits;
};

using RunFunction = void (*)(const float*, const int8_t*, const float*, float*, const Shape&,
                             int64_t);

namespace portable {
#include "cpu_kernel.inc"
}

#ifdef GLM_JAX_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cpu_kernel.inc"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
namespace avx512 {
#include "cpu_kernel.inc"
}
#pragma GCC pop_options
#endif

// `widest` caps the choice, so that tests can run each variant that the machine has.
RunFunction Choose(int64_t widest) {
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

// Work that threads take pieces of until none is left.
struct Job {
  RunFunction run;
  Shape shape;
  const float* x;
  const int8_t* values;
  const float* scales;
  float* out;
  int64_t strips, piece;
  std::atomic<int64_t> next{0}, finished{0};

  void Work() {
    const int64_t strip_bytes = shape.inputs * shape.bits / 8 * kColumns;
    for (int64_t first; (first = next.fetch_add(piece)) < strips;) {
      const int64_t last = std::min(first + piece, strips);
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t column = strip * kColumns;
        run(x, values + strip * strip_bytes, scales + column, out + column, shape,
            std::min(kColumns, shape.outputs - column));
      }
      finished.fetch_add(last - first, std::memory_order_release);
    }
  }
};

ffi::Error QuantizedMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                           ffi::Buffer<ffi::S8> values, ffi::Buffer<ffi::F32> scales,
                           ffi::ResultBuffer<ffi::F32> out, int64_t bits, int64_t widest) {
  const auto x_shape = x.dimensions(), out_shape = out->dimensions();
  const auto scales_shape = scales.dimensions();
  if (x_shape.size() != 2 || out_shape.size() != 2 || scales_shape.size() != 2) {
    return ffi::Error::InvalidArgument("quantized_matmul takes matrices");
  }
  auto job = std::make_shared<Job>();
  job->shape = {x_shape[0],      x_shape[1],      out_shape[1],
                scales_shape[1], scales_shape[0], bits};
  const Shape& shape = job->shape;
  job->strips = shape.padded_outputs / kColumns;
  const int64_t bytes = job->strips * kColumns * shape.inputs * bits / 8;
  if (static_cast<int64_t>(values.element_count()) != bytes || shape.outputs > shape.padded_outputs ||
      shape.inputs % (shape.groups * 32 / bits) != 0) {
    return ffi::Error::InvalidArgument("quantized_matmul: shapes do not belong together");
  }
  job->run = Choose(widest);
  job->x = x.typed_data();
  job->values = values.typed_data();
  job->scales = scales.typed_data();
  job->out = out->typed_data();
  // Small pieces even out threads that start late; tiny products are not worth a thread.
  const int64_t helpers = bytes < (1 << 16) ? 0 : pool.num_threads() - 1;
  job->piece = std::max<int64_t>(1, job->strips / (8 * (helpers + 1)));
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([job] { job->Work(); });
  }
  job->Work();
  // A helper that has not started by now finds nothing left: only pieces count.
  while (job->finished.load(std::memory_order_acquire) < job->strips) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxQuantizedMatmul, QuantizedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("widest"));
