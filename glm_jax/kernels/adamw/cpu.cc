// AdamW's update of a parameter and its moments on CPU, called by XLA (jax.ffi). See cpu.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "../threads.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMaxLanes = 16;
// Numbers whose squared changes are summed before those of all blocks are: sums do not depend on
// the number of threads.
constexpr int64_t kBlock = 8192;

struct Call {
  int64_t count;
  const float *param, *first, *second, *gradient;
  float *param_out, *first_out, *second_out;
  float factor, rate, inverse_first, inverse_second, beta1, share1, beta2, share2, epsilon,
      decay;  // `share` is 1 - beta, rounded once
  bool is_good;
};

#define GLM_JAX_VARIANT_SOURCE "adamw/cpu.inc"
#include "../variants.inc"

using FloatsIn = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

ffi::Error Update(ffi::ThreadPool pool, float beta1, float share1, float beta2, float share2,
                  float epsilon, float decay, int64_t max_vector_bits, FloatsIn param, FloatsIn first, FloatsIn second,
                  FloatsIn gradient, FloatsIn scalars, FloatsOut param_out, FloatsOut first_out,
                  FloatsOut second_out, FloatsOut squares) {
  const int64_t count = param.element_count();
  const auto differs = [count](const FloatsIn& x) {
    return static_cast<int64_t>(x.element_count()) != count;
  };
  if (count % kMaxLanes || differs(first) || differs(second) || differs(gradient) ||
      scalars.element_count() != 5) {
    return ffi::Error::InvalidArgument("adamw: shapes do not belong together");
  }
  const float* of_step = scalars.typed_data();
  const Call call = {count,
                     param.typed_data(),
                     first.typed_data(),
                     second.typed_data(),
                     gradient.typed_data(),
                     param_out->typed_data(),
                     first_out->typed_data(),
                     second_out->typed_data(),
                     of_step[0],
                     of_step[1],
                     1 / of_step[2],
                     1 / of_step[3],
                     beta1,
                     share1,
                     beta2,
                     share2,
                     epsilon,
                     decay,
                     of_step[4] != 0};
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  auto sums = std::make_shared<std::vector<float>>(blocks);
  const auto run = GLM_JAX_CHOOSE(max_vector_bits, UpdateBlock);
  glm_jax::ForEach(pool, blocks, [call, run, sums](int64_t block) {
    const int64_t begin = block * kBlock;
    (*sums)[block] = run(call, begin, std::min(call.count, begin + kBlock));
  });
  double total = 0;
  for (float sum : *sums) total += sum;
  *squares->typed_data() = static_cast<float>(total);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GlmJaxAdamW, Update,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("beta1")
                                  .Attr<float>("share1")
                                  .Attr<float>("beta2")
                                  .Attr<float>("share2")
                                  .Attr<float>("epsilon")
                                  .Attr<float>("decay")
                                  .Attr<int64_t>("max_vector_bits")
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Arg<FloatsIn>()
                                  .Ret<FloatsIn>()
                                  .Ret<FloatsIn>()
                                  .Ret<FloatsIn>()
                                  .Ret<FloatsIn>());
