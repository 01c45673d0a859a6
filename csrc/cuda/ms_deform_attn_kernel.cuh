// The CUDA kernels, free of PyTorch but for its number types, so that tests can run them on an emulated device.
//
// A block owns a tile of queries of one (image, head). It first turns locations and weights into samples in
// shared memory, one thread per point; then G neighbouring threads gather the D channels of a query with 16-byte
// loads. In the encoder (a query per pixel) a tile is a square of pixels, whose samples share cache lines.
#pragma once

#include "ms_deform_attn_samples.cuh"

namespace deformable_detr {

// ---- forward -------------------------------------------------------------------------------------------------

template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const Geometry at, const T* __restrict__ value, const A* __restrict__ locations,
                   const A* __restrict__ weights, T* __restrict__ output) {
  extern __shared__ __align__(32) unsigned char shared_memory[];
  Sample<A>* samples = reinterpret_cast<Sample<A>*>(shared_memory);
  const int slot = threadIdx.x / at.lanes, lane = threadIdx.x % at.lanes;
  for (int64_t number = blockIdx.x; number < at.tasks; number += gridDim.x) {
    const Task task = task_at(at, number);
    const T* base = value + task.image * at.image_stride + task.head * at.head_stride;
    for (int first = 0; first < at.tile_queries && has_line(task, first); first += at.pass_queries) {
      stage(at, task, first, locations, weights, samples);
      __syncthreads();
      const int32_t query = slot < at.pass_queries ? query_at(task, first + slot) : -1;
      for (int channel = lane * VEC; query >= 0 && channel < at.D; channel += at.lanes * VEC) {
        A sum[VEC] = {};
        const Sample<A>* next = samples + slot * at.pitch;
        for (int level = 0; level < at.L; ++level) {
          const Corners<const T> corners(base + channel, at.row_stride, at.levels[level].width);
#pragma unroll 2
          for (int point = 0; point < at.P; ++point) {
            const Sample<A> sample = *next++;
            A v[4][VEC];
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
              load(corners.at(sample.row(), corner), sample.has(corner), v[corner]);
            const Pack<A, 4> share = sample.shares();
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
#pragma unroll
              for (int i = 0; i < VEC; ++i) sum[i] += share.items[corner] * v[corner][i];
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
#endif

// Adds four neighbouring numbers in one instruction.
__device__ inline void add_four(float* to, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d));
#else
  atomicAdd(to, a), atomicAdd(to + 1, b), atomicAdd(to + 2, c), atomicAdd(to + 3, d);
#endif
}

// How contributions to grad_value are added up. add() adds weight * grad to VEC channels of a row, `run` of them side
// by side in each instruction and G * run apart from one instruction to the next: so an instruction of G neighbouring
// threads fills whole sectors of memory.
template <typename A>
struct AtomicSum {
  A* grad_value;
#ifdef DEFORMABLE_DETR_VECTOR_REDUCTIONS
  static constexpr bool vectors = sizeof(A) == 4;
#else
  static constexpr bool vectors = false;
#endif

  template <int VEC>
  static constexpr int run = vectors && VEC % 4 == 0 ? 4 : 1;

  __device__ const AtomicSum& prepare() const { return *this; }

  template <int VEC, int G>
  __device__ void add(A* to, bool valid, A weight, const A (&grad)[VEC]) const {
    if (!valid) return;
#pragma unroll
    for (int i = 0; i < VEC; i += run<VEC>) {
      if constexpr (run<VEC> == 4)
        add_four(to + i * G, weight * grad[i], weight * grad[i + 1], weight * grad[i + 2], weight * grad[i + 3]);
      else
        atomicAdd(to + i * G, weight * grad[i]);
    }
  }
};

// Sums of 64-bit integers do not depend on their order. `bound` is the largest possible |contribution| and
// `headroom` the number of bits that the largest possible count of them needs. The scale is computed once per thread.
struct FixedPoint {
  unsigned long long* grad_value;
  const float* bound;
  int32_t headroom;

  __device__ double scale() const {
    return *bound > 0 ? scalbn(1.0, 61 - headroom - ilogb(static_cast<double>(*bound))) : 1.0;
  }

  struct Scaled {
    unsigned long long* grad_value;
    double scale;

    template <int VEC>
    static constexpr int run = 1;

    template <int VEC, int G>
    __device__ void add(unsigned long long* to, bool valid, float weight, const float (&grad)[VEC]) const {
      static_assert(VEC == 1, "the kernel of one channel per thread is the only one that sums like this");
      if (!valid) return;
      const long long fixed = static_cast<long long>(rint(scale * (weight * grad[0])));
      atomicAdd(to, static_cast<unsigned long long>(fixed));
    }
  };

  __device__ Scaled prepare() const { return {grad_value, scale()}; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fixed_point_to_value(FixedPoint sum, int64_t count, T* grad_value) {
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
                                             const Pack<A, 4>* dots, A* grad_locations, A* grad_weights) {
  for_each_point(at, task, first, [&](const Level& level, int place, int64_t index) {
    if (index < 0) return;
    const Sample<A> sample = samples[place];
    const Pack<A, 4> dot = dots[place];
    const A x = sample.x, y = sample.y;
    const A top = dot.items[1] - dot.items[0], bottom = dot.items[3] - dot.items[2];
    const A left = dot.items[2] - dot.items[0], right = dot.items[3] - dot.items[1];
    grad_weights[index] =
        (1 - y) * ((1 - x) * dot.items[0] + x * dot.items[1]) + y * ((1 - x) * dot.items[2] + x * dot.items[3]);
    reinterpret_cast<Pack<A, 2>*>(grad_locations)[index] = {
        sample.weight * level.width * ((1 - y) * top + y * bottom),
        sample.weight * level.height * ((1 - x) * left + x * right)};
  });
}

// G, a power of two of at least 4, divides the warp, and G * VEC divides D if VEC > 1. The threads of a query
// exchange by shuffles, so every thread walks through all points, with no corner where there is no query.
template <typename T, typename A, int VEC, int G, typename Sum>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const Geometry at, const T* __restrict__ grad_output, const T* __restrict__ value,
                    const A* __restrict__ locations, const A* __restrict__ weights, const Sum grad_value,
                    A* __restrict__ grad_locations, A* __restrict__ grad_weights) {
  const auto total = grad_value.prepare();
  using Total = std::remove_pointer_t<decltype(total.grad_value)>;
  constexpr int run = decltype(total)::template run<VEC>;
  extern __shared__ __align__(32) unsigned char shared_memory[];
  Sample<A>* samples = reinterpret_cast<Sample<A>*>(shared_memory);
  Pack<A, 4>* dots = reinterpret_cast<Pack<A, 4>*>(samples + at.pass_queries * at.pitch);
  const int slot = threadIdx.x / G, lane = threadIdx.x % G;
  for (int64_t number = blockIdx.x; number < at.tasks; number += gridDim.x) {
    const Task task = task_at(at, number);
    const T* base = value + task.image * at.image_stride + task.head * at.head_stride;
    Total* grad_base = total.grad_value + task.image * at.grad_image_stride + static_cast<int64_t>(task.head) * at.D;
    for (int first = 0; first < at.tile_queries && has_line(task, first); first += at.pass_queries) {
      stage(at, task, first, locations, weights, samples);
      __syncthreads();
      const int32_t query = query_at(task, first + slot);
      const T* grad = grad_output + (query >= 0 ? output_row(at, task, query) * at.D : 0);
      for (int chunk = 0; chunk < at.D; chunk += G * VEC) {
        const int channel = chunk + lane * VEC;
        const bool active = query >= 0 && channel < at.D;
        A g[VEC], g_added[VEC];
        load(grad + channel, active, g);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const int added = chunk + i / run * run * G + lane * run + i % run;
          g_added[i] = run == VEC ? g[i] : active ? static_cast<A>(grad[added]) : A(0);
        }
        const Sample<A>* next = samples + slot * at.pitch;
        Pack<A, 4>* result = dots + slot * at.pitch;
        for (int level = 0; level < at.L; ++level) {
          const int32_t width = at.levels[level].width;
          const Corners<const T> corners(base + channel, at.row_stride, width);
          const Corners<Total> grad_corners(grad_base + chunk + lane * run, at.grad_row_stride, width);
          for (int point = 0; point < at.P; ++point, ++next, ++result) {
            Sample<A> sample = *next;
            if (!active) sample.packed = 0;
            A v[4][VEC], dot[4] = {};
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
              load(corners.at(sample.row(), corner), sample.has(corner), v[corner]);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
#pragma unroll
              for (int i = 0; i < VEC; ++i) dot[corner] += v[corner][i] * g[i];
            const A sum = sum_corners<G>(dot, lane);
            const Pack<A, 4> share = sample.shares();
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
              total.template add<VEC, G>(grad_corners.at(sample.row(), corner), sample.has(corner), share.items[corner],
                                         g_added);
            if (lane < 4) result->items[lane] = chunk == 0 ? sum : result->items[lane] + sum;
          }
        }
      }
      __syncthreads();
      write_point_gradients(at, task, first, samples, dots, grad_locations, grad_weights);
      __syncthreads();
    }
  }
}

}  // namespace deformable_detr
