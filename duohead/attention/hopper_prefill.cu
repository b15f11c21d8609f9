// Attention of heads that see sinks and a band, or everything, for Hopper: duohead/attention/hopper_launch.py completes
// this source with the constants D (head size), R (query heads per KV head), BN (keys of a block) and HALF16 (0: bf16,
// 1: fp16) and with the matrix instructions qk_step and pv_step for these sizes, and compiles it at run time.
//
// One block of threads stays on each multiprocessor and walks over query tiles. Its first warp group fetches, the other
// two compute, each for R x TW rows (TW tokens of the R heads that share a KV head). They take turns: while one waits
// for the tensor cores the other is in its softmax. A tile's last product with V is issued together with the next
// tile's first product with K, so that tiles follow each other without a gap.
//
// A tile reads its band from the oldest key on, then the sinks, so every row sees two intervals of this order. A block
// that lies in one place comes with one instruction, one that does not is put together from units of 16 keys.

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int TW = 64 / R;          // tokens of a warp group
constexpr int TT = 2 * TW;          // tokens of a tile
constexpr int UNIT = 16;
constexpr int UB = BN / UNIT;       // units of a block
constexpr int HALVES = D / 64;      // a row of 64 values is what one swizzled line holds
constexpr int SLOTS = 4;            // blocks of K or V in flight
constexpr int SLOT = BN * D * 2;
constexpr int Q_WG = 64 * D * 2;    // queries, later outputs, of one warp group
constexpr int Q_TILE = 2 * Q_WG;

struct alignas(64) Map { u64 opaque[16]; };

__device__ __forceinline__ u32 smem_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void bar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void bar_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void bar_wait(u32 bar, u32 phase) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar), "r"(phase)
      : "memory");
}
__device__ __forceinline__ void fetch5(u32 dst, const Map* map, u32 bar, int x, int y, int z, int g, int b) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
      ::"r"(dst), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(g), "r"(b)
      : "memory");
}
__device__ __forceinline__ void put5(const Map* map, u32 src, int x, int r, int t, int g, int b) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               ::"l"(map), "r"(src), "r"(x), "r"(r), "r"(t), "r"(g), "r"(b)
               : "memory");
}
__device__ __forceinline__ void turn_wait(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void turn_give(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// The compiler must not read what a matrix instruction writes before it has been waited for.
template <int N>
__device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
__device__ __forceinline__ int load(const int* p) { return __ldg(p); }
__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
#if HALF16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
  return y;
}
// Shared memory as the tensor cores see it: lines of 128 bytes, swizzled, 1024 bytes between groups of 8 lines. For V,
// whose contiguous direction is not the one that is summed over, `leading` is the way between columns of 64 values.
__device__ __forceinline__ u64 matrix(u32 address, u32 leading) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// @instructions@

// Scores of a warp group's rows, and more of its outputs. An address in a descriptor counts in 16 bytes.
__device__ __forceinline__ void qk_mma(float (&s)[BN / 2], u32 queries, u32 keys) {
  u64 q = matrix(queries, 16), k = matrix(keys, 16);
#pragma unroll
  for (int step = 0; step < D / 16; ++step)
    qk_step(s, q + ((step / 4 * 64 * 128 + step % 4 * 32) >> 4), k + ((step / 4 * BN * 128 + step % 4 * 32) >> 4),
            step > 0);
}
__device__ __forceinline__ void pv_mma(float (&o)[D / 2], const u32 (&p)[BN / 4], u32 values, bool more) {
  u64 v = matrix(values, BN * 128);
#pragma unroll
  for (int step = 0; step < UB; ++step)
    pv_step(o, &p[4 * step], v + (step * UNIT * 128 >> 4), more || step > 0);
}

// @tiles: from here to the next mark there is nothing but arithmetic, which a test compiles for the CPU.
struct Numbers {
  int queries, keys, sinks, reach, ring, kv_heads, rows, tiles, section;
  float scale_log2;
};

// What one tile reads. Indices of keys count from the first new one; the ring lies before it.
struct Tile {
  int token, group, row;  // first token, KV head of the view, batch row
  int own;                // index of the first token's own key
  int low;                // first index that is a real token and no sink
  int oldest;             // first index of the band, a multiple of UNIT
  int band_units, units, blocks;

  __device__ __forceinline__ void set(int number, const Numbers& n, const int* facts) {
    // In sections of heads, each from its longest tiles on, or head by head along the text.
    int tile = number % n.tiles, head = number / n.tiles;
    if (n.section) {
      int before = number / (n.section * n.tiles) * n.section, within = number - before * n.tiles;
      int heads = min(n.section, n.kv_heads * n.rows - before);
      tile = n.tiles - 1 - within / heads;
      head = before + within % heads;
    }
    token = tile * TT;
    group = head % n.kv_heads;
    row = head / n.kv_heads;
    own = token + n.keys - n.queries;
    low = load(facts + 2 * row);
    oldest = min(max(own - n.reach + 1, low), own) & ~(UNIT - 1);
    band_units = (own + TT - 1 - oldest) / UNIT + 1;
    units = band_units + (n.sinks + UNIT - 1) / UNIT;
    blocks = (units + UB - 1) / UB;
  }
  // Index of the first key of a unit: of the sinks from `band_units` on, else of the new keys (negative: of the ring).
  __device__ __forceinline__ int origin(int unit) const {
    return unit < band_units ? oldest + unit * UNIT : (unit - band_units) * UNIT;
  }
  // Whether a block is one stretch of one tensor. The copy engine puts zeros where the stretch leaves it.
  __device__ __forceinline__ bool is_stretch(int block) const {
    int first = block * UB, end = first + UB;
    if (first >= band_units) return true;
    int from = oldest + first * UNIT;
    if (end >= units ? units > band_units : end > band_units) return false;
    return from >= 0 || from + BN <= 0;
  }
};

// What a row sees of its tile's order: `band` keys from `from` on, and `sinks` keys from `first_sink` on.
struct Row {
  int from, band, first_sink, sinks;

  __device__ __forceinline__ void set(const Tile& tile, int token, const Numbers& n, int start) {
    int own = token + n.keys - n.queries;
    from = max(own - n.reach + 1, tile.low) - tile.oldest;
    band = max(own + 1 - tile.oldest - from, 0);
    first_sink = tile.band_units * UNIT;
    sinks = max(min(n.sinks, token + start + 1), 0);
  }
  // One comparison for each interval: a negative distance is a large one.
  __device__ __forceinline__ bool sees(int at) const {
    return ((u32)(at - from) < (u32)band) | ((u32)(at - first_sink) < (u32)sinks);
  }
  __device__ __forceinline__ bool sees_all(int begin, int count) const {
    return (from <= begin & begin + count <= from + band) | (first_sink <= begin & begin + count <= first_sink + sinks);
  }
};

// What every row of the tile sees, in the same form.
__device__ __forceinline__ Row common(const Tile& tile, const Numbers& n, int start) {
  Row first, last;
  first.set(tile, tile.token, n, start);
  last.set(tile, tile.token + TT - 1, n, start);
  first.band = max(first.from + first.band - last.from, 0);
  first.from = last.from;
  return first;
}

// @end of tiles

// Each tensor in boxes of a block and of a unit.
struct KeyMaps { Map fresh[2], ring[2], sinks[2]; };
struct Maps { const Map *fresh, *ring, *sinks; };

__device__ __forceinline__ void fetch_block(const Tile& tile, int block, const Maps& maps, const Numbers& n, u32 slot,
                                            u32 bar) {
  int first = block * UB;
  if (tile.is_stretch(block)) {
    int at = tile.origin(first);
    const Map* map = first >= tile.band_units ? maps.sinks : at < 0 ? maps.ring : maps.fresh;
    if (first < tile.band_units && at < 0) at += n.ring;
    bar_expect(bar, SLOT);
    fetch5(slot, map, bar, 0, at, 0, tile.group, tile.row);
    return;
  }
  int last = min(first + UB, tile.units);
  bar_expect(bar, (last - first) * UNIT * D * 2);
  for (int unit = first; unit < last; ++unit) {
    int at = tile.origin(unit);
    const Map* map = unit >= tile.band_units ? maps.sinks : at < 0 ? maps.ring : maps.fresh;
    if (unit < tile.band_units && at < 0) at += n.ring;
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
      fetch5(slot + (unit - first) * UNIT * 128 + half * BN * 128, map + 1, bar, 0, at, half, tile.group, tile.row);
  }
}

struct Softmax {
  float top[2], total[2];
  __device__ __forceinline__ void reset() {
    top[0] = top[1] = -INFINITY;
    total[0] = total[1] = 0.f;
  }
  // Scores become weights in place; `fade` is what earlier sums shrink by.
  __device__ __forceinline__ void absorb(float (&s)[BN / 2], float scale, float (&fade)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = top[r];
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) best = fmaxf(best, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      // A row that has seen nothing yet must not subtract infinity from infinity.
      float base = best == -INFINITY ? 0.f : best * scale;
      fade[r] = exp2_(top[r] * scale - base);
      top[r] = best;
      float sum0 = 0.f, sum1 = 0.f;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        float a = exp2_(fmaf(s[4 * j + 2 * r], scale, -base)), b = exp2_(fmaf(s[4 * j + 2 * r + 1], scale, -base));
        s[4 * j + 2 * r] = a;
        s[4 * j + 2 * r + 1] = b;
        sum0 += a;
        sum1 += b;
      }
      total[r] = total[r] * fade[r] + sum0 + sum1;
    }
  }
};

// Hides what a row must not see, in those units where there is such a thing.
__device__ __forceinline__ void hide(float (&s)[BN / 2], const Row& all, const Row (&rows)[2], int begin, int lane) {
  if (all.sees_all(begin, BN)) return;
  int at = begin + 2 * (lane % 4);
#pragma unroll
  for (int unit = 0; unit < UB; ++unit) {
    if (all.sees_all(begin + unit * UNIT, UNIT)) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = s[unit * 8 + i];
      x = rows[i / 2 % 2].sees(at + unit * UNIT + 8 * (i / 4) + i % 2) ? x : -INFINITY;
    }
  }
}

__device__ __forceinline__ void to_weights(const float (&s)[BN / 2], u32 (&p)[BN / 4]) {
#pragma unroll
  for (int j = 0; j < BN / 4; ++j) p[j] = pack(s[2 * j], s[2 * j + 1]);
}

// Normalised outputs of a warp group go through the memory of their queries, which nobody needs any more.
__device__ __forceinline__ void finish(float (&o)[D / 2], Softmax& soft, const Map* out, u32 place, int wg, int thread,
                                       const Tile& tile, int kv_head, const float* logits, float scale) {
  float share[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = soft.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (logits) {
      int member = (thread / 32 * 16 + thread % 32 / 4 + 8 * r) % R;
      float logit = logits[kv_head * R + member] * 1.4426950408889634f;
      // Nothing seen: the logit takes all the weight, and the output is zero.
      total += exp2_(logit - (soft.top[r] == -INFINITY ? logit : soft.top[r] * scale));
    }
    share[r] = total > 0.f ? __frcp_rn(total) : 0.f;
  }
  int lane = thread % 32, matrix_of = lane / 8;
  int line = thread / 32 * 16 + (matrix_of & 1) * 8 + lane % 8;
#pragma unroll
  for (int j = 0; j < D / 8; j += 2) {
    int column = j + (matrix_of >> 1);
    u32 at = place + column / 8 * 64 * 128 + line * 128 + ((column % 8) ^ (line % 8)) * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(pack(o[4 * j] * share[0], o[4 * j + 1] * share[0])),
                 "r"(pack(o[4 * j + 2] * share[1], o[4 * j + 3] * share[1])),
                 "r"(pack(o[4 * j + 4] * share[0], o[4 * j + 5] * share[0])),
                 "r"(pack(o[4 * j + 6] * share[1], o[4 * j + 7] * share[1]))
                 : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(4 + wg) : "memory");
  if (thread == 0) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
      put5(out, place + half * 64 * 128, half * 64, 0, tile.token + wg * TW, kv_head, tile.row);
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attend(const __grid_constant__ Map query_map, const __grid_constant__ Map out_map,
           const __grid_constant__ KeyMaps key_maps, const __grid_constant__ KeyMaps value_maps, const int* facts,
           const long long* heads, const float* logits, const Numbers n) {
  extern __shared__ char raw[];
  u32 base = (smem_of(raw) + 1023) & ~1023u;
  u32 slots = base, queries = base + SLOTS * SLOT, bars = queries + 2 * Q_TILE;
  u32 full = bars, empty = bars + 8 * SLOTS, q_full = bars + 16 * SLOTS, q_empty = q_full + 16;
  int wg = threadIdx.x / 128, thread = threadIdx.x % 128;
  // What no fetch fills, the end of a last block, is multiplied by zero, so it must be finite.
  for (u32 at = threadIdx.x * 16; at < SLOTS * SLOT + 2 * Q_TILE; at += 384 * 16)
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(base + at), "r"(0) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      bar_init(full + 8 * i, 1);
      bar_init(empty + 8 * i, 8);
    }
    for (int i = 0; i < 2; ++i) {
      bar_init(q_full + 8 * i, 1);
      bar_init(q_empty + 8 * i, 2);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  int count = n.tiles * n.kv_heads * n.rows;

  if (wg == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      Maps keys{key_maps.fresh, key_maps.ring, key_maps.sinks};
      Maps values{value_maps.fresh, value_maps.ring, value_maps.sinks};
      u32 slot = 0, phase = 1, turn = 0;
      Tile tile, before;
      int last = -1;  // block of V still to fetch, of the tile `before`
      auto put = [&](const Tile& of, int block, const Maps& maps) {
        bar_wait(empty + 8 * slot, phase);
        fetch_block(of, block, maps, n, slots + slot * SLOT, full + 8 * slot);
        if (++slot == SLOTS) slot = 0, phase ^= 1;
      };
      for (int number = blockIdx.x; number < count; number += gridDim.x, ++turn) {
        tile.set(number, n, facts);
        u32 buffer = turn & 1;
        bar_wait(q_empty + 8 * buffer, (turn >> 1 & 1) ^ 1);
        bar_expect(q_full + 8 * buffer, 2 * R * TW * D * 2);
        int kv_head = heads ? (int)__ldg(heads + tile.group) : tile.group;
        for (int w = 0; w < 2; ++w)
#pragma unroll
          for (int half = 0; half < HALVES; ++half)
            fetch5(queries + buffer * Q_TILE + w * Q_WG + half * 64 * 128, &query_map, q_full + 8 * buffer, half * 64,
                   0, tile.token + w * TW, kv_head, tile.row);
        put(tile, 0, keys);
        if (last >= 0) put(before, last, values);
        for (int block = 1; block < tile.blocks; ++block) {
          put(tile, block, keys);
          put(tile, block - 1, values);
        }
        before = tile;
        last = tile.blocks - 1;
      }
      if (last >= 0) put(before, last, values);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    --wg;
    int lane = thread % 32;
    int line = thread / 32 * 16 + lane / 4;
    float s[BN / 2], o[D / 2];
    u32 p[BN / 4];
    Softmax soft;
    float fade[2];
    u32 slot = 0, phase = 0, turn = 0;
    Tile tile, before;
    auto release = [&](u32 of) {
      if (lane == 0) bar_arrive(empty + 8 * of);
    };
    auto next = [&](u32& index) {
      index = slot;
      bar_wait(full + 8 * slot, phase);
      if (++slot == SLOTS) slot = 0, phase ^= 1;
    };
    if (wg == 1) turn_give(2);
    int number = blockIdx.x;
    int blocks_before = 0;
    u32 k_slot, v_slot;
    for (; number < count; number += gridDim.x, ++turn) {
      tile.set(number, n, facts);
      int start = load(facts + 2 * tile.row + 1);
      Row rows[2], all = common(tile, n, start);
      rows[0].set(tile, tile.token + wg * TW + line / R, n, start);
      rows[1].set(tile, tile.token + wg * TW + (line + 8) / R, n, start);
      u32 place = queries + (turn & 1) * Q_TILE + wg * Q_WG;
      bar_wait(q_full + 8 * (turn & 1), turn >> 1 & 1);
      next(k_slot);
      turn_wait(2 + wg);
      mma_fence();
      qk_mma(s, place, slots + k_slot * SLOT);
      mma_commit();
      if (turn > 0) {
        next(v_slot);
        pv_mma(o, p, slots + v_slot * SLOT, blocks_before > 1);
        mma_commit();
        turn_give(3 - wg);
        mma_wait<1>();
        hold(s);
        release(k_slot);
        mma_wait<0>();
        hold(o);
        release(v_slot);
        u32 buffer = (turn - 1) & 1;
        int kv_head = heads ? (int)__ldg(heads + before.group) : before.group;
        finish(o, soft, &out_map, queries + buffer * Q_TILE + wg * Q_WG, wg, thread, before, kv_head, logits,
               n.scale_log2);
      } else {
        turn_give(3 - wg);
        mma_wait<0>();
        hold(s);
        release(k_slot);
      }
      soft.reset();
      hide(s, all, rows, 0, lane);
      soft.absorb(s, n.scale_log2, fade);
      to_weights(s, p);
      // The outputs have left their memory by now, so new queries may come.
      if (turn > 0 && thread == 0) {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        bar_arrive(q_empty + 8 * ((turn - 1) & 1));
      }
      for (int block = 1; block < tile.blocks; ++block) {
        next(k_slot);
        turn_wait(2 + wg);
        mma_fence();
        qk_mma(s, place, slots + k_slot * SLOT);
        mma_commit();
        next(v_slot);
        pv_mma(o, p, slots + v_slot * SLOT, block > 1);
        mma_commit();
        turn_give(3 - wg);
        mma_wait<1>();
        hold(s);
        release(k_slot);
        hide(s, all, rows, block * BN, lane);
        soft.absorb(s, n.scale_log2, fade);
        mma_wait<0>();
        hold(o);
        release(v_slot);
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          o[4 * j] *= fade[0];
          o[4 * j + 1] *= fade[0];
          o[4 * j + 2] *= fade[1];
          o[4 * j + 3] *= fade[1];
        }
        to_weights(s, p);
      }
      blocks_before = tile.blocks;
      before = tile;
    }
    if (turn > 0) {
      next(v_slot);
      turn_wait(2 + wg);
      mma_fence();
      pv_mma(o, p, slots + v_slot * SLOT, blocks_before > 1);
      mma_commit();
      turn_give(3 - wg);
      mma_wait<0>();
      hold(o);
      release(v_slot);
      u32 buffer = (turn - 1) & 1;
      int kv_head = heads ? (int)__ldg(heads + before.group) : before.group;
      finish(o, soft, &out_map, queries + buffer * Q_TILE + wg * Q_WG, wg, thread, before, kv_head, logits,
             n.scale_log2);
      if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
  }
}
