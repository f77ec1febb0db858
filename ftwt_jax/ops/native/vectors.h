// Vectors as wide as the processor's.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ftwt {

// Lanes of a vector, and how many positions times vectors of filters fit into a processor's registers at once.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kPositions = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kPositions = 4, kVectors = 3;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kPositions = 6, kVectors = 4;
#else
constexpr int kLanes = 4, kPositions = 4, kVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector values) { *reinterpret_cast<Unaligned*>(to) = values; }

}  // namespace ftwt
