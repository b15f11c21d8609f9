// Attention of heads that see sinks and a band, or everything, for Hopper: duohead/attention/hopper_launch.py completes
// this source with the constants D (head size), R (query heads per KV head), BN (keys of a block) and HALF16 (0: bf16,
// 1: fp16) and with the matrix instructions qk_step and pv_step for these sizes, and compiles it at run time.
//
// One block of threads stays on each multiprocessor and walks over query tiles. Its first warp group fetches, the other
// two compute, each for R x TW rows (TW tokens of the R heads that share a KV head). They take turns: while one waits
// for the tensor cores the other is in its softmax. A tile's last product with V is issued together with the next
// tile's first product with K, and waited for after that one's softmax, so that tiles follow each other without a gap.
//
// A tile reads its band from the oldest key on, then the sinks, so every row sees two intervals of this order. A block
// that lies in one place comes with one instruction, one that does not is put together from units of 16 keys.

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
  bar_expect(bar, SLOT);
  for (int unit = first; unit < first + UB; ++unit) {
    bool none = unit >= tile.units;
    // Beyond the last key the copy engine puts zeros: what lay here before might be NaN, which no weight of 0 removes.
    int at = none ? n.keys : tile.origin(unit);
    const Map* map = none ? maps.fresh : unit >= tile.band_units ? maps.sinks : at < 0 ? maps.ring : maps.fresh;
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
  // Never acts, for no sum is negative, but ends a basic block: else ptxas moves the next wait for the tensor cores up,
  // before the exponentials, which are to be computed meanwhile.
  __device__ __forceinline__ void settle() const {
    if (total[0] + total[1] < 0.f) asm volatile("bar.sync 7, 128;" ::: "memory");
  }
};

// Hides what a row must not see, in those units that not every row sees whole.
__device__ __forceinline__ void hide(float (&s)[BN / 2], u32 whole, const Row (&rows)[2], int begin, int lane) {
  if (whole == (1u << UB) - 1) return;
#pragma unroll
  for (int unit = 0; unit < UB; ++unit) {
    if (whole >> unit & 1) continue;
    int at = begin + unit * UNIT;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Span seen = rows[r].span(at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[unit * 8 + i / 2 * 4 + 2 * r + i % 2];
        x = seen.has(at + 2 * (lane % 4) + 8 * (i / 2) + i % 2) ? x : -INFINITY;
      }
    }
  }
}

__device__ __forceinline__ void to_weights(const float (&s)[BN / 2], u32 (&p)[BN / 4]) {
#pragma unroll
  for (int j = 0; j < BN / 4; ++j) p[j] = pack(s[2 * j], s[2 * j + 1]);
}

// Normalised outputs of a warp group go through the memory of their queries, which nobody needs any more.
__device__ __forceinline__ void finish(float (&o)[D / 2], const Softmax& soft, const Map* out, u32 place, int wg, int thread,
                                       const Tile& tile, const float* logits, float scale) {
  float share[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = soft.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (logits) {
      int member = (thread / 32 * 16 + thread % 32 / 4 + 8 * r) % R;
      float logit = logits[tile.head * R + member] * 1.4426950408889634f;
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
      put5(out, place + half * 64 * 128, half * 64, 0, tile.token + wg * TW, tile.head, tile.row);
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attend(const __grid_constant__ Map query_map, const __grid_constant__ Map out_map,
           const __grid_constant__ KeyMaps key_maps, const __grid_constant__ KeyMaps value_maps, const float* logits,
           const Numbers n) {
  extern __shared__ char raw[];
  u32 base = (smem_of(raw) + 1023) & ~1023u;
  u32 slots = base, queries = base + SLOTS * SLOT, bars = queries + 2 * Q_TILE;
  u32 full = bars, empty = bars + 8 * SLOTS, q_full = bars + 16 * SLOTS, q_empty = q_full + 16;
  // The tiles whose queries lie there, as told by the thread that fetches. The launch counts 256 bytes from `bars` on.
  static_assert(16 * SLOTS + 32 + 2 * sizeof(Tile) <= 256);
  Tile* tiles = reinterpret_cast<Tile*>(raw + (q_empty + 16 - smem_of(raw)));
  int wg = threadIdx.x / 128, thread = threadIdx.x % 128;
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
        tile.set(number, n);
        u32 buffer = turn & 1;
        bar_wait(q_empty + 8 * buffer, (turn >> 1 & 1) ^ 1);
        tiles[buffer] = tile;
        bar_expect(q_full + 8 * buffer, 2 * R * TW * D * 2);
        for (int w = 0; w < 2; ++w)
#pragma unroll
          for (int half = 0; half < HALVES; ++half)
            fetch5(queries + buffer * Q_TILE + w * Q_WG + half * 64 * 128, &query_map, q_full + 8 * buffer, half * 64,
                   0, tile.token + w * TW, tile.head, tile.row);
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
    Softmax soft, soft_before;
    float fade[2];
    u32 slot = 0, phase = 0, turn = 0;
    u32 k_slot, v_slot = 0;
    bool more = false;  // whether the tile before had more than one block
    auto release = [&](u32 of) {
      if (lane == 0) bar_arrive(empty + 8 * of);
    };
    auto next = [&](u32& index) {
      index = slot;
      bar_wait(full + 8 * slot, phase);
      if (++slot == SLOTS) slot = 0, phase ^= 1;
    };
    // Once the outputs of the tile before have left their memory, new queries may come.
    auto return_queries = [&] {
      if (turn > 0 && thread == 0) {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        bar_arrive(q_empty + 8 * ((turn - 1) & 1));
      }
    };
    auto write_before = [&](const Softmax& of) {
      u32 buffer = (turn - 1) & 1;
      finish(o, of, &out_map, queries + buffer * Q_TILE + wg * Q_WG, wg, thread, tiles[buffer], logits, n.scale_log2);
    };
    if (wg == 1) turn_give(2);
    for (int number = blockIdx.x; number < count; number += gridDim.x, ++turn) {
      u32 place = queries + (turn & 1) * Q_TILE + wg * Q_WG;
      bar_wait(q_full + 8 * (turn & 1), turn >> 1 & 1);
      next(k_slot);
      turn_wait(2 + wg);
      mma_fence();
      qk_mma(s, place, slots + k_slot * SLOT);
      mma_commit();
      if (turn > 0) {
        next(v_slot);
        pv_mma(o, p, slots + v_slot * SLOT, more);
      }
      mma_commit();
      turn_give(3 - wg);
      const Tile& tile = tiles[turn & 1];
      Row rows[2], all = common(tile, n);
      rows[0].set(tile, tile.token + wg * TW + line / R, n);
      rows[1].set(tile, tile.token + wg * TW + (line + 8) / R, n);
      int blocks = tile.blocks;
      soft_before = soft;
      soft.reset();
      u32 whole = all.whole(0);
      mma_wait<1>();
      hold(s);
      release(k_slot);
      hide(s, whole, rows, 0, lane);
      soft.absorb(s, n.scale_log2, fade);
      soft.settle();
      mma_wait<0>();
      if (turn > 0) {
        hold(o);
        release(v_slot);
        write_before(soft_before);
      }
      to_weights(s, p);
      for (int block = 1; block < blocks; ++block) {
        next(k_slot);
        turn_wait(2 + wg);
        mma_fence();
        qk_mma(s, place, slots + k_slot * SLOT);
        mma_commit();
        next(v_slot);
        pv_mma(o, p, slots + v_slot * SLOT, block > 1);
        mma_commit();
        turn_give(3 - wg);
        if (block == 1) return_queries();
        whole = all.whole(block);
        mma_wait<1>();
        hold(s);
        release(k_slot);
        hide(s, whole, rows, block * BN, lane);
        soft.absorb(s, n.scale_log2, fade);
        soft.settle();
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
      if (blocks == 1) return_queries();
      more = blocks > 1;
    }
    if (turn > 0) {
      next(v_slot);
      turn_wait(2 + wg);
      mma_fence();
      pv_mma(o, p, slots + v_slot * SLOT, more);
      mma_commit();
      turn_give(3 - wg);
      mma_wait<0>();
      hold(o);
      release(v_slot);
      write_before(soft);
      if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
  }
}
