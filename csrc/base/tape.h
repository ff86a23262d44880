// A recorded step: kernel entries with bound parameters, replayed in one call by all threads of the pool.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "base/params.h"
#include "base/pool.h"

namespace engine {

struct Node {
  KernelFn fn = nullptr;
  int op = -1;  // index into ops()
  int isa = 0;
  std::string label;
  alignas(64) unsigned char params[kMaxParamBytes] = {};
};

class Tape {
 public:
  void push(const Node& node) { nodes_.push_back(node); }
  size_t size() const { return nodes_.size(); }
  const Node& node(size_t i) const { return nodes_[i]; }
  void replay() const;
  // Nanoseconds per node, seen from thread 0 (barrier included).
  std::vector<int64_t> replay_timed() const;

 private:
  std::vector<Node> nodes_;
};

void run_once(const Node& node);

}  // namespace engine
