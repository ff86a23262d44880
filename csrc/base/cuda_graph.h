// A recorded step on a CUDA device: the interface of Tape (csrc/base/tape.h), replayed as one CUDA graph.
// Nothing here touches the driver before the first use, so a module built with CUDA imports on any host.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/params.h"

namespace engine::cuda {

using LaunchFn = void (*)(const void* params, void* stream);

// A kernel compiled elsewhere, as a cubin, and one launch of it. params: the argument buffer, each argument at its offset.
struct CudaProgram {
  std::string image, name;
  unsigned grid[3] = {1, 1, 1};
  unsigned threads = 0;
  size_t shared = 0;  // dynamic shared memory, bytes
  std::string params;
  std::vector<size_t> offsets;
};

class LoadedProgram;  // on one device

struct CudaNode {
  LaunchFn fn = nullptr;
  int op = -1;  // index into ops()
  std::string label;
  alignas(64) unsigned char params[kMaxParamBytes] = {};
  std::shared_ptr<const LoadedProgram> program;  // instead of fn and params
};

// A node that launches the program. Loads it now: nothing is loaded or compiled while a step is captured.
CudaNode program_node(CudaProgram program, const std::string& label, int device);
// The argument buffer of a program node.
const std::string& program_params(const CudaNode& node);

// Devices that this process can use; 0 without a driver, and then `missing()` says why.
int device_count();
std::string missing();
// Compute capability: 90 for 9.0.
int capability(int device);

class CudaTape {
 public:
  explicit CudaTape(int device);
  ~CudaTape();
  CudaTape(const CudaTape&) = delete;
  CudaTape& operator=(const CudaTape&) = delete;

  int device() const { return device_; }
  void push(const CudaNode& node);
  size_t size() const { return nodes_.size(); }
  const CudaNode& node(size_t i) const { return nodes_[i]; }
  // Records all nodes into a graph and instantiates it; replay() does it on its first call otherwise.
  void capture();
  // Graph nodes of the captured step; may exceed size() when an op launches several kernels.
  size_t graph_nodes() const { return graph_nodes_; }
  // Queues the step; work queued later on the same tape runs after it.
  void launch();
  void synchronize();
  // The same for who wants to know of each: a start() is ended by a wait(), which returns once the oldest of them is
  // done, while later ones run; drain() ends all.
  void start();
  void wait();
  void drain();
  // launch() and synchronize(): what Tape::replay means.
  void replay();
  // Nanoseconds per node between events, launched one by one.
  std::vector<int64_t> replay_timed();

 private:
  void open();
  int device_;
  void* stream_ = nullptr;
  void* exec_ = nullptr;
  size_t graph_nodes_ = 0;
  std::vector<CudaNode> nodes_;
  std::deque<void*> started_;  // events, oldest first
  std::vector<void*> spare_;   // events to use again
};

void run_once(const CudaNode& node, int device);

// Zeroed memory of a device at a fixed address; mapped: pinned host memory that the device reaches at the same address,
// where the host may read what finished kernels wrote while others run.
class CudaMemory {
 public:
  CudaMemory(size_t bytes, int device, bool mapped);
  ~CudaMemory();
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
  int device_ = 0;
  bool mapped_ = false;
};

// Either side may be host or device memory; returns when the copy is done.
void copy(uintptr_t dst, uintptr_t src, size_t bytes, int device);
// Free and total bytes of a device.
std::pair<size_t, size_t> memory_info(int device);

}  // namespace engine::cuda
