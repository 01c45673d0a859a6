// Enough of CUDA to run a kernel on the CPU: every thread of a block is a fiber, and the fibers of a warp take turns at
// each barrier, in another order every time, so a missing barrier lets a thread read what its neighbours have not
// written yet. A warp goes on as far as it can before the next one starts. Shared memory starts as garbage in every
// block.
//
// With WATCH_RACES and -fsanitize=thread every fiber is a thread to ThreadSanitizer too, and nothing but __syncthreads
// and __syncwarp puts one's work before another's: it reports what is only right by the order in which fibers ran.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#ifdef WATCH_RACES
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
// The emulation is no part of what is watched.
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define UNWATCHED
#endif

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
inline Index blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kWarpThreads = 32;
constexpr unsigned kMostThreads = 512;

enum class Wait { kNothing, kWarp, kBlock, kEnd };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait wait;
  bool started;
  void* watched = nullptr;        // what it is to ThreadSanitizer
  unsigned barriers[2] = {0, 0};  // of its warp and of its block, passed in this block
};

inline Fiber fibers[kMostThreads];
inline unsigned running;                // its number
inline uint64_t offered[kMostThreads];  // what each thread offers to its warp
inline std::function<void()> body;
inline std::minstd_rand order_of_turns;

// What is ordered: the start of a block, its end, and barriers, each other one at the same address: by the next but one
// all have left the first.
struct Order {
  alignas(8) char start[8], end[8], block[2][8], warp[kMostThreads / kWarpThreads][2][8];
};
inline Order order;
inline bool has_order = true;  // without it barriers are none to ThreadSanitizer

UNWATCHED inline Index current() { return {running}; }

#ifdef WATCH_RACES

inline ucontext_t scheduler;
inline void* watched_scheduler;

UNWATCHED inline void leave(Fiber& self) {
  __tsan_switch_to_fiber(watched_scheduler, 1);
  swapcontext(&self.context, &scheduler);
}

UNWATCHED inline void enter(Fiber& fiber) {
  watched_scheduler = __tsan_get_current_fiber();
  if (!fiber.watched) fiber.watched = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(fiber.watched, 1);
  swapcontext(&scheduler, &fiber.context);
}

UNWATCHED inline char* ordered_by(Wait wait) {
  const unsigned turn = fibers[running].barriers[wait == Wait::kBlock]++ % 2;
  return wait == Wait::kBlock ? order.block[turn] : order.warp[running / kWarpThreads][turn];
}

inline void release(char* address) { __tsan_release(address); }
inline void acquire(char* address) { __tsan_acquire(address); }

#else

inline jmp_buf scheduler;

inline void leave(Fiber& self) {
  if (!_setjmp(self.resume)) _longjmp(scheduler, 1);
}

// Only the first time through ucontext, which calls the kernel of the system.
inline void enter(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline char* ordered_by(Wait) { return nullptr; }
inline void release(char*) {}
inline void acquire(char*) {}

#endif

UNWATCHED inline void pause(Wait wait) {
  Fiber& self = fibers[running];
  self.wait = wait;
  leave(self);
}

UNWATCHED inline void barrier(Wait wait) {
  char* const address = ordered_by(wait);
  if (has_order) release(address);
  pause(wait);
  if (has_order) acquire(address);
}

UNWATCHED inline void run_fiber() {
  while (true) {
    acquire(order.start);
    body();
    release(order.end);
    pause(Wait::kEnd);
  }
}

// Runs one fiber up to its next barrier.
UNWATCHED inline void resume(unsigned number) {
  running = number;
  fibers[number].wait = Wait::kNothing;
  enter(fibers[number]);
}

// Runs the fibers of a warp, each in turn up to its next barrier, until all wait for other warps or are done.
UNWATCHED inline Wait run_warp(unsigned first, unsigned threads) {
  std::vector<unsigned> turns(std::min(kWarpThreads, threads - first));
  std::iota(turns.begin(), turns.end(), first);
  do {
    std::shuffle(turns.begin(), turns.end(), order_of_turns);
    for (unsigned number : turns) resume(number);
    for (unsigned number : turns)
      if (fibers[number].wait != fibers[first].wait)
        throw std::runtime_error("threads of a warp met different barriers");
  } while (fibers[first].wait == Wait::kWarp);
  return fibers[first].wait;
}

UNWATCHED inline void run_block(unsigned threads) {
  for (unsigned number = 0; number < threads; ++number) fibers[number].barriers[0] = fibers[number].barriers[1] = 0;
  std::vector<unsigned> turns;
  for (unsigned first = 0; first < threads; first += kWarpThreads) turns.push_back(first);
  release(order.start);
  for (Wait wait = Wait::kBlock; wait == Wait::kBlock;) {
    std::shuffle(turns.begin(), turns.end(), order_of_turns);
    wait = run_warp(turns.front(), threads);
    for (unsigned first : turns)
      if (first != turns.front() && run_warp(first, threads) != wait)
        throw std::runtime_error("warps of a block met different numbers of barriers");
  }
  acquire(order.end);
}

inline void prepare_fibers(unsigned threads) {
  if (threads > kMostThreads) throw std::invalid_argument("too many threads");
  for (unsigned number = 0; number < threads; ++number) {
    Fiber& fiber = fibers[number];
    fiber.started = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

template <typename Kernel, typename... Arguments>
void launch(unsigned blocks, unsigned threads, void* shared, size_t shared_bytes, Kernel kernel,
            const Arguments&... arguments) {
  gridDim.x = blocks, blockDim.x = threads;
  body = [&] { kernel(arguments...); };
  order_of_turns.seed(1);
  prepare_fibers(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    memset(shared, 0xff, shared_bytes);
    run_block(threads);
  }
}

}  // namespace emulation

#define threadIdx emulation::current()

inline void __syncthreads() { emulation::barrier(emulation::Wait::kBlock); }
inline void __syncwarp() { emulation::barrier(emulation::Wait::kWarp); }

namespace emulation {

UNWATCHED inline uint64_t exchange_bits(uint64_t bits, unsigned from) {
  offered[running] = bits;
  pause(Wait::kWarp);
  bits = offered[running / kWarpThreads * kWarpThreads + from];
  pause(Wait::kWarp);
  return bits;
}

// What the thread `from` of this warp offers; every thread of the warp takes part. Orders nothing else of theirs.
template <typename T>
T exchange_with(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange_bits(bits, from);
  memcpy(&value, &bits, sizeof(T));
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
  return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}
