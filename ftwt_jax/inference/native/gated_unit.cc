// A gated unit as XLA calls it: gate logits, then the convolution of the filters that they turn on.

#include <algorithm>
#include <cstdint>
#include <initializer_list>
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
using Integers = ffi::Buffer<ffi::S32>;

// A larger kernel, or more rows of zeros on a side, are a mistake; sizes of up to that neither overflow nor fill the
// memory.
constexpr int64_t kMostRows = 1 << 10;

template <typename Buffer>
bool has_shape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto found = buffer.dimensions();
  return std::equal(found.begin(), found.end(), shape.begin(), shape.end());
}

template <typename Buffer>
bool within(const Buffer& numbers, int64_t first, int64_t end) {
  const int32_t* all = numbers.typed_data();
  return std::all_of(all, all + numbers.element_count(),
                     [=](int64_t number) { return first <= number && number < end; });
}

// Rows or columns of the output, or -1 where the kernel is larger than the input.
int64_t side(int64_t in, int64_t kernel, int64_t stride, int64_t before, int64_t after) {
  const int64_t room = before + in + after - kernel;
  return room < 0 ? -1 : room / stride + 1;
}

ffi::Error gated_unit(ffi::ThreadPool pool, Floats x, Floats kernel, Floats bias, Floats head_kernel, Floats head_sum,
                      Floats head_bias, Integers head_place, Integers kept, Integers source,
                      ffi::RemainingArgs shortcut, ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> logits,
                      int64_t kernel_height, int64_t kernel_width, int64_t row_stride, int64_t column_stride,
                      int64_t top, int64_t bottom, int64_t left, int64_t right, bool relu, bool depthwise,
                      int64_t left_out, bool max_pool, int64_t norm) {
  // XLA has checked ranks of no buffer, and no number: whatever is read below is checked here first.
  if (x.dimensions().size() != 4 || kernel.dimensions().size() != (depthwise ? 2 : 4) ||
      head_kernel.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("maps or weights of another rank");
  }
  if (std::min({kernel_height, kernel_width, row_stride, column_stride}) < 1 ||
      std::min({top, bottom, left, right}) < 0 ||
      std::max({kernel_height, kernel_width, top, bottom, left, right}) > kMostRows || left_out < 0 ||
      norm < static_cast<int64_t>(Norm::kNone) || norm > static_cast<int64_t>(Norm::kLayer)) {
    return ffi::Error::InvalidArgument("a setting out of range");
  }
  const auto in = x.dimensions(), weights = kernel.dimensions();
  const int64_t images = in[0], filters = bias.element_count(), all_filters = head_bias.element_count();
  const int64_t taps = kernel_height * kernel_width, rows_out = side(in[1], kernel_height, row_stride, top, bottom),
                columns_out = side(in[2], kernel_width, column_stride, left, right);
  const bool own = head_place.element_count() > 0;
  const bool kernel_fits = depthwise ? has_shape(kernel, {taps, filters})
                                     : weights[1] == taps && weights[2] == in[3] && weights[3] > 0 &&
                                           weights[3] % kBlock == 0 && weights[0] * weights[3] >= filters;
  // Without a channel, nothing says which form the head has.
  const bool rows_fit =
      in[3] == 0 ? head_kernel.dimensions()[0] == 0 : has_shape(head_kernel, {in[3], own ? 1 : all_filters});
  const bool head_fits = rows_fit && has_shape(head_sum, {all_filters}) && (!own || has_shape(head_place, {in[3]})) &&
                         has_shape(head_bias, {all_filters}) && within(head_place, 0, all_filters);
  if (!kernel_fits || !head_fits || !has_shape(bias, {filters})) {
    return ffi::Error::InvalidArgument("weights of another shape");
  }
  if (!has_shape(kept, {filters}) || !within(kept, 0, all_filters) || !has_shape(source, {filters}) ||
      (depthwise && !within(source, -1, in[3]))) {
    return ffi::Error::InvalidArgument("filters or channels that are not there");
  }
  if (!has_shape(*y, {images, rows_out, columns_out, filters}) || !has_shape(*logits, {images, all_filters})) {
    return ffi::Error::InvalidArgument("results of another shape");
  }
  const float* added = nullptr;
  if (shortcut.size()) {
    auto maps = shortcut.get<Floats>(0);
    if (maps.has_error()) return maps.error();
    if (shortcut.size() > 1 || !has_shape(*maps, {images, rows_out, columns_out, filters})) {
      return ffi::Error::InvalidArgument("a shortcut of another shape");
    }
    added = maps->typed_data();
  }
  if (!in[1] || !in[2] || in[3] + left_out < 1) {
    return ffi::Error::InvalidArgument("maps without a number");
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
                  own ? head_place.typed_data() : nullptr};
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t in_size = in[1] * in[2] * in[3], out_size = rows_out * columns_out * filters;
  // At most; usually about a quarter of these are computed.
  const int64_t products = out_size * taps * (depthwise ? 1 : in[3]) + head_kernel.element_count() * kReading;

  const Geometry geometry{in[1],   in[2],      in[3],         kernel_height, kernel_width, rows_out, columns_out,
                          filters, row_stride, column_stride, top,           bottom,       left,     right};
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
                                  .Arg<ftwt::Integers>()
                                  .Arg<ftwt::Integers>()
                                  .Arg<ftwt::Integers>()
                                  .RemainingArgs()
                                  .Ret<ftwt::Floats>()
                                  .Ret<ftwt::Floats>()
                                  .Attr<int64_t>("kernel_height")
                                  .Attr<int64_t>("kernel_width")
                                  .Attr<int64_t>("row_stride")
                                  .Attr<int64_t>("column_stride")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("bottom")
                                  .Attr<int64_t>("left")
                                  .Attr<int64_t>("right")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("depthwise")
                                  .Attr<int64_t>("left_out")
                                  .Attr<bool>("max_pool")
                                  .Attr<int64_t>("norm"));
