#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "../ms_deform_attn.h"
#include "ms_deform_attn_backward.cuh"
#include "ms_deform_attn_forward.cuh"
#include "ms_deform_attn_owned_backward.cuh"
#include "ms_deform_attn_sorted_backward.cuh"

namespace deformable_detr {
namespace {

constexpr int kVectorBytes = 16;
constexpr int64_t kMaxRowBytes = int64_t{1} << 31;
// What a block may have unasked, less what kernels have besides the memory that is asked for.
constexpr int64_t kStaticSharedMemory = 64, kDefaultSharedMemory = (48 << 10) - kStaticSharedMemory;

bool aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
}

// Whether every row of channels can be read in whole, aligned vectors by `lanes` neighbouring threads.
bool fits_vectors(const at::Tensor& value, int64_t vector, int64_t lanes) {
  bool fits = value.size(3) % (vector * lanes) == 0 && aligned(value);
  for (int dim = 0; dim < 3; ++dim) fits = fits && value.stride(dim) % vector == 0;
  return fits;
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

int64_t most_shared_memory() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSharedMemory; }

bool has_vector_reductions() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

Geometry geometry_of(const at::Tensor& value, at::IntArrayRef spatial_shapes, const Sizes& sizes, int32_t lanes,
                     int32_t warps = 0, int32_t heads = 1) {
  TORCH_CHECK(sizes.L <= kMaxLevels, "spatial_shapes must hold at most ", kMaxLevels, " levels on CUDA, got ", sizes.L);
  TORCH_CHECK(sizes.Lq < (1 << 30), "sampling_locations must have Lq < 2^30 on CUDA, got ", sizes.Lq);
  TORCH_CHECK(sizes.P < (1 << 14), "sampling_locations must have P < 2^14 on CUDA, got ", sizes.P);
  TORCH_CHECK(sizes.M * sizes.L * sizes.P < (int64_t{1} << 31),
              "sampling_locations must have M * L * P < 2^31 on CUDA, got ", sizes.M, " * ", sizes.L, " * ", sizes.P);
  const Geometry at = make_geometry(sizes, spatial_shapes.data(), value.strides().data(), lanes, warps, heads);
  TORCH_CHECK(at.tasks < (int64_t{1} << 31),
              "sampling_locations has too many queries for CUDA: ", sizes.N * sizes.M * sizes.Lq);
  return at;
}

// Shared memory of a block in which each warp has `bytes`. All warps of an encoder's backward pass have more than
// Pascal gives to a block, and those of float64 more than Turing does.
int64_t shared_by_warps(Geometry& at, int64_t bytes) {
  if (at.warps * bytes > kDefaultSharedMemory) leave_out_warps(at, bytes, most_shared_memory());
  return at.warps * bytes;
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, const Geometry& at, int64_t blocks, int64_t shared, Arguments... arguments) {
  if (shared > kDefaultSharedMemory)
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<blocks, at.warps * kWarp, shared, c10::cuda::getCurrentCUDAStream()>>>(at, arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// value as the kernels read it: channels side by side, and rows so near to each other that 32 bits count the bytes.
at::Tensor with_rows(const at::Tensor& value) {
  const int64_t size = value.element_size();
  TORCH_CHECK(value.size(2) < kMaxRowBytes / 8 / value.size(3), "value must have M * D < 2^28 on CUDA, got ",
              value.size(2), " * ", value.size(3));
  const bool fits = value.stride(3) == 1 && value.stride(1) < kMaxRowBytes / size;
  return fits ? value : value.clone(at::MemoryFormat::Contiguous);
}

// Contiguous and aligned: the kernels read x and y together.
at::Tensor dense(const at::Tensor& tensor, at::ScalarType type) {
  const auto result = tensor.to(type).contiguous();
  return aligned(result) ? result : result.clone();
}

at::Tensor ms_deform_attn_cuda(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                               const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Sizes sizes = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const auto type = compute_type(value.scalar_type());
  const std::array<int64_t, 3> shape{sizes.N, sizes.Lq, sizes.M * sizes.D};
  // No launch where there is nothing to sample.
  if (value.numel() == 0 || attention_weights.numel() == 0) return at::zeros(shape, value.options());
  const auto output = at::empty(shape, value.options());
  const auto source = with_rows(value);
  const auto locations = dense(sampling_locations, type), weights = dense(attention_weights, type);
  dispatch(value.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    constexpr int vector = kVectorBytes / sizeof(T);
    const bool vectors = fits_vectors(source, vector, 1);
    const int32_t lanes = lanes_for(sizes.D, vectors ? vector : 1);
    const auto run = [&](auto kernel, int32_t heads) {
      Geometry at = geometry_of(source, spatial_shapes, sizes, lanes, 0, heads);
      const int64_t shared = shared_by_warps(at, sizeof(Staged<A>));
      launch(kernel, at, at.tasks, shared, source.template const_data_ptr<T>(), locations.template const_data_ptr<A>(),
             weights.template const_data_ptr<A>(), output.template mutable_data_ptr<T>());
    };
    if constexpr (sizeof(T) == 2) {
      if (vectors && pays_in_pairs<T>(sizes)) return run(forward_kernel<T, A, vector, 2>, 2);
    }
    run(vectors ? forward_kernel<T, A, vector> : forward_kernel<T, A, 1>, 1);
  });
  return output;
}

// The tensors of one backward call, and the launch of the kernel that fits the head dimension.
template <typename T, typename A>
struct BackwardLaunch {
  const at::Tensor &grad_output, &value, &locations, &weights, &grad_locations, &grad_weights;
  at::IntArrayRef spatial_shapes;
  const Sizes& sizes;

  template <typename Sum>
  void run(const Sum& grad_value) const {
    // Only for what is fast: every case more is another kernel to compile.
    if constexpr (std::is_same_v<Sum, AtomicSum<float>>) {
      if (can_sort()) return run_sorted(grad_value.grad_value);
      if (fits_vectors(value, 4, 32)) return run<4, 32>(grad_value);
      if (fits_vectors(value, 4, 16)) return run<4, 16>(grad_value);
      if (fits_vectors(value, 4, 8)) return run<4, 8>(grad_value);
      if (fits_vectors(value, 4, 4)) return run<4, 4>(grad_value);
    }
    run<1, 32>(grad_value);
  }

  // A query per pixel, the usual 32 channels, and a device whose reductions are of 16 bytes.
  bool can_sort() const {
    return sizes.Lq == sizes.S && sizes.S < kMaxSortedRows && sizes.D == 4 * kSortedLanes &&
           fits_vectors(value, 4, kSortedLanes) && has_vector_reductions();
  }

  // grad_value, where owners are for these sizes; otherwise nothing is done and the tensor is undefined.
  at::Tensor run_owned() const {
    if (!fits_vectors(value, 4, 8)) return {};
    const Geometry at = geometry_of(value, spatial_shapes, sizes, 8, owned_warps(sizes));
    const OwnedTiles owned = make_owned_tiles(at, sizes);
    const int64_t shared = owned_backward_bytes(at, owned);
    // Before the A100 a block has less than many queries need.
    if (!owned.pay(at) || shared > most_shared_memory()) return {};
    const auto grad_value = at::empty(value.sizes(), value.options());
    launch(owned_backward_kernel<T>, at, at.tasks + owned.tasks, shared, owned, grad_output.const_data_ptr<T>(),
           value.const_data_ptr<T>(), locations.const_data_ptr<float>(), weights.const_data_ptr<float>(),
           grad_value.template mutable_data_ptr<T>(), grad_locations.mutable_data_ptr<float>(),
           grad_weights.mutable_data_ptr<float>());
    return grad_value;
  }

  void run_sorted(float* grad_value) const {
    const Geometry at = geometry_of(value, spatial_shapes, sizes, kSortedLanes);
    launch(sorted_backward_kernel<T, kSortedLanes>, at, at.tasks, sizeof(SortedMemory<kSortedLanes>),
           grad_output.const_data_ptr<T>(), value.const_data_ptr<T>(), locations.const_data_ptr<float>(),
           weights.const_data_ptr<float>(), grad_value, grad_locations.mutable_data_ptr<float>(),
           grad_weights.mutable_data_ptr<float>());
  }

  template <int VEC, int G, typename Sum>
  void run(const Sum& grad_value) const {
    Geometry at = geometry_of(value, spatial_shapes, sizes, G);
    const int64_t shared = shared_by_warps(at, sizeof(StagedWithDots<A>));
    launch(backward_kernel<T, A, VEC, G, Sum>, at, at.tasks, shared, grad_output.const_data_ptr<T>(),
           value.const_data_ptr<T>(), locations.const_data_ptr<A>(), weights.const_data_ptr<A>(), grad_value,
           grad_locations.mutable_data_ptr<A>(), grad_weights.mutable_data_ptr<A>());
  }
};

template <typename T>
void deterministic_backward(const BackwardLaunch<T, float>& backward, const at::Tensor& grad_value) {
  const auto sums = at::zeros(grad_value.sizes(), grad_value.options().dtype(at::kLong));
  const auto bound = backward.grad_output.abs().amax().to(at::kFloat).mul(backward.weights.abs().amax());
  int32_t headroom = 0;  // of the points of a head at one level, each gives a pixel at most its whole weight
  while ((int64_t{1} << headroom) < backward.sizes.Lq * backward.sizes.P) ++headroom;
  const FixedPoint sum{reinterpret_cast<unsigned long long*>(sums.mutable_data_ptr<int64_t>()),
                       bound.template const_data_ptr<float>(), headroom};
  backward.run(sum);
  const int64_t count = grad_value.numel();
  const int64_t blocks = std::min<int64_t>(divide_up(count, kThreads), 1 << 16);
  fixed_point_to_value<T>
      <<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(sum, count, grad_value.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// grad_value, with the other two gradients written on the way.
template <typename T, typename A>
at::Tensor run_backward(const BackwardLaunch<T, A>& backward) {
  const auto options = backward.value.options();
  const at::IntArrayRef shape = backward.value.sizes();
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  if constexpr (sizeof(A) == sizeof(float)) {
    if (deterministic) {
      const auto grad_value = at::empty(shape, options);
      deterministic_backward(backward, grad_value);
      return grad_value;
    }
    const auto grad_value = backward.run_owned();
    if (grad_value.defined()) return grad_value;
  } else if (deterministic) {
    at::globalContext().alertNotDeterministic("ms_deform_attn_backward of float64 on CUDA");
  }
  const auto sums = at::zeros(shape, options.dtype(compute_type(backward.value.scalar_type())));
  backward.run(AtomicSum<A>{sums.template mutable_data_ptr<A>()});
  return sums.to(backward.value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(const at::Tensor& grad_output,
                                                                            const at::Tensor& value,
                                                                            at::IntArrayRef spatial_shapes,
                                                                            const at::Tensor& sampling_locations,
                                                                            const at::Tensor& attention_weights) {
  const Sizes sizes = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  const auto type = compute_type(value.scalar_type());
  const auto options = value.options().dtype(type);
  // All zero, and no launch, where there is nothing to sample.
  const bool empty = value.numel() == 0 || attention_weights.numel() == 0;
  const auto allocate = [&](at::IntArrayRef shape) {
    return empty ? at::zeros(shape, options) : at::empty(shape, options);
  };
  const auto grad_locations = allocate(sampling_locations.sizes());
  const auto grad_weights = allocate(attention_weights.sizes());
  at::Tensor grad_value = empty ? at::zeros(value.sizes(), value.options()) : at::Tensor();
  if (!empty) {
    const auto source = with_rows(value);
    const auto grad = dense(grad_output, value.scalar_type());
    const auto locations = dense(sampling_locations, type), weights = dense(attention_weights, type);
    dispatch(value.scalar_type(), [&](auto t, auto a) {
      const BackwardLaunch<decltype(t), decltype(a)> backward{grad,           source,       locations,      weights,
                                                              grad_locations, grad_weights, spatial_shapes, sizes};
      grad_value = run_backward(backward);
    });
  }
  return {grad_value, grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(deformable_detr, CUDA, m) {
  m.impl("ms_deform_attn", ms_deform_attn_cuda);
  m.impl("ms_deform_attn_backward", ms_deform_attn_backward_cuda);
}

}  // namespace deformable_detr
