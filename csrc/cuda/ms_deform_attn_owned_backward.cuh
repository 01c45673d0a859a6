// The backward pass of a decoder, whose few queries leave most of grad_value zero: one launch, in which every element
// is written once and in its own type. No sums in device memory that are to be zeroed before and converted after.
//
// Some blocks compute the gradients of locations and weights, as without owners but for the sums. Each of the others
// owns a tile of cells of one level, head and image. It looks through all points of that level and head for those with
// a corner in its tile, sorts them by pixel (counts in shared memory, a prefix sum), and then G neighbouring
// threads add up in registers what the points around a cell give to it, and write its row.
#pragma once

#include "ms_deform_attn_backward.cuh"

namespace deformable_detr {

constexpr int kOwnedChannels = 32;  // of a head
constexpr int kOwnedLanes = 2;      // G
constexpr int kOwnedGroups = kWarp / kOwnedLanes;
constexpr int kOwnedEdgeBits = 5;  // the largest tiles have 1 << kOwnedEdgeBits cells in a line and in a column
constexpr int kOwnedEdge = 1 << kOwnedEdgeBits;
constexpr int kTilePoints = 256;  // so many a tile may have, if points are spread evenly
constexpr int kLookedAt = 5;      // points whose locations a thread fetches at a time: 300 * 4 by 256 threads
// Points from which on a cell is added up by all threads of a warp, and of a block.
constexpr int kLongCell = 64, kHotCell = 512;
// A pixel is that of the top left corner of a point, from -1 on. A multiple of the warp for the prefix sum.
constexpr int kOwnedPixels = ((kOwnedEdge + 1) * (kOwnedEdge + 1) + kWarp - 1) / kWarp * kWarp;
// Points of a level and head: so many that four small or two large blocks fit into the 227 KB of a Hopper
// multiprocessor, and a large one into the 99 KB of those that have least.
constexpr int64_t kFewOwnedPoints = 2048, kMaxOwnedPoints = 4800;

inline int32_t owned_warps(const Sizes& sizes) { return sizes.Lq * sizes.P <= kFewOwnedPoints ? 8 : 16; }

// Tiles are numbered level by level, each for all heads and images in turn.
struct OwnedTiles {
  int32_t first[kMaxLevels];                                // number of the first tile of a level
  int32_t width_bits[kMaxLevels], height_bits[kMaxLevels];  // of its tiles: 1 << width_bits cells in a line
  int32_t points;                                           // of a level and head
  int32_t points_bits;                                      // P = 1 << points_bits
  uint32_t image_heads;                                     // N * M
  int64_t tiles, tasks;                                     // of an image and head, and of all

  // Looking through the points costs 18 instructions for 32 of them in every tile of their level: at 60 % of what an
  // H100 can issue 1 ps a point and tile. Adding its four corners to device memory costs, measured, 136 ps a point,
  // however large the map. So there is a number of tiles from which on owners do not pay.
  bool pay(const Geometry& at) const {
    constexpr int64_t tiles_of_a_level = 100;
    return !at.tiled && at.D == kOwnedChannels && at.P == 1 << points_bits && at.P <= kWarp &&
           points <= kMaxOwnedPoints && tiles <= tiles_of_a_level * at.L && at.tasks + tasks < (int64_t{1} << 31) &&
           int64_t{at.Lq} * at.query_points < (int64_t{1} << 31);
  }
};

inline OwnedTiles make_owned_tiles(const Geometry& at, const Sizes& sizes) {
  OwnedTiles owned{};
  owned.points = static_cast<int32_t>(std::min<int64_t>(sizes.Lq * sizes.P, kMaxOwnedPoints + 1));
  while (2 << owned.points_bits <= at.P) ++owned.points_bits;
  owned.image_heads = sizes.N * sizes.M;
  const int64_t limit = std::max(kTilePoints, owned.points / 6);
  for (int64_t index = 0; index < sizes.L; ++index) {
    const int64_t height = at.levels[index].height, width = at.levels[index].width;
    // So small that a tile would have at most `limit` points, were they spread evenly.
    int32_t &width_bits = owned.width_bits[index], &height_bits = owned.height_bits[index];
    width_bits = height_bits = kOwnedEdgeBits;
    while (height_bits > 2 && (int64_t{owned.points} << width_bits + height_bits) > limit * height * width)
      --(width_bits > height_bits ? width_bits : height_bits);
    owned.first[index] = owned.tiles;
    owned.tiles += divide_up(height, 1 << height_bits) * divide_up(width, 1 << width_bits);
  }
  owned.tasks = owned.tiles * owned.image_heads;
  return owned;
}

// The tile of a block: cells [left, right) x [top, bottom).
struct alignas(16) OwnedTile {
  int32_t left, top, right, bottom;
  uint32_t image, head;
  int32_t level, width_bits;
  int64_t first_point;  // index in (N, Lq, M, L, P)

  __device__ int32_t pitch() const { return (1 << width_bits) + 1; }  // from a pixel to the one below

  // Whether a point, in pixels of the level, has a corner in the tile. False for NaN.
  __device__ bool touched_by(const Pack<float, 2>& place) const {
    const auto [x, y] = place.items;
    return (x > left - 1) & (x < right) & (y > top - 1) & (y < bottom);
  }

  __device__ int32_t pixel(const Pack<float, 2>& place) const {
    const int32_t column = static_cast<int32_t>(floor(place.items[0])) - left;
    return (static_cast<int32_t>(floor(place.items[1])) - top + 1) * pitch() + column + 1;
  }
};

__device__ inline OwnedTile owned_tile_at(const Geometry& at, const OwnedTiles& owned, uint32_t task) {
  const int32_t number = task / owned.image_heads;
  const uint32_t image_head = task % owned.image_heads;
  OwnedTile tile{};
  tile.image = image_head / at.M, tile.head = image_head % at.M;
  while (tile.level + 1 < at.L && number >= owned.first[tile.level + 1]) ++tile.level;
  tile.first_point = (int64_t{tile.image} * at.Lq * at.M + tile.head) * at.points + tile.level * at.P;
  const Level& level = at.levels[tile.level];
  const int32_t width = 1 << owned.width_bits[tile.level], height = 1 << owned.height_bits[tile.level];
  const int32_t across = (level.width + width - 1) >> owned.width_bits[tile.level];
  const int32_t in_level = number - owned.first[tile.level], line = in_level / across;
  tile.width_bits = owned.width_bits[tile.level];
  tile.left = (in_level - line * across) * width, tile.right = min(tile.left + width, level.width);
  tile.top = line * height, tile.bottom = min(tile.top + height, level.height);
  return tile;
}

struct alignas(16) OwnedPoint {
  float x, y;  // in pixels of the level
  float weight;
  uint32_t query;
};

// A cell with points around it: those of the pixels above, from `above` on, and those of the pixels beside.
struct alignas(16) OwnedCell {
  uint32_t row;           // of grad_value
  uint16_t column, line;  // in the tile
  uint16_t above, count_above, beside, count;

  __device__ uint32_t position(uint32_t i) const { return i < count_above ? above + i : beside + i - count_above; }
};

struct OwnedMemory {
  OwnedTile tile;
  uint32_t short_cells, long_cells;
  // Behind a zero: the number of points of each pixel, then the position of its first, then that of the next pixel's.
  uint32_t ends[1 + kOwnedPixels];
  OwnedCell cells[kOwnedEdge * kOwnedEdge];  // short ones from the first place on, long ones from the last one back
  float sums[kThreads / kWarp][kOwnedChannels];
  OwnedPoint points[1];  // as many as there are

  __device__ OwnedCell& long_cell(uint32_t i) { return cells[kOwnedEdge * kOwnedEdge - 1 - i]; }
};

constexpr int64_t kReserved = 1 << 10;  // of the shared memory of each block
static_assert(4 * (sizeof(OwnedMemory) + kFewOwnedPoints * sizeof(OwnedPoint) + kReserved) <= 228 << 10);
static_assert(sizeof(OwnedMemory) + kMaxOwnedPoints * sizeof(OwnedPoint) + kReserved <= 100 << 10);

// Shared memory of a block, of either kind.
inline int64_t owned_backward_bytes(const Geometry& at, const OwnedTiles& owned) {
  return std::max<int64_t>(at.warps * sizeof(StagedWithDots<float>),
                           sizeof(OwnedMemory) + owned.points * sizeof(OwnedPoint));
}

// Where a number of point i of a level and head lies, counted from that of point 0.
__device__ inline uint32_t offset_of_point(const Geometry& at, const OwnedTiles& owned, uint32_t i) {
  return (i >> owned.points_bits) * at.query_points + (i & (at.P - 1));
}

// Counts become positions. For one warp.
__device__ inline void add_up_pixels(uint32_t* counts) {
  constexpr int run = kOwnedPixels / kWarp;
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t count[run], total = 0;
#pragma unroll
  for (int i = 0; i < run; ++i) total += count[i] = counts[lane * run + i];
  uint32_t sum = sum_up_to_lane(total) - total;
#pragma unroll
  for (int i = 0; i < run; ++i) counts[lane * run + i] = sum, sum += count[i];
}

// Sorts the points that touch the tile by pixel.
__device__ inline void sort_points(const Geometry& at, const OwnedTiles& owned, const float* locations,
                                   const float* weights, OwnedMemory& memory) {
  const OwnedTile tile = memory.tile;
  const auto* first_location = reinterpret_cast<const Pack<float, 2>*>(locations) + tile.first_point;
  const float width = at.levels[tile.level].width, height = at.levels[tile.level].height;
  // In pixels of the level. The same to the bit each time: a point that moved to another pixel would take a place
  // there.
  const auto place_of = [&](const Pack<float, 2>& location) -> Pack<float, 2> {
    return {fmaf(location.items[0], width, -0.5f), fmaf(location.items[1], height, -0.5f)};
  };
  const uint32_t threads = at.warps * kWarp, count = owned.points;
  const uint32_t step = (threads >> owned.points_bits) * at.query_points;
  uint32_t mine = 0, bit = 1;  // which of the points that this thread looks at touch the tile
  for (uint32_t first = threadIdx.x; first < count; first += kLookedAt * threads) {
    Pack<float, 2> location[kLookedAt];
#pragma unroll
    for (int k = 0; k < kLookedAt; ++k) {
      const uint32_t next = offset_of_point(at, owned, first) + k * step;
      location[k] = *row_at(first_location, first + k * threads < count ? next : 0, sizeof(Pack<float, 2>));
    }
#pragma unroll
    for (int k = 0; k < kLookedAt; ++k, bit *= 2) {
      const auto place = place_of(location[k]);
      if ((first + k * threads >= count) | !tile.touched_by(place)) continue;
      mine |= bit;
      atomicAdd(&memory.ends[1 + tile.pixel(place)], 1u);
    }
  }
  __syncthreads();
  if (threadIdx.x < kWarp) add_up_pixels(memory.ends + 1);
  __syncthreads();
  for (; mine; mine &= mine - 1) {
    const uint32_t i = threadIdx.x + (__ffs(mine) - 1) * threads;
    const uint32_t offset = offset_of_point(at, owned, i);
    const auto place = place_of(first_location[offset]);
    const uint32_t position = atomicAdd(&memory.ends[1 + tile.pixel(place)], 1u);
    memory.points[position] = {place.items[0], place.items[1], weights[tile.first_point + offset],
                               i >> owned.points_bits};
  }
  __syncthreads();
}

// The channels of a cell that a thread adds up: kLoads times kWidth side by side, 16 bytes. The upper half of a warp
// takes the upper half of the channels first: an instruction that reads the same part of 16 rows would have to fetch
// them one by one, as they lie in the same banks of the cache.
template <typename T>
struct OwnedRow {
  static constexpr int kWidth = 16 / sizeof(T), kLoads = kOwnedChannels / kOwnedLanes / kWidth;

  float sum[kLoads * kWidth] = {};

  __device__ static int channel(int load) {
    const int swapped = threadIdx.x & kWarp / 2 ? kOwnedChannels / 2 : 0;
    return load * kOwnedLanes * kWidth + (load < kLoads / 2 ? swapped : -swapped);
  }

  __device__ void add(const T* grad, float weight) {
    float g[kLoads][kWidth];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) load(grad + channel(j), g[j]);
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[j * kWidth + i] += weight * g[j][i];
  }

  // Point number `first` of a cell and every `step`-th after it.
  __device__ void add_points(const OwnedCell& cell, const OwnedMemory& memory, uint32_t first, uint32_t step,
                             const T* grad, uint32_t row_bytes) {
    const float column = memory.tile.left + cell.column, line = memory.tile.top + cell.line;
#pragma unroll 1
    for (uint32_t i = first; i < cell.count; i += step) {
      const OwnedPoint point = memory.points[cell.position(i)];
      const float share = (1 - fabsf(point.x - column)) * (1 - fabsf(point.y - line));
      add(row_at(grad, point.query, row_bytes), point.weight * share);
    }
  }

  // The sum over all groups of the warp of the number that write_one() writes.
  __device__ float add_groups() {
    static_assert(kOwnedGroups == kLoads * kWidth, "a number for each group");
#pragma unroll
    for (int i = 0; i < kOwnedGroups / 2; ++i)
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i + kOwnedGroups / 2], kWarp / 2);
#pragma unroll
    for (int step = 2; step < kOwnedGroups; step *= 2)
#pragma unroll
      for (int i = 0; i < kOwnedGroups / 2 / step; ++i) {
        float &low = sum[i], &high = sum[i + kOwnedGroups / 2 / step];
        const int offset = kWarp / 2 / step;
        const bool upper = threadIdx.x & offset;
        const float other = upper ? low : high;
        low = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, other, offset);
      }
    return sum[0];
  }

  __device__ static void write_one(T* to, float number) {
    const uint32_t group = threadIdx.x % kWarp / kOwnedLanes;
    to[group / kWidth * kOwnedLanes * kWidth + group % kWidth] = static_cast<T>(number);
  }

  __device__ void write(T* to) const {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      Pack<T, kWidth> result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) result.items[i] = static_cast<T>(sum[j * kWidth + i]);
      *reinterpret_cast<Pack<T, kWidth>*>(to + channel(j)) = result;
    }
  }
};

// Writes zeros to the cells without points and lists the others.
template <typename T>
__device__ inline void list_cells(const Geometry& at, T* grad_value, uint32_t row_bytes, OwnedMemory& memory) {
  constexpr uint32_t busy = 0xffffffffu;
  const OwnedTile tile = memory.tile;
  const Level& level = at.levels[tile.level];
  const uint32_t pitch = tile.pitch(), lane = threadIdx.x % kWarp;
  const uint32_t end = (tile.bottom - tile.top) << tile.width_bits;
#pragma unroll 1
  for (uint32_t place = threadIdx.x; place - lane < end; place += at.warps * kWarp) {
    const int32_t column = place & (pitch - 2), line = place >> tile.width_bits;
    const bool exists = (tile.left + column < tile.right) & (place < end);
    const uint32_t* ends = memory.ends + (exists ? line * pitch + column : 0);
    const uint32_t above = ends[0], count_above = ends[2] - above;
    const uint32_t beside = ends[pitch], count = count_above + ends[pitch + 2] - beside;
    const uint32_t row = level.start + (tile.top + line) * level.width + tile.left + column;
    const uint32_t idle_row = exists && count == 0 ? row : busy;
#pragma unroll
    for (int k = 0; k < kOwnedLanes; ++k) {
      const uint32_t next = __shfl_sync(0xffffffffu, idle_row, k * kOwnedGroups + lane / kOwnedLanes);
      if (next != busy) OwnedRow<T>{}.write(row_at(grad_value, next, row_bytes));
    }
    if (!exists || count == 0) continue;
    OwnedCell& cell = count <= kLongCell ? memory.cells[atomicAdd(&memory.short_cells, 1u)]
                                         : memory.long_cell(atomicAdd(&memory.long_cells, 1u));
    cell = {row,
            static_cast<uint16_t>(column),
            static_cast<uint16_t>(line),
            static_cast<uint16_t>(above),
            static_cast<uint16_t>(count_above),
            static_cast<uint16_t>(beside),
            static_cast<uint16_t>(count)};
  }
  __syncthreads();
}

// Adds up the points around the cells of the lists, and writes these.
template <typename T>
__device__ inline void add_up_cells(const Geometry& at, const T* grad_output, T* grad_value, uint32_t row_bytes,
                                    OwnedMemory& memory) {
  const uint32_t group = threadIdx.x % kWarp / kOwnedLanes, warp = threadIdx.x / kWarp, warps = at.warps;
  for (uint32_t i = 0; i < memory.long_cells; ++i) {
    const OwnedCell cell = memory.long_cell(i);
    const bool hot = cell.count > kHotCell;
    if (!hot && i % warps != warp) continue;
    OwnedRow<T> row;
    row.add_points(cell, memory, hot ? threadIdx.x / kOwnedLanes : group, hot ? warps * kOwnedGroups : kOwnedGroups,
                   grad_output, row_bytes);
    float total = row.add_groups();
    if (hot) {
      memory.sums[warp][threadIdx.x % kWarp] = total;
      __syncthreads();
      total = 0;
      for (uint32_t other = 0; other < warps; ++other) total += memory.sums[other][threadIdx.x % kWarp];
      __syncthreads();
    }
    if (!hot || warp == 0) row.write_one(row_at(grad_value, cell.row, row_bytes), total);
  }
  for (uint32_t i = warp * kOwnedGroups + group; i < memory.short_cells; i += warps * kOwnedGroups) {
    const OwnedCell cell = memory.cells[i];
    OwnedRow<T> row;
    row.add_points(cell, memory, 0, 1, grad_output, row_bytes);
    row.write(row_at(grad_value, cell.row, row_bytes));
  }
}

template <typename T>
__device__ inline void write_tile(const Geometry& at, const OwnedTiles& owned, uint32_t task, const T* grad_output,
                                  const float* locations, const float* weights, T* grad_value, OwnedMemory& memory) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i <= kOwnedPixels; i += at.warps * kWarp) memory.ends[i] = 0;
  if (threadIdx.x == 0) {
    memory.tile = owned_tile_at(at, owned, task);
    memory.short_cells = memory.long_cells = 0;
  }
  __syncthreads();
  sort_points(at, owned, locations, weights, memory);
  const uint32_t row_bytes = at.grad_row_stride * sizeof(T);  // of grad_output too
  const uint32_t channel = memory.tile.head * kOwnedChannels + threadIdx.x % kOwnedLanes * OwnedRow<T>::kWidth;
  grad_value += memory.tile.image * at.grad_image_stride + channel;
  grad_output += int64_t{memory.tile.image} * at.Lq * at.grad_row_stride + channel;
  list_cells(at, grad_value, row_bytes, memory);
  add_up_cells(at, grad_output, grad_value, row_bytes, memory);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    owned_backward_kernel(const Geometry at, const OwnedTiles owned, const T* __restrict__ grad_output,
                          const T* __restrict__ value, const float* __restrict__ locations,
                          const float* __restrict__ weights, T* __restrict__ grad_value,
                          float* __restrict__ grad_locations, float* __restrict__ grad_weights) {
  extern __shared__ __align__(32) unsigned char shared_memory[];
  if (blockIdx.x < at.tasks)
    point_backward<T, float, 4, 8>(at, grad_output, value, locations, weights, NoSum{}, grad_locations, grad_weights);
  else
    write_tile(at, owned, blockIdx.x - static_cast<uint32_t>(at.tasks), grad_output, locations, weights, grad_value,
               reinterpret_cast<OwnedMemory&>(shared_memory));
}

}  // namespace deformable_detr
