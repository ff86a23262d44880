#include "base/pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace engine {
namespace {

constexpr int kSpin = 1500;      // ~20 us of pause instructions inside a step
constexpr int kSpinIdle = 6000;  // between steps: the next replay usually follows within this

void futex_wait(std::atomic<uint32_t>* word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

// A generation word that waiters watch; `parked` saves the wake system call when everybody spins.
struct alignas(64) Signal {
  std::atomic<uint32_t> gen{0};
  std::atomic<uint32_t> parked{0};

  void wait(uint32_t seen, int spin) {
    for (int i = 0; i < spin; ++i) {
      if (gen.load(std::memory_order_acquire) != seen) return;
      _mm_pause();
    }
    parked.fetch_add(1, std::memory_order_seq_cst);
    while (gen.load(std::memory_order_seq_cst) == seen) futex_wait(&gen, seen);
    parked.fetch_sub(1, std::memory_order_relaxed);
  }
  void post() {
    gen.fetch_add(1, std::memory_order_seq_cst);
    if (parked.load(std::memory_order_seq_cst) != 0) futex_wake(&gen);
  }
};

int default_threads() {
  if (const char* s = std::getenv("ENGINE_THREADS")) {
    int v = std::atoi(s);
    if (v > 0 && v <= 1024) return v;
  }
  cpu_set_t set;
  const int cores =
      sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : int(std::thread::hardware_concurrency());
  // A container may own many cores and the time of few: more threads than that would only be stopped by turns.
  long quota = 0, period = 0;
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (std::fscanf(f, "%ld %ld", &quota, &period) != 2) quota = 0;
    std::fclose(f);
  }
  if (quota <= 0 || period <= 0) return cores;
  const int allowed = int((quota + period - 1) / period);
  return allowed < cores ? allowed : cores;
}

}  // namespace

struct Pool::Impl {
  std::mutex busy;
  Signal start;
  Signal sense;  // barrier generation
  struct alignas(64) Counter {
    std::atomic<int64_t> v{0};
  };
  Counter arrived;
  Counter ticket[2];
  Job job = nullptr;
  void* arg = nullptr;
  bool quit = false;
  std::vector<std::thread> threads;
  cpu_set_t allowed;  // where this process may run
  std::vector<char*> scratch;
};

void barrier(Ctx& ctx) {
  Pool::Impl& im = *ctx.pool->impl_;
  const uint32_t next = ctx.phase + 1;
  if (ctx.n == 1) {
    im.ticket[next & 1].v.store(0, std::memory_order_relaxed);
    ctx.phase = next;
    return;
  }
  const uint32_t seen = im.sense.gen.load(std::memory_order_acquire);
  if (im.arrived.v.fetch_add(1, std::memory_order_acq_rel) == ctx.n - 1) {
    im.arrived.v.store(0, std::memory_order_relaxed);
    im.ticket[next & 1].v.store(0, std::memory_order_relaxed);
    im.sense.post();
  } else {
    im.sense.wait(seen, kSpin);
  }
  ctx.phase = next;
}

int64_t claim(Ctx& ctx) { return ctx.pool->impl_->ticket[ctx.phase & 1].v.fetch_add(1, std::memory_order_relaxed); }

Pool& Pool::instance() {
  // Leaked on purpose: worker threads may outlive static destruction.
  static Pool* pool = new Pool();
  return *pool;
}

Pool::Pool() : impl_(new Impl) {
  start(default_threads());
  pthread_atfork(nullptr, nullptr, [] { instance().forked(); });
}

// In a forked child the worker threads are gone: drop their state and start a new team at the next run.
void Pool::forked() {
  impl_ = new Impl;
  stale_ = true;
}

Pool::~Pool() { stop(); }

void Pool::start(int n) {
  n_ = n < 1 ? 1 : n;
  caller_cpu_ = -1;
  if (sched_getaffinity(0, sizeof impl_->allowed, &impl_->allowed) != 0) CPU_ZERO(&impl_->allowed);
  impl_->quit = false;
  for (int i = 0; i < n_; ++i) {
    void* p = mmap(nullptr, kScratchBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    impl_->scratch.push_back(static_cast<char*>(p));
  }
  // The start generation is read here, so that a thread that comes up late still sees the first job.
  const uint32_t seen = impl_->start.gen.load();
  for (int i = 1; i < n_; ++i) impl_->threads.emplace_back([this, i, seen] { worker(i, seen); });
}

void Pool::stop() {
  impl_->quit = true;
  impl_->start.post();
  for (auto& t : impl_->threads) t.join();
  impl_->threads.clear();
  for (char* p : impl_->scratch) munmap(p, kScratchBytes);
  impl_->scratch.clear();
}

void Pool::resize(int n) {
  std::lock_guard<std::mutex> lock(impl_->busy);
  if (stale_) {
    n_ = n;  // a forked child has no team yet: the next run starts one of this size
    return;
  }
  if (n == n_) return;
  stop();
  start(n);
}

void Pool::worker(int tid, uint32_t seen) {
  Impl& im = *impl_;
  for (;;) {
    im.start.wait(seen, kSpinIdle);
    seen = im.start.gen.load(std::memory_order_acquire);
    if (im.quit) return;
    Ctx ctx{tid, n_, im.scratch[tid], this, 0};
    im.job(im.arg, ctx);
    barrier(ctx);
  }
}

// Keeps workers off the caller's core. The kernel likes to wake them there, beside the thread that woke them, and moves
// them only at its next balancing tick: until then two threads share one core and the other one idles.
void Pool::make_room(int cpu) {
  cpu_set_t set = impl_->allowed;
  if (cpu < 0 || !CPU_ISSET(cpu, &set) || CPU_COUNT(&set) < n_) return;
  CPU_CLR(cpu, &set);
  for (auto& t : impl_->threads) pthread_setaffinity_np(t.native_handle(), sizeof set, &set);
}

void Pool::run(Job job, void* arg) {
  std::lock_guard<std::mutex> lock(impl_->busy);
  if (stale_) {
    stale_ = false;
    start(n_);
  }
  if (n_ > 1) {
    const int cpu = sched_getcpu();
    if (cpu != caller_cpu_) {
      caller_cpu_ = cpu;
      make_room(cpu);
    }
  }
  Impl& im = *impl_;
  im.job = job;
  im.arg = arg;
  im.ticket[0].v.store(0, std::memory_order_relaxed);
  if (n_ > 1) im.start.post();
  Ctx ctx{0, n_, im.scratch[0], this, 0};
  job(arg, ctx);
  barrier(ctx);
}

}  // namespace engine
