// The CUDA part of the module; compiled only where the build has CUDA.
#pragma once
#include <pybind11/pybind11.h>

namespace engine::binding { void bind_cuda(pybind11::module_& m); }  // namespace engine::binding
