// AVX-512 with VNNI: vectors of 16 columns; four k of a column are one 32-bit lane.
#include "quant_mat_mul_codes_avx512.h"
#include "quant_mat_mul_columns.h"

namespace onnxq {
namespace {

// acc += four products of unsigned a and signed b in each lane. The assembly works on a local: with
// an array's element as its operand the array would stay in memory. (gcc 12 copies the accumulators
// of _mm512_dpbusd_epi32 in unrolled loops.)
ONNXQ_INLINE inline void Dot(__m512i* acc, __m512i a, __m512i b) {
  __m512i sum = *acc;
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  *acc = sum;
}

ONNXQ_INLINE inline __m512i Broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof four);
  return _mm512_set1_epi32(four);
}

struct Avx512vnni {
  static constexpr int64_t kTileRows = 6;  // 24 sums, 4 weights, 1 activation: 29 of 32 registers
  static constexpr int64_t kInt8TileRows = 3;  // 12 integer and 12 float sums
  static constexpr int kPanelRows = kSmallRows;

  static void UnpackBytes(const QuantWeights& w, const uint8_t* codes, int64_t steps,
                          uint8_t* out) {
    const __m512i table = Table(w);
    WithByteKind(w, [&](auto kind) {
      constexpr LevelKind kKind = decltype(kind)::value;
      const uint8_t* from = codes;
      uint8_t* to = out;
      for (int64_t i = 0; i < steps; ++i, from += StepBytes(kKind), to += 128) {
        __m512i bytes[2];
        LoadStep<kKind>(w, from, table, bytes);
        _mm512_store_si512(to, bytes[0]);
        _mm512_store_si512(to + 64, bytes[1]);
      }
    });
  }

  static void LoadScales(ScaleType type, const void* scales, float* out) {
    ConvertScales(type, scales, 0, kPanel, out);
  }

  // Float sums stay in registers beside the integer ones: groups end too often to go to memory.
  template <int rows, int panels, GroupSum kind>
  ONNXQ_NOINLINE static void Int8Rows(const Int8Tile& t) {
    constexpr int kVectors = 2 * panels;
    constexpr int64_t kWidth = panels * kPanel;
    const int8_t* q = t.q;
    const int64_t stride = t.q_stride;
    const uint8_t* panel[2] = {t.panels[0], t.panels[panels - 1]};
    __m512 sum[rows][kVectors];
    Each<rows>([&](auto r) ONNXQ_INLINE {
      Each<kVectors>([&](auto v) ONNXQ_INLINE {
        sum[r][v] = _mm512_load_ps(t.sums + r * kWidth + v * kLanes);
      });
    });
    const float* scales = t.scales;
    for (int64_t piece = 0; piece < t.piece_count; ++piece, scales += kWidth) {
      const Piece now = t.pieces[piece];
      __m512i acc[rows][kVectors];
      if (!now.first) {
        Each<rows>([&](auto r) ONNXQ_INLINE {
          Each<kVectors>([&](auto v) ONNXQ_INLINE {
            acc[r][v] = _mm512_load_si512(t.group + r * kWidth + v * kLanes);
          });
        });
      } else {
        Each<rows>([&](auto r) ONNXQ_INLINE {
          const __m512i start = _mm512_set1_epi32(t.starts[r * t.groups + now.group]);
          Each<kVectors>([&](auto v) ONNXQ_INLINE { acc[r][v] = start; });
        });
        if (t.zeros != nullptr) {
          Each<kVectors>([&](auto v) ONNXQ_INLINE {
            const __m512i zero = _mm512_load_si512(t.zeros + piece * kWidth + v * kLanes);
            Each<rows>([&](auto r)
                           ONNXQ_INLINE { acc[r][v] = _mm512_mullo_epi32(acc[r][v], zero); });
          });
        }
      }
#pragma GCC unroll 2
      for (int64_t i = 0; i < now.steps; ++i, q += 4) {
        __m512i b[kVectors];
        Each<kVectors>([&](auto v)
                           ONNXQ_INLINE { b[v] = _mm512_loadu_si512(panel[v / 2] + v % 2 * 64); });
        Each<rows>([&](auto r) ONNXQ_INLINE {
          const __m512i a = Broadcast4(q + r * stride);
          Each<kVectors>([&](auto v) ONNXQ_INLINE { Dot(&acc[r][v], b[v], a); });
        });
        panel[0] += 128;
        panel[1] += 128;
      }
      if (now.last) {
        Each<kVectors>([&](auto v) ONNXQ_INLINE {
          const __m512 scale = _mm512_load_ps(scales + v * kLanes);
          Each<rows>([&](auto r) ONNXQ_INLINE {
            sum[r][v] = AddGroup<kind>(acc[r][v], scale, sum[r][v],
                                       RowScaleAt<kind>(t.group_scale, r * t.groups + now.group));
          });
        });
      } else {
        Each<rows>([&](auto r) ONNXQ_INLINE {
          Each<kVectors>([&](auto v) ONNXQ_INLINE {
            _mm512_store_si512(t.group + r * kWidth + v * kLanes, acc[r][v]);
          });
        });
      }
    }
    Each<rows>([&](auto r) ONNXQ_INLINE {
      Each<kVectors>([&](auto v) ONNXQ_INLINE {
        _mm512_store_ps(t.sums + r * kWidth + v * kLanes, sum[r][v]);
      });
    });
  }

  template <int rows, LevelKind kind, GroupSum sums_as>
  ONNXQ_NOINLINE static void Int8Panel(const QuantProduct& p, int64_t panel, float* sums) {
    const QuantWeights& w = *p.weights;
    constexpr int64_t kBytes = StepBytes(kind);
    const uint8_t* codes = w.codes + panel * w.steps * kBytes;
    const __m512i table = Table(w);
    const int8_t* q = p.q;
    const int64_t first = panel * w.groups;
    const int64_t scale_bytes = ScaleBytes(w.scale_type);
    // Scales are converted some groups ahead: a conversion between the sums would push them out of
    // their registers.
    constexpr int64_t kAhead = 16;
    alignas(64) float scales[kAhead * kPanel];
    __m512 sum[rows][2];
    Each<rows>([&](auto r) ONNXQ_INLINE { sum[r][0] = sum[r][1] = _mm512_setzero_ps(); });
    int64_t left = w.steps;
    for (int64_t g = 0; g < w.groups; ++g) {
      if (g % kAhead == 0) {
        const int64_t count = std::min(kAhead, w.groups - g);
        ConvertScales(w.scale_type, w.scales, (first + g) * kPanel, count * kPanel, scales);
        const int64_t next = (first + g + count) * kPanel * scale_bytes;
        for (int64_t line = 0; line < kAhead * kPanel * scale_bytes; line += 64) {
          _mm_prefetch(static_cast<const char*>(w.scales) + next + line, _MM_HINT_T0);
        }
      }
      const int64_t steps = std::min(w.group_steps, left);
      left -= steps;
      __m512i acc[rows][2];
      Each<rows>([&](auto r) ONNXQ_INLINE {
        const __m512i start = _mm512_set1_epi32(p.starts[r * w.groups + g]);
        Each<2>([&](auto v) ONNXQ_INLINE {
          acc[r][v] = w.zero_points == nullptr
                          ? start
                          : _mm512_mullo_epi32(start, Zeros(w, (first + g) * kPanel + v * kLanes));
        });
      });
      int64_t i = 0;
      if constexpr (rows <= 2) {
        // Every other step into sums of its own: one sum alone would wait for itself.
        __m512i odd[rows][2];
        Each<rows>([&](auto r) ONNXQ_INLINE { odd[r][0] = odd[r][1] = _mm512_setzero_si512(); });
        for (; i + 2 <= steps; i += 2, q += 8, codes += 2 * kBytes) {
          __m512i b[2][2];
          LoadStep<kind>(w, codes, table, b[0]);
          LoadStep<kind>(w, codes + kBytes, table, b[1]);
          Prefetch<2 * kBytes>(codes);
          Each<rows>([&](auto r) ONNXQ_INLINE {
            const int8_t* row = q + r * p.q_stride;
            const __m512i a[2] = {Broadcast4(row), Broadcast4(row + 4)};
            Each<2>([&](auto v) ONNXQ_INLINE {
              Dot(&acc[r][v], b[0][v], a[0]);
              Dot(&odd[r][v], b[1][v], a[1]);
            });
          });
        }
        Each<rows>([&](auto r) ONNXQ_INLINE {
          Each<2>([&](auto v) ONNXQ_INLINE { acc[r][v] = _mm512_add_epi32(acc[r][v], odd[r][v]); });
        });
      }
      for (; i < steps; ++i, q += 4, codes += kBytes) {
        __m512i b[2];
        LoadStep<kind>(w, codes, table, b);
        Prefetch<kBytes>(codes);
        Each<rows>([&](auto r) ONNXQ_INLINE {
          const __m512i a = Broadcast4(q + r * p.q_stride);
          Each<2>([&](auto v) ONNXQ_INLINE { Dot(&acc[r][v], b[v], a); });
        });
      }
      Each<2>([&](auto v) ONNXQ_INLINE {
        const __m512 scale = _mm512_load_ps(scales + g % kAhead * kPanel + v * kLanes);
        Each<rows>([&](auto r) ONNXQ_INLINE {
          sum[r][v] = AddGroup<sums_as>(acc[r][v], scale, sum[r][v],
                                        RowScaleAt<sums_as>(p.group_scale, r * w.groups + g));
        });
      });
    }
    Each<rows>([&](auto r) ONNXQ_INLINE {
      _mm512_store_ps(sums + r * kPanel, sum[r][0]);
      _mm512_store_ps(sums + r * kPanel + kLanes, sum[r][1]);
    });
  }

  // Levels of 16 columns at the k whose codes lie `shift` bits up in each lane.
  template <LevelKind kind, int shift>
  ONNXQ_INLINE static inline __m512 Levels(const QuantWeights& w, __m512 table, __m512i codes) {
    const __m512i code = _mm512_srli_epi32(codes, shift);
    if constexpr (CodeBits(kind) <= 4) {
      return _mm512_permutexvar_ps(code, table);  // looks at four bits only
    } else if constexpr (kind == LevelKind::kTable64) {
      const float* levels = w.levels;
      const __m512 low = _mm512_permutex2var_ps(table, code, _mm512_loadu_ps(levels + kLanes));
      const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(levels + 2 * kLanes), code,
                                                 _mm512_loadu_ps(levels + 3 * kLanes));
      return _mm512_mask_blend_ps(_mm512_test_epi32_mask(code, _mm512_set1_epi32(32)), low, high);
    } else {
      const __m512i byte = _mm512_and_si512(code, _mm512_set1_epi32(255));
      if constexpr (kind == LevelKind::kAffine8) {
        return _mm512_cvtepi32_ps(_mm512_add_epi32(byte, _mm512_set1_epi32(w.offset)));
      }
      return _mm512_i32gather_ps(byte, w.levels, 4);
    }
  }

  // Levels of 16 columns at four k.
  template <LevelKind kind, int field>
  ONNXQ_INLINE static inline void Levels(const QuantWeights& w, __m512 table, __m512i codes,
                                         __m512 (&out)[4]) {
    if constexpr (kind == LevelKind::kE4M3) {
      FromE4M3(codes, out);
    } else {
      Each<4>([&](auto kk)
                  ONNXQ_INLINE { out[kk] = Levels<kind, 8 * kk + field>(w, table, codes); });
    }
  }

  // Weights of the 32 columns of a panel at the four k of a step, from scale and zero point.
  template <LevelKind kind, class Use>
  ONNXQ_INLINE static inline void Step(const QuantWeights& w, __m512 table, const uint8_t* codes,
                                       const __m512 (&scale)[2], const __m512 (&zero)[2],
                                       bool has_zeros, const Use& use) {
    constexpr bool kFour = kind == LevelKind::kTable16;
    __m512i code[2];
    if constexpr (kFour) {
      code[0] = code[1] = _mm512_loadu_si512(codes);
    } else {
      LoadCodes<kind>(codes, code);
    }
    __m512 level[2][4];
    Levels<kind, 0>(w, table, code[0], level[0]);
    Levels<kind, kFour ? 4 : 0>(w, table, code[1], level[1]);
    Each<4>([&](auto kk) ONNXQ_INLINE {
      __m512 a = level[0][kk];
      __m512 b = level[1][kk];
      if (has_zeros) {
        a = _mm512_sub_ps(a, zero[0]);
        b = _mm512_sub_ps(b, zero[1]);
      }
      use(kk, _mm512_mul_ps(a, scale[0]), _mm512_mul_ps(b, scale[1]));
    });
  }

  static void LoadGroup(const QuantWeights& w, int64_t panel, int64_t group, __m512 (&scale)[2],
                        __m512 (&zero)[2]) {
    const int64_t at = (panel * w.groups + group) * kPanel;
    const __m512 factor = _mm512_set1_ps(w.factor);
    Each<2>([&](auto v) ONNXQ_INLINE {
      scale[v] = _mm512_mul_ps(Scales(w.scale_type, w.scales, at + v * kLanes), factor);
      zero[v] = _mm512_setzero_ps();
      if (w.zero_points != nullptr) {
        zero[v] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zero_points + at + v * kLanes))));
      }
    });
  }

  static void UnpackFloats(const QuantWeights& w, int64_t panel, int64_t step, const Piece& piece,
                           float* out, int64_t width) {
    __m512 scale[2];
    __m512 zero[2];
    LoadGroup(w, panel, piece.group, scale, zero);
    const __m512 table = FloatTable(w);
    const bool has_zeros = w.zero_points != nullptr;
    WithKind(w, [&](auto kind) {
      constexpr int64_t kBytes = StepBytes(kind);
      const uint8_t* codes = w.codes + (panel * w.steps + step) * kBytes;
      float* to = out;
      for (int64_t i = 0; i < piece.steps; ++i, codes += kBytes, to += 4 * width) {
        Step<kind>(w, table, codes, scale, zero, has_zeros, [&](int kk, __m512 a, __m512 b) {
          _mm512_store_ps(to + kk * width, a);
          _mm512_store_ps(to + kk * width + kLanes, b);
        });
      }
    });
  }

  template <int rows, int panels>
  ONNXQ_NOINLINE static void FloatRows(const FloatTile& t) {
    constexpr int kVectors = 2 * panels;
    constexpr int64_t kWidth = panels * kPanel;
    __m512 acc[rows][kVectors];
    Each<rows>([&](auto r) ONNXQ_INLINE {
      Each<kVectors>([&](auto v) ONNXQ_INLINE {
        acc[r][v] = _mm512_load_ps(t.sums + r * kWidth + v * kLanes);
      });
    });
    const float* weights = t.weights;
    for (int64_t k = 0; k < t.k; ++k, weights += kWidth) {
      __m512 b[kVectors];
      Each<kVectors>([&](auto v) ONNXQ_INLINE { b[v] = _mm512_load_ps(weights + v * kLanes); });
      Each<rows>([&](auto r) ONNXQ_INLINE {
        const __m512 a = _mm512_set1_ps(t.x[r * t.x_stride + k]);
        Each<kVectors>([&](auto v)
                           ONNXQ_INLINE { acc[r][v] = _mm512_fmadd_ps(a, b[v], acc[r][v]); });
      });
    }
    Each<rows>([&](auto r) ONNXQ_INLINE {
      Each<kVectors>([&](auto v) ONNXQ_INLINE {
        _mm512_store_ps(t.sums + r * kWidth + v * kLanes, acc[r][v]);
      });
    });
  }

  // One row, one or two panels side by side: twice as many sums that do not wait for each other.
  static void FloatPanels(const QuantProduct& p, int64_t panel, int64_t count, float* sums) {
    WithKind(*p.weights, [&](auto kind) {
      if (count == 2) {
        FloatPanelsOf<kind, 2>(p, panel, sums);
      } else {
        FloatPanelsOf<kind, 1>(p, panel, sums);
      }
    });
  }

  template <LevelKind kind, int panels>
  ONNXQ_NOINLINE static void FloatPanelsOf(const QuantProduct& p, int64_t panel, float* sums) {
    constexpr int64_t kBytes = StepBytes(kind);
    const QuantWeights& w = *p.weights;
    const __m512 table = FloatTable(w);
    const bool has_zeros = w.zero_points != nullptr;
    const uint8_t* codes = w.codes + panel * w.steps * kBytes;
    const int64_t apart = w.steps * kBytes;
    __m512 acc[2 * panels];
    Each<2 * panels>([&](auto v) ONNXQ_INLINE { acc[v] = _mm512_setzero_ps(); });
    for (int64_t g = 0; g < w.groups; ++g) {
      __m512 scale[panels][2];
      __m512 zero[panels][2];
      Each<panels>([&](auto i) ONNXQ_INLINE { LoadGroup(w, panel + i, g, scale[i], zero[i]); });
      const int64_t end = std::min(4 * (g + 1) * w.group_steps, w.k);
      int64_t k = 4 * g * w.group_steps;
      for (; k + 4 <= end; k += 4, codes += kBytes) {
        Each<panels>([&](auto i) ONNXQ_INLINE {
          Prefetch<kBytes>(codes + i * apart);
          Step<kind>(w, table, codes + i * apart, scale[i], zero[i], has_zeros,
                     [&](int kk, __m512 a, __m512 b) ONNXQ_INLINE {
                       const __m512 x = _mm512_set1_ps(p.x[k + kk]);
                       acc[2 * i] = _mm512_fmadd_ps(x, a, acc[2 * i]);
                       acc[2 * i + 1] = _mm512_fmadd_ps(x, b, acc[2 * i + 1]);
                     });
        });
      }
      // The last one to three k fill no step.
      for (int64_t last = k; last < end; ++last) {
        Each<panels>([&](auto i) ONNXQ_INLINE {
          Step<kind>(w, table, codes + i * apart, scale[i], zero[i], has_zeros,
                     [&](int kk, __m512 a, __m512 b) ONNXQ_INLINE {
                       const __mmask16 now = k + kk == last ? __mmask16{0xffff} : __mmask16{0};
                       const __m512 x = _mm512_set1_ps(p.x[last]);
                       acc[2 * i] = _mm512_mask3_fmadd_ps(x, a, acc[2 * i], now);
                       acc[2 * i + 1] = _mm512_mask3_fmadd_ps(x, b, acc[2 * i + 1], now);
                     });
        });
      }
    }
    Each<2 * panels>([&](auto v) ONNXQ_INLINE { _mm512_store_ps(sums + v * kLanes, acc[v]); });
  }

  static __m512 Finish(const float* sums, const float* scale, const float* bias, int64_t bias_step,
                       int64_t i, __mmask16 mask) {
    __m512 y = _mm512_load_ps(sums + i);
    if (scale != nullptr) y = _mm512_mul_ps(y, _mm512_set1_ps(*scale));
    return _mm512_add_ps(
        y, bias_step == 0 ? _mm512_set1_ps(*bias) : _mm512_maskz_loadu_ps(mask, bias + i));
  }

  static __mmask16 Remaining(int64_t left) {
    return left >= kLanes ? __mmask16{0xffff} : static_cast<__mmask16>((1U << left) - 1U);
  }

  static void WriteRow(const float* sums, const float* scale, const float* bias, int64_t bias_step,
                       int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 mask = Remaining(count - i);
      _mm512_mask_storeu_ps(y + i, mask, Finish(sums, scale, bias, bias_step, i, mask));
    }
  }

  static void WriteRow(const float* sums, const float* scale, const float* bias, int64_t bias_step,
                       int64_t count, uint16_t* y) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 mask = Remaining(count - i);
      _mm256_mask_storeu_epi16(y + i, mask,
                               _mm512_cvtps_ph(Finish(sums, scale, bias, bias_step, i, mask),
                                               _MM_FROUND_TO_NEAREST_INT));
    }
  }
};

}  // namespace

const QuantMatMulKernels kQuantMatMulAvx512vnni = KernelsOf<Avx512vnni>();

}  // namespace onnxq
