#include "decoders.cuh"

namespace onnxq::cuda {
namespace {

template <class T, class Decoder, int row_tiles>
__global__ void __launch_bounds__(kTileThreads, 1) Tile(const QuantMatMulArgs a) {
  DeviceBlock block;
  TileBody<T, Decoder, row_tiles>(block, a);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads) SumSplits(const QuantMatMulArgs a, float unit) {
  DeviceBlock block;
  SumSplitsBody<T>(block, a, unit);
}

template <class T, class Decoder, class F>
int ForRowTiles(int row_tiles, const F& f) {
  switch (row_tiles) {
    case 2:
      return f(&Tile<T, Decoder, 2>);
    case 4:
      return f(&Tile<T, Decoder, 4>);
    case 8:
      return f(&Tile<T, Decoder, 8>);
    default:
      return kErrorArguments;
  }
}

}  // namespace

int PrepareTile() {
  return ForEveryDecoder([](auto t, auto decoder) {
    using Decoder = decltype(decoder);
    for (const int row_tiles : {2, 4, 8}) {
      const int status = ForRowTiles<decltype(t), Decoder>(row_tiles, [&](auto* kernel) {
        return AllowShared(kernel, TileSharedBytes<Decoder::kBits>(row_tiles));
      });
      if (status != 0) return status;
    }
    return 0;
  });
}

int LaunchTile(const QuantMatMulArgs& a, WeightKind kind, int element, const Plan& plan,
               cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(CeilDivide(a.n, kTileColumns)),
                  static_cast<unsigned>(CeilDivide(a.m, 8 * plan.row_tiles)),
                  static_cast<unsigned>(a.splits));
  return ForDecoder(element, kind, [&](auto t, auto decoder) {
    using T = decltype(t);
    using Decoder = decltype(decoder);
    const int status = ForRowTiles<T, Decoder>(plan.row_tiles, [&](auto* kernel) {
      kernel<<<grid, kTileThreads, static_cast<size_t>(plan.shared_bytes), stream>>>(a);
      return LaunchStatus();
    });
    if (status != 0 || a.splits == 1) return status;
    const auto blocks = static_cast<unsigned>(CeilDivide(int64_t{a.m} * a.n, kSumThreads));
    SumSplits<T><<<blocks, kSumThreads, 0, stream>>>(a, Decoder::kUnit);
    return LaunchStatus();
  });
}

}  // namespace onnxq::cuda
