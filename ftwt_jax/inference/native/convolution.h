// Convolution that computes, for each image, only the filters that are on, from only the live input channels.
//
// The kernel comes in blocks of filters, [blocks, kh * kw, C, width], so that a block is read from start to end. The
// rows of an image's dead input channels are never read. Of the other rows, the columns of the filters that are on are
// packed side by side into a panel a few vectors wide, which stays in a core's cache, and multiplied with every
// position. Packing has to be worth its time: where the map has few positions, or nearly all filters are on, whole rows
// are used as they are.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "geometry.h"
#include "parallel.h"
#include "pieces.h"
#include "vectors.h"

namespace ftwt {

// Packing a vector of the kernel takes as long as multiplying it with this many positions (measured).
constexpr int64_t kPackingPositions = 16;
// Maps of at most kSlicedPositions use a panel in slices of kSlice rows, which stay in a core's first cache: packing
// competes with reading the kernel from main memory. Larger maps have too many sums for that, and reuse a whole panel
// more often.
constexpr int64_t kSlicedPositions = 64, kSlice = 64;
// The number of filters in a block of the kernel is a multiple of this.
constexpr int64_t kBlock = 16;
// Rows of the kernel between the one in use and the one being prefetched.
constexpr int kAhead = 16;

// Products of `positions` rows of `inputs` numbers under each tap with the rows of a kernel: packed ones, or, with
// `rows` and `tap_stride`, those of the kernel itself. `sums`: [positions, vectors * kLanes], new or added to.
struct Product {
  const float* const* positions;
  const int64_t* taps;
  int64_t tap_count;
  int64_t inputs;
  const float* kernel;
  const int64_t* rows;
  int64_t tap_stride;
  bool add;
  float* sums;
};

template <int kWidth, int kHeight, bool kPacked>
void multiply(const Product& product) {
  Vector sums[kHeight][kWidth] = {};
  if (product.add) {
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) sums[i][v] = load(product.sums + (i * kWidth + v) * kLanes);
    }
  }
  const float* packed = product.kernel;
  for (int64_t tap = 0; tap < product.tap_count; ++tap) {
    const float* inputs[kHeight];
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) inputs[i] = product.positions[i] + product.taps[tap];
    const float* kernel = product.kernel + tap * product.tap_stride;
    for (int64_t k = 0; k < product.inputs; ++k) {
      const float* row = packed;
      if (kPacked) {
        packed += kWidth * kLanes;
      } else {
        row = kernel + product.rows[k];
        const int64_t later = k + kAhead;
        const float* ahead =
            later < product.inputs
                ? kernel + product.rows[later]
                : kernel + product.tap_stride + product.rows[std::min(later - product.inputs, product.inputs - 1)];
#pragma GCC unroll 8
        for (int v = 0; v < kWidth; ++v) __builtin_prefetch(ahead + v * kLanes);
      }
      Vector weights[kWidth];
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) weights[v] = load(row + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kHeight; ++i) {
        const Vector input = inputs[i][k] - Vector{};
#pragma GCC unroll 8
        for (int v = 0; v < kWidth; ++v) sums[i][v] += input * weights[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) store(product.sums + (i * kWidth + v) * kLanes, sums[i][v]);
  }
}

using Multiply = void (*)(const Product&);

template <int kWidth, bool kPacked, int... kHeights>
constexpr std::array<Multiply, sizeof...(kHeights)> by_height(std::integer_sequence<int, kHeights...>) {
  return {multiply<kWidth, kHeights + 1, kPacked>...};
}

template <bool kPacked, int... kWidths>
constexpr std::array<std::array<Multiply, kPositions>, sizeof...(kWidths)> by_width(
    std::integer_sequence<int, kWidths...>) {
  return {by_height<kWidths + 1, kPacked>(std::make_integer_sequence<int, kPositions>{})...};
}

constexpr auto kPackedProducts = by_width<true>(std::make_integer_sequence<int, kVectors>{});
constexpr auto kRowProducts = by_width<false>(std::make_integer_sequence<int, 2>{});

struct Convolution : Geometry {
  bool relu;
  int64_t width_of_block;
  const float* kernel;
  const float* bias;

  int64_t positions() const { return out_height * out_width; }

  // One image.
  void run(const float* x, const bool* on, const float* shortcut, float* y, const Team& team) const {
    // Which input channels are live: a channel that is zero in the whole map adds nothing.
    std::vector<int32_t> non_zero(inputs, 0);
    for (int64_t position = 0; position < height * width; ++position) {
      const float* row = x + position * inputs;
      for (int64_t channel = 0; channel < inputs; ++channel) non_zero[channel] |= row[channel] != 0;
    }
    std::unique_ptr<bool[]> lives(new bool[inputs]);
    std::copy(non_zero.begin(), non_zero.end(), lives.get());

    // Those channels alone, with the padding written out.
    std::vector<Piece> input_pieces;
    const int64_t live = pieces(lives.get(), 0, inputs, input_pieces);
    const int64_t padded_height = top + height + bottom, padded_width = left + width + right;
    static thread_local Scratch padded_scratch;
    float* padded = padded_scratch.of(padded_height * padded_width * live + kLanes);
    std::fill_n(padded, padded_height * padded_width * live, 0.0f);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        float* to = padded + ((i + top) * padded_width + left + j) * live;
        for (const Piece& piece : input_pieces) pack(piece, x + (i * width + j) * inputs + piece.first, to);
      }
      // Packing may have written past the last of them, into the padding.
      float* behind = padded + ((i + top) * padded_width + left + width) * live;
      const int64_t behind_all = padded_height * padded_width * live - (behind - padded);
      std::fill_n(behind, std::min<int64_t>(kLanes, behind_all), 0.0f);
    }
    std::vector<int64_t> rows;
    for (int64_t channel = 0; channel < inputs; ++channel) {
      if (lives[channel]) rows.push_back(channel * width_of_block);
    }
    std::vector<int64_t> taps;
    for (int64_t i = 0; i < kernel_height; ++i) {
      for (int64_t j = 0; j < kernel_width; ++j) taps.push_back((i * padded_width + j) * live);
    }

    std::vector<const float*> corners;
    for (int64_t i = 0; i < out_height; ++i) {
      for (int64_t j = 0; j < out_width; ++j) {
        corners.push_back(padded + (i * row_stride * padded_width + j * column_stride) * live);
      }
    }

    const int64_t off = filters - std::count(on, on + filters, true);
    const bool packed = positions() * off > kPackingPositions * filters;
    const int64_t row_vectors = width_of_block % (2 * kLanes) ? 1 : 2;
    const std::vector<int64_t> cuts = packed ? panel_cuts(on) : even_cuts(row_vectors * kLanes);
    const int64_t panels = cuts.size() - 1;
    const int64_t products = kernel_height * kernel_width * live * (filters - off) * (positions() + kPackingPositions);
    // Enough parts for all threads to finish at about the same time, none so small that packing its panel is not worth
    // it.
    const bool shared = team.size() > 1 && products > kWorthSharing;
    const int64_t wanted = shared ? 4 * team.size() : 1;
    const int64_t parts =
        std::max<int64_t>(1, std::min((wanted + panels - 1) / panels, positions() / (8 * kPositions)));
    const auto task_of = [&](int64_t task) {
      const int64_t panel = task / parts, part = task % parts;
      const int64_t first = positions() * part / parts, last = positions() * (part + 1) / parts;
      std::vector<Piece> filters_on;
      const int64_t count = pieces(on, cuts[panel], cuts[panel + 1], filters_on);
      const int64_t vectors = packed ? (count + kLanes - 1) / kLanes : row_vectors;
      const int64_t tap_count = taps.size();
      const bool sliced = packed && last - first <= kSlicedPositions;
      const int64_t slice = sliced ? kSlice : std::max<int64_t>(1, live);
      const int64_t depth = packed ? (sliced ? std::min(slice, live) : tap_count * live) : 0;
      const int64_t sum_count = ((last - first) * vectors + 1) * kLanes;

      static thread_local Scratch scratch;
      float* sums = scratch.of(sum_count + depth * vectors * kLanes + kLanes);
      float* panel_rows = sums + sum_count;
      const int64_t tiles = (last - first + kPositions - 1) / kPositions;
      const auto tile_start = [&](int64_t tile) { return first + (last - first) * tile / tiles; };
      const auto multiply_all = [&](int64_t tap, int64_t tap_end, int64_t k, int64_t k_end, bool add) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t from = tile_start(tile), to = tile_start(tile + 1);
          const float* starts[kPositions];
          for (int64_t position = from; position < to; ++position) {
            starts[position - from] = corners[position] + k;
          }
          const Product product{starts,
                                taps.data() + tap,
                                tap_end - tap,
                                k_end - k,
                                packed ? panel_rows : column(cuts[panel]),
                                rows.data(),
                                inputs * width_of_block,
                                add,
                                sums + (from - first) * vectors * kLanes};
          (packed ? kPackedProducts[vectors - 1] : kRowProducts[vectors - 1])[to - from - 1](product);
        }
      };
      if (count && sliced) {
        bool add = false;
        for (int64_t tap = 0; tap < tap_count; ++tap) {
          for (int64_t k = 0; k < live; k += slice, add = true) {
            const int64_t k_end = std::min(k + slice, live);
            pack_rows(filters_on, rows, tap, tap + 1, k, k_end, vectors * kLanes, panel_rows);
            multiply_all(tap, tap + 1, k, k_end, add);
          }
        }
        if (!add) std::fill_n(sums, sum_count, 0.0f);
      } else if (count) {
        if (packed) pack_rows(filters_on, rows, 0, tap_count, 0, live, vectors * kLanes, panel_rows);
        multiply_all(0, tap_count, 0, live, false);
      }
      for (int64_t position = first; position < last; ++position) {
        const float* found = sums + (position - first) * vectors * kLanes;
        const float* added = shortcut ? shortcut + position * filters : nullptr;
        float row_sums[3 * kLanes];
        if (!packed) {
          for (const Piece& piece : filters_on) pack(piece, found + piece.first - cuts[panel], row_sums);
          found = row_sums;
        }
        for (const Piece& piece : filters_on) unpack(piece, found, bias, added, relu, y + position * filters);
      }
    };
    if (shared) {
      team.run(panels * parts, task_of);
    } else {
      for (int64_t task = 0; task < panels * parts; ++task) task_of(task);
    }
  }

 private:
  std::vector<int64_t> even_cuts(int64_t step) const {
    std::vector<int64_t> cuts;
    for (int64_t filter = 0; filter < filters; filter += step) cuts.push_back(filter);
    cuts.push_back(filters);
    return cuts;
  }

  // Cuts the filters so that about equally many in each panel are on, in whole vectors.
  std::vector<int64_t> panel_cuts(const bool* on) const {
    const int64_t count = std::count(on, on + filters, true);
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    const int64_t panels = std::max<int64_t>(1, (vectors + kVectors - 1) / kVectors);
    std::vector<int64_t> cuts{0};
    int64_t seen = 0;
    for (int64_t filter = 0; filter < filters && static_cast<int64_t>(cuts.size()) < panels; ++filter) {
      seen += on[filter];
      if (seen == vectors * static_cast<int64_t>(cuts.size()) / panels * kLanes) cuts.push_back(filter + 1);
    }
    cuts.push_back(filters);
    return cuts;
  }

  // The start of a filter's column.
  const float* column(int64_t filter) const {
    const int64_t block = filter / width_of_block;
    return kernel + block * kernel_height * kernel_width * inputs * width_of_block + filter % width_of_block;
  }

  void pack_rows(const std::vector<Piece>& filters_on, const std::vector<int64_t>& rows, int64_t tap, int64_t tap_end,
                 int64_t first, int64_t last, int64_t width, float* packed) const {
    const int64_t live = rows.size();
    std::vector<const float*> columns;
    for (const Piece& piece : filters_on) columns.push_back(column(piece.first));
    for (; tap < tap_end; ++tap) {
      const int64_t from = tap * inputs * width_of_block;
      for (int64_t k = first; k < last; ++k, packed += width) {
        const int64_t row = from + rows[k], ahead = from + rows[std::min(k + kAhead, live - 1)];
        for (size_t i = 0; i < filters_on.size(); ++i) {
          __builtin_prefetch(columns[i] + ahead);
          pack(filters_on[i], columns[i] + row, packed);
        }
      }
    }
  }
};

}  // namespace ftwt
