// Schedule, launches and watched accesses of the emulator, for every module that runs emulated kernels.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <string>
#include <vector>

#include "base/launch.h"
#include "emu/emu.h"
#if defined(ENGINE_EMU_WATCH)
#include "emu/watch.h"
#endif

namespace engine::emulated {

namespace py = pybind11;

struct Launched {
  const char* name;  // a literal
  const void* kernel;
  cuda::Launch launch;
};
inline std::vector<Launched> launched;

inline py::tuple size3(const dim3& d) { return py::make_tuple(d.x, d.y, d.z); }

// Room is taken once: an audit of a plan counts the bytes of the heap. Launches beyond it are not noted.
constexpr size_t kMostLaunches = 1 << 16;
inline void note(const char* name, const void* kernel, const cuda::Launch& launch, void*) {
  if (launched.size() < kMostLaunches) launched.push_back({name, kernel, launch});
}

inline void bind_emulator(py::module_& m) {
  m.def("set_schedule", &emu::set_schedule, py::arg("seed"));
  launched.reserve(kMostLaunches);
  cuda::trace() = {note, nullptr, false};
  m.def("only_trace", [](bool on) { cuda::trace().instead = on; }, py::arg("on"));
  m.def("launches", [] {
    py::list out;
    for (const Launched& l : launched) {
      py::dict d;
      d["name"] = l.name;
      d["grid"] = size3(l.launch.grid);
      d["block"] = size3(l.launch.block);
      d["shared"] = l.launch.shared;
      d["overlap"] = l.launch.overlap;
      Dl_info where = {};
      dladdr(l.kernel, &where);
      d["kernel"] = reinterpret_cast<uintptr_t>(l.kernel) - reinterpret_cast<uintptr_t>(where.dli_fbase);
      out.append(d);
    }
    return out;
  });
  m.def("clear_launches", [] { launched.clear(); });

#if defined(ENGINE_EMU_WATCH)
  m.def("watch", &emu::watch, py::arg("on"));
  m.def("forget", &emu::forget);
  m.def(
      "declare",
      [](uintptr_t address, size_t bytes, const py::object& written, const std::string& name) {
        std::vector<uint8_t> mask(bytes);
        if (py::isinstance<py::bool_>(written)) {
          std::fill(mask.begin(), mask.end(), uint8_t(written.cast<bool>()));
        } else {
          const std::string given = written.cast<py::bytes>();
          if (given.size() != bytes) throw py::value_error("declare: written is True, False or one byte per byte");
          std::copy(given.begin(), given.end(), mask.begin());
        }
        emu::declare(address, bytes, mask, name);
      },
      py::arg("address"), py::arg("size"), py::arg("written"), py::arg("name"));
  m.def("faults", [] {
    py::list out;
    for (const emu::Fault& f : emu::faults()) {
      py::dict d;
      d["kind"] = f.kind;
      d["kernel"] = f.kernel;
      d["block"] = f.block;
      d["thread"] = f.thread;
      d["other_block"] = f.other_block;
      d["other_thread"] = f.other_thread;
      d["region"] = f.region;
      d["offset"] = f.offset;
      d["instruction"] = f.instruction;
      out.append(d);
    }
    return out;
  });
  m.def("counts", [] {
    py::list out;
    for (const emu::Counts& c : emu::counts()) {
      py::dict d;
      d["kernel"] = c.kernel;
      d["grid"] = size3(c.grid);
      d["block"] = size3(c.block);
      d["shared"] = c.shared;
      d["bytes_read"] = c.bytes_read;
      d["bytes_written"] = c.bytes_written;
      d["issued_read"] = c.issued_read;
      d["issued_written"] = c.issued_written;
      d["requests"] = c.requests;
      d["sectors"] = c.sectors;
      d["block_sectors"] = c.block_sectors;
      d["shared_requests"] = c.shared_requests;
      d["conflicts"] = c.conflicts;
      d["worst_conflict"] = c.worst_conflict;
      d["regions"] = c.regions;
      out.append(d);
    }
    return out;
  });
#endif
}

}  // namespace engine::emulated
