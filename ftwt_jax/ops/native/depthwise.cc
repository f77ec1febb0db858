// Depthwise convolution of maps, with a stride, or of maps spread apart, as in its gradient for the maps.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace ftwt {
namespace {

// A pixel of the input under one of the kernel, both at their first channel.
struct Tap {
  const float *x, *kernel;
};

// The row or column of the input at this place of the output, through this pixel of the kernel; -1: zeros.
int64_t place(int64_t at, int64_t tap, int64_t stride, int64_t dilation, int64_t pad, int64_t length) {
  const int64_t spread = at * stride + tap - pad;
  if (spread < 0 || spread % dilation) return -1;
  return spread / dilation < length ? spread / dilation : -1;
}

template <int kTaps>
void add_up(const Tap* taps, int64_t count, int64_t channels, float* y) {
  const int64_t tap_count = kTaps ? kTaps : count;
  int64_t channel = 0;
  for (; channel + kLanes <= channels; channel += kLanes) {
    Vector sum = {};
#pragma GCC unroll 9
    for (int64_t tap = 0; tap < tap_count; ++tap) sum += load(taps[tap].x + channel) * load(taps[tap].kernel + channel);
    store(y + channel, sum);
  }
  for (; channel < channels; ++channel) {
    float sum = 0;
    for (int64_t tap = 0; tap < tap_count; ++tap) sum += taps[tap].x[channel] * taps[tap].kernel[channel];
    y[channel] = sum;
  }
}

ffi::Error depthwise(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                     ffi::ResultBuffer<ffi::F32> y, int64_t stride_rows, int64_t stride_columns, int64_t dilation_rows,
                     int64_t dilation_columns, int64_t pad_top, int64_t pad_left) {
  const auto in = x.dimensions(), weights = kernel.dimensions(), out = y->dimensions();
  const bool fits = in.size() == 4 && weights.size() == 4 && out.size() == 4 && in[0] == out[0] && in[3] == out[3] &&
                    weights[2] == 1 && weights[3] == in[3] && stride_rows > 0 && stride_columns > 0 &&
                    dilation_rows > 0 && dilation_columns > 0;
  if (!fits) return ffi::Error::InvalidArgument("maps and kernel do not fit each other");
  const int64_t channels = in[3], images = in[0];
  const bool shared = static_cast<int64_t>(y->element_count()) * weights[0] * weights[1] > kWorthSharing;
  const Team team(pool, shared ? pool.num_threads() - 1 : 0);
  team.run(images, [&](int64_t image) {
    const float* map = x.typed_data() + image * in[1] * in[2] * channels;
    float* to = y->typed_data() + image * out[1] * out[2] * channels;
    std::vector<Tap> taps(weights[0] * weights[1]);
    for (int64_t i = 0; i < out[1]; ++i) {
      for (int64_t j = 0; j < out[2]; ++j, to += channels) {
        int64_t count = 0;
        for (int64_t a = 0; a < weights[0]; ++a) {
          const int64_t row = place(i, a, stride_rows, dilation_rows, pad_top, in[1]);
          if (row < 0) continue;
          for (int64_t b = 0; b < weights[1]; ++b) {
            const int64_t column = place(j, b, stride_columns, dilation_columns, pad_left, in[2]);
            if (column < 0) continue;
            taps[count++] = {map + (row * in[2] + column) * channels,
                             kernel.typed_data() + (a * weights[1] + b) * channels};
          }
        }
        (count == 9 ? add_up<9> : add_up<0>)(taps.data(), count, channels, to);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace ftwt

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtwtDepthwise, ftwt::depthwise,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("stride_rows")
                                  .Attr<int64_t>("stride_columns")
                                  .Attr<int64_t>("dilation_rows")
                                  .Attr<int64_t>("dilation_columns")
                                  .Attr<int64_t>("pad_top")
                                  .Attr<int64_t>("pad_left"));
