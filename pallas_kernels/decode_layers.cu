// All layers of a decode step of 1 to 16 sequences, as one kernel: docs/decode_kernel.md draws it.
//
// A block is a multiprocessor's whole work. Its copying warp fetches this block's rows of every
// weight through a ring in shared memory. It knows all addresses from the start, and so it waits
// for no other block: while the blocks exchange what they have computed, the weights of the next
// product arrive. The eight computing warps follow it through the ring, and tell other blocks their
// results through `mail`. Keys and values go from memory straight to the warps' registers.
//
// Compiled for one shape; these are #defined before this text (sizes as in decode_layers.py):
//   BATCH LAYERS HIDDEN HEADS KV_HEADS HEAD_DIM FFN PAGES PAGE TABLE EPS SCALE_LOG2E QK_NORM
//   QKV_BIAS NO_ROPE_BITS BLOCKS SPLITS STAGES IN_FLIGHT

#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); i++)

__device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__device__ constexpr int parts_of(int a, int b) { return (a + b - 1) / b; }  // rounded up

constexpr int WARPS = 8, THREADS = 32 * WARPS;  // that compute; one more warp copies
constexpr int GROUP = HEADS / KV_HEADS;         // query heads of a key/value head
constexpr int QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM, ATTENDED = HEADS * HEAD_DIM;
constexpr int HALF = HEAD_DIM / 2;
constexpr size_t LAYER_OF_CACHE = (size_t)PAGES * PAGE * KV_HEADS * HEAD_DIM;
constexpr float MASKED = -1e30f;

// A stage of the ring holds a unit of 8 rows of up to 1,024 weights. Rows are padded, here and in
// the input, so that the 16-byte words that are read at once lie in different banks.
constexpr int UNIT = 8, CHUNK = 1024, PITCH = 2 * CHUNK + 64;
constexpr int UNITS = 8;          // whose sums a warp keeps at once
constexpr int TILE = 16;          // positions that a warp attends to at once
constexpr int MOST_ASKED = 256;   // positions that are fetched ahead
constexpr int WIDEST = most(most(HIDDEN, ATTENDED), FFN);
constexpr int INPUT_PITCH = 2 * WIDEST + (WIDEST % 64 ? 0 : 64);
constexpr int OWN_ROWS = UNIT * parts_of(HIDDEN / UNIT, BLOCKS);
constexpr int PIECES = parts_of(HIDDEN / 8, 32);  // of the hidden state, each for a warp

struct Shared {
  unsigned char ring[STAGES][UNIT * PITCH];
  unsigned char input[BATCH][INPUT_PITCH];  // of the product under way
  u16 query[8][HEAD_DIM];                   // rows from GROUP on are zeros
  u16 key[HEAD_DIM], value[HEAD_DIM];       // of the new position
  union {
    float sums[WARPS][UNITS][BATCH][UNIT];  // each warp's, of a product
    struct {
      float raw[GROUP + 2][HEAD_DIM];
      float sums[WARPS][GROUP][HEAD_DIM], maximum[WARPS][GROUP], total[WARPS][GROUP];
    } attention;
  };
  float residual[OWN_ROWS][BATCH];          // the rows that this block adds to
  float squares[BATCH][PIECES];             // of the product's input, for its norm
  u64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= 232448, "shared memory");
static_assert(BATCH * KV_HEADS * SPLITS <= BLOCKS && IN_FLIGHT <= STAGES, "plan");
static_assert(BATCH <= 16 && GROUP <= 8 && LAYERS <= 64, "sizes");
static_assert(HIDDEN % 32 == 0 && FFN % 32 == 0 && ATTENDED % 32 == 0, "sizes");

// Where each exchange of a layer has its words. All but LSE are pairs of bfloat16.
constexpr int LSE_PITCH = parts_of(SPLITS, 4) * 4;
constexpr int MAIL_HIDDEN = 0, MAIL_QKV = MAIL_HIDDEN + BATCH * HIDDEN / 2;
constexpr int MAIL_PART = MAIL_QKV + BATCH * QKV / 2;
constexpr int MAIL_LSE = MAIL_PART + BATCH * SPLITS * ATTENDED / 2;
constexpr int MAIL_MIDDLE = MAIL_LSE + BATCH * HEADS * LSE_PITCH;
constexpr int MAIL_GATED = MAIL_MIDDLE + BATCH * HIDDEN / 2;
constexpr int MAIL_WORDS = MAIL_GATED + BATCH * FFN / 2;  // of a layer

extern __shared__ __align__(128) unsigned char shared[];

// A block's units of all rows of a matrix.
struct Share {
  int first, units;
  __device__ Share(int rows, int block) {
    first = rows / UNIT * block / BLOCKS;
    units = rows / UNIT * (block + 1) / BLOCKS - first;
  }
};

// The parts that a context is cut into, and the old positions of each: a tile a warp, or more.
struct Parts {
  int old, per, count;
  __device__ explicit Parts(int context) {
    old = max(context - 1, 0);
    per = max(TILE * WARPS, (old / SPLITS + TILE) / TILE * TILE);
    count = max(parts_of(old, per), 1);
  }
};

// A block's part of the attention: one head's queries, and some positions of one sequence.
struct Task {
  int sequence, head, split, begin = 0, end = 0, last = -1;  // split > last: there is none
  const int* table;
  __device__ Task(int block, const int* contexts, const int* tables) {
    sequence = block / SPLITS / KV_HEADS, head = block / SPLITS % KV_HEADS, split = block % SPLITS;
    table = tables + sequence * TABLE;
    if (sequence >= BATCH) return;
    Parts parts(contexts[sequence]);
    begin = min(split * parts.per, parts.old), end = min(begin + parts.per, parts.old);
    last = parts.count - 1;
  }
  // An old position's key or value in a layer of the cache.
  __device__ const u16* at(const u16* cache, int position) const {
    size_t row = (size_t)table[position / PAGE] * PAGE + position % PAGE;
    return cache + (row * KV_HEADS + head) * HEAD_DIM;
  }
};

// A place in the ring, which both sides step through in the same order.
struct Place {
  int slot = 0;
  u32 phase = 0;
  __device__ void step() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

// ---- the copying warp

struct Copier {
  Shared& s;
  const int lane;
  Place place, before;  // before: IN_FLIGHT stages ago
  int count = 0;

  // Rows of [*, WIDTH] in units; unit i begins at row row_of(i).
  template <int WIDTH, class RowOf>
  __device__ void rows(const u16* weights, int units, RowOf row_of) {
    for (int done = 0; done < units; done += UNITS)
      for (int column = 0; column < WIDTH; column += CHUNK)
        for (int i = done; i < min(done + UNITS, units); i++) {
          u32 bytes = 2 * min(CHUNK, WIDTH - column);
          barrier_wait(&s.empty[place.slot], place.phase ^ 1);
          // Few copies are under way at a time: what is asked for long before its use would stand
          // in the way of the blocks' exchanges.
          if (count++ >= IN_FLIGHT) barrier_wait(&s.full[before.slot], before.phase), before.step();
          if (lane == 0) barrier_expect(&s.full[place.slot], UNIT * bytes);
          __syncwarp();
          if (lane < UNIT)
            copy_in(s.ring[place.slot] + lane * PITCH,
                    weights + (size_t)(row_of(i) + lane) * WIDTH + column, bytes,
                    &s.full[place.slot]);
          place.step();
        }
  }

  // Asks for keys or values, so that the L2 cache has them when the warps load them.
  __device__ void ask_for(const u16* cache, const Task& task) {
    constexpr int SECTORS = 2 * HEAD_DIM / 32;  // of 32 bytes
    for (int i = lane; i < min(task.end - task.begin, MOST_ASKED) * SECTORS; i += 32)
      fetch(task.at(cache, task.begin + i / SECTORS) + i % SECTORS * 16);
  }
};

// ---- the computing warps: what other blocks have told

__device__ const uint4* items(const void* words) { return reinterpret_cast<const uint4*>(words); }

// Whether all words of an item are there: `tell` never sends a zero, with which they begin.
__device__ bool has(uint4 item) { return item.x && item.y && item.z && item.w; }

// Looks at items until all are there; at(i) is the place of one, or null.
template <int COUNT, class At>
__device__ void await(uint4 (&found)[COUNT], At at) {
  EACH(i, COUNT) found[i] = make_uint4(0, 0, 0, 0);
  Deadline deadline;
  for (bool all = false; !all; deadline.check()) {
    EACH(i, COUNT) if (at(i) && !has(found[i])) found[i] = look(at(i));
    all = true;
    EACH(i, COUNT) all &= !at(i) || has(found[i]);
  }
}

__device__ float sum_of_warp(float x) {
  EACH(i, 5) x += shuffle_xor(x, 16 >> i);
  return x;
}

// Multiplies a pair by another; returns the sum of its squares before that.
__device__ float scale_pair(u32& pair, u32 by) {
  float a = low_of(pair), b = high_of(pair);
  pair = pack(a * low_of(by), b * high_of(by));
  return a * a + b * b;
}

struct Worker {
  Shared& s;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int quad = lane % 4, row = lane / 4;  // of this lane in an mma's fragments
  Place place;

  __device__ uint4& input(int sequence, int item) {
    return reinterpret_cast<uint4*>(s.input[sequence])[item];
  }

  // Receives [BATCH, WIDTH] as the input of a product, an item of 8 values a lane. With a norm, its
  // weights are applied here, and the root mean square to the product's result (`inverse`).
  template <int WIDTH, bool NORM>
  __device__ void receive(const u32* words, const u16* norm = nullptr) {
    constexpr int ITEMS = WIDTH / 8, PIECES = parts_of(ITEMS, 32), ALL = BATCH * PIECES;
    constexpr int COUNT = least(8, parts_of(ALL, WARPS));
    for (int first = warp; first < ALL; first += WARPS * COUNT) {
      uint4 found[COUNT], scale[COUNT];
      auto sequence = [&](int i) { return (first + i * WARPS) / PIECES; };
      auto item = [&](int i) { return (first + i * WARPS) % PIECES * 32 + lane; };
      auto exists = [&](int i) { return sequence(i) < BATCH && item(i) < ITEMS; };
      EACH(i, COUNT) if (NORM && exists(i)) scale[i] = items(norm)[item(i)];
      await(found, [&](int i) {
        return exists(i) ? items(words) + sequence(i) * ITEMS + item(i) : nullptr;
      });
      EACH(i, COUNT) {
        float squares = 0;
        if (NORM && exists(i))
          squares = scale_pair(found[i].x, scale[i].x) + scale_pair(found[i].y, scale[i].y) +
                    scale_pair(found[i].z, scale[i].z) + scale_pair(found[i].w, scale[i].w);
        if (exists(i)) input(sequence(i), item(i)) = found[i];
        if (NORM) squares = sum_of_warp(squares);
        if (NORM && lane == 0 && sequence(i) < BATCH)
          s.squares[sequence(i)][item(i) / 32] = squares;
      }
    }
    sync_computing();
  }

  // 1 / the root mean square of what `receive` got for a sequence.
  __device__ float inverse(int sequence) {
    float sum = 0;
    EACH(i, PIECES) sum += s.squares[sequence][i];
    return rsqrt_of(sum / HIDDEN + EPS);
  }

  // Receives the attention's outputs of all parts of the contexts, each with the base-2 logarithm
  // of its softmax's denominator, and merges them as the input of a product.
  __device__ void receive_attended(const u32* parts, const u32* lse, const int* contexts) {
    constexpr int ITEMS = ATTENDED / 8, OF_HEAD = HEAD_DIM / 8, ALL = BATCH * ITEMS;
    constexpr int AT_ONCE = least(SPLITS, 8), EACH_ITEM = AT_ONCE + parts_of(AT_ONCE, 4);
    constexpr int COUNT = least(parts_of(ALL, THREADS), 8 / AT_ONCE);
    for (int first = thread; first < ALL; first += THREADS * COUNT) {
      float y[COUNT][8] = {}, highest[COUNT], total[COUNT] = {};
      int count[COUNT], longest = 1;
      auto item = [&](int i) { return first + i * THREADS; };
      EACH(i, COUNT) {
        highest[i] = MASKED;
        count[i] = item(i) < ALL ? Parts(contexts[item(i) / ITEMS]).count : 0;
        longest = max(longest, count[i]);
      }
      for (int part = 0; part < longest; part += AT_ONCE) {
        uint4 found[COUNT * EACH_ITEM];  // parts, then the logarithms of four at a time
        await(found, [&](int i) -> const uint4* {
          int head = item(i / EACH_ITEM) / OF_HEAD, j = i % EACH_ITEM, log = j - AT_ONCE;
          if (part + (log < 0 ? j : 4 * log) >= count[i / EACH_ITEM]) return nullptr;
          if (log >= 0) return items(lse + head * LSE_PITCH + part) + log;
          int at = (head * SPLITS + part + j) * OF_HEAD;
          return items(parts) + at + item(i / EACH_ITEM) % OF_HEAD;
        });
        EACH(i, COUNT) EACH(j, AT_ONCE) {
          if (part + j >= count[i]) continue;
          uint4 v = found[i * EACH_ITEM + j], logs = found[i * EACH_ITEM + AT_ONCE + j / 4];
          u32 pairs[4] = {v.x, v.y, v.z, v.w}, log[4] = {logs.x, logs.y, logs.z, logs.w};
          float higher = fmaxf(highest[i], __uint_as_float(log[j % 4]));
          float shrink = exp_2(highest[i] - higher);
          float weight = exp_2(__uint_as_float(log[j % 4]) - higher);
          highest[i] = higher;
          total[i] = total[i] * shrink + weight;
          EACH(k, 8) {
            float value = k % 2 ? high_of(pairs[k / 2]) : low_of(pairs[k / 2]);
            y[i][k] = y[i][k] * shrink + weight * value;
          }
        }
      }
      EACH(i, COUNT) {
        if (item(i) >= ALL) continue;
        EACH(k, 8) y[i][k] /= total[i];
        input(item(i) / ITEMS, item(i) % ITEMS) =
            make_uint4(pack(y[i][0], y[i][1]), pack(y[i][2], y[i][3]), pack(y[i][4], y[i][5]),
                       pack(y[i][6], y[i][7]));
      }
    }
    sync_computing();
  }

  // ---- products

  // Multiplies this block's units of a matrix [*, WIDTH] with the input. All warps share a unit:
  // each takes every eighth 32 of its columns. (Which column is which k of an mma does not matter,
  // if input and weights agree: a lane's 16 bytes serve two of them.) Then done(first, units) may
  // read `sum`.
  template <int WIDTH, class Done>
  __device__ void product(int all, Done done) {
    constexpr int STEPS = CHUNK / 32 / WARPS;
    for (int first = 0; first < all; first += UNITS) {
      float sums[UNITS][2][4] = {};
      for (int column = 0; column < WIDTH; column += CHUNK) {
        uint4 x[STEPS][2];  // of sequence `row`, and of that plus 8
        auto at = [&](int step) { return (step * WARPS + warp) * 32; };
        EACH(i, STEPS) EACH(j, 2) {
          bool exists = column + at(i) < WIDTH && row + 8 * j < BATCH;
          x[i][j] = exists ? input(row + 8 * j, (column + at(i)) / 8 + quad) : uint4{};
        }
        EACH(unit, UNITS) {
          if (first + unit >= all) continue;
          barrier_wait(&s.full[place.slot], place.phase);
          const unsigned char* weights = s.ring[place.slot] + row * PITCH;
          EACH(i, STEPS) {
            if (column + at(i) >= WIDTH) continue;
            uint4 w = items(weights)[at(i) / 8 + quad], a = x[i][0], b = x[i][1];
            mma16(sums[unit][i % 2], a.x, b.x, a.y, b.y, w.x, w.y);
            mma16(sums[unit][i % 2], a.z, b.z, a.w, b.w, w.z, w.w);
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(&s.empty[place.slot]);
          place.step();
        }
      }
      EACH(unit, UNITS) EACH(i, 4) {
        if (row + i / 2 * 8 < BATCH)
          s.sums[warp][unit][row + i / 2 * 8][2 * quad + i % 2] =
              sums[unit][0][i] + sums[unit][1][i];
      }
      sync_computing();
      done(first, min(UNITS, all - first));
      sync_computing();
    }
  }

  // Two rows' sums over all warps, times a factor.
  __device__ float2 sum(int unit, int sequence, int pair, float factor = 1) {
    float2 y = make_float2(0, 0);
    EACH(i, WARPS) {
      float2 part = *reinterpret_cast<float2*>(&s.sums[i][unit][sequence][2 * pair]);
      y.x += part.x, y.y += part.y;
    }
    return make_float2(y.x * factor, y.y * factor);
  }

  // Calls f(unit, sequence, pair) for each pair of rows of some units.
  template <class F>
  __device__ void each_pair(int units, F f) {
    for (int i = thread; i < units * BATCH * 4; i += THREADS)
      f(i / (BATCH * 4), i / 4 % BATCH, i % 4);
  }
};

// ---- attention

// One warp's online softmax over tiles of positions, for the queries of one group.
struct Softmax {
  static constexpr int WORDS = HEAD_DIM / 32;  // of 16 bytes, that a lane has of a row
  const int lane = threadIdx.x % 32, quad = lane % 4, row = lane / 4;
  uint4 q[WORDS];                     // of query `row`, as `load` gives them
  float maximum = MASKED, total = 0;  // of that query; total: over this lane's positions
  // Products of mmas whose rows are elements, and whose columns are queries (`store` says which).
  float sums[2 * WORDS][4] = {};

  // A lane's words of a key, value or query: 8 elements of each 32.
  __device__ void load(uint4 (&words)[WORDS], const u16* from) const {
    EACH(i, WORDS) words[i] = from ? items(from)[4 * i + quad] : make_uint4(0, 0, 0, 0);
  }

  // Returns the weights of `count` keys, of which this lane holds `row` and that plus 8, for query
  // `row`: of positions 2 quad and 2 quad + 1, and of these plus 8.
  __device__ uint2 score(const uint4 (&k)[2][WORDS], int count) {
    float scores[2][4] = {}, s[4], highest = maximum;
    EACH(i, WORDS) EACH(j, 2) {
      mma16(scores[j], q[i].x, 0, q[i].y, 0, k[j][i].x, k[j][i].y);
      mma16(scores[j], q[i].z, 0, q[i].w, 0, k[j][i].z, k[j][i].w);
    }
    EACH(i, 4) {
      bool exists = i / 2 * 8 + 2 * quad + i % 2 < count;
      s[i] = exists ? scores[i / 2][i % 2] * SCALE_LOG2E : MASKED;
      highest = fmaxf(highest, s[i]);
    }
    EACH(i, 2) highest = fmaxf(highest, shuffle_xor(highest, 1 + i));
    float shrink = exp_2(maximum - highest);
    maximum = highest;
    total *= shrink;
    EACH(i, 4) total += s[i] = exp_2(s[i] - highest);
    float of_column[2] = {shuffle(shrink, 8 * quad), shuffle(shrink, 8 * quad + 4)};
    EACH(i, 2 * WORDS) EACH(j, 4) sums[i][j] *= of_column[j % 2];
    return make_uint2(pack(s[0], s[1]), pack(s[2], s[3]));
  }

  __device__ void add(uint2 weights, const uint4 (&v)[2][WORDS]) {
    EACH(i, WORDS) {
      uint4 a = v[0][i], b = v[1][i];
      mma16(sums[2 * i], transpose(a.x), transpose(a.y), transpose(b.x), transpose(b.y), weights.x,
            weights.y);
      mma16(sums[2 * i + 1], transpose(a.z), transpose(a.w), transpose(b.z), transpose(b.w),
            weights.x, weights.y);
    }
  }

  __device__ void store(float (&to)[GROUP][HEAD_DIM], float& maximum_of_row, float& total_of_row) {
    EACH(i, 2) total += shuffle_xor(total, 1 + i);
    if (row < GROUP && quad == 0) maximum_of_row = maximum, total_of_row = total;
    EACH(i, 8 * WORDS) {
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
  const Share of_qkv(QKV, block), own(HIDDEN, block), of_ffn(FFN, block);
  const Task task(block, contexts, tables);
  if (thread == 0) {
    EACH(i, STAGES) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], WARPS);
    barriers_ready();
  }
  __syncthreads();

  if (thread >= THREADS) {
    Copier copier{s, thread - THREADS};
    for (size_t layer = 0; layer < LAYERS; layer++) {
      if (copier.lane < own.units) {  // the norms' weights, which the warps load without the ring
        size_t at = layer * HIDDEN + (own.first + copier.lane) * UNIT;
        fetch(input_norm + at), fetch(post_norm + at);
      }
      copier.ask_for(k_cache + layer * LAYER_OF_CACHE, task);
      copier.ask_for(v_cache + layer * LAYER_OF_CACHE, task);
      auto own_row = [&](int i) { return (own.first + i) * UNIT; };
      copier.rows<HIDDEN>(qkv + layer * QKV * HIDDEN, of_qkv.units,
                          [&](int i) { return (of_qkv.first + i) * UNIT; });
      copier.rows<ATTENDED>(o + layer * HIDDEN * ATTENDED, own.units, own_row);
      copier.rows<HIDDEN>(gate_up + layer * 2 * FFN * HIDDEN, 2 * of_ffn.units, [&](int i) {
        return i % 2 * FFN + (of_ffn.first + i / 2) * UNIT;  // gate and up in turns
      });
      copier.rows<FFN>(down + layer * HIDDEN * FFN, own.units, own_row);
    }
    return;
  }

  Worker w{s};
  const int warp = w.warp, lane = w.lane, row = w.row;
  for (int i = thread; i < 8 * HEAD_DIM; i += THREADS) s.query[i / HEAD_DIM][i % HEAD_DIM] = 0;
  // A pair of own rows in [BATCH, HIDDEN / 2].
  auto own_pair = [&](int unit, int b, int pair) {
    return b * HIDDEN / 2 + (own.first + unit) * UNIT / 2 + pair;
  };
  // Every block begins with its own rows, told like those of a layer.
  w.each_pair(own.units, [&](int unit, int b, int pair) {
    u32 word = reinterpret_cast<const u32*>(x)[own_pair(unit, b, pair)];
    s.residual[unit * UNIT + 2 * pair][b] = low_of(word);
    s.residual[unit * UNIT + 2 * pair + 1][b] = high_of(word);
    tell(mail + MAIL_HIDDEN + own_pair(unit, b, pair), word);
  });
  sync_computing();

  for (int layer = 0; layer < LAYERS; layer++) {
    u32* const words = mail + layer * MAIL_WORDS;

    // ---- queries, keys and values
    w.receive<HIDDEN, true>(words + MAIL_HIDDEN, input_norm + layer * HIDDEN);
    w.product<HIDDEN>(of_qkv.units, [&](int first, int units) {
      w.each_pair(units, [&](int unit, int b, int pair) {
        int at = (of_qkv.first + first + unit) * UNIT / 2 + pair;
        float2 y = w.sum(unit, b, pair, w.inverse(b));
        if (QKV_BIAS) {
          u32 bias = reinterpret_cast<const u32*>(qkv_bias)[layer * QKV / 2 + at];
          y.x += low_of(bias), y.y += high_of(bias);
        }
        tell(words + MAIL_QKV + b * QKV / 2 + at, pack(y.x, y.y));
      });
    });

    // ---- attention
    if (task.split <= task.last) {
      auto& a = s.attention;
      // The first keys and values are on their way while the new ones are waited for.
      Softmax softmax;
      uint4 k[2][Softmax::WORDS], v[2][Softmax::WORDS];
      int tile = task.begin + warp * TILE;
      auto load = [&](uint4 (&words)[2][Softmax::WORDS], const u16* cache) {
        EACH(i, 2) {
          int at = tile + row + 8 * i;
          const u16* of_layer = cache + layer * LAYER_OF_CACHE;
          softmax.load(words[i], at < task.end ? task.at(of_layer, at) : nullptr);
        }
      };
      load(k, k_cache);
      load(v, v_cache);

      constexpr int OF_ROW = HEAD_DIM / 8, ITEMS = (GROUP + 2) * OF_ROW;
      for (int i = thread; i < ITEMS; i += THREADS) {
        uint4 found[1];
        await(found, [&](int) {
          return items(words + MAIL_QKV + task.sequence * QKV / 2) + task.head * ITEMS + i;
        });
        u32 pairs[4] = {found[0].x, found[0].y, found[0].z, found[0].w};
        float* to = a.raw[i / OF_ROW] + i % OF_ROW * 8;
        EACH(j, 8) to[j] = j % 2 ? high_of(pairs[j / 2]) : low_of(pairs[j / 2]);
      }
      sync_computing();
      const int slot = task.split == task.last ? slots[task.sequence] : -1;
      for (int r = warp; r < GROUP + 2; r += WARPS) {  // queries, the key, the value
        const bool is_query = r < GROUP, is_value = r == GROUP + 1;
        u16* to = is_query ? s.query[r] : is_value ? s.value : s.key;
        u16* cache = (is_value ? v_cache : k_cache) + layer * LAYER_OF_CACHE;
        cache += ((size_t)slot * KV_HEADS + task.head) * HEAD_DIM;
        const u16* scale = (is_query ? q_norm : k_norm) + layer * HEAD_DIM;
        float inverse = 1, squares = 0;
        for (int i = lane; i < HEAD_DIM; i += 32) squares += a.raw[r][i] * a.raw[r][i];
        if (QK_NORM && !is_value) inverse = rsqrt_of(sum_of_warp(squares) / HEAD_DIM + EPS);
        for (int i = lane; i < HALF; i += 32) {  // RoPE turns i and i + HALF together
          float p = a.raw[r][i] * inverse, q = a.raw[r][i + HALF] * inverse, c = 1, d = 0;
          if (QK_NORM && !is_value) p *= low_of(scale[i]), q *= low_of(scale[i + HALF]);
          if (!is_value && !(NO_ROPE_BITS >> layer & 1))
            c = cos[task.sequence * HALF + i], d = sin[task.sequence * HALF + i];
          u32 turned = pack(p * c - q * d, q * c + p * d);
          to[i] = turned, to[i + HALF] = turned >> 16;
          if (!is_query && slot >= 0) cache[i] = turned, cache[i + HALF] = turned >> 16;
        }
      }
      sync_computing();

      softmax.load(softmax.q, s.query[row]);
      while (tile < task.end) {
        uint2 weights = softmax.score(k, task.end - tile);
        tile += TILE * WARPS;
        load(k, k_cache);
        softmax.add(weights, v);
        load(v, v_cache);
      }
      if (warp == WARPS - 1 && task.split == task.last) {  // the new position
        softmax.load(k[0], row == 0 ? s.key : nullptr);
        softmax.load(v[0], row == 0 ? s.value : nullptr);
        softmax.add(softmax.score(k, 1), v);
      }
      softmax.store(a.sums[warp], a.maximum[warp][row % GROUP], a.total[warp][row % GROUP]);
      sync_computing();
      for (int i = thread; i < GROUP * HALF; i += THREADS) {  // the warps' results, merged
        int g = i / HALF, pair = i % HALF, of_head = task.sequence * HEADS + task.head * GROUP + g;
        float highest = MASKED, all = 0, y[2] = {};
        EACH(j, WARPS) highest = fmaxf(highest, a.maximum[j][g]);
        EACH(j, WARPS) {
          float weight = exp_2(a.maximum[j][g] - highest);
          all += weight * a.total[j][g];
          EACH(n, 2) y[n] += weight * a.sums[j][g][2 * pair + n];
        }
        tell(words + MAIL_PART + (of_head * SPLITS + task.split) * HALF + pair,
             pack(y[0] / all, y[1] / all));
        if (SPLITS == 1 || pair > 0) continue;
        u32* lse = words + MAIL_LSE + of_head * LSE_PITCH;
        tell(lse + task.split, __float_as_uint(highest + log_2(all)));
        for (int j = task.last + 1; task.split == task.last && j < LSE_PITCH; j++)
          tell(lse + j, __float_as_uint(MASKED));  // so that readers find whole items
      }
      sync_computing();
    }

    // ---- the projection of the attention's output, and the residual
    if (SPLITS == 1) w.receive<ATTENDED, false>(words + MAIL_PART);
    else w.receive_attended(words + MAIL_PART, words + MAIL_LSE, contexts);
    auto add = [&](int unit, int b, int pair, float2 y) {
      y.x = s.residual[unit * UNIT + 2 * pair][b] += y.x;
      y.y = s.residual[unit * UNIT + 2 * pair + 1][b] += y.y;
      return pack(y.x, y.y);
    };
    w.product<ATTENDED>(own.units, [&](int first, int units) {
      w.each_pair(units, [&](int unit, int b, int pair) {
        tell(words + MAIL_MIDDLE + own_pair(first + unit, b, pair),
             add(first + unit, b, pair, w.sum(unit, b, pair)));
      });
    });

    // ---- gate and up
    w.receive<HIDDEN, true>(words + MAIL_MIDDLE, post_norm + layer * HIDDEN);
    w.product<HIDDEN>(2 * of_ffn.units, [&](int first, int units) {
      w.each_pair(units / 2, [&](int unit, int b, int pair) {
        float2 gate = w.sum(2 * unit, b, pair, w.inverse(b));
        float2 up = w.sum(2 * unit + 1, b, pair, w.inverse(b));
        tell(words + MAIL_GATED + b * FFN / 2 + (of_ffn.first + first / 2 + unit) * UNIT / 2 + pair,
             pack(silu(gate.x) * up.x, silu(gate.y) * up.y));
      });
    });

    // ---- down, and the residual
    w.receive<FFN, false>(words + MAIL_GATED);
    w.product<FFN>(own.units, [&](int first, int units) {
      w.each_pair(units, [&](int unit, int b, int pair) {
        u32 y = add(first + unit, b, pair, w.sum(unit, b, pair));
        int at = own_pair(first + unit, b, pair);
        if (layer + 1 < LAYERS) tell(words + MAIL_WORDS + MAIL_HIDDEN + at, y);
        else reinterpret_cast<u32*>(hidden)[at] = y;
      });
    });
  }
}
