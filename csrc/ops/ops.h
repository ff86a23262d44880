// The table of ops: name, parameter fields and one kernel per ISA. Adding an op is one line in ops.cpp.
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
};

extern const Op kOps[];
extern const int kOpCount;

}  // namespace engine
