// Selecting some of many channels, a vector at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "vectors.h"

namespace ftwt {

// Neighbouring channels that fit into a vector. Some of them are wanted, and packed from index `at` on.
struct Piece {
  int64_t first;
  int64_t at;
  uint32_t own;     // bit i: channel first + i belongs to this piece
  uint32_t wanted;  // bit i: it is wanted as well
};

// Cuts channels from ... to - 1 into pieces; returns how many are wanted.
inline int64_t pieces(const bool* wanted, int64_t from, int64_t to, std::vector<Piece>& found) {
  int64_t at = 0;
  found.clear();
  for (int64_t channel = from; channel < to;) {
    Piece piece{channel / kLanes * kLanes, at, 0, 0};
    for (int64_t bit = channel % kLanes; bit < kLanes && channel < to; ++bit, ++channel) {
      piece.own |= 1u << bit;
      if (wanted[channel]) {
        piece.wanted |= 1u << bit;
        ++at;
      }
    }
    found.push_back(piece);
  }
  return at;
}

// Writes the wanted channels of the piece, which starts at `from`, to packed[at ...]; may overwrite up to kLanes
// numbers from there.
inline void pack(const Piece& piece, const float* from, float* packed) {
#if defined(__AVX512F__)
  const __mmask16 wanted = piece.wanted;
  const __m512 values = _mm512_maskz_loadu_ps(wanted, from);
  _mm512_storeu_ps(packed + piece.at, _mm512_maskz_compress_ps(wanted, values));
#else
  float* to = packed + piece.at;
  for (uint32_t left = piece.wanted; left; left &= left - 1) *to++ = from[__builtin_ctz(left)];
#endif
}

// The inverse, with bias, shortcut and ReLU; zero for channels that are not wanted.
inline void unpack(const Piece& piece, const float* packed, const float* bias, const float* shortcut, bool relu,
                   float* row) {
#if defined(__AVX512F__)
  const __mmask16 own = piece.own, wanted = piece.wanted;
  __m512 values = _mm512_maskz_expand_ps(wanted, _mm512_loadu_ps(packed + piece.at));
  values = _mm512_maskz_add_ps(wanted, values, _mm512_maskz_loadu_ps(wanted, bias + piece.first));
  if (shortcut) {
    values = _mm512_maskz_add_ps(wanted, values, _mm512_maskz_loadu_ps(wanted, shortcut + piece.first));
  }
  // The instruction returns its second operand where either is NaN.
  if (relu) values = _mm512_max_ps(_mm512_setzero_ps(), values);
  _mm512_mask_storeu_ps(row + piece.first, own, values);
#else
  const float* next = packed + piece.at;
  for (int bit = 0; bit < kLanes; ++bit) {
    if (!(piece.own >> bit & 1)) continue;
    const int64_t channel = piece.first + bit;
    float value = 0;
    if (piece.wanted >> bit & 1) {
      value = *next++ + bias[channel] + (shortcut ? shortcut[channel] : 0);
      if (relu && value < 0) value = 0;
    }
    row[channel] = value;
  }
#endif
}

}  // namespace ftwt
