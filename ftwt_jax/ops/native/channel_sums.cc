// For each channel, the sums of a and of a * (b - shift) over images and positions, in one pass over both.

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

// Parts of a batch whose sums are added at the end: always as many, so that the number of threads changes no result.
constexpr int64_t kParts = 16;
// Rows that are added up in registers, and that stay in a core's first cache.
constexpr int64_t kRows = 64;

// As many channels as Lanes has.
template <typename Lanes>
void add_rows(const float* a, const float* b, const float* shift, int64_t rows, int64_t channels, float* sums,
              float* products) {
  Lanes from, sum, product;
  std::memcpy(&from, shift, sizeof from);
  std::memcpy(&sum, sums, sizeof sum);
  std::memcpy(&product, products, sizeof product);
  Lanes here{}, here_product{};
  for (int64_t row = 0; row < rows; ++row) {
    Lanes x, y;
    std::memcpy(&x, a + row * channels, sizeof x);
    std::memcpy(&y, b + row * channels, sizeof y);
    here += x;
    here_product += x * (y - from);
  }
  sum += here;
  product += here_product;
  std::memcpy(sums, &sum, sizeof sum);
  std::memcpy(products, &product, sizeof product);
}

ffi::Error channel_sums(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b,
                        ffi::Buffer<ffi::F32> shift, ffi::ResultBuffer<ffi::F32> sums,
                        ffi::ResultBuffer<ffi::F32> products) {
  const int64_t channels = shift.element_count(), size = a.element_count();
  const bool fits = channels > 0 && a.dimensions().size() == 4 && a.dimensions()[3] == channels &&
                    a.dimensions() == b.dimensions() && static_cast<int64_t>(sums->element_count()) == channels &&
                    static_cast<int64_t>(products->element_count()) == channels;
  if (!fits) return ffi::Error::InvalidArgument("maps and channels do not fit each other");
  const int64_t rows = size / channels, parts = std::max<int64_t>(1, std::min(rows / kRows, kParts));
  std::vector<float> of_parts(2 * parts * channels, 0.0f);
  const Team team(pool, size > kWorthSharing ? pool.num_threads() - 1 : 0);
  team.run(parts, [&](int64_t part) {
    float* part_sums = of_parts.data() + 2 * part * channels;
    float* part_products = part_sums + channels;
    const int64_t end = rows * (part + 1) / parts;
    for (int64_t row = rows * part / parts; row < end; row += kRows) {
      const float *x = a.typed_data() + row * channels, *y = b.typed_data() + row * channels;
      int64_t channel = 0;
      const auto next = [&](auto lanes) {
        add_rows<decltype(lanes)>(x + channel, y + channel, shift.typed_data() + channel, std::min(kRows, end - row),
                                  channels, part_sums + channel, part_products + channel);
        channel += sizeof lanes / sizeof(float);
      };
      while (channel + kLanes <= channels) next(Vector{});
      while (channel < channels) next(float{});
    }
  });
  std::fill_n(sums->typed_data(), channels, 0.0f);
  std::fill_n(products->typed_data(), channels, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    const float* part_sums = of_parts.data() + 2 * part * channels;
    for (int64_t channel = 0; channel < channels; ++channel) {
      sums->typed_data()[channel] += part_sums[channel];
      products->typed_data()[channel] += part_sums[channels + channel];
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace ftwt

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtwtChannelSums, ftwt::channel_sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
