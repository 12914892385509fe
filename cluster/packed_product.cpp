// y = x W^T + b for a packed weight, on CPU; called by packed_product.py.
//
//   T rows   I in   O out
//
// Decoding multiplies every weight by a few rows: it takes as long as the weights take to come from
// memory, or as the products take, whichever is longer; a library's kernel, made for many rows,
// takes nearly the sum. Here a panel of 32 outputs is read once, lies in the second-level cache
// while tiles of rows pass over it, and the next one is fetched meanwhile. A row's sum runs in the
// same order however many rows stand beside it, so it is the same to the last bit.
#include "lanes.h"

#ifdef __AVX512F__  // whose 32 registers a tile needs; other processors go without

namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int kTileRows = 12;  // two vectors each, two of weights, one of x

// One step of a sum over I: onto sixteen outputs, kDepth products each.
template <typename T>
struct Step {
  static constexpr int kDepth = 1;
  static Floats add(Floats total, const T* x, const T* weights) {
    return total + *x * widened(weights);
  }
};

#ifdef __AVX512BF16__
template <>
struct Step<BFloat16> {
  static constexpr int kDepth = 2;
  static Floats add(Floats total, const BFloat16* x, const BFloat16* weights) {
    int pair;
    std::memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(total, (__m512bh)_mm512_set1_epi32(pair),
                            (__m512bh)_mm512_loadu_si512(weights));
  }
};
#endif

template <typename T>
struct Work {
  T* y;
  const T* x;
  const T* packed;
  const T* bias;
  int64_t rows, in, out;

  // `count` rows from `t` on over panel `p`. `next` is this tile's share of the next panel.
  template <int count>
  void tile(int64_t t, int64_t p, const char* next, int64_t next_step) const {
    constexpr int kHalf = kLanes * Step<T>::kDepth;
    const T* panel = packed + p * kPanel * in;
    Floats total[count][2] = {};
    for (int64_t i = 0; i < in / Step<T>::kDepth; ++i) {
      __builtin_prefetch(next + i * next_step, 0, 2);
#pragma GCC unroll 12
      for (int row = 0; row < count; ++row) {
        const T* factor = x + (t + row) * in + i * Step<T>::kDepth;
        total[row][0] = Step<T>::add(total[row][0], factor, panel + 2 * i * kHalf);
        total[row][1] = Step<T>::add(total[row][1], factor, panel + (2 * i + 1) * kHalf);
      }
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t o = p * kPanel + half * kLanes, left = out - o;
      const Floats own = bias && left > 0 ? load(bias + o, left) : Floats{};
      for (int row = 0; row < count && left > 0; ++row)
        store(y + (t + row) * out + o, total[row][half] + own, left);
    }
  }

  template <int count = kTileRows>
  void tile_of(int rows_of_tile, int64_t t, int64_t p, const char* next, int64_t step) const {
    if (rows_of_tile == count)
      tile<count>(t, p, next, step);
    else if constexpr (count > 1)
      tile_of<count - 1>(rows_of_tile, t, p, next, step);
  }

  void run(int threads) const {
    if (rows == 0) return;
    const int64_t panels = (out + kPanel - 1) / kPanel;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t panel_bytes = kPanel * in * sizeof(T), share = panel_bytes / tiles;
    const int64_t step = share / (in / Step<T>::kDepth);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < panels; ++p) {
      const char* next = reinterpret_cast<const char*>(packed) + (p + 1) * panel_bytes;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = i * rows / tiles, last = (i + 1) * rows / tiles;
        tile_of(last - first, first, p, next + i * share, step);
      }
    }
  }
};

}  // namespace

// x: [T, I]. packed: [ceil(O / 32), I / kDepth, 32, kDepth], kDepth 2 in bfloat16 and else 1, zeros
// behind the last output. bias: [O], or null. y: [T, O].
#define PRODUCT(name, T)                                                                           \
  extern "C" void name(T* y, const T* x, const T* packed, const T* bias, int64_t rows, int64_t in, \
                       int64_t out, int threads) {                                                 \
    Work<T>{y, x, packed, bias, rows, in, out}.run(threads);                                       \
  }

PRODUCT(product_float32, float)
#ifdef __AVX512BF16__
PRODUCT(product_bfloat16, BFloat16)
#endif

#endif
