// All layers of a decode step of 1 to 16 sequences, as one kernel: docs/decode_kernel.md draws it.
//
// Each multiprocessor runs one block. The block's copying warp streams the block's rows of every
// weight through a ring in shared memory. It knows all addresses from the start, so it waits for no
// other block: while the blocks exchange what they have computed, the weights of the next product
// arrive. The eight computing warps follow it through the ring and tell other blocks their results
// through `mail`. Keys and values go from memory straight to the warps' registers.
//
// The kernel is compiled for one shape, by #defines before this text (named as in decode_layers.py):
//   BATCH LAYERS HIDDEN HEADS KV_HEADS HEAD_DIM FFN PAGES PAGE TABLE EPS SCALE_LOG2E QK_NORM
//   QKV_BIAS NO_ROPE_BITS BLOCKS SPLITS STAGES IN_FLIGHT

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

constexpr int WARPS = 8;                  // computing warps; a ninth one copies
constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = HEADS / KV_HEADS;   // query heads per KV head
constexpr int QKV = KV_HEADS * (GROUP + 2) * HEAD_DIM;
constexpr int ATTENDED = HEADS * HEAD_DIM;
constexpr int TASKS = BATCH * KV_HEADS * SPLITS;  // attention tasks, at most one a block
constexpr int HALF = HEAD_DIM / 2;
constexpr float MASKED = -1e30f;

// A stage of the ring holds 8 rows of up to 1,024 weights. Rows are padded so that 16-byte words
// which are read at the same time lie in different banks.
constexpr int UNIT = 8, CHUNK = 1024;
constexpr int PITCH = 2 * CHUNK + 64;
constexpr int TILE = 16;         // positions that a warp attends to at once
constexpr int LEAST_PART = 64;   // fewest positions in a part of a context
constexpr int MOST_ASKED = 256;  // most positions of a part that are prefetched
constexpr int KV_ROW = KV_HEADS * HEAD_DIM;  // elements of a position in the cache
constexpr int GROUP_UNITS = 8;  // most units whose sums are in shared memory at once
// Cycles before a reader's first look at the words of other blocks: they hardly come sooner, and
// looks in vain delay those that are on their way.
constexpr int FIRST_LOOK = 1000;

constexpr int WIDEST = larger(larger(HIDDEN, ATTENDED), FFN);
constexpr int INPUT_PITCH = 2 * WIDEST + (WIDEST % 64 ? 0 : 64);  // an odd number of 64 bytes
constexpr int OWN_ROWS = UNIT * ((HIDDEN / UNIT + BLOCKS - 1) / BLOCKS);
constexpr int PIECES = (HIDDEN / 8 + 31) / 32;  // pieces of the hidden state, of 256 values

struct Attention {
  float raw[GROUP + 2][HEAD_DIM];
  float sums[WARPS][GROUP][HEAD_DIM], maximum[WARPS][GROUP], total[WARPS][GROUP];
};

struct Shared {
  unsigned char ring[STAGES][UNIT * PITCH];
  unsigned char input[BATCH][INPUT_PITCH];      // the current product's
  u16 query[8][HEAD_DIM];                       // rows from GROUP on are zeros
  u16 key[HEAD_DIM], value[HEAD_DIM];           // the new position's
  union {
    float parts[WARPS][GROUP_UNITS][BATCH][UNIT];  // each warp's share of a product's sums
    Attention attention;
  };
  float residual[OWN_ROWS][BATCH];              // the rows that this block adds to
  float squares[BATCH][PIECES];                 // sums of the product's input, for its norm
  int part_count[BATCH];                        // number of parts of each context
  u64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= 232448, "shared memory");

// Offsets of each exchange's words among those of a layer. A word has 4 bytes: a pair of bfloat16
// values, except that LSE's are float32.
constexpr int LSE_PITCH = (SPLITS + 3) / 4 * 4;
constexpr int MAIL_HIDDEN = 0;
constexpr int MAIL_QKV = MAIL_HIDDEN + BATCH * HIDDEN / 2;
constexpr int MAIL_PART = MAIL_QKV + BATCH * QKV / 2;
constexpr int MAIL_LSE = MAIL_PART + BATCH * SPLITS * ATTENDED / 2;
constexpr int MAIL_MIDDLE = MAIL_LSE + BATCH * HEADS * LSE_PITCH;
constexpr int MAIL_GATED = MAIL_MIDDLE + BATCH * HIDDEN / 2;
constexpr int MAIL_WORDS = MAIL_GATED + BATCH * FFN / 2;  // words of a layer

extern __shared__ __align__(128) unsigned char shared[];

// How a context's old positions, all but the newest, are cut into `count` parts of `per` each.
struct Parts {
  int old, per, count;
  __device__ explicit Parts(int context) {
    old = max(context - 1, 0);
    per = max(LEAST_PART, (old / SPLITS + TILE) / TILE * TILE);
    count = max((old + per - 1) / per, 1);
  }
};

// The first of a block's units, if all blocks share them evenly.
__device__ int first_of(int units, int block) { return units * block / BLOCKS; }

// A place in the ring. Both sides step through the ring in the same order.
struct Place {
  int slot = 0;
  u32 phase = 0;
  __device__ void step() {
    if (++slot == STAGES) { slot = 0; phase ^= 1; }
  }
};

// ---- the copying warp

struct Copier {
  Shared& s;
  int lane;
  Place place;
  bool first_round = true;

  // Waits for a free stage. Only IN_FLIGHT stages are under way at a time: copies that are requested
  // long before their use delay the blocks' exchanges.
  __device__ void acquire(u32 bytes) {
    barrier_wait(&s.empty[place.slot], place.phase ^ 1);
    int before = place.slot - IN_FLIGHT;
    if (before >= 0) barrier_wait(&s.full[before], place.phase);
    else if (!first_round) barrier_wait(&s.full[before + STAGES], place.phase ^ 1);
    if (lane == 0) barrier_expect(&s.full[place.slot], bytes);
    __syncwarp();
  }
  __device__ void step() {
    place.step();
    if (place.slot == 0) first_round = false;
  }

  // Copies units of 8 rows of a matrix [*, WIDTH]; unit i begins at row row_of(i).
  template <int WIDTH, class RowOf>
  __device__ void rows(const u16* weights, int units, RowOf row_of) {
    for (int i = 0; i < units; i++)
      for (int column = 0; column < WIDTH; column += CHUNK) {
        u32 bytes = 2 * min(CHUNK, WIDTH - column);
        acquire(UNIT * bytes);
        if (lane < UNIT)
          copy_in(s.ring[place.slot] + lane * PITCH,
                  weights + (size_t)(row_of(i) + lane) * WIDTH + column, bytes,
                  &s.full[place.slot]);
        step();
      }
  }

  // Prefetches the first keys or values of a part into the L2 cache, from where the warps load them.
  __device__ void ask_for(const u16* cache, const int* table, int begin, int end) {
    constexpr int SECTORS = 2 * HEAD_DIM / 32;  // sectors of 32 bytes in a row
    int sectors = min(end - begin, MOST_ASKED) * SECTORS;
    for (int i = lane; i < sectors; i += 32) {
      int at = begin + i / SECTORS;
      size_t row = (size_t)table[at / PAGE] * PAGE + at % PAGE;
      fetch(cache + row * KV_ROW + i % SECTORS * 16);
    }
  }
};

// ---- the computing warps

__device__ float sum_of_warp(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x += shuffle_xor(x, i);
  return x;
}

// Tells whether all words of an item have arrived: they start as zeros, which `tell` never sends.
__device__ bool has(uint4 item) { return item.x && item.y && item.z && item.w; }

// Polls until all wanted items have arrived.
template <int COUNT>
__device__ void await(uint4 (&found)[COUNT], const uint4* const (&items)[COUNT],
                      const bool (&wanted)[COUNT]) {
  Deadline deadline;
  bool all;
#pragma unroll
  for (int i = 0; i < COUNT; i++) found[i] = make_uint4(0, 0, 0, 0);
  do {
    deadline.check();
    all = true;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (wanted[i] && !has(found[i])) found[i] = look(items[i]);
#pragma unroll
    for (int i = 0; i < COUNT; i++) all &= !wanted[i] || has(found[i]);
  } while (!all);
}

struct Worker {
  Shared& s;
  int thread, warp, lane, quad, row;  // row and quad: of this lane in an mma's fragments
  Place place;

  __device__ Worker(Shared& ring)
      : s(ring), thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
        quad(threadIdx.x % 4), row(threadIdx.x % 32 / 4) {}

  __device__ unsigned char* acquire() {
    barrier_wait(&s.full[place.slot], place.phase);
    return s.ring[place.slot];
  }
  __device__ void release() {
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.empty[place.slot]);
    place.step();
  }

  // Receives [BATCH, WIDTH] as the input of a product, 8 values a lane. A norm's weights are applied
  // here; its root mean square is applied to the product's result (`inverse`).
  template <int WIDTH, bool NORM>
  __device__ void receive(const u32* words, const u16* norm) {
    constexpr int ITEMS = WIDTH / 8, PIECES = (ITEMS + 31) / 32, ALL = BATCH * PIECES;
    constexpr int MINE = (ALL + WARPS - 1) / WARPS, COUNT = MINE < 8 ? MINE : 8;
    constexpr bool SAME = WARPS % PIECES == 0;  // a lane's columns are the same in all sequences
    for (int first = warp; first < ALL; first += WARPS * COUNT) {
      uint4 found[COUNT], scale[SAME ? 1 : COUNT];
      const uint4* items[COUNT];
      bool wanted[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        int piece = first + i * WARPS, item = piece % PIECES * 32 + lane;
        wanted[i] = piece < ALL && item < ITEMS;
        items[i] = reinterpret_cast<const uint4*>(words) + piece / PIECES * ITEMS + item;
        if (NORM && wanted[i] && (!SAME || i == 0))
          scale[i] = reinterpret_cast<const uint4*>(norm)[item];
      }
      await(found, items, wanted);
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        int piece = first + i * WARPS, sequence = piece / PIECES;
        float squares = 0;
        if (wanted[i]) {
          if (NORM) {
            uint4 by = scale[SAME ? 0 : i];
            squares = scale_pair(found[i].x, by.x) + scale_pair(found[i].y, by.y) +
                      scale_pair(found[i].z, by.z) + scale_pair(found[i].w, by.w);
          }
          put(sequence, piece % PIECES * 32 + lane, found[i]);
        }
        if (NORM) {
          squares = sum_of_warp(squares);
          if (lane == 0 && piece < ALL) s.squares[sequence][piece % PIECES] = squares;
        }
      }
    }
    sync_computing();
  }

  __device__ void put(int sequence, int item, uint4 values) {
    *reinterpret_cast<uint4*>(s.input[sequence] + 16 * item) = values;
  }

  // Multiplies a pair by another; returns the sum of its squares before that.
  __device__ static float scale_pair(u32& pair, u32 by) {
    float a = low_of(pair), b = high_of(pair);
    pair = pack(a * low_of(by), b * high_of(by));
    return a * a + b * b;
  }

  // Receives the attention's output for every part of the contexts, with the base-2 logarithm of its
  // softmax's denominator, and merges the parts into the input of a product.
  __device__ void receive_attended(const u32* parts, const u32* lse) {
    constexpr int ITEMS = ATTENDED / 8, OF_HEAD = HEAD_DIM / 8, ALL = BATCH * ITEMS;
    constexpr int MINE = (ALL + THREADS - 1) / THREADS, AT_ONCE = SPLITS < 8 ? SPLITS : 8;
    constexpr int COUNT = MINE < 8 / AT_ONCE ? MINE : 8 / AT_ONCE, WORDS = (AT_ONCE + 3) / 4;
    for (int first = thread; first < ALL; first += THREADS * COUNT) {
      float y[COUNT][8] = {}, highest[COUNT], total[COUNT];
      int count[COUNT], most = 1;
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        int item = first + i * THREADS;
        highest[i] = MASKED;
        total[i] = 0;
        count[i] = item < ALL ? s.part_count[item / ITEMS] : 0;
        most = max(most, count[i]);
      }
      for (int part = 0; part < most; part += AT_ONCE) {
        constexpr int EACH = AT_ONCE + WORDS;
        uint4 found[COUNT * EACH];
        const uint4* items[COUNT * EACH];
        bool wanted[COUNT * EACH];
#pragma unroll
        for (int i = 0; i < COUNT * EACH; i++) {
          int item = first + i / EACH * THREADS, head = item / OF_HEAD, j = i % EACH;
          wanted[i] = part + (j < AT_ONCE ? j : 4 * (j - AT_ONCE)) < count[i / EACH];
          items[i] = j < AT_ONCE
              ? reinterpret_cast<const uint4*>(parts) + (head * SPLITS + part + j) * OF_HEAD +
                    item % OF_HEAD
              : reinterpret_cast<const uint4*>(lse + head * LSE_PITCH + part) + j - AT_ONCE;
        }
        await(found, items, wanted);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
          float log[AT_ONCE], higher = highest[i];
#pragma unroll
          for (int j = 0; j < AT_ONCE; j++) {
            uint4 logs = found[i * EACH + AT_ONCE + j / 4];
            u32 words[4] = {logs.x, logs.y, logs.z, logs.w};
            log[j] = part + j < count[i] ? __uint_as_float(words[j % 4]) : MASKED;
            higher = fmaxf(higher, log[j]);
          }
          float shrink = exp_2(highest[i] - higher);
          highest[i] = higher;
          total[i] *= shrink;
#pragma unroll
          for (int k = 0; k < 8; k++) y[i][k] *= shrink;
#pragma unroll
          for (int j = 0; j < AT_ONCE; j++) {  // a part that does not exist has weight and values 0
            float weight = exp_2(log[j] - higher);
            uint4 v = found[i * EACH + j];
            u32 pairs[4] = {v.x, v.y, v.z, v.w};
            total[i] += weight;
#pragma unroll
            for (int k = 0; k < 8; k++)
              y[i][k] += weight * (k % 2 ? high_of(pairs[k / 2]) : low_of(pairs[k / 2]));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        int item = first + i * THREADS;
        float scale = 1 / total[i];
        if (item < ALL)
          put(item / ITEMS, item % ITEMS,
              make_uint4(pack(y[i][0] * scale, y[i][1] * scale), pack(y[i][2] * scale, y[i][3] * scale),
                         pack(y[i][4] * scale, y[i][5] * scale), pack(y[i][6] * scale, y[i][7] * scale)));
      }
    }
    sync_computing();
  }

  // 1 / the root mean square of what `receive` got for a sequence.
  __device__ float inverse(int sequence) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++) sum += s.squares[sequence][i];
    return rsqrt_of(sum / HIDDEN + EPS);
  }

  // Multiplies this block's units of a matrix [*, WIDTH] with the input. All warps work on the same
  // unit, each on every eighth group of 32 columns. (It does not matter which column serves as which
  // k of an mma as long as input and weights agree; a lane's 16 bytes serve two mmas.) After each
  // group of units, done(first, units) may read their `sum`. Units come one after the other, since
  // the registers cannot hold the sums of eight.
  template <int WIDTH, class Done>
  __device__ void product(int all, Done done) {
    constexpr int STEPS = CHUNK / 32 / WARPS;
#pragma unroll 1
    for (int first = 0; first < all; first += GROUP_UNITS) {
      const int units = min(GROUP_UNITS, all - first);
      uint4 x[STEPS], x8[STEPS];  // of sequences `row` and `row` + 8
#pragma unroll 1
      for (int unit = 0; unit < units; unit++) {
        float sums[STEPS][4] = {};
#pragma unroll 1
        for (int column = 0; column < WIDTH; column += CHUNK) {
          if (WIDTH > CHUNK || unit == 0) {
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
              x[i] = x8[i] = make_uint4(0, 0, 0, 0);
              int at = column + (i * WARPS + warp) * 32;
              if (at < WIDTH && row < BATCH)
                x[i] = *reinterpret_cast<const uint4*>(s.input[row] + 2 * at + 16 * quad);
              if (at < WIDTH && row + 8 < BATCH)
                x8[i] = *reinterpret_cast<const uint4*>(s.input[row + 8] + 2 * at + 16 * quad);
            }
          }
          const unsigned char* stage = acquire() + row * PITCH + 16 * quad;
#pragma unroll
          for (int i = 0; i < STEPS; i++) {
            int at = (i * WARPS + warp) * 32;
            if (column + at >= WIDTH) continue;
            uint4 w = *reinterpret_cast<const uint4*>(stage + 2 * at);
            mma16(sums[i], x[i].x, x8[i].x, x[i].y, x8[i].y, w.x, w.y);
            mma16(sums[i], x[i].z, x8[i].z, x[i].w, x8[i].w, w.z, w.w);
          }
          release();
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (row + 8 * i >= BATCH) continue;
          float2 sum = make_float2(0, 0);
#pragma unroll
          for (int j = 0; j < STEPS; j++) sum.x += sums[j][2 * i], sum.y += sums[j][2 * i + 1];
          *reinterpret_cast<float2*>(&s.parts[warp][unit][row + 8 * i][2 * quad]) = sum;
        }
      }
      sync_computing();
      done(first, units);
      sync_computing();
    }
  }

  // Calls f(unit, sequence, pair) for each pair of rows of some units.
  template <class F>
  __device__ void each_pair(int units, F f) {
#pragma unroll 1
    for (int i = thread; i < units * BATCH * 4; i += THREADS)
      f(i / (BATCH * 4), i / 4 % BATCH, i % 4);
  }

  // Sums of a pair of rows over all warps.
  __device__ float2 sum(int unit, int sequence, int pair) {
    float2 total = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
      float2 part = *reinterpret_cast<float2*>(&s.parts[i][unit][sequence][2 * pair]);
      total.x += part.x;
      total.y += part.y;
    }
    return total;
  }
};

// One warp's online softmax over tiles of positions, for the queries of one KV head.
struct Softmax {
  static constexpr int WORDS = HEAD_DIM / 32;  // 16-byte words that a lane holds of a row
  const int lane = threadIdx.x % 32, quad = lane % 4;
  uint4 q[WORDS];                     // of query lane / 4, as `load` gives them
  float maximum = MASKED, total = 0;  // of that query; total: over this lane's positions
  // Accumulators of mmas whose rows are elements and whose columns are queries; `store` says which.
  float sums[2 * WORDS][4] = {};

  // Loads a lane's words of a key, value or query: 8 elements of every 32. Null stands for zeros.
  __device__ void load(uint4 (&words)[WORDS], const u16* from) const {
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      words[i] = from ? reinterpret_cast<const uint4*>(from)[4 * i + quad] : make_uint4(0, 0, 0, 0);
  }

  // Returns the weights of keys lane / 4 and lane / 4 + 8, of which `count` exist, for query
  // lane / 4: of positions 2 quad and 2 quad + 1, and of these plus 8.
  __device__ uint2 score(const uint4 (&k)[2][WORDS], int count) {
    float scores[2][4] = {}, s[4];
#pragma unroll
    for (int i = 0; i < 2 * WORDS; i++) {
      uint4 x = q[i / 2], y = k[i % 2][i / 2];
      mma16(scores[i % 2], x.x, 0, x.y, 0, y.x, y.y);
      mma16(scores[i % 2], x.z, 0, x.w, 0, y.z, y.w);
    }
    float highest = maximum;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s[i] = i / 2 * 8 + 2 * quad + i % 2 < count ? scores[i / 2][i % 2] * SCALE_LOG2E : MASKED;
      highest = fmaxf(highest, s[i]);
    }
    highest = fmaxf(highest, shuffle_xor(highest, 1));
    highest = fmaxf(highest, shuffle_xor(highest, 2));
    float shrink = exp_2(maximum - highest);
    maximum = highest;
    total *= shrink;
#pragma unroll
    for (int i = 0; i < 4; i++) total += s[i] = exp_2(s[i] - highest);
    float even = shuffle(shrink, 8 * quad), odd = shuffle(shrink, 8 * quad + 4);
#pragma unroll
    for (int i = 0; i < 2 * WORDS; i++) {
      sums[i][0] *= even;
      sums[i][1] *= odd;
      sums[i][2] *= even;
      sums[i][3] *= odd;
    }
    return make_uint2(pack(s[0], s[1]), pack(s[2], s[3]));
  }

  __device__ void add(uint2 weights, const uint4 (&v)[2][WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      mma16(sums[2 * i], transpose(v[0][i].x), transpose(v[0][i].y), transpose(v[1][i].x),
            transpose(v[1][i].y), weights.x, weights.y);
      mma16(sums[2 * i + 1], transpose(v[0][i].z), transpose(v[0][i].w), transpose(v[1][i].z),
            transpose(v[1][i].w), weights.x, weights.y);
    }
  }

  __device__ void store(float (&to)[GROUP][HEAD_DIM], float (&maxima)[GROUP],
                        float (&totals)[GROUP]) const {
    float all = total + shuffle_xor(total, 1);
    all += shuffle_xor(all, 2);
    const int row = lane / 4;
    if (row < GROUP && quad == 0) {
      maxima[row] = maximum;
      totals[row] = all;
    }
#pragma unroll
    for (int i = 0; i < 8 * WORDS; i++) {
      int query = 2 * quad + i % 2, at = i / 8 * 32 + row / 2 * 8 + i % 8 / 2 * 2 + row % 2;
      if (query < GROUP) to[query][at] = sums[i / 4][i % 4];
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode_layers(
    const u16* __restrict__ x, const u16* __restrict__ input_norm, const u16* __restrict__ qkv,
    const u16* __restrict__ qkv_bias, const u16* __restrict__ q_norm,
    const u16* __restrict__ k_norm, const u16* __restrict__ o, const u16* __restrict__ post_norm,
    const u16* __restrict__ gate_up, const u16* __restrict__ down, const float* __restrict__ cos,
    const float* __restrict__ sin, const int* __restrict__ slots, const int* __restrict__ tables,
    const int* __restrict__ contexts, const u16*, const u16*, const u32*, u16* hidden,
    u16* k_cache, u16* v_cache, u32* mail) {
  Shared& s = *reinterpret_cast<Shared*>(shared);
  const int block = blockIdx.x, thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPS);
    }
    barriers_ready();
  }
  __syncthreads();

  // This block's rows of each product, and its task in the attention.
  const int qkv_first = first_of(QKV / UNIT, block);
  const int qkv_units = first_of(QKV / UNIT, block + 1) - qkv_first;
  const int own_first = first_of(HIDDEN / UNIT, block);
  const int own_units = first_of(HIDDEN / UNIT, block + 1) - own_first;
  const int ffn_first = first_of(FFN / UNIT, block);
  const int ffn_units = first_of(FFN / UNIT, block + 1) - ffn_first;
  const int split = block % SPLITS, head = block / SPLITS % KV_HEADS;
  const int sequence = block / SPLITS / KV_HEADS;
  int begin = 0, end = 0, last_part = -1;  // old positions of its part; the context's last part
  if (block < TASKS) {
    Parts parts(contexts[sequence]);
    begin = min(split * parts.per, parts.old);
    end = min(begin + parts.per, parts.old);
    last_part = parts.count - 1;
  }
  constexpr size_t LAYER_OF_CACHE = (size_t)PAGES * PAGE * KV_HEADS * HEAD_DIM;

  if (thread >= THREADS) {
    Copier copier{s, thread - THREADS};
    // Prefetches what the warps load without the ring.
    auto ask = [&](int layer) {
      if (copier.lane < own_units) {
        fetch(input_norm + layer * HIDDEN + (own_first + copier.lane) * UNIT);
        fetch(post_norm + layer * HIDDEN + (own_first + copier.lane) * UNIT);
      }
      size_t cached = layer * LAYER_OF_CACHE + head * HEAD_DIM;
      copier.ask_for(k_cache + cached, tables + sequence * TABLE, begin, end);
      copier.ask_for(v_cache + cached, tables + sequence * TABLE, begin, end);
    };
    for (int layer = 0; layer < LAYERS; layer++) {
      ask(layer);
      copier.rows<HIDDEN>(qkv + (size_t)layer * QKV * HIDDEN, qkv_units,
                          [&](int i) { return (qkv_first + i) * UNIT; });
      copier.rows<ATTENDED>(o + (size_t)layer * HIDDEN * ATTENDED, own_units,
                            [&](int i) { return (own_first + i) * UNIT; });
      copier.rows<HIDDEN>(gate_up + (size_t)layer * 2 * FFN * HIDDEN, 2 * ffn_units, [&](int i) {
        return i % 2 * FFN + (ffn_first + i / 2) * UNIT;  // gate and up in turns
      });
      copier.rows<FFN>(down + (size_t)layer * HIDDEN * FFN, own_units,
                       [&](int i) { return (own_first + i) * UNIT; });
    }
    return;
  }

  Worker w(s);
  const int warp = w.warp, lane = w.lane, row = w.row;
  if (thread < BATCH) s.part_count[thread] = Parts(contexts[thread]).count;
  for (int i = thread; i < 8 * HEAD_DIM; i += THREADS) s.query[i / HEAD_DIM][i % HEAD_DIM] = 0;

  // Every block tells its rows of the first layer's input, as it will those of later layers.
  for (int i = thread; i < own_units * UNIT / 2 * BATCH; i += THREADS) {
    int pair = i / BATCH, b = i % BATCH, at = b * HIDDEN / 2 + own_first * UNIT / 2 + pair;
    u32 word = reinterpret_cast<const u32*>(x)[at];
    s.residual[2 * pair][b] = low_of(word);
    s.residual[2 * pair + 1][b] = high_of(word);
    tell(mail + MAIL_HIDDEN + at, word);
  }
  sync_computing();

  // The row of the cache in which a position of this block's part lies, the same in every layer; -1
  // for none. A lane's first ones are looked up once.
  auto row_of = [&](int at) {
    return at < end ? tables[sequence * TABLE + at / PAGE] * PAGE + at % PAGE : -1;
  };
  const int first_at = begin + warp * TILE + row;
  const int first_rows[2] = {row_of(first_at), row_of(first_at + 8)};

  for (int layer = 0; layer < LAYERS; layer++) {
    u32* const words = mail + layer * MAIL_WORDS;

    // ---- queries, keys and values
    spin(FIRST_LOOK);
    w.receive<HIDDEN, true>(words + MAIL_HIDDEN, input_norm + layer * HIDDEN);
    w.product<HIDDEN>(qkv_units, [&](int first, int units) {
      w.each_pair(units, [&](int unit, int b, int pair) {
        int at = (qkv_first + first + unit) * UNIT / 2 + pair;
        float2 y = w.sum(unit, b, pair);
        float inverse = w.inverse(b);
        y.x *= inverse;
        y.y *= inverse;
        if (QKV_BIAS) {
          u32 bias = reinterpret_cast<const u32*>(qkv_bias + (size_t)layer * QKV)[at];
          y.x += low_of(bias);
          y.y += high_of(bias);
        }
        tell(words + MAIL_QKV + b * QKV / 2 + at, pack(y.x, y.y));
      });
    });

    // ---- attention of one head's queries to a part of one sequence
    if (split <= last_part) {
      Attention& a = s.attention;
      Softmax softmax;
      uint4 k[2][Softmax::WORDS], v[2][Softmax::WORDS];
      int tile = begin + warp * TILE, rows[2] = {first_rows[0], first_rows[1]};
      auto load = [&](uint4 (&words)[2][Softmax::WORDS], const u16* cache) {
        const u16* cached = cache + layer * LAYER_OF_CACHE + head * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < 2; i++)
          softmax.load(words[i], rows[i] < 0 ? nullptr : cached + (size_t)rows[i] * KV_ROW);
      };
      // Before the block waits for the new queries and keys, it requests what does not depend on
      // them: the first old keys (the values, needed last, would be in the way of the words), and
      // the factors of norms and RoPE for a lane's pairs (i, i + half), (i + 1, i + 1 + half).
      load(k, k_cache);
      const int i = 2 * lane;
      u32 of_query[2], of_key[2];
      float c[2] = {1, 1}, d[2] = {};
      if (i < HALF) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          if (QK_NORM) {
            of_query[j] = load_now(q_norm + layer * HEAD_DIM + i + j * HALF);
            of_key[j] = load_now(k_norm + layer * HEAD_DIM + i + j * HALF);
          }
          if (!(NO_ROPE_BITS >> layer & 1)) {
            c[j] = __uint_as_float(load_now(cos + sequence * HALF + i + j));
            d[j] = __uint_as_float(load_now(sin + sequence * HALF + i + j));
          }
        }
      }
      constexpr int ITEMS = (GROUP + 2) * HEAD_DIM / 8;
      for (int i = thread; i < ITEMS; i += THREADS) {
        auto from = reinterpret_cast<const uint4*>(words + MAIL_QKV + sequence * QKV / 2);
        uint4 found[1];
        await<1>(found, {from + head * ITEMS + i}, {true});
        u32 pairs[4] = {found[0].x, found[0].y, found[0].z, found[0].w};
#pragma unroll
        for (int j = 0; j < 4; j++)
          reinterpret_cast<float2*>(a.raw)[4 * i + j] = make_float2(low_of(pairs[j]), high_of(pairs[j]));
      }
      load(v, v_cache);
      sync_computing();
      const int slot = slots[sequence];
      for (int r = warp; r < GROUP + 2; r += WARPS) {  // queries, the key, the value
        bool is_query = r < GROUP, is_value = r == GROUP + 1;
        float inverse = 1;
        if (QK_NORM && !is_value) {
          float squares = 0;
          for (int i = lane; i < HEAD_DIM; i += 32) squares += a.raw[r][i] * a.raw[r][i];
          inverse = rsqrt_of(sum_of_warp(squares) / HEAD_DIM + EPS);
        }
        u16* to = is_query ? s.query[r] : is_value ? s.value : s.key;
        if (i < HALF) {
          float y[4];
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float p = a.raw[r][i + j] * inverse, q = a.raw[r][i + j + HALF] * inverse;
            if (QK_NORM && !is_value) {
              u32 lower = is_query ? of_query[0] : of_key[0];
              u32 upper = is_query ? of_query[1] : of_key[1];
              p *= j ? high_of(lower) : low_of(lower);
              q *= j ? high_of(upper) : low_of(upper);
            }
            y[j] = is_value ? p : p * c[j] - q * d[j];
            y[j + 2] = is_value ? q : q * c[j] + p * d[j];
          }
          u32 lower = pack(y[0], y[1]), upper = pack(y[2], y[3]);
          reinterpret_cast<u32*>(to)[i / 2] = lower;
          reinterpret_cast<u32*>(to)[i / 2 + HALF / 2] = upper;
          if (!is_query && slot >= 0 && split == last_part) {
            u16* cache = is_value ? v_cache : k_cache;
            cache += layer * LAYER_OF_CACHE + ((size_t)slot * KV_HEADS + head) * HEAD_DIM;
            reinterpret_cast<u32*>(cache)[i / 2] = lower;
            reinterpret_cast<u32*>(cache)[i / 2 + HALF / 2] = upper;
          }
        }
      }
      sync_computing();

      softmax.load(softmax.q, s.query[row]);
      while (tile < end) {
        uint2 weights = softmax.score(k, end - tile);
        tile += TILE * WARPS;
        rows[0] = row_of(tile + row);
        rows[1] = row_of(tile + row + 8);
        load(k, k_cache);
        softmax.add(weights, v);
        load(v, v_cache);
      }
      if (warp == WARPS - 1 && split == last_part) {  // the new position
        softmax.load(k[0], row == 0 ? s.key : nullptr);
        softmax.load(v[0], row == 0 ? s.value : nullptr);
        softmax.add(softmax.score(k, 1), v);
      }
      softmax.store(a.sums[warp], a.maximum[warp], a.total[warp]);
      sync_computing();
      for (int i = thread; i < GROUP * HALF; i += THREADS) {
        int g = i / HALF, pair = i % HALF;
        float highest = MASKED, all = 0;
        float2 y = make_float2(0, 0);
#pragma unroll
        for (int j = 0; j < WARPS; j++) highest = fmaxf(highest, a.maximum[j][g]);
#pragma unroll
        for (int j = 0; j < WARPS; j++) {
          float weight = exp_2(a.maximum[j][g] - highest);
          float2 part = *reinterpret_cast<const float2*>(&a.sums[j][g][2 * pair]);
          all += weight * a.total[j][g];
          y.x += weight * part.x;
          y.y += weight * part.y;
        }
        int of_head = sequence * HEADS + head * GROUP + g;
        tell(words + MAIL_PART + (of_head * SPLITS + split) * HALF + pair,
             pack(y.x / all, y.y / all));
        if (SPLITS > 1 && pair == 0) {
          u32* lse = words + MAIL_LSE + of_head * LSE_PITCH;
          tell(lse + split, __float_as_uint(highest + log_2(all)));
          if (split == last_part)  // readers wait for items of four words
            for (int j = split + 1; j < LSE_PITCH; j++) tell(lse + j, __float_as_uint(MASKED));
        }
      }
      sync_computing();
    }

    // ---- the projection of the attention's output, and the residual
    auto add = [&](int first, int unit, int b, int pair) {
      float2 y = w.sum(unit, b, pair);
      int own = (first + unit) * UNIT + 2 * pair;
      y.x = s.residual[own][b] += y.x;
      y.y = s.residual[own + 1][b] += y.y;
      return pack(y.x, y.y);
    };
    if (SPLITS == 1) w.receive<ATTENDED, false>(words + MAIL_PART, nullptr);
    else w.receive_attended(words + MAIL_PART, words + MAIL_LSE);
    w.product<ATTENDED>(own_units, [&](int first, int units) {
      w.each_pair(units, [&](int unit, int b, int pair) {
        int at = b * HIDDEN / 2 + (own_first + first + unit) * UNIT / 2 + pair;
        tell(words + MAIL_MIDDLE + at, add(first, unit, b, pair));
      });
    });

    // ---- gate and up
    spin(FIRST_LOOK);
    w.receive<HIDDEN, true>(words + MAIL_MIDDLE, post_norm + layer * HIDDEN);
    w.product<HIDDEN>(2 * ffn_units, [&](int first, int units) {
      w.each_pair(units / 2, [&](int unit, int b, int pair) {
        float2 gate = w.sum(2 * unit, b, pair), up = w.sum(2 * unit + 1, b, pair);
        float inverse = w.inverse(b);
        u32 y = pack(silu(gate.x * inverse) * up.x * inverse, silu(gate.y * inverse) * up.y * inverse);
        int at = b * FFN / 2 + (ffn_first + first / 2 + unit) * UNIT / 2 + pair;
        tell(words + MAIL_GATED + at, y);
      });
    });

    // ---- down, and the residual
    spin(FIRST_LOOK);
    w.receive<FFN, false>(words + MAIL_GATED, nullptr);
    w.product<FFN>(own_units, [&](int first, int units) {
      w.each_pair(units, [&](int unit, int b, int pair) {
        int at = b * HIDDEN / 2 + (own_first + first + unit) * UNIT / 2 + pair;
        u32 y = add(first, unit, b, pair);
        if (layer + 1 < LAYERS) tell(words + MAIL_WORDS + MAIL_HIDDEN + at, y);
        else reinterpret_cast<u32*>(hidden)[at] = y;
      });
    });
  }
}
