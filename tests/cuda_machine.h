// What a CUDA kernel sees when it runs on the CPU, see cuda_machine.cpp: NVRTC's built-in names, as
// far as kernels here use them, and the functions of pallas_kernels/primitives.cuh.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B> constexpr auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <class A, class B> constexpr auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
inline u32 __float_as_uint(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }

struct Index { u32 x, y, z; };
extern Index threadIdx, blockIdx, blockDim, gridDim;  // those of the thread that runs

// The shared memory of the block that runs. A kernel's `extern __shared__ unsigned char shared[];`
// becomes another declaration of this pointer to an array (see the end of this file).
extern unsigned char (*shared_of_block)[];

namespace machine {

// What all lanes of a warp do together, and their operands.
enum Kind { SYNCWARP, SHUFFLE_XOR, SHUFFLE, MMA16, TRANSPOSE };
struct Shuffle { u32 value; int which; u32 result; };
struct Product { float* c; u32 a[4], b[2]; };

// Each takes the line of the kernel that calls, for messages.
void init(u64* bar, int arrivals, int line);
void ready();
void arrive(u64* bar, u32 bytes, int line);
void wait(u64* bar, u32 parity, int line);
void copy(void* to, const void* from, u32 bytes, u64* bar, int line);
void fetch(const void* p, int line);
void sync_computing(int line);
void sync_threads(int line);
void collective(Kind kind, void* operands, int line);
uint4 look(const uint4* p, int line);
void store(u32* p, u32 word, int line);

// As Python gives an array, and the start of a kernel.
struct Array { unsigned char* data; u64 bytes, item_bytes; };
struct Launch {
  u32 blocks, threads, shared_bytes, arrays;
  u64 seed;
  double limit_seconds;
  const Array* array;
};
// A kernel's parameters, all of them pointers: the bytes of what they point to, as numpy has it.
struct Parameter { u64 item_bytes; bool is_const; };
void run(void (*kernel)(void** pointers), const Parameter* parameters, u32 count,
         const Launch& launch, char* error, u64 error_bytes);

template <class T> constexpr u64 item_bytes = sizeof(T);
template <> constexpr u64 item_bytes<uint2> = 4;
template <> constexpr u64 item_bytes<uint4> = 4;
template <> constexpr u64 item_bytes<float2> = 4;
template <> constexpr u64 item_bytes<float4> = 4;
template <class T> struct Pointed;
template <class T> struct Pointed<T*> { static constexpr Parameter parameter{item_bytes<T>, false}; };
template <class T> struct Pointed<const T*> { static constexpr Parameter parameter{item_bytes<T>, true}; };

template <class Kernel> struct Entry;
template <class... A> struct Entry<void(A...)> {
  static constexpr u32 count = sizeof...(A);
  static constexpr Parameter parameters[] = {Pointed<A>::parameter...};
  template <void (*kernel)(A...), size_t... I>
  static void call_with(void** pointers, std::index_sequence<I...>) {
    kernel(static_cast<A>(pointers[I])...);
  }
  template <void (*kernel)(A...)> static void call(void** pointers) {
    call_with<kernel>(pointers, std::index_sequence_for<A...>());
  }
};

}  // namespace machine

#define MACHINE_KERNEL(name)                                                                     \
  extern "C" __attribute__((visibility("default"))) void machine_run_##name(                     \
      const machine::Launch* launch, char* error, u64 error_bytes) {                             \
    using Entry = machine::Entry<decltype(name)>;                                                \
    machine::run(Entry::call<name>, Entry::parameters, Entry::count, *launch, error, error_bytes); \
  }

// ---- The functions of primitives.cuh, and those of NVRTC that wait

#define LINE int line = __builtin_LINE()

struct Deadline {  // the machine notices by itself what never ends
  void check(u32 = 0) {}
};

inline void barrier_init(u64* bar, int arrivals, LINE) { machine::init(bar, arrivals, line); }
inline void barriers_ready() { machine::ready(); }
inline void barrier_expect(u64* bar, u32 bytes, LINE) { machine::arrive(bar, bytes, line); }
inline void barrier_arrive(u64* bar, LINE) { machine::arrive(bar, 0, line); }
inline void barrier_wait(u64* bar, u32 parity, LINE) { machine::wait(bar, parity, line); }
inline void copy_in(void* to, const void* global, u32 bytes, u64* bar, LINE) {
  machine::copy(to, global, bytes, bar, line);
}
inline void fetch(const void* global, LINE) { machine::fetch(global, line); }
inline u32 load_now(const void* global) { return *static_cast<const u32*>(global); }
inline void sync_computing(LINE) { machine::sync_computing(line); }
inline void __syncthreads(LINE) { machine::sync_threads(line); }
inline void __syncwarp(LINE) { machine::collective(machine::SYNCWARP, nullptr, line); }

inline void spin(u32) {}  // threads run in random orders anyway

inline uint4 look(const uint4* p, LINE) { return machine::look(p, line); }
inline void tell(u32* p, u32 word, LINE) {
  machine::store(p, word == 0 ? 0x80000000u : word, line);
}

inline void mma16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, LINE) {
  machine::Product p{c, {a0, a1, a2, a3}, {b0, b1}};
  machine::collective(machine::MMA16, &p, line);
}
inline u32 transpose(u32 pair, LINE) {
  machine::Shuffle s{pair, 0, 0};
  machine::collective(machine::TRANSPOSE, &s, line);
  return s.result;
}
inline float shuffle_xor(float value, int bits, LINE) {
  machine::Shuffle s{__float_as_uint(value), bits, 0};
  machine::collective(machine::SHUFFLE_XOR, &s, line);
  return __uint_as_float(s.result);
}
inline float shuffle(float value, int lane, LINE) {
  machine::Shuffle s{__float_as_uint(value), lane, 0};
  machine::collective(machine::SHUFFLE, &s, line);
  return __uint_as_float(s.result);
}

inline u32 pack(float low, float high) {
  auto rounded = [](float x) -> u32 {
    if (x != x) return 0x7fff;
    const u32 bits = __float_as_uint(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}
inline float low_of(u32 pair) { return __uint_as_float(pair << 16); }
inline float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline float exp_2(float x) { return exp2f(x); }
inline float log_2(float x) { return log2f(x); }
inline float rsqrt_of(float x) { return 1.0f / sqrtf(x); }
inline float silu(float x) { return x / (1.0f + expf(-x)); }

#undef LINE
#define shared (*shared_of_block)
