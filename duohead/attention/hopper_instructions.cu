// Constants, and Hopper's instructions as functions: barriers, the copy engine, the tensor cores. The first of the parts
// that duohead/attention/hopper_launch.py puts together; the last, hopper_prefill.cu, says what they make.

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
__device__ __forceinline__ int load(const long long* p) { return (int)__ldg(p); }
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

