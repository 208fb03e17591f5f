// AVX2 and FMA: vectors of 8 columns; four k of a column are one 32-bit lane.
#include "quant_mat_mul_codes_avx2.h"
#include "quant_mat_mul_columns.h"

namespace onnxq {
namespace {

constexpr int64_t kPair = 2 * kLanes;

ONNXQ_INLINE inline __m256i Broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof four);
  return _mm256_set1_epi32(four);
}

// Steps whose products of weights up to `top` and activations fit in 16 bits: maddubs adds two
// products, saturating. 8 for INT4, 5 for MXFP4; none above 128.
int64_t ShortSteps(uint8_t top) { return INT16_MAX / (2 * INT8_MAX * std::max<int64_t>(top, 1)); }

// sum += a * b, two products a lane of 16 bits. In assembly, because gcc 12 would do all products
// of a step first and then lack registers for the sums.
ONNXQ_INLINE inline void AddShort(__m256i* sum, __m256i a, __m256i b) {
  __m256i both = *sum;
  __m256i product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(both), "=&x"(product) : "x"(a), "x"(b));
  *sum = both;
}

// acc[r][v] += weights(i)[v] * q[r] over all steps; `load(i, b)` gives the weights of two vectors.
// Up to `run` steps are summed in 16 bits.
template <int rows, class LoadWeights>
ONNXQ_INLINE inline void ShortRuns(int64_t run, const int8_t* q, int64_t q_stride, int64_t steps,
                                   __m256i (&acc)[rows][2], const LoadWeights& load) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < steps;) {
    __m256i sum[rows][2];
    Each<rows>([&](auto r) ONNXQ_INLINE { sum[r][0] = sum[r][1] = _mm256_setzero_si256(); });
#pragma GCC unroll 2
    for (const int64_t end = std::min(steps, i + run); i < end; ++i) {
      __m256i b[2];
      load(i, b);
      Each<rows>([&](auto r) ONNXQ_INLINE {
        const __m256i a = Broadcast4(q + r * q_stride + 4 * i);
        AddShort(&sum[r][0], b[0], a);
        AddShort(&sum[r][1], b[1], a);
      });
    }
    Each<rows>([&](auto r) ONNXQ_INLINE {
      Each<2>([&](auto v) ONNXQ_INLINE {
        acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(sum[r][v], ones));
      });
    });
  }
}

// The same with weights above 128, which are widened first.
template <int rows, class LoadWeights>
ONNXQ_INLINE inline void WideSteps(const int8_t* q, int64_t q_stride, int64_t steps,
                                   __m256i (&acc)[rows][2], const LoadWeights& load) {
  const __m256i low = _mm256_set1_epi16(255);
  for (int64_t i = 0; i < steps; ++i) {
    __m256i b[2];
    load(i, b);
    const __m256i even[2] = {_mm256_and_si256(b[0], low), _mm256_and_si256(b[1], low)};
    const __m256i odd[2] = {_mm256_srli_epi16(b[0], 8), _mm256_srli_epi16(b[1], 8)};
    Each<rows>([&](auto r) ONNXQ_INLINE {
      const __m256i a = Broadcast4(q + r * q_stride + 4 * i);
      const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8);
      const __m256i a_odd = _mm256_srai_epi16(a, 8);
      Each<2>([&](auto v) ONNXQ_INLINE {
        acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(even[v], a_even));
        acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(odd[v], a_odd));
      });
    });
  }
}

template <int rows, class LoadWeights>
ONNXQ_INLINE inline void Steps(int64_t run, const int8_t* q, int64_t q_stride, int64_t steps,
                               __m256i (&acc)[rows][2], const LoadWeights& load) {
  if (run > 0) {
    ShortRuns(run, q, q_stride, steps, acc, load);
  } else {
    WideSteps(q, q_stride, steps, acc, load);
  }
}

struct Avx2 {
  static constexpr int64_t kTileRows = 4;  // times two vectors
  static constexpr int64_t kInt8TileRows = 4;
  static constexpr int kPanelRows = 1;

  static void UnpackBytes(const QuantWeights& w, const uint8_t* codes, int64_t steps,
                          uint8_t* out) {
    const __m256i table = Table(w);
    WithByteKind(w, [&](auto kind) {
      constexpr LevelKind kKind = decltype(kind)::value;
      const uint8_t* from = codes;
      uint8_t* to = out;
      for (int64_t i = 0; i < steps; ++i, from += StepBytes(kKind), to += 128) {
        Each<2>([&](auto h) ONNXQ_INLINE {
          __m256i bytes[2];
          LoadStep<kKind>(w, from, h, table, bytes);
          Store(to + h * 64, bytes[0]);
          Store(to + h * 64 + 32, bytes[1]);
        });
      }
    });
  }

  static void LoadScales(ScaleType type, const void* scales, float* out) {
    for (int64_t i = 0; i < kPanel; i += kLanes) {
      _mm256_store_ps(out + i, type == ScaleType::kInt16 ? GroupScales<true>(type, scales, i)
                                                         : Scales(type, scales, i));
    }
  }

  template <int rows, int panels, GroupSum kind>
  ONNXQ_NOINLINE static void Int8Rows(const Int8Tile& t) {
    constexpr int64_t kWidth = panels * kPanel;
    const int64_t run = ShortSteps(t.top);
    int64_t step = 0;
    for (int64_t piece = 0; piece < t.piece_count; ++piece) {
      const Piece now = t.pieces[piece];
      for (int64_t c = 0; c < kWidth; c += kPair) {
        __m256i acc[rows][2];
        Each<rows>([&](auto r) ONNXQ_INLINE {
          const __m256i start = _mm256_set1_epi32(t.starts[r * t.groups + now.group]);
          Each<2>([&](auto v) ONNXQ_INLINE {
            const int64_t at = c + v * kLanes;
            acc[r][v] = !now.first ? Load(t.group + r * kWidth + at)
                        : t.zeros == nullptr
                            ? start
                            : _mm256_mullo_epi32(start, Load(t.zeros + piece * kWidth + at));
          });
        });
        const uint8_t* bytes = t.panels[c / kPanel] + step * 128 + c % kPanel * 4;
        Steps(run, t.q + 4 * step, t.q_stride, now.steps, acc,
              [bytes](int64_t i, __m256i(&b)[2]) ONNXQ_INLINE {
                b[0] = Load(bytes + i * 128);
                b[1] = Load(bytes + i * 128 + 32);
              });
        if (!now.last) {
          Each<rows>([&](auto r) ONNXQ_INLINE {
            Store(t.group + r * kWidth + c, acc[r][0]);
            Store(t.group + r * kWidth + c + kLanes, acc[r][1]);
          });
          continue;
        }
        const float* scales = t.scales + piece * kWidth + c;
        const __m256 scale[2] = {_mm256_load_ps(scales), _mm256_load_ps(scales + kLanes)};
        Each<rows>([&](auto r) ONNXQ_INLINE {
          Each<2>([&](auto v) ONNXQ_INLINE {
            float* sum = t.sums + r * kWidth + c + v * kLanes;
            _mm256_store_ps(
                sum, AddGroup<kind>(acc[r][v], scale[v], _mm256_load_ps(sum),
                                    RowScaleAt<kind>(t.group_scale, r * t.groups + now.group)));
          });
        });
      }
      step += now.steps;
    }
  }

  template <int rows, LevelKind kind, GroupSum sums_as>
  ONNXQ_NOINLINE static void Int8Panel(const QuantProduct& p, int64_t panel, float* sums) {
    const QuantWeights& w = *p.weights;
    constexpr int64_t kBytes = StepBytes(kind);
    const __m256i table = Table(w);
    const int64_t run = ShortSteps(w.top);
    __m256 sum[4];
    for (__m256& s : sum) s = _mm256_setzero_ps();
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t first = g * w.group_steps;
      const int64_t steps = std::min(w.group_steps, w.steps - first);
      const uint8_t* codes = w.codes + (panel * w.steps + first) * kBytes;
      const int64_t at = (panel * w.groups + g) * kPanel;
      Each<2>([&](auto h) ONNXQ_INLINE {
        __m256i acc[1][2];
        Each<2>([&](auto v) ONNXQ_INLINE {
          acc[0][v] = _mm256_set1_epi32(p.starts[g]);
          if (w.zero_points != nullptr) {
            const __m256i zero = LoadI8(w.zero_points + at + h * kPair + v * kLanes);
            acc[0][v] =
                _mm256_mullo_epi32(acc[0][v], _mm256_sub_epi32(_mm256_set1_epi32(w.offset), zero));
          }
        });
        Steps(run, p.q + 4 * first, 0, steps, acc, [&](int64_t i, __m256i(&b)[2]) {
          LoadStep<kind>(w, codes + i * kBytes, h, table, b);
        });
        Each<2>([&](auto v) ONNXQ_INLINE {
          constexpr bool kInteger = sums_as == GroupSum::kInteger;
          sum[2 * h + v] = AddGroup<sums_as>(
              acc[0][v], GroupScales<kInteger>(w.scale_type, w.scales, at + h * kPair + v * kLanes),
              sum[2 * h + v], RowScaleAt<sums_as>(p.group_scale, g));
        });
      });
    }
    Each<4>([&](auto v) ONNXQ_INLINE { _mm256_store_ps(sums + v * kLanes, sum[v]); });
  }

  // Levels of 8 columns at the k of the step that `shift` selects.
  template <LevelKind kind>
  ONNXQ_INLINE static inline __m256 Levels(const QuantWeights& w, const float* table, __m256i codes,
                                           int shift) {
    const __m256i code = _mm256_srl_epi32(codes, _mm_cvtsi32_si128(shift));
    if constexpr (CodeBits(kind) <= 4) {
      // The permutation looks at three bits; the fourth chooses the half of the table.
      const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), code);
      const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + kLanes), code);
      return Select(_mm256_slli_epi32(code, 28), high, low);
    } else {
      const __m256i byte = _mm256_and_si256(code, _mm256_set1_epi32(255));
      if constexpr (kind == LevelKind::kE4M3) return FromE4M3(byte);
      if constexpr (kind == LevelKind::kAffine8) {
        return _mm256_cvtepi32_ps(_mm256_add_epi32(byte, _mm256_set1_epi32(w.offset)));
      }
      return _mm256_i32gather_ps(w.levels, byte, 4);
    }
  }

  // Weights of 16 columns at 4 k: use(kk, vector, weights).
  template <LevelKind kind, class Use>
  ONNXQ_INLINE static inline void Step(const QuantWeights& w, const float* table,
                                       const uint8_t* codes, int h, const __m256 (&scale)[2],
                                       const __m256 (&zero)[2], const Use& use) {
    constexpr bool kFour = kind == LevelKind::kTable16;
    Each<2>([&](auto v) ONNXQ_INLINE {
      const __m256i four = kFour ? Load(codes + v * 32) : LoadCodes<kind>(codes, 2 * h + v);
      Each<4>([&](auto kk) ONNXQ_INLINE {
        const __m256 level = Levels<kind>(w, table, four, 8 * kk + (kFour ? 4 * h : 0));
        use(kk, v, _mm256_mul_ps(_mm256_sub_ps(level, zero[v]), scale[v]));
      });
    });
  }

  static void LoadGroup(const QuantWeights& w, int64_t panel, int64_t group, int h,
                        __m256 (&scale)[2], __m256 (&zero)[2]) {
    Each<2>([&](auto v) ONNXQ_INLINE {
      const int64_t at = (panel * w.groups + group) * kPanel + h * kPair + v * kLanes;
      scale[v] = _mm256_mul_ps(Scales(w.scale_type, w.scales, at), _mm256_set1_ps(w.factor));
      zero[v] = w.zero_points == nullptr ? _mm256_setzero_ps()
                                         : _mm256_cvtepi32_ps(LoadI8(w.zero_points + at));
    });
  }

  static void UnpackFloats(const QuantWeights& w, int64_t panel, int64_t step, const Piece& piece,
                           float* out, int64_t width) {
    alignas(32) float table[16];
    LoadTable16(w, table);
    WithKind(w, [&](auto kind) {
      constexpr int64_t kBytes = StepBytes(kind);
      Each<2>([&](auto h) ONNXQ_INLINE {
        __m256 scale[2];
        __m256 zero[2];
        LoadGroup(w, panel, piece.group, h, scale, zero);
        const uint8_t* codes = w.codes + (panel * w.steps + step) * kBytes;
        float* to = out + h * kPair;
        for (int64_t i = 0; i < piece.steps; ++i, codes += kBytes, to += 4 * width) {
          Step<kind>(w, table, codes, h, scale, zero, [&](int kk, int v, __m256 weights) {
            _mm256_store_ps(to + kk * width + v * kLanes, weights);
          });
        }
      });
    });
  }

  template <int rows, int panels>
  ONNXQ_NOINLINE static void FloatRows(const FloatTile& t) {
    constexpr int64_t kWidth = panels * kPanel;
    for (int64_t c = 0; c < kWidth; c += kPair) {
      __m256 acc[rows][2];
      Each<rows>([&](auto r) ONNXQ_INLINE {
        acc[r][0] = _mm256_load_ps(t.sums + r * kWidth + c);
        acc[r][1] = _mm256_load_ps(t.sums + r * kWidth + c + kLanes);
      });
      const float* weights = t.weights + c;
      for (int64_t k = 0; k < t.k; ++k, weights += kWidth) {
        const __m256 b[2] = {_mm256_load_ps(weights), _mm256_load_ps(weights + kLanes)};
        Each<rows>([&](auto r) ONNXQ_INLINE {
          const __m256 a = _mm256_set1_ps(t.x[r * t.x_stride + k]);
          acc[r][0] = _mm256_fmadd_ps(a, b[0], acc[r][0]);
          acc[r][1] = _mm256_fmadd_ps(a, b[1], acc[r][1]);
        });
      }
      Each<rows>([&](auto r) ONNXQ_INLINE {
        _mm256_store_ps(t.sums + r * kWidth + c, acc[r][0]);
        _mm256_store_ps(t.sums + r * kWidth + c + kLanes, acc[r][1]);
      });
    }
  }

  ONNXQ_NOINLINE static void FloatPanels(const QuantProduct& p, int64_t panel, int64_t count,
                                         float* sums) {
    const QuantWeights& w = *p.weights;
    alignas(32) float table[16];
    LoadTable16(w, table);
    WithKind(w, [&](auto kind) {
      constexpr int64_t kBytes = StepBytes(kind);
      for (int64_t i = 0; i < count; ++i) {
        __m256 acc[2][2];
        for (auto& half : acc) half[0] = half[1] = _mm256_setzero_ps();
        for (int64_t g = 0; g < w.groups; ++g) {
          __m256 scale[2][2];
          __m256 zero[2][2];
          LoadGroup(w, panel + i, g, 0, scale[0], zero[0]);
          LoadGroup(w, panel + i, g, 1, scale[1], zero[1]);
          const int64_t end = std::min((g + 1) * w.group_steps, w.steps);
          for (int64_t step = g * w.group_steps; step < end; ++step) {
            const uint8_t* codes = w.codes + ((panel + i) * w.steps + step) * kBytes;
            const float* x = p.x + 4 * step;
            const int left = static_cast<int>(std::min<int64_t>(4, w.k - 4 * step));
            Each<2>([&](auto h) ONNXQ_INLINE {
              Step<kind>(w, table, codes, h, scale[h], zero[h], [&](int kk, int v, __m256 weights) {
                if (kk >= left) return;
                acc[h][v] = _mm256_fmadd_ps(_mm256_set1_ps(x[kk]), weights, acc[h][v]);
              });
            });
          }
        }
        Each<4>([&](auto v) ONNXQ_INLINE {
          _mm256_store_ps(sums + i * kPanel + v * kLanes, acc[v / 2][v % 2]);
        });
      }
    });
  }

  static void WriteRow(const float* sums, const float* scale, const float* bias, int64_t bias_step,
                       int64_t count, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      __m256 v = _mm256_load_ps(sums + i);
      if (scale != nullptr) v = _mm256_mul_ps(v, _mm256_set1_ps(*scale));
      v = _mm256_add_ps(v, bias_step == 0 ? _mm256_set1_ps(*bias) : _mm256_loadu_ps(bias + i));
      _mm256_storeu_ps(y + i, v);
    }
    for (; i < count; ++i) {
      y[i] = (scale == nullptr ? sums[i] : sums[i] * *scale) + bias[i * bias_step];
    }
  }

  static void WriteRow(const float* sums, const float* scale, const float* bias, int64_t bias_step,
                       int64_t count, uint16_t* y) {
    alignas(32) float full[2 * kPanel];
    WriteRow(sums, scale, bias, bias_step, count, full);
    for (int64_t i = 0; i < count; ++i) y[i] = ToHalf(full[i]);
  }
};

}  // namespace

const QuantMatMulKernels kQuantMatMulAvx2 = KernelsOf<Avx2>();

}  // namespace onnxq
