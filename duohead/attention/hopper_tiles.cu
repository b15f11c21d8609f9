// Which keys a tile of queries reads, in which order, and what each row sees of them. Nothing here but arithmetic, which a
// test compiles for the CPU; the kernel is in hopper_prefill.cu.

// One call: its sizes, and where those numbers lie that only the device knows.
struct Numbers {
  const long long *last;     // position of each row's last key
  const long long *skipped;  // slots at the begin of each row's ring that are empty or read as sinks, or null
  const long long *heads;    // KV heads of the layer that the view is about, or null for all
  int last_step, skipped_step;
  int queries, keys, sinks, bound, reach, ring, kv_heads, rows, tiles, section;
  float scale_log2;
};

// What one tile reads. Indices of keys count from the first new one; the ring lies before it.
struct Tile {
  int token, group, row;  // first token, KV head of the view, batch row
  int head;               // KV head of the layer
  int start;              // position of the row's first query
  int own;                // index of the first token's own key
  int low;                // first index that is a real token and no sink
  int oldest;             // first index of the band, a multiple of UNIT
  int band_units, units, blocks;

  __device__ __forceinline__ void set(int number, const Numbers& n) {
    // In sections of heads, each from its longest tiles on, or head by head along the text.
    int tile = number % n.tiles, line = number / n.tiles;
    if (n.section) {
      int before = number / (n.section * n.tiles) * n.section, within = number - before * n.tiles;
      int heads = min(n.section, n.kv_heads * n.rows - before);
      tile = n.tiles - 1 - within / heads;
      line = before + within % heads;
    }
    token = tile * TT;
    group = line % n.kv_heads;
    row = line / n.kv_heads;
    head = n.heads ? load(n.heads + group) : group;
    own = token + n.keys - n.queries;
    int last = load(n.last + row * n.last_step);
    start = last - (n.queries - 1);
    // Positions ascend, so padding and what is read as a sink come first, in the new keys and in the ring.
    low = min(max(n.bound + n.keys - 1 - last, 0), n.keys);
    if (n.skipped) low += load(n.skipped + row * n.skipped_step) - n.ring;
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

// Keys of a tile's order, of which one comparison tells whether they are in: a negative distance is a large one.
struct Span {
  int begin;
  u32 count;

  __device__ __forceinline__ bool has(int at) const { return (u32)(at - begin) < count; }
};

// The units from `begin` up to `end` of one block, as bits.
__device__ __forceinline__ u32 unit_bits(int begin, int end) {
  return ((1u << min(max(end, 0), UB)) - 1) & ~((1u << min(max(begin, 0), UB)) - 1);
}

// What a row sees of its tile's order: `band` keys from `from` on, and `sinks` keys from `first_sink` on.
struct Row {
  int from, band, first_sink, sinks;

  __device__ __forceinline__ void set(const Tile& tile, int token, const Numbers& n) {
    int own = token + n.keys - n.queries;
    from = max(own - n.reach + 1, tile.low) - tile.oldest;
    band = max(own + 1 - tile.oldest - from, 0);
    first_sink = tile.band_units * UNIT;
    sinks = max(min(n.sinks, token + tile.start + 1), 0);
  }
  // What it sees of the unit that begins at `at`, which lies in one of the two intervals.
  __device__ __forceinline__ Span span(int at) const {
    bool sink = at >= first_sink;
    return {sink ? first_sink : from, (u32)(sink ? sinks : band)};
  }
  // The units of a block that it sees whole, as bits.
  __device__ __forceinline__ u32 whole(int block) const {
    int first = block * UB, sink = first_sink / UNIT;
    return unit_bits((from + UNIT - 1) / UNIT - first, (from + band) / UNIT - first) |
           unit_bits(sink - first, sink + sinks / UNIT - first);
  }
};

// What every row of the tile sees, in the same form.
__device__ __forceinline__ Row common(const Tile& tile, const Numbers& n) {
  Row first, last;
  first.set(tile, tile.token, n);
  last.set(tile, tile.token + TT - 1, n);
  first.band = max(first.from + first.band - last.from, 0);
  first.from = last.from;
  return first;
}

