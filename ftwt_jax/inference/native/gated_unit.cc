// A gated unit as XLA calls it: gate logits, then the convolution of the filters that they turn on.

#include <cstdint>
#include <memory>

#include "convolution.h"
#include "depthwise.h"
#include "geometry.h"
#include "head.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace ftwt {
namespace {

using Floats = ffi::Buffer<ffi::F32>;

ffi::Error gated_unit(ffi::ThreadPool pool, Floats x, Floats kernel, Floats bias, Floats head_kernel, Floats head_sum,
                      Floats head_bias, ffi::Buffer<ffi::S32> head_place, ffi::Buffer<ffi::S32> kept,
                      ffi::Buffer<ffi::S32> source, ffi::RemainingArgs shortcut, ffi::ResultBuffer<ffi::F32> y,
                      ffi::ResultBuffer<ffi::F32> logits, int64_t kernel_height, int64_t kernel_width, int64_t stride,
                      int64_t pad, bool relu, bool depthwise, int64_t left_out, bool max_pool, int64_t norm) {
  const auto in = x.dimensions(), weights = kernel.dimensions(), out = y->dimensions();
  const int64_t images = in[0], filters = out[3], all_filters = head_bias.element_count();
  const bool fits = depthwise ? weights.size() == 2 && weights[0] == kernel_height * kernel_width
                              : weights.size() == 4 && weights[1] == kernel_height * kernel_width &&
                                    weights[2] == in[3] && weights[3] % kBlock == 0;
  if (!fits || static_cast<int64_t>(kept.element_count()) != filters) {
    return ffi::Error::InvalidArgument("weights of another shape");
  }
  const Head head{in[1] * in[2],
                  in[3],
                  all_filters,
                  left_out,
                  max_pool,
                  static_cast<Norm>(norm),
                  head_kernel.typed_data(),
                  head_sum.typed_data(),
                  head_bias.typed_data(),
                  head_place.element_count() ? head_place.typed_data() : nullptr};
  const float* added = nullptr;
  if (shortcut.size()) {
    auto maps = shortcut.get<Floats>(0);
    if (maps.has_error()) return maps.error();
    added = maps->typed_data();
  }
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t in_size = in[1] * in[2] * in[3], out_size = out[1] * out[2] * out[3];
  const int64_t taps = kernel_height * kernel_width * (depthwise ? 1 : in[3]);
  // At most; usually about a quarter of these are computed.
  const int64_t products = out_size * taps + head_kernel.element_count() * kReading;

  const Geometry geometry{in[1], in[2], in[3], kernel_height, kernel_width, out[1], out[2], out[3], stride, pad};
  const auto run = [&](int64_t image, const Team& team) {
    const float* maps = x.typed_data() + image * in_size;
    float* gate_logits = logits->typed_data() + image * all_filters;
    head.run(maps, gate_logits, team);
    std::unique_ptr<bool[]> on(new bool[filters]);
    for (int64_t filter = 0; filter < filters; ++filter) on[filter] = gate_logits[kept.typed_data()[filter]] > 0;
    float* result = y->typed_data() + image * out_size;
    const float* addend = added ? added + image * out_size : nullptr;
    if (depthwise) {
      const Depthwise convolution{geometry, relu, kernel.typed_data(), bias.typed_data(), source.typed_data()};
      convolution.run(maps, on.get(), addend, result, team);
    } else {
      const Convolution convolution{geometry, relu, weights[3], kernel.typed_data(), bias.typed_data()};
      convolution.run(maps, on.get(), addend, result, team);
    }
  };
  const bool by_image = images >= 2 * threads;
  const bool shared = products * (by_image ? images : 1) > 4 * kWorthSharing;
  const Team team(pool, shared ? threads - 1 : 0), alone(pool, 0);
  if (by_image) {
    team.run(images, [&](int64_t image) { run(image, alone); });
  } else {
    for (int64_t image = 0; image < images; ++image) run(image, team);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace ftwt

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtwtGatedUnit, ftwt::gated_unit,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ftwt::Floats>()
                                  .Arg<ftwt::Floats>()
                                  .Arg<ftwt::Floats>()
                                  .Arg<ftwt::Floats>()
                                  .Arg<ftwt::Floats>()
                                  .Arg<ftwt::Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ftwt::Floats>()
                                  .Ret<ftwt::Floats>()
                                  .Attr<int64_t>("kernel_height")
                                  .Attr<int64_t>("kernel_width")
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("pad")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("depthwise")
                                  .Attr<int64_t>("left_out")
                                  .Attr<bool>("max_pool")
                                  .Attr<int64_t>("norm"));
