// Enough of CUDA to run a kernel on the CPU: every thread of a block is a fiber, and the fibers take turns at each
// barrier, so a missing barrier lets a thread read what its neighbours have not written yet. Shared memory starts
// as garbage in every block.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int barriers = 0;
  bool started = false, done = false;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<char> exchange;  // what each thread offers to its warp
inline std::function<void()> body;

inline void run_fiber() {
  body();
  fibers[threadIdx.x].done = true;
  _longjmp(scheduler, 1);
}

inline void barrier() {
  Fiber& self = fibers[threadIdx.x];
  ++self.barriers;
  if (!_setjmp(self.resume)) _longjmp(scheduler, 1);
}

// Runs one fiber up to its next barrier. Only the first time through ucontext, which calls the kernel of the system.
inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Until all are done, each fiber in turn runs up to its next barrier.
inline void run_block(unsigned threads) {
  fibers = std::vector<Fiber>(threads);
  exchange.assign(threads * 16, 0);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, run_fiber, 0);
  }
  for (bool working = true; working;) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) resume(fibers[threadIdx.x]);
    working = !fibers[0].done;
    for (const Fiber& fiber : fibers)
      if (fiber.done != fibers[0].done || fiber.barriers != fibers[0].barriers)
        throw std::runtime_error("threads of a block met different numbers of barriers");
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

inline void __syncthreads() { emulation::barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  char* slots = emulation::exchange.data();
  memcpy(slots + 16 * threadIdx.x, &value, sizeof(T));
  emulation::barrier();
  memcpy(&value, slots + 16 * (threadIdx.x ^ mask), sizeof(T));
  emulation::barrier();
  return value;
}

template <typename T>
void atomicAdd(T* to, T value) {
  *to += value;
}
