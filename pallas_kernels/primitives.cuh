// Each function here wraps one PTX instruction (sm_90) that the CUDA kernels of this folder use.
// NVRTC compiles this file in front of a kernel, without any header. tests/cuda_machine.h has the
// same functions in C++, to run kernels on a CPU.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Instructions for shared memory take its own addresses, of 32 bits.
__device__ inline u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Ends the kernel with an error if a wait lasts 20 s: a wrong count would otherwise hang the GPU
// without a message. Ordinary waits end before the clock is read even once.
struct Deadline {
  u32 rounds = 0;
  u64 end = 0;

  __device__ inline void check(u32 rounds_per_look = 4096) {
    if (++rounds % rounds_per_look != 0) return;
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (end == 0) end = now + 20000000000ull;
    if (now > end) asm volatile("trap;");
  }
};

// ---- Barriers in shared memory (mbarrier), for which copies and warps wait

// One thread sets up a barrier, whose phases end after this many arrivals and all expected bytes.
__device__ inline void barrier_init(u64* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :: "r"(shared_address(bar)), "r"(arrivals) : "memory");
}

// Makes new barriers visible to copies; the thread that has set them up calls it once.
__device__ inline void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and adds to the bytes of copies that the phase waits for.
__device__ inline void barrier_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(shared_address(bar)), "r"(bytes) : "memory");
}

// Arrives. This thread's earlier reads and writes are done when the phase ends.
__device__ inline void barrier_arrive(u64* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(bar)) : "memory");
}

// Waits until the phase of this parity has ended: 0 for the first, then 1, 0, and so on. For a new
// barrier, parity 1 counts as ended. The hardware may suspend a thread for a while in each round,
// so the clock is read after fewer rounds.
__device__ inline void barrier_wait(u64* bar, u32 parity) {
  Deadline deadline;
  while (true) {
    u32 ended;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}" : "=r"(ended) : "r"(shared_address(bar)), "r"(parity) : "memory");
    if (ended) return;
    deadline.check(256);
  }
}

// One thread starts a copy to shared memory, whose bytes count towards the phase of `bar`. Both
// addresses and `bytes` are multiples of 16. The data is read only once, so it is the first to be
// evicted from the L2 cache, where the exchanged words stay.
__device__ inline void copy_in(void* to, const void* global, u32 bytes, u64* bar) {
  asm volatile("{\n"
               ".reg .b64 policy;\n"
               "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
               "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1], %2, [%3], policy;\n"
               "}"
               :: "r"(shared_address(to)), "l"(global), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

// Prefetches the 32 bytes at this address into the L2 cache.
__device__ inline void fetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" :: "l"(global));
}

// Loads 4 bytes that no kernel writes, at this point of the program: the compiler moves an ordinary
// load to where its value is used, which may be behind a wait.
__device__ inline u32 load_now(const void* global) {
  u32 r;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(r) : "l"(global));
  return r;
}

// Makes the computing threads, 0 to 255, wait for one another. Barrier 0 is that of __syncthreads.
__device__ inline void sync_computing() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Keeps the thread busy for some cycles of its multiprocessor's clock.
__device__ inline void spin(u32 cycles) {
  u32 begin, now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(begin));
  do {
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
  } while (now - begin < cycles);
}

// ---- Words that blocks send each other through global memory, which starts as zeros

// Reads four words from the L2 cache, where all blocks see the same. Any of them may still be zero.
__device__ inline uint4 look(const uint4* p) {
  uint4 r;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
  return r;
}

// Sends a word: a pair of bfloat16 values, or a float32. Zero means "not yet", so it is sent as its
// equal of other bits: the pair +0, -0, which is also the float32 -0.
__device__ inline void tell(u32* p, u32 word) {
  if (word == 0) word = 0x80000000u;
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(p), "r"(word) : "memory");
}

// ---- Tensor cores: all lanes of a warp call these together. Lane t holds, with g = t / 4 and
// k = 2 (t % 4), pairs of bfloat16:
//   A [16, 16]: a0 = [g, k..k+1], a1 = [g + 8, k..], a2 = [g, k + 8..], a3 = [g + 8, k + 8..]
//   B [16, 8]:  b0 = [k..k+1, g], b1 = [k + 8.., g]
//   C [16, 8]:  c[0], c[1] = [g, k..k+1], c[2], c[3] = [g + 8, k..k+1], in float32

// C += A B for A [16, 16].
__device__ inline void mma16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of bfloat16: in, [g, k..k+1]; out, [k..k+1, g].
__device__ inline u32 transpose(u32 pair) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
  return r;
}

// ---- Other lanes' values: all lanes of a warp call these together

// The value of the lane whose number differs in the bits of `bits`.
__device__ inline float shuffle_xor(float value, int bits) {
  float r;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(r) : "f"(value), "r"(bits));
  return r;
}

// The value of lane `lane`.
__device__ inline float shuffle(float value, int lane) {
  float r;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, -1;" : "=f"(r) : "f"(value), "r"(lane));
  return r;
}

// ---- Numbers

// Two float32 values as a pair of bfloat16, rounded to nearest even. The instruction takes the high
// one first.
__device__ inline u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// The lower one of a pair of bfloat16, which is the upper half of a float32.
__device__ inline float low_of(u32 pair) {
  float r;
  asm("mov.b32 %0, %1;" : "=f"(r) : "r"(pair << 16));
  return r;
}

// The upper one of a pair.
__device__ inline float high_of(u32 pair) {
  float r;
  asm("mov.b32 %0, %1;" : "=f"(r) : "r"(pair & 0xffff0000u));
  return r;
}

// 2 to the power of x, to about 2 units in the last place; results below 1e-38 are 0.
__device__ inline float exp_2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// The logarithm to the base 2 of x, to about 2^-22.
__device__ inline float log_2(float x) {
  float r;
  asm("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// 1 / sqrt(x), to about 2 units in the last place.
__device__ inline float rsqrt_of(float x) {
  float r;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// x / (1 + exp(-x)).
__device__ inline float silu(float x) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(1.0f + exp_2(-1.4426950408889634f * x)));
  return x * r;
}
