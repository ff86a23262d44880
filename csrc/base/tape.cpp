#include "base/tape.h"

#include <chrono>

namespace engine {
namespace {

int64_t now_ns() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

struct Timed {
  const std::vector<Node>* nodes;
  std::vector<int64_t>* ns;
};

}  // namespace

void Tape::replay() const {
  Pool::instance().run(
      [](void* arg, Ctx& ctx) {
        const auto& nodes = *static_cast<const std::vector<Node>*>(arg);
        // The pool's own closing barrier ends the last node.
        for (size_t i = 0; i < nodes.size(); ++i) {
          if (i) barrier(ctx);
          nodes[i].fn(nodes[i].params, ctx);
        }
      },
      const_cast<std::vector<Node>*>(&nodes_));
}

std::vector<int64_t> Tape::replay_timed() const {
  std::vector<int64_t> ns(nodes_.size());
  Timed t{&nodes_, &ns};
  Pool::instance().run(
      [](void* arg, Ctx& ctx) {
        const Timed& t = *static_cast<Timed*>(arg);
        int64_t last = now_ns();
        for (size_t i = 0; i < t.nodes->size(); ++i) {
          const Node& node = (*t.nodes)[i];
          node.fn(node.params, ctx);
          barrier(ctx);
          if (ctx.tid == 0) {
            const int64_t now = now_ns();
            (*t.ns)[i] = now - last;
            last = now;
          }
        }
      },
      &t);
  return ns;
}

void run_once(const Node& node) {
  Pool::instance().run(
      [](void* arg, Ctx& ctx) {
        const Node& node = *static_cast<const Node*>(arg);
        node.fn(node.params, ctx);
      },
      const_cast<Node*>(&node));
}

}  // namespace engine
