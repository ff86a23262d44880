#include "base/memory.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <new>

#include "base/pool.h"

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

int64_t probe_read(const uint8_t* data, size_t bytes) {
  struct Job {
    const uint8_t* data;
    size_t bytes;
    std::atomic<uint64_t> sum;
  } job{data, bytes, {0}};
  const auto t0 = std::chrono::steady_clock::now();
  Pool::instance().run(
      [](void* arg, Ctx& ctx) {
        Job& j = *static_cast<Job*>(arg);
        constexpr size_t kChunk = size_t(1) << 20;
        typedef uint64_t V __attribute__((vector_size(16)));
        V a = {}, b = {}, c = {}, d = {};
        for (size_t i; (i = size_t(claim(ctx)) * kChunk) + kChunk <= j.bytes;) {
          const V* p = reinterpret_cast<const V*>(j.data + i);
          for (size_t k = 0; k < kChunk / 16; k += 4) {
            __builtin_prefetch(p + k + 128);
            a += p[k];
            b += p[k + 1];
            c += p[k + 2];
            d += p[k + 3];
          }
        }
        a += b + c + d;
        j.sum += a[0] + a[1];
      },
      &job);
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0).count();
}

}  // namespace engine
