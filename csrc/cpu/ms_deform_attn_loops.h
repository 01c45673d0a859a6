// The inner loops of the CPU kernels. Included once per instruction set, inside a namespace of its own, with
// SIMD_BYTES set to the register width; so there is no include guard, and nothing here may be a lambda (GCC
// does not compile lambdas for the instruction set of the surrounding pragma).

// ---- vectors of A (float or double) loaded from and stored to rows of T -------------------------------------

template <typename A>
struct Simd {
  typedef A Vec __attribute__((vector_size(SIMD_BYTES)));
  static constexpr int lanes = SIMD_BYTES / sizeof(A);
};

template <typename A>
using Vec = typename Simd<A>::Vec;

template <typename V, typename P>
inline V load_raw(const P* from) {
  V to;
  __builtin_memcpy(&to, from, sizeof(V));
  return to;
}

typedef uint16_t HalfBits __attribute__((vector_size(SIMD_BYTES / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(SIMD_BYTES)));

inline Vec<float> load(const float* from) { return load_raw<Vec<float>>(from); }
inline Vec<double> load(const double* from) { return load_raw<Vec<double>>(from); }

inline Vec<float> load(const c10::BFloat16* from) {
  const FloatBits bits = __builtin_convertvector(load_raw<HalfBits>(from), FloatBits) << 16;
  return (Vec<float>)bits;  // between vector types a cast keeps the bits
}

inline Vec<float> load(const c10::Half* from) {
#ifdef SIMD_F16C
  return (Vec<float>)_mm256_cvtph_ps(load_raw<__m128i>(from));
#else
  Vec<float> to;
  for (int lane = 0; lane < Simd<float>::lanes; ++lane) to[lane] = static_cast<float>(from[lane]);
  return to;
#endif
}

inline void store(float* to, const Vec<float>& from) { __builtin_memcpy(to, &from, sizeof(from)); }
inline void store(double* to, const Vec<double>& from) { __builtin_memcpy(to, &from, sizeof(from)); }

inline void store(c10::BFloat16* to, const Vec<float>& from) {
  // Round to nearest even; NaN would overflow into another number and is replaced.
  const FloatBits bits = (FloatBits)from;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const FloatBits result = from == from ? rounded : FloatBits{} + 0x7fc0;
  const HalfBits narrow = __builtin_convertvector(result, HalfBits);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

inline void store(c10::Half* to, const Vec<float>& from) {
#ifdef SIMD_F16C
  const __m128i bits = _mm256_cvtps_ph((__m256)from, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &bits, sizeof(bits));
#else
  for (int lane = 0; lane < Simd<float>::lanes; ++lane) to[lane] = from[lane];
#endif
}

// The sums over the lanes of four vectors.
template <typename A>
inline void sum_lanes(const Vec<A>& a, const Vec<A>& b, const Vec<A>& c, const Vec<A>& d, A* sums) {
#ifdef SIMD_F16C
  if constexpr (std::is_same_v<A, float>) {
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b);
    const __m256 cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    return;
  }
#endif
  for (int corner = 0; corner < 4; ++corner) sums[corner] = 0;
  for (int lane = 0; lane < Simd<A>::lanes; ++lane) {
    sums[0] += a[lane];
    sums[1] += b[lane];
    sums[2] += c[lane];
    sums[3] += d[lane];
  }
}

// ---- sampling points -----------------------------------------------------------------------------------------

// From the locations of `count` points to the row of each of the four corners (-1 where the corner counts as
// zero) and its bilinear weight.
template <typename A>
inline void locate(const LevelOfPoint<A>& level, const A* locations, int64_t count, Points<A>& points) {
  for (int64_t i = 0; i < count; ++i) {
    A x = locations[2 * i] * level.width[i] - A(0.5);
    A y = locations[2 * i + 1] * level.height[i] - A(0.5);
    // False for NaN. Only then is the conversion to int defined.
    const bool inside = (x > -1) & (x < level.width[i]) & (y > -1) & (y < level.height[i]);
    x = inside ? x : A(-1);
    y = inside ? y : A(-1);
    int32_t left = static_cast<int32_t>(x), top = static_cast<int32_t>(y);
    left -= x < static_cast<A>(left);
    top -= y < static_cast<A>(top);
    const int32_t width = level.columns[i];
    const int32_t row = level.start[i] + top * width + left;
    const bool has_left = left >= 0, has_right = (left + 1 < width) & inside;
    const bool has_top = top >= 0, has_bottom = (top + 1 < level.rows[i]) & inside;
    points.row[0][i] = has_top & has_left ? row : -1;
    points.row[1][i] = has_top & has_right ? row + 1 : -1;
    points.row[2][i] = has_bottom & has_left ? row + width : -1;
    points.row[3][i] = has_bottom & has_right ? row + width + 1 : -1;
    points.x[i] = x - static_cast<A>(left);
    points.y[i] = y - static_cast<A>(top);
    points.inside[i] = inside;
  }
}

// The four bilinear weights times the attention weight. A point outside has weight 0, whatever its attention.
template <typename A>
inline void weigh(const A* attention, int64_t count, Points<A>& points) {
  for (int64_t i = 0; i < count; ++i) {
    const A weight = points.inside[i] ? attention[i] : A(0);
    const A x = points.x[i], y = points.y[i];
    points.weight[0][i] = weight * (1 - y) * (1 - x);
    points.weight[1][i] = weight * (1 - y) * x;
    points.weight[2][i] = weight * y * (1 - x);
    points.weight[3][i] = weight * y * x;
  }
}

template <typename T>
inline const T* corner_row(const T* base, int32_t row, int64_t stride, const T* zeros) {
  return row >= 0 ? base + row * stride : zeros;
}

// ---- forward -------------------------------------------------------------------------------------------------

// NV registers of channels of one output row: the weighted sum over all points of a query.
template <typename T, typename A, int NV>
inline void gather_block(const Forward<T, A>& op, const T* value, const Points<A>& points, int64_t channel, T* out) {
  constexpr int lanes = Simd<A>::lanes;
  Vec<A> upper[NV] = {}, lower[NV] = {};  // two chains, or the latency of the additions would set the pace
  for (int64_t i = 0; i < op.points; ++i) {
    const T* row[4];
    for (int corner = 0; corner < 4; ++corner)
      row[corner] = corner_row(value, points.row[corner][i], op.row_stride, op.zeros) + channel;
    const A w0 = points.weight[0][i], w1 = points.weight[1][i];
    const A w2 = points.weight[2][i], w3 = points.weight[3][i];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      upper[v] += w0 * load(row[0] + v * lanes);
      lower[v] += w2 * load(row[2] + v * lanes);
      upper[v] += w1 * load(row[1] + v * lanes);
      lower[v] += w3 * load(row[3] + v * lanes);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store(out + channel + v * lanes, upper[v] + lower[v]);
}

template <typename T, typename A>
inline void gather_tail(const Forward<T, A>& op, const T* value, const Points<A>& points, int64_t channel, T* out) {
  for (; channel < op.D; ++channel) {
    A sum = 0;
    for (int64_t i = 0; i < op.points; ++i)
      for (int corner = 0; corner < 4; ++corner)
        sum += points.weight[corner][i] *
               static_cast<A>(corner_row(value, points.row[corner][i], op.row_stride, op.zeros)[channel]);
    out[channel] = static_cast<T>(sum);
  }
}

// Queries [begin, end) of one image and head.
template <typename T, typename A>
void forward_queries(const Forward<T, A>& op, int64_t image, int64_t head, int64_t begin, int64_t end) {
  constexpr int lanes = Simd<A>::lanes, block = SIMD_BYTES >= 32 ? 4 : 8;
  Points<A> points(op.points);
  const T* value = op.value + image * op.image_stride + head * op.head_stride;
  for (int64_t query = begin; query < end; ++query) {
    const int64_t index = (image * op.Lq + query) * op.M + head;
    locate(op.level, op.locations + index * op.points * 2, op.points, points);
    weigh(op.weights + index * op.points, op.points, points);
    T* out = op.output + index * op.D;
    int64_t channel = 0;
    for (; channel + block * lanes <= op.D; channel += block * lanes)
      gather_block<T, A, block>(op, value, points, channel, out);
    for (; channel + lanes <= op.D; channel += lanes) gather_block<T, A, 1>(op, value, points, channel, out);
    if (channel < op.D) gather_tail(op, value, points, channel, out);
  }
}

// ---- backward ------------------------------------------------------------------------------------------------

// NV registers of channels of one point: adds weight * grad to the four corner rows of grad_value and returns
// the dot products of grad with the four corner rows of value, still spread over the lanes.
template <typename T, typename A, int NV>
inline void scatter_block(const A* weight, const T* const* row, A* const* grad_row, const A* grad, Vec<A>* dots) {
  constexpr int lanes = Simd<A>::lanes;
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    const Vec<A> g = load(grad + v * lanes);
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      dots[corner] += g * load(row[corner] + v * lanes);
      // One corner after the other: two corners outside share the row that is thrown away.
      A* to = grad_row[corner] + v * lanes;
      store(to, load(to) + weight[corner] * g);
    }
  }
}

// The four dot products of grad with the corner rows of point i, and its share of grad_value.
template <typename T, typename A>
inline void scatter_point(const Backward<T, A>& op, const T* value, A* grad_value, const A* grad, A* discarded,
                          const Points<A>& points, int64_t i, A* sums) {
  constexpr int lanes = Simd<A>::lanes, block = SIMD_BYTES >= 32 ? 4 : 8;
  const T* row[4];
  A* grad_row[4];
  A weight[4];
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t index = points.row[corner][i];
    row[corner] = corner_row(value, index, op.row_stride, op.zeros);
    grad_row[corner] = index >= 0 ? grad_value + index * op.grad_row_stride : discarded;
    weight[corner] = points.weight[corner][i];
  }
  Vec<A> dots[4] = {};
  int64_t channel = 0;
  for (; channel + lanes <= op.D;) {
    const bool wide = channel + block * lanes <= op.D;
    if (wide)
      scatter_block<T, A, block>(weight, row, grad_row, grad + channel, dots);
    else
      scatter_block<T, A, 1>(weight, row, grad_row, grad + channel, dots);
    const int64_t step = wide ? block * lanes : lanes;
    for (int corner = 0; corner < 4; ++corner) row[corner] += step, grad_row[corner] += step;
    channel += step;
  }
  sum_lanes(dots[0], dots[1], dots[2], dots[3], sums);
  for (int64_t tail = 0; channel + tail < op.D; ++tail)
    for (int corner = 0; corner < 4; ++corner) {
      sums[corner] += grad[channel + tail] * static_cast<A>(row[corner][tail]);
      grad_row[corner][tail] += weight[corner] * grad[channel + tail];
    }
}

// All queries of one image and head at one level: exclusive owner of that part of every gradient.
template <typename T, typename A>
void backward_level(const Backward<T, A>& op, int64_t image, int64_t head, int64_t level) {
  Points<A> points(op.P);
  std::vector<A> scratch(2 * op.D);
  A *grad = scratch.data(), *discarded = grad + op.D;
  const T* value = op.value + image * op.image_stride + head * op.head_stride;
  A* grad_value = op.grad_value + image * op.grad_image_stride + head * op.grad_head_stride;
  const LevelOfPoint<A> at_level = op.level.from(level * op.P);
  const A width = at_level.width[0], height = at_level.height[0];
  for (int64_t query = 0; query < op.Lq; ++query) {
    const int64_t index = (image * op.Lq + query) * op.M + head;
    const int64_t first = (index * op.L + level) * op.P;
    const T* grad_output = op.grad_output + index * op.D;
    for (int64_t channel = 0; channel < op.D; ++channel) grad[channel] = static_cast<A>(grad_output[channel]);
    locate(at_level, op.locations + 2 * first, op.P, points);
    weigh(op.weights + first, op.P, points);
    for (int64_t i = 0; i < op.P; ++i) {
      A dot[4];
      scatter_point(op, value, grad_value, grad, discarded, points, i, dot);
      const A x = points.x[i], y = points.y[i];
      const bool inside = points.inside[i];
      const A weight = op.weights[first + i];
      op.grad_weights[first + i] =
          inside ? (1 - y) * ((1 - x) * dot[0] + x * dot[1]) + y * ((1 - x) * dot[2] + x * dot[3]) : A(0);
      op.grad_locations[2 * (first + i)] =
          inside ? weight * width * ((1 - y) * (dot[1] - dot[0]) + y * (dot[3] - dot[2])) : A(0);
      op.grad_locations[2 * (first + i) + 1] =
          inside ? weight * height * ((1 - x) * (dot[2] - dot[0]) + x * (dot[3] - dot[1])) : A(0);
    }
  }
}
