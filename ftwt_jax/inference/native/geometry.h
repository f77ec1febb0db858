// The sizes of a convolution.
#pragma once

#include <cstdint>

namespace ftwt {

struct Geometry {
  int64_t height, width, inputs;
  int64_t kernel_height, kernel_width;
  int64_t out_height, out_width, filters;
  int64_t row_stride, column_stride;
  // Rows and columns of zeros around the maps.
  int64_t top, bottom, left, right;
};

}  // namespace ftwt
