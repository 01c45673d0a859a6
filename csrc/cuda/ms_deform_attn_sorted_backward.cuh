// The backward pass of an encoder on devices with vector reductions, whose reductions into the L2 cache bound the other
// one: contributions are added up within the multiprocessor first.
//
// A block sorts the points of its tile, level by level, by the pixel of their bottom right corner. Groups of G
// neighbouring threads then take equal shares of the sorted points. While the pixel stays the same, the rows of value
// at its corners and the sums for those rows of grad_value stay in registers. Sorting is by the position within a
// window of kWindow x kWindow pixels that repeats over the map, so points of far pixels may mix: that costs time, and
// is right all the same. What bounds it is issuing instructions: the loop over sorted points has no other condition
// than whether the pixel is another one.
#pragma once

#include "ms_deform_attn_backward.cuh"

namespace deformable_detr {

constexpr int64_t kMaxSortedRows = int64_t{1} << 19;  // so that a row, four flags and the place of a query fit 32 bits
constexpr int kSortedLanes = 8;                       // G
constexpr int kSortedPoints = 4;                      // of a query and level at a time
constexpr int kTileQueries = kTile * kTile;
constexpr int kSorted = kTileQueries * kSortedPoints;
constexpr int kWindow = 32;
constexpr int kBins = kWindow * kWindow;

// Which corners of a pixel are on the map. A pixel is that of the bottom right corner of a point, which may be off the
// map; `number` is its row * 16 + these flags.
enum Corner : uint32_t { kTopLeft = 1, kTopRight = 2, kBottomLeft = 4, kBottomRight = 8, kAllCorners = 15 };

__device__ inline uint32_t pixel_number(const Level& level, const Place<float>& place) {
  const uint32_t left = place.has_left() ? kTopLeft | kBottomLeft : 0;
  const uint32_t right = place.has_right(level) ? kTopRight | kBottomRight : 0;
  const uint32_t top = place.has_top() ? kTopLeft | kTopRight : 0;
  const uint32_t bottom = place.has_bottom(level) ? kBottomLeft | kBottomRight : 0;
  const uint32_t row = level.start + (place.line + 1) * level.width + place.column + 1;
  return row * 16 + (place.inside ? (left | right) & (top | bottom) : 0);
}

constexpr uint32_t kNoPixel = 0xfffff0;  // with no corners

struct alignas(16) SortedPoint {
  uint32_t packed;  // 256 * number of the pixel + place of the query in the tile
  float x, y;       // distance from the left and top corners
  float weight;

  __device__ uint32_t pixel() const { return packed >> 8; }
  __device__ uint32_t query() const { return packed & 255; }
};

// Rows of value around a pixel, and what has been added up for the same rows of grad_value; of each, four channels.
template <typename T>
struct AroundPixel {
  using Words = Pack<uint32_t, sizeof(T)>;  // of four channels

  const T* value;
  float* grad_value;
  uint32_t row_bytes, grad_row_bytes;
  uint32_t pixel = kNoPixel;
  float v[4][4] = {}, sum[4][4] = {};

  __device__ static uint32_t row(uint32_t pixel, uint32_t width, int corner) {
    return (pixel >> 4) - (corner & 2 ? 0 : width) - (corner & 1 ? 0 : 1);
  }

  // `all` corners of a pixel are on the map: known when this is compiled, as it takes two thirds of the instructions.
  template <bool all>
  __device__ static bool has(uint32_t pixel, int corner) {
    return all || pixel & 1u << corner;
  }

  template <bool all>
  __device__ void write(uint32_t width) const {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const float (&of)[4] = sum[corner];
      if (has<all>(pixel, corner))
        add_four(row_at(grad_value, row(pixel, width, corner), grad_row_bytes), of[0], of[1], of[2], of[3]);
    }
  }

  // Rows are asked for before the sums are written, and arrive meanwhile.
  template <bool all>
  __device__ void read_and_write(uint32_t next, uint32_t width, Words (&rows)[4]) const {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (has<all>(next, corner))
        rows[corner] = *reinterpret_cast<const Words*>(row_at(value, row(next, width, corner), row_bytes));
      else
        rows[corner] = {};
    }
    write<all>(width);
  }

  __device__ void move_to(uint32_t next, uint32_t width) {
    Words rows[4];
    if ((pixel & next & kAllCorners) == kAllCorners)
      read_and_write<true>(next, width, rows);
    else
      read_and_write<false>(next, width, rows);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      load(reinterpret_cast<const T*>(&rows[corner]), v[corner]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[corner][i] = 0;
    }
    pixel = next;
  }
};

template <int G>
struct SortedMemory {
  static constexpr int kGroups = kThreads / G;
  static constexpr int kShare = kSorted / kGroups + 1;  // odd, so that groups read different banks

  Pack<float, 4> grads[kTileQueries][G];
  SortedPoint points[kGroups][kShare];
  Pack<float, 4> dots[kGroups][kShare];
  uint32_t bins[kBins];  // the number of points of each, then the position of its first
  uint32_t sums[kThreads / kWarp];
  // Of a thread's points among the sorted ones, -1 for none; in registers the compiler has no room for them.
  Pack<int32_t, kSorted / kThreads> positions[kThreads];
};

// Counts become positions within the bins of a warp, whose sum goes to `sums`.
template <int G>
__device__ inline void add_up_bins(SortedMemory<G>& memory) {
  static_assert(kBins == 2 * kThreads);
  auto& pair = reinterpret_cast<Pack<uint32_t, 2>*>(memory.bins)[threadIdx.x];
  const uint32_t first = pair.items[0], both = first + pair.items[1], lane = threadIdx.x % kWarp;
  const uint32_t sum = sum_up_to_lane(both);
  pair = {sum - both, sum - both + first};
  if (lane == kWarp - 1) memory.sums[threadIdx.x / kWarp] = sum;
}

// Of all bins: the number of points, and how many are in those of the warps before number threadIdx.x % kWarp.
struct Totals {
  int count;
  uint32_t before;
};

template <int G>
__device__ inline Totals add_up_warps(const SortedMemory<G>& memory) {
  constexpr uint32_t warps = kThreads / kWarp;
  const uint32_t own = memory.sums[threadIdx.x % warps];
  const uint32_t sum = sum_up_to_lane<warps>(own);
  return {static_cast<int>(__shfl_sync(0xffffffffu, sum, warps - 1)), sum - own};
}

// Adds up the `share` points of each group.
template <typename T, int G>
__device__ inline void walk(SortedMemory<G>& memory, const uint32_t width, int share, AroundPixel<T>& around) {
  const int lane = threadIdx.x % G, group = threadIdx.x / G;
  const SortedPoint* next = memory.points[group];
  const SortedPoint* const end = next + share;
  float* dots = memory.dots[group][0].items + lane;
  const Pack<float, 4>* grads = memory.grads[0] + lane;
  for (; next != end; ++next, dots += 4) {
    const SortedPoint point = *next;
    const Pack<float, 4> g = grads[point.query() * G];
    if (point.pixel() != around.pixel) around.move_to(point.pixel(), width);
    const float bottom = point.weight * point.y, top = point.weight - bottom;
    const float top_right = top * point.x, bottom_right = bottom * point.x;
    const float shares[4] = {top - top_right, top_right, bottom - bottom_right, bottom_right};
    float dot[4] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dot[corner] += around.v[corner][i] * g.items[i];
        around.sum[corner][i] += shares[corner] * g.items[i];
      }
    const float sum = sum_corners<G>(dot, lane);
    if (lane < 4) *dots = sum;
  }
  around.template write<false>(width);
  around.pixel = kNoPixel;
}

template <typename T, int G>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sorted_backward_kernel(const Geometry at, const T* __restrict__ grad_output, const T* __restrict__ value,
                           const float* __restrict__ locations, const float* __restrict__ weights,
                           float* __restrict__ grad_value, float* __restrict__ grad_locations,
                           float* __restrict__ grad_weights) {
  constexpr int kMine = kSorted / kThreads, kGroups = kThreads / G;
  extern __shared__ __align__(32) unsigned char shared_memory[];
  auto& memory = *reinterpret_cast<SortedMemory<G>*>(shared_memory);
  const int lane = threadIdx.x % G, group = threadIdx.x / G;
  const Task& task = own_task(at);
  const int64_t first = first_row(at, task);
  AroundPixel<T> around{value + task.image * at.image_stride + task.head * at.head_stride + 4 * lane,
                        grad_value + task.image * at.grad_image_stride + int64_t{task.head} * at.D + 4 * lane,
                        static_cast<uint32_t>(at.row_stride * sizeof(T)),
                        static_cast<uint32_t>(at.grad_row_stride * sizeof(float))};
  for (int place = group; place < kTileQueries; place += kGroups) {
    const int32_t query = query_at(task, place);
    float g[4] = {};
    if (query >= 0) load(grad_output + (first + int64_t{query} * at.M) * at.D + 4 * lane, g);
    memory.grads[place][lane] = {g[0], g[1], g[2], g[3]};
  }
  // The queries of this thread's points of each level.
  const auto place_of = [](int i) { return (threadIdx.x + i * kThreads) / kSortedPoints; };
  int32_t query[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) query[i] = query_at(task, place_of(i));
  reinterpret_cast<Pack<uint32_t, 2>*>(memory.bins)[threadIdx.x] = {0, 0};
  __syncthreads();
  for (int number = 0; number < at.L; ++number) {
    const Level& level = at.levels[number];
    for (int start = 0; start < at.P; start += kSortedPoints) {
      // In (N, Lq, M, L, P), -1 for no point.
      const auto index_of = [&](int i) -> int64_t {
        const int point = start + threadIdx.x % kSortedPoints;
        if (query[i] < 0 || point >= at.P) return -1;
        return first * at.points + static_cast<int64_t>(multiply_wide(query[i], at.query_points)) + number * at.P +
               point;
      };
      SortedPoint mine[kMine] = {};
      uint32_t bin[kMine];
      auto& position = memory.positions[threadIdx.x].items;
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int64_t index = index_of(i);
        position[i] = -1;
        if (index < 0) continue;
        const auto place = locate(level, reinterpret_cast<const Pack<float, 2>*>(locations)[index]);
        const uint32_t pixel = pixel_number(level, place);
        mine[i] = {pixel << 8 | place_of(i), place.x, place.y, weights[index]};
        bin[i] = (place.line & (kWindow - 1)) * kWindow + (place.column & (kWindow - 1));
        if (pixel & 15) position[i] = atomicAdd(&memory.bins[bin[i]], 1u);
      }
      __syncthreads();
      add_up_bins(memory);
      __syncthreads();
      const Totals totals = add_up_warps(memory);
      const int share = (totals.count + kGroups - 1) / kGroups;
      const uint32_t per_group = share > 0 ? (1u << 16) / share + 1 : 0;  // to divide by it; exact up to kSorted
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const uint32_t start = __shfl_sync(0xffffffffu, totals.before, position[i] >= 0 ? bin[i] / (2 * kWarp) : 0);
        if (position[i] < 0) continue;
        const uint32_t sorted = start + memory.bins[bin[i]] + position[i], taker = sorted * per_group >> 16;
        position[i] = sorted + taker * (SortedMemory<G>::kShare - share);
        memory.points[0][position[i]] = mine[i];
      }
      // What is missing in the last shares: points of no pixel, so that all groups have as many.
      const uint32_t missing = share * kGroups - totals.count;
      if (threadIdx.x < missing) {
        const uint32_t sorted = totals.count + threadIdx.x, taker = sorted * per_group >> 16;
        memory.points[0][sorted + taker * (SortedMemory<G>::kShare - share)] = {kNoPixel << 8};
      }
      __syncthreads();
      reinterpret_cast<Pack<uint32_t, 2>*>(memory.bins)[threadIdx.x] = {0, 0};
      walk(memory, level.width, share, around);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int64_t index = index_of(i);
        if (index < 0) continue;
        Pack<float, 2> grad_location{0, 0};
        float grad_weight = 0;
        if (position[i] >= 0) {
          const SortedPoint point = memory.points[0][position[i]];
          const Pack<float, 4> dot = memory.dots[0][position[i]];
          point_gradients(level, point.x, point.y, point.weight, dot, grad_location, grad_weight);
        }
        reinterpret_cast<Pack<float, 2>*>(grad_locations)[index] = grad_location;
        grad_weights[index] = grad_weight;
      }
    }
  }
}

}  // namespace deformable_detr
