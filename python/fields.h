// Fills a parameter block from keyword values by the op's field table.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "ops/ops.h"

namespace engine::binding {

namespace py = pybind11;

inline void check_op(int op) {
  if (op < 0 || op >= kOpCount) throw py::index_error("no such op");
}

inline void fill(unsigned char* params, int op, const py::dict& values) {
  const auto put = [&](const Field& f, auto v) { std::memcpy(params + f.offset, &v, sizeof v); };
  py::ssize_t used = 0;
  for (int i = 0; i < kOps[op].n_fields; ++i) {
    const Field& f = kOps[op].fields[i];
    PyObject* v = PyDict_GetItemString(values.ptr(), f.name);
    if (!v) continue;
    ++used;
    switch (f.kind) {
      case Kind::ptr: put(f, reinterpret_cast<void*>(py::cast<uintptr_t>(v))); break;
      case Kind::i32: put(f, py::cast<int32_t>(v)); break;
      case Kind::i64: put(f, py::cast<int64_t>(v)); break;
      case Kind::u64: put(f, py::cast<uint64_t>(v)); break;
      case Kind::f32: put(f, py::cast<float>(v)); break;
    }
  }
  if (used != py::ssize_t(values.size())) {
    std::string known;
    for (int i = 0; i < kOps[op].n_fields; ++i) known += std::string(i ? ", " : "") + kOps[op].fields[i].name;
    throw py::type_error(std::string(kOps[op].name) + " takes only: " + known);
  }
}

}  // namespace engine::binding
