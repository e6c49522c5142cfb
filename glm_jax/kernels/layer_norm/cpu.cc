// Layer normalisation on CPU and its gradient, called by XLA (jax.ffi). See cpu.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "../threads.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMaxLanes = 16;
// Rows whose gradients of scale and bias are summed before those of all blocks are: sums do not
// depend on the number of threads.
constexpr int64_t kBlockRows = 32;

struct Call {
  int64_t rows, width;
  float epsilon;
  const float *x, *scale, *bias, *moments, *d_out;
  float *out, *moments_out, *d_x, *d_scale, *d_bias;
};

#define GLM_JAX_VARIANT_SOURCE "layer_norm/cpu.inc"
#include "../variants.inc"

using FloatsIn = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

ffi::Error Shape(FloatsIn x, FloatsIn scale, Call& call) {
  call.width = scale.element_count();
  if (call.width == 0 || call.width % kMaxLanes || x.dimensions().size() == 0 ||
      x.dimensions().back() != call.width) {
    return ffi::Error::InvalidArgument("layer_norm: shapes do not belong together");
  }
  call.rows = x.element_count() / call.width;
  call.x = x.typed_data(), call.scale = scale.typed_data();
  return ffi::Error::Success();
}

ffi::Error Forward(ffi::ThreadPool pool, float epsilon, int64_t max_vector_bits, FloatsIn x,
                   FloatsIn scale, FloatsIn bias, FloatsOut out, FloatsOut moments) {
  Call call = {};
  if (ffi::Error error = Shape(x, scale, call); error.failure()) return error;
  call.epsilon = epsilon, call.bias = bias.typed_data();
  call.out = out->typed_data(), call.moments_out = moments->typed_data();
  const auto row = GLM_JAX_CHOOSE(max_vector_bits, ForwardRow);
  glm_jax::ForEach(pool, call.rows, [call, row](int64_t i) { row(call, i); });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t max_vector_bits, FloatsIn x, FloatsIn scale,
                    FloatsIn moments, FloatsIn d_out, FloatsOut d_x, FloatsOut d_scale,
                    FloatsOut d_bias) {
  Call call = {};
  if (ffi::Error error = Shape(x, scale, call); error.failure()) return error;
  call.moments = moments.typed_data(), call.d_out = d_out.typed_data();
  call.d_x = d_x->typed_data();
  const int64_t blocks = (call.rows + kBlockRows - 1) / kBlockRows, line = 2 * call.width;
  auto sums = std::make_shared<std::vector<float>>(blocks * line);
  const auto row = GLM_JAX_CHOOSE(max_vector_bits, BackwardRow);
  glm_jax::ForEach(pool, blocks, [call, row, sums, line](int64_t block) {
    const int64_t end = std::min(call.rows, (block + 1) * kBlockRows);
    for (int64_t i = block * kBlockRows; i < end; ++i) row(call, i, sums->data() + block * line);
  });
  std::fill_n(d_scale->typed_data(), call.width, 0.0f);
  std::fill_n(d_bias->typed_data(), call.width, 0.0f);
  for (int64_t block = 0; block < blocks; ++block) {
    const float* from = sums->data() + block * line;
    for (int64_t i = 0; i < call.width; ++i) {
      d_scale->typed_data()[i] += from[i];
      d_bias->typed_data()[i] += from[call.width + i];
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxLayerNormForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("max_vector_bits")
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Ret<FloatsIn>()
                                  .Ret<FloatsIn>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxLayerNormBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("max_vector_bits")
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Ret<FloatsIn>()
                                  .Ret<FloatsIn>()
                                  .Ret<FloatsIn>());
