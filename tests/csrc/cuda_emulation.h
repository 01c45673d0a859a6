// Enough of CUDA to run a kernel on the CPU: every thread of a block is a fiber, and the fibers of a warp take turns at
// each barrier, so a missing barrier lets a thread read what its neighbours have not written yet. A warp goes on as far
// as it can before the next one starts. Shared memory starts as garbage in every block.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;

constexpr unsigned kWarpThreads = 32;

enum class Wait { kNothing, kWarp, kBlock, kEnd };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait wait = Wait::kNothing;
  bool started = false;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<char> exchange;  // what each thread offers to its warp
inline std::function<void()> body;

inline void run_fiber() {
  body();
  fibers[threadIdx.x].wait = Wait::kEnd;
  _longjmp(scheduler, 1);
}

inline void barrier(Wait wait) {
  Fiber& self = fibers[threadIdx.x];
  self.wait = wait;
  if (!_setjmp(self.resume)) _longjmp(scheduler, 1);
}

// Runs one fiber up to its next barrier. Only the first time through ucontext, which calls the kernel of the system.
inline void resume(Fiber& fiber) {
  fiber.wait = Wait::kNothing;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs the fibers of a warp, each in turn up to its next barrier, until all wait for other warps or are done.
inline Wait run_warp(unsigned first) {
  const unsigned end = std::min<unsigned>(first + kWarpThreads, fibers.size());
  do {
    for (threadIdx.x = first; threadIdx.x < end; ++threadIdx.x) resume(fibers[threadIdx.x]);
    for (unsigned i = first; i < end; ++i)
      if (fibers[i].wait != fibers[first].wait) throw std::runtime_error("threads of a warp met different barriers");
  } while (fibers[first].wait == Wait::kWarp);
  return fibers[first].wait;
}

inline void run_block(unsigned threads) {
  fibers = std::vector<Fiber>(threads);
  exchange.assign(threads * 16, 0);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, run_fiber, 0);
  }
  for (Wait wait = Wait::kBlock; wait == Wait::kBlock;) {
    wait = run_warp(0);
    for (unsigned first = kWarpThreads; first < threads; first += kWarpThreads)
      if (run_warp(first) != wait) throw std::runtime_error("warps of a block met different numbers of barriers");
  }
}

template <typename Kernel, typename... Arguments>
void launch(unsigned blocks, unsigned threads, void* shared, size_t shared_bytes, Kernel kernel,
            const Arguments&... arguments) {
  gridDim.x = blocks, blockDim.x = threads;
  body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    memset(shared, 0xff, shared_bytes);
    run_block(threads);
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(emulation::Wait::kBlock); }
inline void __syncwarp() { emulation::barrier(emulation::Wait::kWarp); }

namespace emulation {

// What the thread `from` of this warp offers; every thread of the warp takes part.
template <typename T>
T exchange_with(T value, unsigned from) {
  char* slots = exchange.data();
  memcpy(slots + 16 * threadIdx.x, &value, sizeof(T));
  barrier(Wait::kWarp);
  memcpy(&value, slots + 16 * (threadIdx.x / 32 * 32 + from), sizeof(T));
  barrier(Wait::kWarp);
  return value;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange_with(value, lane % 32);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::exchange_with(value, lane < offset ? lane : lane - offset);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange_with(value, threadIdx.x % 32 ^ mask);
}

inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }

template <typename T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  const T before = *to;
  *to += value;
  return before;
}
