// The forward pass, free of PyTorch but for its number types, so that tests can run it on an emulated device.
//
// A block owns a tile of queries of one (image, head); in the encoder (a query per pixel) that is a square of pixels,
// whose samples share cache lines. Each of its warps turns locations and weights of a few queries into samples in
// shared memory, one thread per point, and then G neighbouring threads gather the D channels of a query with 16-byte
// loads. Warps do not wait for each other.
#pragma once

#include "ms_deform_attn_samples.cuh"

namespace deformable_detr {

// Points whose corners a thread fetches at a time, as many as its registers hold. Every chunk of staged points is a
// multiple.
template <typename A>
constexpr int kTogether = sizeof(A) == sizeof(float) ? 2 : 1;

template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const Geometry at, const T* __restrict__ value, const A* __restrict__ locations,
                   const A* __restrict__ weights, T* __restrict__ output) {
  extern __shared__ __align__(32) unsigned char shared_memory[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % at.lanes, group = threadIdx.x % kWarp / at.lanes;
  const int slot = group / at.parts, part = group % at.parts;
  Staged<A>& staged = reinterpret_cast<Staged<A>*>(shared_memory)[warp];
  const Pack<uint32_t, 4>* const rows = staged.rows + slot * (at.chunk + 1) + part;
  const Pack<A, 4>* const shares = staged.shares + slot * (at.chunk + 1) + part;
  const uint32_t row_bytes = at.row_stride * sizeof(T);
  const Task& task = own_task(at);
  const T* base = value + task.image * at.image_stride + task.head * at.head_stride;
  for (int first = warp * at.queries; first < at.tile_queries; first += at.warps * at.queries) {
    if (!has_place(task, first)) continue;
    for (int channels = 0; channels < at.D; channels += at.lanes * VEC) {
      const int channel = channels + lane * VEC;
      const T* readable = base + (channel < at.D ? channel : 0);
      A sum[VEC] = {};
      for (uint32_t start = 0; start < at.points; start += at.chunk) {
        __syncwarp();
        stage(at, task, first, start, locations, weights, staged);
        __syncwarp();
        const int end = min(at.chunk, at.points - start);
        for (int point = 0; point < end; point += kTogether<A> * at.parts) {
          // All loads before the first sum, so that they are on their way together.
          A v[kTogether<A>][4][VEC];
          bool inside[kTogether<A>];
#pragma unroll
          for (int k = 0; k < kTogether<A>; ++k) {
            const Pack<uint32_t, 4> row = rows[point + k * at.parts];
            inside[k] = Sample<A>::is_inside(row);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
              load(row_at(readable, Sample<A>::row(row, corner), row_bytes), v[k][corner]);
          }
#pragma unroll
          for (int k = 0; k < kTogether<A>; ++k) {
            const Pack<A, 4> share = shares[point + k * at.parts];
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
      for (int offset = at.lanes; offset < at.lanes * at.parts; offset *= 2)
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
      Pack<T, VEC> result;
#pragma unroll
      for (int i = 0; i < VEC; ++i) result.items[i] = static_cast<T>(sum[i]);
      const int32_t query = query_at(task, first + slot);
      if (query >= 0 && part == 0 && channel < at.D)
        *reinterpret_cast<Pack<T, VEC>*>(output + (first_row(at, task) + int64_t{query} * at.M) * at.D + channel) =
            result;
    }
  }
}

}  // namespace deformable_detr
