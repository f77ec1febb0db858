// Gradient of a 3x3 depthwise kernel: products of maps and cotangents, summed over images and positions.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace ftwt {
namespace {

constexpr int64_t kSide = 3, kTaps = kSide * kSide;
// Parts of a batch whose sums are added at the end: always as many, so that the number of threads changes no result.
constexpr int64_t kParts = 16;

struct Maps {
  int64_t height, width, channels, out_height, out_width, stride_rows, stride_columns, pad_top, pad_left;
};

template <typename Lanes>
Lanes get(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// Adds what one row of cotangents and the three rows of the map above it contribute, for as many channels as Lanes has.
template <typename Lanes>
void add_row(const Maps& maps, const float* const rows[kSide], const float* cotangents, float* sums) {
  Lanes total[kTaps];
  for (int64_t tap = 0; tap < kTaps; ++tap) total[tap] = get<Lanes>(sums + tap * maps.channels);
  for (int64_t j = 0; j < maps.out_width; ++j) {
    const Lanes cotangent = get<Lanes>(cotangents + j * maps.channels);
    const int64_t left = j * maps.stride_columns - maps.pad_left;
    if (left >= 0 && left + kSide <= maps.width) {
#pragma GCC unroll 9
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        total[tap] += get<Lanes>(rows[tap / kSide] + (left + tap % kSide) * maps.channels) * cotangent;
      }
    } else {
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const int64_t column = left + tap % kSide;
        if (column < 0 || column >= maps.width) continue;
        total[tap] += get<Lanes>(rows[tap / kSide] + column * maps.channels) * cotangent;
      }
    }
  }
  for (int64_t tap = 0; tap < kTaps; ++tap) std::memcpy(sums + tap * maps.channels, &total[tap], sizeof(Lanes));
}

void add_image(const Maps& maps, const float* map, const float* cotangents, const float* zeros, float* sums) {
  for (int64_t i = 0; i < maps.out_height; ++i, cotangents += maps.out_width * maps.channels) {
    const float* rows[kSide];
    for (int64_t a = 0; a < kSide; ++a) {
      const int64_t row = i * maps.stride_rows - maps.pad_top + a;
      rows[a] = row < 0 || row >= maps.height ? zeros : map + row * maps.width * maps.channels;
    }
    int64_t channel = 0;
    const auto next = [&](auto lanes) {
      const float* here[kSide] = {rows[0] + channel, rows[1] + channel, rows[2] + channel};
      add_row<decltype(lanes)>(maps, here, cotangents + channel, sums + channel);
      channel += sizeof lanes / sizeof(float);
    };
    while (channel + kLanes <= maps.channels) next(Vector{});
    while (channel < maps.channels) next(float{});
  }
}

ffi::Error depthwise_weight_gradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> cotangent,
                                     ffi::ResultBuffer<ffi::F32> gradient, int64_t stride_rows, int64_t stride_columns,
                                     int64_t pad_top, int64_t pad_left) {
  const auto in = x.dimensions(), out = cotangent.dimensions(), kernel = gradient->dimensions();
  const bool fits = in.size() == 4 && out.size() == 4 && kernel.size() == 4 && in[0] == out[0] && in[3] == out[3] &&
                    kernel[0] == kSide && kernel[1] == kSide && kernel[2] == 1 && kernel[3] == in[3] &&
                    stride_rows > 0 && stride_columns > 0;
  if (!fits) return ffi::Error::InvalidArgument("maps, cotangents and kernel do not fit each other");
  const Maps maps{in[1], in[2], in[3], out[1], out[2], stride_rows, stride_columns, pad_top, pad_left};
  const int64_t images = in[0], size = kTaps * maps.channels, parts = std::min(images, kParts);
  std::vector<float> sums(parts * size, 0.0f);
  const std::vector<float> zeros(maps.width * maps.channels, 0.0f);
  const bool shared = static_cast<int64_t>(cotangent.element_count()) * kTaps > kWorthSharing;
  const Team team(pool, shared ? pool.num_threads() - 1 : 0);
  team.run(parts, [&](int64_t part) {
    for (int64_t image = images * part / parts; image < images * (part + 1) / parts; ++image) {
      add_image(maps, x.typed_data() + image * in[1] * in[2] * in[3],
                cotangent.typed_data() + image * out[1] * out[2] * out[3], zeros.data(), sums.data() + part * size);
    }
  });
  float* total = gradient->typed_data();
  std::fill_n(total, size, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) total[i] += sums[part * size + i];
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace ftwt

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtwtDepthwiseWeightGradient, ftwt::depthwise_weight_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("stride_rows")
                                  .Attr<int64_t>("stride_columns")
                                  .Attr<int64_t>("pad_top")
                                  .Attr<int64_t>("pad_left"));
