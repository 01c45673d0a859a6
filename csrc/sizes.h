#pragma once

#include <cstdint>

namespace deformable_detr {

// N batch, S sum of H_l*W_l, M heads, D head dim, Lq queries, L levels, P points.
struct Sizes {
  int64_t N, S, M, D, Lq, L, P;
};

}  // namespace deformable_detr
