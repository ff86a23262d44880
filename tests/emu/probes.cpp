// Module `_probes`: runs the kernels of tests/emu/kernels by name.
#include "probe.h"

#include "bind_emulator.h"

namespace engine::probe {
std::map<std::string, Probe>& probes() {
  static std::map<std::string, Probe> all;
  return all;
}
}  // namespace engine::probe

PYBIND11_MODULE(_probes, m) {
  using namespace engine;
  m.def("run", [](const std::string& name, uintptr_t in, uintptr_t out, int n) {
    const auto found = probe::probes().find(name);
    if (found == probe::probes().end()) throw pybind11::key_error(name);
    const probe::Probe& p = found->second;
    p.run(found->first.c_str(), reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), n, p.launch);
  });
  emulated::bind_emulator(m);
}
