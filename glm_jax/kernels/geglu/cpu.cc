// GeGLU on CPU and its gradient, called by XLA (jax.ffi). See cpu.py.

#include <cstdint>
#include <utility>

#include "../threads.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMaxLanes = 16;

struct Call {
  int64_t rows, width;
  const float *hidden, *d_out;
  float *out, *d_hidden;
};

#define GLM_JAX_VARIANT_SOURCE "geglu/cpu.inc"
#include "../variants.inc"

using FloatsIn = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

ffi::Error Start(ffi::ThreadPool pool, FloatsIn hidden, int64_t gated, Call call,
                 void (*run)(const Call&, int64_t)) {
  const auto shape = hidden.dimensions();
  if (shape.size() < 2 || shape[shape.size() - 2] != 2 || shape.back() == 0 ||
      shape.back() % kMaxLanes || gated * 2 != static_cast<int64_t>(hidden.element_count())) {
    return ffi::Error::InvalidArgument("geglu: shapes do not belong together");
  }
  call.width = shape.back(), call.rows = gated / call.width;
  call.hidden = hidden.typed_data();
  glm_jax::ForEach(pool, call.rows, [call, run](int64_t row) { run(call, row); });
  return ffi::Error::Success();
}

ffi::Error Forward(ffi::ThreadPool pool, int64_t max_vector_bits, FloatsIn hidden, FloatsOut out) {
  Call call = {};
  call.out = out->typed_data();
  return Start(pool, hidden, out->element_count(), call,
               GLM_JAX_CHOOSE(max_vector_bits, ForwardRow));
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t max_vector_bits, FloatsIn hidden, FloatsIn d_out,
                    FloatsOut d_hidden) {
  Call call = {};
  call.d_out = d_out.typed_data(), call.d_hidden = d_hidden->typed_data();
  return Start(pool, hidden, d_out.element_count(), call,
               GLM_JAX_CHOOSE(max_vector_bits, BackwardRow));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxGegluForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("max_vector_bits")
                                  .Arg<FloatsIn>()
                                  .Ret<FloatsIn>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxGegluBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("max_vector_bits")
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Ret<FloatsIn>());
