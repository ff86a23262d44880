// The table of ops: name, parameter fields, one CPU kernel per ISA and the CUDA launcher where there is one.
// Adding an op is one line in ops.cpp.
#pragma once
#include "base/isa.h"
#include "base/params.h"
#include "base/pool.h"

namespace engine {

struct Op {
  const char* name;
  const Field* fields;
  int n_fields;
  size_t param_bytes;
  KernelFn cpu[kIsaCount];
  void (*cuda)(const void* params, void* stream);  // nullptr: no kernel, or built without CUDA
};

extern const Op kOps[];
extern const int kOpCount;

}  // namespace engine
