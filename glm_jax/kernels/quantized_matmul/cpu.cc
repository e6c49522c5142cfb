// Products with weights of 4, 8, 16 or 32 bits on CPU, called by XLA (jax.ffi). See cpu.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#endif

#include "../threads.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kColumns = 16;  // of a strip
constexpr int64_t kLine = 64;     // bytes: 16 lanes of 32 bits
constexpr int64_t kStep = 8;      // inputs taken at once
constexpr int64_t kRange = 2048;  // inputs whose weights stay in cache for all rows
constexpr int64_t kAhead = 4096;  // bytes fetched ahead: the hardware stops at a page's end
constexpr int64_t kMinSharedBytes = 1 << 16;  // of weights, that are worth waking a thread
constexpr int64_t kMaxPart = 256;  // inputs whose sum takes on the offset of all values

struct Product {
  int64_t rows, inputs, outputs, padded_outputs, bits;
  int64_t group;  // inputs that share a scale
  int64_t part;   // inputs that are summed before they are scaled
  float zero;     // what is stored for a weight of zero
  const int8_t* values;
  const float *scales, *zeros;  // [groups, padded_outputs]; zeros may be null
  float* out;
  // Prepared activations, blocks of rows after one another, and by part: sums and scales.
  float *x, *x_sums, *x_scales;
  int8_t* x_integers;
};

// Adds a strip's results to a row of the output; the first ones overwrite what is there.
inline void AddTo(const Product& p, int64_t strip, int64_t row, bool is_first,
                  const float* totals) {
  float* out = p.out + row * p.outputs + strip * kColumns;
  const int64_t columns = std::min(kColumns, p.outputs - strip * kColumns);
  for (int64_t i = 0; i < columns; ++i) out[i] = is_first ? totals[i] : out[i] + totals[i];
}

// An instruction set's way to prepare a block of rows, and to multiply it with a strip.
struct Variant {
  int64_t max_rows;
  void (*prepare)(Product& p, const float* x, int64_t first_row, int64_t rows);
  void (*run)(const Product& p, int64_t strip, int64_t first_row, int64_t rows, int64_t begin,
              int64_t end);
};

#define GLM_JAX_NEEDS_VNNI 1
#define GLM_JAX_VARIANT_SOURCE "quantized_matmul/cpu_integers.inc"
#include "../variants.inc"

struct Job : glm_jax::Work {
  Variant variant;
  Product product;
  const float* input;
  bool with_integers;
  std::vector<float> floats;
  std::vector<int8_t> integers;

  // Rows in as few blocks as registers allow, all of one size or one less.
  template <class F>
  void ForRowBlocks(F f) {
    const int64_t rows = product.rows;
    const int64_t blocks = (rows + variant.max_rows - 1) / variant.max_rows;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = rows * i / blocks;
      f(first, rows * (i + 1) / blocks - first);
    }
  }

  void Prepare() override {
    Product& p = product;
    const int64_t size = p.rows * p.inputs, sums = size / p.part;
    floats.resize(2 * sums + (with_integers ? 0 : size));
    p.x_sums = floats.data();
    p.x_scales = p.x_sums + sums;
    p.x = p.x_scales + sums;
    if (with_integers) integers.resize(size);
    p.x_integers = integers.data();
    ForRowBlocks([&](int64_t first, int64_t rows) { variant.prepare(p, input, first, rows); });
  }

  void Run(int64_t first, int64_t last) override {  // strips
    const int64_t range = std::max<int64_t>(1, kRange / product.part) * product.part;
    for (int64_t strip = first; strip < last; ++strip) {
      for (int64_t k = 0; k < product.inputs; k += range) {
        ForRowBlocks([&](int64_t first_row, int64_t rows) {
          variant.run(product, strip, first_row, rows, k, std::min(k + range, product.inputs));
        });
      }
    }
  }
};

ffi::Error QuantizedMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                           ffi::Buffer<ffi::S8> values, ffi::Buffer<ffi::F32> scales,
                           ffi::Buffer<ffi::F32> zeros, ffi::ResultBuffer<ffi::F32> out,
                           int64_t bits, int64_t activation_bits, int64_t max_vector_bits) {
  const auto x_shape = x.dimensions(), out_shape = out->dimensions();
  const auto scales_shape = scales.dimensions();
  if (x_shape.size() != 2 || out_shape.size() != 2 || scales_shape.size() != 2) {
    return ffi::Error::InvalidArgument("quantized_matmul takes matrices");
  }
  auto job = std::make_shared<Job>();
  Product& p = job->product;
  p.rows = x_shape[0], p.inputs = x_shape[1], p.outputs = out_shape[1];
  p.padded_outputs = scales_shape[1], p.bits = bits, p.group = p.inputs / scales_shape[0];
  const bool integers = activation_bits == 8;
  const int64_t bytes = p.padded_outputs * p.inputs * bits / 8;
  if (static_cast<int64_t>(values.element_count()) != bytes || p.outputs > p.padded_outputs ||
      p.padded_outputs % kColumns != 0 || p.inputs % (scales_shape[0] * kStep) != 0 ||
      (zeros.element_count() && zeros.element_count() != scales.element_count()) ||
      (bits != 4 && bits != 8 && (integers || (bits != 16 && bits != 32)))) {
    return ffi::Error::InvalidArgument("quantized_matmul: shapes do not belong together");
  }
  p.part = integers ? std::gcd(p.group, int64_t{64}) : p.group;
  while (p.part > kMaxPart && p.part % (2 * kStep) == 0) p.part /= 2;
  p.zero = bits < 16 ? static_cast<float>(1 << (bits - 1)) : 0;
  p.values = values.typed_data();
  p.scales = scales.typed_data();
  p.zeros = zeros.element_count() ? zeros.typed_data() : nullptr;
  p.out = out->typed_data();
  job->input = x.typed_data(), job->with_integers = integers;
  job->count = p.padded_outputs / kColumns;
  job->variant = integers ? GLM_JAX_CHOOSE(max_vector_bits, kIntegers)
                          : GLM_JAX_CHOOSE(max_vector_bits, kFloats);
  glm_jax::RunOnThreads(pool, job, bytes >= kMinSharedBytes);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxQuantizedMatmul, QuantizedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("activation_bits")
                                  .Attr<int64_t>("max_vector_bits"));
