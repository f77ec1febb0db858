// Depthwise convolution of the filters that are on, for one image.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "geometry.h"
#include "parallel.h"
#include "pieces.h"
#include "vectors.h"

namespace ftwt {

struct Depthwise : Geometry {
  bool relu;
  const float* kernel;    // [kernel_height * kernel_width, filters]
  const float* bias;      // [filters]
  const int32_t* source;  // [filters], the input channel of each, or -1 if that is zero in every map

  void run(const float* x, const bool* on, const float* shortcut, float* y, const Team& team) const {
    std::vector<Piece> found;
    const int64_t count = pieces(on, 0, filters, found);
    const int64_t vectors = (count + kLanes - 1) / kLanes, row = vectors * kLanes;
    const int64_t padded_height = top + height + bottom, padded_width = left + width + right,
                  taps = kernel_height * kernel_width;
    static thread_local Scratch scratch;
    const int64_t padded_size = padded_height * padded_width * row;
    float* padded = scratch.of(padded_size + (taps + 1) * row + 2 * kLanes);
    float* packed_kernel = padded + padded_size + kLanes;
    std::fill_n(padded, padded_size, 0.0f);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (const Piece& piece : found) pack(piece, kernel + tap * filters + piece.first, packed_kernel + tap * row);
    }
    // Filters in the order of the input channels, which they nearly always have, are packed whole vectors at a time.
    bool in_order = inputs == filters;
    for (int64_t filter = 0; filter < filters; ++filter) in_order = in_order && source[filter] == filter;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const float* from = x + (i * width + j) * inputs;
        float* to = padded + ((i + top) * padded_width + left + j) * row;
        if (in_order) {
          // The last vector may run past the row, over numbers that are then written, or set to zero, below.
          for (const Piece& piece : found) pack(piece, from + piece.first, to);
        } else {
          for (int64_t filter = 0; filter < filters; ++filter) {
            if (on[filter]) *to++ = source[filter] < 0 ? 0 : from[source[filter]];
          }
        }
      }
      if (in_order) {
        float* behind = padded + ((i + top) * padded_width + left + width) * row;
        std::fill_n(behind, std::min<int64_t>(kLanes, padded + padded_size - behind), 0.0f);
      }
    }
    // Numbers that are read from the first cache and used once take several times as long as products of a matrix.
    const bool shared = 4 * out_height * out_width * row * taps > kWorthSharing;
    const int64_t parts = shared ? std::min(2 * team.size(), out_height) : 1;
    team.run(parts, [&](int64_t part) {
      static thread_local Scratch sum_scratch;
      float* sums = sum_scratch.of(out_width * row + kLanes);
      for (int64_t i = out_height * part / parts; i < out_height * (part + 1) / parts; ++i) {
        for (int64_t v = 0; v < row; v += kLanes) {
          const float* corner = padded + i * row_stride * padded_width * row + v;
          if (kernel_height == 3 && kernel_width == 3) {
            multiply_row<3>(corner, padded_width * row, row, packed_kernel + v, sums + v);
          } else {
            multiply_row<0>(corner, padded_width * row, row, packed_kernel + v, sums + v);
          }
        }
        for (int64_t j = 0; j < out_width; ++j) {
          const int64_t at = (i * out_width + j) * filters;
          const float* added = shortcut ? shortcut + at : nullptr;
          for (const Piece& piece : found) unpack(piece, sums + j * row, bias, added, relu, y + at);
        }
      }
    });
  }

 private:
  // One vector of filters along one row of the output. kSide: the side of the kernel, or 0 if only known at run time.
  template <int kSide>
  void multiply_row(const float* from, int64_t line, int64_t row, const float* weights, float* sums) const {
    const int64_t rows = kSide ? kSide : kernel_height, columns = kSide ? kSide : kernel_width;
    for (int64_t j = 0; j < out_width; ++j) {
      const float* corner = from + j * column_stride * row;
      Vector sum = {};
      for (int64_t a = 0; a < rows; ++a) {
        for (int64_t b = 0; b < columns; ++b) {
          sum += load(corner + a * line + b * row) * load(weights + (a * columns + b) * row);
        }
      }
      store(sums + j * row, sum);
    }
  }
};

}  // namespace ftwt
