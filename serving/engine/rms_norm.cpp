// Root mean square norms (arXiv:1910.07467), on CPU; called by cpu_norm.py.
//
//   T rows   H hidden
//
// Written with torch's operators, as bases have it, one is eight passes over its rows, each a call
// that takes longer than its arithmetic. A row's sum runs in the same order whatever rows stand
// beside it.
#include <cmath>

#include "lanes.h"

namespace {

constexpr int kSums = 4;                    // at once: one alone would wait for itself
constexpr int64_t kLeastElements = 1 << 16;  // for fewer, threads cost more than they save

// How modules differ: what is added to the weight, and whether the normed row is rounded to their
// dtype before it is weighted, or only afterwards.
struct Form {
  float epsilon, offset;
  bool rounds_first;
};

template <typename T>
void norm(T* y, const T* x, const T* weight, int64_t size, const Form& form) {
  Floats squares[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes)
    for (int j = 0; j < kSums; ++j) {
      const Floats own = widened(x + i + j * kLanes);
      squares[j] += own * own;
    }
  for (; i < size; i += kLanes) {
    const Floats own = load(x + i, size - i);
    squares[0] += own * own;
  }
  const Floats lanes = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  const float factor = 1 / std::sqrt(sum / size + form.epsilon);
  const auto weighted = [&](Floats x, Floats weight) {
    const Floats normed = x * factor;
    return (form.rounds_first ? rounded<T>(normed) : normed) * (weight + form.offset);
  };
  for (i = 0; i + kLanes <= size; i += kLanes)
    narrow(y + i, weighted(widened(x + i), widened(weight + i)));
  if (i < size)
    store(y + i, weighted(load(x + i, size - i), load(weight + i, size - i)), size - i);
}

template <typename T>
void norm_all(T* y, const T* x, const T* weight, int64_t rows, int64_t size, const Form& form,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size >= kLeastElements)
  for (int64_t t = 0; t < rows; ++t) norm(y + t * size, x + t * size, weight, size, form);
}

}  // namespace

// x, y: [T, H]. weight: [H].
#define NORM(name, T)                                                                        \
  extern "C" void name(T* y, const T* x, const T* weight, int64_t rows, int64_t size,        \
                       float epsilon, float offset, bool rounds_first, int threads) {        \
    norm_all(y, x, weight, rows, size, Form{epsilon, offset, rounds_first}, threads);        \
  }

NORM(norm_float32, float)
NORM(norm_bfloat16, BFloat16)
#ifdef __FLT16_MANT_DIG__
NORM(norm_float16, _Float16)
#endif
