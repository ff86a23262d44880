#include "bind_cuda.h"

#include <pybind11/stl.h>

#include <array>

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

// Everything that engine.runtime.program binds; the image and params are bytes.
cuda::CudaNode make_program(const std::string& label, const py::bytes& image, const std::string& name,
                            const std::array<unsigned, 3>& grid, unsigned threads, size_t shared,
                            const py::bytes& params, const std::vector<size_t>& offsets, int device) {
  cuda::CudaProgram program;
  program.image = std::string(image);
  program.name = name;
  for (int i = 0; i < 3; ++i) program.grid[i] = grid[size_t(i)];
  program.threads = threads;
  program.shared = shared;
  program.params = std::string(params);
  program.offsets = offsets;
  py::gil_scoped_release release;
  return cuda::program_node(std::move(program), label, device);
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

  m.def("cuda_capability", &cuda::capability, py::arg("device"), "compute capability: 90 for 9.0", nogil);
  m.def(
      "cuda_run_program",
      [](const py::bytes& image, const std::string& name, const std::array<unsigned, 3>& grid, unsigned threads,
         size_t shared, const py::bytes& params, const std::vector<size_t>& offsets, int device) {
        const cuda::CudaNode node = make_program("", image, name, grid, threads, shared, params, offsets, device);
        py::gil_scoped_release release;
        cuda::run_once(node, device);
      },
      py::arg("image"), py::arg("name"), py::arg("grid"), py::arg("threads"), py::arg("shared"), py::arg("params"),
      py::arg("offsets"), py::arg("device"));

  // `isa` is taken and ignored, so that a plan records on both kinds of tape with the same call.
  py::class_<CudaTape>(m, "CudaTape")
      .def(py::init<int>(), py::arg("device"))
      .def("__len__", &CudaTape::size)
      .def("push", [](CudaTape& t, int op, int /*isa*/, const std::string& label,
                      const py::dict& v) { t.push(make_node(op, label, v)); })
      .def(
          "push_program",
          [](CudaTape& t, const std::string& label, const py::bytes& image, const std::string& name,
             const std::array<unsigned, 3>& grid, unsigned threads, size_t shared, const py::bytes& params,
             const std::vector<size_t>& offsets) {
            t.push(make_program(label, image, name, grid, threads, shared, params, offsets, t.device()));
          },
          py::arg("label"), py::arg("image"), py::arg("name"), py::arg("grid"), py::arg("threads"), py::arg("shared"),
          py::arg("params"), py::arg("offsets"))
      .def("node",
           [](const CudaTape& t, size_t i) -> py::tuple {
             if (i >= t.size()) throw py::index_error("node");
             const cuda::CudaNode& n = t.node(i);
             if (n.program) return py::make_tuple(-1, -1, n.label, py::bytes(cuda::program_params(n)));
             return py::make_tuple(n.op, -1, n.label,
                                   py::bytes(reinterpret_cast<const char*>(n.params), kMaxParamBytes));
           })
      .def_property_readonly("graph_nodes", &CudaTape::graph_nodes)
      .def("capture", &CudaTape::capture, nogil)
      .def("launch", &CudaTape::launch, nogil)
      .def("synchronize", &CudaTape::synchronize, nogil)
      .def("start", &CudaTape::start, nogil)
      .def("wait", &CudaTape::wait, nogil)
      .def("drain", &CudaTape::drain, nogil)
      .def("replay", &CudaTape::replay, nogil)
      .def("replay_timed", &CudaTape::replay_timed, nogil);

  py::class_<CudaMemory>(m, "CudaMemory")
      .def(py::init<size_t, int, bool>(), py::arg("bytes"), py::arg("device"), py::arg("mapped") = false, nogil)
      .def_property_readonly("address", &CudaMemory::address)
      .def_property_readonly("size", &CudaMemory::size);
}

}  // namespace engine::binding
