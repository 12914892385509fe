// Attention of decoding rows over paged keys and values, on CPU; called by cpu_attention.py.
//
//   B decoding rows   S context slots   H heads   K key/value heads   G = H / K   D head size
//
// torch has no such kernel: gathering the context first moves each key and value three times
// instead of once, and decoding is bound by what it moves. Everything is summed in float32, in an
// order that no other row changes.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace {

constexpr int kBlock = 8;  // slots at a time

// e^x for x <= 0, within two units in the last place; below -87 it is 0. (Cephes' expf.)
Floats exp(const Floats asked) {
  const Floats least = Floats{} - 87.f;
  const Ints in_range = asked > least;
  const Floats x = in_range ? asked : least;
  const Floats n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // 1.5 * 2^23: to an integer
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Floats result = p * reinterpret_cast<Floats>(power);
  return asked != asked ? asked : (in_range ? result : Floats{});
}

// Scores to weights, in place; those from `count` to `padded`, whole lanes, become 0.
void softmax(float* scores, int64_t count, int64_t padded) {
  const float most = *std::max_element(scores, scores + count);
  std::fill(scores + count, scores + padded, -INFINITY);
  Floats total = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Floats weights = exp(load(scores + i) - most);
    store(scores + i, weights);
    total += weights;
  }
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, load(scores + i) / sum);
}

// Where the keys, or values, of a block of slots lie; the last one stands for those behind it.
template <typename T>
struct Block {
  const T* of[kBlock];

  Block(const T* memory, const int64_t* slots, int64_t s, int64_t count, int64_t row) {
    for (int64_t i = 0; i < kBlock; ++i) of[i] = memory + slots[std::min(s + i, count - 1)] * row;
  }

  // Called for the next block meanwhile: the processor foresees no slots.
  void fetch(int64_t offset, int64_t size) const {
    for (int i = 0; i < kBlock; ++i)
      for (int64_t d = 0; d < size; d += kLine / int64_t(sizeof(T)))
        __builtin_prefetch(of[i] + offset + d);
  }

  // One query against the keys, into `scores`.
  void score(float* scores, const float* query, int64_t offset, int64_t size) const {
    Floats lanes[kBlock] = {};
    for (int64_t d = 0; d < size; d += kLanes)
      for (int i = 0; i < kBlock; ++i)
        lanes[i] += load(query + d, size - d) * load(of[i] + offset + d, size - d);
    store(scores, sum_each(lanes), kBlock);
  }

  // The values by their weights, onto `total`.
  void add(float* total, const float* weights, int64_t offset, int64_t size) const {
    for (int64_t d = 0; d < size; d += kLanes) {
      Floats lanes = load(total + d, size - d);
      for (int i = 0; i < kBlock; ++i)
        lanes += weights[i] * load(of[i] + offset + d, size - d);
      store(total + d, lanes, size - d);
    }
  }
};

struct Shape {
  int64_t rows, width, num_kv_heads, group, size;
};

// Key/value heads `first` to `last` (excluded) of one row, for all their queries.
template <typename T>
void attend(T* output_HD, const T* query_HD, const T* keys, const T* values, const int64_t* slots,
            int64_t count, const Shape& shape, int64_t first, int64_t last, float scaling) {
  const int64_t group = shape.group, size = shape.size, row = shape.num_kv_heads * size;
  const int64_t heads = (last - first) * group, elements = heads * size;
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::vector<float> query(elements), total(elements), scores(heads * padded);
  query_HD += first * group * size, output_HD += first * group * size;
  keys += first * size, values += first * size;
  for (int64_t i = 0; i < elements; i += kLanes)
    store(&query[i], load(query_HD + i, elements - i) * scaling, elements - i);
  for (int64_t s = 0; s < count; s += kBlock) {
    const Block<T> block(keys, slots, s, count, row), next(keys, slots, s + kBlock, count, row);
    for (int64_t h = 0; h < heads; ++h) {
      if (h % group == 0) next.fetch(h / group * size, size);
      block.score(&scores[h * padded + s], &query[h * size], h / group * size, size);
    }
  }
  for (int64_t h = 0; h < heads; ++h) softmax(&scores[h * padded], count, padded);
  for (int64_t s = 0; s < count; s += kBlock) {
    const Block<T> block(values, slots, s, count, row), next(values, slots, s + kBlock, count, row);
    for (int64_t h = 0; h < heads; ++h) {
      if (h % group == 0) next.fetch(h / group * size, size);
      block.add(&total[h * size], &scores[h * padded + s], h / group * size, size);
    }
  }
  for (int64_t i = 0; i < elements; i += kLanes)
    store(output_HD + i, load(&total[i], elements - i), elements - i);
}

template <typename T>
void attend_all(T* output, const T* query, const T* keys, const T* values, const int64_t* slots_BS,
                const int64_t* starts_B, const int64_t* lengths_B, const Shape& shape,
                float scaling, int threads) {
  // A row is one task, unless rows are so few that threads would wait.
  const int64_t heads = shape.num_kv_heads, row = heads * shape.group * shape.size;
  const int64_t parts = std::min<int64_t>(heads, (4 * threads + shape.rows - 1) / shape.rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < shape.rows * parts; ++task) {
    const int64_t b = task / parts, part = task % parts;
    attend(output + b * row, query + b * row, keys, values,
           slots_BS + b * shape.width + starts_B[b], lengths_B[b] - starts_B[b], shape,
           part * heads / parts, (part + 1) * heads / parts, scaling);
  }
}

}  // namespace

// query, output: [B, H, D]. keys, values: [slots, K, D]. Row b sees the slots starts_B[b] to
// lengths_B[b] (excluded) of slots_BS[b], at least one.
#define ATTEND(name, T)                                                                            \
  extern "C" void name(T* output, const T* query, const T* keys, const T* values,                  \
                       const int64_t* slots_BS, const int64_t* starts_B, const int64_t* lengths_B, \
                       int64_t rows, int64_t width, int64_t num_kv_heads, int64_t group,           \
                       int64_t size, float scaling, int threads) {                                 \
    const Shape shape{rows, width, num_kv_heads, group, size};                                     \
    attend_all(output, query, keys, values, slots_BS, starts_B, lengths_B, shape, scaling,         \
               threads);                                                                           \
  }

ATTEND(attend_float32, float)
ATTEND(attend_bfloat16, BFloat16)
#ifdef __FLT16_MANT_DIG__
ATTEND(attend_float16, _Float16)
#endif
