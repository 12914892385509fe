// y += factor (x A) B for the rows of many adapters at once, on CPU; called by cpu_low_rank.py.
//
//   T rows   I in   O out   r rank   S segments
//
// Two products for each adapter and module cost more calls than arithmetic where adapters have few
// rows each, as in decoding. Here a module's adapters are one call; each A and B is read once, at
// its own rank. A row's sums run in the same order whatever rows stand beside it.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int kBlock = 8;          // ranks at a time
constexpr int kWide = 4;           // vectors of outputs at a time
constexpr int64_t kColumns = 256;  // outputs of a task

}  // namespace

// The rows `start` to `end` (excluded) of one adapter: A is [r, I], B [r, O], `low` its first place
// among the products x A.
template <typename T>
struct Segment {
  int64_t start, end, rank;
  const T *a, *b;
  double factor;
  int64_t low;
};

namespace {

// What one vector of x and one of A give, onto sixteen partial sums; or `count` of its numbers.
template <typename T>
struct Dot {
  static constexpr int64_t kStep = kLanes;
  static Floats add(Floats total, const T* x, const T* a) {
    return total + widened(x) * widened(a);
  }
  static Floats add(Floats total, const T* x, const T* a, int64_t count) {
    return total + load(x, count) * load(a, count);
  }
};

#ifdef __AVX512BF16__
template <>
struct Dot<BFloat16> {
  static constexpr int64_t kStep = 2 * kLanes;
  static Floats add(Floats total, const BFloat16* x, const BFloat16* a) {
    return _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(x),
                            (__m512bh)_mm512_loadu_si512(a));
  }
  static Floats add(Floats total, const BFloat16* x, const BFloat16* a, int64_t count) {
    const __mmask32 own = (__mmask32(1) << count) - 1;
    return _mm512_dpbf16_ps(total, (__m512bh)_mm512_maskz_loadu_epi16(own, x),
                            (__m512bh)_mm512_maskz_loadu_epi16(own, a));
  }
};
#endif

// x A of `kBlock` ranks from `first` on, for `rows` rows from `t` on. `next` is where the ranks of
// the next block begin, which may be another adapter's: too short a way to be foreseen.
template <int rows, typename T>
void shrink(float* low, const T* x, const Segment<T>& segment, int64_t t, int64_t first, int64_t in,
            const T* next) {
  const int64_t count = std::min<int64_t>(kBlock, segment.rank - first);
  const T* a[kBlock];
  for (int64_t j = 0; j < kBlock; ++j)
    a[j] = segment.a + (first + std::min<int64_t>(j, count - 1)) * in;
  x += t * in;
  const bool is_first = t == segment.start;
  Floats lanes[rows][kBlock] = {};
  int64_t i = 0;
  for (; i + Dot<T>::kStep <= in; i += Dot<T>::kStep)
    for (int j = 0; j < kBlock; ++j) {
      if (is_first) __builtin_prefetch(next + j * in + i);
      for (int row = 0; row < rows; ++row)
        lanes[row][j] = Dot<T>::add(lanes[row][j], x + row * in + i, a[j] + i);
    }
  if (i < in)
    for (int j = 0; j < kBlock; ++j)
      for (int row = 0; row < rows; ++row)
        lanes[row][j] = Dot<T>::add(lanes[row][j], x + row * in + i, a[j] + i, in - i);
  for (int row = 0; row < rows; ++row)
    store(low + segment.low + (t + row - segment.start) * segment.rank + first,
          sum_each(lanes[row]), count);
}

// y += factor low B for `rows` rows, `vectors` vectors of columns from `o` on; or `count` columns
// of a single vector. `low` and `y` begin at the first of these rows.
template <int rows, int vectors, typename T>
void expand_columns(T* y, const float* low, const Segment<T>& segment, int64_t o, int64_t out,
                    bool is_first, int64_t count = kLanes) {
  constexpr int64_t kFetched = kLine / int64_t(sizeof(T));
  Floats lanes[rows][vectors] = {};
  for (int64_t j = 0; j < segment.rank; ++j) {
    const T* b = segment.b + j * out + o;
    if (is_first)
      for (int64_t k = 0; k < vectors * kLanes; k += kFetched)
        __builtin_prefetch(b + vectors * kLanes + k);
    Floats own[vectors];
    for (int k = 0; k < vectors; ++k) own[k] = load(b + k * kLanes, count);
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < vectors; ++k) lanes[row][k] += low[row * segment.rank + j] * own[k];
  }
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < vectors; ++k) {
      T* target = y + row * out + o + k * kLanes;
      store(target, load(target, count) + lanes[row][k] * float(segment.factor), count);
    }
}

// The same for `rows` rows from `t` on, of `kColumns` columns from `first` on.
template <int rows, typename T>
void expand(T* y, const float* low, const Segment<T>& segment, int64_t t, int64_t first,
            int64_t out) {
  low += segment.low + (t - segment.start) * segment.rank;
  y += t * out;
  const bool is_first = t == segment.start;
  const int64_t last = std::min(first + kColumns, out);
  int64_t o = first;
  for (; o + kWide * kLanes <= last; o += kWide * kLanes)
    expand_columns<rows, kWide>(y, low, segment, o, out, is_first);
  for (; o < last; o += kLanes)
    expand_columns<rows, 1>(y, low, segment, o, out, is_first, std::min<int64_t>(kLanes, last - o));
}

// Calls `work` with as many rows at once as registers hold, and then row by row.
template <int most, typename Work>
void by_rows(int64_t start, int64_t end, Work work) {
  for (; start + most <= end; start += most) work(std::integral_constant<int, most>(), start);
  for (; start < end; ++start) work(std::integral_constant<int, 1>(), start);
}

template <typename T>
void add(T* y, const T* x, const Segment<T>* segments, int64_t count, int64_t in, int64_t out,
         int threads) {
  struct Part {
    int64_t segment, first;
  };
  std::vector<Part> shrinks, expands;
  int64_t num_low = 0;
  for (int64_t s = 0; s < count; ++s) {
    const Segment<T>& segment = segments[s];
    for (int64_t j = 0; j < segment.rank; j += kBlock) shrinks.push_back({s, j});
    for (int64_t o = 0; o < out; o += kColumns) expands.push_back({s, o});
    num_low = std::max(num_low, segment.low + (segment.end - segment.start) * segment.rank);
  }
  std::vector<float> low(num_low);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (size_t p = 0; p < shrinks.size(); ++p) {
      const Segment<T>& segment = segments[shrinks[p].segment];
      const Part& after = shrinks[std::min(p + 1, shrinks.size() - 1)];
      const T* next = segments[after.segment].a + after.first * in;
      by_rows<2>(segment.start, segment.end, [&](auto rows, int64_t t) {
        shrink<rows>(low.data(), x, segment, t, shrinks[p].first, in, next);
      });
    }
#pragma omp for schedule(static)
    for (size_t p = 0; p < expands.size(); ++p) {
      const Segment<T>& segment = segments[expands[p].segment];
      by_rows<4>(segment.start, segment.end, [&](auto rows, int64_t t) {
        expand<rows>(y, low.data(), segment, t, expands[p].first, out);
      });
    }
  }
}

}  // namespace

// x: [T, I]; y: [T, O].
#define ADD(name, T)                                                                             \
  extern "C" void name(T* y, const T* x, const Segment<T>* segments, int64_t count, int64_t in, \
                       int64_t out, int threads) {                                               \
    add(y, x, segments, count, in, out, threads);                                                \
  }

ADD(add_float32, float)
ADD(add_bfloat16, BFloat16)
#ifdef __FLT16_MANT_DIG__
ADD(add_float16, _Float16)
#endif
