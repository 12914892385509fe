// Rotary position embedding (arXiv:2104.09864) of queries and keys, on CPU; called by cpu_rotary.py.
//
//   T rows   H heads   D head size
//
// Written with torch's operators it moves each query and key ten times. Each product is rounded
// to the dtype as it is there, so that nothing but the time differs.
#include "lanes.h"

namespace {

constexpr int64_t kLeastElements = 1 << 16;  // for fewer, threads cost more than they save

// One head: its first half is turned against its second.
template <typename T>
void turn(T* y, const T* x, const T* cosine, const T* sine, int64_t half) {
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t left = half - d;
    const Floats first = load(x + d, left), second = load(x + half + d, left);
    const auto times = [&](Floats lanes, const T* by) {
      return rounded<T>(lanes * load(by, left));
    };
    store(y + d, times(first, cosine + d) - times(second, sine + d), left);
    store(y + half + d, times(second, cosine + half + d) + times(first, sine + half + d), left);
  }
}

template <typename T>
void turn_all(T* y, const T* x, const T* cosine, const T* sine, int64_t rows, int64_t heads,
              int64_t size, int64_t row_stride, int64_t head_stride, int threads) {
  const bool is_large = rows * heads * size >= kLeastElements;
#pragma omp parallel for schedule(static) num_threads(threads) if (is_large)
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t h = 0; h < heads; ++h)
      turn(y + (t * heads + h) * size, x + t * row_stride + h * head_stride, cosine + t * size,
           sine + t * size, size / 2);
}

}  // namespace

// x: [T, H, D], its strides in elements. y: [T, H, D], without gaps. cosine, sine: [T, D].
#define TURN(name, T)                                                                         \
  extern "C" void name(T* y, const T* x, const T* cosine, const T* sine, int64_t rows,        \
                       int64_t heads, int64_t size, int64_t row_stride, int64_t head_stride,  \
                       int threads) {                                                         \
    turn_all(y, x, cosine, sine, rows, heads, size, row_stride, head_stride, threads);        \
  }

TURN(turn_float32, float)
TURN(turn_bfloat16, BFloat16)
#ifdef __FLT16_MANT_DIG__
TURN(turn_float16, _Float16)
#endif
