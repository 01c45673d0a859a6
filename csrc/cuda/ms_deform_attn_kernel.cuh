// The CUDA kernels, free of PyTorch but for its number types, so that tests can run them on an emulated device.
//
// A block owns a tile of queries of one (image, head). It first turns locations and weights into samples in
// shared memory, one thread per point; then G neighbouring threads gather the D channels of a query with 16-byte
// loads. In the encoder (a query per pixel) a tile is a square of pixels, whose samples share cache lines.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../sizes.h"

namespace deformable_detr {

constexpr int kMaxLevels = 16;
constexpr int kThreads = 256;
constexpr int64_t kDefaultSharedMemory = 48 << 10;
constexpr int kTile = 16;                       // a tile of the encoder is kTile x kTile pixels
constexpr int64_t kMaxRows = int64_t{1} << 27;  // a sample packs its row beside four flags

struct Level {
  int32_t height, width, start, first_tile;
};

// Sizes and strides (in elements), passed by value: kernels read no shape from device memory.
struct Geometry {
  Level levels[kMaxLevels];
  int32_t L, P, M, D;
  int64_t Lq;
  int64_t image_stride, row_stride, head_stride;  // of value
  int64_t grad_row_stride, grad_image_stride;     // of grad_value, (N, S, M, D) contiguous
  int64_t tiles;                                  // per image and head
  int64_t tasks;                                  // tiles of all images and heads
  int32_t tile_queries;                           // places for queries in a tile, a multiple of the next
  int32_t pass_queries;                           // queries a block works on at a time
  int32_t lanes;                                  // G, threads per query
  int32_t pitch;                                  // samples per query in shared memory; odd, against bank conflicts
  bool tiled;                                     // queries are the pixels of the levels
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
  at.pass_queries = round_down_to_power_of_two(std::max<int64_t>(fitting, 32 / lanes));
  at.tiled = sizes.Lq == sizes.S;
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

// One sampling point. packed = 16 * (row of the top left corner) + flags of the corners inside the map.
template <typename A>
struct alignas(4 * sizeof(A)) Sample {
  int32_t packed;
  A x, y;  // distance from the left and top corners, in [0, 1)
  A weight;
};

enum Corner { kTopLeft = 1, kTopRight = 2, kBottomLeft = 4, kBottomRight = 8 };

template <typename A>
__device__ inline Sample<A> make_sample(const Level& level, A location_x, A location_y, A weight) {
  const A x = location_x * level.width - A(0.5), y = location_y * level.height - A(0.5);
  // False for NaN; a point outside gets no corner and so no part in anything.
  if (!(x > -1 && x < level.width && y > -1 && y < level.height)) return {0, A(0), A(0), A(0)};
  const A left = floor(x), top = floor(y);
  const int32_t column = static_cast<int32_t>(left), line = static_cast<int32_t>(top);
  const int32_t horizontal =
      (column >= 0 ? kTopLeft | kBottomLeft : 0) | (column + 1 < level.width ? kTopRight | kBottomRight : 0);
  const int32_t vertical =
      (line >= 0 ? kTopLeft | kTopRight : 0) | (line + 1 < level.height ? kBottomLeft | kBottomRight : 0);
  const int32_t row = level.start + line * level.width + column;
  return {row * 16 + (horizontal & vertical), x - left, y - top, weight};
}

// The query at a place of a tile, -1 where the tile sticks out.
__device__ inline int64_t query_at(const Geometry& at, int64_t tile, int place) {
  if (!at.tiled) {
    const int64_t query = tile * at.tile_queries + place;
    return query < at.Lq ? query : -1;
  }
  int index = 0;
  while (index + 1 < at.L && tile >= at.levels[index + 1].first_tile) ++index;
  const Level& level = at.levels[index];
  const int32_t across = (level.width + kTile - 1) / kTile;
  const int32_t number = static_cast<int32_t>(tile) - level.first_tile;
  const int32_t line = number / across * kTile + place / kTile, column = number % across * kTile + place % kTile;
  return line < level.height && column < level.width ? level.start + line * level.width + column : -1;
}

// What a block works on.
struct Task {
  int64_t image, tile;
  int32_t head;
};

__device__ inline Task task_at(const Geometry& at, int64_t number) {
  const int64_t image_head = number / at.tiles;
  return {image_head / at.M, number % at.tiles, static_cast<int32_t>(image_head % at.M)};
}

// Index of (image, query, head) in (N, Lq, M).
__device__ inline int64_t output_row(const Geometry& at, const Task& task, int64_t query) {
  return (task.image * at.Lq + query) * at.M + task.head;
}

// Fills `samples` for the queries at places [first, first + pass_queries) of the tile.
template <typename A>
__device__ inline void stage(const Geometry& at, const Task& task, int first, const A* locations, const A* weights,
                             Sample<A>* samples) {
  const int points = at.L * at.P;
  for (int entry = threadIdx.x; entry < at.pass_queries * points; entry += blockDim.x) {
    const int slot = entry / points, point = entry % points;
    const int64_t query = query_at(at, task.tile, first + slot);
    Sample<A> sample{0, A(0), A(0), A(0)};
    if (query >= 0) {
      const int64_t index = output_row(at, task, query) * points + point;
      sample = make_sample(at.levels[point / at.P], locations[2 * index], locations[2 * index + 1], weights[index]);
    }
    samples[slot * at.pitch + point] = sample;
  }
}

// A corner outside is not read at all: its row may belong to another line, level or image, and hold NaN.
template <typename T, typename A, int VEC>
__device__ inline void load(const T* from, bool valid, A (&to)[VEC]) {
  Pack<T, VEC> pack{};
  if (valid) pack = *reinterpret_cast<const Pack<T, VEC>*>(from);
#pragma unroll
  for (int i = 0; i < VEC; ++i) to[i] = static_cast<A>(pack.items[i]);
}

// ---- forward -------------------------------------------------------------------------------------------------

template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const Geometry at, const T* __restrict__ value, const A* __restrict__ locations,
                   const A* __restrict__ weights, T* __restrict__ output) {
  extern __shared__ __align__(32) unsigned char shared_memory[];
  Sample<A>* samples = reinterpret_cast<Sample<A>*>(shared_memory);
  const int slot = threadIdx.x / at.lanes, lane = threadIdx.x % at.lanes;
  for (int64_t number = blockIdx.x; number < at.tasks; number += gridDim.x) {
    const Task task = task_at(at, number);
    const T* base = value + task.image * at.image_stride + task.head * at.head_stride;
    for (int first = 0; first < at.tile_queries; first += at.pass_queries) {
      stage(at, task, first, locations, weights, samples);
      __syncthreads();
      const int64_t query = slot < at.pass_queries ? query_at(at, task.tile, first + slot) : -1;
      for (int channel = lane * VEC; query >= 0 && channel < at.D; channel += at.lanes * VEC) {
        A sum[VEC] = {};
        const Sample<A>* next = samples + slot * at.pitch;
        for (int level = 0; level < at.L; ++level) {
          const int64_t below = at.levels[level].width * at.row_stride;
#pragma unroll 2
          for (int point = 0; point < at.P; ++point) {
            const Sample<A> sample = *next++;
            const T* corner = base + (sample.packed >> 4) * at.row_stride + channel;
            A v[4][VEC];
            load(corner, sample.packed & kTopLeft, v[0]);
            load(corner + at.row_stride, sample.packed & kTopRight, v[1]);
            load(corner + below, sample.packed & kBottomLeft, v[2]);
            load(corner + below + at.row_stride, sample.packed & kBottomRight, v[3]);
            const A lower = sample.weight * sample.y, upper = sample.weight - lower;
            const A w3 = lower * sample.x, w2 = lower - w3, w1 = upper * sample.x, w0 = upper - w1;
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum[i] += w0 * v[0][i] + w1 * v[1][i] + w2 * v[2][i] + w3 * v[3][i];
          }
        }
        Pack<T, VEC> result;
#pragma unroll
        for (int i = 0; i < VEC; ++i) result.items[i] = static_cast<T>(sum[i]);
        *reinterpret_cast<Pack<T, VEC>*>(output + output_row(at, task, query) * at.D + channel) = result;
      }
      __syncthreads();
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DEFORMABLE_DETR_VECTOR_REDUCTIONS
__device__ inline void add_four(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}
#endif

// How contributions to grad_value are added up. add() adds weight * grad[i] to VEC channels of a row; `spread`
// says which: false: the VEC channels after `lane * VEC`, true: lane, lane + G, lane + 2G, ... so that the
// neighbouring threads of one instruction touch neighbouring addresses.
template <typename A>
struct AtomicSum {
  A* grad_value;
#ifdef DEFORMABLE_DETR_VECTOR_REDUCTIONS
  static constexpr bool vectors = sizeof(A) == 4;
#else
  static constexpr bool vectors = false;
#endif

  template <int VEC>
  static constexpr bool spread = VEC > 1 && !(vectors && VEC % 4 == 0);

  template <int VEC, int G>
  __device__ void add(int64_t offset, A weight, const A (&grad)[VEC]) const {
    A* to = grad_value + offset;
    if constexpr (spread<VEC>) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) atomicAdd(to + i * G, weight * grad[i]);
    } else if constexpr (VEC == 1) {
      atomicAdd(to, weight * grad[0]);
    } else {
#ifdef DEFORMABLE_DETR_VECTOR_REDUCTIONS
#pragma unroll
      for (int i = 0; i < VEC; i += 4)
        add_four(to + i, weight * grad[i], weight * grad[i + 1], weight * grad[i + 2], weight * grad[i + 3]);
#endif
    }
  }
};

// Sums of 64-bit integers do not depend on their order. `bound` is the largest possible |contribution| and
// `headroom` the number of bits that the largest possible count of them needs.
struct FixedPoint {
  unsigned long long* grad_value;
  const float* bound;
  int32_t headroom;

  template <int VEC>
  static constexpr bool spread = false;

  __device__ double scale() const {
    return *bound > 0 ? scalbn(1.0, 61 - headroom - ilogb(static_cast<double>(*bound))) : 1.0;
  }

  template <int VEC, int G>
  __device__ void add(int64_t offset, float weight, const float (&grad)[VEC]) const {
    static_assert(VEC == 1, "the kernel of one channel per thread is the only one that sums like this");
    const long long fixed = static_cast<long long>(rint(scale() * (weight * grad[0])));
    atomicAdd(grad_value + offset, static_cast<unsigned long long>(fixed));
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) fixed_point_to_value(FixedPoint sum, int64_t count, T* grad_value) {
  const double factor = sum.scale();
  // With an infinite or NaN gradient there is no scale: say so in every element, as loss scaling expects.
  const bool finite = *sum.bound <= 3.402823466e38f;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const double number = static_cast<double>(static_cast<long long>(sum.grad_value[i])) / factor;
    grad_value[i] = static_cast<T>(finite ? static_cast<float>(number) : *sum.bound - *sum.bound);
  }
}

// Sums each of four numbers over G neighbouring threads; thread `lane` returns the sum of number lane % 4. Each
// exchange halves what a thread still has to carry, so it takes 3 + log2(G / 4) shuffles and not 4 * log2(G).
template <int G, typename A>
__device__ inline A sum_corners(const A (&dot)[4], int lane) {
  constexpr unsigned all = 0xffffffffu;
  const bool odd = lane & 1, second = lane & 2;
  const A left = (odd ? dot[1] : dot[0]) + __shfl_xor_sync(all, odd ? dot[0] : dot[1], 1);
  const A right = (odd ? dot[3] : dot[2]) + __shfl_xor_sync(all, odd ? dot[2] : dot[3], 1);
  A sum = (second ? right : left) + __shfl_xor_sync(all, second ? left : right, 2);
#pragma unroll
  for (int offset = 4; offset < G; offset *= 2) sum += __shfl_xor_sync(all, sum, offset);
  return sum;
}

template <typename A>
__device__ inline void write_point_gradients(const Geometry& at, const Task& task, int first, const Sample<A>* samples,
                                             const Pack<A, 4>* dots, const A* weights, A* grad_locations,
                                             A* grad_weights) {
  const int points = at.L * at.P;
  for (int entry = threadIdx.x; entry < at.pass_queries * points; entry += blockDim.x) {
    const int slot = entry / points, point = entry % points;
    const int64_t query = query_at(at, task.tile, first + slot);
    if (query < 0) continue;
    const Sample<A> sample = samples[slot * at.pitch + point];
    const Pack<A, 4> dot = dots[slot * at.pitch + point];
    const Level& level = at.levels[point / at.P];
    const A x = sample.x, y = sample.y;
    const A top = dot.items[1] - dot.items[0], bottom = dot.items[3] - dot.items[2];
    const A left = dot.items[2] - dot.items[0], right = dot.items[3] - dot.items[1];
    const int64_t index = output_row(at, task, query) * points + point;
    grad_weights[index] =
        (1 - y) * ((1 - x) * dot.items[0] + x * dot.items[1]) + y * ((1 - x) * dot.items[2] + x * dot.items[3]);
    grad_locations[2 * index] = sample.weight * level.width * ((1 - y) * top + y * bottom);
    grad_locations[2 * index + 1] = sample.weight * level.height * ((1 - x) * left + x * right);
  }
}

// G, a power of two of at least 4, divides the warp, and G * VEC divides D if VEC > 1. The threads of a query
// exchange by shuffles, so every thread walks through all points, with no corner valid where there is no query.
template <typename T, typename A, int VEC, int G, typename Sum>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Geometry at, const T* __restrict__ grad_output, const T* __restrict__ value,
                    const A* __restrict__ locations, const A* __restrict__ weights, const Sum grad_value,
                    A* __restrict__ grad_locations, A* __restrict__ grad_weights) {
  constexpr bool spread = Sum::template spread<VEC>;
  extern __shared__ __align__(32) unsigned char shared_memory[];
  Sample<A>* samples = reinterpret_cast<Sample<A>*>(shared_memory);
  Pack<A, 4>* dots = reinterpret_cast<Pack<A, 4>*>(samples + at.pass_queries * at.pitch);
  const int slot = threadIdx.x / G, lane = threadIdx.x % G;
  for (int64_t number = blockIdx.x; number < at.tasks; number += gridDim.x) {
    const Task task = task_at(at, number);
    const T* base = value + task.image * at.image_stride + task.head * at.head_stride;
    const int64_t grad_base = task.image * at.grad_image_stride + static_cast<int64_t>(task.head) * at.D;
    for (int first = 0; first < at.tile_queries; first += at.pass_queries) {
      stage(at, task, first, locations, weights, samples);
      __syncthreads();
      const int64_t query = query_at(at, task.tile, first + slot);
      const T* grad = grad_output + (query >= 0 ? output_row(at, task, query) * at.D : 0);
      for (int chunk = 0; chunk < at.D; chunk += G * VEC) {
        const int channel = chunk + lane * VEC;
        const bool active = query >= 0 && channel < at.D;
        A g[VEC], g_spread[VEC] = {};
        load(grad + channel, active, g);
        if constexpr (spread) {
#pragma unroll
          for (int i = 0; i < VEC; ++i)
            if (active) g_spread[i] = static_cast<A>(grad[chunk + lane + i * G]);
        }
        const Sample<A>* next = samples + slot * at.pitch;
        Pack<A, 4>* result = dots + slot * at.pitch;
        for (int level = 0; level < at.L; ++level) {
          const int32_t width = at.levels[level].width;
          for (int point = 0; point < at.P; ++point, ++next, ++result) {
            const Sample<A> sample = *next;
            const int64_t row = sample.packed >> 4;
            const A lower = sample.weight * sample.y, upper = sample.weight - lower;
            const A w3 = lower * sample.x, w1 = upper * sample.x;
            const A weight[4] = {upper - w1, w1, lower - w3, w3};
            A dot[4] = {};
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              const int64_t at_row = row + (corner & 1) + (corner & 2 ? width : 0);
              const bool valid = sample.packed >> corner & 1;
              A v[VEC];
              load(base + at_row * at.row_stride + channel, valid && active, v);
#pragma unroll
              for (int i = 0; i < VEC; ++i) dot[corner] += v[i] * g[i];
              const int64_t offset = grad_base + at_row * at.grad_row_stride + (spread ? chunk + lane : channel);
              if (valid && active) grad_value.template add<VEC, G>(offset, weight[corner], spread ? g_spread : g);
            }
            const A sum = sum_corners<G>(dot, lane);
            if (lane < 4) result->items[lane] = chunk == 0 ? sum : result->items[lane] + sum;
          }
        }
      }
      __syncthreads();
      write_point_gradients(at, task, first, samples, dots, weights, grad_locations, grad_weights);
      __syncthreads();
    }
  }
}

}  // namespace deformable_detr
