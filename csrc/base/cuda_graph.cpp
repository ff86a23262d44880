#include "base/cuda_graph.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>

namespace engine::cuda {
namespace {

// The code of a cubin; layers that run the same kernel share it.
struct Library {
  cudaLibrary_t handle = nullptr;
  ~Library() {
    if (handle) cudaLibraryUnload(handle);
  }
};

void check(cudaError_t e, const std::string& what) {
  if (e == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call reports its own
  if (e == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw std::runtime_error(what + ": " + cudaGetErrorString(e) + " (" + cudaGetErrorName(e) + ")");
}

std::shared_ptr<Library> library_of(const std::string& image, int device) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::string>, std::weak_ptr<Library>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<Library>& slot = known[{device, image}];
  std::shared_ptr<Library> library = slot.lock();
  if (library) return library;
  library = std::make_shared<Library>();
  check(cudaLibraryLoadData(&library->handle, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
        "cudaLibraryLoadData");
  slot = library;
  return library;
}

cudaStream_t stream_of(void* s) { return static_cast<cudaStream_t>(s); }
cudaGraphExec_t exec_of(void* e) { return static_cast<cudaGraphExec_t>(e); }
cudaEvent_t event_of(void* e) { return static_cast<cudaEvent_t>(e); }
constexpr char kFailed[] = "a kernel of the step failed";

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

class LoadedProgram {
 public:
  LoadedProgram(CudaProgram program, int device) : program_(std::move(program)) {
    check(cudaSetDevice(device), "cudaSetDevice");
    library_ = library_of(program_.image, device);
    program_.image.clear();
    check(cudaLibraryGetKernel(&kernel_, library_->handle, program_.name.c_str()), program_.name);
    if (program_.shared > 48 * 1024)  // above the default limit a kernel must ask
      check(cudaKernelSetAttributeForDevice(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, int(program_.shared),
                                            device),
            program_.name);
    for (const size_t at : program_.offsets) {
      if (at >= program_.params.size()) throw std::invalid_argument(program_.name + ": an argument lies behind params");
      args_.push_back(program_.params.data() + at);
    }
  }
  LoadedProgram(const LoadedProgram&) = delete;
  LoadedProgram& operator=(const LoadedProgram&) = delete;

  void launch(void* stream) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(program_.grid[0], program_.grid[1], program_.grid[2]);
    config.blockDim = dim3(program_.threads);
    config.dynamicSmemBytes = program_.shared;
    config.stream = stream_of(stream);
    // The runtime copies the arguments before it returns.
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel_), const_cast<void**>(args_.data())),
          program_.name);
  }
  const std::string& params() const { return program_.params; }

 private:
  CudaProgram program_;
  std::shared_ptr<Library> library_;
  cudaKernel_t kernel_ = nullptr;
  std::vector<void*> args_;  // into program_.params
};

CudaNode program_node(CudaProgram program, const std::string& label, int device) {
  CudaNode node;
  node.label = label.empty() ? program.name : label;
  node.program = std::make_shared<LoadedProgram>(std::move(program), device);
  return node;
}

const std::string& program_params(const CudaNode& node) { return node.program->params(); }

namespace {
void launch_node(const CudaNode& node, void* stream) {
  if (node.program)
    node.program->launch(stream);
  else
    node.fn(node.params, stream);
}
}  // namespace

int capability(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

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
  for (void* e : started_) cudaEventDestroy(event_of(e));
  for (void* e : spare_) cudaEventDestroy(event_of(e));
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
    for (const CudaNode& n : nodes_) launch_node(n, stream_);
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
  open();  // the caller's thread may be on another device
  check(cudaGraphLaunch(exec_of(exec_), stream_of(stream_)), "cudaGraphLaunch");
}

void CudaTape::synchronize() {
  if (stream_) check(cudaStreamSynchronize(stream_of(stream_)), kFailed);
}

void CudaTape::start() {
  launch();
  if (spare_.empty()) {
    cudaEvent_t e;
    check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "cudaEventCreate");
    spare_.push_back(e);
  }
  check(cudaEventRecord(event_of(spare_.back()), stream_of(stream_)), "cudaEventRecord");
  started_.push_back(spare_.back());
  spare_.pop_back();
}

void CudaTape::wait() {
  if (started_.empty()) throw std::logic_error("wait() without a start()");
  spare_.push_back(started_.front());
  started_.pop_front();
  check(cudaEventSynchronize(event_of(spare_.back())), kFailed);
}

void CudaTape::drain() {
  if (started_.empty()) return;
  spare_.insert(spare_.end(), started_.begin(), started_.end());
  started_.clear();
  synchronize();
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
    launch_node(nodes_[i], stream_);
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
  launch_node(node, cudaStreamPerThread);
  check(cudaStreamSynchronize(cudaStreamPerThread), node.label);
}

CudaMemory::CudaMemory(size_t bytes, int device, bool mapped) : size_(bytes), device_(device), mapped_(mapped) {
  check(cudaSetDevice(device), "cudaSetDevice");
  if (mapped) {
    check(cudaHostAlloc(&data_, bytes ? bytes : 1, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
    memset(data_, 0, bytes);
    return;
  }
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
  if (mapped_)
    cudaFreeHost(data_);
  else
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
