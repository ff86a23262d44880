// Little kernels for testing the emulator itself: PROBE names the kernel and its launch, Python runs it by that name.
#pragma once
#include <map>
#include <string>

#include "base/launch.h"

namespace engine::probe {

struct Probe {
  void (*run)(const char* name, const void* in, void* out, int n, const cuda::Launch& launch);
  cuda::Launch launch;
};
std::map<std::string, Probe>& probes();

template <class In, class Out, void (*Kernel)(const In*, Out*, int)>
void run(const char* name, const void* in, void* out, int n, const cuda::Launch& launch) {
  cuda::launch(name, Kernel, launch, static_cast<const In*>(in), static_cast<Out*>(out), n);
}
template <auto Kernel> struct Runner;
template <class In, class Out, void (*Kernel)(const In*, Out*, int)> struct Runner<Kernel> {
  static constexpr auto fn = &run<In, Out, Kernel>;
};

template <auto Kernel> bool add(const char* name, const cuda::Launch& launch) {
  probes()[name] = {Runner<Kernel>::fn, launch};
  return true;
}

}  // namespace engine::probe

// label, kernel, then the fields of Launch
#define PROBE(label, kernel, ...)                                                                       \
  static const bool registered_##label = ::engine::probe::add<kernel>(#label, ::engine::cuda::Launch{__VA_ARGS__});
