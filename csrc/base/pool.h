// Thread team that runs kernels: every thread enters the same function with its own Ctx.
// Spin-then-park: a thread spins for some microseconds at a barrier and then sleeps on a futex, so that a shared
// machine is not ruined and a decode step pays ~0.2 us per barrier.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace engine {

constexpr size_t kScratchBytes = size_t(4) << 20;  // private to a thread, survives only one node

class Pool;

struct Ctx {
  int tid;
  int n;
  char* scratch;  // kScratchBytes, 64-byte aligned
  Pool* pool;
  uint32_t phase;
};

// All threads of the team; also resets the task ticket, so each phase may hold one claim() loop.
void barrier(Ctx& ctx);
// Next task index of this phase, handed out dynamically. Results must not depend on who takes a task.
int64_t claim(Ctx& ctx);

using KernelFn = void (*)(const void* params, Ctx& ctx);

class Pool {
 public:
  using Job = void (*)(void* arg, Ctx& ctx);
  static Pool& instance();
  // Blocks until all threads have finished. Serialised: a second caller waits for the first.
  void run(Job job, void* arg);
  int size() const { return n_; }
  void resize(int n);

 private:
  Pool();
  ~Pool();
  friend void barrier(Ctx&);
  friend int64_t claim(Ctx&);
  void start(int n);
  void stop();
  void worker(int tid, uint32_t seen);
  void forked();
  void make_room(int cpu);
  struct Impl;
  Impl* impl_;
  int n_ = 1;
  bool stale_ = false;
  int caller_cpu_ = -1;
};

}  // namespace engine
