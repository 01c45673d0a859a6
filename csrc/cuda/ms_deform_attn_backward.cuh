// The backward pass for any input: every contribution to grad_value is added to device memory.
//
// Tiles and samples are those of the forward pass. G neighbouring threads multiply the rows of a point's corners with
// the gradient of its query, which gives the gradients of location and weight, and add to the rows of grad_value.
#pragma once

#include "ms_deform_attn_samples.cuh"

namespace deformable_detr {

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
  __device__ void add(A* to, A weight, const A (&grad)[VEC]) const {
#pragma unroll
    for (int i = 0; i < VEC; i += run<VEC>) {
      if constexpr (run<VEC> == 4)
        add_four(to + i * G, weight * grad[i], weight * grad[i + 1], weight * grad[i + 2], weight * grad[i + 3]);
      else
        atomicAdd(to + i * G, weight * grad[i]);
    }
  }
};

// For a kernel that leaves grad_value to others.
struct NoSum {
  static constexpr float* grad_value = nullptr;

  template <int VEC>
  static constexpr int run = VEC;

  __device__ const NoSum& prepare() const { return *this; }

  template <int VEC, int G>
  __device__ void add(float*, float, const float (&)[VEC]) const {}
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
    __device__ void add(unsigned long long* to, float weight, const float (&grad)[VEC]) const {
      static_assert(VEC == 1, "the kernel of one channel per thread is the only one that sums like this");
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

// Gradients of a point's location and weight from the products of its corners with the gradient of its query.
template <typename A>
__device__ inline void point_gradients(const Level& level, A x, A y, A weight, const Pack<A, 4>& dots,
                                       Pack<A, 2>& grad_location, A& grad_weight) {
  const A top = dots.items[1] - dots.items[0], bottom = dots.items[3] - dots.items[2];
  const A left = dots.items[2] - dots.items[0], right = dots.items[3] - dots.items[1];
  grad_weight =
      (1 - y) * ((1 - x) * dots.items[0] + x * dots.items[1]) + y * ((1 - x) * dots.items[2] + x * dots.items[3]);
  grad_location = {weight * level.width * ((1 - y) * top + y * bottom),
                   weight * level.height * ((1 - x) * left + x * right)};
}

template <typename A>
struct StagedWithDots : Staged<A> {
  Pack<A, 4> dots[Staged<A>::kPlaces];
};

// G, a power of two of at least 4, divides the warp and is at.lanes; G * VEC divides D if VEC > 1. The threads of a
// query exchange by shuffles, so every thread walks through all points.
template <typename T, typename A, int VEC, int G, typename Sum>
__device__ inline void point_backward(const Geometry& at, const T* __restrict__ grad_output,
                                      const T* __restrict__ value, const A* __restrict__ locations,
                                      const A* __restrict__ weights, const Sum& grad_value,
                                      A* __restrict__ grad_locations, A* __restrict__ grad_weights) {
  const auto total = grad_value.prepare();
  using Total = std::remove_pointer_t<decltype(total.grad_value)>;
  constexpr int run = decltype(total)::template run<VEC>;
  extern __shared__ __align__(32) unsigned char shared_memory[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % G, group = threadIdx.x % kWarp / G;
  const int slot = group / at.parts, part = group % at.parts;
  StagedWithDots<A>& staged = reinterpret_cast<StagedWithDots<A>*>(shared_memory)[warp];
  const int own = slot * (at.chunk + 1) + part;  // the first place of this group
  const uint32_t row_bytes = at.row_stride * sizeof(T), grad_row_bytes = at.grad_row_stride * sizeof(Total);
  const Task& task = own_task(at);
  const T* base = value + task.image * at.image_stride + task.head * at.head_stride;
  Total* grad_base = total.grad_value + task.image * at.grad_image_stride + int64_t{task.head} * at.D;
  const int64_t offset = first_row(at, task) * at.points;
  for (int first = warp * at.queries; first < at.tile_queries; first += at.warps * at.queries) {
    if (!has_place(task, first)) continue;
    const int32_t query = query_at(task, first + slot);
    const T* grad = grad_output + (first_row(at, task) + int64_t{query} * at.M) * at.D;
    for (uint32_t start = 0; start < at.points; start += at.chunk) {
      __syncwarp();
      stage(at, task, first, start, locations, weights, staged);
      __syncwarp();
      const int end = min(at.chunk, at.points - start);
      for (int channels = 0; channels < at.D; channels += G * VEC) {
        const int channel = channels + lane * VEC;
        const bool active = query >= 0 && channel < at.D;
        const T* readable = base + (VEC > 1 || active ? channel : 0);
        A g[VEC] = {}, g_added[VEC];
        if (active) load(grad + channel, g);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const int added = channels + i / run * run * G + lane * run + i % run;
          g_added[i] = run == VEC ? g[i] : active ? static_cast<A>(grad[added]) : A(0);
        }
        Total* summed = grad_base + channels + lane * run;
        for (int point = own; point < own + end; point += at.parts) {
          const Pack<uint32_t, 4> row = staged.rows[point];
          A v[4][VEC], dot[4] = {};
#pragma unroll
          for (int corner = 0; corner < 4; ++corner)
            load(row_at(readable, Sample<A>::row(row, corner), row_bytes), v[corner]);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner)
#pragma unroll
            for (int i = 0; i < VEC; ++i) dot[corner] += (VEC > 1 || active ? v[corner][i] : A(0)) * g[i];
          const A sum = sum_corners<G>(dot, lane);
          const Pack<A, 4> share = staged.shares[point];
          if (active && Sample<A>::is_inside(row)) {
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
              total.template add<VEC, G>(row_at(summed, row.items[corner], grad_row_bytes), share.items[corner],
                                         g_added);
          }
          A* result = staged.dots[point].items + lane;
          if (lane < 4) *result = channels == 0 ? sum : *result + sum;
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kStaged / kWarp; ++i) {
        const Point point = point_at<1>(at, task, first, start, threadIdx.x % kWarp + i * kWarp, offset);
        if (!point.exists) continue;
        const Level& level = at.levels[point.level];
        const auto place = locate(level, reinterpret_cast<const Pack<A, 2>*>(locations)[point.index]);
        Pack<A, 4> dots = staged.dots[point.place];  // of a corner outside the map it is that of its neighbour
        if (!place.has_left() || !place.has_top()) dots.items[0] = 0;
        if (!place.has_right(level) || !place.has_top()) dots.items[1] = 0;
        if (!place.has_left() || !place.has_bottom(level)) dots.items[2] = 0;
        if (!place.has_right(level) || !place.has_bottom(level)) dots.items[3] = 0;
        Pack<A, 2> grad_location{0, 0};
        A grad_weight = 0;
        if (place.inside)
          point_gradients(level, place.x, place.y, weights[point.index], dots, grad_location, grad_weight);
        reinterpret_cast<Pack<A, 2>*>(grad_locations)[point.index] = grad_location;
        grad_weights[point.index] = grad_weight;
      }
    }
  }
}

template <typename T, typename A, int VEC, int G, typename Sum>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const Geometry at, const T* __restrict__ grad_output, const T* __restrict__ value,
                    const A* __restrict__ locations, const A* __restrict__ weights, const Sum grad_value,
                    A* __restrict__ grad_locations, A* __restrict__ grad_weights) {
  point_backward<T, A, VEC, G>(at, grad_output, value, locations, weights, grad_value, grad_locations, grad_weights);
}

}  // namespace deformable_detr
