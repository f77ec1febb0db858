// Gradient of the kernel of a convolution with few channels: for each pixel of the kernel, the matrix product of maps
// and cotangents, summed over images and positions. Nothing is copied or transposed.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace ftwt {
namespace {

// Parts of a batch whose sums are added at the end: always as many, so that the number of threads changes no result.
constexpr int64_t kParts = 16;
// Channels times vectors of filters whose sums fit into a processor's registers.
constexpr int kChannels = 6, kFilterVectors = 2;
// About how many positions of both maps stay in a core's first cache.
constexpr int64_t kPositionsAtOnce = 128;

// Some rows and columns of a map and of its cotangents, at the first channel and filter of a tile.
struct Tile {
  const float *x, *cotangent;
  int64_t rows, columns, x_row, x_column, cotangent_row, filters;
  float* sums;  // [channels, filters]
};

template <typename Lanes, int kWidth, int kHeight>
void multiply(const Tile& tile) {
  constexpr int64_t kEach = sizeof(Lanes) / sizeof(float);
  Lanes sums[kHeight][kWidth];
#pragma GCC unroll 8
  for (int c = 0; c < kHeight; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) std::memcpy(&sums[c][v], tile.sums + c * tile.filters + v * kEach, sizeof(Lanes));
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    const float *x = tile.x + i * tile.x_row, *cotangent = tile.cotangent + i * tile.cotangent_row;
    for (int64_t j = 0; j < tile.columns; ++j, x += tile.x_column, cotangent += tile.filters) {
      Lanes right[kWidth];
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) std::memcpy(&right[v], cotangent + v * kEach, sizeof(Lanes));
#pragma GCC unroll 8
      for (int c = 0; c < kHeight; ++c) {
        const Lanes left = x[c] - Lanes{};
#pragma GCC unroll 8
        for (int v = 0; v < kWidth; ++v) sums[c][v] += left * right[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kHeight; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) std::memcpy(tile.sums + c * tile.filters + v * kEach, &sums[c][v], sizeof(Lanes));
  }
}

using Multiply = void (*)(const Tile&);

template <typename Lanes, int kWidth, int... kHeights>
constexpr std::array<Multiply, sizeof...(kHeights)> by_height(std::integer_sequence<int, kHeights...>) {
  return {multiply<Lanes, kWidth, kHeights + 1>...};
}

constexpr auto kHeights = std::make_integer_sequence<int, kChannels>{};
constexpr auto kWide = by_height<Vector, kFilterVectors>(kHeights);
constexpr auto kVector = by_height<Vector, 1>(kHeights);
constexpr auto kSingle = by_height<float, 1>(kHeights);

struct Maps {
  int64_t height, width, channels, out_height, out_width, filters, kernel_height, kernel_width;
  int64_t stride_rows, stride_columns, pad_top, pad_left;

  // The outputs [first, second) of 0 ... outputs - 1 that see a pixel of the input through this pixel of the kernel.
  static std::pair<int64_t, int64_t> seen(int64_t outputs, int64_t length, int64_t tap, int64_t stride, int64_t pad) {
    const int64_t first = std::max<int64_t>(0, (pad - tap + stride - 1) / stride);
    const int64_t reach = length - 1 + pad - tap;
    return {first, reach < 0 ? 0 : std::min(outputs, reach / stride + 1)};
  }

  void add_image(const float* x, const float* cotangents, float* sums) const {
    const int64_t at_once = std::max<int64_t>(1, kPositionsAtOnce / out_width);
    for (int64_t from = 0; from < out_height; from += at_once) {
      for (int64_t tap = 0; tap < kernel_height * kernel_width; ++tap) {
        const int64_t a = tap / kernel_width, b = tap % kernel_width;
        auto [row, row_end] = seen(out_height, height, a, stride_rows, pad_top);
        const auto [column, column_end] = seen(out_width, width, b, stride_columns, pad_left);
        row = std::max(row, from);
        row_end = std::min(row_end, from + at_once);
        if (row >= row_end || column >= column_end) continue;
        const int64_t x_row = row * stride_rows + a - pad_top, x_column = column * stride_columns + b - pad_left;
        const Tile whole{x + (x_row * width + x_column) * channels,
                         cotangents + (row * out_width + column) * filters,
                         row_end - row,
                         column_end - column,
                         stride_rows * width * channels,
                         stride_columns * channels,
                         out_width * filters,
                         filters,
                         sums + tap * channels * filters};
        add_tiles(whole);
      }
    }
  }

  void add_tiles(const Tile& whole) const {
    for (int64_t filter = 0; filter < filters;) {
      const int64_t left = filters - filter;
      const bool wide = left >= kFilterVectors * kLanes, vector = left >= kLanes;
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        Tile tile = whole;
        tile.x += channel;
        tile.cotangent += filter;
        tile.sums += channel * filters + filter;
        const int64_t count = std::min<int64_t>(kChannels, channels - channel);
        (wide ? kWide : vector ? kVector : kSingle)[count - 1](tile);
      }
      filter += wide ? kFilterVectors * kLanes : vector ? kLanes : 1;
    }
  }
};

ffi::Error weight_gradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> cotangent,
                           ffi::ResultBuffer<ffi::F32> gradient, int64_t stride_rows, int64_t stride_columns,
                           int64_t pad_top, int64_t pad_left) {
  const auto in = x.dimensions(), out = cotangent.dimensions(), kernel = gradient->dimensions();
  const bool fits = in.size() == 4 && out.size() == 4 && kernel.size() == 4 && in[0] == out[0] && kernel[2] == in[3] &&
                    kernel[3] == out[3] && stride_rows > 0 && stride_columns > 0 && pad_top >= 0 && pad_left >= 0 &&
                    out[2] > 0;
  if (!fits) return ffi::Error::InvalidArgument("maps, cotangents and kernel do not fit each other");
  const Maps maps{in[1],     in[2],     in[3],       out[1],         out[2],  out[3],
                  kernel[0], kernel[1], stride_rows, stride_columns, pad_top, pad_left};
  const int64_t images = in[0], size = gradient->element_count(), parts = std::min(images, kParts);
  std::vector<float> sums(parts * size, 0.0f);
  const bool shared = static_cast<int64_t>(cotangent.element_count()) * kernel[0] * kernel[1] * in[3] > kWorthSharing;
  const Team team(pool, shared ? pool.num_threads() - 1 : 0);
  team.run(parts, [&](int64_t part) {
    for (int64_t image = images * part / parts; image < images * (part + 1) / parts; ++image) {
      maps.add_image(x.typed_data() + image * in[1] * in[2] * in[3],
                     cotangent.typed_data() + image * out[1] * out[2] * out[3], sums.data() + part * size);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtwtWeightGradient, ftwt::weight_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("stride_rows")
                                  .Attr<int64_t>("stride_columns")
                                  .Attr<int64_t>("pad_top")
                                  .Attr<int64_t>("pad_left"));
