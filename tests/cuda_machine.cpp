// Runs a CUDA kernel that is written against pallas_kernels/primitives.cuh on a CPU, in any order.
//
// Each CUDA thread is a fiber: it has a stack of its own, and runs until it would wait. Then another
// one goes on, so that one thread of the operating system runs them all, and a run can be repeated
// exactly. What a GPU leaves open is drawn at random from a seed: which warp goes on, how fast a
// block is, when copies and words for other blocks arrive, and in which order. What is right here
// by luck fails with another seed. With seed 0, all take turns and words arrive at once, which is
// easiest to debug.
//
// Memory that nobody has written is full of 0xFF, which is NaN in every float type: shared memory,
// the destination of a copy until it has arrived, and the surroundings of every array.
//
// Two accesses to the same bytes that nothing has ordered are noticed in every order, see
// cuda_races.h: in shared memory, and in global memory that the kernel may write.
//
// What it does not notice: loads from outside all arrays, stores beyond their guards, and a missing
// fence between what threads write and what copies read or write.

#include "cuda_machine.h"

#undef shared

#include "cuda_races.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;
unsigned char (*shared_of_block)[];

namespace machine {
namespace {

enum State { READY, LOOK, BARRIER, SYNC_COMPUTING, SYNC_THREADS, COLLECTIVE, ENDED };
const char* const STATES[] = {"ready", "look", "barrier_wait", "sync_computing", "__syncthreads"};
const char* const KINDS[] = {"__syncwarp", "shuffle_xor", "shuffle", "mma16", "transpose"};

constexpr u32 COMPUTING = 256;  // threads of sync_computing
constexpr size_t STACK = 65536, GUARD = 4096;
constexpr u64 BARRIER_MARK = 0xba221e2;  // upper half of a barrier's word; the lower: its number
// Turns of every warp in which threads only look in vain, before that counts as a deadlock.
constexpr u64 PATIENCE = 20000;

struct Barrier {
  u64* at;
  u32 arrivals, missing;  // of each phase; of this phase
  u32 maker, epoch;       // the thread that has set it up, and when
  int64_t bytes = 0;      // that this phase still waits for
  u64 phase = 0;
  bool visible_to_copies = false;
  Clock known, known_before;  // by those who arrive in this phase; in the last one that has ended
};

struct Block {
  u32 number;
  u32 speed;  // in thousandths
  unsigned char* memory;
  std::vector<std::unique_ptr<Barrier>> barriers;
  u32 live, in_sync_computing = 0, in_sync_threads = 0;  // threads
  u32 copies = 0;                                        // under way
  Clock known;  // by those who wait in sync_computing or __syncthreads
  Cells cells;
};

struct Fiber {
  void* stack_pointer;
  unsigned char* stack;
  State state = READY;
  int line = 0;  // of its state
  u32 thread;
  struct Warp* warp;
  Barrier* barrier;  // that it waits for in state BARRIER, until a phase of this parity has ended
  u32 parity;
  Clock known;  // the own epoch is the present one
};

struct Warp {
  Block* block;
  Fiber* lanes;     // 32
  int arrived = 0;  // lanes in the collective
  Kind kind;
  int line;
  void* operands[32];
};

struct Copy { Block* block; void* to; const void* from; u32 bytes; Barrier* barrier; Clock known; };
struct Store { u32* to; u32 word; };

struct Memory {  // between two guards
  std::unique_ptr<unsigned char[]> all;
  unsigned char* data;
  u64 bytes;
  bool is_const;
  Cells cells;
};

struct Run {
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<Copy> copies;    // under way
  std::vector<Store> stores;   // under way
  std::vector<Memory> arrays;
  u32 shared_bytes;
  u64 random_state;
  bool shuffled;
  u32 live;      // threads that have not ended
  u64 idle = 0;  // turns since something happened
  void (*kernel)(void**);
  void** pointers;
  void* scheduler = nullptr;  // its stack pointer
  std::string error;
};

Run* running;
Fiber* current;  // the thread that runs; null in the scheduler

// ---- Stacks

#if defined(__x86_64__) && !defined(MACHINE_WITH_UCONTEXT)
// Saves the registers that a function has to save and the stack pointer; goes on with another stack.
extern "C" void machine_swap(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.type machine_swap, @function
machine_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size machine_swap, .-machine_swap
)");

void prepare(Fiber& fiber, void (*main)()) {
  u64* top = reinterpret_cast<u64*>(fiber.stack + STACK);
  top[-1] = 0;  // where main would return to; so the stack is aligned as after a call
  top[-2] = reinterpret_cast<u64>(main);
  for (int i = 3; i <= 8; i++) top[-i] = 0;  // the registers
  fiber.stack_pointer = top - 8;
}
void forget(Fiber&) {}
#else
}  // namespace
}  // namespace machine
#include <ucontext.h>
namespace machine {
namespace {
// Works on every processor; slower by a system call.
ucontext_t scheduler_context;
void machine_swap(void** from, void* to) {
  if (!*from) *from = &scheduler_context;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
void prepare(Fiber& fiber, void (*main)()) {
  ucontext_t* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = STACK;
  context->uc_link = nullptr;
  makecontext(context, main, 0);
  fiber.stack_pointer = context;
}
void forget(Fiber& fiber) { delete static_cast<ucontext_t*>(fiber.stack_pointer); }
#endif

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  char buffer[500];
  va_list values;
  va_start(values, format);
  vsnprintf(buffer, sizeof buffer, format, values);
  va_end(values);
  return buffer;
}

void suspend(State state, int line) {
  current->state = state;
  current->line = line;
  machine_swap(&current->stack_pointer, running->scheduler);
}

// A line of the kernel's, also if its address in the code is given. Then cuda_machine.py looks for
// the number.
std::string line_at(u64 where) {
  Dl_info info;
  if (where < 1000000 || !dladdr(reinterpret_cast<void*>(where), &info))
    return text("line %llu", where);
  return text("line @%llx", where - reinterpret_cast<u64>(info.dli_fbase));
}

// The kernel has done what a GPU would not, or not always, do well. The fiber never goes on.
[[noreturn]] void fail(u64 where, const std::string& what) {
  running->error = text("block %u, thread %u, ", current->warp->block->number, current->thread) +
                   line_at(where) + ": " + what;
  suspend(ENDED, 0);
  __builtin_unreachable();
}

bool all_are(unsigned char value, const unsigned char* p, u64 bytes) {
  return std::all_of(p, p + bytes, [=](unsigned char byte) { return byte == value; });
}

u64 draw() {  // splitmix64
  u64 z = (running->random_state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}
u32 below(u32 n) { return static_cast<u32>(draw() % n); }

// ---- Checks

void check_shared(const void* p, u64 bytes, u32 alignment, int line) {
  const long long at = static_cast<const unsigned char*>(p) - current->warp->block->memory;
  const long long end = running->shared_bytes;
  if (at < 0 || at > end || static_cast<long long>(bytes) > end - at)
    fail(line, text("%llu bytes from %lld on are not within the %lld bytes of shared memory", bytes,
                    at, end));
  if (at % alignment) fail(line, text("byte %lld of shared memory is misaligned", at));
}

Memory* array_of(const void* p, u64 bytes) {
  const unsigned char* at = static_cast<const unsigned char*>(p);
  for (Memory& array : running->arrays)
    if (at >= array.data && bytes <= array.bytes &&
        static_cast<u64>(at - array.data) <= array.bytes - bytes)
      return &array;
  return nullptr;
}

void check_global(const void* p, u64 bytes, u32 alignment, int line) {
  if (reinterpret_cast<u64>(p) % alignment) fail(line, "misaligned address in global memory");
  if (!array_of(p, bytes)) fail(line, text("%llu bytes are not within any array", bytes));
}

// Remembers an access, and checks that it races with none before.
void note(const void* p, u64 bytes, bool is_write, bool is_word, u64 where) {
  const unsigned char* at = static_cast<const unsigned char*>(p);
  if (at >= current->stack && at < current->stack + STACK) return;
  Block& block = *current->warp->block;
  Cells* cells = &block.cells;
  const unsigned char* first = block.memory;
  const bool is_shared = at >= first && at + bytes <= first + running->shared_bytes;
  if (!is_shared) {
    Memory* array = array_of(p, bytes);
    if (!array || array->is_const) return;
    cells = &array->cells;
    first = array->data;
  }
  const Access now{block.number, current->thread, current->known[current->thread], is_word, where};
  for (u64 i = at - first; i < at - first + bytes; i += 2)
    if (const Access* other = cells->at(i).note(now, is_write, current->known))
      fail(where, text("byte %llu of %s races with what block %u, thread %u does in ", i,
                       is_shared ? "shared memory" : "an array", other->block, other->thread) +
                      line_at(other->where));
}

// What this thread has done is over for whoever learns what `clock` knows.
void release(Clock& clock) {
  join(clock, current->known);
  current->known[current->thread]++;
}

Barrier& barrier_at(u64* bar, int line) {
  check_shared(bar, 8, 8, line);
  auto& barriers = current->warp->block->barriers;
  const u32 number = static_cast<u32>(*bar);
  if (*bar >> 32 != BARRIER_MARK || number >= barriers.size() || barriers[number]->at != bar)
    fail(line, "there is no barrier here, or something has written over it");
  Barrier& barrier = *barriers[number];
  if (current->known[barrier.maker] < barrier.epoch)
    fail(line, text("nothing says that thread %u has set up the barrier before", barrier.maker));
  return barrier;
}

bool has_ended(const Barrier& barrier, u32 parity) { return (barrier.phase & 1) != parity; }

// ---- What happens

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  barrier.phase++;
  barrier.missing = barrier.arrivals;
  barrier.known_before = barrier.known;
}

void deliver_copy(size_t place) {
  const Copy copy = running->copies[place];
  running->copies.erase(running->copies.begin() + place);
  memcpy(copy.to, copy.from, copy.bytes);
  copy.block->copies--;
  copy.barrier->bytes -= copy.bytes;
  join(copy.barrier->known, copy.known);
  running->idle = 0;
  end_phase_if_complete(*copy.barrier);
}

void deliver_store(size_t place) {
  auto& stores = running->stores;
  // Stores to one address arrive in their order.
  for (size_t i = 0; i < place; i++)
    if (stores[i].to == stores[place].to) place = i;
  *stores[place].to = stores[place].word;
  stores.erase(stores.begin() + place);
  running->idle = 0;
}

// Lets those go on that wait in `state`, if as many as expected have come.
void release_if_all(Block& block, State state, u32& count, u32 expected) {
  if (!count || count < expected) return;
  count = 0;
  Fiber* first = &running->fibers[static_cast<size_t>(block.number) * blockDim.x];
  for (u32 i = 0; i < blockDim.x; i++)
    if (first[i].state == state) {
      first[i].state = READY;
      join(first[i].known, block.known);
    }
  block.known.assign(blockDim.x, 0);
}
void sync(State state, u32& count, u32 expected, int line) {
  current->state = state;
  release(current->warp->block->known);
  count++;
  release_if_all(*current->warp->block, state, count, expected);
  if (current->state == state) suspend(state, line);
}

float half(u32 pair, int i) { return i ? high_of(pair) : low_of(pair); }

// The product of 16 x K and K x 8 numbers. Sums are in float64, rounded once.
template <int K> void multiply(void* const* operands) {
  double a[16][K], b[K][8];
  for (int t = 0; t < 32; t++) {
    const Product& p = *static_cast<Product*>(operands[t]);
    for (int i = 0; i < 2; i++) {
      const int g = t / 4, k = 2 * (t % 4) + i;
      for (int j = 0; j < K / 4; j++) a[g + j % 2 * 8][k + j / 2 * 8] = half(p.a[j], i);
      for (int j = 0; j < K / 8; j++) b[k + j * 8][g] = half(p.b[j], i);
    }
  }
  for (int t = 0; t < 32; t++)
    for (int i = 0; i < 4; i++) {
      float& c = static_cast<Product*>(operands[t])->c[i];
      const int row = t / 4 + i / 2 * 8, column = 2 * (t % 4) + i % 2;
      double sum = c;
      for (int k = 0; k < K; k++) sum += a[row][k] * b[k][column];
      c = static_cast<float>(sum);
    }
}

void transpose_all(void* const* operands) {
  u32 rows[32];
  for (int t = 0; t < 32; t++) rows[t] = static_cast<Shuffle*>(operands[t])->value;
  auto at = [&](int row, int column) -> u32 {
    return rows[4 * row + column / 2] >> column % 2 * 16 & 0xffff;
  };
  for (int t = 0; t < 32; t++) {
    const int g = t / 4, k = 2 * (t % 4);
    static_cast<Shuffle*>(operands[t])->result = at(k + 1, g) << 16 | at(k, g);
  }
}

void shuffle_all(bool by_xor, void* const* operands) {
  for (int t = 0; t < 32; t++) {
    Shuffle& s = *static_cast<Shuffle*>(operands[t]);
    const int from = (by_xor ? t ^ s.which : s.which) & 31;
    s.result = static_cast<Shuffle*>(operands[from])->value;
  }
}

// __syncwarp alone orders what lanes do in memory.
void order_lanes(Warp& warp) {
  Clock all(blockDim.x);
  for (int i = 0; i < 32; i++) join(all, warp.lanes[i].known);
  for (int i = 0; i < 32; i++) {
    warp.lanes[i].known = all;
    warp.lanes[i].known[warp.lanes[i].thread]++;
  }
}

void compute(Warp& warp) {
  switch (warp.kind) {
    case SYNCWARP: return order_lanes(warp);
    case SHUFFLE_XOR: return shuffle_all(true, warp.operands);
    case SHUFFLE: return shuffle_all(false, warp.operands);
    case MMA16: return multiply<16>(warp.operands);
    case TRANSPOSE: return transpose_all(warp.operands);
  }
}

// ---- Who goes on

bool can_go(const Fiber& fiber) {
  return fiber.state == READY || fiber.state == LOOK ||
         (fiber.state == BARRIER && has_ended(*fiber.barrier, fiber.parity));
}

void fiber_main() {
  running->kernel(running->pointers);
  Block& block = *current->warp->block;
  // A stack grows downwards from its end; nobody has written to its first bytes.
  if (!all_are(0, current->stack, GUARD)) fail(0, "its stack is too small");
  block.live--;
  running->live--;
  release_if_all(block, SYNC_THREADS, block.in_sync_threads, block.live);
  if (!block.live && block.copies) fail(0, "the block ends with copies under way");
  suspend(ENDED, 0);
}

void resume(Fiber& fiber) {
  if (fiber.state != LOOK) running->idle = 0;
  current = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.warp->block->number;
  shared_of_block = reinterpret_cast<unsigned char(*)[]>(fiber.warp->block->memory);
  fiber.state = READY;
  machine_swap(&running->scheduler, fiber.stack_pointer);
  current = nullptr;
}

// Lets the lanes of a warp go on, each until it waits. Returns whether any could.
bool turn(Warp& warp) {
  bool any = false;
  u32 first = 0, count = 32, step = 1;
  if (running->shuffled) {
    const u64 r = draw();
    first = r & 31;
    step = r & 32 ? 31 : 1;                  // upwards or downwards
    if (!(r >> 6 & 7)) count = r >> 9 & 31;  // at times, only some of them
  }
  for (u32 i = 0; i < count && running->error.empty(); i++) {
    Fiber& fiber = warp.lanes[(first + i * step) % 32];
    if (!can_go(fiber)) continue;
    resume(fiber);
    any = true;
  }
  return any;
}

// Lists which lanes wait for what.
std::string waiting() {
  std::vector<std::pair<std::string, std::string>> found;  // what, lanes
  for (const Warp& warp : running->warps)
    for (int i = 0; i < 32; i++) {
      const Fiber& fiber = warp.lanes[i];
      if (fiber.state == ENDED) continue;
      std::string what = text("block %u, warp %u: %s of line %d", warp.block->number,
                              fiber.thread / 32,
                              fiber.state == COLLECTIVE ? KINDS[warp.kind] : STATES[fiber.state],
                              fiber.line);
      if (fiber.state == BARRIER)
        what += text(" (byte %lld of shared memory, parity %u; %u arrivals and %lld bytes missing)",
                     static_cast<long long>(reinterpret_cast<unsigned char*>(fiber.barrier->at) -
                                            warp.block->memory),
                     fiber.parity, fiber.barrier->missing,
                     static_cast<long long>(fiber.barrier->bytes));
      auto place = std::find_if(found.begin(), found.end(), [&](auto& f) { return f.first == what; });
      if (place == found.end()) place = found.insert(place, {what, ", lanes"});
      place->second += text(" %d", i);
    }
  std::string all;
  for (size_t i = 0; i < found.size() && i < 40; i++)
    all += "\n  " + found[i].first + found[i].second;
  if (found.size() > 40) all += text("\n  and %zu more", found.size() - 40);
  return all;
}

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

void schedule(double limit_seconds) {
  Run& r = *running;
  const u32 n = r.warps.size(), rates[] = {2, 8, 64};
  const u32 copy_rate = rates[below(3)], store_rate = rates[below(3)];
  const double end = now() + limit_seconds;
  u32 next = 0, vain = 0;  // vain: turns since any lane could go on
  for (u64 turns = 1; r.live; turns++) {
    if (turns % 65536 == 0 && now() > end) {
      r.error = text("not done after %g seconds", limit_seconds) + waiting();
      return;
    }
    Warp& warp = r.warps[r.shuffled ? below(n) : next++ % n];
    if (r.shuffled && below(1000) >= warp.block->speed) continue;
    r.idle++;
    vain = turn(warp) ? 0 : vain + 1;
    if (!r.error.empty()) return;
    bool stuck = false;
    if (vain > 2 * n) {  // by bad luck, or nothing can go on before something arrives
      vain = 0;
      stuck = true;
      for (const Fiber& fiber : r.fibers) stuck &= !can_go(fiber);
    }
    if (!r.copies.empty() && (stuck || !below(copy_rate)))
      deliver_copy(r.shuffled ? below(r.copies.size()) : 0);
    if (!r.stores.empty() && (stuck || !below(store_rate)))
      for (size_t i = below(4) ? 1 + below(8) : r.stores.size(); i && !r.stores.empty(); i--)
        deliver_store(below(r.stores.size()));
    if (stuck && r.idle) {  // nothing has arrived
      r.error = "deadlock: nothing can go on" + waiting();
      return;
    }
    if (r.idle > PATIENCE * n && r.stores.empty() && r.copies.empty()) {
      r.error = "deadlock: some only look, and nothing comes" + waiting();
      return;
    }
  }
}

// ---- Memory

// Memory for `bytes` between two guards, all 0xFF, aligned to no more than is promised.
Memory guarded(u64 bytes, u64 alignment) {
  const u64 all = bytes + 2 * GUARD + 2 * alignment;
  Memory memory{std::unique_ptr<unsigned char[]>(new unsigned char[all]), nullptr, bytes, true,
                Cells(bytes)};
  memset(memory.all.get(), 0xFF, all);
  const u64 first = reinterpret_cast<u64>(memory.all.get()) + GUARD;
  const u64 up = (3 * alignment - first % (2 * alignment)) % (2 * alignment);
  memory.data = memory.all.get() + GUARD + up;
  return memory;
}
bool guards_untouched(const Memory& m) {
  return all_are(0xFF, m.data - GUARD, GUARD) && all_are(0xFF, m.data + m.bytes, GUARD);
}

}  // namespace

// ---- What kernels call

void init(u64* bar, int arrivals, int line) {
  check_shared(bar, 8, 8, line);
  auto& barriers = current->warp->block->barriers;
  if (arrivals < 1) fail(line, "a barrier needs arrivals");
  for (auto& other : barriers)
    if (other->at == bar) fail(line, "this barrier has been set up before");
  const u32 n = static_cast<u32>(arrivals);
  *bar = BARRIER_MARK << 32 | barriers.size();
  const u32 thread = current->thread;
  barriers.push_back(
      std::make_unique<Barrier>(Barrier{bar, n, n, thread, current->known[thread]}));
  barriers.back()->known.resize(blockDim.x);
}

void ready() {
  for (auto& barrier : current->warp->block->barriers) barrier->visible_to_copies = true;
}

void arrive(u64* bar, u32 bytes, int line) {
  Barrier& barrier = barrier_at(bar, line);
  if (!barrier.missing) fail(line, "more arrivals than the barrier expects in a phase");
  release(barrier.known);
  barrier.bytes += bytes;
  barrier.missing--;
  end_phase_if_complete(barrier);
}

void wait(u64* bar, u32 parity, int line) {
  if (parity > 1) fail(line, "a parity is 0 or 1");
  current->barrier = &barrier_at(bar, line);
  current->parity = parity;
  if (!has_ended(*current->barrier, parity)) suspend(BARRIER, line);
  join(current->known, current->barrier->known_before);
}

void copy(void* to, const void* from, u32 bytes, u64* bar, int line) {
  Barrier& barrier = barrier_at(bar, line);
  if (!bytes || bytes % 16) fail(line, text("a copy of %u bytes, not a multiple of 16", bytes));
  if (!barrier.visible_to_copies) fail(line, "a copy before barriers_ready()");
  check_shared(to, bytes, 16, line);
  check_global(from, bytes, 16, line);
  note(to, bytes, true, false, line);
  memset(to, 0xFF, bytes);
  current->warp->block->copies++;
  running->copies.push_back({current->warp->block, to, from, bytes, &barrier, current->known});
  current->known[current->thread]++;
}

// Only asks for what there is; it does nothing here.
void fetch(const void* p, int line) { check_global(p, 1, 1, line); }

void sync_computing(int line) {
  if (current->thread >= COMPUTING) fail(line, "sync_computing by a thread that does not compute");
  sync(SYNC_COMPUTING, current->warp->block->in_sync_computing, COMPUTING, line);
}
void sync_threads(int line) {
  Block& block = *current->warp->block;
  sync(SYNC_THREADS, block.in_sync_threads, block.live, line);
}

void collective(Kind kind, void* operands, int line) {
  Warp& warp = *current->warp;
  if (!warp.arrived) {
    warp.kind = kind;
    warp.line = line;
  } else if (warp.kind != kind || (kind >= MMA16 && warp.line != line)) {
    fail(line, text("in %s, while other lanes are in %s of line %d", KINDS[kind], KINDS[warp.kind],
                    warp.line));
  }
  warp.operands[current->thread % 32] = operands;
  if (++warp.arrived < 32) return suspend(COLLECTIVE, line);
  compute(warp);
  warp.arrived = 0;
  for (int i = 0; i < 32; i++) warp.lanes[i].state = READY;
}

uint4 look(const uint4* p, int line) {
  check_global(p, 16, 16, line);
  suspend(LOOK, line);
  return *p;
}

void store(u32* p, u32 word, int line) {
  check_global(p, 4, 4, line);
  note(p, 4, true, true, line);
  running->stores.push_back({p, word});
  if (!running->shuffled) deliver_store(0);
}

// ---- Start and end of a kernel

static std::string run(void (*kernel)(void**), const Parameter* parameters, u32 count,
                       const Launch& launch) {
  if (launch.arrays != count)
    return text("the kernel takes %u arrays, not %u", count, launch.arrays);
  if (!launch.blocks || !launch.threads || launch.threads % 32)
    return "a block must have a multiple of 32 threads";
  Run r;
  std::vector<void*> pointers(count);
  std::vector<size_t> place(count);  // in r.arrays
  for (u32 i = 0; i < count; i++) {
    const Array& array = launch.array[i];
    const u64 item_bytes = parameters[i].item_bytes;
    if (array.item_bytes != item_bytes)
      return text("argument %u has items of %llu bytes, not %llu", i, array.item_bytes, item_bytes);
    u32 same = 0;  // an array that is given twice is one piece of memory
    while (launch.array[same].data != array.data) same++;
    if (same < i && launch.array[same].bytes != array.bytes)
      return text("arguments %u and %u overlap", same, i);
    place[i] = same < i ? place[same] : r.arrays.size();
    if (same == i) {
      r.arrays.push_back(guarded(array.bytes, 256));
      memcpy(r.arrays.back().data, array.data, array.bytes);
    }
    r.arrays[place[i]].is_const &= parameters[i].is_const;
    pointers[i] = r.arrays[place[i]].data;
  }
  r.kernel = kernel;
  r.pointers = pointers.data();
  r.shared_bytes = launch.shared_bytes;
  r.random_state = launch.seed;
  r.shuffled = launch.seed != 0;
  running = &r;
  blockDim = {launch.threads, 1, 1};
  gridDim = {launch.blocks, 1, 1};

  const size_t threads = static_cast<size_t>(launch.blocks) * launch.threads;
  void* stacks = mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return "no memory for the stacks";
  std::vector<Memory> memories;
  const u32 speeds[] = {100, 300, 1000};
  r.live = threads;
  r.blocks.resize(launch.blocks);
  r.warps.resize(threads / 32);
  r.fibers.resize(threads);
  for (u32 b = 0; b < launch.blocks; b++) {
    Block& block = r.blocks[b];
    block.number = b;
    block.speed = speeds[below(3)];
    block.live = launch.threads;
    memories.push_back(guarded(launch.shared_bytes, 128));
    block.memory = memories.back().data;
    block.known.resize(launch.threads);
    block.cells = Cells(launch.shared_bytes);
  }
  for (size_t i = 0; i < threads; i++) {
    Fiber& fiber = r.fibers[i];
    fiber.thread = i % launch.threads;
    fiber.warp = &r.warps[i / 32];
    fiber.known.resize(launch.threads);
    fiber.known[fiber.thread] = 1;
    fiber.stack = static_cast<unsigned char*>(stacks) + i * STACK;
    prepare(fiber, fiber_main);
    if (i % 32 == 0) {
      fiber.warp->block = &r.blocks[i / launch.threads];
      fiber.warp->lanes = &fiber;
    }
  }
  schedule(launch.limit_seconds);
  while (!r.stores.empty()) deliver_store(0);
  for (Fiber& fiber : r.fibers) forget(fiber);
  munmap(stacks, threads * STACK);

  for (u32 b = 0; b < launch.blocks && r.error.empty(); b++)
    if (!guards_untouched(memories[b]))
      r.error = text("block %u has written outside its shared memory", b);
  for (u32 i = 0; i < count; i++) {
    const Memory& array = r.arrays[place[i]];
    if (r.error.empty() && !guards_untouched(array))
      r.error = text("the kernel has written outside the array of argument %u", i);
    if (!parameters[i].is_const) memcpy(launch.array[i].data, array.data, array.bytes);
  }
  return r.error;
}

void run(void (*kernel)(void**), const Parameter* parameters, u32 count, const Launch& launch,
         char* error, u64 error_bytes) {
  snprintf(error, error_bytes, "%s", run(kernel, parameters, count, launch).c_str());
}

}  // namespace machine

// ---- What the compiler's sanitizer calls (-fsanitize=alignment,bounds), in place of its library

struct SourceLocation { const char* file; u32 line, column; };
extern "C" void __ubsan_handle_type_mismatch_v1(SourceLocation* at, void*) {
  machine::fail(static_cast<int>(at->line), "misaligned address");
}
extern "C" void __ubsan_handle_out_of_bounds(SourceLocation* at, void*) {
  machine::fail(static_cast<int>(at->line), "index outside an array");
}

// ---- What the compiler calls for accesses to memory (-fsanitize=thread)

#define WHERE reinterpret_cast<u64>(__builtin_return_address(0)) - 1
#define ACCESS(bytes)                                                                          \
  extern "C" void __tsan_read##bytes(void* p) { machine::note(p, bytes, false, false, WHERE); } \
  extern "C" void __tsan_write##bytes(void* p) { machine::note(p, bytes, true, false, WHERE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* p, u64 bytes) { machine::note(p, bytes, false, false, WHERE); }
extern "C" void __tsan_write_range(void* p, u64 bytes) { machine::note(p, bytes, true, false, WHERE); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
