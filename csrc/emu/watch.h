// Observes every memory access of emulated kernels: races, reads of bytes that nothing wrote, accesses outside declared
// memory, and the counters that a profiler would give. Needs kernels compiled with -fsanitize=thread, whose hooks
// (__tsan_read4, ...) watch.cpp defines instead of libtsan.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emu/emu.h"

namespace engine::emu {

struct Fault {
  std::string kind;  // shared race, global race, uninitialised shared, uninitialised global, outside, before wait
  std::string kernel;
  unsigned block, thread, other_block, other_thread;
  std::string region;
  int64_t offset;
  uintptr_t instruction;  // offset in this module, for addr2line
};

struct Counts {
  std::string kernel;
  dim3 grid, block;
  size_t shared;
  uint64_t bytes_read = 0, bytes_written = 0;    // distinct global bytes
  uint64_t issued_read = 0, issued_written = 0;  // global bytes, repeats counted
  uint64_t requests = 0, sectors = 0;            // one per warp and instruction; distinct 32-byte sectors of each
  uint64_t block_sectors =
      0;  // distinct sectors of each block, summed: what leaves an SM whose L1 holds a block's reads
  uint64_t shared_requests = 0, conflicts = 0;                   // conflicts: turns beyond the first
  unsigned worst_conflict = 1;                                   // turns that the worst shared request took
  std::map<std::string, std::pair<uint64_t, uint64_t>> regions;  // distinct bytes read and written of each
};

// Memory that kernels may touch. `written` has a byte per byte: 0 where nothing has written yet.
void declare(uintptr_t address, size_t bytes, const std::vector<uint8_t>& written, const std::string& name);
void forget();  // all regions, faults and counts
void watch(bool on);
std::vector<Fault> faults();
std::vector<Counts> counts();

}  // namespace engine::emu
