// Multi-scale deformable attention: what the CPU and CUDA kernels share.
//
// Shapes: N batch, S sum of H_l*W_l, Lq queries, M heads, D head dim, L levels, P points.
//   value               (N, S, M, D)          spatial_shapes   h0, w0, h1, w1, ...
//   sampling_locations  (N, Lq, M, L, P, 2)   (x, y) in [0, 1] of the padded map
//   attention_weights   (N, Lq, M, L, P)      output           (N, Lq, M*D)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <tuple>

#include "sizes.h"

namespace deformable_detr {

// Raises unless the arguments fit together; the message names the argument, the rule and the sizes.
Sizes check_arguments(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                      const at::Tensor& attention_weights);

void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes);

// Locations, weights and sums are float32, or float64 for float64 values.
inline at::ScalarType compute_type(at::ScalarType value_type) {
  return value_type == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls function(T{}, A{}) with the C++ types of value and of its sums.
template <typename Function>
void dispatch(at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kDouble:
      return function(double{}, double{});
    case at::kFloat:
      return function(float{}, float{});
    case at::kBFloat16:
      return function(c10::BFloat16{}, float{});
    case at::kHalf:
      return function(c10::Half{}, float{});
    default:
      TORCH_CHECK(false, "value must be float64, float32, bfloat16 or float16, got ", type);
  }
}

}  // namespace deformable_detr
