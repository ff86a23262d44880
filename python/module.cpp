// The binding: converts arguments by the op's field table and forwards. No logic, no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "base/isa.h"
#include "base/memory.h"
#include "base/tape.h"
#include "fields.h"
#include "ops/attention/attention.h"
#include "ops/gemm/gemm.h"
#include "ops/guide/guide.h"
#include "ops/moe/moe.h"
#include "ops/ops.h"
#include "ops/sample/sample.h"
#if defined(ENGINE_WITH_CUDA)
#include "bind_cuda.h"
#endif

namespace py = pybind11;
using namespace engine;

namespace {

const char* kind_name(Kind k) {
  switch (k) {
    case Kind::ptr: return "ptr";
    case Kind::i32: return "i32";
    case Kind::i64: return "i64";
    case Kind::u64: return "u64";
    default: return "f32";
  }
}

Node make_node(int op, int isa, const std::string& label, const py::dict& values) {
  binding::check_op(op);
  if (isa < 0 || isa >= kIsaCount) throw py::index_error("no such ISA");
  Node node;
  node.op = op;
  node.isa = isa;
  node.fn = kOps[op].cpu[isa];
  node.label = label;
  binding::fill(node.params, op, values);
  return node;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels, thread pool and tape of the engine";

#if defined(ENGINE_WITH_CUDA)
  m.attr("cuda") = true;
  binding::bind_cuda(m);
#else
  m.attr("cuda") = false;
#endif
  m.def(
      "cuda_ops",
      [] {
        std::vector<std::string> out;
        for (int i = 0; i < kOpCount; ++i)
          if (kOps[i].cuda) out.emplace_back(kOps[i].name);
        return out;
      },
      "ops with a CUDA kernel in this build");

  m.def("isa_names", [] { return std::vector<std::string>{isa_name(0), isa_name(1), isa_name(2)}; });
  m.def("host_isa", &host_isa, "index of the widest instruction set that this host runs");
  m.def("isa_missing", &isa_missing, "the CPU feature that this host lacks for an ISA, or ''");

  m.def("ops", [] {
    py::list out;
    for (int i = 0; i < kOpCount; ++i) {
      py::list fields;
      for (int j = 0; j < kOps[i].n_fields; ++j)
        fields.append(py::make_tuple(kOps[i].fields[j].name, kind_name(kOps[i].fields[j].kind)));
      out.append(py::make_tuple(kOps[i].name, fields));
    }
    return out;
  });
  m.def("attention_workspace", &attention_workspace, py::arg("m"), py::arg("heads"), py::arg("d"), py::arg("ctx"));
  m.def("guide_workspace", &guide_workspace_bytes, py::arg("batch"), py::arg("t"), py::arg("k"), py::arg("precise"));
  m.def("moe_up_workspace", &moe_up_workspace, py::arg("m"), py::arg("top_k"), py::arg("d"), py::arg("format"),
        py::arg("group"), py::arg("shared_format"), py::arg("shared_group"));
  m.def("moe_down_workspace", &moe_down_workspace, py::arg("m"), py::arg("top_k"), py::arg("inner"), py::arg("shared"),
        py::arg("format"), py::arg("group"), py::arg("shared_format"), py::arg("shared_group"));
  m.def("sample_workspace", &sample_workspace, py::arg("vocab"));
  m.def("gemm_panel_bytes", &gemm_panel_bytes, py::arg("format"), py::arg("k"), py::arg("group"));

  py::class_<Tape>(m, "Tape")
      .def(py::init<>())
      .def("__len__", &Tape::size)
      .def("push", [](Tape& t, int op, int isa, const std::string& label,
                      const py::dict& v) { t.push(make_node(op, isa, label, v)); })
      .def("node",
           [](const Tape& t, size_t i) {
             if (i >= t.size()) throw py::index_error("node");
             const Node& n = t.node(i);
             return py::make_tuple(n.op, n.isa, n.label,
                                   py::bytes(reinterpret_cast<const char*>(n.params), kMaxParamBytes));
           })
      .def("replay", &Tape::replay, py::call_guard<py::gil_scoped_release>())
      .def("replay_timed", &Tape::replay_timed, py::call_guard<py::gil_scoped_release>());

  m.def("run", [](int op, int isa, const py::dict& v) {
    const Node node = make_node(op, isa, "", v);
    py::gil_scoped_release release;
    run_once(node);
  });

  m.def("threads", [] { return Pool::instance().size(); });
  m.def("set_threads", [](int n) { Pool::instance().resize(n); }, py::call_guard<py::gil_scoped_release>());

  py::class_<Memory>(m, "Memory", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_property_readonly("address", [](const Memory& x) { return reinterpret_cast<uintptr_t>(x.data()); })
      .def_property_readonly("size", &Memory::size)
      .def_buffer([](Memory& x) {
        return py::buffer_info(x.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {x.size()}, {1});
      });
}
