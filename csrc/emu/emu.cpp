// Runs a launch: blocks one after the other, the threads of a block as fibres that switch where CUDA threads can wait
// for each other. A thread that never waits costs no switch: its fibre goes on with the next thread.
#include "emu/emu.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/observer.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
extern char engine_emu_shared_begin[], engine_emu_shared_end[];
// Saves the registers that a call keeps, stores the stack pointer in *from and continues on `to`.
void engine_emu_switch(void** from, void* to);
}

#if !defined(__x86_64__)
#error "csrc/emu switches fibres on x86-64 only"
#endif
asm(R"(
.text
.hidden engine_emu_switch
.globl engine_emu_switch
.type engine_emu_switch, @function
engine_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size engine_emu_switch, .-engine_emu_switch
)");

namespace engine::emu {

Builtins builtins;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 99 * 1024;  // what every supported architecture grants a block
constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;
constexpr size_t kRedZone = 4096;
constexpr unsigned kWarp = 32;

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;  // lowest address
  size_t bytes = kStack;
  void* asan = nullptr;
};

struct Copy {
  void* to;
  const void* from;
};

enum class State : uint8_t { fresh, ready, waiting, done };

struct Thread {
  dim3 index;
  Fiber* fiber = nullptr;
  State state = State::fresh;
  Collective at = Collective::sync_threads;
  int line = 0;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> copies;               // not committed yet
};

// A warp collective that some lanes have entered.
struct Meeting {
  Collective kind;
  int line;
  unsigned mask, arrived;
  void* data[kWarp];  // of those who have arrived
};

struct Barrier {
  unsigned arrived = 0;
  int line = 0;
  Vote vote = Vote::none;
  unsigned yes = 0;
  unsigned result = 0;
};

struct Shuffle {
  uint64_t value;
  Lane mode;
  int operand, width;
};
struct Ballot {
  unsigned vote;
};
struct Reduction {
  uint32_t value;
  Reduce op;
  bool is_signed;
};
struct Mma {
  void* c;
  const uint32_t *a, *b;
};
struct Rows {
  uint32_t* r;
  const void* row;
};

// Threads that can run, each at most once.
class Queue {
 public:
  bool empty() const { return first_ == last_; }
  void clear() { first_ = last_ = 0; }
  void push_back(unsigned t) { at(last_++) = uint16_t(t); }
  void push_front(unsigned t) { at(--first_) = uint16_t(t); }
  unsigned pop_front() { return at(first_++); }
  unsigned pop_any(uint64_t random) {
    uint16_t& chosen = at(first_ + unsigned(random % (last_ - first_)));
    std::swap(chosen, at(last_ - 1));
    return at(--last_);
  }

 private:
  uint16_t& at(unsigned i) { return slots_[i % kMaxThreads]; }
  unsigned first_ = 0, last_ = 0;
  uint16_t slots_[kMaxThreads];
};

struct Machine {
  // launch
  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* arg = nullptr;
  size_t shared_bytes = 0;
  // block
  unsigned n = 0, exited = 0;
  Thread threads[kMaxThreads];
  std::vector<Meeting> meetings[kMaxThreads / kWarp];
  unsigned exited_lanes[kMaxThreads / kWarp];  // masks
  Barrier barrier;
  Queue ready;
  unsigned current = 0;
  std::string error;
  // fibres
  Fiber host;
  Fiber* running = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  char* stacks = nullptr;
  char* shared = nullptr;
  // schedule
  uint64_t seed = 0;
  std::minstd_rand random{1};
  Observer* observer = nullptr;
  std::mutex one_launch;
};

Machine machine;
inline Machine& m() { return machine; }

bool lockstep() { return m().seed < 2; }
bool shuffled() { return m().seed >= 4; }

const char* name_of(Collective c) {
  switch (c) {
    case Collective::sync_threads: return "__syncthreads";
    case Collective::sync_warp: return "__syncwarp";
    case Collective::shuffle: return "__shfl_sync";
    case Collective::ballot: return "a vote";
    case Collective::reduce: return "__reduce_sync";
    case Collective::mma_bf16: return "mma_bf16";
    case Collective::mma_s8: return "mma_s8";
    case Collective::ldmatrix: return "ldmatrix";
  }
  return "?";
}

// "threads 0-31 wait at __syncthreads (line 7), thread 40 has exited"
std::string who_waits_where() {
  std::map<std::string, std::vector<unsigned>> places;
  for (unsigned t = 0; t < m().n; ++t) {
    const Thread& thread = m().threads[t];
    std::string place = "can run";
    if (thread.state == State::done) place = "exited";
    if (thread.state == State::waiting) {
      place = std::string("wait at ") + name_of(thread.at);
      if (thread.line) place += " (line " + std::to_string(thread.line) + ")";
    }
    places[place].push_back(t);
  }
  std::string out;
  for (const auto& [place, who] : places) {
    out += out.empty() ? "threads " : "; threads ";
    for (size_t i = 0; i < who.size();) {
      size_t j = i;
      while (j + 1 < who.size() && who[j + 1] == who[j] + 1) ++j;
      if (i) out += ",";
      out += std::to_string(who[i]) + (j > i ? "-" + std::to_string(who[j]) : "");
      i = j + 1;
    }
    out += " " + place;
  }
  return out;
}

void switch_to(Fiber* to) {
  Fiber* from = m().running;
  m().running = to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from->asan, to->stack, to->bytes);
#endif
  engine_emu_switch(&from->sp, to->sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->asan, nullptr, nullptr);
#endif
}

// Abandons the launch: the other fibres are never resumed.
[[noreturn]] void fail(const std::string& what) {
  const dim3 b = builtins.block_index;
  m().error = std::string("kernel '") + m().kernel + "', block (" + std::to_string(b.x) + "," + std::to_string(b.y) +
              "," + std::to_string(b.z) + "), thread " + std::to_string(m().current) + ": " + what;
  switch_to(&m().host);
  __builtin_unreachable();
}

void activate(unsigned t) {
  m().current = t;
  builtins.thread = m().threads[t].index;
}

bool pick(unsigned* t) {
  Queue& q = m().ready;
  if (q.empty()) return false;
  *t = shuffled() ? q.pop_any(m().random()) : q.pop_front();
  return true;
}

void fiber_main();

Fiber* take_fiber() {
  auto& idle = m().idle;
  if (idle.empty()) {
    const size_t i = m().fibers.size();
    if (!m().stacks) {
      // Address space only; pages appear when a stack is first used.
      void* all = mmap(nullptr, (kStack + kGuard) * (kMaxThreads + 1), PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (all == MAP_FAILED) throw std::bad_alloc();
      m().stacks = static_cast<char*>(all);
    }
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = m().stacks + i * (kStack + kGuard) + kGuard;
    if (mprotect(fiber->stack, kStack, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    idle.push_back(fiber.get());
    m().fibers.push_back(std::move(fiber));
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  if (!fiber->sp) {
    void** top = reinterpret_cast<void**>(fiber->stack + kStack) - 1;  // as after a call: 8 below 16 bytes
    *top = nullptr;  // where a return address would be: ends backtraces
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber->sp = top;
  }
  return fiber;
}

// Leaves the current thread's fibre and continues the next thread that can run.
void yield_to_next() {
  unsigned next;
  if (!pick(&next)) fail("no thread can go on: " + who_waits_where());
  if (next == m().current) return;
  Thread& t = m().threads[next];
  if (t.state == State::fresh) t.fiber = take_fiber();
  t.state = State::ready;
  activate(next);
  switch_to(t.fiber);
}

void finish_current() {
  Machine& s = m();
  Thread& t = s.threads[s.current];
  t.state = State::done;
  ++s.exited;
  s.exited_lanes[s.current / kWarp] |= 1u << s.current % kWarp;
  if (s.barrier.arrived) fail("exits while others are at a barrier: " + who_waits_where());
  for (const Meeting& meeting : s.meetings[s.current / kWarp])
    if (meeting.mask >> s.current % kWarp & 1) fail("exits while its warp waits for it: " + who_waits_where());
  t.groups.clear();
  t.copies.clear();
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Machine& s = m();
    s.body(s.arg);
    finish_current();
    Fiber* mine = s.running;
    unsigned next;
    if (!pick(&next)) {
      if (s.exited != s.n) fail("no thread can go on: " + who_waits_where());
      s.idle.push_back(mine);
      switch_to(&s.host);
      continue;
    }
    Thread& t = s.threads[next];
    activate(next);
    if (t.state == State::fresh) {
      t.state = State::ready;
      t.fiber = mine;
    } else {
      t.state = State::ready;
      s.idle.push_back(mine);
      switch_to(t.fiber);
    }
  }
}

void wait_at(Collective kind, int line) {
  Thread& t = m().threads[m().current];
  t.state = State::waiting;
  t.at = kind;
  t.line = line;
  yield_to_next();
}

// Lets the threads of `first + lanes` run again. Ahead of all others where the schedule lets one warp run ahead.
void release(unsigned first, unsigned count, unsigned mask) {
  Machine& s = m();
  unsigned who[kMaxThreads], n = 0;
  for (unsigned i = 0; i < count; ++i) {
    const bool named = count > kWarp || mask >> i & 1;
    if (named && first + i != s.current && s.threads[first + i].state == State::waiting) who[n++] = first + i;
  }
  if (s.seed == 1 || s.seed == 3) std::reverse(who, who + n);
  for (unsigned i = 0; i < n; ++i) s.threads[who[i]].state = State::ready;
  if (lockstep() || shuffled()) {
    for (unsigned i = 0; i < n; ++i) s.ready.push_back(who[i]);
  } else {
    for (unsigned i = n; i-- > 0;) s.ready.push_front(who[i]);
  }
}

void complete(Meeting& meeting, unsigned warp);

// Enters a warp collective; returns when all lanes of the mask have and it is done.
void meet(Collective kind, unsigned mask, int line, void* data) {
  Machine& s = m();
  const unsigned warp = s.current / kWarp, lane = s.current % kWarp;
  const unsigned lanes = std::min(s.n - warp * kWarp, kWarp);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail(std::string(name_of(kind)) + " with a mask that does not name the calling lane");
  if (mask & s.exited_lanes[warp]) {
    s.threads[s.current].state = State::waiting;
    s.threads[s.current].at = kind;
    s.threads[s.current].line = line;
    fail(std::string(name_of(kind)) + " names a lane that has exited: " + who_waits_where());
  }
  auto& meetings = s.meetings[warp];
  size_t i = 0;
  // A meeting that waits for this lane; others of the warp may be at one of their own.
  while (i < meetings.size() && !(meetings[i].mask >> lane & 1)) ++i;
  if (i == meetings.size()) {
    meetings.emplace_back();
    meetings.back().kind = kind;
    meetings.back().line = line;
    meetings.back().mask = mask;
    meetings.back().arrived = 0;
  } else if (meetings[i].mask != mask || meetings[i].kind != kind || meetings[i].line != line) {
    fail(std::string("is at ") + name_of(kind) + " (line " + std::to_string(line) +
         ") while lanes of its warp wait for it at another collective or with another mask: " + who_waits_where());
  }
  Meeting& meeting = meetings[i];
  meeting.arrived |= 1u << lane;
  meeting.data[lane] = data;
  if (meeting.arrived != mask) {
    wait_at(kind, line);
    return;
  }
  complete(meeting, warp);
  if (s.observer) s.observer->warp_barrier(warp, mask);
  meetings.erase(meetings.begin() + ptrdiff_t(i));
  release(warp * kWarp, kWarp, mask);
  // In turn with the lanes that it has let go, not ahead of them.
  s.threads[s.current].state = State::ready;
  if (lockstep() || shuffled()) {
    s.ready.push_back(s.current);
    yield_to_next();
  }
}

template <class T> T& data(const Meeting& meeting, unsigned lane) { return *static_cast<T*>(meeting.data[lane]); }

void shuffle_lanes(const Meeting& meeting) {
  uint64_t in[kWarp] = {};
  for (unsigned i = 0; i < kWarp; ++i)
    if (meeting.mask >> i & 1) in[i] = data<Shuffle>(meeting, i).value;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(meeting.mask >> i & 1)) continue;
    Shuffle& s = data<Shuffle>(meeting, i);
    const int lane = int(i), first = lane / s.width * s.width, last = first + s.width - 1;
    int from = lane;
    switch (s.mode) {
      case Lane::index: from = first + (s.operand & (s.width - 1)); break;
      case Lane::up: from = lane - s.operand < first ? lane : lane - s.operand; break;
      case Lane::down: from = lane + s.operand > last ? lane : lane + s.operand; break;
      case Lane::exclusive: from = (lane ^ s.operand) > last ? lane : lane ^ s.operand; break;
    }
    // A lane outside the mask gives an undefined value: NaN shows it best.
    s.value = meeting.mask >> from & 1 ? in[from] : ~uint64_t(0);
  }
}

void reduce_lanes(const Meeting& meeting) {
  bool first = true;
  uint32_t sum = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(meeting.mask >> i & 1)) continue;
    const Reduction& r = data<Reduction>(meeting, i);
    const uint32_t v = r.value;
    const bool less = r.is_signed ? int32_t(v) < int32_t(sum) : v < sum;
    if (first) {
      sum = v;
    } else {
      switch (r.op) {
        case Reduce::add: sum += v; break;
        case Reduce::min: sum = less ? v : sum; break;
        case Reduce::max: sum = less ? sum : v; break;
        case Reduce::bit_and: sum &= v; break;
        case Reduce::bit_or: sum |= v; break;
        case Reduce::bit_xor: sum ^= v; break;
      }
    }
    first = false;
  }
  for (unsigned i = 0; i < kWarp; ++i)
    if (meeting.mask >> i & 1) data<Reduction>(meeting, i).value = sum;
}

// Fragments of the PTX ISA: lane = 4 group + part. c[0..1] are row `group`, c[2..3] row `group + 8`, columns 2 part + {0,1}.
// Per = values in a register: 2 (bf16) or 4 (s8). a[0], a[1]: rows group, group + 8 of the first half of K; a[2], a[3]:
// of the second. b[0], b[1]: column `group`, first and second half of K.
template <int Per, class Sum, class Value> void multiply(const Meeting& meeting, Value value) {
  constexpr int kDepth = 8 * Per;
  Sum a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < int(kWarp); ++lane) {
    const Mma& f = data<Mma>(meeting, unsigned(lane));
    const int group = lane / 4, part = lane % 4;
    for (int i = 0; i < Per; ++i) {
      const int k = part * Per + i;
      a[group][k] = value(f.a[0], i);
      a[group + 8][k] = value(f.a[1], i);
      a[group][k + kDepth / 2] = value(f.a[2], i);
      a[group + 8][k + kDepth / 2] = value(f.a[3], i);
      b[group][k] = value(f.b[0], i);
      b[group][k + kDepth / 2] = value(f.b[1], i);
    }
  }
  for (int lane = 0; lane < int(kWarp); ++lane) {
    Sum* c = static_cast<Sum*>(data<Mma>(meeting, unsigned(lane)).c);
    const int group = lane / 4, part = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const Sum *row = a[group + 8 * (i / 2)], *column = b[2 * part + i % 2];
      Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += row[k] * column[k];
      c[i] += sum;
    }
  }
}

void load_rows(const Meeting& meeting, unsigned warp) {
  uint8_t rows[kWarp][16];
  for (unsigned i = 0; i < kWarp; ++i) {
    const Rows& r = data<Rows>(meeting, i);
    if (reinterpret_cast<uintptr_t>(r.row) % 16) fail("ldmatrix: a row is not 16-byte aligned");
    if (m().observer)
      m().observer->access(warp * kWarp + i, r.row, 16, Access::read, reinterpret_cast<const void*>(&load_rows));
    std::memcpy(rows[i], r.row, 16);
  }
  for (unsigned i = 0; i < kWarp; ++i)
    for (unsigned j = 0; j < 4; ++j) std::memcpy(&data<Rows>(meeting, i).r[j], &rows[8 * j + i / 4][4 * (i % 4)], 4);
}

void complete(Meeting& meeting, unsigned warp) {
  const bool whole = meeting.kind == Collective::mma_bf16 || meeting.kind == Collective::mma_s8 ||
                     meeting.kind == Collective::ldmatrix;
  if (whole && meeting.mask != ~0u) fail(std::string(name_of(meeting.kind)) + " needs a warp of 32 threads");
  switch (meeting.kind) {
    case Collective::sync_threads:
    case Collective::sync_warp: break;
    case Collective::shuffle: shuffle_lanes(meeting); break;
    case Collective::ballot: {
      unsigned votes = 0;
      for (unsigned i = 0; i < kWarp; ++i)
        if (meeting.mask >> i & 1) votes |= data<Ballot>(meeting, i).vote << i;
      for (unsigned i = 0; i < kWarp; ++i)
        if (meeting.mask >> i & 1) data<Ballot>(meeting, i).vote = votes;
      break;
    }
    case Collective::reduce: reduce_lanes(meeting); break;
    case Collective::mma_bf16:
      multiply<2, float>(meeting, [](uint32_t r, int i) { return bits<float>(r >> (16 * i) << 16); });
      break;
    case Collective::mma_s8:
      multiply<4, int32_t>(meeting, [](uint32_t r, int i) { return int32_t(int8_t(r >> (8 * i))); });
      break;
    case Collective::ldmatrix: load_rows(meeting, warp); break;
  }
}

// Volatile, so that it does not become a memset: AddressSanitizer would see that cross the redzones of the variables.
__attribute__((no_sanitize_address)) void poison(char* begin, char* end) {
  for (auto p = reinterpret_cast<volatile uint64_t*>(begin); p < reinterpret_cast<volatile uint64_t*>(end); ++p)
    *p = ~uint64_t(0);
}

// Bounds of the calling thread's stack: AddressSanitizer must know them to switch back to it, watch.cpp to ignore it.
Region stack_of_this_thread() {
  static thread_local Region region = [] {
    pthread_attr_t attributes;
    void* begin = nullptr;
    size_t bytes = 0;
    if (!pthread_getattr_np(pthread_self(), &attributes)) {
      pthread_attr_getstack(&attributes, &begin, &bytes);
      pthread_attr_destroy(&attributes);
    }
    return Region{reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes};
  }();
  return region;
}

void prepare_shared(size_t bytes) {
  Machine& s = m();
  if (!s.shared) {
    const size_t whole = kMaxShared + 2 * kRedZone;
    s.shared = static_cast<char*>(std::aligned_alloc(kRedZone, (whole + kRedZone - 1) / kRedZone * kRedZone));
    if (!s.shared) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(s.shared, kRedZone);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(s.shared + kRedZone, bytes);
  __asan_poison_memory_region(s.shared + kRedZone + bytes, kMaxShared + kRedZone - bytes);
#else
  // Other builds see an overrun that reads as NaN.
  std::memset(s.shared + kRedZone + bytes, 0xFF, std::min(kMaxShared - bytes, size_t(256)));
#endif
}

void run_block() {
  Machine& s = m();
  poison(engine_emu_shared_begin, engine_emu_shared_end);
  std::memset(s.shared + kRedZone, 0xFF, s.shared_bytes);
  s.exited = 0;
  for (unsigned& lanes : s.exited_lanes) lanes = 0;
  s.barrier = {};
  s.ready.clear();
  for (unsigned t = 0; t < s.n; ++t) {
    s.threads[t].state = State::fresh;
    s.threads[t].fiber = nullptr;
    s.threads[t].groups.clear();
    s.threads[t].copies.clear();
  }
  for (auto& meetings : s.meetings) meetings.clear();
  for (unsigned t = 0; t < s.n; ++t) s.ready.push_back(s.seed == 1 || s.seed == 3 ? s.n - 1 - t : t);
  unsigned first;
  pick(&first);
  Thread& t = s.threads[first];
  t.fiber = take_fiber();
  t.state = State::ready;
  activate(first);
  switch_to(t.fiber);
  if (s.error.empty()) return;
  // The abandoned fibres start afresh.
  s.idle.clear();
  for (auto& fiber : s.fibers) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber->stack, kStack);
#endif
    fiber->sp = nullptr;
    s.idle.push_back(fiber.get());
  }
  throw std::runtime_error(s.error);
}

}  // namespace

void set_schedule(uint64_t seed) {
  std::lock_guard<std::mutex> lock(m().one_launch);
  m().seed = seed;
  m().random.seed(unsigned(seed) + 1);
}

void run(const char* name, dim3 grid, dim3 block, size_t shared, bool overlap, void (*body)(void*), void* arg) {
  Machine& s = m();
  std::lock_guard<std::mutex> lock(s.one_launch);
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error("kernel '" + std::string(name) + "': " + what);
  };
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, n = uint64_t(block.x) * block.y * block.z;
  if (!blocks || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of (" + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," + std::to_string(grid.z) +
           ") blocks; each of the three is 1 to 2^31-1, 65535, 65535");
  }
  if (!n || n > kMaxThreads || block.z > 64) {
    refuse("a block of " + std::to_string(n) + " threads; a device takes 1 to 1024, at most 64 of them along z");
  }
  if (shared > kMaxShared) {
    refuse(std::to_string(shared) + " bytes of shared memory; every supported device has " +
           std::to_string(kMaxShared));
  }
  s.kernel = name;
  s.body = body;
  s.arg = arg;
  s.n = unsigned(n);
  s.shared_bytes = shared;
  s.error.clear();
  const Region stack = stack_of_this_thread();
  s.host.stack = reinterpret_cast<char*>(stack.begin);
  s.host.bytes = stack.end - stack.begin;
  s.running = &s.host;
  builtins.grid = grid;
  builtins.block = block;
  for (unsigned t = 0; t < s.n; ++t)
    s.threads[t].index = dim3(t % block.x, t / block.x % block.y, t / (block.x * block.y));
  prepare_shared(shared);
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (s.seed == 1 || s.seed == 3) std::reverse(order.begin(), order.end());
  if (shuffled()) std::shuffle(order.begin(), order.end(), s.random);
  if (s.observer) s.observer->launch_begins(name, grid, block, shared, overlap);
  for (const uint32_t b : order) {
    builtins.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
    if (s.observer) s.observer->block_begins(b, s.n);
    run_block();
    if (s.observer) s.observer->block_ends();
  }
  if (s.observer) s.observer->launch_ends();
}

int sync_threads(Vote vote, int predicate, int line) {
  Machine& s = m();
  Barrier& b = s.barrier;
  Thread& t = s.threads[s.current];
  t.at = Collective::sync_threads;
  t.line = line;
  if (s.exited) {
    t.state = State::waiting;
    fail("__syncthreads after threads of the block have exited: " + who_waits_where());
  }
  if (!b.arrived) {
    b.line = line;
    b.vote = vote;
    b.yes = 0;
  } else if (b.line != line || b.vote != vote) {
    fail("is at __syncthreads of line " + std::to_string(line) + ", the others are not: " + who_waits_where());
  }
  b.yes += predicate != 0;
  if (++b.arrived < s.n) {
    wait_at(Collective::sync_threads, line);
    return int(b.result);
  }
  b.result = vote == Vote::any ? b.yes > 0 : vote == Vote::all ? b.yes == s.n : b.yes;
  b.arrived = 0;
  const int result = int(b.result);
  if (s.observer) s.observer->block_barrier();
  release(0, s.n, ~0u);
  t.state = State::ready;
  if (lockstep() || shuffled()) {
    s.ready.push_back(s.current);
    yield_to_next();
  }
  return result;
}

void sync_warp(unsigned mask, int line) { meet(Collective::sync_warp, mask, line, nullptr); }

uint64_t shuffle(unsigned mask, uint64_t value, Lane mode, int operand, int width, int line) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("a shuffle's width is a power of two up to 32");
  Shuffle s = {value, mode, operand, width};
  meet(Collective::shuffle, mask, line, &s);
  return s.value;
}

unsigned ballot(unsigned mask, int predicate, int line) {
  Ballot b = {predicate != 0};
  meet(Collective::ballot, mask, line, &b);
  return b.vote;
}

uint32_t reduce(unsigned mask, uint32_t value, Reduce op, bool is_signed, int line) {
  Reduction r = {value, op, is_signed};
  meet(Collective::reduce, mask, line, &r);
  return r.value;
}

unsigned active_mask() {
  const unsigned first = m().current / kWarp * kWarp;
  unsigned mask = 0;
  for (unsigned i = 0; i < kWarp && first + i < m().n; ++i)
    mask |= unsigned(m().threads[first + i].state != State::done) << i;
  return mask;
}

void mma_bf16(float* c, const uint32_t* a, const uint32_t* b) {
  Mma f = {c, a, b};
  meet(Collective::mma_bf16, ~0u, 0, &f);
}

void mma_s8(int32_t* c, const uint32_t* a, const uint32_t* b) {
  Mma f = {c, a, b};
  meet(Collective::mma_s8, ~0u, 0, &f);
}

void ldmatrix_x4(uint32_t* r, const void* row) {
  Rows f = {r, row};
  meet(Collective::ldmatrix, ~0u, 0, &f);
}

template <class T> T atomic(Atomic op, T* address, T value, T compare) {
  Machine& s = m();
  if (s.n > 1) {  // others may come first
    s.ready.push_back(s.current);
    yield_to_next();
  }
  if (s.observer) s.observer->access(s.current, address, sizeof(T), Access::atomic, __builtin_return_address(0));
  const T old = *address;
  T now = old;
  switch (op) {
    case Atomic::add:
      if constexpr (std::is_same_v<T, int>) {
        now = int(unsigned(old) + unsigned(value));
      } else {
        now = old + value;
      }
      break;
    case Atomic::min: now = value < old ? value : old; break;
    case Atomic::max: now = old < value ? value : old; break;
    case Atomic::exchange: now = value; break;
    case Atomic::compare: now = old == compare ? value : old; break;
    case Atomic::increment: now = old >= value ? T(0) : old + T(1); break;
    default:
      if constexpr (std::is_integral_v<T>)
        now = op == Atomic::bit_and ? old & value : op == Atomic::bit_or ? old | value : old ^ value;
  }
  *address = now;
  return old;
}
template int atomic(Atomic, int*, int, int);
template unsigned atomic(Atomic, unsigned*, unsigned, unsigned);
template unsigned long long atomic(Atomic, unsigned long long*, unsigned long long, unsigned long long);
template float atomic(Atomic, float*, float, float);

void fence() {
  if (m().observer) m().observer->fence();
}

void wait_for_previous() {
  if (m().observer) m().observer->waited_for_previous();
}

void cp_async16(void* shared, const void* global) {
  Machine& s = m();
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    fail("cp_async16: both addresses must be 16-byte aligned");
  const auto at = reinterpret_cast<uintptr_t>(shared);
  if (!dynamic_shared().holds(at) && !static_shared().holds(at)) fail("cp_async16: the destination is not shared");
  if (s.observer) {
    s.observer->access(s.current, global, 16, Access::read, __builtin_return_address(0));
    s.observer->access(s.current, shared, 16, Access::write, __builtin_return_address(0));
    s.observer->unwritten(shared, 16);
  }
  std::memset(shared, 0xFF, 16);
  s.threads[s.current].copies.push_back({shared, global});
}

void cp_async_commit() {
  Thread& t = m().threads[m().current];
  t.groups.push_back(std::move(t.copies));
  t.copies.clear();
}

void cp_async_wait(int groups_left) {
  Thread& t = m().threads[m().current];
  while (int(t.groups.size()) > groups_left) {
    for (const Copy& c : t.groups.front()) {
      if (m().observer) m().observer->access(m().current, c.to, 16, Access::write, __builtin_return_address(0));
      std::memcpy(c.to, c.from, 16);
    }
    t.groups.erase(t.groups.begin());
  }
}

uint8_t* shared_memory() { return reinterpret_cast<uint8_t*>(m().shared + kRedZone); }

float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return bits<float>(sign | 0x7F800000 | fraction << 13);
  if (exponent) return bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float v = float(fraction) * 5.9604644775390625e-8f;
  return sign ? -v : v;
}

void set_observer(Observer* observer) { m().observer = observer; }
Observer* observer() { return m().observer; }
unsigned current_thread() { return m().current; }
bool running() { return m().running != nullptr && m().running != &m().host; }
Region static_shared() {
  return {reinterpret_cast<uintptr_t>(engine_emu_shared_begin), reinterpret_cast<uintptr_t>(engine_emu_shared_end)};
}
Region dynamic_shared() {
  const auto begin = reinterpret_cast<uintptr_t>(m().shared) + kRedZone;
  return {begin, begin + m().shared_bytes};
}
Region host_stack() {
  const auto begin = reinterpret_cast<uintptr_t>(m().host.stack);
  return {begin, begin + m().host.bytes};
}
Region stacks() {
  const auto begin = reinterpret_cast<uintptr_t>(m().stacks);
  return {begin, begin + (kStack + kGuard) * (kMaxThreads + 1)};
}

}  // namespace engine::emu
