// Finds races: two accesses to the same bytes, at least one of them a write, that nothing orders. It
// finds them in whichever order they happen to come. The algorithm follows FastTrack (Flanagan and
// Freund, PLDI 2009): a thread's time is divided into epochs, and each thread knows, of every other
// one, the last epoch that is over before what it does itself.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

namespace machine {

using Clock = std::vector<u32>;  // of each thread of a block: an epoch

inline void join(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < other.size(); i++) clock[i] = std::max(clock[i], other[i]);
}

struct Access {
  u32 block, thread, epoch;
  bool is_word;  // sent by `tell`, which other blocks may do too
  u64 where;     // line, or address of the code
};

// Two bytes of memory.
class Cell {
 public:
  // Remembers an access by a thread that knows what `known` says. Returns an earlier one that it
  // races with, or null. Blocks know nothing of each other: words that they exchange order nothing.
  const Access* note(const Access& now, bool is_write, const Clock& known) {
    auto is_over = [&](const Access& a) {
      return a.block == now.block && a.epoch <= known[a.thread];
    };
    if (written && !is_over(write) && !(write.is_word && now.is_word)) return &write;
    if (!is_write) {
      reads.erase(std::remove_if(reads.begin(), reads.end(), is_over), reads.end());
      reads.push_back(now);
      return nullptr;
    }
    for (const Access& read : reads)
      if (!is_over(read)) return &read;
    reads.clear();
    written = true;
    write = now;
    return nullptr;
  }

 private:
  bool written = false;
  Access write;
  std::vector<Access> reads;  // since then, that were not over when the next one came
};

// The cells of a piece of memory, made when they are needed.
class Cells {
 public:
  explicit Cells(u64 bytes = 0) : groups(bytes / 128 + 1) {}
  Cell& at(u64 byte) {
    auto& group = groups[byte / 128];
    if (!group) group.reset(new Cell[64]);
    return group[byte % 128 / 2];
  }

 private:
  std::vector<std::unique_ptr<Cell[]>> groups;
};

}  // namespace machine
