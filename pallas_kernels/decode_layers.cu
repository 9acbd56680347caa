// All layers of a decode step of 1 to 8 sequences, as one kernel: docs/decode_kernel.md draws it.
//
// A block is a multiprocessor's whole work. Its copying warp fetches this block's rows of every
// weight, and its part of the old keys and values, through a ring in shared memory. It knows all
// addresses from the start, and so it waits for no other block: while the blocks exchange what
// they have computed, the weights of the next product arrive. The eight computing warps follow it
// through the ring, and tell other blocks their results through `mail`.
//
// Compiled for one shape; these are #defined before this text (sizes as in decode_layers.py):
//   BATCH LAYERS HIDDEN HEADS KV_HEADS HEAD_DIM FFN PAGES PAGE TABLE EPS SCALE_LOG2E QK_NORM
//   QKV_BIAS NO_ROPE_BITS BLOCKS SPLITS STAGES IN_FLIGHT

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

constexpr int WARPS = 8;                  // that compute; one more copies
constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = HEADS / KV_HEADS;   // query heads of a key/value head
constexpr int QKV = KV_HEADS * (GROUP + 2) * HEAD_DIM;
constexpr int ATTENDED = HEADS * HEAD_DIM;
constexpr int TASKS = BATCH * KV_HEADS * SPLITS;  // of attention, at most one a block
constexpr float MASKED = -1e30f;

// A stage of the ring holds 8 rows of up to 1,024 weights, or 32 keys and 32 values. Rows are
// padded, so that the 16-byte words that are read at once lie in different banks.
constexpr int UNIT = 8, CHUNK = 1024, POSITIONS = 32, TILE = 8;
constexpr int PITCH = 2 * CHUNK + 64;
constexpr int KV_PITCH = 2 * HEAD_DIM + 16;
constexpr int STAGE_BYTES = (larger(UNIT * PITCH, 2 * POSITIONS * KV_PITCH) + 127) & ~127;
constexpr int GROUP_UNITS = 8;  // units whose sums a warp keeps at once

constexpr int WIDEST = larger(larger(HIDDEN, ATTENDED), FFN);
constexpr int INPUT_PITCH = 2 * WIDEST + (WIDEST % 64 ? 0 : 64);  // an odd number of 64 bytes
constexpr int OWN_ROWS = UNIT * ((HIDDEN / UNIT + BLOCKS - 1) / BLOCKS);

struct Attention {
  float raw[GROUP + 2][HEAD_DIM];
  float sums[WARPS][GROUP][HEAD_DIM], maximum[WARPS][GROUP], total[WARPS][GROUP];
};

struct Shared {
  unsigned char ring[STAGES][STAGE_BYTES];
  unsigned char input[BATCH][INPUT_PITCH];      // of the product under way
  unsigned char query[TILE][KV_PITCH];          // rows from GROUP on are zeros
  unsigned char key[TILE][KV_PITCH], value[TILE][KV_PITCH];  // row 0: of the new position
  union {
    float parts[WARPS][GROUP_UNITS][BATCH][UNIT];  // each warp's sums of a product
    Attention attention;
  };
  float residual[OWN_ROWS][BATCH];              // the rows that this block adds to
  float squares[WARPS][BATCH];                  // sums of the product's input, for its norm
  u64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= 232448, "shared memory");

// Where the words of each exchange lie in `mail`, in words of 8 bytes with their numbers.
constexpr int MAIL_HIDDEN = 0;                                    // pairs of bfloat16
constexpr int MAIL_QKV = MAIL_HIDDEN + BATCH * HIDDEN / 2;        // pairs
constexpr int MAIL_PART = MAIL_QKV + BATCH * QKV / 2;             // float32
constexpr int MAIL_MAXIMUM = MAIL_PART + BATCH * SPLITS * ATTENDED;  // float32: maximum, total
constexpr int MAIL_ATTENDED = MAIL_MAXIMUM + 2 * BATCH * SPLITS * HEADS;  // pairs
constexpr int MAIL_MIDDLE = MAIL_ATTENDED + BATCH * ATTENDED / 2;  // pairs
constexpr int MAIL_GATED = MAIL_MIDDLE + BATCH * HIDDEN / 2;      // pairs
constexpr int MAIL_WORDS = MAIL_GATED + BATCH * FFN / 2;

extern __shared__ __align__(128) unsigned char shared[];

// The first of a block's units, when all blocks share them.
__device__ int first_of(int units, int block) { return units * block / BLOCKS; }

// A place in the ring, which both sides step through in the same order.
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

  // Waits for a free stage. Few copies are under way at a time: what is asked for long before its
  // use would stand in the way of the blocks' exchanges.
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

  // Rows of [*, width] in units of 8; unit i begins at row row_of(i).
  template <int WIDTH, class RowOf>
  __device__ void rows(const u16* weights, int units, RowOf row_of) {
    for (int done = 0; done < units; done += GROUP_UNITS)
      for (int column = 0; column < WIDTH; column += CHUNK)
        for (int i = done; i < min(done + GROUP_UNITS, units); i++) {
          u32 bytes = 2 * min(CHUNK, WIDTH - column);
          acquire(UNIT * bytes);
          if (lane < UNIT)
            copy_in(s.ring[place.slot] + lane * PITCH,
                    weights + (size_t)(row_of(i) + lane) * WIDTH + column, bytes,
                    &s.full[place.slot]);
          step();
        }
  }

  // Keys and values of positions begin to end of one head.
  __device__ void keys_and_values(const u16* keys, const u16* values, const int* table, int begin,
                                  int end) {
    for (; begin < end; begin += POSITIONS) {
      int count = min(POSITIONS, end - begin), position = begin + lane;
      acquire(count * 4 * HEAD_DIM);
      if (lane < count) {
        size_t row = (size_t)table[position / PAGE] * PAGE + position % PAGE;
        unsigned char* to = s.ring[place.slot] + lane * KV_PITCH;
        u64* full = &s.full[place.slot];
        copy_in(to, keys + row * KV_HEADS * HEAD_DIM, 2 * HEAD_DIM, full);
        copy_in(to + POSITIONS * KV_PITCH, values + row * KV_HEADS * HEAD_DIM, 2 * HEAD_DIM, full);
      }
      step();
    }
  }
};

// ---- the computing warps

__device__ float sum_of_warp(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x += shuffle_xor(x, i);
  return x;
}

__device__ bool has(uint4 item, u32 number) { return item.y == number && item.w == number; }

// Looks until the two words of an item are there.
__device__ uint4 await(const uint4* item, u32 number) {
  uint4 found = look(item);
  for (Deadline deadline; !has(found, number); found = look(item)) deadline.check();
  return found;
}

struct Worker {
  Shared& s;
  uint2* mail;
  int thread, warp, lane, quad, row;  // row and quad: of this lane in an mma's fragments
  Place place;

  __device__ Worker(Shared& ring, uint2* mail)
      : s(ring), mail(mail), thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
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

  // Looking is traffic. So one warp looks at a few of the items until they are there; by then most
  // others are, too.
  __device__ void expect(const uint4* items, int count, u32 number) {
    if (warp == 0) await(items + (size_t)lane * count / 32, number);
    sync_computing();
  }

  // Receives [BATCH, WIDTH] as the input of a product. With a norm, its weights are applied here,
  // and the root mean square to the product's result (`inverse`).
  template <int WIDTH, bool NORM>
  __device__ void receive(int at, u32 number, const u16* norm) {
    constexpr int ITEMS = WIDTH / 4, PER = (ITEMS + THREADS - 1) / THREADS;
    constexpr int MOST = PER > 4 ? 1 : PER > 2 ? 2 : PER > 1 ? 4 : 8;  // sequences at once
    constexpr int ROWS = MOST < BATCH ? MOST : BATCH;
    const uint4* items = reinterpret_cast<const uint4*>(mail + at);
    uint2 scales[PER];
    if (NORM) {
#pragma unroll
      for (int j = 0; j < PER; j++)
        if (j * THREADS + thread < ITEMS)
          scales[j] = reinterpret_cast<const uint2*>(norm)[j * THREADS + thread];
    }
    expect(items, BATCH * ITEMS, number);
    for (int first = 0; first < BATCH; first += ROWS) {
      uint4 found[ROWS][PER];
      bool all;
      Deadline deadline;
      do {
        deadline.check();
        all = true;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
          for (int j = 0; j < PER; j++)
            if (j * THREADS + thread < ITEMS)
              found[i][j] = look(items + (first + i) * ITEMS + j * THREADS + thread);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
          for (int j = 0; j < PER; j++)
            if (j * THREADS + thread < ITEMS) all &= has(found[i][j], number);
      } while (!all);
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        float squares = 0;
#pragma unroll
        for (int j = 0; j < PER; j++) {
          int item = j * THREADS + thread;
          if (item >= ITEMS) continue;
          u32 lower = found[i][j].x, upper = found[i][j].z;
          if (NORM) {
            float a = low_of(lower), b = high_of(lower), c = low_of(upper), d = high_of(upper);
            squares += a * a + b * b + c * c + d * d;
            lower = pack(a * low_of(scales[j].x), b * high_of(scales[j].x));
            upper = pack(c * low_of(scales[j].y), d * high_of(scales[j].y));
          }
          *reinterpret_cast<uint2*>(s.input[first + i] + 8 * item) = make_uint2(lower, upper);
        }
        if (NORM) {
          squares = sum_of_warp(squares);
          if (lane == 0) s.squares[warp][first + i] = squares;
        }
      }
    }
    sync_computing();
  }

  // 1 / the root mean square of what `receive` got for a sequence.
  __device__ float inverse(int sequence) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += s.squares[i][sequence];
    return rsqrt_of(sum / HIDDEN + EPS);
  }

  // Multiplies this block's units of a matrix [*, WIDTH] with the input. All warps share a unit:
  // each takes every eighth 32 of its columns. (Which column is which k of an mma does not matter,
  // if input and weights agree: a lane's 16 bytes serve two of them.) Then done(first, units) may
  // read `sum`.
  template <int WIDTH, class Done>
  __device__ void product(int units, Done done) {
    for (int first = 0; first < units; first += GROUP_UNITS) {
      float sums[GROUP_UNITS][2][4] = {};
      for (int column = 0; column < WIDTH; column += CHUNK) {
        constexpr int STEPS = CHUNK / 32 / WARPS;
        uint4 x[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
          x[i] = make_uint4(0, 0, 0, 0);
          int at = column + (i * WARPS + warp) * 32;
          if (at < WIDTH && row < BATCH)
            x[i] = *reinterpret_cast<const uint4*>(s.input[row] + 2 * at + 16 * quad);
        }
#pragma unroll
        for (int unit = 0; unit < GROUP_UNITS; unit++) {
          if (first + unit >= units) continue;
          const unsigned char* stage = acquire() + row * PITCH + 16 * quad;
#pragma unroll
          for (int i = 0; i < STEPS; i++) {
            int at = (i * WARPS + warp) * 32;
            if (column + at >= WIDTH) continue;
            uint4 w = *reinterpret_cast<const uint4*>(stage + 2 * at);
            mma16(sums[unit][i % 2], x[i].x, 0, x[i].y, 0, w.x, w.y);
            mma16(sums[unit][i % 2], x[i].z, 0, x[i].w, 0, w.z, w.w);
          }
          release();
        }
      }
#pragma unroll
      for (int unit = 0; unit < GROUP_UNITS; unit++)
        if (row < BATCH)
          *reinterpret_cast<float2*>(&s.parts[warp][unit][row][2 * quad]) = make_float2(
              sums[unit][0][0] + sums[unit][1][0], sums[unit][0][1] + sums[unit][1][1]);
      sync_computing();
      done(first, min(GROUP_UNITS, units - first));
      sync_computing();
    }
  }

  // Two rows' sums over all warps.
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

  // One query group's attention to up to 8 positions, by one warp: an online softmax.
  __device__ void attend(const u32 (&q)[HEAD_DIM / 16][2], const unsigned char* keys,
                         const unsigned char* values, int count, float& maximum, float& total,
                         float (&sums)[HEAD_DIM / TILE][4]) {
    const int word = lane % 8 * KV_PITCH + lane / 8 * 16;  // of four 8 x 8 matrices in a row
    float scores[4] = {};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
      u32 k[4];
      load_matrices(k, keys + word + 64 * i);
      mma16(scores, q[2 * i][0], 0, q[2 * i][1], 0, k[0], k[1]);
      mma16(scores, q[2 * i + 1][0], 0, q[2 * i + 1][1], 0, k[2], k[3]);
    }
    bool first = 2 * quad < count, second = 2 * quad + 1 < count;
    float a = first ? scores[0] * SCALE_LOG2E : MASKED;
    float b = second ? scores[1] * SCALE_LOG2E : MASKED;
    float highest = fmaxf(a, b);
    highest = fmaxf(highest, shuffle_xor(highest, 1));
    highest = fmaxf(maximum, fmaxf(highest, shuffle_xor(highest, 2)));
    float shrink = exp_2(maximum - highest);
    maximum = highest;
    a = first ? exp_2(a - highest) : 0;
    b = second ? exp_2(b - highest) : 0;
    total = total * shrink + a + b;
    u32 weights = pack(a, b), keep = (first ? 0xffff : 0) | (second ? 0xffff0000 : 0);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
      u32 v[4];
      load_matrices_transposed(v, values + word + 64 * i);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float(&out)[4] = sums[4 * i + j];
        out[0] *= shrink;
        out[1] *= shrink;
        mma8(out, weights, 0, v[j] & keep);  // what lies past the context may be NaN
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode_layers(
    const u16* __restrict__ x, const u16* __restrict__ input_norm, const u16* __restrict__ qkv,
    const u16* __restrict__ qkv_bias, const u16* __restrict__ q_norm,
    const u16* __restrict__ k_norm, const u16* __restrict__ o, const u16* __restrict__ post_norm,
    const u16* __restrict__ gate_up, const u16* __restrict__ down, const float* __restrict__ cos,
    const float* __restrict__ sin, const int* __restrict__ slots, const int* __restrict__ tables,
    const int* __restrict__ contexts, const u16*, const u16*, const uint2*, u16* hidden,
    u16* k_cache, u16* v_cache, uint2* mail) {
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

  // This block's rows of each product, and its part of the attention.
  const int qkv_first = first_of(QKV / UNIT, block);
  const int qkv_units = first_of(QKV / UNIT, block + 1) - qkv_first;
  const int own_first = first_of(HIDDEN / UNIT, block);
  const int own_units = first_of(HIDDEN / UNIT, block + 1) - own_first;
  const int ffn_first = first_of(FFN / UNIT, block);
  const int ffn_units = first_of(FFN / UNIT, block + 1) - ffn_first;
  const int split = block % SPLITS, head = block / SPLITS % KV_HEADS;
  const int sequence = block / SPLITS / KV_HEADS;
  int begin = 0, end = 0;  // of the old positions
  if (block < TASKS) {
    int old = max(contexts[sequence] - 1, 0), per = (old + SPLITS - 1) / SPLITS;
    begin = min(split * per, old);
    end = min(begin + per, old);
  }
  constexpr size_t LAYER_OF_CACHE = (size_t)PAGES * PAGE * KV_HEADS * HEAD_DIM;

  if (thread >= THREADS) {
    Copier copier{s, thread - THREADS};
    for (int layer = 0; layer < LAYERS; layer++) {
      copier.rows<HIDDEN>(qkv + (size_t)layer * QKV * HIDDEN, qkv_units,
                          [&](int i) { return (qkv_first + i) * UNIT; });
      size_t cached = layer * LAYER_OF_CACHE + head * HEAD_DIM;
      copier.keys_and_values(k_cache + cached, v_cache + cached, tables + sequence * TABLE, begin,
                             end);
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

  Worker w(s, mail);
  const int warp = w.warp, lane = w.lane, quad = w.quad, row = w.row;
  for (int i = thread; i < TILE * KV_PITCH / 4; i += THREADS) {
    reinterpret_cast<u32*>(s.query)[i] = 0;
    reinterpret_cast<u32*>(s.key)[i] = 0;
    reinterpret_cast<u32*>(s.value)[i] = 0;
  }

  // Calls f(unit, sequence, pair) for each pair of rows of some units.
  auto pairs = [&](int units, auto f) {
    for (int i = thread; i < units * BATCH * 4; i += THREADS)
      f(i / (BATCH * 4), i / 4 % BATCH, i % 4);
  };

  // Every block begins with its own rows, told like those of a layer.
  for (int i = thread; i < own_units * UNIT / 2 * BATCH; i += THREADS) {
    int pair = i / BATCH, b = i % BATCH, at = b * HIDDEN / 2 + own_first * UNIT / 2 + pair;
    u32 word = reinterpret_cast<const u32*>(x)[at];
    s.residual[2 * pair][b] = low_of(word);
    s.residual[2 * pair + 1][b] = high_of(word);
    tell(mail + MAIL_HIDDEN + at, word, 1);
  }
  sync_computing();

  for (int layer = 0; layer < LAYERS; layer++) {
    const u32 number = layer + 1;

    // ---- queries, keys and values
    w.receive<HIDDEN, true>(MAIL_HIDDEN, number, input_norm + layer * HIDDEN);
    w.product<HIDDEN>(qkv_units, [&](int first, int units) {
      pairs(units, [&](int unit, int b, int pair) {
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
        tell(mail + MAIL_QKV + b * QKV / 2 + at, pack(y.x, y.y), number);
      });
    });

    // ---- attention of one head's queries to a part of one sequence
    if (block < TASKS) {
      Attention& a = s.attention;
      constexpr int ITEMS = (GROUP + 2) * HEAD_DIM / 4;
      auto items = reinterpret_cast<const uint4*>(mail + MAIL_QKV + sequence * QKV / 2) + head * ITEMS;
      w.expect(items, ITEMS, number);
      for (int i = thread; i < ITEMS; i += THREADS) {
        uint4 found = await(items + i, number);
        reinterpret_cast<float4*>(a.raw)[i] = make_float4(low_of(found.x), high_of(found.x),
                                                          low_of(found.z), high_of(found.z));
      }
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
        unsigned char* to = is_query ? s.query[r] : is_value ? s.value[0] : s.key[0];
        const u16* scale = (is_query ? q_norm : k_norm) + layer * HEAD_DIM;
        // A lane turns pairs (i, i + half) and (i + 1, i + 1 + half).
        for (int i = 2 * lane; i < HEAD_DIM / 2; i += 64) {
          float y[4];
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float p = a.raw[r][i + j] * inverse, q = a.raw[r][i + j + HEAD_DIM / 2] * inverse;
            if (QK_NORM && !is_value) {
              p *= low_of(scale[i + j]);
              q *= low_of(scale[i + j + HEAD_DIM / 2]);
            }
            float c = 1, d = 0;
            if (!is_value && !(NO_ROPE_BITS >> layer & 1)) {
              c = cos[sequence * HEAD_DIM / 2 + i + j];
              d = sin[sequence * HEAD_DIM / 2 + i + j];
            }
            y[j] = p * c - q * d;
            y[j + 2] = q * c + p * d;
          }
          u32 lower = pack(y[0], y[1]), upper = pack(y[2], y[3]);
          reinterpret_cast<u32*>(to)[i / 2] = lower;
          reinterpret_cast<u32*>(to)[i / 2 + HEAD_DIM / 4] = upper;
          if (!is_query && slot >= 0 && split == SPLITS - 1) {
            u16* cache = is_value ? v_cache : k_cache;
            cache += layer * LAYER_OF_CACHE + ((size_t)slot * KV_HEADS + head) * HEAD_DIM;
            reinterpret_cast<u32*>(cache)[i / 2] = lower;
            reinterpret_cast<u32*>(cache)[i / 2 + HEAD_DIM / 4] = upper;
          }
        }
      }
      sync_computing();

      u32 q[HEAD_DIM / 16][2];
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; i++) {
        q[i][0] = reinterpret_cast<const u32*>(s.query[row])[8 * i + quad];
        q[i][1] = reinterpret_cast<const u32*>(s.query[row])[8 * i + 4 + quad];
      }
      float maximum = MASKED, total = 0, sums[HEAD_DIM / TILE][4] = {};
      // Warps 0 to 3 take the tiles of one stage, the others those of the next.
      for (int i = begin; i < end; i += POSITIONS) {
        const unsigned char* stage = w.acquire() + warp % 4 * TILE * KV_PITCH;
        int count = min(POSITIONS, end - i) - warp % 4 * TILE;
        if (count > 0 && warp / 4 == (i - begin) / POSITIONS % 2)
          w.attend(q, stage, stage + POSITIONS * KV_PITCH, count, maximum, total, sums);
        w.release();
      }
      if (warp == WARPS - 1 && split == SPLITS - 1)  // and the last the new position
        w.attend(q, s.key[0], s.value[0], 1, maximum, total, sums);
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      if (row < GROUP) {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / TILE; i++)
          *reinterpret_cast<float2*>(&a.sums[warp][row][i * TILE + 2 * quad]) =
              make_float2(sums[i][0], sums[i][1]);
        a.maximum[warp][row] = maximum;
        a.total[warp][row] = total;
      }
      sync_computing();
      for (int i = thread; i < GROUP * HEAD_DIM / 2; i += THREADS) {
        int g = i / (HEAD_DIM / 2), pair = i % (HEAD_DIM / 2);
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
        if (SPLITS == 1) {
          tell(mail + MAIL_ATTENDED + of_head * HEAD_DIM / 2 + pair, pack(y.x / all, y.y / all),
               number);
        } else {
          int part = of_head * SPLITS + split;
          auto to = reinterpret_cast<uint4*>(mail + MAIL_PART) + part * HEAD_DIM / 2 + pair;
          tell2(to, __float_as_uint(y.x), __float_as_uint(y.y), number);
          if (pair == 0)
            tell2(reinterpret_cast<uint4*>(mail + MAIL_MAXIMUM) + part, __float_as_uint(highest),
                  __float_as_uint(all), number);
        }
      }
      sync_computing();
    }

    // ---- the parts of the contexts, merged: a lane for each part of a pair of elements
    if (SPLITS > 1) {
      int first = first_of(BATCH * ATTENDED / 2, block);
      int count = (first_of(BATCH * ATTENDED / 2, block + 1) - first) * SPLITS;
      for (int i = thread; i < (count + 31 & ~31); i += THREADS) {
        int element = first + min(i, count - 1) / SPLITS, part = i % SPLITS;
        int from = element / (HEAD_DIM / 2) * SPLITS + part, pair = element % (HEAD_DIM / 2);
        uint4 y = await(reinterpret_cast<const uint4*>(mail + MAIL_PART) + from * HEAD_DIM / 2 + pair, number);
        uint4 m = await(reinterpret_cast<const uint4*>(mail + MAIL_MAXIMUM) + from, number);
        float highest = __uint_as_float(m.x);
#pragma unroll
        for (int j = SPLITS / 2; j; j >>= 1) highest = fmaxf(highest, shuffle_xor(highest, j));
        float weight = exp_2(__uint_as_float(m.x) - highest), total = weight * __uint_as_float(m.z);
        float a = weight * __uint_as_float(y.x), b = weight * __uint_as_float(y.z);
#pragma unroll
        for (int j = SPLITS / 2; j; j >>= 1) {
          total += shuffle_xor(total, j);
          a += shuffle_xor(a, j);
          b += shuffle_xor(b, j);
        }
        if (part == 0 && i < count)
          tell(mail + MAIL_ATTENDED + element, pack(a / total, b / total), number);
      }
    }

    // ---- the projection of the attention's output, and the residual
    auto add = [&](int first, int unit, int b, int pair) {
      float2 y = w.sum(unit, b, pair);
      int own = (first + unit) * UNIT + 2 * pair;
      y.x = s.residual[own][b] += y.x;
      y.y = s.residual[own + 1][b] += y.y;
      return pack(y.x, y.y);
    };
    w.receive<ATTENDED, false>(MAIL_ATTENDED, number, nullptr);
    w.product<ATTENDED>(own_units, [&](int first, int units) {
      pairs(units, [&](int unit, int b, int pair) {
        int at = b * HIDDEN / 2 + (own_first + first + unit) * UNIT / 2 + pair;
        tell(mail + MAIL_MIDDLE + at, add(first, unit, b, pair), number);
      });
    });

    // ---- gate and up
    w.receive<HIDDEN, true>(MAIL_MIDDLE, number, post_norm + layer * HIDDEN);
    w.product<HIDDEN>(2 * ffn_units, [&](int first, int units) {
      pairs(units / 2, [&](int unit, int b, int pair) {
        float2 gate = w.sum(2 * unit, b, pair), up = w.sum(2 * unit + 1, b, pair);
        float inverse = w.inverse(b);
        u32 y = pack(silu(gate.x * inverse) * up.x * inverse, silu(gate.y * inverse) * up.y * inverse);
        int at = b * FFN / 2 + (ffn_first + first / 2 + unit) * UNIT / 2 + pair;
        tell(mail + MAIL_GATED + at, y, number);
      });
    });

    // ---- down, and the residual
    w.receive<FFN, false>(MAIL_GATED, number, nullptr);
    w.product<FFN>(own_units, [&](int first, int units) {
      pairs(units, [&](int unit, int b, int pair) {
        int at = b * HIDDEN / 2 + (own_first + first + unit) * UNIT / 2 + pair;
        u32 y = add(first, unit, b, pair);
        if (layer + 1 < LAYERS) tell(mail + MAIL_HIDDEN + at, y, number + 1);
        else reinterpret_cast<u32*>(hidden)[at] = y;
      });
    });
  }
}
