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
constexpr int kWarp = 32;
constexpr int kEnoughBlocks = 264;      // two for each of the 132 multiprocessors of an H100
constexpr int kEnoughWarps = 132 * 32;  // what these can hold at a time
constexpr int kTile = 16;               // a tile of the encoder is kTile x kTile pixels, or half as many of two heads
constexpr int kStaged = 64;             // points that a warp stages at a time

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
  int64_t tasks;                            // tiles of all images and heads, each a block
  uint32_t tiles;                           // per image and head (or the heads that a block has)
  uint32_t points;                          // L * P
  uint32_t per_level;                       // 2^32 / P rounded up, to divide by P; 0 for P = 1
  uint32_t query_points;                    // M * L * P: from a query to the next
  int32_t tile_queries;                     // places for queries in a tile, each head's counted
  int32_t warps;                            // of a block
  int32_t lanes;                            // G, threads that share the channels of a row
  int32_t parts;                            // groups of G threads that share the points of a query
  int32_t queries;                          // of a warp at a time: queries * parts * lanes = kWarp
  uint32_t chunk;                           // points per query that a warp stages at a time: queries * chunk = kStaged
  uint32_t chunk_bits;                      // chunk = 1 << chunk_bits
  bool tiled;                               // queries are the pixels of the levels
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The fewest threads, a power of two of at least 4, that read a row of `vector` channels each at once; at most a warp.
inline int32_t lanes_for(int64_t channels, int64_t vector) {
  int32_t lanes = 4;
  while (lanes < kWarp && lanes * vector < channels) lanes *= 2;
  return lanes;
}

// `warps` of a block where other blocks keep the device busy; 0 where the queries must. `heads` of a block: more than
// one for tiles alone.
inline Geometry make_geometry(const Sizes& sizes, const int64_t* spatial_shapes, const int64_t* value_strides,
                              int32_t lanes, int32_t warps = 0, int32_t heads = 1) {
  Geometry at{};
  at.L = sizes.L, at.P = sizes.P, at.M = sizes.M, at.D = sizes.D, at.Lq = sizes.Lq;
  at.points = sizes.L * sizes.P, at.query_points = sizes.M * at.points;
  at.per_level = sizes.P == 1 ? 0 : divide_up(int64_t{1} << 32, sizes.P);
  at.image_stride = value_strides[0], at.row_stride = value_strides[1], at.head_stride = value_strides[2];
  at.grad_row_stride = sizes.M * sizes.D, at.grad_image_stride = sizes.S * at.grad_row_stride;
  int64_t start = 0, tiles = 0;
  for (int64_t level = 0; level < sizes.L; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    at.levels[level] = {static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(start),
                        static_cast<int32_t>(tiles)};
    start += height * width;
    tiles += divide_up(height, kTile / heads) * divide_up(width, kTile);
  }
  at.tiled = sizes.Lq == sizes.S;
  at.lanes = lanes;
  // A decoder has few queries: rather many groups for each than multiprocessors without any work, and small blocks.
  const int64_t queries = sizes.N * sizes.M * sizes.Lq;
  at.parts = 1;
  while (!at.tiled && at.parts < (warps > 0 ? 2 : kWarp) && 2 * at.parts * lanes <= kWarp &&
         2 * at.parts <= sizes.L * sizes.P && queries * lanes * at.parts < kEnoughWarps * kWarp)
    at.parts *= 2;
  at.queries = kWarp / (lanes * at.parts);
  at.chunk = kStaged / at.queries;
  while ((1u << at.chunk_bits) < at.chunk) ++at.chunk_bits;
  at.warps = warps > 0 ? warps : kThreads / kWarp;
  while (!at.tiled && warps == 0 && at.warps > 1 &&
         divide_up(sizes.Lq, at.queries * at.warps) * sizes.N * sizes.M < kEnoughBlocks)
    at.warps /= 2;
  at.tile_queries = at.tiled ? kTile * kTile : at.queries * at.warps;
  at.tiles = at.tiled ? tiles : divide_up(sizes.Lq, at.tile_queries);
  at.tasks = at.tiles * sizes.N * (sizes.M / heads);
  return at;
}

// Leaves out warps until the shared memory of a block, `bytes` for each, fits into `most`. The others take their places
// for queries in turns.
inline void leave_out_warps(Geometry& at, int64_t bytes, int64_t most) {
  while (at.warps > 1 && at.warps * bytes > most) at.warps /= 2;
}

// The product of two 32-bit numbers. The compiler, left alone, takes two instructions where a factor is a parameter.
__device__ inline uint64_t multiply_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

template <typename T>
__device__ inline T* row_at(T* first, uint32_t row, uint32_t row_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + multiply_wide(row, row_bytes));
}

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T items[VEC];
};

// Where a sampling point lies on the map of its level.
template <typename A>
struct Place {
  int32_t column, line;  // of its top left corner, from -1 on
  A x, y;                // distance from it, in [0, 1)
  bool inside;           // whether any corner is on the map

  __device__ bool has_left() const { return column >= 0; }
  __device__ bool has_top() const { return line >= 0; }
  __device__ bool has_right(const Level& level) const { return column + 1 < level.width; }
  __device__ bool has_bottom(const Level& level) const { return line + 1 < level.height; }
};

template <typename A>
__device__ inline Place<A> locate(const Level& level, const Pack<A, 2>& location) {
  const A x = location.items[0] * level.width - A(0.5), y = location.items[1] * level.height - A(0.5);
  // False for NaN; a point outside gets no corner and so no part in anything. No short-circuits: they are branches.
  const bool inside =
      (x > -1) & (x < level.width) & (y > -1) & (y < level.height) & (level.width > 0) & (level.height > 0);
  const A within_x = inside ? x : A(0), within_y = inside ? y : A(0);
  const A left = floor(within_x), top = floor(within_y);
  return {static_cast<int32_t>(left), static_cast<int32_t>(top), within_x - left, within_y - top, inside};
}

// Rows of the corners (top left, top right, bottom left, bottom right) of a point, and the share of each.
template <typename A>
struct Sample {
  static constexpr uint32_t kOutside = uint32_t{1} << 31;  // added to the first row of a point outside the map

  Pack<uint32_t, 4> rows;
  Pack<A, 4> shares;

  // A point whose rows can be read and must not be counted.
  __device__ static Sample outside() { return {{kOutside}}; }
  __device__ static bool is_inside(const Pack<uint32_t, 4>& rows) { return rows.items[0] < kOutside; }
  __device__ static uint32_t row(const Pack<uint32_t, 4>& rows, int corner) {
    return corner == 0 ? rows.items[0] & ~kOutside : rows.items[corner];
  }
};

// A corner that is not on the map is replaced by its neighbour that is, and they have half of that one's share each: so
// all corners can be read and nothing is read that does not count.
template <typename A>
__device__ inline Sample<A> make_sample(const Level& level, const Place<A>& place, A weight) {
  A left = 1 - place.x, right = place.x, top = 1 - place.y, bottom = place.y;
  if (!place.has_left()) left = right = right / 2;
  if (!place.has_right(level)) left = right = left / 2;
  if (!place.has_top()) top = bottom = bottom / 2;
  if (!place.has_bottom(level)) top = bottom = top / 2;
  top *= weight, bottom *= weight;
  const int32_t first_column = max(place.column, 0), last_column = min(place.column + 1, level.width - 1);
  const uint32_t above = level.start + max(place.line, 0) * level.width;
  const uint32_t below = level.start + min(place.line + 1, level.height - 1) * level.width;
  if (!place.inside) return Sample<A>::outside();
  return {{above + first_column, above + last_column, below + first_column, below + last_column},
          {top * left, top * right, bottom * left, bottom * right}};
}

// What a block works on: queries of one head, or of neighbouring heads, of one image, in lines of kTile places.
struct Task {
  uint32_t image, head;            // the first head, of several
  int32_t first_query, next_line;  // the query at the first place; what leads from a place to the one below
  int32_t columns, end;            // there are no places further right and no queries from `end` on
};

template <int HEADS>
__device__ inline Task task_at(const Geometry& at, uint32_t number) {
  const uint32_t image_head = number / at.tiles;
  const int32_t tile = number % at.tiles;
  Task task{};
  const uint32_t groups = at.M / HEADS;
  task.image = image_head / groups, task.head = image_head % groups * HEADS;
  if (!at.tiled) {
    task.first_query = tile * at.tile_queries, task.next_line = task.columns = kTile, task.end = at.Lq;
    return task;
  }
  int index = 0;
  while (index + 1 < at.L && tile >= at.levels[index + 1].first_tile) ++index;
  const Level& level = at.levels[index];
  const int32_t across = (level.width + kTile - 1) / kTile, number_in_level = tile - level.first_tile;
  const int32_t line = number_in_level / across * (kTile / HEADS), column = number_in_level % across * kTile;
  task.first_query = level.start + line * level.width + column, task.next_line = level.width;
  task.columns = level.width - column, task.end = level.start + level.height * level.width;
  return task;
}

// The task of this block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// In shared memory, where the compiler runs out of registers otherwise.
template <int HEADS = 1>
__device__ inline const Task& own_task(const Geometry& at) {
  __shared__ Task task;
  if (threadIdx.x == 0) task = task_at<HEADS>(at, blockIdx.x);
  __syncthreads();
  return task;
}
#else
template <int HEADS = 1>
__device__ inline Task own_task(const Geometry& at) {
  return task_at<HEADS>(at, blockIdx.x);
}
#endif

// The query at a place of the tile, -1 where the tile sticks out of the map.
__device__ inline int32_t query_at(const Task& task, uint32_t place) {
  const int32_t line = place / kTile, column = place % kTile;
  const int32_t query = task.first_query + line * task.next_line + column;
  return (column < task.columns) & (query < task.end) ? query : -1;
}

// Index of (image, query 0, head) in (N, Lq, M).
__device__ inline int64_t first_row(const Geometry& at, const Task& task) {
  return int64_t{task.image} * at.Lq * at.M + task.head;
}

// Whether the tile has a query at any of the places of a warp from `place` on.
__device__ inline bool has_place(const Task& task, uint32_t place) {
  return (task.first_query + place / kTile * task.next_line < task.end) & (place % kTile < task.columns);
}

// What a warp stages in shared memory. Neighbouring queries are an odd number of entries apart, so that different
// groups of threads read different banks.
template <typename A>
struct Staged {
  static constexpr int kPlaces = kStaged + kWarp / 4;  // one more for each of up to 8 queries

  Pack<uint32_t, 4> rows[kPlaces];
  Pack<A, 4> shares[kPlaces];
};

// A point that a thread works on, of those that a warp stages.
struct Point {
  bool exists;  // the rest is of another one otherwise, so that it can be read
  uint32_t level;
  int64_t index;   // in (N, Lq, M, L, P)
  uint32_t place;  // in Staged
};

// Number i < kStaged of the points [start, start + chunk) of the queries of a warp, at place `first` of the tile and
// after. `offset` is the index of the first point of query 0.
template <int HEADS>
__device__ inline Point point_at(const Geometry& at, const Task& task, int first, uint32_t start, uint32_t i,
                                 int64_t offset) {
  const uint32_t slot = i >> at.chunk_bits, number = start + (i & (at.chunk - 1));
  const int32_t query = query_at(task, (first + slot) / HEADS);
  const bool exists = query >= 0 && number < at.points;
  const uint32_t point = exists ? number : 0;
  const uint32_t level = at.per_level ? multiply_wide(point, at.per_level) >> 32 : point;
  const uint32_t of_query = slot % HEADS * at.points + point;
  return {exists, level, offset + static_cast<int64_t>(multiply_wide(exists ? query : 0, at.query_points)) + of_query,
          i + slot};
}

template <int HEADS = 1, typename A>
__device__ inline void stage(const Geometry& at, const Task& task, int first, uint32_t start, const A* locations,
                             const A* weights, Staged<A>& staged) {
  constexpr int count = kStaged / kWarp;
  const int64_t offset = first_row(at, task) * at.points;
  Point points[count];
  Pack<A, 2> location[count];
  A weight[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    points[i] = point_at<HEADS>(at, task, first, start, threadIdx.x % kWarp + i * kWarp, offset);
    location[i] = reinterpret_cast<const Pack<A, 2>*>(locations)[points[i].index];
    weight[i] = weights[points[i].index];
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const Level& level = at.levels[points[i].level];
    Place<A> place = locate(level, location[i]);
    place.inside &= points[i].exists;
    const Sample<A> sample = make_sample(level, place, weight[i]);
    staged.rows[points[i].place] = sample.rows;
    staged.shares[points[i].place] = sample.shares;
  }
}

// The sum of the numbers of the first `lanes` threads of a warp, up to and with that of this one.
template <uint32_t lanes = kWarp>
__device__ inline uint32_t sum_up_to_lane(uint32_t sum) {
#pragma unroll
  for (uint32_t offset = 1; offset < lanes; offset *= 2) {
    const uint32_t before = __shfl_up_sync(0xffffffffu, sum, offset);
    sum += threadIdx.x % kWarp >= offset ? before : 0;
  }
  return sum;
}

// VEC channels. As 32-bit words: with 16-bit numbers reading takes twice as many instructions.
template <typename T, typename A, int VEC>
__device__ inline void load(const T* from, A (&to)[VEC]) {
  if constexpr (VEC == 1) {
    to[0] = static_cast<A>(*from);
  } else {
    using Words = Pack<uint32_t, sizeof(T) * VEC / sizeof(uint32_t)>;
    const Words words = *reinterpret_cast<const Words*>(from);
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
