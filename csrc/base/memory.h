// Page-aligned memory for weights and arenas, on 2 MiB pages where the kernel grants them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace engine {

class Memory {
 public:
  explicit Memory(size_t bytes);  // zeroed; throws std::bad_alloc
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  uint8_t* base_ = nullptr;
  size_t size_ = 0, mapped_ = 0;
};

}  // namespace engine
