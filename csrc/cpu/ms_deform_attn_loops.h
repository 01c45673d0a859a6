// The inner loops of the CPU kernels. Included once per instruction set, inside a namespace of its own, with
// SIMD_BYTES set to the register width; so there is no include guard, and nothing here may be a lambda (GCC
// does not compile lambdas for the instruction set of the surrounding pragma).

// ---- vectors of A (float or double) loaded from and stored to rows of T -------------------------------------

template <typename A>
struct Simd {
  typedef A Vec __attribute__((vector_size(SIMD_BYTES)));
  typedef Integer<A> IntVec __attribute__((vector_size(SIMD_BYTES)));
  static constexpr int lanes = SIMD_BYTES / sizeof(A);
};

template <typename A>
using Vec = typename Simd<A>::Vec;
template <typename A>
using IntVec = typename Simd<A>::IntVec;

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
inline void store(int32_t* to, const IntVec<float>& from) { __builtin_memcpy(to, &from, sizeof(from)); }
inline void store(int64_t* to, const IntVec<double>& from) { __builtin_memcpy(to, &from, sizeof(from)); }

// Rounds to the nearest bfloat16, even in a tie, and leaves it in the upper half of each lane. NaN would overflow
// into another number and is replaced.
inline FloatBits round_to_bfloat16(const Vec<float>& from) {
  const FloatBits bits = (FloatBits)from;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return from == from ? rounded : FloatBits{} + 0x7fc00000;
}

inline void store(c10::BFloat16* to, const Vec<float>& from) {
  const HalfBits bits = __builtin_convertvector(round_to_bfloat16(from) >> 16, HalfBits);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

inline void store(c10::Half* to, const Vec<float>& from) {
#ifdef SIMD_F16C
  const __m128i bits = _mm256_cvtps_ph((__m256)from, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &bits, sizeof(bits));
#else
  for (int lane = 0; lane < Simd<float>::lanes; ++lane) to[lane] = from[lane];
#endif
}

// Two registers of numbers at a time, in any order as long as load_two and store_two agree: for bfloat16 the even
// and the odd elements, since taking these apart needs no shuffles.
template <typename T, typename V>
inline void load_two(const T* from, V& first, V& second) {
  first = load(from);
  second = load(from + sizeof(V) / sizeof(first[0]));
}

template <typename T, typename V>
inline void store_two(T* to, const V& first, const V& second) {
  store(to, first);
  store(to + sizeof(V) / sizeof(first[0]), second);
}

inline void load_two(const c10::BFloat16* from, Vec<float>& even, Vec<float>& odd) {
  const FloatBits bits = load_raw<FloatBits>(from);
  even = (Vec<float>)(bits << 16);
  odd = (Vec<float>)(bits & 0xffff0000);
}

inline void store_two(c10::BFloat16* to, const Vec<float>& even, const Vec<float>& odd) {
  const FloatBits bits = (round_to_bfloat16(even) >> 16) | round_to_bfloat16(odd);
  __builtin_memcpy(to, &bits, sizeof(bits));
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

// From the locations and weights of `count` points to, for each of the four corners, its row (-1 where it counts
// as zero) and its bilinear weight times the attention weight. Arrays are padded to whole registers.
template <typename A>
inline void locate(const LevelOfPoint<A>& level, const A* locations, const A* attention, int64_t count,
                   Points<A>& points) {
  typedef IntVec<A> I;
  for (int64_t i = 0; i < count; ++i) {
    points.x[i] = locations[2 * i];
    points.y[i] = locations[2 * i + 1];
    points.attention[i] = attention[i];
  }
  for (int64_t i = 0; i < count; i += Simd<A>::lanes) {
    const Vec<A> width = load(level.width + i), height = load(level.height + i);
    Vec<A> x = load(points.x + i) * width - A(0.5), y = load(points.y + i) * height - A(0.5);
    // All bits set where true. False for NaN; only where true is the conversion to integers defined.
    const I inside = (x > -1) & (x < width) & (y > -1) & (y < height);
    x = inside ? x : Vec<A>{} - 1;
    y = inside ? y : Vec<A>{} - 1;
    I left = __builtin_convertvector(x, I), top = __builtin_convertvector(y, I);
    left += x < __builtin_convertvector(left, Vec<A>);  // rounds down where the conversion rounded towards zero
    top += y < __builtin_convertvector(top, Vec<A>);
    const I columns = __builtin_convertvector(width, I), rows = __builtin_convertvector(height, I);
    const I row = load_raw<I>(level.start + i) + top * columns + left;
    const I has_left = left >= 0, has_right = (left + 1 < columns) & inside;
    const I has_top = top >= 0, has_bottom = (top + 1 < rows) & inside;
    const I none = I{} - 1;
    store(points.row[0] + i, has_top & has_left ? row : none);
    store(points.row[1] + i, has_top & has_right ? row + 1 : none);
    store(points.row[2] + i, has_bottom & has_left ? row + columns : none);
    store(points.row[3] + i, has_bottom & has_right ? row + columns + 1 : none);
    x -= __builtin_convertvector(left, Vec<A>);
    y -= __builtin_convertvector(top, Vec<A>);
    // A point outside has weight 0 even if its attention weight is NaN.
    const Vec<A> weight = inside ? load(points.attention + i) : Vec<A>{};
    store(points.weight[0] + i, weight * (1 - y) * (1 - x));
    store(points.weight[1] + i, weight * (1 - y) * x);
    store(points.weight[2] + i, weight * y * (1 - x));
    store(points.weight[3] + i, weight * y * x);
    store(points.x + i, x);
    store(points.y + i, y);
    store(points.attention + i, weight);
    store(points.inside + i, inside);
  }
}

// Asks for the cache lines of an array that will be read soon; the processor does not see it coming, since the
// points of the other heads lie between those of two queries.
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(static_cast<const char*>(from) + offset);
}

// The same for the corner rows of all points.
template <typename T, typename A>
inline void prefetch_rows(const T* base, const Points<A>& points, int64_t count, int64_t stride, int64_t D) {
  for (int64_t i = 0; i < count; ++i)
    for (int corner = 0; corner < 4; ++corner)
      if (points.row[corner][i] >= 0) prefetch(base + points.row[corner][i] * stride, D * sizeof(T));
}

template <typename T>
inline const T* corner_row(const T* base, int64_t row, int64_t stride, const T* zeros) {
  return row >= 0 ? base + row * stride : zeros;
}

// ---- forward -------------------------------------------------------------------------------------------------

// 2 * NV registers of channels of one output row: the weighted sum over all points of a query.
template <typename T, typename A, int NV>
inline void gather_block(const Forward<T, A>& op, const T* value, const Points<A>& points, int64_t channel, T* out) {
  constexpr int step = 2 * Simd<A>::lanes;
  Vec<A> upper[2 * NV] = {}, lower[2 * NV] = {};  // two chains, or the latency of the additions would set the pace
  for (int64_t i = 0; i < op.points; ++i) {
    const T* row[4];
    for (int corner = 0; corner < 4; ++corner)
      row[corner] = corner_row(value, points.row[corner][i], op.row_stride, op.zeros) + channel;
    const A w0 = points.weight[0][i], w1 = points.weight[1][i];
    const A w2 = points.weight[2][i], w3 = points.weight[3][i];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      Vec<A> a, b;
      load_two(row[0] + v * step, a, b);
      upper[2 * v] += w0 * a, upper[2 * v + 1] += w0 * b;
      load_two(row[2] + v * step, a, b);
      lower[2 * v] += w2 * a, lower[2 * v + 1] += w2 * b;
      load_two(row[1] + v * step, a, b);
      upper[2 * v] += w1 * a, upper[2 * v + 1] += w1 * b;
      load_two(row[3] + v * step, a, b);
      lower[2 * v] += w3 * a, lower[2 * v + 1] += w3 * b;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v)
    store_two(out + channel + v * step, upper[2 * v] + lower[2 * v], upper[2 * v + 1] + lower[2 * v + 1]);
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
  constexpr int step = 2 * Simd<A>::lanes, block = SIMD_BYTES >= 32 ? 2 : 4;
  Points<A> points(op.points);
  const T* value = op.value + image * op.image_stride + head * op.head_stride;
  for (int64_t query = begin; query < end; ++query) {
    const int64_t index = (image * op.Lq + query) * op.M + head;
    const int64_t ahead = (index + kAhead * op.M) * op.points;
    prefetch(op.locations + 2 * ahead, 2 * op.points * sizeof(A));
    prefetch(op.weights + ahead, op.points * sizeof(A));
    locate(op.level, op.locations + index * op.points * 2, op.weights + index * op.points, op.points, points);
    T* out = op.output + index * op.D;
    int64_t channel = 0;
    for (; channel + block * step <= op.D; channel += block * step)
      gather_block<T, A, block>(op, value, points, channel, out);
    for (; channel + step <= op.D; channel += step) gather_block<T, A, 1>(op, value, points, channel, out);
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

// Where the rows of a gradient begin, and how far apart they are.
template <typename A>
struct Rows {
  A* first;
  int64_t stride;
};

// The four dot products of grad with the corner rows of point i, and its share of grad_value.
template <typename T, typename A>
inline void scatter_point(const Backward<T, A>& op, const T* value, const Rows<A>& target, const A* grad, A* discarded,
                          const Points<A>& points, int64_t i) {
  constexpr int lanes = Simd<A>::lanes, block = SIMD_BYTES >= 32 ? 4 : 8;
  const T* row[4];
  A* grad_row[4];
  A weight[4];
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t index = points.row[corner][i];
    row[corner] = corner_row(value, index, op.row_stride, op.zeros);
    grad_row[corner] = index >= 0 ? target.first + index * target.stride : discarded;
    weight[corner] = points.weight[corner][i];
  }
  Vec<A> dots[4] = {};
  int64_t channel = 0;
  while (channel + lanes <= op.D) {
    const bool wide = channel + block * lanes <= op.D;
    if (wide)
      scatter_block<T, A, block>(weight, row, grad_row, grad + channel, dots);
    else
      scatter_block<T, A, 1>(weight, row, grad_row, grad + channel, dots);
    const int64_t step = wide ? block * lanes : lanes;
    for (int corner = 0; corner < 4; ++corner) row[corner] += step, grad_row[corner] += step;
    channel += step;
  }
  A sums[4];
  sum_lanes(dots[0], dots[1], dots[2], dots[3], sums);
  for (int64_t tail = 0; channel + tail < op.D; ++tail)
    for (int corner = 0; corner < 4; ++corner) {
      sums[corner] += grad[channel + tail] * static_cast<A>(row[corner][tail]);
      grad_row[corner][tail] += weight[corner] * grad[channel + tail];
    }
  for (int corner = 0; corner < 4; ++corner) points.dot[corner][i] = sums[corner];
}

// From the dot products to the gradients of `count` weights and locations.
template <typename A>
inline void finish_points(const LevelOfPoint<A>& level, const Points<A>& points, int64_t count, A* grad_weights,
                          A* grad_locations) {
  for (int64_t i = 0; i < count; i += Simd<A>::lanes) {
    const Vec<A> x = load(points.x + i), y = load(points.y + i), weight = load(points.attention + i);
    const Vec<A> dot0 = load(points.dot[0] + i), dot1 = load(points.dot[1] + i);
    const Vec<A> dot2 = load(points.dot[2] + i), dot3 = load(points.dot[3] + i);
    const IntVec<A> inside = load_raw<IntVec<A>>(points.inside + i);
    const Vec<A> sample = (1 - y) * ((1 - x) * dot0 + x * dot1) + y * ((1 - x) * dot2 + x * dot3);
    const Vec<A> along_x = weight * load(level.width + i) * ((1 - y) * (dot1 - dot0) + y * (dot3 - dot2));
    const Vec<A> along_y = weight * load(level.height + i) * ((1 - x) * (dot2 - dot0) + x * (dot3 - dot1));
    store(points.attention + i, inside ? sample : Vec<A>{});
    store(points.x + i, inside ? along_x : Vec<A>{});
    store(points.y + i, inside ? along_y : Vec<A>{});
  }
  for (int64_t i = 0; i < count; ++i) {
    grad_weights[i] = points.attention[i];
    grad_locations[2 * i] = points.x[i];
    grad_locations[2 * i + 1] = points.y[i];
  }
}

// Rows of D numbers side by side to rows `stride` apart.
template <typename T, typename A>
inline void store_rows(const A* from, int64_t rows, int64_t D, T* to, int64_t stride) {
  constexpr int lanes = Simd<A>::lanes;
  for (int64_t row = 0; row < rows; ++row, from += D, to += stride) {
    int64_t channel = 0;
    for (; channel + lanes <= D; channel += lanes) store(to + channel, load(from + channel));
    for (; channel < D; ++channel) to[channel] = static_cast<T>(from[channel]);
  }
}

// All queries of one image and head at levels [begin, end): exclusive owner of that part of every gradient. `sums`,
// unless null, has room for the (S, D) sums of a head; otherwise they are made in grad_value, which is of their type
// and holds zeros.
template <typename T, typename A>
void backward_levels(const Backward<T, A>& op, int64_t image, int64_t head, int64_t begin, int64_t end, A* sums) {
  const int64_t count = (end - begin) * op.P;
  Points<A> points(count);
  std::vector<A> scratch(2 * op.D);
  A *grad = scratch.data(), *discarded = grad + op.D;
  const T* value = op.value + image * op.image_stride + head * op.head_stride;
  const LevelOfPoint<A> level = op.level.from(begin * op.P);
  const int64_t first_row = *level.start, rows = (end < op.L ? op.level.start[end * op.P] : op.S) - first_row;
  T* grad_value = op.grad_value + (image * op.S * op.M + head) * op.D;
  const Rows<A> target = sums ? Rows<A>{sums, op.D} : Rows<A>{reinterpret_cast<A*>(grad_value), op.M * op.D};
  if (sums) std::fill_n(sums + first_row * op.D, rows * op.D, A(0));
  for (int64_t query = 0; query < op.Lq; ++query) {
    const int64_t index = (image * op.Lq + query) * op.M + head;
    const int64_t first = (index * op.L + begin) * op.P;
    const int64_t ahead = first + kAhead * op.M * op.L * op.P;
    prefetch(op.locations + 2 * ahead, 2 * count * sizeof(A));
    prefetch(op.weights + ahead, count * sizeof(A));
    prefetch(op.grad_output + (index + kAhead * op.M) * op.D, op.D * sizeof(T));
    const T* grad_output = op.grad_output + index * op.D;
    for (int64_t channel = 0; channel < op.D; ++channel) grad[channel] = static_cast<A>(grad_output[channel]);
    locate(level, op.locations + 2 * first, op.weights + first, count, points);
    if (op.scattered) {
      prefetch_rows(value, points, count, op.row_stride, op.D);
      prefetch_rows(target.first, points, count, target.stride, op.D);
    }
    for (int64_t i = 0; i < count; ++i)
      if (points.inside[i]) scatter_point(op, value, target, grad, discarded, points, i);
    finish_points(level, points, count, op.grad_weights + first, op.grad_locations + 2 * first);
  }
  if (sums) store_rows(sums + first_row * op.D, rows, op.D, grad_value + first_row * op.M * op.D, op.M * op.D);
}
