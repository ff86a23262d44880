#include "base/memory.h"

#include <sys/mman.h>

#include <new>

namespace engine {

constexpr size_t kHuge = size_t(2) << 20;

Memory::Memory(size_t bytes) : size_(bytes) {
  const bool huge = bytes >= kHuge;
  const size_t page = huge ? kHuge : 4096;
  const size_t rounded = (bytes + page - 1) / page * page;
  mapped_ = rounded + (huge ? kHuge : 0);
  if (mapped_ == 0) mapped_ = 4096;
  void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<uint8_t*>(p);
  data_ = base_;
  if (huge) {
    data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(base_) + kHuge - 1) / kHuge * kHuge);
    madvise(data_, rounded, MADV_HUGEPAGE);
  }
}

Memory::~Memory() {
  if (base_) munmap(base_, mapped_);
}

}  // namespace engine
