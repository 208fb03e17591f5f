#include "cublas_lt.h"

#include <dlfcn.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>

namespace onnxq::cuda {
namespace {

// The slice of cuBLASLt's C interface that is called, declared here because no header of it comes
// with the CUDA toolkit's compiler. Its opaque types are pointers; enumerators have these values.
using Handle = void*;
using Descriptor = void*;
using Layout = void*;
using Preference = void*;
constexpr int kCompute32F = 68;
constexpr int kCompute32I = 72;
constexpr int kOperationTranspose = 1;
constexpr int kDescTransA = 3;
constexpr int kDescScalePointerA = 17;
constexpr int kDescScalePointerB = 18;
constexpr int kDescScaleModeA = 31;
constexpr int kDescScaleModeB = 32;
constexpr int kScaleModeOuterVector = 3;  // a float32 for each row or column
constexpr int kScaleModeVector128 = 4;    // for 128 neighbours along k
constexpr int kScaleModeBlock128 = 5;     // for 128 by 128
constexpr int kPreferenceMaxWorkspace = 1;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

// ONNXQ_LT(name after cublasLt, parameters): all return a status, 0 for success.
#define ONNXQ_LT_FUNCTIONS(ONNXQ_LT)                                                             \
  ONNXQ_LT(Create, (Handle*))                                                                    \
  ONNXQ_LT(MatmulDescCreate, (Descriptor*, int compute, int scale_type))                         \
  ONNXQ_LT(MatmulDescDestroy, (Descriptor))                                                      \
  ONNXQ_LT(MatmulDescSetAttribute, (Descriptor, int attribute, const void* value, size_t))       \
  ONNXQ_LT(MatrixLayoutCreate, (Layout*, int type, uint64_t rows, uint64_t columns, int64_t ld)) \
  ONNXQ_LT(MatrixLayoutDestroy, (Layout))                                                        \
  ONNXQ_LT(MatmulPreferenceCreate, (Preference*))                                                \
  ONNXQ_LT(MatmulPreferenceDestroy, (Preference))                                                \
  ONNXQ_LT(MatmulPreferenceSetAttribute, (Preference, int attribute, const void* value, size_t)) \
  ONNXQ_LT(MatmulAlgoGetHeuristic, (Handle, Descriptor, Layout a, Layout b, Layout c, Layout d,  \
                                    Preference, int wanted, Heuristic*, int* found))             \
  ONNXQ_LT(Matmul, (Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, \
                    Layout, const void* beta, const void* c, Layout, void* d, Layout,            \
                    const Algorithm*, void* workspace, size_t bytes, void* stream))

struct Functions {
#define ONNXQ_FIELD(name, parameters) int(*name) parameters;
  ONNXQ_LT_FUNCTIONS(ONNXQ_FIELD)
#undef ONNXQ_FIELD
  bool there;
};

// The library that this process has loaded already, or else the newest that is found.
void* OpenLibrary() {
  for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
      if (void* const handle = dlopen(name, flags)) return handle;
    }
  }
  return nullptr;
}

Functions LoadFunctions() {
  Functions functions{};
  void* const library = OpenLibrary();
  if (library == nullptr) return functions;
  functions.there = true;
#define ONNXQ_LOAD(name, parameters)                                                      \
  functions.name = reinterpret_cast<int(*) parameters>(dlsym(library, "cublasLt" #name)); \
  functions.there = functions.there && functions.name != nullptr;
  ONNXQ_LT_FUNCTIONS(ONNXQ_LOAD)
#undef ONNXQ_LOAD
  return functions;
}

const Functions& Lt() {
  static const Functions functions = LoadFunctions();
  return functions;
}

// What a shape needs, made once. In column-major terms, as cuBLASLt sees it, the product is
// y [n, m] = weights [k, n] transposed · x [k, m].
struct Prepared {
  Descriptor descriptor = nullptr;
  Layout weights = nullptr;
  Layout x = nullptr;
  Layout y = nullptr;
  Algorithm algorithm{};
  bool usable = false;

  Prepared() = default;
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;
  ~Prepared() {
    for (const Layout layout : {weights, x, y}) {
      if (layout != nullptr) Lt().MatrixLayoutDestroy(layout);
    }
    if (descriptor != nullptr) Lt().MatmulDescDestroy(descriptor);
  }
};

template <class Value>
bool SetAttribute(Descriptor descriptor, int attribute, Value value) {
  return Lt().MatmulDescSetAttribute(descriptor, attribute, &value, sizeof value) == 0;
}

bool SetScales(Descriptor descriptor, const MatrixProduct& p) {
  return SetAttribute(descriptor, kDescScalePointerA, p.weights_scales) &&
         SetAttribute(descriptor, kDescScalePointerB, p.x_scales);
}

bool FindAlgorithm(Handle handle, Prepared* made) {
  Preference preference = nullptr;
  if (Lt().MatmulPreferenceCreate(&preference) != 0) return false;
  Heuristic best{};
  int found = 0;
  const bool asked =
      Lt().MatmulPreferenceSetAttribute(preference, kPreferenceMaxWorkspace, &kMatrixWorkspace,
                                        sizeof kMatrixWorkspace) == 0 &&
      Lt().MatmulAlgoGetHeuristic(handle, made->descriptor, made->weights, made->x, made->y,
                                  made->y, preference, 1, &best, &found) == 0;
  Lt().MatmulPreferenceDestroy(preference);
  made->algorithm = best.algorithm;
  return asked && found > 0;
}

bool Prepare(Handle handle, const MatrixProduct& p, Prepared* made) {
  const bool integers = p.input == MatrixType::kInt8;
  const auto input = static_cast<int>(p.input);
  const auto m = static_cast<uint64_t>(p.m);
  const auto n = static_cast<uint64_t>(p.n);
  const auto k = static_cast<uint64_t>(p.k);
  const auto scale_type = static_cast<int>(integers ? MatrixType::kInt32 : MatrixType::kFloat32);
  if (Lt().MatmulDescCreate(&made->descriptor, integers ? kCompute32I : kCompute32F, scale_type) !=
          0 ||
      !SetAttribute(made->descriptor, kDescTransA, kOperationTranspose) ||
      Lt().MatrixLayoutCreate(&made->weights, input, k, n, p.k) != 0 ||
      Lt().MatrixLayoutCreate(&made->x, input, k, m, p.k) != 0 ||
      Lt().MatrixLayoutCreate(&made->y, static_cast<int>(p.output), n, m, p.n) != 0) {
    return false;
  }
  const bool blocks = p.scale_block != 0;
  if (p.x_scales != nullptr &&
      !(SetScales(made->descriptor, p) &&
        SetAttribute(made->descriptor, kDescScaleModeA,
                     blocks ? kScaleModeBlock128 : kScaleModeOuterVector) &&
        SetAttribute(made->descriptor, kDescScaleModeB,
                     blocks ? kScaleModeVector128 : kScaleModeOuterVector))) {
    return false;
  }
  return FindAlgorithm(handle, made);
}

// Handles and prepared shapes of this process, one device each; a handle serves all streams.
class Cache {
 public:
  int Run(const MatrixProduct& p, int device, void* stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Handle& handle = handles_[device];
    if (handle == nullptr && Lt().Create(&handle) != 0) return kErrorMatrixLibrary;
    const Key key = {device,
                     p.m,
                     p.n,
                     p.k,
                     static_cast<int64_t>(p.input),
                     static_cast<int64_t>(p.output),
                     p.x_scales != nullptr,
                     p.scale_block};
    std::unique_ptr<Prepared>& made = shapes_[key];
    if (made == nullptr) {
      made = std::make_unique<Prepared>();
      made->usable = Prepare(handle, p, made.get());
    }
    if (!made->usable) return kErrorMatrixLibrary;
    if (p.x_scales != nullptr && !SetScales(made->descriptor, p)) return kErrorMatrixLibrary;
    const float one = 1.0F;
    const float zero = 0.0F;
    const int32_t int_one = 1;
    const int32_t int_zero = 0;
    const bool integers = p.input == MatrixType::kInt8;
    const void* const alpha = integers ? static_cast<const void*>(&int_one) : &one;
    const void* const beta = integers ? static_cast<const void*>(&int_zero) : &zero;
    const int status = Lt().Matmul(handle, made->descriptor, alpha, p.weights, made->weights, p.x,
                                   made->x, beta, p.y, made->y, p.y, made->y, &made->algorithm,
                                   p.workspace, kMatrixWorkspace, stream);
    return status == 0 ? 0 : kErrorMatrixLibrary;
  }

 private:
  using Key = std::array<int64_t, 8>;
  std::mutex mutex_;
  std::map<int, Handle> handles_;
  std::map<Key, std::unique_ptr<Prepared>> shapes_;
};

}  // namespace

bool MatrixLibraryThere() { return Lt().there; }

int RunMatrixProduct(const MatrixProduct& product, int device, void* stream) {
  if (!MatrixLibraryThere()) return kErrorMatrixLibrary;
  // Never destroyed: at exit the device may be gone before it.
  static Cache* const cache = new Cache;
  return cache->Run(product, device, stream);
}

}  // namespace onnxq::cuda
