// The CUDA kernels of csrc/cuda on an emulated device, behind C functions for ctypes.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cuda_emulation.h"

#ifdef EMULATE_SM_90
#define DEFORMABLE_DETR_VECTOR_REDUCTIONS
#endif

#include "../../csrc/cuda/ms_deform_attn_forward.cuh"
#include "../../csrc/cuda/ms_deform_attn_owned_backward.cuh"
#include "../../csrc/cuda/ms_deform_attn_sorted_backward.cuh"

namespace deformable_detr {

alignas(32) unsigned char shared_memory[256 << 10];

namespace {

struct Call {
  Sizes sizes;
  const int64_t* spatial_shapes;
  const int64_t* strides;  // of value
  const void *value, *locations, *weights, *grad_output;
  void *output, *grad_value, *grad_locations, *grad_weights;
  bool deterministic;
  float bound;
  int64_t most_shared;
};

Geometry geometry_of(const Call& call, int32_t lanes, int32_t warps = 0, int32_t heads = 1) {
  return make_geometry(call.sizes, call.spatial_shapes, call.strides, lanes, warps, heads);
}

int64_t shared_by_warps(const Call& call, Geometry& at, int64_t bytes) {
  leave_out_warps(at, bytes, call.most_shared);
  if (at.warps * bytes > call.most_shared) throw std::invalid_argument("too much shared memory");
  return at.warps * bytes;
}

template <typename Kernel, typename... Arguments>
void launch(const Geometry& at, int64_t blocks, size_t shared_bytes, Kernel kernel, const Arguments&... arguments) {
  if (shared_bytes > sizeof(shared_memory)) throw std::invalid_argument("too much shared memory");
  emulation::launch(blocks, at.warps * kWarp, shared_memory, shared_bytes, kernel, at, arguments...);
}

template <typename T, typename A, int VEC, int HEADS = 1>
void forward(const Call& call, int32_t lanes) {
  Geometry at = geometry_of(call, lanes, 0, HEADS);
  launch(at, at.tasks, shared_by_warps(call, at, sizeof(Staged<A>)), forward_kernel<T, A, VEC, HEADS>,
         static_cast<const T*>(call.value), static_cast<const A*>(call.locations), static_cast<const A*>(call.weights),
         static_cast<T*>(call.output));
}

template <typename T, typename A, int VEC, int G, typename Sum>
void backward(const Call& call, const Sum& sum) {
  Geometry at = geometry_of(call, G);
  launch(at, at.tasks, shared_by_warps(call, at, sizeof(StagedWithDots<A>)), backward_kernel<T, A, VEC, G, Sum>,
         static_cast<const T*>(call.grad_output), static_cast<const T*>(call.value),
         static_cast<const A*>(call.locations), static_cast<const A*>(call.weights), sum,
         static_cast<A*>(call.grad_locations), static_cast<A*>(call.grad_weights));
}

template <typename T>
void sorted_backward(const Call& call) {
  const Geometry at = geometry_of(call, kSortedLanes);
  launch(at, at.tasks, sizeof(SortedMemory<kSortedLanes>), sorted_backward_kernel<T, kSortedLanes>,
         static_cast<const T*>(call.grad_output), static_cast<const T*>(call.value),
         static_cast<const float*>(call.locations), static_cast<const float*>(call.weights),
         static_cast<float*>(call.grad_value), static_cast<float*>(call.grad_locations),
         static_cast<float*>(call.grad_weights));
}

template <typename T>
void owned_backward(const Call& call) {
  const Geometry at = geometry_of(call, 8, owned_warps(call.sizes));
  const OwnedTiles owned = make_owned_tiles(at, call.sizes);
  if (!owned.pay(at)) throw std::invalid_argument("owners are not for these sizes");
  launch(at, at.tasks + owned.tasks, owned_backward_bytes(at, owned), owned_backward_kernel<T>, owned,
         static_cast<const T*>(call.grad_output), static_cast<const T*>(call.value),
         static_cast<const float*>(call.locations), static_cast<const float*>(call.weights),
         static_cast<T*>(call.grad_value), static_cast<float*>(call.grad_locations),
         static_cast<float*>(call.grad_weights));
}

template <typename T, typename A, int VEC, int G>
void backward(const Call& call) {
  if constexpr (VEC == 1 && sizeof(A) == sizeof(float)) {
    if (call.deterministic) {
      const int64_t count = call.sizes.N * call.sizes.S * call.sizes.M * call.sizes.D;
      std::vector<unsigned long long> sums(count);
      int32_t headroom = 0;
      while ((int64_t{1} << headroom) < call.sizes.Lq * call.sizes.P) ++headroom;
      const FixedPoint sum{sums.data(), &call.bound, headroom};
      backward<T, A, VEC, G>(call, sum);
      emulation::launch(3, kThreads, shared_memory, 0, fixed_point_to_value<float>, sum, count,
                        static_cast<float*>(call.grad_value));
      return;
    }
  }
  backward<T, A, VEC, G>(call, AtomicSum<A>{static_cast<A*>(call.grad_value)});
}

template <typename T, typename A>
void run(const Call& call, int32_t vector, int32_t lanes) {
  constexpr int whole = 16 / sizeof(T);
  constexpr int sums = 16 / sizeof(A);
  if constexpr (sizeof(T) == 2) {
    if (call.output && vector == whole && pays_in_pairs<T>(call.sizes)) return forward<T, A, whole, 2>(call, lanes);
  }
  if (call.output) return vector == 1 ? forward<T, A, 1>(call, lanes) : forward<T, A, whole>(call, lanes);
  if (vector == 1) return backward<T, A, 1, 32>(call);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (lanes == 0) return sorted_backward<T>(call);
    if (lanes == 1) return owned_backward<T>(call);
    if (lanes == 4) return backward<T, A, sums, 4>(call);
    if (lanes == 8) return backward<T, A, sums, 8>(call);
    if (lanes == 16) return backward<T, A, sums, 16>(call);
    if (lanes == 32) return backward<T, A, sums, 32>(call);
  }
  throw std::invalid_argument("no kernel for these lanes");
}

}  // namespace

// type: 0 float64, 1 float32, 2 bfloat16, 3 float16. `output` chooses the forward, without it the backward runs.
// vector: channels a thread loads at once; lanes: threads per row; for the backward pass 0 is the one that
// sorts and 1 the one of owners; most_shared: bytes that a block may have. Returns 0 unless the kernel did something
// that a device would not allow.
extern "C" int emulate(int type, int vector, int lanes, const int64_t* sizes, const int64_t* spatial_shapes,
                       const int64_t* strides, const void* value, const void* locations, const void* weights,
                       void* output, const void* grad_output, void* grad_value, void* grad_locations,
                       void* grad_weights, int deterministic, float bound, int64_t most_shared) {
  const Call call{{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]},
                  spatial_shapes,
                  strides,
                  value,
                  locations,
                  weights,
                  grad_output,
                  output,
                  grad_value,
                  grad_locations,
                  grad_weights,
                  deterministic != 0,
                  bound,
                  most_shared};
  try {
    switch (type) {
      case 0:
        run<double, double>(call, vector, lanes);
        break;
      case 1:
        run<float, float>(call, vector, lanes);
        break;
      case 2:
        run<c10::BFloat16, float>(call, vector, lanes);
        break;
      default:
        run<c10::Half, float>(call, vector, lanes);
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

}  // namespace deformable_detr
