// The forward pass, free of PyTorch but for its number types, so that tests can run it on an emulated device.
//
// A block owns a tile of queries of one (image, head), or of two heads where pairs pay; in the encoder (a query per
// pixel) that is a rectangle of pixels, whose samples share cache lines. Each of its warps turns locations and weights
// of a few queries into samples in shared memory, one thread per point, and then G neighbouring threads gather the D
// channels of a query with 16-byte loads. Warps do not wait for each other.
#pragma once

#include "ms_deform_attn_samples.cuh"

namespace deformable_detr {

// Points whose corners a thread fetches at a time, as many as its registers hold. Every chunk of staged points is a
// multiple.
template <typename A>
constexpr int kTogether = sizeof(A) == sizeof(float) ? 2 : 1;

constexpr int kHalfLine = 64;  // bytes of a line of the first-level cache

// Whether a block should work on two neighbouring heads. Rows of 64 bytes of one head all lie in the same half of the
// cache's lines, whose banks give one of them a cycle; those of two heads lie in both halves, and 8 threads of which 4
// ask for a row of either wait for one cycle in place of two.
template <typename T>
constexpr bool pays_in_pairs(const Sizes& sizes) {
  return sizes.Lq == sizes.S && sizes.M % 2 == 0 && sizes.D * sizeof(T) == kHalfLine;
}

// Of HEADS > 1 the places of a tile take turns: place HEADS * i + h is of head h of query i.
template <typename T, typename A, int VEC, int HEADS = 1>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const Geometry at, const T* __restrict__ value, const A* __restrict__ locations,
                   const A* __restrict__ weights, T* __restrict__ output) {
  extern __shared__ __align__(32) unsigned char shared_memory[];
  // Known of pairs, for which registers would be missing; functions, as a variable may keep a register occupied.
  constexpr bool pairs = HEADS > 1;
  const auto D = [&] { return pairs ? kHalfLine / static_cast<int>(sizeof(T)) : at.D; };
  const auto lanes = [&] { return pairs ? D() / VEC : at.lanes; };
  const auto parts = [&] { return pairs ? 1 : at.parts; };
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % lanes(), group = threadIdx.x % kWarp / lanes();
  const int slot = group / parts(), part = group % parts();
  Staged<A>& staged = reinterpret_cast<Staged<A>*>(shared_memory)[warp];
  const Pack<uint32_t, 4>* const rows = staged.rows + slot * (at.chunk + 1) + part;
  const Pack<A, 4>* const shares = staged.shares + slot * (at.chunk + 1) + part;
  const uint32_t row_bytes = at.row_stride * sizeof(T);
  const Task& task = own_task<HEADS>(at);
  const T* base = value + task.image * at.image_stride + (task.head + slot % HEADS) * at.head_stride;
  for (int first = warp * at.queries; first < at.tile_queries; first += at.warps * at.queries) {
    if (!has_place(task, first / HEADS)) continue;
    for (int channels = 0; channels < D(); channels += lanes() * VEC) {
      const int channel = channels + lane * VEC;
      const T* readable = base + (channel < D() ? channel : 0);
      A sum[VEC] = {};
      for (uint32_t start = 0; start < at.points; start += at.chunk) {
        __syncwarp();
        stage<HEADS>(at, task, first, start, locations, weights, staged);
        __syncwarp();
        const int end = min(at.chunk, at.points - start);
        for (int point = 0; point < end; point += kTogether<A> * parts()) {
          // All loads before the first sum, so that they are on their way together.
          A v[kTogether<A>][4][VEC];
          bool inside[kTogether<A>];
#pragma unroll
          for (int k = 0; k < kTogether<A>; ++k) {
            const Pack<uint32_t, 4> row = rows[point + k * parts()];
            inside[k] = Sample<A>::is_inside(row);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
              load(row_at(readable, Sample<A>::row(row, corner), row_bytes), v[k][corner]);
          }
#pragma unroll
          for (int k = 0; k < kTogether<A>; ++k) {
            const Pack<A, 4> share = shares[point + k * parts()];
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
              A next = sum[i];
#pragma unroll
              for (int corner = 0; corner < 4; ++corner) next += share.items[corner] * v[k][corner][i];
              sum[i] = inside[k] ? next : sum[i];
            }
          }
        }
      }
      for (int offset = lanes(); offset < lanes() * parts(); offset *= 2)
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
      Pack<T, VEC> result;
#pragma unroll
      for (int i = 0; i < VEC; ++i) result.items[i] = static_cast<T>(sum[i]);
      const int32_t query = query_at(task, (first + slot) / HEADS);
      const int64_t row = first_row(at, task) + slot % HEADS + int64_t{query} * at.M;
      if (query >= 0 && part == 0 && channel < D())
        *reinterpret_cast<Pack<T, VEC>*>(output + row * D() + channel) = result;
    }
  }
}

}  // namespace deformable_detr
