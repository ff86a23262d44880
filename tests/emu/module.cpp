// engine._emu: what engine._C offers for CUDA, with the kernels of csrc/ops/*/*.cu run by csrc/emu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>

#include "../../python/fields.h"
#include "bind_emulator.h"

namespace py = pybind11;
using namespace engine;

namespace {

// Exact size, so that AddressSanitizer sees the first byte beyond it.
class Memory {
 public:
  Memory(size_t bytes, int, bool) : size_(bytes) {
    if (posix_memalign(&data_, 256, bytes ? bytes : 1)) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_;
};

struct Bound {
  alignas(64) unsigned char params[kMaxParamBytes] = {};
};

Bound bind(int op, const py::dict& values) {
  binding::check_op(op);
  if (!kOps[op].cuda) throw py::type_error(std::string(kOps[op].name) + " has no CUDA kernel");
  Bound b;
  binding::fill(b.params, op, values);
  return b;
}

}  // namespace

PYBIND11_MODULE(_emu, m) {
  m.attr("cuda") = true;
  m.def("cuda_ops", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kOpCount; ++i)
      if (kOps[i].cuda) names.push_back(kOps[i].name);
    return names;
  });
  m.def("ops", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kOpCount; ++i) names.push_back(kOps[i].name);
    return names;
  });
  m.def("cuda_device_count", [] { return 1; });
  m.def("cuda_missing", [] { return ""; });
  m.def("cuda_memory_info", [](int) { return py::make_tuple(size_t(1) << 36, size_t(1) << 36); });
  m.def("cuda_copy", [](uintptr_t to, uintptr_t from, size_t bytes, int) {
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  });
  m.def("cuda_run", [](int op, int, const py::dict& values) {
    const Bound b = bind(op, values);
    py::gil_scoped_release release;
    kOps[op].cuda(b.params, nullptr);
  });
  m.def("bind", [](int op, const py::dict& values) {
    const Bound b = bind(op, values);
    return py::bytes(reinterpret_cast<const char*>(b.params), kMaxParamBytes);
  });
  m.def("run_bound", [](int op, const py::bytes& params) {
    Bound b;
    std::memcpy(b.params, PyBytes_AS_STRING(params.ptr()), kMaxParamBytes);
    py::gil_scoped_release release;
    kOps[op].cuda(b.params, nullptr);
  });
  // Local: several builds may be loaded at once.
  py::class_<Memory>(m, "CudaMemory", py::module_local())
      .def(py::init<size_t, int, bool>(), py::arg("bytes"), py::arg("device"), py::arg("mapped") = false)
      .def_property_readonly("address", &Memory::address)
      .def_property_readonly("size", &Memory::size);

  emulated::bind_emulator(m);
}
