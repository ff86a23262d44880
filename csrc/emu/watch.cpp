// The hooks of -fsanitize=thread, without libtsan: they know which CUDA thread runs and what orders two of them.
#include "emu/watch.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

#include "emu/observer.h"

namespace engine::emu {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kMaxFaults = 64;

// One access to a word as later ones must be ordered after it. `block` is a serial number over all launches; 0: none.
struct Record {
  uint32_t block = 0;
  uint32_t epoch = 0;  // barriers of the block before it
  uint32_t clock = 0;  // collectives of the lane before it
  uint16_t thread = 0;
  bool atomic = false;
  uint8_t bytes = 0;  // mask of those touched
};

// Of four bytes. Three readers are enough to find one that a write races with: the last, the last of another lane of
// its warp, the last of another warp or block.
struct Shadow {
  Record writer, reader, lane, warp;
  uint32_t read_in = 0, written_in = 0;  // launch
  uint8_t read = 0, wrote = 0;           // masks: bytes in that launch
  uint8_t written = 0;                   // mask: bytes that ever were
};

struct Area {
  uintptr_t begin = 0, end = 0;
  uint64_t number = 0;  // among all that were ever known
  std::string name;
  std::vector<std::unique_ptr<Shadow[]>> pages;
  std::vector<uint8_t> written;
  uint64_t read_bytes = 0, wrote_bytes = 0;
  uint32_t counted_in = 0;  // launch

  static constexpr size_t kPage = 1024;
  void resize() {
    pages.clear();
    pages.resize((end / 4 - begin / 4) / kPage + 1);
  }
  Shadow& at(uintptr_t a) {
    const size_t i = a / 4 - begin / 4;
    auto& page = pages[i / kPage];
    if (!page) {
      page.reset(new Shadow[kPage]);
      for (size_t j = 0; j < kPage && !written.empty(); ++j) {
        for (unsigned k = 0; k < 4; ++k) {
          const uintptr_t byte = (begin / 4 + i / kPage * kPage + j) * 4 + k;
          if (byte >= begin && byte < end) page[j].written |= uint8_t((written[byte - begin] != 0) << k);
        }
      }
    }
    return page[i % kPage];
  }
};

// What the lanes of a warp did at one instruction for the same time.
struct Request {
  uint16_t lanes = 0, bytes = 0;
  uint8_t lane[kWarp];
  uintptr_t address[kWarp];
};

struct Release {
  uint32_t block, thread, epoch, clock;
};
struct Acquire {
  Release from;
  uint32_t thread, epoch, clock;
};

class Watcher : public Observer {
 public:
  std::map<uintptr_t, Area> areas;  // by begin
  std::vector<Fault> faults;
  std::vector<Counts> counts;

  Watcher() {
    Dl_info info;
    link_map* map = nullptr;
    if (dladdr1(reinterpret_cast<void*>(&engine::emu::watch), &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP))
      base_ = map->l_addr;
    dl_iterate_phdr(
        [](dl_phdr_info* i, size_t, void* arg) {
          auto self = static_cast<Watcher*>(arg);
          if (i->dlpi_addr != self->base_) return 0;
          for (int h = 0; h < i->dlpi_phnum; ++h)
            if (i->dlpi_phdr[h].p_type == PT_LOAD)
              self->image_.end =
                  std::max(self->image_.end, i->dlpi_addr + i->dlpi_phdr[h].p_vaddr + i->dlpi_phdr[h].p_memsz);
          self->image_.begin = i->dlpi_addr;
          return 1;
        },
        this);
  }

  void launch_begins(const char* kernel, dim3 grid, dim3 block, size_t shared, bool overlap) override {
    ++launch_;
    Counts c;
    c.kernel = kernel;
    c.grid = grid;
    c.block = block;
    c.shared = shared;
    counts.push_back(c);
    overlap_ = overlap;
    first_block_ = serial_ + 1;
    releases_.clear();
    fences_.clear();
  }
  void launch_ends() override {
    Counts& c = counts.back();
    for (const auto& [begin, area] : areas) {
      if (area.counted_in != launch_) continue;
      c.regions[area.name] = {area.read_bytes, area.wrote_bytes};
      c.bytes_read += area.read_bytes;
      c.bytes_written += area.wrote_bytes;
    }
  }

  void block_begins(unsigned block, unsigned threads) override {
    ++serial_;
    block_ = block;
    index_of_[serial_] = block;
    epoch_ = 0;
    threads_ = threads;
    clocks_.assign((threads + kWarp - 1) / kWarp * kWarp * kWarp, 0);
    instructions_.clear();
    seen_by_.assign(threads, {});
    requests_.assign((threads + kWarp - 1) / kWarp, {});
    waited_.assign(threads, false);
    acquires_.clear();
    fences_[serial_].assign(threads, -1);
    const Region fixed = static_shared(), dynamic = dynamic_shared();
    prepare(fixed_, fixed);
    prepare(dynamic_, dynamic);
  }

  void block_ends() override {
    for (auto& warp : requests_)
      for (size_t i = 0; i < warp.size(); ++i)
        for (const Request& r : warp[i]) tally(r, shared_[i]);
  }

  void block_barrier() override { ++epoch_; }

  void warp_barrier(unsigned warp, unsigned mask) override {
    uint32_t* clocks = &clocks_[warp * kWarp * kWarp];
    uint32_t joined[kWarp] = {};
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!(mask >> l & 1)) continue;
      ++clocks[l * kWarp + l];
      for (unsigned i = 0; i < kWarp; ++i) joined[i] = std::max(joined[i], clocks[l * kWarp + i]);
    }
    for (unsigned l = 0; l < kWarp; ++l)
      if (mask >> l & 1) std::copy(joined, joined + kWarp, clocks + l * kWarp);
  }

  void fence() override { fences_[serial_][current_thread()] = int(epoch_); }
  void waited_for_previous() override { waited_[current_thread()] = true; }

  void unwritten(const void* address, size_t bytes) override {
    const auto a = reinterpret_cast<uintptr_t>(address);
    Area& area = static_shared().holds(a) ? fixed_ : dynamic_;
    words(a, bytes, [&](uintptr_t w, uint8_t mask) { area.at(w).written &= uint8_t(~mask); });
  }

  void access(unsigned thread, const void* address, size_t bytes, Access kind, const void* instruction) override {
    const auto a = reinterpret_cast<uintptr_t>(address), pc = reinterpret_cast<uintptr_t>(instruction);
    if (stacks().holds(a) || host_stack().holds(a)) return;
    if (Region r = static_shared(); r.holds(a)) return shared(fixed_, "static shared", thread, a, bytes, kind, pc);
    if (Region r = dynamic_shared(); r.holds(a)) {
      if (a + bytes > r.end) fault("outside", thread, nullptr, "dynamic shared", int64_t(a - r.begin), pc);
      return shared(dynamic_, "dynamic shared", thread, a, std::min(bytes, size_t(r.end - a)), kind, pc);
    }
    if (image_.holds(a)) return;  // built-in variables and constant tables
    global(thread, a, bytes, kind, pc);
  }

 private:
  uintptr_t base_ = 0;
  Region image_;
  uint32_t launch_ = 0, serial_ = 0, first_block_ = 1, epoch_ = 0;
  std::unordered_set<uint64_t> sectors_;  // twice the sector, one more for a write: what block sectors_of_ has touched
  uint32_t sectors_of_ = 0;
  unsigned block_ = 0, threads_ = 0;
  bool overlap_ = false;
  std::vector<uint32_t> clocks_;                             // [warp][lane][lane]: what a lane knows of the others
  std::unordered_map<uintptr_t, uint32_t> instructions_;     // index of each, by pc and space
  std::vector<bool> shared_;                                 // by index
  std::vector<std::vector<uint32_t>> seen_by_;               // [thread][index]: how often
  std::vector<std::vector<std::vector<Request>>> requests_;  // [warp][index][how often]
  std::vector<bool> waited_;
  std::unordered_map<uintptr_t, std::vector<Release>> releases_;  // by address
  std::unordered_map<uint32_t, std::vector<int>> fences_;         // by block: epoch of each thread's last fence
  std::unordered_map<uint32_t, std::vector<Acquire>> acquires_;   // of the running block, by releasing block
  std::unordered_map<uint32_t, unsigned> index_of_;
  std::set<std::tuple<std::string, uintptr_t, std::string>> seen_;
  Area fixed_, dynamic_;
  Area* last_ = nullptr;

  static void prepare(Area& area, Region r) {
    if (area.begin == r.begin && area.end == r.end) return;
    area.begin = r.begin;
    area.end = r.end;
    area.resize();
  }

  uint32_t& clock(unsigned of, unsigned at) { return clocks_[(of / kWarp * kWarp + of % kWarp) * kWarp + at % kWarp]; }

  bool ordered(const Record& r, unsigned t) {
    if (r.block == serial_) {
      return r.thread == t || r.epoch < epoch_ || (r.thread / kWarp == t / kWarp && clock(t, r.thread) > r.clock);
    }
    const auto known = acquires_.find(r.block);
    if (known == acquires_.end()) return false;
    for (const Acquire& a : known->second) {
      const bool mine =
          a.thread == t || a.epoch < epoch_ || (a.thread / kWarp == t / kWarp && clock(t, a.thread) > a.clock);
      const bool its = r.thread == a.from.thread || r.epoch < a.from.epoch;
      const auto& fences = fences_[r.block];
      const bool fenced = r.atomic || fences[r.thread] >= int(r.epoch) || fences[a.from.thread] >= int(r.epoch);
      if (mine && its && fenced) return true;
    }
    return false;
  }

  void fault(const char* kind, unsigned thread, const Record* other, const std::string& region, int64_t offset,
             uintptr_t pc) {
    if (faults.size() >= kMaxFaults || !seen_.insert({kind, pc, region}).second) return;
    faults.push_back({kind, counts.back().kernel, block_, thread, other ? index_of_[other->block] : block_,
                      other ? unsigned(other->thread) : thread, region, offset, pc - base_});
  }

  void event(unsigned t, uintptr_t a, size_t bytes, uintptr_t pc, bool shared) {
    // One call may load and store (cp.async), so the space is part of the key.
    const auto [found, is_new] = instructions_.try_emplace(pc << 1 | uintptr_t(shared), uint32_t(instructions_.size()));
    const uint32_t index = found->second;
    if (is_new) {
      shared_.resize(index + 1);
      shared_[index] = shared;
    }
    auto& seen = seen_by_[t];
    if (seen.size() <= index) seen.resize(index + 1);
    auto& warp = requests_[t / kWarp];
    if (warp.size() <= index) warp.resize(index + 1);
    auto& times = warp[index];
    const uint32_t time = seen[index]++;
    if (times.size() <= time) times.resize(time + 1);
    Request& r = times[time];
    r.bytes = uint16_t(bytes);
    r.lane[r.lanes] = uint8_t(t % kWarp);
    r.address[r.lanes++] = a;
  }

  // Sets the records of a word; true where `other` is not ordered with this access.
  bool touch(Shadow& s, const Record& now, bool reads, uint32_t since, Record& other) {
    bool clash = false;
    const auto check = [&](const Record& r) {
      if (r.block < since || !(r.bytes & now.bytes) || (r.atomic && now.atomic) || ordered(r, now.thread)) return;
      other = r;
      clash = true;
    };
    check(s.writer);
    if (reads) {
      if (s.reader.block != now.block || s.reader.thread / kWarp != now.thread / kWarp) {
        s.warp = s.reader;
        s.lane = {};
      } else if (s.reader.thread != now.thread) {
        s.lane = s.reader;
      }
      s.reader = now;
    } else {
      check(s.reader);
      check(s.lane);
      check(s.warp);
      s.writer = now;
    }
    return clash;
  }

  // Calls each(word's address, mask of bytes) for the words of [a, a + bytes).
  template <class Each> static void words(uintptr_t a, size_t bytes, Each each) {
    const uintptr_t end = a + bytes;
    for (uintptr_t w = a & ~uintptr_t(3); w < end; w += 4) {
      uint8_t mask = 15;
      if (w < a) mask = uint8_t(mask << (a - w) & 15);
      if (w + 4 > end) mask = uint8_t(mask & 15 >> (w + 4 - end));
      each(w, mask);
    }
  }

  void shared(Area& area, const char* name, unsigned t, uintptr_t a, size_t bytes, Access kind, uintptr_t pc) {
    event(t, a, bytes, pc, true);
    Record now = {serial_, epoch_, clock(t, t), uint16_t(t), kind == Access::atomic, 0}, other;
    words(a, bytes, [&](uintptr_t w, uint8_t mask) {
      Shadow& s = area.at(w);
      now.bytes = mask;
      if (s.written_in != serial_) {
        s.written_in = serial_;
        s.written = 0;
      }
      if (kind == Access::write) s.written |= mask;
      if (mask & ~s.written) fault("uninitialised shared", t, nullptr, name, int64_t(w - area.begin), pc);
      if (touch(s, now, kind == Access::read, serial_, other))
        fault("shared race", t, &other, name, int64_t(w - area.begin), pc);
    });
  }

  Area* area_of(uintptr_t a) {
    if (last_ && last_->begin <= a && a < last_->end) return last_;
    auto found = areas.upper_bound(a);
    if (found == areas.begin()) return nullptr;
    last_ = &std::prev(found)->second;
    return last_;
  }

  // A device's allocations begin at whole sectors, which the host's do not: counted from where the area begins.
  static uint64_t sector_of(const Area& area, uintptr_t a) { return (area.number << 40) + (a - area.begin) / 32; }

  void global(unsigned t, uintptr_t a, size_t bytes, Access kind, uintptr_t pc) {
    Area* area = area_of(a);
    if (!area || a >= area->end) {
      // The distance to the region below tells how far over its end it is.
      return fault("outside", t, nullptr, area ? "after " + area->name : "?",
                   area ? int64_t(a - area->begin) : int64_t(a), pc);
    }
    if (a + bytes > area->end) {
      fault("outside", t, nullptr, area->name, int64_t(a - area->begin), pc);
      bytes = area->end - a;
    }
    if (kind != Access::atomic) event(t, a, bytes, pc, false);
    if (area->counted_in != launch_) {
      area->counted_in = launch_;
      area->read_bytes = area->wrote_bytes = 0;
    }
    Counts& c = counts.back();
    if (kind != Access::write) c.issued_read += bytes;
    if (kind != Access::read) c.issued_written += bytes;
    if (sectors_of_ != serial_) sectors_.clear();
    sectors_of_ = serial_;
    const uint64_t first = sector_of(*area, a), last = sector_of(*area, a + bytes - 1);
    for (uint64_t s = first; s <= last; ++s) c.block_sectors += sectors_.insert(2 * s + (kind != Access::read)).second;
    if (kind == Access::atomic) {
      for (const Release& r : releases_[a])
        if (r.block != serial_) acquires_[r.block].push_back({r, t, epoch_, clock(t, t)});
    }
    Record now = {serial_, epoch_, clock(t, t), uint16_t(t), kind == Access::atomic, 0}, other;
    words(a, bytes, [&](uintptr_t w, uint8_t mask) {
      Shadow& s = area->at(w);
      now.bytes = mask;
      const int64_t offset = int64_t(w) - int64_t(area->begin);
      const bool from_before = s.writer.block != 0 && s.writer.block < first_block_;
      if (overlap_ && !waited_[t] && (kind != Access::read || from_before))
        fault("before wait", t, nullptr, area->name, offset, pc);
      if (kind != Access::write) {
        if (mask & ~s.written) fault("uninitialised global", t, nullptr, area->name, offset, pc);
        if (s.read_in != launch_) s.read = 0;
        s.read_in = launch_;
        area->read_bytes += unsigned(__builtin_popcount(mask & ~s.read));
        s.read |= mask;
      }
      if (kind != Access::read) {
        if (s.written_in != launch_) s.wrote = 0;
        s.written_in = launch_;
        area->wrote_bytes += unsigned(__builtin_popcount(mask & ~s.wrote));
        s.wrote |= mask;
        s.written |= mask;
      }
      if (touch(s, now, kind == Access::read, first_block_, other))
        fault("global race", t, &other, area->name, offset, pc);
    });
    if (kind == Access::atomic) releases_[a].push_back({serial_, t, epoch_, clock(t, t)});
  }

  void tally(const Request& r, bool shared) {
    Counts& c = counts.back();
    if (shared) {
      ++c.shared_requests;
      const auto [taken, least] = turns_of(r);
      c.conflicts += taken - least;
      c.worst_conflict = std::max(c.worst_conflict, taken - least + 1);
      return;
    }
    ++c.requests;
    std::vector<uint64_t> sectors;
    for (unsigned k = 0; k < r.lanes; ++k) {
      const Area* area = area_of(r.address[k]);
      if (!area) continue;  // a fault already
      const uint64_t last = sector_of(*area, r.address[k] + r.bytes - 1);
      for (uint64_t s = sector_of(*area, r.address[k]); s <= last; ++s) sectors.push_back(s);
    }
    c.sectors += distinct(sectors);
  }

  static size_t distinct(std::vector<uint64_t>& v) {
    std::sort(v.begin(), v.end());
    return size_t(std::unique(v.begin(), v.end()) - v.begin());
  }

  // Turns that the banks need, and how many without conflicts. Lanes with 8 bytes go by halves of the warp, with 16 by
  // quarters.
  static std::pair<unsigned, unsigned> turns_of(const Request& r) {
    unsigned taken = 0, least = 0;
    const unsigned group = r.bytes <= 4 ? 32 : r.bytes <= 8 ? 16 : 8;
    for (unsigned first = 0; first < kWarp; first += group) {
      std::vector<uintptr_t> touched;
      for (unsigned k = 0; k < r.lanes; ++k)
        if (r.lane[k] >= first && r.lane[k] < first + group)
          for (uintptr_t w = r.address[k] / 4; w <= (r.address[k] + r.bytes - 1) / 4; ++w) touched.push_back(w);
      if (touched.empty()) continue;
      touched.resize(distinct(touched));
      unsigned banks[32] = {}, worst = 0;
      for (const uintptr_t w : touched) worst = std::max(worst, ++banks[w % 32]);
      taken += worst;
      ++least;
    }
    return {taken, least};
  }

 public:
  void clear() {
    last_ = nullptr;
    areas.clear();
    faults.clear();
    counts.clear();
    seen_.clear();
    index_of_.clear();
  }
};

Watcher& watcher() {
  static Watcher w;
  return w;
}

bool on = false;

inline void hook(void* address, size_t bytes, Access kind, const void* instruction) {
  if (on && running()) watcher().access(current_thread(), address, bytes, kind, instruction);
}

}  // namespace

void declare(uintptr_t address, size_t bytes, const std::vector<uint8_t>& written, const std::string& name) {
  static uint64_t declared = 0;
  Area area;
  area.number = ++declared;
  area.begin = address;
  area.end = address + bytes;
  area.name = name;
  area.resize();
  area.written = written;
  watcher().areas[address] = std::move(area);
}
void forget() { watcher().clear(); }
void watch(bool enabled) {
  on = enabled;
  set_observer(enabled ? &watcher() : nullptr);
}
std::vector<Fault> faults() { return watcher().faults; }
std::vector<Counts> counts() { return watcher().counts; }

}  // namespace engine::emu

#define HOOK(name, bytes, kind)                     \
  extern "C" void __tsan_##name(void* a) {          \
    using engine::emu::Access;                      \
    engine::emu::hook(a, bytes, Access::kind, __builtin_return_address(0)); \
  }
#define HOOKS(bytes)                        \
  HOOK(read##bytes, bytes, read)            \
  HOOK(write##bytes, bytes, write)          \
  HOOK(unaligned_read##bytes, bytes, read)  \
  HOOK(unaligned_write##bytes, bytes, write)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" {
void __tsan_read_range(void* a, unsigned long n) {
  engine::emu::hook(a, n, engine::emu::Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* a, unsigned long n) {
  engine::emu::hook(a, n, engine::emu::Access::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of the host code's static variables.
char __tsan_atomic8_load(const volatile char* a, int) { return __atomic_load_n(a, __ATOMIC_ACQUIRE); }
}
