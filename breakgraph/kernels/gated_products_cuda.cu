// silu(x @ gate.T) * (x @ up.T) in bfloat16 for compute capability 9.0a.
//
// A stage is loaded again only when the multiplying warps of both blocks of a cluster are done with it: the blocks
// multiply the same rows, and each loads half of them for both.
//
// Compiled with ROWS and COLUMNS of a tile of the result, STAGES of the pipeline, and multiply(sum, a, b, add): one
// matrix instruction of 64 rows and 2 COLUMNS, the gate's and as many of what it gates. A block has three groups of
// four warps: one thread of the first loads, the others multiply ROWS / 2 rows each. A cluster takes one tile after
// the other. Edges are the copy engine's: it fills with zeros what lies beyond a matrix, and stores nothing there.

typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(64) Map { char bytes[128]; };

constexpr int DEPTH = 64, ACROSS = 2;  // summed over at once; blocks of a cluster
constexpr int WARPS = 8;               // that multiply
constexpr int PARTS = ROWS / 128;      // matrix instructions that cover a group's rows
constexpr u32 LINE = DEPTH * 2;        // bytes of a row in shared memory: one swizzle
constexpr u32 LEFT_BYTES = ROWS * LINE, STAGE_BYTES = LEFT_BYTES + 2 * COLUMNS * LINE;
constexpr int BOX = COLUMNS % 64 == 0 ? 64 : 32;  // columns of a store: swizzled by 128 or 64 bytes
constexpr u32 BOX_BYTES = 16 * BOX * 2, OUT_BYTES = ROWS * COLUMNS * 2;

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ bool barrier_passed(u32 barrier, u32 parity) {
  u32 passed;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
  return passed;
}

// There is no other way out of this loop: with a trap in it the compiler spills sums and serializes the products.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  while (!barrier_passed(barrier, parity)) {}
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Without a scope: a release to the cluster costs a fence of the whole device, and nothing was written here.
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void load(u32 to, const Map* map, int x, int y, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier) : "memory");
}

__device__ __forceinline__ void load_for_both(u32 to, const Map* map, int x, int y, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1, {%2, %3}], [%4], %5;"
               ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier), "h"((unsigned short)3) : "memory");
}

__device__ __forceinline__ void store(const Map* map, int x, int y, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
               "cp.async.bulk.commit_group;" ::"l"(map), "r"(x), "r"(y), "r"(from) : "memory");
}

// An operand in shared memory: rows of 128 swizzled bytes, 1024 from one 8 rows to the next. 32 bytes on in a row are
// 16 of what is summed over, and 2 in the descriptor.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float silu(float x) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return x * inverse;
}

// Two outputs, rounded where torch rounds: the products, silu, and what both make.
__device__ __forceinline__ u32 finish(const float* gate, const float* up) {
  u32 g = pack(gate[0], gate[1]), u = pack(up[0], up[1]), out;
  u32 a = pack(silu(__uint_as_float(g << 16)), silu(__uint_as_float(g & 0xFFFF0000u)));
  asm("{\n.reg .b32 z;\nmov.b32 z, 0x80008000;\nfma.rn.bf16x2 %0, %1, %2, z;\n}" : "=r"(out) : "r"(a), "r"(u));
  return out;
}

// Which tile of rows, and which pair of tiles of columns: down first, group tiles at a time.
struct Order {
  int down, across, group;
  __device__ __forceinline__ void at(int tile, int& m, int& n) const {
    int per = group * across, g = tile / per, high = min(down - g * group, group), within = tile - g * per;
    n = within / high;
    m = g * group + within - n * high;
  }
};

extern "C" __global__ void __launch_bounds__(384, 1)
gated_product_tiles(const __grid_constant__ Map x, const __grid_constant__ Map weight, const __grid_constant__ Map out,
      int rows, int features, int size, int group) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 stages = ((u32)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
  const u32 outs = stages + STAGES * STAGE_BYTES, full = outs + OUT_BYTES, empty = full + 8 * STAGES;
  u32 rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  const Order order{(rows + ROWS - 1) / ROWS, (features + ACROSS * COLUMNS - 1) / (ACROSS * COLUMNS), group};
  const int tiles = order.down * order.across, step = gridDim.x / ACROSS, first = blockIdx.x / ACROSS;
  const int blocks = (size + DEPTH - 1) / DEPTH;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, ACROSS * WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&weight) : "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&out) : "memory");
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");

  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      u32 s = 0, parity = 1;  // the stages are empty at first
      for (int tile = first; tile < tiles; tile += step) {
        int m, n;
        order.at(tile, m, n);
        const int row = m * ROWS, column = (n * ACROSS + rank) * COLUMNS;
        for (int k = 0; k < blocks; k++) {
          barrier_wait(empty + 8 * s, parity);
          const u32 loaded = full + 8 * s, left = stages + s * STAGE_BYTES, right = left + LEFT_BYTES;
          barrier_expect(loaded, STAGE_BYTES);
          constexpr int HALF = ROWS / ACROSS;
          load_for_both(left + rank * HALF * LINE, &x, k * DEPTH, row + rank * HALF, loaded);
          load(right, &weight, k * DEPTH, column, loaded);
          load(right + COLUMNS * LINE, &weight, k * DEPTH, features + column, loaded);
          if (++s == STAGES) { s = 0; parity ^= 1; }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int half = warp / 4 - 1, part = warp % 4;  // which half of the rows; which 16 of each 64 rows
    u32 freed = 0;  // of the first two lanes: the barriers of either block that say a stage is empty
    if (lane < ACROSS) asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(freed) : "r"(empty), "r"(lane));
    const u32 mine = outs + (half * 4 + part) * (PARTS * 16 * COLUMNS * 2);
    const u32 line = lane % 16;  // the row this lane stores
    const u32 turn = BOX == 64 ? (line & 7) : ((line >> 1) & 3);  // its swizzle
    u32 s = 0, parity = 0;
    float sum[PARTS][COLUMNS];
    // One half stays a stage behind, so that a half's end of a tile runs beside the other's products. With all at once
    // 2048 rows of Qwen3-8B's take 1.6 % longer on an H200, 512 and 1024 as long.
    if (half == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
    bool leading = half == 0;
    for (int tile = first; tile < tiles; tile += step) {
      u32 before = 0;
#pragma unroll 1
      for (int k = 0; k < blocks; k++) {
        barrier_wait(full + 8 * s, parity);
        const u32 at = stages + s * STAGE_BYTES;
        const u64 left = descriptor(at + half * PARTS * 64 * LINE), right = descriptor(at + LEFT_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++)
#pragma unroll
          for (int p = 0; p < PARTS; p++)
            multiply(sum[p], left + 2 * i + p * (64 * LINE >> 4), right + 2 * i, i ? 1 : k != 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (k) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (lane < ACROSS) barrier_arrive(freed + 8 * before);
        }
        if (leading && (k == 1 || k == blocks - 1)) {
          asm volatile("bar.arrive 1, 256;" ::: "memory");
          leading = false;
        }
        before = s;
        if (++s == STAGES) { s = 0; parity ^= 1; }
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane < ACROSS) barrier_arrive(freed + 8 * before);

      int m, n;
      order.at(tile, m, n);
      const int row = m * ROWS + half * PARTS * 64 + part * 16, column = (n * ACROSS + rank) * COLUMNS;
      if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the last tile has left
      __syncwarp();
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
        const float *gate = sum[p], *up = sum[p] + COLUMNS / 2;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j += 2) {
          u32 r[4];
#pragma unroll
          for (int i = 0; i < 4; i++) r[i] = finish(gate + j * 4 + i * 2, up + j * 4 + i * 2);
          const u32 box = mine + (p * COLUMNS / BOX + j * 8 / BOX) * BOX_BYTES;
          const u32 to = box + line * (BOX * 2) + (((j % (BOX / 8) + (lane >> 4)) ^ turn) << 4);
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                       ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
          if ((j + 2) * 8 % BOX == 0) {
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            if (lane == 0) store(&out, column + j * 8 / BOX * BOX, row + p * 64, box);
          }
        }
      }
    }
    if (leading) asm volatile("bar.arrive 1, 256;" ::: "memory");
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  // Neither block leaves while the other may still write into it.
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
