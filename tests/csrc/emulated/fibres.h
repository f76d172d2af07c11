// Runs the threads of a block as fibres on one CPU thread: a fibre runs until it waits for others.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <vector>

namespace dcx::emulated {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStack = 256 << 10;       // of a fibre; pages that are not touched cost nothing
constexpr size_t kMostShared = 227 << 10;  // what a block of sm_90 may ask for
constexpr size_t kGuard = 1024;            // behind the shared memory, to notice who writes there
constexpr unsigned char kPoison = 0xff;    // all ones: NaN in every floating type
constexpr unsigned char kGuardByte = 0xa5;

struct Collective {  // what a lane has brought to a meeting of its warp
  void* payload = nullptr;
  unsigned mask = 0;
  const std::type_info* kind = nullptr;
};

struct Thread {
  enum State { kReady, kAtBarrier, kAtCollective, kDone };
  State state = kReady;
  bool started = false;
  uint3 index{};
  ucontext_t first;
  jmp_buf place;
  Collective meeting;
};

struct Block {
  std::vector<Thread> threads;
  Thread* running = nullptr;
  const std::function<void()>* body = nullptr;
  dim3 grid, shape;
  uint3 index{};
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::exception_ptr error;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};

inline Block* block = nullptr;    // the one that runs
inline bool last_first = false;   // the order of threads and blocks: results must not depend on it

inline std::string where() {
  const uint3 b = block->index;
  return "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " +
         std::to_string(b.z) + "): ";
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulated kernel, " + where() + what);
}

inline Thread& self() {
  if (block == nullptr) throw std::runtime_error("a device function was called outside of a kernel");
  return *block->running;
}

inline int rank() { return static_cast<int>(block->running - block->threads.data()); }

inline void wait(Thread::State state) {
  Thread& me = self();
  me.state = state;
  if (_setjmp(me.place) == 0) _longjmp(block->scheduler, 1);
}

inline void enter() {
  try {
    (*block->body)();
  } catch (...) {
    block->error = std::current_exception();
  }
  self().state = Thread::kDone;
  _longjmp(block->scheduler, 1);
}

inline unsigned char* stacks() {
  static unsigned char* const pool = [] {
    void* made = mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(made);
  }();
  return pool;
}

inline void resume(Thread& thread, int number) {
  block->running = &thread;
  if (_setjmp(block->scheduler) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  getcontext(&thread.first);
  thread.first.uc_stack.ss_sp = stacks() + static_cast<size_t>(number) * kStack;
  thread.first.uc_stack.ss_size = kStack;
  thread.first.uc_link = nullptr;
  makecontext(&thread.first, &enter, 0);
  setcontext(&thread.first);
}

// The lanes of a warp meet: the last one to come calls `together` with what each has brought.
template <typename Payload, typename Function>
void warp_collective(Payload& mine, Function together, unsigned mask = 0xffffffffu) {
  Thread& me = self();
  const int lane = rank() % kWarp, first = rank() - lane;
  const int lanes = std::min<int>(kWarp, static_cast<int>(block->threads.size()) - first);
  if ((mask >> lane & 1) == 0) fail("lane " + std::to_string(lane) + " is not in its own mask");
  me.meeting = {&mine, mask, &typeid(Function)};
  me.state = Thread::kAtCollective;
  Payload* payloads[kWarp] = {};
  for (int other = 0; other < lanes; ++other) {
    if ((mask >> other & 1) == 0) continue;
    const Thread& thread = block->threads[first + other];
    if (thread.state == Thread::kDone) fail("a warp collective names a lane that has ended");
    if (thread.state != Thread::kAtCollective) return wait(Thread::kAtCollective);
    if (*thread.meeting.kind != typeid(Function) || thread.meeting.mask != mask) {
      fail("lanes of a warp are at different collectives, or name different lanes");
    }
    payloads[other] = static_cast<Payload*>(thread.meeting.payload);
  }
  together(payloads);
  for (int other = 0; other < lanes; ++other) {
    if (mask >> other & 1) block->threads[first + other].state = Thread::kReady;
  }
}

inline void barrier() {
  Thread& me = self();
  me.state = Thread::kAtBarrier;
  for (const Thread& thread : block->threads) {
    if (thread.state == Thread::kDone) fail("__syncthreads after a thread has ended");
    if (thread.state != Thread::kAtBarrier) return wait(Thread::kAtBarrier);
  }
  for (Thread& thread : block->threads) thread.state = Thread::kReady;
}

inline void run_block(Block& now) {
  const int count = static_cast<int>(now.threads.size());
  int done = 0;
  while (done < count) {
    bool moved = false;
    for (int turn = 0; turn < count; ++turn) {
      const int number = last_first ? count - 1 - turn : turn;
      Thread& thread = now.threads[number];
      if (thread.state != Thread::kReady) continue;
      resume(thread, number);
      if (now.error) std::rethrow_exception(now.error);
      moved = true;
    }
    int waiting = done = 0;
    for (const Thread& thread : now.threads) {
      waiting += thread.state == Thread::kAtBarrier;
      done += thread.state == Thread::kDone;
    }
    if (!moved) {
      fail(std::to_string(waiting) + " of " + std::to_string(count) +
           " threads wait at a barrier, " + std::to_string(count - done - waiting) +
           " at a warp collective, " + std::to_string(done) +
           " have ended: those will never meet");
    }
  }
}

inline void launch(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& body) {
  const size_t threads = static_cast<size_t>(shape.x) * shape.y * shape.z;
  if (threads == 0 || threads > kMostThreads || shape.z > 64) {
    throw std::runtime_error("launch: expected 1 to 1024 threads, got " + std::to_string(threads));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    throw std::runtime_error("launch: the grid is out of range");
  }
  if (shared_bytes > kMostShared) {
    throw std::runtime_error("launch: expected at most " + std::to_string(kMostShared) +
                             " bytes of shared memory, got " + std::to_string(shared_bytes));
  }
  alignas(128) static unsigned char shared[kMostShared + kGuard];
  Block now;
  now.grid = grid;
  now.shape = shape;
  now.body = &body;
  now.shared = shared;
  now.shared_bytes = shared_bytes;
  struct Running {
    explicit Running(Block* one) { block = one; }
    ~Running() { block = nullptr; }
  } running(&now);
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t turn = 0; turn < blocks; ++turn) {
    const uint64_t number = last_first ? blocks - 1 - turn : turn;
    now.index = {static_cast<unsigned>(number % grid.x),
                 static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
    now.threads.assign(threads, Thread());
    for (size_t thread = 0; thread < threads; ++thread) {
      now.threads[thread].index = {static_cast<unsigned>(thread % shape.x),
                                   static_cast<unsigned>(thread / shape.x % shape.y),
                                   static_cast<unsigned>(thread / shape.x / shape.y)};
    }
    std::memset(shared, kPoison, shared_bytes);
    std::memset(shared + shared_bytes, kGuardByte, kGuard);
    run_block(now);
    for (size_t byte = 0; byte < kGuard; ++byte) {
      if (shared[shared_bytes + byte] != kGuardByte) {
        fail("wrote " + std::to_string(byte) + " bytes behind its " +
             std::to_string(shared_bytes) + " bytes of shared memory");
      }
    }
  }
}

}  // namespace dcx::emulated
