#include "base/cuda_graph.h"

#include <cuda_runtime_api.h>

#include <new>
#include <stdexcept>

namespace engine::cuda {
namespace {

void check(cudaError_t e, const std::string& what) {
  if (e == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call reports its own
  if (e == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw std::runtime_error(what + ": " + cudaGetErrorString(e) + " (" + cudaGetErrorName(e) + ")");
}

cudaStream_t stream_of(void* s) { return static_cast<cudaStream_t>(s); }
cudaGraphExec_t exec_of(void* e) { return static_cast<cudaGraphExec_t>(e); }

struct Events {
  std::vector<cudaEvent_t> list;
  explicit Events(size_t n) : list(n, nullptr) {
    for (auto& e : list) check(cudaEventCreate(&e), "cudaEventCreate");
  }
  ~Events() {
    for (auto e : list)
      if (e) cudaEventDestroy(e);
  }
};

}  // namespace

int device_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return n;
}

std::string missing() {
  int n = 0;
  const cudaError_t e = cudaGetDeviceCount(&n);
  cudaGetLastError();
  if (e != cudaSuccess) return cudaGetErrorString(e);
  return n > 0 ? "" : "no CUDA device on this host";
}

CudaTape::CudaTape(int device) : device_(device) {}

CudaTape::~CudaTape() {
  if (exec_) cudaGraphExecDestroy(exec_of(exec_));
  if (stream_) cudaStreamDestroy(stream_of(stream_));
}

void CudaTape::open() {
  check(cudaSetDevice(device_), "cudaSetDevice");
  if (stream_) return;
  cudaStream_t s;
  check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreate");
  stream_ = s;
}

void CudaTape::push(const CudaNode& node) {
  if (exec_) throw std::logic_error("the step is captured; record into a new tape");
  nodes_.push_back(node);
}

void CudaTape::capture() {
  if (exec_) return;
  open();
  cudaGraph_t graph = nullptr;
  // Relaxed: the first launch of a kernel loads its code, which the stricter modes may refuse.
  check(cudaStreamBeginCapture(stream_of(stream_), cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  try {
    for (const CudaNode& n : nodes_) n.fn(n.params, stream_);
  } catch (...) {
    if (cudaStreamEndCapture(stream_of(stream_), &graph) == cudaSuccess && graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream_of(stream_), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t exec = nullptr;
  size_t n = 0;
  cudaError_t e = cudaGraphGetNodes(graph, nullptr, &n);
  if (e == cudaSuccess) e = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  check(e, "cudaGraphInstantiate");
  // Uploading now keeps the first replay as fast as the others.
  e = cudaGraphUpload(exec, stream_of(stream_));
  if (e != cudaSuccess) cudaGraphExecDestroy(exec);
  check(e, "cudaGraphUpload");
  exec_ = exec;
  graph_nodes_ = n;
}

void CudaTape::launch() {
  capture();
  check(cudaGraphLaunch(exec_of(exec_), stream_of(stream_)), "cudaGraphLaunch");
}

void CudaTape::synchronize() {
  if (stream_) check(cudaStreamSynchronize(stream_of(stream_)), "a kernel of the step failed");
}

void CudaTape::replay() {
  launch();
  synchronize();
}

std::vector<int64_t> CudaTape::replay_timed() {
  open();
  Events events(nodes_.size() + 1);
  check(cudaEventRecord(events.list[0], stream_of(stream_)), "cudaEventRecord");
  for (size_t i = 0; i < nodes_.size(); ++i) {
    nodes_[i].fn(nodes_[i].params, stream_);
    check(cudaEventRecord(events.list[i + 1], stream_of(stream_)), "cudaEventRecord");
  }
  synchronize();
  std::vector<int64_t> ns(nodes_.size());
  for (size_t i = 0; i < ns.size(); ++i) {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events.list[i], events.list[i + 1]), "cudaEventElapsedTime");
    ns[i] = int64_t(double(ms) * 1e6);
  }
  return ns;
}

void run_once(const CudaNode& node, int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  // Ordered with copies like the legacy default stream, on which dependent launch has no meaning.
  node.fn(node.params, cudaStreamPerThread);
  check(cudaStreamSynchronize(cudaStreamPerThread), node.label);
}

CudaMemory::CudaMemory(size_t bytes, int device) : size_(bytes), device_(device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaMalloc(&data_, bytes ? bytes : 1), "cudaMalloc");
  const cudaError_t e = cudaMemset(data_, 0, bytes);
  if (e != cudaSuccess) cudaFree(data_);
  check(e, "cudaMemset");
  // cudaMemset returns before it is done, and tapes run on streams that do not wait for it.
  check(cudaStreamSynchronize(nullptr), "cudaMemset");
}

CudaMemory::~CudaMemory() {
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess) return;
  cudaSetDevice(device_);
  cudaFree(data_);
  cudaSetDevice(before);
}

void copy(uintptr_t dst, uintptr_t src, size_t bytes, int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaMemcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes, cudaMemcpyDefault),
        "cudaMemcpy");
  check(cudaStreamSynchronize(nullptr), "cudaMemcpy");
}

std::pair<size_t, size_t> memory_info(int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return {free, total};
}

}  // namespace engine::cuda
