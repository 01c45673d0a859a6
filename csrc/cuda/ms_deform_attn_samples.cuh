// What the CUDA kernels share: how queries are shared out among blocks, and sampling points in shared memory.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../sizes.h"

namespace deformable_detr {

constexpr int kMaxLevels = 16;
// Large blocks, two on a multiprocessor with 64 registers per thread: four small ones would work on four tiles at a
// time, which do not fit into its cache together.
constexpr int kThreads = 512;
constexpr int kBlocks = 2;
constexpr int kEnoughBlocks = 264;  // two for each of the 132 multiprocessors of an H100
constexpr int64_t kDefaultSharedMemory = 48 << 10;
constexpr int kTile = 16;                       // a tile of the encoder is kTile x kTile pixels
constexpr int64_t kMaxRows = int64_t{1} << 27;  // a sample packs its row beside four flags

struct Level {
  int32_t height, width, start, first_tile;
};

// Sizes and strides (in elements), passed by value: kernels read no shape from device memory.
struct Geometry {
  Level levels[kMaxLevels];
  int32_t L, P, M, D, Lq;
  uint32_t row_stride, grad_row_stride;     // of value, and of grad_value, which is (N, S, M, D) contiguous
  int64_t image_stride, grad_image_stride;  // likewise
  int64_t head_stride;                      // of value
  int64_t tiles;                            // per image and head
  int64_t tasks;                            // tiles of all images and heads
  int32_t tile_queries;                     // places for queries in a tile, a multiple of the next
  int32_t pass_queries;                     // queries a block works on at a time
  int32_t lanes;                            // G, threads per query
  int32_t pitch;                            // samples per query in shared memory; odd, against bank conflicts
  bool tiled;                               // queries are the pixels of the levels
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int32_t round_down_to_power_of_two(int64_t number) {
  int32_t power = 1;
  while (2 * power <= number) power *= 2;
  return power;
}

// `lanes` threads per query; `sample_bytes` of shared memory per sample.
inline Geometry make_geometry(const Sizes& sizes, const int64_t* spatial_shapes, const int64_t* value_strides,
                              int32_t lanes, int64_t sample_bytes) {
  Geometry at{};
  at.L = sizes.L, at.P = sizes.P, at.M = sizes.M, at.D = sizes.D, at.Lq = sizes.Lq;
  at.image_stride = value_strides[0], at.row_stride = value_strides[1], at.head_stride = value_strides[2];
  at.grad_row_stride = sizes.M * sizes.D, at.grad_image_stride = sizes.S * at.grad_row_stride;
  int64_t start = 0, tiles = 0;
  for (int64_t level = 0; level < sizes.L; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    at.levels[level] = {static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(start),
                        static_cast<int32_t>(tiles)};
    start += height * width;
    tiles += divide_up(height, kTile) * divide_up(width, kTile);
  }
  at.lanes = lanes;
  at.pitch = (at.L * at.P) | 1;
  // Powers of two, so that passes divide tiles; whole warps even if their samples need more than the default of
  // shared memory.
  const int64_t fitting = std::min(kDefaultSharedMemory / (at.pitch * sample_bytes), int64_t{kThreads / lanes});
  const int32_t fewest = std::max(32 / lanes, 1);
  at.pass_queries = round_down_to_power_of_two(std::max<int64_t>(fitting, fewest));
  at.tiled = sizes.Lq == sizes.S;
  // A decoder has few queries: rather small blocks than multiprocessors without any.
  while (!at.tiled && at.pass_queries > fewest &&
         divide_up(sizes.Lq, at.pass_queries) * sizes.N * sizes.M < kEnoughBlocks)
    at.pass_queries /= 2;
  at.tile_queries = at.tiled ? kTile * kTile : at.pass_queries;
  at.tiles = at.tiled ? tiles : divide_up(sizes.Lq, at.tile_queries);
  at.tasks = at.tiles * sizes.N * sizes.M;
  return at;
}

inline int64_t shared_bytes(const Geometry& at, int64_t sample_bytes) {
  return at.pass_queries * at.pitch * sample_bytes;
}

inline int32_t threads_per_block(const Geometry& at) { return divide_up(at.pass_queries * at.lanes, 32) * 32; }

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T items[VEC];
};

enum Corner : uint32_t { kTopLeft = 1, kTopRight = 2, kBottomLeft = 4, kBottomRight = 8 };

// One sampling point.
template <typename A>
struct alignas(4 * sizeof(A)) Sample {
  uint32_t packed;  // 16 * (row of the bottom right corner, which is never negative) + the corners inside the map
  A x, y;           // distance from the left and top corners, in [0, 1)
  A weight;

  __device__ uint32_t row() const { return packed >> 4; }
  __device__ bool has(int corner) const { return packed & 1u << corner; }

  // The share of each corner.
  __device__ Pack<A, 4> shares() const {
    const A bottom = weight * y, top = weight - bottom, top_right = top * x, bottom_right = bottom * x;
    return {top - top_right, top_right, bottom - bottom_right, bottom_right};
  }
};

// Where the channels of corners are. Bytes and unsigned 32-bit numbers make the product a single instruction.
template <typename T>
struct Corners {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  Byte* first;
  uint32_t row;
  uint64_t line;

  __device__ Corners(T* first, uint32_t row_stride, uint32_t width)
      : first(reinterpret_cast<Byte*>(first)), row(row_stride * sizeof(T)), line(uint64_t{width} * row) {}

  __device__ T* at(uint32_t bottom_right, int corner) const {
    Byte* start = first + uint64_t{bottom_right} * row;
    return reinterpret_cast<T*>(start - (corner & 2 ? 0 : line) - (corner & 1 ? 0 : row));
  }
};

template <typename A>
__device__ inline Sample<A> make_sample(const Level& level, const Pack<A, 2>& location, A weight) {
  const A x = location.items[0] * level.width - A(0.5), y = location.items[1] * level.height - A(0.5);
  // False for NaN; a point outside gets no corner and so no part in anything.
  const bool inside = x > -1 && x < level.width && y > -1 && y < level.height;
  const int32_t column = static_cast<int32_t>(floor(inside ? x : A(0)));
  const int32_t line = static_cast<int32_t>(floor(inside ? y : A(0)));
  const uint32_t horizontal =
      (column >= 0 ? kTopLeft | kBottomLeft : 0) | (column + 1 < level.width ? kTopRight | kBottomRight : 0);
  const uint32_t vertical =
      (line >= 0 ? kTopLeft | kTopRight : 0) | (line + 1 < level.height ? kBottomLeft | kBottomRight : 0);
  const uint32_t row = level.start + (line + 1) * level.width + column + 1;
  return {row * 16 + (inside ? horizontal & vertical : 0), inside ? x - column : A(0), inside ? y - line : A(0),
          inside ? weight : A(0)};
}

// What a block works on: queries of one head of one image, in lines of kTile places.
struct Task {
  int64_t image;
  int64_t first_row;  // index of (image, query 0, head) in (N, Lq, M)
  int32_t head;
  int32_t first_query, next_line;  // the query at the first place; what leads from a place to the one below
  int32_t columns, end;            // there are no places further right and no queries from `end` on
};

__device__ inline Task task_at(const Geometry& at, int64_t number) {
  const int64_t image_head = number / at.tiles;
  const int32_t tile = static_cast<int32_t>(number % at.tiles);
  Task task{};
  task.image = image_head / at.M, task.head = static_cast<int32_t>(image_head % at.M);
  task.first_row = task.image * at.Lq * at.M + task.head;
  if (!at.tiled) {
    task.first_query = tile * at.tile_queries, task.next_line = task.columns = kTile, task.end = at.Lq;
    return task;
  }
  int index = 0;
  while (index + 1 < at.L && tile >= at.levels[index + 1].first_tile) ++index;
  const Level& level = at.levels[index];
  const int32_t across = (level.width + kTile - 1) / kTile, number_in_level = tile - level.first_tile;
  const int32_t line = number_in_level / across * kTile, column = number_in_level % across * kTile;
  task.first_query = level.start + line * level.width + column, task.next_line = level.width;
  task.columns = level.width - column, task.end = level.start + level.height * level.width;
  return task;
}

// The query at a place of the tile, -1 where the tile sticks out of the map.
__device__ inline int32_t query_at(const Task& task, uint32_t place) {
  const int32_t line = place / kTile, column = place % kTile;
  const int32_t query = task.first_query + line * task.next_line + column;
  return column < task.columns && query < task.end ? query : -1;
}

// Whether the map has the line of a place.
__device__ inline bool has_line(const Task& task, int place) {
  return task.first_query + place / kTile * task.next_line < task.end;
}

// Index of (image, query, head) in (N, Lq, M).
__device__ inline int64_t output_row(const Geometry& at, const Task& task, int32_t query) {
  return task.first_row + static_cast<int64_t>(query) * at.M;
}

// Shares out the points of the queries at places [first, first + pass_queries) of the tile. Neighbouring threads get
// neighbouring points, and a thread the same point of every query that it gets, so that divisions are rare.
// function(level, place of the sample, index of the point in (N, Lq, M, L, P)), the last -1 where there is no query.
template <typename Function>
__device__ inline void for_each_point(const Geometry& at, const Task& task, int first, const Function& function) {
  const uint32_t points = at.L * at.P, across = points < blockDim.x ? points : blockDim.x, down = blockDim.x / across;
  const uint32_t first_slot = threadIdx.x / across;
  if (first_slot >= down) return;
  for (uint32_t point = threadIdx.x % across; point < points; point += across) {
    const Level& level = at.levels[point / at.P];
    for (int slot = first_slot; slot < at.pass_queries; slot += down) {
      const int32_t query = query_at(task, first + slot);
      function(level, slot * at.pitch + point, query < 0 ? -1 : output_row(at, task, query) * points + point);
    }
  }
}

// Fills `samples` for the queries at places [first, first + pass_queries) of the tile.
template <typename A>
__device__ inline void stage(const Geometry& at, const Task& task, int first, const A* locations, const A* weights,
                             Sample<A>* samples) {
  for_each_point(at, task, first, [&](const Level& level, int place, int64_t index) {
    Sample<A> sample{0, A(0), A(0), A(0)};
    if (index >= 0) sample = make_sample(level, reinterpret_cast<const Pack<A, 2>*>(locations)[index], weights[index]);
    samples[place] = sample;
  });
}

// VEC channels, zeros where not `valid`. Nothing is read then: the row may belong to another line, level or image and
// hold NaN. Vectors are read and replaced by zeros as 32-bit words: with 16-bit numbers that takes twice as many
// instructions.
template <typename T, typename A, int VEC>
__device__ inline void load(const T* from, bool valid, A (&to)[VEC]) {
  if constexpr (VEC == 1) {
    to[0] = valid ? static_cast<A>(*from) : A(0);
  } else {
    using Words = Pack<uint32_t, sizeof(T) * VEC / sizeof(uint32_t)>;
    Words words{};
    if (valid) words = *reinterpret_cast<const Words*>(from);
    Pack<T, VEC> numbers;
    memcpy(&numbers, &words, sizeof(words));
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      if constexpr (std::is_same_v<T, c10::BFloat16>) {  // a bfloat16 is the upper half of a float
        const uint32_t bits = i % 2 ? words.items[i / 2] & 0xffff0000u : words.items[i / 2] << 16;
        memcpy(&to[i], &bits, sizeof(bits));
      } else {
        to[i] = static_cast<A>(numbers.items[i]);
      }
    }
  }
}

}  // namespace deformable_detr
