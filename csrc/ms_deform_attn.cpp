#include "ms_deform_attn.h"

#include <torch/library.h>

#include <vector>

namespace deformable_detr {

namespace {

void check_tensor(const char* name, const char* layout, int64_t rank, const at::Tensor& tensor,
                  const at::Tensor& value) {
  TORCH_CHECK(tensor.dim() == rank, name, " must be ", layout, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.is_floating_point(), name, " must be floating point, got ", tensor.dtype());
  TORCH_CHECK(tensor.device() == value.device(), name, " is on ", tensor.device(), " but value is on ", value.device());
  TORCH_CHECK((tensor.scalar_type() == at::kDouble) == (value.scalar_type() == at::kDouble), name, " is ",
              tensor.dtype(), " but value is ", value.dtype(), "; float64 cannot be mixed with other dtypes");
}

}  // namespace

Sizes check_arguments(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                      const at::Tensor& attention_weights) {
  check_tensor("value", "(N, S, M, D)", 4, value, value);
  check_tensor("sampling_locations", "(N, Lq, M, L, P, 2)", 6, sampling_locations, value);
  check_tensor("attention_weights", "(N, Lq, M, L, P)", 5, attention_weights, value);
  TORCH_CHECK(spatial_shapes.size() % 2 == 0, "spatial_shapes must hold (H, W) pairs, got ", spatial_shapes.size(),
              " numbers");
  const Sizes sizes{value.size(0),
                    value.size(1),
                    value.size(2),
                    value.size(3),
                    sampling_locations.size(1),
                    static_cast<int64_t>(spatial_shapes.size() / 2),
                    sampling_locations.size(4)};
  const std::vector<int64_t> expected{sizes.N, sizes.Lq, sizes.M, sizes.L, sizes.P, 2};
  TORCH_CHECK(sampling_locations.sizes() == at::IntArrayRef(expected),
              "sampling_locations must be (N, Lq, M, L, P, 2) with N=", sizes.N, ", M=", sizes.M,
              " (from value) and L=", sizes.L, " (from spatial_shapes), got ", sampling_locations.sizes());
  const at::IntArrayRef expected_weights(expected.data(), 5);
  TORCH_CHECK(attention_weights.sizes() == expected_weights,
              "attention_weights must be (N, Lq, M, L, P) = ", expected_weights, " like sampling_locations, got ",
              attention_weights.sizes());
  int64_t total = 0;
  for (int64_t level = 0; level < sizes.L; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    // The limit keeps pixel indices and their float32 coordinates within range on every backend.
    TORCH_CHECK(height >= 0 && width >= 0 && height < (1 << 24) && width < (1 << 24),
                "spatial_shapes must hold sizes from 0 to 2^24, got ", spatial_shapes);
    total += height * width;
  }
  TORCH_CHECK(total == sizes.S, "spatial_shapes ", spatial_shapes, " cover ", total,
              " positions but value has S=", sizes.S);
  TORCH_CHECK(sizes.S < (int64_t{1} << 31), "value must have S < 2^31, got ", sizes.S);
  return sizes;
}

void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes) {
  check_tensor("grad_output", "(N, Lq, M*D)", 3, grad_output, value);
  const std::vector<int64_t> expected{sizes.N, sizes.Lq, sizes.M * sizes.D};
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(expected), "grad_output must be (N, Lq, M*D) = ", expected,
              ", got ", grad_output.sizes());
}

}  // namespace deformable_detr

// Fake kernels, autograd and the fallback of backends without a kernel are registered in
// deformable_detr/layers/_ops.py. No autocast kernel on purpose: casting sampling_locations to half
// precision would move the samples by up to a third of a pixel.
TORCH_LIBRARY(deformable_detr, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
}
