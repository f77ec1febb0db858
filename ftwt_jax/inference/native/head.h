// Gate logits of a unit: pooled input channels, their norm, and the product with the head's matrix.
//
// Only the rows of live channels are read: all channels that are zero in the whole map of an image have the same
// summary, so one number and the sum of all rows stand for them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallel.h"
#include "vectors.h"

namespace ftwt {

// Added to the variance, as in gates.py.
constexpr float kNormEpsilon = 1e-5f;
// Columns of the matrix that are summed at once, and how many products take as long as reading one number of it from
// main memory.
constexpr int64_t kColumns = 8 * kLanes, kReading = 8;

// What is done with the pooled channels, in the order of `NORMS` in gates.py.
enum class Norm : int64_t { kNone, kSoftmax, kLayer };

struct Head {
  int64_t positions, channels, filters, left_out;
  bool max_pool;
  Norm norm;
  const float* kernel;   // [channels, filters]
  const float* row_sum;  // [filters], the sum of all rows, including those of channels that are left out
  const float* bias;     // [filters]
  const int32_t* place;  // [channels], the one gate that reads each channel, by kernel [channels]; or null

  // The logits of one image.
  void run(const float* x, float* logits, const Team& team) const {
    static thread_local Scratch scratch;
    float* of_rows = scratch.of(channels);
    const float of_sum = factors(x, of_rows);
    if (place) {
      for (int64_t f = 0; f < filters; ++f) logits[f] = bias[f] + of_sum * row_sum[f];
      for (int64_t c = 0; c < channels; ++c) logits[place[c]] += of_rows[c] * kernel[c];
      return;
    }
    const int64_t blocks = channels * filters * kReading < kWorthSharing ? 1 : (filters + kColumns - 1) / kColumns;
    team.run(blocks, [&](int64_t block) {
      const int64_t first = filters * block / blocks / kColumns * kColumns;
      const int64_t last = block + 1 == blocks ? filters : filters * (block + 1) / blocks / kColumns * kColumns;
      columns(of_rows, of_sum, first, last, logits);
    });
  }

 private:
  // Writes the factor of each channel's row into `summary`; returns the factor of the sum of all rows.
  float factors(const float* x, float* summary) const {
    std::copy_n(x, channels, summary);
    for (int64_t position = 1; position < positions; ++position) {
      const float* row = x + position * channels;
      if (max_pool) {
        for (int64_t c = 0; c < channels; ++c) summary[c] = summary[c] > row[c] ? summary[c] : row[c];
      } else {
        for (int64_t c = 0; c < channels; ++c) summary[c] += row[c];
      }
    }
    if (!max_pool) {
      for (int64_t c = 0; c < channels; ++c) summary[c] /= positions;
    }
    if (norm == Norm::kNone) return 0;
    if (norm == Norm::kLayer) return standardize(summary);
    float top = left_out ? 0 : summary[0];
    for (int64_t c = 0; c < channels; ++c) top = std::max(top, summary[c]);
    const float zero = std::exp(-top);
    float total = left_out * zero;
    for (int64_t c = 0; c < channels; ++c) {
      // Exactly zero for a channel that is zero, so that its row is skipped.
      summary[c] = summary[c] == 0 ? 0 : std::exp(summary[c] - top) - zero;
      total += summary[c] + zero;
    }
    const float scale = (channels + left_out) / total;
    for (int64_t c = 0; c < channels; ++c) summary[c] *= scale;
    return zero * scale;
  }

  // To mean 0 and standard deviation 1 over all channels. A channel that is zero stays zero here, and the factor that
  // is returned makes up for it.
  float standardize(float* summary) const {
    const float all = channels + left_out;
    float mean = 0;
    for (int64_t c = 0; c < channels; ++c) mean += summary[c];
    mean /= all;
    float squares = left_out * mean * mean;
    for (int64_t c = 0; c < channels; ++c) squares += (summary[c] - mean) * (summary[c] - mean);
    const float scale = 1 / std::sqrt(squares / all + kNormEpsilon);
    if (!left_out && std::find(summary, summary + channels, 0.0f) == summary + channels) {
      // No row can be skipped, and the channels may differ by much less than their mean.
      for (int64_t c = 0; c < channels; ++c) summary[c] = (summary[c] - mean) * scale;
      return 0;
    }
    for (int64_t c = 0; c < channels; ++c) summary[c] *= scale;
    return -mean * scale;
  }

  void columns(const float* factors, float rest, int64_t first, int64_t last, float* logits) const {
    for (int64_t f = first; f < last; ++f) logits[f] = bias[f] + rest * row_sum[f];
    for (; first < last; first += kColumns) {
      if (last - first >= kColumns) {
        Vector sums[8] = {};
        for (int64_t c = 0; c < channels; ++c) {
          if (factors[c] == 0) continue;
          const Vector factor = factors[c] - Vector{};
          const float* row = kernel + c * filters + first;
#pragma GCC unroll 8
          for (int v = 0; v < 8; ++v) sums[v] += factor * load(row + v * kLanes);
        }
        for (int v = 0; v < 8; ++v) store(logits + first + v * kLanes, load(logits + first + v * kLanes) + sums[v]);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        if (factors[c] == 0) continue;
        const float* row = kernel + c * filters;
        for (int64_t f = first; f < last; ++f) logits[f] += factors[c] * row[f];
      }
    }
  }
};

}  // namespace ftwt
