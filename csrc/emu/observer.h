// What the emulator tells about a launch while it runs; watch.cpp listens. Addresses are those of the host.
#pragma once
#include <cstddef>
#include <cstdint>

#include "emu/emu.h"

namespace engine::emu {

enum class Access : uint8_t { read, write, atomic };

class Observer {
 public:
  virtual ~Observer() = default;
  virtual void launch_begins(const char* kernel, dim3 grid, dim3 block, size_t shared, bool overlap) = 0;
  virtual void launch_ends() = 0;
  virtual void block_begins(unsigned block, unsigned threads) = 0;
  virtual void block_ends() = 0;
  virtual void block_barrier() = 0;
  virtual void warp_barrier(unsigned warp, unsigned mask) = 0;
  virtual void fence() = 0;
  virtual void waited_for_previous() = 0;
  virtual void unwritten(const void* shared, size_t bytes) = 0;  // a copy to there is under way
  virtual void access(unsigned thread, const void* address, size_t bytes, Access kind, const void* instruction) = 0;
};

struct Region {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t a) const { return a >= begin && a < end; }
};

void set_observer(Observer* observer);
Observer* observer();
unsigned current_thread();  // index in its block
bool running();             // inside a kernel
Region static_shared();
Region dynamic_shared();
Region stacks();      // of all fibres
Region host_stack();  // of the thread that launched

}  // namespace engine::emu
