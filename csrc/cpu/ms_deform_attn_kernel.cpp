#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "../ms_deform_attn.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deformable_detr {
namespace {

// Arrays of points are padded so that loops over them can take whole registers.
constexpr int64_t kPadding = 16;
// Queries between asking for the points of a query and using them.
constexpr int64_t kAhead = 4;

template <typename A>
using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// The size and first row of the level of each of the L*P points of a query.
template <typename A>
struct LevelOfPoint {
  const A *width, *height;
  const Integer<A>* start;

  LevelOfPoint from(int64_t point) const { return {width + point, height + point, start + point}; }
};

template <typename A>
class LevelTable {
 public:
  LevelTable(at::IntArrayRef spatial_shapes, int64_t points) {
    int64_t first = 0;
    for (size_t level = 0; level < spatial_shapes.size() / 2; ++level) {
      const int64_t rows = spatial_shapes[2 * level], columns = spatial_shapes[2 * level + 1];
      append(points, columns, rows, first);
      first += rows * columns;
    }
    append(kPadding, 0, 0, 0);
  }

  LevelOfPoint<A> view() const { return {width_.data(), height_.data(), start_.data()}; }

 private:
  void append(int64_t points, int64_t columns, int64_t rows, int64_t first) {
    width_.insert(width_.end(), points, static_cast<A>(columns));
    height_.insert(height_.end(), points, static_cast<A>(rows));
    start_.insert(start_.end(), points, static_cast<Integer<A>>(first));
  }

  std::vector<A> width_, height_;
  std::vector<Integer<A>> start_;
};

// Where the points of one query fall; corners in the order top left, top right, bottom left, bottom right.
template <typename A>
struct Points {
  Integer<A>* row[4];  // of the value tensor, -1 where the corner lies outside the map
  Integer<A>* inside;  // -1 or 0
  A* weight[4];        // attention weight times bilinear weight
  A* dot[4];           // of the output's gradient and the corner
  A *x, *y;            // distance from the left and top corners, in [0, 1)
  A* attention;

  explicit Points(int64_t count) : integers_(5 * (count + kPadding)), numbers_(11 * (count + kPadding)) {
    Integer<A>* integers = integers_.data();
    A* numbers = numbers_.data();
    for (auto array : {&row[0], &row[1], &row[2], &row[3], &inside})
      *array = std::exchange(integers, integers + count + kPadding);
    for (auto array :
         {&weight[0], &weight[1], &weight[2], &weight[3], &dot[0], &dot[1], &dot[2], &dot[3], &x, &y, &attention})
      *array = std::exchange(numbers, numbers + count + kPadding);
  }
  Points(const Points&) = delete;

 private:
  std::vector<Integer<A>> integers_;
  std::vector<A> numbers_;
};

// Strides count elements. zeros: D zeros, read for corners outside.
template <typename T, typename A>
struct Forward {
  const T* value;
  int64_t image_stride, row_stride, head_stride;
  const A *locations, *weights;
  T* output;
  const T* zeros;
  LevelOfPoint<A> level;
  int64_t M, D, Lq, points;
};

template <typename T, typename A>
struct Backward {
  const T* value;
  int64_t image_stride, row_stride, head_stride;
  T* grad_value;  // (N, S, M, D), contiguous
  const T* grad_output;
  const A *locations, *weights;
  A *grad_locations, *grad_weights;
  const T* zeros;
  LevelOfPoint<A> level;
  int64_t S, M, D, Lq, L, P;
  bool scattered;  // few queries, whose rows are not in the cache
};

namespace baseline {
#define SIMD_BYTES 16
#include "ms_deform_attn_loops.h"
#undef SIMD_BYTES
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define SIMD_BYTES 32
#define SIMD_F16C
#include "ms_deform_attn_loops.h"
#undef SIMD_F16C
#undef SIMD_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool has_avx2() {
  static const bool supported =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return supported;
}
#endif

template <typename T, typename A>
auto forward_queries() {
#if defined(__x86_64__)
  if (has_avx2()) return &avx2::forward_queries<T, A>;
#endif
  return &baseline::forward_queries<T, A>;
}

template <typename T, typename A>
auto backward_levels() {
#if defined(__x86_64__)
  if (has_avx2()) return &avx2::backward_levels<T, A>;
#endif
  return &baseline::backward_levels<T, A>;
}

// Rows of one head apart by M*D are slow to gather from: each lies in a page and cache set of its own. With
// many samples per row it pays to copy the value to (N, M, S, D) first, seen here as (N, S, M, D).
bool heads_first_pays(const Sizes& sizes) { return sizes.Lq * sizes.L * sizes.P >= 2 * sizes.S; }

// at::empty on huge pages, where the system has them. Memory that is new to the process comes page by page as it is
// first written, and on pages of 4 KiB that takes ten times as long as the writing itself.
at::Tensor allocate(at::IntArrayRef shape, const at::TensorOptions& options) {
  const at::Tensor tensor = at::empty(shape, options);
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr()), end = begin + tensor.nbytes();
  // Whole pages, so that the first and the last count too. Only advice: where it cannot be taken nothing changes.
  const uintptr_t first = begin / page * page, last = (end + page - 1) / page * page;
  if (tensor.nbytes() >= page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

at::Tensor arrange_value(const at::Tensor& value, const Sizes& sizes) {
  if (heads_first_pays(sizes))
    return allocate({sizes.N, sizes.M, sizes.S, sizes.D}, value.options()).copy_(value.transpose(1, 2)).transpose(1, 2);
  return value.stride(3) == 1 ? value : value.contiguous();
}

template <typename T, typename A>
void forward(const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights,
             const LevelTable<A>& levels, const Sizes& sizes, const at::Tensor& output) {
  const std::vector<T> zeros(sizes.D, T(0));
  const Forward<T, A> op{value.const_data_ptr<T>(),
                         value.stride(0),
                         value.stride(1),
                         value.stride(2),
                         locations.const_data_ptr<A>(),
                         weights.const_data_ptr<A>(),
                         output.mutable_data_ptr<T>(),
                         zeros.data(),
                         levels.view(),
                         sizes.M,
                         sizes.D,
                         sizes.Lq,
                         sizes.L * sizes.P};
  constexpr int64_t chunk = 64;
  const int64_t chunks = at::divup(sizes.Lq, chunk);
  const auto run = forward_queries<T, A>();
  at::parallel_for(0, sizes.N * sizes.M * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / chunks / sizes.M, head = task / chunks % sizes.M;
      const int64_t query = task % chunks * chunk;
      run(op, image, head, query, std::min(query + chunk, sizes.Lq));
    }
  });
}

template <typename T, typename A>
void backward(const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& locations,
              const at::Tensor& weights, const LevelTable<A>& levels, const Sizes& sizes, const at::Tensor& grad_value,
              const at::Tensor& grad_locations, const at::Tensor& grad_weights) {
  const std::vector<T> zeros(sizes.D, T(0));
  const Backward<T, A> op{value.const_data_ptr<T>(),
                          value.stride(0),
                          value.stride(1),
                          value.stride(2),
                          grad_value.mutable_data_ptr<T>(),
                          grad_output.const_data_ptr<T>(),
                          locations.const_data_ptr<A>(),
                          weights.const_data_ptr<A>(),
                          grad_locations.mutable_data_ptr<A>(),
                          grad_weights.mutable_data_ptr<A>(),
                          zeros.data(),
                          levels.view(),
                          sizes.S,
                          sizes.M,
                          sizes.D,
                          sizes.Lq,
                          sizes.L,
                          sizes.P,
                          !heads_first_pays(sizes)};
  // Sums of one head side by side stay in the caches; few float32 sums may as well go where they belong.
  const bool aside = heads_first_pays(sizes) || !std::is_same_v<T, A>;
  if (!aside) grad_value.zero_();
  const auto run = backward_levels<T, A>();
  // One owner per (image, head) or, if that leaves threads idle, per (image, head, level): no atomics, and the
  // same sums in the same order for every number of threads.
  const int64_t heads = sizes.N * sizes.M, threads = at::get_num_threads();
  const int64_t step = heads % threads == 0 || heads >= 8 * threads ? sizes.L : 1;
  const int64_t parts = sizes.L / step;
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const auto sums = allocate({aside ? sizes.S : 0, sizes.D}, grad_locations.options());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / parts / sizes.M, head = task / parts % sizes.M;
      const int64_t level = task % parts * step;
      run(op, image, head, level, level + step, aside ? sums.mutable_data_ptr<A>() : nullptr);
    }
  });
}

at::Tensor ms_deform_attn_cpu(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                              const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Sizes sizes = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  const auto type = compute_type(value.scalar_type());
  const auto output = allocate({sizes.N, sizes.Lq, sizes.M * sizes.D}, value.options());
  if (output.numel() == 0) return output;
  const auto arranged = arrange_value(value, sizes);
  const auto locations = sampling_locations.to(type).contiguous();
  const auto weights = attention_weights.to(type).contiguous();
  dispatch(value.scalar_type(), [&](auto t, auto a) {
    const LevelTable<decltype(a)> levels(spatial_shapes, sizes.P);
    forward<decltype(t), decltype(a)>(arranged, locations, weights, levels, sizes, output);
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(const at::Tensor& grad_output,
                                                                           const at::Tensor& value,
                                                                           at::IntArrayRef spatial_shapes,
                                                                           const at::Tensor& sampling_locations,
                                                                           const at::Tensor& attention_weights) {
  const Sizes sizes = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, sizes);
  const auto type = compute_type(value.scalar_type());
  const auto options = value.options().dtype(type);
  const auto grad_value = allocate(value.sizes(), value.options());
  const auto grad_locations = allocate(sampling_locations.sizes(), options);
  const auto grad_weights = allocate(attention_weights.sizes(), options);
  if (grad_weights.numel() == 0) {
    grad_value.zero_();
  } else {
    const auto arranged = arrange_value(value, sizes);
    const auto grad = grad_output.to(value.scalar_type()).contiguous();
    const auto locations = sampling_locations.to(type).contiguous();
    const auto weights = attention_weights.to(type).contiguous();
    dispatch(value.scalar_type(), [&](auto t, auto a) {
      const LevelTable<decltype(a)> levels(spatial_shapes, sizes.P);
      backward<decltype(t), decltype(a)>(grad, arranged, locations, weights, levels, sizes, grad_value, grad_locations,
                                         grad_weights);
    });
  }
  return {grad_value, grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(deformable_detr, CPU, m) {
  m.impl("ms_deform_attn", ms_deform_attn_cpu);
  m.impl("ms_deform_attn_backward", ms_deform_attn_backward_cpu);
}

}  // namespace deformable_detr
