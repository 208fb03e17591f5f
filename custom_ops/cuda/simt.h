// How the bodies of our CUDA kernels see the machine: thread blocks, warps, shared memory.
//
// A body is a function template over a Block, written as phases: `block.EachThread(f)` runs f for
// every thread, `block.EachWarp(f)` for every warp, `block.Sync()` stands between phases that hand
// shared memory on. What a thread keeps between phases lies in `Block::PerThread<State>`.
// DeviceBlock below runs a phase in the calling thread alone, so all of it melts into a plain
// kernel; tests compile the same bodies for the CPU with a Block that runs all threads one after
// another and checks every access (tests/cuda/emulator.h). Only the few primitives below differ.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define ONNXQ_HD __host__ __device__ __forceinline__
#define ONNXQ_DEVICE __device__ __forceinline__
#else
#define ONNXQ_HD inline
#define ONNXQ_DEVICE inline
#endif
// The compilers of the host do not know it, nvcc's first pass included.
#if defined(__CUDA_ARCH__)
#define ONNXQ_UNROLL _Pragma("unroll")
#else
#define ONNXQ_UNROLL
#endif

namespace onnxq::cuda {

inline constexpr int kWarp = 32;

// n 32-bit words that are loaded and stored at once.
template <int n>
struct alignas(4 * n) Words {
  uint32_t w[n];
};

// The operands of one mma.m16n8k16 in one lane: D[16, 8] += A[16, 16] · B[16, 8], D in float32.
// Lane 4g + t holds, by the PTX ISA:
//   a[0] = A[g, 2t..2t+1]      a[1] = A[g+8, 2t..2t+1]
//   a[2] = A[g, 2t+8..2t+9]    a[3] = A[g+8, 2t+8..2t+9]
//   b[0] = B[2t..2t+1, g]      b[1] = B[2t+8..2t+9, g]
//   d[0..1] = D[g, 2t..2t+1]   d[2..3] = D[g+8, 2t..2t+1]
struct MmaOperands {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

#if defined(__CUDACC__)

struct Half;
struct Bfloat;

template <class T>
__device__ __forceinline__ void MmaM16N8K16(float* d, const uint32_t* a, const uint32_t* b);

template <>
__device__ __forceinline__ void MmaM16N8K16<Half>(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void MmaM16N8K16<Bfloat>(float* d, const uint32_t* a,
                                                    const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Reads that are made once: they pass the L1 cache by.
__device__ __forceinline__ Words<2> StreamingLoad(const Words<2>* from) {
  Words<2> v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
      : "=r"(v.w[0]), "=r"(v.w[1])
      : "l"(from));
  return v;
}
__device__ __forceinline__ Words<4> StreamingLoad(const Words<4>* from) {
  Words<4> v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
      : "l"(from));
  return v;
}

class DeviceWarp {
 public:
  // Through a shuffle, so that nvcc knows that all lanes have the same index.
  __device__ __forceinline__ DeviceWarp()
      : index_(__shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarp, 0)) {}

  __device__ __forceinline__ int Index() const { return index_; }

  // f(lane, thread) for every lane.
  template <class F>
  __device__ __forceinline__ void Each(F f) const {
    f(static_cast<int>(threadIdx.x) % kWarp, static_cast<int>(threadIdx.x));
  }

  // One mma of the whole warp; operands(thread) gives a lane's MmaOperands.
  template <class T, class F>
  __device__ __forceinline__ void Mma(F operands) const {
    const MmaOperands o = operands(static_cast<int>(threadIdx.x));
    MmaM16N8K16<T>(o.d, o.a, o.b);
  }

  // *value(thread) becomes the greatest of the values of so many neighbours, a power of two.
  template <class F>
  __device__ __forceinline__ void Max(F value, int lanes = kWarp) const {
    uint32_t* const v = value(static_cast<int>(threadIdx.x));
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      if (distance >= lanes) continue;
      const uint32_t other = __shfl_xor_sync(0xffffffffU, *v, distance);
      *v = *v > other ? *v : other;
    }
  }

 private:
  int index_;
};

class DeviceBlock {
 public:
  template <class State>
  class PerThread {
   public:
    __device__ __forceinline__ explicit PerThread(DeviceBlock&) {}
    __device__ __forceinline__ State& operator[](int) { return state_; }

   private:
    State state_;
  };

  // The block's shared memory, by bytes.
  class Shared {
   public:
    __device__ __forceinline__ Shared(DeviceBlock&, int) {}

    template <class V>
    __device__ __forceinline__ V Get(int, int at) const {
      return *reinterpret_cast<const V*>(Base() + at);
    }
    template <class V>
    __device__ __forceinline__ void Set(int, int at, V value) const {
      *reinterpret_cast<V*>(Base() + at) = value;
    }
    // Begins to copy 16 bytes from global memory; zeros where `valid` is false.
    __device__ __forceinline__ void CopyAsync(int, int at, const void* from, bool valid) const {
      const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(Base() + at));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                   "r"(valid ? 16 : 0));
    }

   private:
    __device__ static char* Base() {
      extern __shared__ Words<4> shared_bytes[];
      return reinterpret_cast<char*>(shared_bytes);
    }
  };

  __device__ int X() const { return static_cast<int>(blockIdx.x); }
  __device__ int Y() const { return static_cast<int>(blockIdx.y); }
  __device__ int Z() const { return static_cast<int>(blockIdx.z); }
  __device__ int Threads() const { return static_cast<int>(blockDim.x); }

  template <class F>
  __device__ __forceinline__ void EachThread(F f) const {
    f(static_cast<int>(threadIdx.x));
  }
  template <class F>
  __device__ __forceinline__ void EachWarp(F f) const {
    f(DeviceWarp());
  }
  __device__ __forceinline__ void Sync() const { __syncthreads(); }

  // Ends a group of asynchronous copies; Wait<n> returns when all but the n latest groups are done.
  __device__ __forceinline__ void Commit() const { asm volatile("cp.async.commit_group;"); }
  template <int pending>
  __device__ __forceinline__ void Wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  }

  template <class V>
  __device__ __forceinline__ V Load(const V* from) const {
    return *from;
  }
  template <class V>
  __device__ __forceinline__ V Stream(const V* from) const {
    return StreamingLoad(from);
  }
  template <class V>
  __device__ __forceinline__ void Store(V* to, V value) const {
    *to = value;
  }
};

#endif

}  // namespace onnxq::cuda
