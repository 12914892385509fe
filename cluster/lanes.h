// Sixteen numbers at a time, in float32 whatever they are stored in; for kernels of native.py.
//
// Vectors of the compiler, so that one text serves AVX-512, AVX2 and NEON.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int kLanes = 16;
constexpr int kLine = 64;  // bytes that come from memory together
using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));

struct BFloat16 {
  uint16_t bits;
};

inline Floats widened(const float* source) {
  Floats lanes;
  std::memcpy(&lanes, source, sizeof lanes);
  return lanes;
}

// (GCC widens a vector in two halves, if it is not told how.)
inline Floats widened(const BFloat16* source) {
#ifdef __AVX512F__
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  uint16_t halves __attribute__((vector_size(kLanes * 2)));
  std::memcpy(&halves, source, sizeof halves);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
#endif
}

#ifdef __FLT16_MANT_DIG__  // not before GCC 12
// (GCC converts a vector of _Float16 one by one, where no AVX512-FP16 is.)
inline Floats widened(const _Float16* source) {
#ifdef __AVX512F__
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#else
  _Float16 halves __attribute__((vector_size(kLanes * 2)));
  std::memcpy(&halves, source, sizeof halves);
  return __builtin_convertvector(halves, Floats);
#endif
}
#endif

// Rounded to nearest, ties to even.
inline void narrow(float* target, Floats lanes) { std::memcpy(target, &lanes, sizeof lanes); }

inline void narrow(BFloat16* target, Floats lanes) {
#ifdef __AVX512BF16__  // (which takes numbers below 1e-38 for zero)
  const __m256bh halves = _mm512_cvtneps_pbh(lanes);
  std::memcpy(target, &halves, sizeof halves);
#else
  const auto bits = reinterpret_cast<Words>(lanes);
  const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words finite = lanes == lanes ? nearest : Words{} + 0x7fc0;
  using Halves = uint16_t __attribute__((vector_size(kLanes * 2)));
  const Halves halves = __builtin_convertvector(finite, Halves);
  std::memcpy(target, &halves, sizeof halves);
#endif
}

#ifdef __FLT16_MANT_DIG__
inline void narrow(_Float16* target, Floats lanes) {
#ifdef __AVX512F__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
#else
  using Halves = _Float16 __attribute__((vector_size(kLanes * 2)));
  const Halves halves = __builtin_convertvector(lanes, Halves);
  std::memcpy(target, &halves, sizeof halves);
#endif
}
#endif

// As they are once they have been stored.
template <typename T>
inline Floats rounded(Floats lanes) {
  T stored[kLanes];
  narrow(stored, lanes);
  return widened(stored);
}

// The lanes of two vectors in another order: those of `b` count from sixteen.
#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// The first `count` of sixteen, zeros behind them.
template <typename T>
inline Floats load(const T* source, int64_t count = kLanes) {
  if (count >= kLanes) return widened(source);
  T some[kLanes] = {};
  std::memcpy(some, source, count * sizeof(T));
  return widened(some);
}

template <typename T>
inline void store(T* target, Floats lanes, int64_t count = kLanes) {
  if (count >= kLanes) return narrow(target, lanes);
  T some[kLanes];
  narrow(some, lanes);
  std::memcpy(target, some, count * sizeof(T));
}

// The sums of eight vectors, in the first eight lanes: a tree, in which vectors share lanes.
inline Floats sum_each(const Floats* v) {
  Floats half[4], quarter[2];
  for (int i = 0; i < 4; ++i)
    half[i] = SHUFFLED(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18,
                                      19, 20, 21, 22, 23) +
              SHUFFLED(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25,
                                      26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    quarter[i] = SHUFFLED(half[2 * i], half[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11,
                                         16, 17, 18, 19, 24, 25, 26, 27) +
                 SHUFFLED(half[2 * i], half[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15,
                                         20, 21, 22, 23, 28, 29, 30, 31);
  const Floats pair = SHUFFLED(quarter[0], quarter[1], 0, 1, 4, 5, 8, 9, 12, 13, 16,
                                              17, 20, 21, 24, 25, 28, 29) +
                      SHUFFLED(quarter[0], quarter[1], 2, 3, 6, 7, 10, 11, 14, 15,
                                              18, 19, 22, 23, 26, 27, 30, 31);
  return SHUFFLED(pair, pair, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14) +
         SHUFFLED(pair, pair, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
}
