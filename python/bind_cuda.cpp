#include "bind_cuda.h"

#include <pybind11/stl.h>

#include "base/cuda_graph.h"
#include "fields.h"

namespace engine::binding {
namespace {

cuda::CudaNode make_node(int op, const std::string& label, const py::dict& values) {
  check_op(op);
  if (!kOps[op].cuda) throw py::type_error(std::string(kOps[op].name) + " has no CUDA kernel");
  cuda::CudaNode node;
  node.op = op;
  node.fn = kOps[op].cuda;
  node.label = label.empty() ? kOps[op].name : label;
  fill(node.params, op, values);
  return node;
}

}  // namespace

void bind_cuda(py::module_& m) {
  using cuda::CudaMemory;
  using cuda::CudaTape;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.def("cuda_device_count", &cuda::device_count, "devices that this process can use; 0 without a driver", nogil);
  m.def("cuda_missing", &cuda::missing, "why there is no device, or ''", nogil);
  m.def("cuda_memory_info", &cuda::memory_info, py::arg("device"), "(free, total) bytes", nogil);
  m.def("cuda_copy", &cuda::copy, py::arg("dst"), py::arg("src"), py::arg("bytes"), py::arg("device"), nogil);
  m.def("cuda_run", [](int op, int device, const py::dict& values) {
    const cuda::CudaNode node = make_node(op, "", values);
    py::gil_scoped_release release;
    cuda::run_once(node, device);
  });

  // `isa` is taken and ignored, so that a plan records on both kinds of tape with the same call.
  py::class_<CudaTape>(m, "CudaTape")
      .def(py::init<int>(), py::arg("device"))
      .def("__len__", &CudaTape::size)
      .def("push", [](CudaTape& t, int op, int /*isa*/, const std::string& label,
                      const py::dict& v) { t.push(make_node(op, label, v)); })
      .def("node",
           [](const CudaTape& t, size_t i) {
             if (i >= t.size()) throw py::index_error("node");
             const cuda::CudaNode& n = t.node(i);
             return py::make_tuple(n.op, -1, n.label,
                                   py::bytes(reinterpret_cast<const char*>(n.params), kMaxParamBytes));
           })
      .def_property_readonly("graph_nodes", &CudaTape::graph_nodes)
      .def("capture", &CudaTape::capture, nogil)
      .def("launch", &CudaTape::launch, nogil)
      .def("synchronize", &CudaTape::synchronize, nogil)
      .def("replay", &CudaTape::replay, nogil)
      .def("replay_timed", &CudaTape::replay_timed, nogil);

  py::class_<CudaMemory>(m, "CudaMemory")
      .def(py::init<size_t, int>(), py::arg("bytes"), py::arg("device"), nogil)
      .def_property_readonly("address", &CudaMemory::address)
      .def_property_readonly("size", &CudaMemory::size);
}

}  // namespace engine::binding
