// Runs the bodies of our CUDA kernels on the CPU, thread after thread, and checks what they touch.
//
// Global memory: each access lies in a buffer that was declared, at an aligned address; every
// element of an output is written once. Shared memory: bytes are written before they are read,
// asynchronous copies are waited for, and no two threads touch a byte between two Syncs if one of
// them writes it. Whatever breaks a rule throws.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "numbers.h"
#include "simt.h"

namespace onnxq::cuda {

struct Region {
  const char* begin;
  const char* end;
};

class Memory {
 public:
  void Input(const void* data, int64_t bytes) {
    const char* begin = static_cast<const char*>(data);
    inputs_.push_back({begin, begin + bytes});
  }
  void Output(void* data, int64_t bytes) {
    Input(data, bytes);
    outputs_.push_back({static_cast<const char*>(data), static_cast<const char*>(data) + bytes});
    written_.emplace_back(static_cast<size_t>(bytes), false);
  }

  void CheckRead(const void* at, size_t bytes, size_t alignment) const {
    const char* begin = static_cast<const char*>(at);
    if (reinterpret_cast<uintptr_t>(at) % alignment != 0)
      throw std::runtime_error("unaligned read");
    for (const Region& region : inputs_) {
      if (begin >= region.begin && begin + bytes <= region.end) return;
    }
    throw std::runtime_error("read outside of the inputs");
  }

  void CheckWrite(const void* at, size_t bytes, size_t alignment) {
    const char* begin = static_cast<const char*>(at);
    if (reinterpret_cast<uintptr_t>(at) % alignment != 0)
      throw std::runtime_error("unaligned write");
    for (size_t i = 0; i < outputs_.size(); ++i) {
      if (begin < outputs_[i].begin || begin + bytes > outputs_[i].end) continue;
      for (size_t b = 0; b < bytes; ++b) {
        const auto place = static_cast<size_t>(begin - outputs_[i].begin) + b;
        if (written_[i][place]) throw std::runtime_error("an output was written twice");
        written_[i][place] = true;
      }
      return;
    }
    throw std::runtime_error("write outside of the outputs");
  }

  void CheckComplete() const {
    for (const auto& bytes : written_) {
      if (!std::all_of(bytes.begin(), bytes.end(), [](bool b) { return b; }))
        throw std::runtime_error("an output was not written in full");
    }
  }

 private:
  std::vector<Region> inputs_, outputs_;
  std::vector<std::vector<bool>> written_;
};

class HostBlock;

class HostWarp {
 public:
  explicit HostWarp(int index) : index_(index) {}
  int Index() const { return index_; }

  template <class F>
  void Each(F f) const {
    for (int lane = 0; lane < kWarp; ++lane) f(lane, index_ * kWarp + lane);
  }

  template <class T, class F>
  void Mma(F operands) const {
    float a[16][16], b[16][8];
    const auto part = [](uint32_t word, int half) {
      return T::To(static_cast<uint16_t>(word >> (16 * half)));
    };
    Each([&](int lane, int thread) {
      const MmaOperands o = operands(thread);
      const int g = lane / 4, t = lane % 4;
      for (int reg = 0; reg < 4; ++reg) {
        for (int half = 0; half < 2; ++half) {
          a[g + reg % 2 * 8][2 * t + half + reg / 2 * 8] = part(o.a[reg], half);
          if (reg < 2) b[2 * t + half + 8 * reg][g] = part(o.b[reg], half);
        }
      }
    });
    Each([&](int lane, int thread) {
      const MmaOperands o = operands(thread);
      for (int reg = 0; reg < 4; ++reg) {
        double sum = o.d[reg];
        const int row = lane / 4 + reg / 2 * 8, column = lane % 4 * 2 + reg % 2;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
        o.d[reg] = static_cast<float>(sum);
      }
    });
  }

  template <class F>
  void Max(F value, int lanes = kWarp) const {
    uint32_t most[kWarp] = {};
    Each([&](int lane, int thread) {
      most[lane / lanes] = std::max(most[lane / lanes], *value(thread));
    });
    Each([&](int lane, int thread) { *value(thread) = most[lane / lanes]; });
  }

 private:
  int index_;
};

class HostBlock {
 public:
  HostBlock(Memory* memory, int x, int y, int z, int threads)
      : memory_(memory), x_(x), y_(y), z_(z), threads_(threads) {}

  template <class State>
  class PerThread {
   public:
    explicit PerThread(HostBlock& block) : states_(static_cast<size_t>(block.threads_)) {
      // Registers hold anything at first: all bits set are NaN in every float.
      std::memset(static_cast<void*>(states_.data()), 0xff, states_.size() * sizeof(State));
    }
    State& operator[](int thread) { return states_[static_cast<size_t>(thread)]; }

   private:
    std::vector<State> states_;
  };

  class Shared {
   public:
    Shared(HostBlock& block, int bytes) : block_(block) {
      block.cells_.assign(static_cast<size_t>(bytes), Cell{});
    }
    template <class V>
    V Get(int thread, int at) const {
      V value;
      char bytes[sizeof(V)];
      for (size_t i = 0; i < sizeof(V); ++i) bytes[i] = block_.Read(thread, at, i, alignof(V));
      std::memcpy(static_cast<void*>(&value), bytes, sizeof(V));
      return value;
    }
    template <class V>
    void Set(int thread, int at, V value) const {
      char bytes[sizeof(V)];
      std::memcpy(bytes, &value, sizeof(V));
      for (size_t i = 0; i < sizeof(V); ++i)
        block_.Write(thread, at, i, alignof(V)).value = bytes[i];
    }
    void CopyAsync(int thread, int at, const void* from, bool valid) const {
      if (valid) block_.memory_->CheckRead(from, 16, 16);
      for (size_t i = 0; i < 16; ++i) {
        Cell& cell = block_.Write(thread, at, i, 16);
        cell.value = valid ? static_cast<const char*>(from)[i] : '\0';
        cell.pending = true;
        block_.uncommitted_.push_back(&cell);
      }
    }

   private:
    HostBlock& block_;
  };

  int X() const { return x_; }
  int Y() const { return y_; }
  int Z() const { return z_; }
  int Threads() const { return threads_; }

  template <class F>
  void EachThread(F f) const {
    for (int thread = 0; thread < threads_; ++thread) f(thread);
  }
  template <class F>
  void EachWarp(F f) const {
    for (int warp = 0; warp < threads_ / kWarp; ++warp) f(HostWarp(warp));
  }
  void Sync() { ++epoch_; }
  void Commit() {
    groups_.push_back(uncommitted_);
    uncommitted_.clear();
  }
  template <int pending>
  void Wait() {
    while (groups_.size() > pending) {
      for (Cell* cell : groups_.front()) cell->pending = false;
      groups_.erase(groups_.begin());
    }
  }

  template <class V>
  V Load(const V* from) const {
    memory_->CheckRead(from, sizeof(V), alignof(V));
    V value;
    std::memcpy(static_cast<void*>(&value), from, sizeof(V));
    return value;
  }
  template <class V>
  V Stream(const V* from) const {
    return Load(from);
  }
  template <class V>
  void Store(V* to, V value) const {
    memory_->CheckWrite(to, sizeof(V), alignof(V));
    std::memcpy(to, &value, sizeof(V));
  }

 private:
  // One byte of shared memory. Threads are -1 for none and -2 for several.
  struct Cell {
    char value = '\0';
    bool pending = false;
    int writer = -1, reader = -1;
    int64_t write_epoch = -1, read_epoch = -1;
  };

  Cell& At(int at, size_t i, size_t alignment) {
    if (at < 0 || static_cast<size_t>(at) % alignment != 0)
      throw std::runtime_error("unaligned place in shared memory");
    const size_t place = static_cast<size_t>(at) + i;
    if (place >= cells_.size()) throw std::runtime_error("beyond shared memory");
    return cells_[place];
  }

  char Read(int thread, int at, size_t i, size_t alignment) {
    Cell& cell = At(at, i, alignment);
    if (cell.writer == -1) throw std::runtime_error("shared memory was read before it was written");
    if (cell.pending) throw std::runtime_error("a copy was read before it was waited for");
    if (cell.write_epoch == epoch_ && cell.writer != thread)
      throw std::runtime_error("race: read after another thread's write");
    cell.reader = cell.read_epoch == epoch_ && cell.reader != thread ? -2 : thread;
    cell.read_epoch = epoch_;
    return cell.value;
  }

  Cell& Write(int thread, int at, size_t i, size_t alignment) {
    Cell& cell = At(at, i, alignment);
    if (cell.pending) throw std::runtime_error("a copy was overwritten before it was waited for");
    if (cell.write_epoch == epoch_ && cell.writer != thread)
      throw std::runtime_error("race: two threads write");
    if (cell.read_epoch == epoch_ && cell.reader != thread)
      throw std::runtime_error("race: write after another thread's read");
    cell.writer = thread;
    cell.write_epoch = epoch_;
    return cell;
  }

  Memory* memory_;
  int x_, y_, z_, threads_;
  int64_t epoch_ = 0;
  std::vector<Cell> cells_;
  std::vector<Cell*> uncommitted_;
  std::vector<std::vector<Cell*>> groups_;
};

// Runs body(block) for every block of a grid.
template <class Body>
void RunGrid(Memory* memory, int x, int y, int z, int threads, const Body& body) {
  for (int i = 0; i < x * y * z; ++i) {
    HostBlock block(memory, i % x, i / x % y, i / x / y, threads);
    body(block);
  }
}

}  // namespace onnxq::cuda
