// Runs decoded PTX on the CPU: warps of 32 lanes over the caller's memory, with checks and
// counters.
//
// A program is an array of `Ins`; every instruction names a handler by its PTX spelling less the
// qualifiers that change nothing here, and its operands are byte offsets into the warp's register
// block or plain numbers. Constants, parameters and special registers are registers too, filled
// when a warp starts. A predicate is one 32-bit mask.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using std::string;
constexpr u32 FULL = ~0u;
constexpr u64 SHARED_BASE = 1024;  // the hardware keeps the first KiB of every block's
constexpr u64 SHARED_WINDOW = 1ull << 60,
              LOCAL_WINDOW = 1ull << 61;  // where generic addresses find the other spaces

// ---- what a launch is given and gives back (mirrored in machine.py)

enum Space { GLOBAL, SHARED, LOCAL, GENERIC };
enum Problem {
  OUT_OF_BOUNDS,
  MISALIGNED,
  UNINITIALISED,
  RACE_RAW,
  RACE_WAR,
  RACE_WAW,
  RACE_SAME,
  UNWAITED,
  DIVERGENT,
  DEADLOCK,
  BUDGET,
  TRAP,
  TWO_LANES,
  ROUNDING
};

struct Region {
  u64 begin, end;
  u32 granule, uninitialised;
  void *coarse, *fine;
};
struct Error {
  i32 kind, pc, other, lane, warp, cta, bytes, space;
  u64 address;
};

struct Launch {
  i32 grid[3], warps, shared, threads, regions;
  i32 check_memory, check_races, most_errors, random, error_count, error_total;
  u64 seed, budget;
  const u64* values;  // the bits of every parameter
  Region* region;     // sorted by address
  u64 *executed, *lanes, *units,
      *ideal;  // per instruction; units: 32-byte sectors, or shared-memory wavefronts
  Error* errors;
  u64 read_bytes, written_bytes, barriers;
};

// ---- the shadow of memory: who wrote and who read each granule last

constexpr u32 MANY_CTAS = 0xffffff, MANY_WARPS = 63, LAST_TIME = 0x1ffff, PENDING = LAST_TIME;
struct Cell {
  u64 write, read;
};
// a stamp: cta + 1 (24 bits), warp (6), atomic (1), time (17: barriers of the CTA so far),
// instruction (16)
inline u64 stamp(u32 cta, u32 warp, u32 atomic, u32 time, u32 pc) {
  return u64(cta) << 40 | u64(warp) << 34 | u64(atomic) << 33 |
         u64(std::min(time, LAST_TIME - 1)) << 16 | (pc & 0xffff);
}
inline u32 cta_of(u64 s) { return s >> 40; }
inline u32 warp_of(u64 s) { return s >> 34 & 63; }
inline u32 atomic_of(u64 s) { return s >> 33 & 1; }
inline u32 time_of(u64 s) { return s >> 16 & LAST_TIME; }
// One cell for every 16 bytes, until an access needs less of them: then one for every granule, the
// kernel's narrowest access
constexpr u64 SPLIT = ~0ull;
struct Shadow {
  Cell *coarse, *fine;
  u32 granule;
  u64 base;
  template <class F>
  __attribute__((always_inline)) void visit(u64 a, u64 n, const F& f) const {
    for (u64 c = (a - base) / 16, e = (a - base + n + 15) / 16; c < e; c++) {
      if (n >= 16 && coarse[c].write != SPLIT) {
        f(coarse[c], 16);
        continue;
      }
      u64 per = 16 / granule, first = c * per;
      if (coarse[c].write != SPLIT) {
        for (u64 i = first; i < first + per; i++) fine[i] = coarse[c];
        coarse[c].write = SPLIT;
      }
      u64 i = n >= 16 ? first : (a - base) / granule,
          end = n >= 16 ? first + per : (a - base + n + granule - 1) / granule;
      for (; i < end; i++) f(fine[i], granule);
    }
  }
};

struct Warp;
struct Block;
struct Machine;
struct Ins;
using Handler = void (*)(Warp&, const Ins&, u32);
enum Flow : u8 { PLAIN, BRANCH, EXIT, BARRIER, ARRIVE };
struct Ins {
  Handler fn;
  const i64* o;
  i32 pred;
  bool negated;
  Flow flow;
  i32 target, join;
  u32 pc;
};  // join: where both sides of a branch meet
struct Program {
  std::vector<Ins> code;
  std::vector<i64> operands;
  std::vector<u8> image;                    // what a warp's registers start as
  std::vector<std::array<i32, 2>> special;  // which, slot
  std::vector<std::array<i64, 4>>
      params;  // position, offset, bytes, slot: loads of parameters are copies of these registers
  std::map<string, std::vector<u8>> globals;
  std::vector<std::pair<void*, i64>> global_slots;
  string name, description;
  i32 shared = 0, local = 0, threads = 0, global_granule = 16,
      shared_granule = 16;  // granule: the narrowest access
};

struct Copy {
  u32 address, bytes, pc;
  u8 data[16];
};  // of a cp.async, on its way
struct Fragment {
  i32 pc;
  u32 mask;
  i32 join;
};

struct Warp {
  Block* block;
  Machine* machine;
  u8* regs;
  u32 id;
  i32 pc;
  u32 active;
  i32 join;
  u32 gone, carry;
  std::vector<Fragment> others;  // a stack: lanes that wait where they meet again, or to run the
                                 // other side of a branch
  enum { READY, WAITING, DONE } state;
  i32 barrier;
  std::vector<u32> seen;  // what this warp knows to be over: accesses of warp v at times < seen[v]
  u32 oldest;             // min of seen over the other warps
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  std::unordered_map<i64, std::vector<float>>
      late;  // accumulators of wgmmas not yet waited for, by slot
  std::vector<const Ins*> issued;
  std::deque<std::vector<const Ins*>> waves;  // those wgmmas
  std::vector<u8> local;
  template <class T>
  T* reg(i64 slot) const {
    return reinterpret_cast<T*>(regs + slot);
  }
};

struct Barrier {
  u32 arrived = 0, expected = 0;
  std::vector<u32> who;
};

struct Block {
  u32 cta, now;  // cta: index + 1, as stamps have it
  std::vector<u8> shared;
  std::vector<Cell> coarse, fine;
  Shadow shadow;
  Barrier barriers[16];
  std::vector<Warp> warps;
};

struct Machine {  // one OS thread of a launch
  Launch& launch;
  const Program& program;
  std::vector<u64> executed, lanes, units, ideal;
  u64 read_bytes = 0, written_bytes = 0, barriers = 0, left;
  const Region* last = nullptr;
  Block block;
  bool fatal = false;
  std::vector<u8> image;
  Machine(Launch& l, const Program& p) : launch(l), program(p), left(l.budget), image(p.image) {
    auto put = [&](i64 slot, const void* value, i64 size) {
      for (int i = 0; i < 32; i++) memcpy(image.data() + slot + i * size, value, size);
    };
    for (auto [position, offset, bytes, slot] : p.params) {
      u64 bits = l.values[position] >> 8 * offset;
      if (bytes == 1) bits &= 0xff;
      put(slot, &bits, std::max<i64>(2, bytes));
    }
    for (auto [data, slot] : p.global_slots) put(slot, &data, 8);
    for (auto v : {&executed, &lanes, &units, &ideal}) v->assign(p.code.size(), 0);
  }
};

std::mutex error_lock;
void report(Warp& w, const Ins& I, Problem kind, u32 lane, u64 address, i32 bytes, i32 space,
            i32 other = -1) {
  Launch& l = w.machine->launch;
  std::lock_guard<std::mutex> guard(error_lock);
  l.error_total++;
  for (int i = 0; i < l.error_count; i++)
    if (l.errors[i].kind == kind && l.errors[i].pc == (i32)I.pc && l.errors[i].other == other)
      return;
  if (l.error_count < l.most_errors)
    l.errors[l.error_count++] = {
        kind, (i32)I.pc, other, (i32)lane, (i32)w.id, (i32)w.block->cta - 1, bytes, space, address};
}

// ---- memory: bounds, alignment, races, counters

enum Kind { READ, WRITE, ATOMIC, ATOMIC_READ };

inline bool before(const Warp& w,
                   u64 s) {  // has the access `s` of this CTA ended before what warp w does now?
  u32 v = warp_of(s), t = time_of(s);
  return v == w.id || t == LAST_TIME - 1 || t < (v == MANY_WARPS ? w.oldest : w.seen[v]);
}

// One access to one cell. Returns the problem, if any, and the other access. `same()`: does a store
// write what was there? (0 no, 1 yes, 2 up to rounding)
template <class F>
__attribute__((always_inline)) inline int touch(Warp& w, Cell& c, u32 bytes, Kind kind, u64 me,
                                                bool shared, u64& other, const F& same) {
  u64 write = __atomic_load_n(&c.write, __ATOMIC_RELAXED),
      read = __atomic_load_n(&c.read, __ATOMIC_RELAXED);
  u32 cta = w.block->cta;
  if (shared) {  // left by another CTA: nothing
    if (cta_of(write) != cta) write = 0;
    if (cta_of(read) != cta) read = 0;
  }
  int problem = -1;
  bool reads = kind == READ || kind == ATOMIC_READ;
  if (write && (write ^ me) >> 34) {  // by another warp
    if (cta_of(write) != cta || !before(w, write))
      if (!(kind >= ATOMIC && atomic_of(write)))
        other = write, problem = reads ? RACE_RAW
                                       : std::array{int(RACE_WAW), shared ? -1 : int(RACE_SAME),
                                                    shared ? int(ROUNDING) : int(RACE_WAW)}[same()];
  }
  if (shared && write && time_of(write) == PENDING) problem = UNWAITED, other = write;
  if (reads) {
    if (kind == READ) {
      u64 now = me;
      if (read && (read ^ me) >> 34) {
        if (cta_of(read) != cta) now = stamp(MANY_CTAS, 0, 0, 0, read & 0xffff);
        else if (!before(w, read)) now |= u64(MANY_WARPS) << 34;
      }
      if (!read && !shared) w.machine->read_bytes += bytes;
      __atomic_store_n(&c.read, now, __ATOMIC_RELAXED);
    }
    return !write && problem < 0 ? UNINITIALISED : problem;  // the caller knows whether it matters
  }
  if (read && (read ^ me) >> 34 && problem < 0 && (cta_of(read) != cta || !before(w, read)) &&
      !(kind == WRITE && same() == 1))
    problem = RACE_WAR, other = read;
  if (!write && !shared) w.machine->written_bytes += bytes;
  __atomic_store_n(&c.write, me, __ATOMIC_RELAXED);
  return problem;
}

const Region* find(Machine& m, u64 a, u64 n) {
  if (m.last && a >= m.last->begin && a + n <= m.last->end) return m.last;
  const Region *b = m.launch.region, *e = b + m.launch.regions;
  auto it = std::upper_bound(b, e, a, [](u64 x, const Region& r) { return x < r.begin; });
  return it != b && a + n <= it[-1].end ? m.last = it - 1 : nullptr;
}

// Distinct values among the active lanes' `a >> shift`; they mostly come in order.
int distinct(const u64* a, u32 m, int shift) {
  u64 v[32];
  int n = 0;
  bool ordered = true;
  for (u32 k = m; k; k &= k - 1) {
    u64 x = a[__builtin_ctz(k)] >> shift;
    if (n && x == v[n - 1]) continue;
    ordered &= !n || x > v[n - 1];
    v[n++] = x;
  }
  if (!ordered) std::sort(v, v + n), n = std::unique(v, v + n) - v;
  return n;
}

// Shared-memory wavefronts of one access, and the fewest for as many words: 32 banks of 4 bytes;
// wide accesses go in phases.
void wavefronts(const u64* a, u32 m, int bytes, u64& units, u64& ideal) {
  u32 unit = std::max(4, bytes), shift = std::countr_zero(unit),
      banks = 128 / unit;  // a lane's word fills `unit / 4` banks
  for (u32 l = 0; l < 32; l += banks) {
    u32 phase = m >> l & (banks == 32 ? FULL : (1u << banks) - 1);
    if (!phase) continue;
    u32 word[32], first[32], seen = 0;
    int n = 0;
    bool conflict = false;
    for (u32 k = phase; k; k &= k - 1) {
      u32 x = u32(a[l + __builtin_ctz(k)] >> shift), bank = x & (banks - 1);
      word[n++] = x;
      if (!(seen >> bank & 1)) seen |= 1u << bank, first[bank] = x;
      else conflict |= first[bank] != x;
    }
    units++, ideal++;
    if (!conflict) continue;
    std::sort(word, word + n);
    n = std::unique(word, word + n) - word;
    int depth[32] = {};
    for (int i = 0; i < n; i++) depth[word[i] & (banks - 1)]++;
    units += *std::max_element(depth, depth + banks) - 1, ideal += (n - 1) / banks;
  }
}

inline u8* host(Warp& w, int space, u64 a, int lane) {
  if (space == GLOBAL) return reinterpret_cast<u8*>(a);
  if (space == SHARED) return w.block->shared.data() + (a - SHARED_BASE);
  return w.local.data() + lane * w.machine->program.local + a;
}

// Do two stored values agree: 0 no, 1 in all bits, 2 but for rounding? Triton lets lanes hold the
// same element, and a product that LLVM fuses into the sum of a reduction is rounded in one lane
// and not in its partner. A GPU's sums have one NaN, this machine's keep the bits of an operand.
int agree(const u8* a, const u8* b, int n, int element) {
  if (!memcmp(a, b, n)) return 1;
  int how = 1;
  for (int i = 0; i < n; i += element) {
    if (!memcmp(a + i, b + i, element)) continue;
    if (element == 4) {
      float x, y;
      memcpy(&x, a + i, 4), memcpy(&y, b + i, 4);
      if (x != x && y != y) continue;
      if (!(std::fabs(x - y) <= 1e-6f + 1e-4f * std::fabs(x)) && x != y) return 0;
    } else if (element == 2) {
      i16 x, y;
      memcpy(&x, a + i, 2), memcpy(&y, b + i, 2);
      if (std::abs(x - y) > 1)
        return n >= 4 ? agree(a, b, n, 4) : 0;  // halves of fp32, perhaps: stmatrix moves those too
    } else return 0;
    how = 2;
  }
  return how;
}

// Check and count one access of `n` bytes a lane at `a` (generic addresses become those of their
// space). `fresh`: what a store will write, 32 bytes a lane. Returns the lanes that may go on.
u32 access(Warp& w, const Ins& I, u32 m, u64* a, int n, int& space, Kind kind, const u8* fresh,
           int element = 4, bool count = true) {
  Machine& k = *w.machine;
  Launch& l = k.launch;
  if (!m) return 0;
  if (space == GENERIC) {
    u64 some = a[__builtin_ctz(m)];
    space = some >= LOCAL_WINDOW ? LOCAL : some >= SHARED_WINDOW ? SHARED : GLOBAL;
    if (space != GLOBAL)
      for (int i = 0; i < 32; i++) a[i] -= space == SHARED ? SHARED_WINDOW : LOCAL_WINDOW;
  }
  if (count && space == GLOBAL) {
    k.units[I.pc] += distinct(a, m, 5);
    int pieces = distinct(a, m, std::countr_zero(unsigned(n)));
    k.ideal[I.pc] += (pieces * n + 31) / 32;
  }
  if (fresh && kind == WRITE && space != LOCAL &&
      distinct(a, m, std::countr_zero(unsigned(n))) < std::popcount(m))
    for (u32 x = m; x; x &= x - 1)
      for (u32 i = __builtin_ctz(x), y = x & (x - 1); y; y &= y - 1)
        if (u32 j = __builtin_ctz(y); a[i] == a[j])
          if (int how = agree(fresh + 32 * i, fresh + 32 * j, n, element); how != 1) {
            report(w, I, how == 2 && space == SHARED ? ROUNDING : TWO_LANES, j, a[j], n, space);
            if (how == 0) x = y = 1;
          }
  if (count && space == SHARED) wavefronts(a, m, n, k.units[I.pc], k.ideal[I.pc]);
  // bounds and alignment, of all lanes at once where they are all well
  u64 low = ~0ull, top = 0, bits = 0;
  u32 good = m;
  for (u32 x = m; x; x &= x - 1) {
    u64 v = a[__builtin_ctz(x)];
    low = std::min(low, v), top = std::max(top, v), bits |= v;
  }
  u64 begin = space == SHARED ? SHARED_BASE : 0,
      end = begin + (space == SHARED ? w.block->shared.size() : k.program.local);
  const Region* one = nullptr;
  if (bits & (n - 1) ||
      (space == GLOBAL ? !(one = find(k, low, top - low + n)) : low < begin || top + n > end))
    for (u32 x = m; x; x &= x - 1) {
      u32 i = __builtin_ctz(x);
      Problem problem = a[i] & (n - 1) ? MISALIGNED : OUT_OF_BOUNDS;
      if (problem == OUT_OF_BOUNDS &&
          (space == GLOBAL ? find(k, a[i], n) != nullptr : a[i] >= begin && a[i] + n <= end))
        continue;
      if (problem == OUT_OF_BOUNDS && space == GLOBAL && !l.check_memory) continue;
      good &= ~(1u << i), report(w, I, problem, i, a[i], n, space);
    }
  if (!l.check_races || space == LOCAL) return good;
  u64 me = stamp(w.block->cta, w.id, kind >= ATOMIC, w.block->now, I.pc);
  for (u32 x = good; x; x &= x - 1) {
    u32 i = __builtin_ctz(x);
    const Region* r = space == SHARED ? nullptr : one ? one : find(k, a[i], n);
    if (space == GLOBAL && !r) continue;
    Shadow shadow = r ? Shadow{(Cell*)r->coarse, (Cell*)r->fine, r->granule, r->begin & ~15ull}
                      : w.block->shadow;
    shadow.visit(a[i], n, [&](Cell& c, u32 bytes) {
      u64 other = 0;
      int problem = touch(w, c, bytes, kind, me, space == SHARED, other, [&] {
        return fresh ? agree(host(w, space, a[i], i), fresh + 32 * i, n, element) : 0;
      });
      if (problem < 0 || (problem == UNINITIALISED && space == GLOBAL && !r->uninitialised)) return;
      report(w, I, Problem(problem), i, a[i], n, space,
             problem == UNINITIALISED ? -1 : i32(other & 0xffff));
    });
  }
  return good;
}

inline void addresses(Warp& w, i64 slot, i64 width, i64 offset, u64* a) {
  if (width == 8) {
    u64* s = w.reg<u64>(slot);
    for (int i = 0; i < 32; i++) a[i] = s[i] + offset;
  } else {
    u32* s = w.reg<u32>(slot);
    for (int i = 0; i < 32; i++) a[i] = u32(s[i] + u32(offset));
  }
}

// ld, st: operands space, atomic, address slot, its width, offset, count, then the registers (-1:
// none)
template <class D, class S>
void load(Warp& w, const Ins& I, u32 m) {
  const i64* o = I.o;
  int space = o[0], n = o[5];
  u64 a[32];
  addresses(w, o[2], o[3], o[4], a);
  u32 good = access(w, I, m, a, n * sizeof(S), space, o[1] ? ATOMIC_READ : READ, nullptr);
  for (int v = 0; v < n; v++) {
    if (o[6 + v] < 0) continue;
    D* d = w.reg<D>(o[6 + v]);
    for (u32 x = m; x; x &= x - 1) {
      u32 i = __builtin_ctz(x);
      S s{};
      if (good >> i & 1) memcpy(&s, host(w, space, a[i], i) + v * sizeof(S), sizeof(S));
      d[i] = D(s);
    }
  }
}
template <class D, class S>
void store(Warp& w, const Ins& I, u32 m) {
  const i64* o = I.o;
  int space = o[0], n = o[5];
  u64 a[32];
  alignas(32) u8 fresh[32][32];
  addresses(w, o[2], o[3], o[4], a);
  for (int v = 0; v < n; v++) {
    D* d = w.reg<D>(o[6 + v]);
    for (int i = 0; i < 32; i++) {
      S s = S(d[i]);
      memcpy(fresh[i] + v * sizeof(S), &s, sizeof(S));
    }
  }
  u32 good = access(w, I, m, a, n * sizeof(S), space, o[1] ? ATOMIC : WRITE, fresh[0], sizeof(S));
  for (u32 x = good; x; x &= x - 1) {
    u32 i = __builtin_ctz(x);
    memcpy(host(w, space, a[i], i), fresh[i], n * sizeof(S));
  }
}

// atom, red: operands space, address slot, width, offset, destination (-1: none), source, source 2
template <class T, class F>
void atomic(Warp& w, const Ins& I, u32 m, F f) {
  const i64* o = I.o;
  int space = o[0];
  u64 a[32];
  addresses(w, o[1], o[2], o[3], a);
  u32 good = access(w, I, m, a, sizeof(T), space, ATOMIC, nullptr);
  for (u32 x = good; x; x &= x - 1) {
    u32 i = __builtin_ctz(x);
    T* p = (T*)host(w, space, a[i], i);
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST), b = w.reg<T>(o[5])[i],
      c = o[6] < 0 ? T{} : w.reg<T>(o[6])[i];
    while (!__atomic_compare_exchange_n(p, &old, f(old, b, c), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {}
    if (o[4] >= 0) w.reg<T>(o[4])[i] = old;
  }
}

// cp.async: operands shared slot, offset, global slot, offset, bytes, slot of the source size (-1:
// all)
void cp_async(Warp& w, const Ins& I, u32 m) {
  const i64* o = I.o;
  u64 to[32], from[32];
  int n = o[4], shared = SHARED, global = GLOBAL;
  u32 whole = m;
  addresses(w, o[0], 4, o[1], to), addresses(w, o[2], 8, o[3], from);
  u32* size = o[5] < 0 ? nullptr : w.reg<u32>(o[5]);
  if (size)
    for (int i = 0; i < 32; i++)
      if (size[i] == 0) whole &= ~(1u << i);
  u32 read = access(w, I, whole, from, n, global, READ, nullptr);
  Machine& k = *w.machine;
  u64 sectors = k.units[I.pc], ideal = k.ideal[I.pc];
  u32 good = access(w, I, m, to, n, shared, WRITE, nullptr);
  k.units[I.pc] = sectors,
  k.ideal[I.pc] = ideal;  // of such an instruction the global side is counted
  for (u32 x = good; x; x &= x - 1) {
    u32 i = __builtin_ctz(x);
    Copy c{u32(to[i]), u32(n), I.pc, {}};
    if (read >> i & 1) memcpy(c.data, (u8*)from[i], size ? std::min<u32>(n, size[i]) : n);
    w.open.push_back(c);
    if (k.launch.check_races)
      w.block->shadow.visit(to[i], n, [](Cell& c, u32) { c.write |= u64(PENDING) << 16; });
  }
}
void land(Warp& w, std::vector<Copy>& copies) {
  Launch& l = w.machine->launch;
  Block& b = *w.block;
  for (Copy& c : copies) {
    memcpy(b.shared.data() + c.address - SHARED_BASE, c.data, c.bytes);
    if (l.check_races)
      b.shadow.visit(c.address, c.bytes,
                     [&](Cell& cell, u32) { cell.write = stamp(b.cta, w.id, 0, b.now, c.pc); });
  }
  copies.clear();
}
void cp_commit(Warp& w, const Ins&, u32) {
  w.groups.push_back(std::move(w.open));
  w.open.clear();
}
void cp_wait(Warp& w, const Ins& I,
             u32) {  // operand: groups that may stay; -1: not even what is uncommitted
  while ((i64)w.groups.size() > std::max<i64>(0, I.o[0]))
    land(w, w.groups.front()), w.groups.pop_front();
  if (I.o[0] < 0) land(w, w.open);
}

// ---- small floats

struct bf16 {
  u16 bits;
  bf16() = default;
  bf16(float f) {
    u32 x = std::bit_cast<u32>(f);
    bits = f != f ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
  }
  operator float() const { return std::bit_cast<float>(u32(bits) << 16); }
};
using f16 = _Float16;
template <class T>
constexpr bool small = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;

// a + b in double, rounded to odd, so that a second rounding to fewer digits is the only one
inline double add_odd(double a, double b) {
  double s = a + b, t = s - a, e = (a - (s - t)) + (b - t);
  if (e == 0 || e != e || std::isinf(s)) return s;
  u64 x = std::bit_cast<u64>(s);
  return x & 1 ? s : std::bit_cast<double>((e > 0) == (s > 0) ? x + 1 : x - 1);
}
inline float to_float_odd(double d) {
  float f = float(d);
  if (double(f) == d || f != f || std::isinf(f)) return f;
  u32 x = std::bit_cast<u32>(f);
  bool away = std::fabs(double(f)) > std::fabs(d);
  return x & 1 ? f : std::bit_cast<float>(away ? x - 1 : x + 1);
}
template <class T>
T fused(T a, T b, T c) {
  if constexpr (small<T>)
    return T(to_float_odd(add_odd(double(float(a)) * double(float(b)), double(float(c)))));
  else return std::fma(a, b, c);
}
// An 8-bit float with E exponent and M mantissa bits, saturating, from a float; and back
template <int E, int M>
u8 to_fp8(float f) {
  constexpr int bias = (1 << (E - 1)) - 1;
  constexpr u8 most = E == 4 ? 0x7e : 0x7b;
  u8 sign = std::signbit(f) ? 0x80 : 0;
  if (f != f) return 0x7f;
  double a = std::fabs(double(f));
  int e = std::max(a > 0 ? std::ilogb(a) : -1000, 1 - bias);
  double q = std::nearbyint(std::ldexp(a, M - e));  // in units of the last place
  u32 code =
      q < (1 << M) ? u32(q) : u32(std::min(q + double(u64(std::max(0, e + bias - 1)) << M), 1e6));
  return sign | u8(std::min<u32>(code, most));
}
template <int E, int M>
float from_fp8(u8 x) {
  constexpr int bias = (1 << (E - 1)) - 1;
  int e = x >> M & ((1 << E) - 1), m = x & ((1 << M) - 1);
  float v = e ? std::ldexp(float(m + (1 << M)), e - bias - M) : std::ldexp(float(m), 1 - bias - M);
  if (E == 4 ? (x & 0x7f) == 0x7f : e == 31) v = E == 5 && !m ? INFINITY : NAN;
  return x & 0x80 ? -v : v;
}
// The half beside a float: toward zero (0), down (-1) or up (1)
inline u16 to_half(float a, int mode) {
  f16 h = a;
  u16 bits = std::bit_cast<u16>(h);
  float near = h;
  bool beyond = mode == 0 ? std::fabs(near) > std::fabs(a) : mode < 0 ? near > a : near < a;
  if (!beyond) return bits;
  bool smaller = mode == 0 || (mode < 0) != bool(bits >> 15);
  return smaller ? bits - 1 : bits + 1;
}
inline float flush(float f) { return std::fabs(f) < 1.17549435e-38f ? std::copysign(0.f, f) : f; }

// ---- the table of handlers

std::unordered_map<string, Handler> table;
#define LANES(...)                                                                       \
  {                                                                                      \
    if (m == FULL) {                                                                     \
      _Pragma("GCC ivdep") for (int i = 0; i < 32; i++) { __VA_ARGS__; }                 \
    } else {                                                                             \
      _Pragma("GCC ivdep") for (int i = 0; i < 32; i++) if (m >> i & 1) { __VA_ARGS__; } \
    }                                                                                    \
  }
#define DEF(name) table[name] = [](Warp& w, const Ins& I, u32 m)
#define ONE(name, D, A, ...)                 \
  DEF(name) {                                \
    D* d = w.reg<D>(I.o[0]);                 \
    const A* x = w.reg<A>(I.o[1]);           \
    LANES(A a = x[i]; d[i] = D(__VA_ARGS__)) \
  }
#define TWO(name, D, A, B, ...)                          \
  DEF(name) {                                            \
    D* d = w.reg<D>(I.o[0]);                             \
    const A* x = w.reg<A>(I.o[1]);                       \
    const B* y = w.reg<B>(I.o[2]);                       \
    LANES(A a = x[i]; B b = y[i]; d[i] = D(__VA_ARGS__)) \
  }
#define THREE(name, D, A, B, C, ...)                                 \
  DEF(name) {                                                        \
    D* d = w.reg<D>(I.o[0]);                                         \
    const A* x = w.reg<A>(I.o[1]);                                   \
    const B* y = w.reg<B>(I.o[2]);                                   \
    const C* z = w.reg<C>(I.o[3]);                                   \
    LANES(A a = x[i]; B b = y[i]; C c = z[i]; d[i] = D(__VA_ARGS__)) \
  }
#define FOUR(name, D, A, B, C, E, ...)                                           \
  DEF(name) {                                                                    \
    D* d = w.reg<D>(I.o[0]);                                                     \
    const A* x = w.reg<A>(I.o[1]);                                               \
    const B* y = w.reg<B>(I.o[2]);                                               \
    const C* z = w.reg<C>(I.o[3]);                                               \
    const E* v = w.reg<E>(I.o[4]);                                               \
    LANES(A a = x[i]; B b = y[i]; C c = z[i]; E e = v[i]; d[i] = D(__VA_ARGS__)) \
  }

template <class T>
T least(T a, T b) {
  return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(double(a))) ? a : b;
}
template <class T>
T most(T a, T b) {
  return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(double(a))) ? a : b;
}
template <class T>
T shl(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
T shr(T a, u32 n) {
  return n >= 8 * sizeof(T) ? (std::is_signed_v<T> && a < 0 ? T(-1) : T(0)) : T(a >> n);
}
inline i64 high(i64 a, i64 b) { return i64((__int128)a * b >> 64); }
inline u64 high(u64 a, u64 b) { return u64((unsigned __int128)a * b >> 64); }
inline i32 high(i32 a, i32 b) { return i64(a) * b >> 32; }
inline u32 high(u32 a, u32 b) { return u64(a) * b >> 32; }
inline i16 high(i16 a, i16 b) { return i32(a) * b >> 16; }
inline u16 high(u16 a, u16 b) { return u32(a) * b >> 16; }
template <class T>
T bfe(T a, u32 pos, u32 len) {
  constexpr u32 bits = 8 * sizeof(T);
  pos &= 0xff, len &= 0xff;
  if (!len) return 0;
  using U = std::make_unsigned_t<T>;
  U sign = std::is_signed_v<T> ? U(a) >> std::min(pos + len - 1, bits - 1) & 1 : 0;
  U v = pos >= bits ? 0 : U(a) >> pos;
  if (len >= bits || pos + len > bits) {
    u32 kept = pos >= bits ? 0 : bits - pos;
    return T(kept >= bits ? v : v | (sign ? ~U(0) << kept : 0));
  }
  U mask = (U(1) << len) - 1;
  return T((v & mask) | (sign ? ~mask : 0));
}
template <class U>
U bfi(U a, U b, u32 pos, u32 len) {
  constexpr u32 bits = 8 * sizeof(U);
  pos &= 0xff, len &= 0xff;
  if (!len || pos >= bits) return b;
  U mask = (len >= bits ? ~U(0) : (U(1) << len) - 1) << pos;
  return (a << pos & mask) | (b & ~mask);
}
inline u32 lop3(u32 a, u32 b, u32 c, u32 f) {
  u32 r = 0;
  for (int k = 0; k < 8; k++)
    if (f >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}
inline u32 prmt(u32 a, u32 b, u32 s) {
  u64 all = u64(b) << 32 | a;
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    u32 n = s >> 4 * k, byte = all >> 8 * (n & 7) & 0xff;
    r |= (n & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * k;
  }
  return r;
}
// 2^x by a polynomial in double: the nearest float but for about one argument in 10^7
inline float exp2_float(float x) {
  double c = x < -160  ? -160
             : x > 160 ? 160
                       : x,
         n = std::nearbyint(c), r = (c - n) * 0.6931471805599453;
  double p =
      1 +
      r * (1 + r * (1. / 2 +
                    r * (1. / 6 +
                         r * (1. / 24 +
                              r * (1. / 120 +
                                   r * (1. / 720 + r * (1. / 5040 +
                                                        r * (1. / 40320 + r * (1. / 362880)))))))));
  double scaled = p * std::bit_cast<double>(u64(i64(n) + 1023) << 52);
  return x != x ? x : float(scaled);
}

template <class T>
void integers(const string& t) {
  using U = std::make_unsigned_t<T>;
  TWO("add." + t, U, U, U, a + b);
  TWO("sub." + t, U, U, U, a - b);
  TWO("mul.lo." + t, U, U, U, u64(a) * b);
  TWO("mul.hi." + t, T, T, T, high(a, b));
  THREE("mad.lo." + t, U, U, U, U, u64(a) * b + c);
  THREE("mad.hi." + t, T, T, T, T, high(a, b) + c);
  TWO("div." + t, T, T, T,
      b == 0                              ? T(-1)
      : std::is_signed_v<T> && b == T(-1) ? T(U(0) - U(a))
                                          : T(a / b));
  TWO("rem." + t, T, T, T, b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b));
  TWO("min." + t, T, T, T, a < b ? a : b);
  TWO("max." + t, T, T, T, a > b ? a : b);
  ONE("neg." + t, U, U, U(0) - a);
  ONE("abs." + t, U, T, a < 0 ? U(0) - U(a) : U(a));
  TWO("shr." + t, T, T, u32, shr(a, b));
  THREE("bfe." + t, T, T, u32, u32, bfe(a, b, c));
  THREE("sad." + t, U, T, T, U, (a < b ? U(b) - U(a) : U(a) - U(b)) + c);
  TWO("add.sat." + t, T, T, T, std::clamp<i64>(i64(a) + i64(b), INT32_MIN, INT32_MAX));
  TWO("sub.sat." + t, T, T, T, std::clamp<i64>(i64(a) - i64(b), INT32_MIN, INT32_MAX));
}
template <class T, class W>
void widening(const string& t) {
  TWO("mul.wide." + t, W, T, T, W(a) * W(b));
  THREE("mad.wide." + t, W, T, T, W,
        std::make_unsigned_t<W>(W(a) * W(b)) + std::make_unsigned_t<W>(c));
}
template <class U>
void bits(const string& t) {
  using S = std::make_signed_t<U>;
  TWO("and." + t, U, U, U, a & b);
  TWO("or." + t, U, U, U, a | b);
  TWO("xor." + t, U, U, U, a ^ b);
  ONE("not." + t, U, U, ~a);
  ONE("cnot." + t, U, U, a == 0);
  TWO("shl." + t, U, U, u32, shl(a, b));
  TWO("shr." + t, U, U, u32, shr(a, b));
  ONE("mov." + t, U, U, a);
  DEF("selp." + t) {
    U* d = w.reg<U>(I.o[0]);
    const U *x = w.reg<U>(I.o[1]), *y = w.reg<U>(I.o[2]);
    u32 p = *w.reg<u32>(I.o[3]);
    LANES(d[i] = p >> i & 1 ? x[i] : y[i])
  };
  if constexpr (sizeof(U) >= 4) {
    ONE("popc." + t, u32, U, std::popcount(a));
    ONE("clz." + t, u32, U, std::countl_zero(a));
    ONE("bfind." + t, u32, U, a ? 8 * sizeof(U) - 1 - std::countl_zero(a) : FULL);
    ONE("bfind.shiftamt." + t, u32, U, a ? std::countl_zero(a) : FULL);
    FOUR("bfi." + t, U, U, U, u32, u32, bfi(a, b, c, e));
    ONE("brev." + t, U, U, ([](U v) {
          U r = 0;
          for (size_t k = 0; k < 8 * sizeof(U); k++) r |= (v >> k & 1) << (8 * sizeof(U) - 1 - k);
          return r;
        }(a)));
  }
  (void)sizeof(S);
}

#define FZ(e) (Z ? flush(e) : (e))
template <bool Z>
void floats32() {
  string z = Z ? ".ftz.f32" : ".f32";
  TWO("add" + z, float, float, float, FZ(FZ(a) + FZ(b)));
  TWO("sub" + z, float, float, float, FZ(FZ(a) - FZ(b)));
  TWO("mul" + z, float, float, float, FZ(FZ(a) * FZ(b)));
  THREE("fma" + z, float, float, float, float, FZ(__builtin_fmaf(FZ(a), FZ(b), FZ(c))));
  TWO("div" + z, float, float, float, FZ(FZ(a) / FZ(b)));
  TWO("min" + z, float, float, float, least(FZ(a), FZ(b)));
  TWO("max" + z, float, float, float, most(FZ(a), FZ(b)));
  string n = Z ? ".ftz.NaN.f32" : ".NaN.f32";
  TWO("min" + n, float, float, float, a != a || b != b ? NAN : least(FZ(a), FZ(b)));
  TWO("max" + n, float, float, float, a != a || b != b ? NAN : most(FZ(a), FZ(b)));
  ONE("abs" + z, float, float, FZ(std::fabs(a)));
  ONE("neg" + z, float, float, FZ(-a));
  ONE("sqrt" + z, float, float, FZ(std::sqrt(FZ(a))));
  ONE("rcp" + z, float, float, FZ(1.f / FZ(a)));
  ONE("rsqrt" + z, float, float, FZ(float(1. / std::sqrt(double(FZ(a))))));
  ONE("ex2" + z, float, float, FZ(exp2_float(FZ(a))));
  ONE("lg2" + z, float, float, FZ(float(std::log2(double(FZ(a))))));
  ONE("sin" + z, float, float, FZ(float(std::sin(double(FZ(a))))));
  ONE("cos" + z, float, float, FZ(float(std::cos(double(FZ(a))))));
  ONE("tanh" + z, float, float, std::tanh(a));
  string s = Z ? ".ftz.sat.f32" : ".sat.f32";  // saturation turns NaN to 0
  TWO("add" + s, float, float, float, most(0.f, least(1.f, FZ(a) + FZ(b))));
  TWO("mul" + s, float, float, float, most(0.f, least(1.f, FZ(a) * FZ(b))));
  THREE("fma" + s, float, float, float, float,
        most(0.f, least(1.f, __builtin_fmaf(FZ(a), FZ(b), FZ(c)))));
}
template <class T>
void floats(const string& t) {  // f64, f16, bf16: computed in float where that rounds once
  using W = std::conditional_t<small<T>, float, T>;
  TWO("add." + t, T, T, T, W(a) + W(b));
  TWO("sub." + t, T, T, T, W(a) - W(b));
  TWO("mul." + t, T, T, T, W(a) * W(b));
  TWO("div." + t, T, T, T, W(a) / W(b));
  THREE("fma." + t, T, T, T, T, fused<T>(a, b, c));
  ONE("sqrt." + t, T, T, std::sqrt(W(a)));
  ONE("rcp." + t, T, T, W(1) / W(a));
  ONE("rsqrt." + t, T, T, W(1) / std::sqrt(W(a)));
  TWO("min." + t, T, T, T, least<W>(a, b));
  TWO("max." + t, T, T, T, most<W>(a, b));
  ONE("abs." + t, T, T, std::fabs(W(a)));
  ONE("neg." + t, T, T, -W(a));
  TWO("min.NaN." + t, T, T, T, W(a) != W(a) || W(b) != W(b) ? W(NAN) : least<W>(a, b));
  TWO("max.NaN." + t, T, T, T, W(a) != W(a) || W(b) != W(b) ? W(NAN) : most<W>(a, b));
  ONE("ex2." + t, T, T, std::exp2(W(a)));
  ONE("tanh." + t, T, T, std::tanh(W(a)));
}
// A packed pair is 64 small floats, two a lane
#define PAIRS(...)             \
  for (int i = 0; i < 64; i++) \
    if (m >> (i / 2) & 1) { __VA_ARGS__; }
#define PAIR1(name, expr)                 \
  DEF(name) {                             \
    T* d = w.reg<T>(I.o[0]);              \
    const T* x = w.reg<T>(I.o[1]);        \
    PAIRS(float a = x[i]; d[i] = T(expr)) \
  }
#define PAIR2(name, expr)                                 \
  DEF(name) {                                             \
    T* d = w.reg<T>(I.o[0]);                              \
    const T *x = w.reg<T>(I.o[1]), *y = w.reg<T>(I.o[2]); \
    PAIRS(float a = x[i], b = y[i]; d[i] = T(expr))       \
  }
template <class T>
void pairs(const string& t) {
  PAIR2("add." + t, a + b);
  PAIR2("sub." + t, a - b);
  PAIR2("mul." + t, a * b);
  PAIR2("min." + t, least(a, b));
  PAIR2("max." + t, most(a, b));
  PAIR2("min.NaN." + t, a != a || b != b ? NAN : least(a, b));
  PAIR2("max.NaN." + t, a != a || b != b ? NAN : most(a, b));
  PAIR1("neg." + t, -a);
  PAIR1("abs." + t, std::fabs(a));
  PAIR1("ex2." + t, exp2_float(a));
  PAIR1("tanh." + t, std::tanh(a));
  DEF("fma." + t) {
    T* d = w.reg<T>(I.o[0]);
    const T *x = w.reg<T>(I.o[1]), *y = w.reg<T>(I.o[2]), *z = w.reg<T>(I.o[3]);
    PAIRS(d[i] = fused<T>(x[i], y[i], z[i]))
  };
}

// setp: destination, its complement (-1: none), a, b, third predicate (-1: none), negated, how it
// joins: 0 no 1 and 2 or 3 xor
template <class T, class F>
void compare(Warp& w, const Ins& I, u32 m, F f) {
  const i64* o = I.o;
  const T *x = w.reg<T>(o[2]), *y = w.reg<T>(o[3]);
  u8 r[32];
  u32 p = 0;
  for (int i = 0; i < 32; i++) r[i] = f(x[i], y[i]);
  for (int i = 0; i < 32; i++) p |= u32(r[i]) << i;
  u32 c = o[4] < 0 ? 0 : *w.reg<u32>(o[4]) ^ (o[5] ? FULL : 0), q = ~p;
  if (o[6] == 1) p &= c, q &= c;
  if (o[6] == 2) p |= c, q |= c;
  if (o[6] == 3) p ^= c, q ^= c;
  if (o[0] >= 0) {
    u32* d = w.reg<u32>(o[0]);
    *d = (*d & ~m) | (p & m);
  }
  if (o[1] >= 0) {
    u32* d = w.reg<u32>(o[1]);
    *d = (*d & ~m) | (q & m);
  }
}
#define CMP(c, ...)                                                  \
  DEF("setp." c "." + t) {                                           \
    compare<T>(w, I, m, [](T a, T b) -> u8 { return __VA_ARGS__; }); \
  }
template <class T>
void comparisons(const string& t) {
  CMP("eq", a == b);
  CMP("ne", a < b || a > b);
  CMP("lt", a < b);
  CMP("le", a <= b);
  CMP("gt", a > b);
  CMP("ge", a >= b);
  if constexpr (std::is_integral_v<T>) {
    CMP("lo", a < b);
    CMP("ls", a <= b);
    CMP("hi", a > b);
    CMP("hs", a >= b);
  } else {
    CMP("equ", !(a < b || a > b));
    CMP("neu", !(a == b));
    CMP("ltu", !(a >= b));
    CMP("leu", !(a > b));
    CMP("gtu", !(a <= b));
    CMP("geu", !(a < b));
    CMP("num", a == a && b == b);
    CMP("nan", a != a || b != b);
  }
}

// cvt between integers: destination, source, bits and signedness of the source type, then of the
// destination's; sat
template <class D, class S>
void cvt_int(Warp& w, const Ins& I, u32 m) {
  const i64* o = I.o;
  D* d = w.reg<D>(o[0]);
  const S* s = w.reg<S>(o[1]);
  int from = 64 - o[2], to = 64 - o[4];
  bool ss = o[3], ds = o[5];
  if (o[6]) {
    __int128 lo = ds ? -((__int128)1 << (o[4] - 1)) : 0,
             hi = ((__int128)1 << (o[4] - (ds ? 1 : 0))) - 1;
    LANES(u64 v = u64(s[i]) << from;
          __int128 x = ss ? (__int128)(i64(v) >> from) : (__int128)(v >> from);
          d[i] = D(x < lo   ? lo
                   : x > hi ? hi
                            : x))
    return;
  }
  if (ss && ds) LANES(i64 v = i64(u64(s[i]) << from) >> from; d[i] = D(i64(u64(v) << to) >> to))
  else
    LANES(u64 v = ss ? u64(i64(u64(s[i]) << from) >> from) : u64(s[i]) << from >> from;
          d[i] = D(ds ? u64(i64(v << to) >> to) : v << to >> to))
}
// cvt integer -> float: destination, source, bits and signedness of the source type
template <class F, class S>
void cvt_to_float(Warp& w, const Ins& I, u32 m) {
  const i64* o = I.o;
  F* d = w.reg<F>(o[0]);
  const S* s = w.reg<S>(o[1]);
  int from = 64 - o[2];
  using W = std::conditional_t<std::is_same_v<F, double>, double, float>;
  if (o[3])
    LANES(i64 v = i64(u64(s[i]) << from) >> from;
          d[i] = F(small<F> ? W(to_float_odd(double(v))) : W(v)))
  else
    LANES(u64 v = u64(s[i]) << from >> from; d[i] = F(small<F> ? W(to_float_odd(double(v))) : W(v)))
}
// cvt float -> integer: destination, source, bits and signedness of the destination type, rounding
// 0 rni 1 rzi 2 rmi 3 rpi
template <class D, class F>
void cvt_to_int(Warp& w, const Ins& I, u32 m) {
  const i64* o = I.o;
  D* d = w.reg<D>(o[0]);
  const F* s = w.reg<F>(o[1]);
  double hi = std::ldexp(1., o[2] - (o[3] ? 1 : 0)), lo = o[3] ? -hi : 0;
  u64 most = o[2] == 64 ? (o[3] ? u64(INT64_MAX) : ~0ull) : u64(hi) - 1,
      low = o[3] ? u64(0) - (most + 1) : 0;
  LANES(using W = std::conditional_t<std::is_same_v<F, double>, double, float>; double v = W(s[i]);
        v = o[4] == 0   ? std::nearbyint(v)
            : o[4] == 1 ? std::trunc(v)
            : o[4] == 2 ? std::floor(v)
                        : std::ceil(v);
        u64 r = v != v    ? 0
                : v >= hi ? most
                : v <= lo ? low
                : o[3]    ? u64(i64(v))
                          : u64(v);
        if (v != v && o[2] == 64) r = 1ull << 63; d[i] = D(r))
}
void conversions() {
  ONE("cvt.f32.f16", float, f16, a);
  ONE("cvt.f16.f32", f16, float, a);
  ONE("cvt.f32.bf16", float, bf16, a);
  ONE("cvt.bf16.f32", bf16, float, a);
  ONE("cvt.f64.f32", double, float, a);
  ONE("cvt.f32.f64", float, double, a);
  ONE("cvt.f64.f16", double, f16, float(a));
  ONE("cvt.f16.f64", f16, double, to_float_odd(a));
  ONE("cvt.f64.bf16", double, bf16, float(a));
  ONE("cvt.bf16.f64", bf16, double, to_float_odd(a));
  ONE("cvt.bf16.f16", bf16, f16, float(a));
  ONE("cvt.f16.bf16", f16, bf16, float(a));
  ONE("cvt.ftz.f32.f16", float, f16, a);
  ONE("cvt.ftz.f16.f32", f16, float, flush(a));
  ONE("cvt.f16.f16", f16, f16, a);
  ONE("cvt.f32.f32", float, float, a);
  ONE("cvt.rz.f16.f32", u16, float, to_half(a, 0));
  ONE("cvt.rm.f16.f32", u16, float, to_half(a, -1));
  ONE("cvt.rp.f16.f32", u16, float, to_half(a, 1));
  ONE("cvt.rz.bf16.f32", u16, u32, a >> 16);
  ONE("cvt.rna.tf32.f32", u32, u32, (a & 0x7f800000) == 0x7f800000 ? a : (a + 0x1000) & ~0x1fffu);
  ONE("cvt.tf32.f32", u32, u32,
      (a & 0x7f800000) == 0x7f800000 ? a : (a + 0xfff + (a >> 13 & 1)) & ~0x1fffu);
  ONE("cvt.rni.f32.f32", float, float, std::nearbyint(a));
  ONE("cvt.rzi.f32.f32", float, float, std::trunc(a));
  ONE("cvt.rmi.f32.f32", float, float, std::floor(a));
  ONE("cvt.rpi.f32.f32", float, float, std::ceil(a));
  for (string r : {"rni", "rzi", "rmi", "rpi"})
    table["cvt." + r + ".ftz.f32.f32"] = table["cvt." + r + ".f32.f32"];
  ONE("cvt.rni.f64.f64", double, double, std::nearbyint(a));
  ONE("cvt.rzi.f64.f64", double, double, std::trunc(a));
  ONE("cvt.rmi.f64.f64", double, double, std::floor(a));
  ONE("cvt.rpi.f64.f64", double, double, std::ceil(a));
  ONE("cvt.rni.f16.f16", f16, f16, std::nearbyint(float(a)));
  ONE("cvt.rzi.f16.f16", f16, f16, std::trunc(float(a)));
  ONE("cvt.rmi.f16.f16", f16, f16, std::floor(float(a)));
  ONE("cvt.rpi.f16.f16", f16, f16, std::ceil(float(a)));
  ONE("cvt.sat.f32.f32", float, float, most(0.f, least(1.f, a)));
  ONE("cvt.ftz.sat.f32.f32", float, float, flush(most(0.f, least(1.f, a))));
  TWO("cvt.f16x2.f32", u32, float, float,
      u32(std::bit_cast<u16>(f16(a))) << 16 | std::bit_cast<u16>(f16(b)));
  TWO("cvt.bf16x2.f32", u32, float, float, u32(bf16(a).bits) << 16 | bf16(b).bits);
  TWO("cvt.rz.f16x2.f32", u32, float, float, u32(u16(to_half(a, 0))) << 16 | u16(to_half(b, 0)));
  TWO("cvt.satfinite.e4m3x2.f32", u16, float, float, u16(to_fp8<4, 3>(a)) << 8 | to_fp8<4, 3>(b));
  TWO("cvt.satfinite.e5m2x2.f32", u16, float, float, u16(to_fp8<5, 2>(a)) << 8 | to_fp8<5, 2>(b));
  ONE("cvt.satfinite.e4m3x2.f16x2", u16, u32,
      u16(to_fp8<4, 3>(std::bit_cast<f16>(u16(a >> 16)))) << 8 |
          to_fp8<4, 3>(std::bit_cast<f16>(u16(a))));
  ONE("cvt.satfinite.e5m2x2.f16x2", u16, u32,
      u16(to_fp8<5, 2>(std::bit_cast<f16>(u16(a >> 16)))) << 8 |
          to_fp8<5, 2>(std::bit_cast<f16>(u16(a))));
  ONE("cvt.f16x2.e4m3x2", u32, u16,
      u32(std::bit_cast<u16>(f16(from_fp8<4, 3>(a >> 8)))) << 16 |
          std::bit_cast<u16>(f16(from_fp8<4, 3>(a & 255))));
  ONE("cvt.f16x2.e5m2x2", u32, u16,
      u32(std::bit_cast<u16>(f16(from_fp8<5, 2>(a >> 8)))) << 16 |
          std::bit_cast<u16>(f16(from_fp8<5, 2>(a & 255))));
#define INTS(D, S, n) table["cvt.int." n] = cvt_int<D, S>
  INTS(u16, u16, "2.2");
  INTS(u16, u32, "2.4");
  INTS(u16, u64, "2.8");
  INTS(u32, u16, "4.2");
  INTS(u32, u32, "4.4");
  INTS(u32, u64, "4.8");
  INTS(u64, u16, "8.2");
  INTS(u64, u32, "8.4");
  INTS(u64, u64, "8.8");
#define FLOAT(F, n)                               \
  table["cvt." n ".int2"] = cvt_to_float<F, u16>; \
  table["cvt." n ".int4"] = cvt_to_float<F, u32>; \
  table["cvt." n ".int8"] = cvt_to_float<F, u64>; \
  table["cvt.int2." n] = cvt_to_int<u16, F>;      \
  table["cvt.int4." n] = cvt_to_int<u32, F>;      \
  table["cvt.int8." n] = cvt_to_int<u64, F>
  FLOAT(float, "f32");
  FLOAT(double, "f64");
  FLOAT(f16, "f16");
  FLOAT(bf16, "bf16");
}

// Arithmetic with carry: KIND 0 add, 1 sub, 2 mad.lo, 3 mad.hi; with the carry of before (IN),
// leaving its own (OUT)
template <class U, int KIND, bool IN, bool OUT>
void carrying(Warp& w, const Ins& I, u32 m) {
  using W = unsigned __int128;
  constexpr int bits = 8 * sizeof(U);
  U *d = w.reg<U>(I.o[0]), *x = w.reg<U>(I.o[1]), *y = w.reg<U>(I.o[2]),
    *z = KIND >= 2 ? w.reg<U>(I.o[3]) : nullptr;
  u32 out = 0;
  for (u32 i = 0; i < 32; i++) {
    if (!(m >> i & 1)) continue;
    W c = IN ? w.carry >> i & 1 : 0,
      r = KIND == 0   ? W(x[i]) + y[i] + c
          : KIND == 1 ? W(x[i]) - y[i] - c
                      : W(U(W(x[i]) * y[i] >> (KIND == 3 ? bits : 0))) + z[i] + c;
    d[i] = U(r), out |= u32(r >> bits & 1) << i;
  }
  if (OUT) w.carry = (w.carry & ~m) | out;
}
template <class U>
void carries(const string& t) {
#define CARRY(name, part, k)                                                           \
  table[name part ".cc." + t] = carrying<U, k, false, true>,                           \
                           table[name "c" part "." + t] = carrying<U, k, true, false>, \
                           table[name "c" part ".cc." + t] = carrying<U, k, true, true>
  CARRY("add", "", 0);
  CARRY("sub", "", 1);
  CARRY("mad", ".lo", 2);
  CARRY("mad", ".hi", 3);
}

// ---- between lanes

// shfl: destination, predicate (-1: none), source, lane operand, clamp, mode 0 up 1 down 2 bfly 3
// idx
void shuffle(Warp& w, const Ins& I, u32 m) {
  const i64* o = I.o;
  u32 s[32], *d = o[0] < 0 ? nullptr : w.reg<u32>(o[0]), *b = w.reg<u32>(o[3]),
             *c = w.reg<u32>(o[4]), ok = 0;
  memcpy(s, w.reg<u32>(o[2]), sizeof s);
  for (int i = 0; i < 32; i++) {
    if (!(m >> i & 1)) continue;
    i32 seg = c[i] >> 8 & 31, clamp = c[i] & 31, n = b[i] & 31, most = (i & seg) | (clamp & ~seg),
        least = i & seg, j;
    bool in;
    if (o[5] == 0) j = i - n, in = j >= most;
    else if (o[5] == 1) j = i + n, in = j <= most;
    else if (o[5] == 2) j = i ^ n, in = j <= most;
    else j = least | (n & ~seg), in = j <= most;
    if (!in) j = i;
    if (d) d[i] = s[j];
    ok |= u32(in) << i;
  }
  if (o[1] >= 0) {
    u32* p = w.reg<u32>(o[1]);
    *p = (*p & ~m) | (ok & m);
  }
}
template <class T, class F>
void reduce(Warp& w, const Ins& I, u32 m, F f) {
  T *s = w.reg<T>(I.o[1]), *d = w.reg<T>(I.o[0]), r{};
  bool first = true;
  for (int i = 0; i < 32; i++)
    if (m >> i & 1) r = first ? s[i] : f(r, s[i]), first = false;
  for (int i = 0; i < 32; i++)
    if (m >> i & 1) d[i] = r;
}
void between_lanes() {
  table["shfl"] = shuffle;
#define SET_PRED(slot, value)       \
  {                                 \
    u32* d = w.reg<u32>(slot);      \
    *d = (*d & ~m) | ((value) & m); \
  }
  DEF("vote.all.pred") {
    u32 p = *w.reg<u32>(I.o[1]) ^ (I.o[2] ? FULL : 0);
    SET_PRED(I.o[0], (p & m) == m ? FULL : 0)
  };
  DEF("vote.any.pred") {
    u32 p = *w.reg<u32>(I.o[1]) ^ (I.o[2] ? FULL : 0);
    SET_PRED(I.o[0], p & m ? FULL : 0)
  };
  DEF("vote.uni.pred") {
    u32 p = *w.reg<u32>(I.o[1]) ^ (I.o[2] ? FULL : 0);
    SET_PRED(I.o[0], (p & m) == m || !(p & m) ? FULL : 0)
  };
  DEF("vote.ballot.b32") {
    u32 p = *w.reg<u32>(I.o[1]) ^ (I.o[2] ? FULL : 0), *d = w.reg<u32>(I.o[0]);
    LANES(d[i] = p & m)
  };
  DEF("activemask.b32") {
    u32* d = w.reg<u32>(I.o[0]);
    LANES(d[i] = m)
  };
  DEF("match.any.b32") {
    u32 r[32] = {}, *d = w.reg<u32>(I.o[0]), *s = w.reg<u32>(I.o[1]);
    for (int i = 0; i < 32; i++)
      for (int j = 0; j < 32; j++) r[i] |= u32(s[i] == s[j]) << j;
    LANES(d[i] = r[i] & m)
  };
  DEF("elect") {
    if (I.o[0] >= 0) {
      u32* d = w.reg<u32>(I.o[0]);
      LANES(d[i] = __builtin_ctz(m))
    }
    SET_PRED(I.o[1], m & -m)
  };
#define REDUX(name, T, expr)                                \
  DEF("redux." name) {                                      \
    reduce<T>(w, I, m, [](T a, T b) -> T { return expr; }); \
  }
  REDUX("add.u32", u32, a + b);
  REDUX("add.s32", u32, a + b);
  REDUX("min.u32", u32, std::min(a, b));
  REDUX("max.u32", u32, std::max(a, b));
  REDUX("min.s32", i32, std::min(a, b));
  REDUX("max.s32", i32, std::max(a, b));
  REDUX("and.b32", u32, a & b);
  REDUX("or.b32", u32, a | b);
  REDUX("xor.b32", u32, a ^ b);
}

template <class T>
T add_small(T a, T b) {
  return T(float(a) + float(b));
}
template <class T>
u32 add_pair(u32 a, u32 b) {
  T x[2], y[2];
  memcpy(x, &a, 4), memcpy(y, &b, 4);
  for (int i = 0; i < 2; i++) x[i] = add_small(x[i], y[i]);
  memcpy(&a, x, 4);
  return a;
}
void atomics() {
#define ATOM(name, T, expr)                     \
  DEF("atom." name) {                           \
    atomic<T>(w, I, m, [](T a, T b, T c) -> T { \
      (void)a, (void)b, (void)c;                \
      return expr;                              \
    });                                         \
  }
#define ATOMS(n, U, S)                         \
  ATOM("add.u" n, U, a + b);                   \
  ATOM("add.s" n, U, a + b);                   \
  ATOM("min.u" n, U, std::min(a, b));          \
  ATOM("max.u" n, U, std::max(a, b));          \
  ATOM("min.s" n, U, U(std::min(S(a), S(b)))); \
  ATOM("max.s" n, U, U(std::max(S(a), S(b)))); \
  ATOM("and.b" n, U, a& b);                    \
  ATOM("or.b" n, U, a | b);                    \
  ATOM("xor.b" n, U, a ^ b);                   \
  ATOM("exch.b" n, U, b);                      \
  ATOM("cas.b" n, U, a == b ? c : a);          \
  ATOM("inc.u" n, U, a >= b ? 0 : a + 1);      \
  ATOM("dec.u" n, U, a == 0 || a > b ? b : a - 1)
  ATOMS("32", u32, i32);
  ATOMS("64", u64, i64);
  ATOM("cas.b16", u16, a == b ? c : a);
  ATOM("exch.b16", u16, b);
  ATOM("add.f32", u32, std::bit_cast<u32>(std::bit_cast<float>(a) + std::bit_cast<float>(b)));
  ATOM("add.f64", u64, std::bit_cast<u64>(std::bit_cast<double>(a) + std::bit_cast<double>(b)));
  ATOM("add.f16", u16, std::bit_cast<u16>(add_small(std::bit_cast<f16>(a), std::bit_cast<f16>(b))));
  ATOM("add.bf16", u16,
       std::bit_cast<u16>(add_small(std::bit_cast<bf16>(a), std::bit_cast<bf16>(b))));
  ATOM("add.f16x2", u32, add_pair<f16>(a, b));
  ATOM("add.bf16x2", u32, add_pair<bf16>(a, b));
}

// ---- tensor cores
//
// A 32-bit register of a fragment holds an 8x8 matrix of 16-bit numbers by rows (A, and B
// transposed), or an 8x4 one of 32-bit numbers; two registers of fp32 accumulators hold the even
// and the odd columns of an 8x8 one.

template <class T>
float lift(T x) {
  return float(x);
}
struct tf32 {
  u32 bits;
  operator float() const { return std::bit_cast<float>(bits & 0xffffe000); }
};

// D[16, 8] = A[16, K] B[K, 8] + C; operands d, a, b, c registers
template <class T, class Acc, int K>
void mma(Warp& w, const Ins& I, u32) {
  constexpr int per = 4 / sizeof(T), cols = 4 * per, na = 2 * K / cols, nb = K / cols,
                nc = sizeof(Acc) == 4 ? 4 : 2;
  const i64 *d = I.o, *ra = d + nc, *rb = ra + na, *rc = rb + nb;
  using W = std::conditional_t<std::is_integral_v<T>, i32, float>;
  alignas(64) W a[16][K], b[K][8], c[16][8];
  for (int r = 0; r < na; r++) {
    const T* s = w.reg<T>(ra[r]);
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < cols; j++) a[i + 8 * (r & 1)][j + cols * (r >> 1)] = W(s[i * cols + j]);
  }
  for (int r = 0; r < nb; r++) {
    const T* s = w.reg<T>(rb[r]);
    for (int j = 0; j < cols; j++)
      for (int i = 0; i < 8; i++) b[j + cols * r][i] = W(s[i * cols + j]);
  }
  for (int h = 0; h < 2; h++)
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++)
        c[i + 8 * h][j] = sizeof(Acc) == 4 ? W(w.reg<Acc>(rc[2 * h + (j & 1)])[4 * i + j / 2])
                                           : W(w.reg<Acc>(rc[h])[8 * i + j]);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++)
      for (int j = 0; j < 8; j++)
        c[i][j] = std::is_integral_v<T> ? W(c[i][j] + a[i][k] * b[k][j])
                                        : W(__builtin_fmaf(a[i][k], b[k][j], c[i][j]));
  for (int h = 0; h < 2; h++)
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++)
        (sizeof(Acc) == 4 ? w.reg<Acc>(d[2 * h + (j & 1)])[4 * i + j / 2]
                          : w.reg<Acc>(d[h])[8 * i + j]) = Acc(c[i + 8 * h][j]);
}
// ldmatrix, stmatrix: address slot, width, offset, count, transposed, space, registers; rows come
// from the lanes in order
template <bool LOAD>
void matrix(Warp& w, const Ins& I, u32 m) {
  const i64* o = I.o;
  int n = o[3], space = o[5];
  u64 a[32];
  u16 rows[32][8];
  alignas(32) u8 fresh[32][32];
  addresses(w, o[0], o[1], o[2], a);
  u32 used = n == 4 ? FULL : (1u << 8 * n) - 1;
  if (!LOAD) {
    for (int k = 0; k < n; k++) {
      const u16* s = w.reg<u16>(o[6 + k]);
      for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) rows[8 * k + i][j] = o[4] ? s[8 * j + i] : s[8 * i + j];
    }
    for (int i = 0; i < 32; i++) memcpy(fresh[i], rows[i], 16);
  }
  u32 good =
      access(w, I, m & used, a, 16, space, LOAD ? READ : WRITE, LOAD ? nullptr : fresh[0], 2);
  for (int i = 0; i < 8 * n; i++)
    if (good >> i & 1)
      LOAD ? memcpy(rows[i], host(w, space, a[i], i), 16)
           : memcpy(host(w, space, a[i], i), rows[i], 16);
    else memset(rows[i], 0, 16);
  if (!LOAD) return;
  for (int k = 0; k < n; k++) {
    u16* d = w.reg<u16>(o[6 + k]);
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++) d[8 * i + j] = o[4] ? rows[8 * k + j][i] : rows[8 * k + i][j];
  }
}

// ---- wgmma: D[64, N] = A[64, K] B[K, N] + D by four warps, each its own 16 rows; operands come
// from shared memory in 16-byte pieces as a descriptor says, results reach the registers when they
// are waited for
//
// operands: N, descriptor slot of A (-1: registers), 4 registers of A, descriptor slot of B,
// predicate slot of D's use, signs of A and B, transposed A, transposed B, then N / 2 registers of
// D

struct Tile {  // one operand in shared memory, rows along M or N
  u64 start, leading, stride, width;
  bool transposed;
  Tile(u64 d, bool t)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        width(d >> 62 ? 256u >> (d >> 62) : 16),
        transposed(t) {}
  u64 piece(u64 row, u64 k) const {  // where the 16 bytes with byte `k` of row `row` are
                                     // (transposed: byte `row` of column `k`)
    u64 a;
    if (width == 16)
      a = transposed ? start + row / 16 * stride + k / 8 * leading + k % 8 * 16
                     : start + row / 8 * stride + row % 8 * 16 + k / 16 * leading;
    else
      a = transposed ? start + row / width * leading + k / 8 * stride + k % 8 * width +
                           row % width / 16 * 16
                     : start + row / 8 * stride + row % 8 * width + k / 16 * 16;
    return a ^ ((a >> 3) & (width - 16));  // the swizzle
  }
};
template <class T>
void fetch(Warp& w, const Ins& I, const Tile& t, int first, int rows,
           std::vector<float>& out) {  // out[rows][32 bytes of K]
  constexpr int per = 16 / sizeof(T), K = 2 * per;
  int space = SHARED;
  u64 a[32];
  auto read = [&](u64 at, auto put) {
    for (auto& x : a) x = at;
    T v[per] = {};
    if (access(w, I, 1, a, 16, space, READ, nullptr, 4, false))
      memcpy(v, host(w, space, at, 0), 16);
    for (int j = 0; j < per; j++) put(j, float(v[j]));
  };
  out.resize(rows * K);
  for (int r = 0; r < rows; r += t.transposed ? per : 1)
    for (int k = 0; k < K; k += t.transposed ? 1 : per)
      if (t.transposed)
        read(t.piece((first + r) * sizeof(T), k),
             [&](int j, float v) { out[(r + j) * K + k] = v; });
      else read(t.piece(first + r, k * sizeof(T)), [&](int j, float v) { out[r * K + k + j] = v; });
}
template <class T>
void wgmma(Warp& w, const Ins& I, u32) {
  constexpr int per = 16 / sizeof(T), K = 2 * per;
  const i64 *o = I.o, *d = o + 12;
  int n = o[0];
  static thread_local std::vector<float> a, b;
  if (o[1] >= 0) fetch<T>(w, I, Tile(*w.reg<u64>(o[1]), o[10]), 16 * (w.id & 3), 16, a);
  else {
    a.resize(16 * K);
    for (int r = 0; r < 4; r++) {
      const T* s = w.reg<T>(o[2 + r]);
      for (int i = 0; i < 8; i++)
        for (int j = 0; j < per; j++)
          a[(i + 8 * (r & 1)) * K + j + per * (r >> 1)] = float(s[i * per + j]);
    }
  }
  fetch<T>(w, I, Tile(*w.reg<u64>(o[6]), o[11]), 0, n, b);
  bool add = *w.reg<u32>(o[7]) & 1;
  float sign = o[8] * o[9];
  for (int i = 0; i < n / 2; i++) {
    auto& v = w.late[d[i]];
    float* reg = w.reg<float>(d[i]);
    if (v.empty()) v.assign(reg, reg + 32);
    if (!add) v.assign(32, 0.f);
    for (int l = 0; l < 32; l++) {
      const float *x = &a[(l / 4 + 8 * (i / 2 % 2)) * K],
                  *y = &b[(i / 4 * 8 + l % 4 * 2 + i % 2) * K];
      float sum = v[l];
      for (int k = 0; k < K; k++) sum = __builtin_fmaf(sign * x[k], y[k], sum);
      v[l] = sum;
    }
    memset(reg, 0xff, 128);
  }
  w.issued.push_back(&I);
}
void wgmma_commit(Warp& w, const Ins&, u32) {
  w.waves.push_back(std::move(w.issued));
  w.issued.clear();
}
void wgmma_wait(Warp& w, const Ins& I, u32) {
  for (; (i64)w.waves.size() > I.o[0]; w.waves.pop_front())
    for (const Ins* done : w.waves.front())
      for (int i = 0; i < done->o[0] / 2; i++) {
        auto slot = done->o[12 + i];
        auto pending = [&](auto& list) {
          return std::any_of(list.begin(), list.end(), [&](const Ins* x) {
            return std::find(x->o + 12, x->o + 12 + x->o[0] / 2, slot) != x->o + 12 + x->o[0] / 2;
          });
        };
        if (std::any_of(w.waves.begin() + 1, w.waves.end(), pending) || pending(w.issued)) continue;
        if (auto found = w.late.find(slot); found != w.late.end())
          memcpy(w.reg<float>(slot), found->second.data(), 128), w.late.erase(found);
      }
}

// ---- everything else

// One wide register and the narrow ones it is made of, lowest first: wide, count, narrow registers
// (-1: none)
template <class D, class S, bool PACK>
void repack(Warp& w, const Ins& I, u32 m) {
  D* d = w.reg<D>(I.o[0]);
  int n = I.o[1];
  D out[32];
  if (PACK) memset(out, 0, sizeof out);
  else memcpy(out, d, sizeof out);
  for (int k = 0; k < n; k++) {
    if (I.o[2 + k] < 0) continue;
    S* s = w.reg<S>(I.o[2 + k]);
    int shift = 8 * sizeof(S) * k;
    if (PACK)
      for (int i = 0; i < 32; i++) out[i] |= D(D(s[i]) << shift);
    else LANES(s[i] = S(out[i] >> shift))
  }
  if (PACK) LANES(d[i] = out[i])
}
template <class S>
void loads(const string& t) {  // by the width of the register
  using U = std::make_unsigned_t<S>;
  if constexpr (sizeof(S) <= 2)
    table["ld.2." + t] = load<u16, S>, table["st.2." + t] = store<u16, U>;
  if constexpr (sizeof(S) <= 4)
    table["ld.4." + t] = load<u32, S>, table["st.4." + t] = store<u32, U>;
  table["ld.8." + t] = load<u64, S>, table["st.8." + t] = store<u64, U>;
}
void fill_table() {
  integers<i16>("s16"), integers<u16>("u16"), integers<i32>("s32"), integers<u32>("u32"),
      integers<i64>("s64"), integers<u64>("u64");
  for (string k : {"u", "s", "b"}) carries<u32>(k + "32"), carries<u64>(k + "64");
  widening<i16, i32>("s16"), widening<u16, u32>("u16"), widening<i32, i64>("s32"),
      widening<u32, u64>("u32");
  bits<u16>("b16"), bits<u32>("b32"), bits<u64>("b64");
  floats32<false>(), floats32<true>(), floats<double>("f64"), floats<f16>("f16"),
      floats<bf16>("bf16"), pairs<f16>("f16x2"), pairs<bf16>("bf16x2");
  comparisons<i16>("s16"), comparisons<u16>("u16"), comparisons<i32>("s32"),
      comparisons<u32>("u32"), comparisons<i64>("s64"), comparisons<u64>("u64");
  comparisons<u16>("b16"), comparisons<u32>("b32"), comparisons<u64>("b64"),
      comparisons<float>("f32"), comparisons<double>("f64"), comparisons<f16>("f16"),
      comparisons<bf16>("bf16");
  conversions(), between_lanes(), atomics();
  loads<u8>("u8"), loads<i8>("s8"), loads<u16>("u16"), loads<i16>("s16"), loads<u32>("u32"),
      loads<i32>("s32"), loads<u64>("u64"), loads<i64>("s64");
  FOUR("lop3.b32", u32, u32, u32, u32, u32, lop3(a, b, c, e));
  THREE("prmt.b32", u32, u32, u32, u32, prmt(a, b, c));
  THREE("shf.l.wrap.b32", u32, u32, u32, u32, (u64(b) << 32 | a) << (c & 31) >> 32);
  THREE("shf.r.wrap.b32", u32, u32, u32, u32, (u64(b) << 32 | a) >> (c & 31));
  THREE("shf.l.clamp.b32", u32, u32, u32, u32, c >= 32 ? a : (u64(b) << 32 | a) << c >> 32);
  THREE("shf.r.clamp.b32", u32, u32, u32, u32, c >= 32 ? b : (u64(b) << 32 | a) >> c);
  TWO("copysign.f32", u32, u32, u32, (a & 0x80000000) | (b & 0x7fffffff));
  TWO("copysign.f64", u64, u64, u64, (a & 1ull << 63) | (b & ~(1ull << 63)));
#define DOT(n, A, B, R)                                                         \
  THREE("dp4a." n, R, u32, u32, R, ([](u32 a, u32 b, R c) {                     \
          for (int k = 0; k < 4; k++) c += R(A(a >> 8 * k)) * R(B(b >> 8 * k)); \
          return c;                                                             \
        }(a, b, c)))
  DOT("u32.u32", u8, u8, u32);
  DOT("s32.s32", i8, i8, i32);
  DOT("u32.s32", u8, i8, i32);
  DOT("s32.u32", i8, u8, i32);
#define HALVES(t, T)                                                                        \
  TWO("add." t, u32, u32, u32, ((a + b) & 0xffff) | ((a & 0xffff0000) + (b & 0xffff0000))); \
  TWO("min." t, u32, u32, u32,                                                              \
      u16(std::min(T(a), T(b))) | u32(u16(std::min(T(a >> 16), T(b >> 16)))) << 16);        \
  TWO("max." t, u32, u32, u32,                                                              \
      u16(std::max(T(a), T(b))) | u32(u16(std::max(T(a >> 16), T(b >> 16)))) << 16)
  HALVES("s16x2", i16);
  HALVES("u16x2", u16);
  table["pack.4.2"] = repack<u32, u16, true>, table["pack.8.2"] = repack<u64, u16, true>,
  table["pack.8.4"] = repack<u64, u32, true>;
  table["unpack.4.2"] = repack<u32, u16, false>, table["unpack.8.2"] = repack<u64, u16, false>,
  table["unpack.8.4"] = repack<u64, u32, false>;
#define PRED(name, expr)                                            \
  DEF(name) {                                                       \
    u32 a = *w.reg<u32>(I.o[1]), b = *w.reg<u32>(I.o[2]), p = expr; \
    SET_PRED(I.o[0], p)                                             \
  }
  PRED("and.pred", a & b);
  PRED("or.pred", a | b);
  PRED("xor.pred", a ^ b);
  DEF("not.pred") {
    u32 p = ~*w.reg<u32>(I.o[1]);
    SET_PRED(I.o[0], p)
  };
  DEF("mov.pred") {
    u32 p = *w.reg<u32>(I.o[1]);
    SET_PRED(I.o[0], p)
  };
  table["cp.async"] = cp_async, table["cp.async.commit"] = cp_commit,
  table["cp.async.wait"] = cp_wait;
  table["ldmatrix"] = matrix<true>, table["stmatrix"] = matrix<false>;
  table["mma.m16n8k16.f32.f16.f16.f32"] = mma<f16, float, 16>,
  table["mma.m16n8k8.f32.f16.f16.f32"] = mma<f16, float, 8>;
  table["mma.m16n8k16.f16.f16.f16.f16"] = mma<f16, f16, 16>,
  table["mma.m16n8k8.f16.f16.f16.f16"] = mma<f16, f16, 8>;
  table["mma.m16n8k16.f32.bf16.bf16.f32"] = mma<bf16, float, 16>,
  table["mma.m16n8k8.f32.bf16.bf16.f32"] = mma<bf16, float, 8>;
  table["mma.m16n8k8.f32.tf32.tf32.f32"] = mma<tf32, float, 8>,
  table["mma.m16n8k4.f32.tf32.tf32.f32"] = mma<tf32, float, 4>;
  table["mma.m16n8k32.s32.s8.s8.s32"] = mma<i8, i32, 32>,
  table["mma.m16n8k16.s32.s8.s8.s32"] = mma<i8, i32, 16>;
  table["mma.m16n8k32.s32.u8.u8.s32"] = mma<u8, i32, 32>;
  table["wgmma.f16"] = wgmma<f16>, table["wgmma.bf16"] = wgmma<bf16>,
  table["wgmma.tf32"] = wgmma<tf32>;
  table["wgmma.commit_group"] = wgmma_commit, table["wgmma.wait_group"] = wgmma_wait;
  for (auto name : {"nop", "branch", "exit", "barrier", "barrier.arrive", "trap"})
    table[name] = [](Warp&, const Ins&, u32) {};
  table["trap"] = [](Warp& w, const Ins& I, u32 m) {
    report(w, I, TRAP, __builtin_ctz(m), 0, 0, 0);
    w.machine->fatal = true;
  };
}

// ---- warps, CTAs, launches

// Where both sides of every conditional branch meet: its immediate post-dominator among the basic
// blocks
void find_joins(std::vector<Ins>& code) {
  const u32 n = code.size();
  std::set<u32> leaders{0};
  for (const Ins& I : code) {
    if ((I.flow == BRANCH || I.flow == EXIT) && I.pc + 1 < n) leaders.insert(I.pc + 1);
    if (I.flow == BRANCH) leaders.insert(I.target);
  }
  const std::vector<u32> starts(leaders.begin(), leaders.end());
  const u32 blocks = starts.size(), words = (blocks + 63) / 64;
  auto block = [&](u32 pc) {
    return u32(std::lower_bound(starts.begin(), starts.end(), pc) - starts.begin());
  };
  auto last = [&](u32 b) -> Ins& { return code[(b + 1 < blocks ? starts[b + 1] : n) - 1]; };
  std::vector<std::vector<u32>> follow(blocks);
  for (u32 b = 0; b < blocks; b++) {
    const Ins& I = last(b);
    if (I.flow == BRANCH) follow[b].push_back(block(I.target));
    if (b + 1 < blocks && ((I.flow != BRANCH && I.flow != EXIT) || I.pred >= 0))
      follow[b].push_back(b + 1);
  }
  // bit sets: the blocks on every way from here to the end
  std::vector<std::vector<u64>> after(blocks, std::vector<u64>(words, ~0ull));
  for (bool changed = true; changed;) {
    changed = false;
    for (u32 b = blocks; b-- > 0;) {
      bool leaves = last(b).flow == EXIT || follow[b].empty();
      std::vector<u64> common(words, leaves ? 0 : ~0ull);
      for (u32 t : follow[b])
        for (u32 k = 0; k < words; k++) common[k] &= after[t][k];
      common[b / 64] |= 1ull << b % 64;
      if (common != after[b]) after[b] = common, changed = true;
    }
  }
  std::vector<u32> size(blocks, 0);
  for (u32 b = 0; b < blocks; b++)
    for (u64 word : after[b]) size[b] += std::popcount(word);
  for (u32 b = 0; b < blocks; b++) {
    Ins& I = last(b);
    if (I.flow != BRANCH || I.pred < 0) continue;
    u32 nearest = blocks;
    for (u32 t = 0; t < blocks; t++)
      if (t != b && after[b][t / 64] >> t % 64 & 1 &&
          (nearest == blocks || size[t] > size[nearest]))
        nearest = t;
    if (nearest < blocks) I.join = starts[nearest];
  }
}

void meet(Warp& w) {  // lanes that have come to the end of their side, or have gone, give way to
                      // those below them
  while (!w.others.empty() && (!w.active || w.pc == w.join)) {
    Fragment f = w.others.back();
    w.others.pop_back(), w.pc = f.pc, w.active = f.mask & ~w.gone, w.join = f.join;
  }
}
void diverge(Warp& w, const Ins& I, u32 taken) {
  u32 rest = w.active & ~taken;
  i32 next = w.pc + 1;
  if (I.join != w.join) w.others.push_back({I.join, w.active, w.join}), w.join = I.join;
  if (I.target == I.join) w.pc = next, w.active = rest;
  else if (next == I.join) w.pc = I.target, w.active = taken;
  else w.others.push_back({I.target, taken, I.join}), w.pc = next, w.active = rest;
}

// Run until the warp waits, ends, or has had `slice` instructions
void run(Warp& w, u64 slice) {
  Machine& k = *w.machine;
  const Ins* code = k.program.code.data();
  while (slice--) {
    const Ins& I = code[w.pc];
    u32 m = w.active;
    if (I.pred >= 0) {
      u32 p = *w.reg<u32>(I.pred);
      m &= I.negated ? ~p : p;
    }
    k.executed[I.pc]++, k.lanes[I.pc] += std::popcount(m);
    if (!k.left--) {
      report(w, I, BUDGET, 0, 0, 0, 0);
      k.fatal = true;
      return;
    }
    if (I.flow == PLAIN) {
      if (m) I.fn(w, I, m);
      w.pc++;
      if (k.fatal) return;
    } else if (I.flow == BRANCH) {
      if (m == w.active) w.pc = I.target;
      else if (!m) w.pc++;
      else diverge(w, I, m);
    } else if (I.flow == EXIT) {
      w.active &= ~m, w.gone |= m, w.pc++, meet(w);
      if (!w.active) {
        w.state = Warp::DONE;
        return;
      }
      continue;
    } else if (m) {  // a barrier: operands which, threads (0: all)
      if (m != ~w.gone) report(w, I, DIVERGENT, __builtin_ctz(m), 0, 0, 0);
      i32 which = w.reg<u32>(I.o[0])[0] & 15;
      u32 threads = I.o[1] < 0 ? 0 : w.reg<u32>(I.o[1])[0];
      Barrier& b = w.block->barriers[which];
      b.arrived += 32, b.expected = threads, b.who.push_back(w.id), w.pc++;
      if (I.flow == BARRIER) {
        w.state = Warp::WAITING, w.barrier = which;
        return;
      }
    } else w.pc++;
    if (!w.others.empty()) meet(w);
  }
}

bool release(Block& b) {  // open the barriers that are full
  u32 live = 0;
  bool any = false;
  for (Warp& w : b.warps) live += 32 * (w.state != Warp::DONE);
  for (int i = 0; i < 16; i++) {
    Barrier& r = b.barriers[i];
    if (!r.arrived || r.arrived < (r.expected ? r.expected : live)) continue;
    any = true;
    std::vector<u32> known(b.warps.size(), 0);
    for (u32 v : r.who)
      for (size_t j = 0; j < known.size(); j++) known[j] = std::max(known[j], b.warps[v].seen[j]);
    for (u32 v : r.who) known[v] = b.now + 1;
    for (u32 v : r.who) {
      Warp& w = b.warps[v];
      if (!(w.state == Warp::WAITING && w.barrier == i)) continue;
      w.state = Warp::READY, w.seen = known, w.oldest = FULL;
      for (size_t j = 0; j < known.size(); j++)
        if (j != v) w.oldest = std::min(w.oldest, known[j]);
    }
    b.now++, b.warps[0].machine->barriers++;
    r = Barrier{};
  }
  return any;
}

u32 special(i32 which, u32 warp, u32 lane, const u32* cta,
            const i32* grid) {  // the order is that of SPECIAL
  switch (which) {
    case 0: return 32 * warp + lane;  // %tid.x
    case 1:
    case 2:
    case 3: return cta[which - 1];
    case 4: return lane;
    case 5: return warp;
    case 6: return FULL << lane;            // %lanemask_ge
    case 7: return (FULL << lane) << 1;     // gt
    case 8: return ~(FULL << lane);         // lt
    case 9: return ~((FULL << lane) << 1);  // le
    case 10: return 1u << lane;             // eq
    default: return grid[which - 11];       // %nctaid
  }
}

void run_cta(Machine& k, u32 index, std::mt19937_64& random) {
  Launch& l = k.launch;
  Block& b = k.block;
  b.cta = index % (MANY_CTAS - 2) + 1, b.now = 0;
  u32 at[3] = {index % l.grid[0], index / l.grid[0] % l.grid[1], index / l.grid[0] / l.grid[1]};
  memset(b.shared.data(), 0xff, b.shared.size());
  for (auto& r : b.barriers) r = Barrier{};
  std::vector<u32> order(l.warps);
  for (int v = 0; v < l.warps; v++) {
    Warp& w = b.warps[v];
    order[v] = v;
    w.id = v, w.pc = 0, w.active = FULL, w.join = -1, w.gone = w.carry = 0, w.state = Warp::READY,
    w.others.clear(), w.open.clear(), w.groups.clear();
    w.late.clear(), w.issued.clear(), w.waves.clear();
    w.seen.assign(l.warps, 0), w.oldest = 0, w.local.assign(32 * k.program.local, 0xff);
    memcpy(w.regs, k.image.data(), k.image.size());
    for (auto [which, slot] : k.program.special) {
      u32* d = w.reg<u32>(slot);
      for (u32 i = 0; i < 32; i++) d[i] = special(which, v, i, at, l.grid);
    }
  }
  for (u64 turn = 0; !k.fatal; turn++) {
    bool moved = false, done = true;
    if (l.random) std::shuffle(order.begin(), order.end(), random);
    for (u32 v : order) {
      Warp& w = b.warps[v];
      if (w.state == Warp::READY) moved = true, run(w, l.random ? 50 + random() % 200 : 20000);
      done &= w.state == Warp::DONE;
      if (k.fatal) return;
    }
    moved |= release(b);
    if (done) return;
    if (!moved) {
      for (Warp& w : b.warps)
        if (w.state == Warp::WAITING) {
          report(w, k.program.code[w.pc - 1], DEADLOCK, 0, 0, 0, 0);
          k.fatal = true;
          return;
        }
    }
  }
}

// ---- decoding: PTX text to a program. The subset is what LLVM and Triton's inline assembly emit

using Words = std::vector<string>;
struct Unsupported {
  string why;
};

bool among(const string& word, const Words& list) {
  return std::find(list.begin(), list.end(), word) != list.end();
}
bool starts(const string& s, const string& with) { return s.compare(0, with.size(), with) == 0; }
string strip(const string& s, const string& what = " \t\r\n") {
  size_t a = s.find_first_not_of(what), b = s.find_last_not_of(what);
  return a == string::npos ? "" : s.substr(a, b - a + 1);
}
Words split(const string& s, const string& at = " \t\r\n") {
  Words out;
  for (size_t i = 0; (i = s.find_first_not_of(at, i)) != string::npos;) {
    size_t end = std::min(s.find_first_of(at, i), s.size());
    out.push_back(strip(s.substr(i, end - i))), i = end;
  }
  return out;
}
string join(const Words& words, const string& with = ".") {
  string out;
  for (auto& w : words) out += (out.empty() ? "" : with) + w;
  return out;
}
Words list(const string& vector) { return split(strip(vector, "{} \t\n"), ","); }  // {%r1, %r2}
int number_in(const string& kind) {
  size_t i = kind.find_first_of("0123456789");
  if (i == string::npos) throw Unsupported{"the type " + kind};
  return std::stoi(kind.substr(i));
}
bool is_kind(const string& w) {
  static const Words kinds = split(
      "b8 u8 s8 b16 u16 s16 f16 bf16 b32 u32 s32 f32 f16x2 bf16x2 s16x2 u16x2 tf32 b64 u64 s64 f64 "
      "pred e4m3x2 e5m2x2");
  return among(w, kinds);
}
i64 width(const string& kind) {  // bytes of a register that holds such a value: two at least
  if (kind == "pred") return 4;
  if (kind.ends_with("x2")) return kind[0] == 'e' ? 2 : 4;
  return std::max(2, number_in(kind) / 8);
}
u64 immediate(string t, const string& kind) {  // the bits of a literal, as an operand of that type
  auto bits = [](float f) { return u64(std::bit_cast<u32>(f)); };
  auto bits64 = [](double d) { return std::bit_cast<u64>(d); };
  try {
    if (t.size() == 10 && (starts(t, "0f") || starts(t, "0F"))) {
      u32 found = std::stoul(t.substr(2), nullptr, 16);
      return kind == "f64" ? bits64(std::bit_cast<float>(found)) : found;
    }
    if (t.size() == 18 && (starts(t, "0d") || starts(t, "0D")))
      return std::stoull(t.substr(2), nullptr, 16);
    while (!t.empty() && (t.back() == 'U' || t.back() == 'u')) t.pop_back();
    if (t.find('.') != string::npos || kind == "f32" || kind == "f64")
      return kind == "f32" ? bits(std::stof(t)) : bits64(std::stod(t));
    bool negative = t[0] == '-';
    size_t read = 0;
    u64 v = std::stoull(t.substr(negative), &read, 0);
    if (read + negative == t.size()) return negative ? u64(0) - v : v;
  } catch (const std::logic_error&) {}
  throw Unsupported{"the number " + t};
}

struct Decoded : Ins {
  string name, text, label;
  std::vector<i64> values;
  i32 line, source;
};
struct Symbol {
  Space space;
  u64 address;
};
const Words SPECIAL = split(
    "%tid.x %ctaid.x %ctaid.y %ctaid.z %laneid %warpid %lanemask_ge %lanemask_gt %lanemask_lt "
    "%lanemask_le %lanemask_eq %nctaid.x %nctaid.y %nctaid.z");
// qualifiers that change nothing here: rounding to nearest, hints, scopes, promises of convergence
const Words IGNORED = split(
    "rn approx full uni sync aligned weak cta cluster gpu sys nc ca cg cs wb wt lu cv noftz L1 L2 "
    "evict_last evict_first evict_normal evict_unchanged no_allocate cache_hint unified");
const Words NOTHING = split(
    "membar fence prefetch bar.warp nanosleep createpolicy griddepcontrol setmaxnreg pmevent "
    "discard applypriority");
const Words STRONG = split("volatile acquire release relaxed mmio acq_rel");
const Words SPACES = split("global shared local const param");
// types of operands where they are not all the instruction's own, "."
const std::unordered_map<string, string> OPERANDS = {
    {"shl", ". . u32"},          {"shr", ". . u32"},         {"bfe", ". . u32 u32"},
    {"bfi", ". . . u32 u32"},    {"popc", "u32 ."},          {"clz", "u32 ."},
    {"bfind", "u32 ."},          {"selp", ". . . pred"},     {"lop3", "b32 b32 b32 b32 b32"},
    {"prmt", "b32 b32 b32 b32"}, {"shf", "b32 b32 b32 b32"}, {"dp4a", "b32 b32 b32 b32"}};

struct Decoder {
  Program& program;
  std::vector<Decoded> code;
  std::map<std::array<i64, 4>, i64>
      slots;  // of constants (0, value, width), special registers (1, which), parameters (2, ...)
  std::map<string, i64> global_slots;
  std::map<string, Symbol> symbols;
  std::vector<std::map<string, std::pair<i64, i64>>> scopes{
      {}, {}};  // name -> slot, width; "name<" is a range of names
  std::map<string, i32> labels;
  std::map<string, i64> fixed;  // special registers that are the same for every thread
  Words parameters;
  std::vector<i64> sizes;
  std::vector<std::array<string, 4>> sources{{}};
  i32 where = 0;
  std::map<string, string> files;

  Decoder(Program& p) : program(p) {
    for (auto name :
         split("%tid.y %tid.z %clusterid.x %cluster_ctarank %smid %clock %clock64 %globaltimer"))
      fixed[name] = 0;
    for (auto name : split("%ntid.y %ntid.z %cluster_nctarank")) fixed[name] = 1;
    fixed["WARP_SZ"] = 32;
  }

  // slots, registers and operands

  i64 make(i64 size) {  // a slot of 32 lanes of `size` bytes; registers start as NaN, as none may
                        // be read before it is written
    i64 slot = (program.image.size() + 63) / 64 * 64;
    program.image.resize(slot + 32 * size, 0xff);
    return slot;
  }
  i64 constant(u64 value, i64 size) {
    if (size < 8) value &= (1ull << 8 * size) - 1;
    auto [found, fresh] = slots.try_emplace({0, i64(value), size, 0}, 0);
    if (!fresh) return found->second;
    found->second = make(size);
    for (int i = 0; i < 32; i++)
      memcpy(program.image.data() + found->second + i * size, &value, size);
    return found->second;
  }
  std::pair<i64, i64> find(const string& name) {
    string family = name.substr(0, name.find_last_not_of("0123456789") + 1) + "<";
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
      if (auto known = scope->find(name); known != scope->end()) return known->second;
      if (auto range = scope->find(family); range != scope->end())
        return (*scope)[name] = {make(range->second.second), range->second.second};
    }
    throw Unsupported{"register " + name};
  }
  i64 symbol(const string& name, i64 size) {
    Symbol s = symbols.at(name);
    if (s.space != GLOBAL) return constant(s.address, size);
    if (!global_slots.count(name)) global_slots[name] = make(8);
    return global_slots[name];
  }
  i64 named(const string& name,
            i64 size) {  // a special register or a symbol's address; -1 for another name
    if (auto known = fixed.find(name); known != fixed.end()) return constant(known->second, size);
    if (symbols.count(name)) return symbol(name, size);
    size_t which = std::find(SPECIAL.begin(), SPECIAL.end(), name) - SPECIAL.begin();
    if (which == SPECIAL.size()) return -1;
    auto [found, fresh] = slots.try_emplace({1, i64(which), 0, 0}, 0);
    if (fresh) found->second = make(4), program.special.push_back({i32(which), i32(found->second)});
    return found->second;
  }
  i64 value(const string& text, const string& kind) {
    i64 size = width(kind);
    if (isalpha(text[0]) || strchr("%_$", text[0])) {
      if (i64 slot = named(text, size); slot >= 0) return slot;
      auto [slot, found] = find(text);
      if (found != size)
        throw Unsupported{"operand " + text + " of " + std::to_string(8 * found) + " bits for a " +
                          kind};
      return slot;
    }
    return kind == "pred" ? constant(immediate(text, "s32") ? FULL : 0, 4)
                          : constant(immediate(text, kind), size);
  }
  i64 into(const string& text, const string& kind) { return text == "_" ? -1 : value(text, kind); }
  std::array<i64, 3> address(const string& text) {  // slot, width and offset of [base + offset]
    string inner = strip(text, "[] \t");
    size_t plus = inner.find('+');
    string base = strip(inner.substr(0, plus));
    i64 offset = plus == string::npos ? 0 : immediate(strip(inner.substr(plus + 1)), "s64");
    if (symbols.count(base)) {
      i64 size = symbols[base].space == GLOBAL ? 8 : 4;
      return {symbol(base, size), size, offset};
    }
    if (isdigit(base[0])) return {constant(immediate(base, "u64"), 8), 8, offset};
    auto [slot, size] = find(base);
    return {slot, size, offset};
  }
  void narrow(int space, i32 size) {  // of every access: the shadow tells apart as little
    if (space == GLOBAL || space == GENERIC)
      program.global_granule = std::min(program.global_granule, size);
    if (space == SHARED || space == GENERIC)
      program.shared_granule = std::min(program.shared_granule, size);
  }
  static int space_of(const Words& words) {
    for (auto& w : words)
      if (among(w, SPACES))
        return w == "shared" ? SHARED : w == "local" ? LOCAL : w == "param" ? -1 : GLOBAL;
    return GENERIC;
  }

  // declarations

  void variable(const string& text) {  // .shared .align 16 .b8 name[length] = {...}
    size_t equals = text.find('=');
    Words words = split(text.substr(0, equals));
    string space = words[0].substr(1);
    size_t at = 1;
    i64 align = 0;
    if (words[at] == ".align") align = std::stoi(words[at + 1]), at += 2;
    string kind = words[at].substr(1), rest = join(Words(words.begin() + at + 1, words.end()), "");
    size_t bracket = rest.find('[');
    string name = rest.substr(0, bracket),
           length = bracket == string::npos ? "1" : strip(rest.substr(bracket), "[]");
    i64 element = number_in(kind) / 8, size = length.empty() ? 0 : element * std::stoll(length);
    if (space == "global" || space == "const") {
      auto& data = program.globals[name];
      if (equals != string::npos)
        for (auto& number : split(strip(text.substr(equals + 1), "{} \t\n"), ",")) {
          u64 bits = immediate(number, kind);
          data.insert(data.end(), (u8*)&bits, (u8*)&bits + element);
        }
      data.resize(std::max<i64>(1, size)), symbols[name] = {GLOBAL, 0};
      return;
    }
    i32& used = space == "shared" ? program.shared : program.local;
    align = align ? align : element, used = (used + align - 1) / align * align;
    symbols[name] = {space == "shared" ? SHARED : LOCAL,
                     used + (space == "shared" ? SHARED_BASE : 0)};
    used += size;
  }
  void declare(const string& text) {  // .reg .b32 %r<9>, %x, and variables; other directives change
                                      // nothing here
    Words words = split(text);
    if (!words.empty() && words[0] == ".reg") {
      i64 size = width(words[1].substr(1));
      for (auto& name : split(text.substr(text.find(words[1]) + words[1].size()), ",")) {
        size_t many = name.find('<');
        if (many == string::npos) scopes.back()[name] = {make(size), size};
        else scopes.back()[name.substr(0, many + 1)] = {0, size};
      }
    } else if (!words.empty() && (words[0] == ".shared" || words[0] == ".local")) variable(text);
  }
  void location(const string& text) {  // .loc file line column, function_name ..., inlined_at file
                                       // line column
    Words words = split(text, " \t,");
    std::array<string, 4> found{words[1], words[2]};
    for (size_t i = 0; i + 2 < words.size(); i++)
      if (words[i] == "inlined_at") found[2] = words[i + 1], found[3] = words[i + 2];
    if (sources[where] != found) sources.push_back(found), where = sources.size() - 1;
  }
  size_t header(const string& text) {  // what comes before the body; where that begins
    size_t entry = text.find(".entry"), open = text.find('(', entry), close = text.find(')', open),
           body = text.find('{', close);
    if (entry == string::npos || body == string::npos)
      throw Unsupported{"a module without an entry"};
    for (auto& declared : split(text.substr(0, entry), ";"))
      for (auto space : {".shared ", ".global ", ".const "})
        if (size_t at = declared.find(space); at != string::npos) {
          variable(declared.substr(at));
          break;
        }
    program.name = strip(text.substr(entry + 6, open - entry - 6));
    for (auto& parameter : split(text.substr(open + 1, close - open - 1), ",")) {
      Words words = split(parameter);
      if (words.empty()) continue;
      auto kind = std::find_if(words.begin(), words.end(),
                               [](auto& w) { return w[0] == '.' && is_kind(w.substr(1)); });
      Words name = split(words.back(), "[]");
      parameters.push_back(name[0]),
          sizes.push_back(name.size() > 1 ? std::stoi(name[1]) : number_in(*kind) / 8);
    }
    Words words = split(text.substr(close + 1, body - close - 1), " \t\n,");
    for (size_t i = 0; i + 1 < words.size(); i++)
      if (words[i] == ".reqntid" || words[i] == ".maxntid")
        program.threads = fixed["%ntid.x"] = std::stoi(words[i + 1]);
    return body + 1;
  }

  // instructions

  void plain(Decoded& I, const string& op, Words words, const Words& ops, string kind) {
    static const Words bits =
        split("and or xor not mov selp shl popc clz brev bfi bfind prmt cnot");
    if (kind.empty()) throw Unsupported{"an instruction without a type"};
    if (among(op, bits) && kind != "pred")
      std::erase(words, kind), words.push_back("b" + std::to_string(8 * width(kind)));
    if (op == "shr" && kind[0] == 'b') kind[0] = 'u', words.back() = kind;
    bool wide = among("wide", words);
    if (op == "mul" && strchr("us", kind[0]) && !wide && !among("lo", words) && !among("hi", words))
      words.insert(words.begin(), "lo");
    Words kinds(ops.size(), kind);
    if (auto found = OPERANDS.find(op); found != OPERANDS.end()) {
      kinds = split(found->second);
      for (auto& k : kinds)
        if (k == ".") k = kind;
    }
    if (wide) kinds[0] = kind[0] + std::to_string(2 * number_in(kind));
    if (wide && ops.size() == 4) kinds[3] = kinds[0];
    if (kinds.size() != ops.size()) throw Unsupported{"as many operands"};
    I.name = join({op, join(words)});
    for (size_t i = 0; i < ops.size(); i++)
      I.values.push_back(i ? value(ops[i], kinds[i]) : into(ops[i], kinds[i]));
    if (I.values[0] < 0) I.name = "nop";
  }
  void convert(Decoded& I, const Words& words, const Words& ops) {
    Words types, rest;
    for (auto& w : words) (is_kind(w) ? types : rest).push_back(w);
    string to = types.at(0), from = types.at(1);
    bool into_int = strchr("us", to[0]), from_int = strchr("us", from[0]);
    if (!into_int && !from_int) {
      I.name = join({"cvt", join(rest), to, from});
      if (rest.empty()) I.name = join({"cvt", to, from});
      for (size_t i = 0; i < ops.size(); i++) I.values.push_back(value(ops[i], i ? from : to));
      return;
    }
    i64 widths[2];  // an integer may lie in a wider register
    for (int i = 0; i < 2; i++) {
      bool own = ops[i][0] == '%' && named(ops[i], 4) < 0;
      auto [slot, size] = own ? find(ops[i]) : std::pair(value(ops[i], types[i]), width(types[i]));
      I.values.push_back(slot), widths[i] = size;
    }
    auto add = [&](const string& type) {
      I.values.push_back(number_in(type)), I.values.push_back(type[0] == 's');
    };
    if (into_int && from_int) {
      I.name = "cvt.int." + std::to_string(widths[0]) + "." + std::to_string(widths[1]);
      add(from), add(to), I.values.push_back(among("sat", rest));
    } else if (from_int) {
      if (!rest.empty()) throw Unsupported{"rounding of an integer other than to nearest"};
      I.name = "cvt." + to + ".int" + std::to_string(widths[1]), add(from);
    } else {
      static const Words modes = split("rni rzi rmi rpi");
      auto mode = std::find_first_of(modes.begin(), modes.end(), rest.begin(), rest.end());
      if (mode == modes.end()) throw Unsupported{"this rounding"};
      I.name = "cvt.int" + std::to_string(widths[0]) + "." + from, add(to),
      I.values.push_back(mode - modes.begin());
    }
  }
  void parameter(Decoded& I, const Words& names, const string& memory, int bits,
                 bool sign) {  // it is a register, filled when the warp starts
    Words parts = split(strip(memory, "[] \t"), "+");
    if (names.size() > 1) throw Unsupported{"a vector of parameters"};
    auto [to, size] = find(names[0]);
    i64 position = std::find(parameters.begin(), parameters.end(), parts[0]) - parameters.begin(),
        offset = parts.size() > 1 ? immediate(parts[1], "s64") : 0;
    auto [found, fresh] = slots.try_emplace({2, position, offset, bits / 8}, 0);
    if (fresh)
      found->second = make(8),
      program.params.push_back({position, offset, bits / 8, found->second});
    I.name = "cvt.int." + std::to_string(size) + "." + std::to_string(std::max(2, bits / 8));
    I.values = {to, found->second, bits, sign, 8 * size, 1, 0};
  }
  void load_or_store(Decoded& I, const Words& words, const Words& ops, const string& kind,
                     bool load) {
    string memory = ops[load ? 1 : 0];
    Words names = list(ops[load ? 0 : 1]);
    int space = space_of(words), bits = kind.ends_with("x2") ? 32 : number_in(kind);
    bool sign = kind[0] == 's' && bits == number_in(kind);
    if (space < 0) return parameter(I, names, memory, bits, sign);
    i64 size = 0;
    for (auto& n : names)
      if (isalpha(n[0]) || strchr("%$", n[0])) {
        size = named(n, 4) < 0 ? find(n).second : 4;
        break;
      }
    if (!size) size = std::max(2, bits / 8);
    auto [slot, wide, offset] = address(memory);
    I.name = string(load ? "ld." : "st.") + std::to_string(size) + (sign ? ".s" : ".u") +
             std::to_string(bits);
    bool strong = std::any_of(words.begin(), words.end(), [](auto& w) { return among(w, STRONG); });
    I.values = {space, strong, slot, wide, offset, i64(names.size())};
    for (auto& n : names)
      I.values.push_back(isdigit(n[0]) || n[0] == '-' ? constant(immediate(n, kind), size)
                                                      : into(n, "b" + std::to_string(8 * size)));
    narrow(space, bits / 8);
  }
  void atom(Decoded& I, Words words, Words ops, string kind, bool red) {
    int space = space_of(words);
    std::erase_if(words, [](auto& w) { return among(w, SPACES) || among(w, STRONG); });
    for (auto& w : words)
      if (w == "v2" || w == "v4" || w == "v8") throw Unsupported{"vector atomics"};
    string bits = "b" + std::to_string(8 * width(kind));
    if (among(words.at(0), split("exch cas and or xor"))) kind = bits;
    if (red) ops.insert(ops.begin(), "_");
    auto [slot, wide, offset] = address(ops.at(1));
    I.name = "atom." + words[0] + "." + kind;
    I.values = {space, slot, wide, offset, into(list(ops[0])[0], bits)};
    for (size_t i = 2; i < ops.size(); i++) I.values.push_back(value(list(ops[i])[0], bits));
    I.values.resize(7, -1), narrow(space, width(kind));
  }
  void copy(Decoded& I, const Words& words, const Words& ops) {
    string second = words.size() > 1 ? words[1] : "";
    if (second == "commit_group") I.name = "cp.async.commit";
    else if (second == "wait_group" || second == "wait_all")
      I.name = "cp.async.wait", I.values = {ops.empty() ? -1 : i64(immediate(ops[0], "s32"))};
    else if (words.at(0) == "async" && !among("bulk", words) && !among("mbarrier", words)) {
      auto to = address(ops.at(0)), from = address(ops.at(1));
      if (to[1] != 4) throw Unsupported{"a 64-bit shared address"};
      bool partial = ops.size() > 3 && ops[3].find("policy") == string::npos;
      I.name = "cp.async", I.values = {to[0],
                                       to[2],
                                       from[0],
                                       from[2],
                                       i64(immediate(ops[2], "u32")),
                                       partial ? value(ops[3], "u32") : -1};
      narrow(GLOBAL, 4), narrow(SHARED, 4);
    } else throw Unsupported{"cp." + join(words)};
  }
  void wgmma_(Decoded& I, const Words& words, const Words& ops) {
    if (words.at(0) == "fence" || words[0] == "commit_group" || words[0] == "wait_group") {
      I.name = words[0] == "fence" ? "nop" : "wgmma." + words[0];
      for (auto& o : ops) I.values.push_back(immediate(o, "s32"));
      return;
    }
    string shape = words.at(1), kind = words.at(3);
    if (words[2] != "f32" || words.at(4) != kind) throw Unsupported{"wgmma of these types"};
    I.name = "wgmma." + kind, I.values = {std::stoll(shape.substr(shape.find('n') + 1))};
    if (ops[1][0] == '{') {
      I.values.push_back(-1);
      for (auto& r : list(ops[1])) I.values.push_back(value(r, "b32"));
    } else I.values.insert(I.values.end(), {value(ops[1], "b64"), -1, -1, -1, -1});
    I.values.insert(I.values.end(), {value(ops[2], "b64"), value(ops[3], "pred")});
    for (size_t i = 4; i < 6; i++) I.values.push_back(immediate(ops.at(i), "s32"));  // signs
    I.values.resize(I.values.size() + 8 - std::max<size_t>(6, ops.size()),
                    0);  // of an operand in registers nothing says that it is transposed
    for (size_t i = 6; i < ops.size(); i++) I.values.push_back(immediate(ops[i], "s32"));
    for (auto& r : list(ops[0])) I.values.push_back(value(r, "f32"));
    narrow(SHARED, 16);
  }
  void instruction(Decoded& I, const string& op, const Words& all, const Words& ops) {
    Words words;
    string kind;
    for (auto& w : all) {
      if (is_kind(w)) kind = w;
      if (!among(w, IGNORED)) words.push_back(w);
    }
    auto pair = [&](const string& text) {
      Words two = split(text, "|");
      two.resize(2, "_");
      return two;
    };
    auto predicate = [&](const string& text) { return value(strip(text, "! "), "pred"); };
    auto values = [&](const string& type, size_t from = 0, size_t to = 99) {
      for (size_t i = from; i < std::min(to, ops.size()); i++)
        for (auto& o : list(ops[i])) I.values.push_back(value(o, type));
    };
    string full = join({op, join(all)});
    if (std::any_of(NOTHING.begin(), NOTHING.end(), [&](auto& n) { return starts(full, n); }))
      I.name = "nop";
    else if (op == "bra") I.name = "branch", I.flow = BRANCH, I.label = ops.at(0);
    else if (op == "ret" || op == "exit") I.name = "exit", I.flow = EXIT;
    else if (op == "trap") I.name = op;
    else if (op == "mov" && (ops.at(0)[0] == '{' || ops.at(1)[0] == '{')) {
      bool pack = ops[1][0] == '{';
      Words names = list(ops[pack]);
      i64 part = width(kind) / i64(names.size());
      I.name =
          (pack ? "pack." : "unpack.") + std::to_string(width(kind)) + "." + std::to_string(part);
      I.values = {value(ops[!pack], kind), i64(names.size())};
      for (auto& n : names) I.values.push_back(into(n, "b" + std::to_string(8 * part)));
    } else if (op == "cvta") {
      plain(I, "mov", {"b64"}, ops, "b64");
      int space = space_of(words);
      if (space == SHARED || space == LOCAL)
        I.name = among("to", words) ? "sub.u64" : "add.u64",
        I.values.push_back(constant(space == SHARED ? SHARED_WINDOW : LOCAL_WINDOW, 8));
    } else if (op == "cvt") convert(I, words, ops);
    else if (op == "setp") {
      if (kind == "f16x2" || kind == "bf16x2") throw Unsupported{"setp of packed pairs"};
      Words to = pair(ops.at(0));
      I.name = "setp." + words.at(0) + "." + kind;
      I.values = {into(to[0], "pred"),
                  into(to[1], "pred"),
                  value(ops.at(1), kind),
                  value(ops.at(2), kind),
                  -1,
                  0,
                  0};
      if (ops.size() > 3) I.values[4] = predicate(ops[3]), I.values[5] = ops[3][0] == '!';
      I.values[6] = among("and", words) ? 1 : among("or", words) ? 2 : among("xor", words) ? 3 : 0;
    } else if (op == "ld" || op == "ldu" || op == "st")
      load_or_store(I, words, ops, kind, op != "st");
    else if (op == "atom" || op == "red") atom(I, words, ops, kind, op == "red");
    else if (op == "cp") copy(I, words, ops);
    else if (op == "bar" || op == "barrier") {
      if (among("red", words) || among("cluster", all)) throw Unsupported{"bar." + words.at(0)};
      bool arrive = among("arrive", words);
      I.name = arrive ? "barrier.arrive" : "barrier", I.flow = arrive ? ARRIVE : BARRIER;
      values("u32"), I.values.resize(2, -1);
    } else if (op == "shfl") {
      Words to = pair(ops.at(0));
      I.name = op, I.values = {into(to[0], "b32"), into(to[1], "pred")}, values("b32", 1, 4);
      I.values.push_back(words[0] == "up"     ? 0
                         : words[0] == "down" ? 1
                         : words[0] == "bfly" ? 2
                                              : 3);
    } else if (op == "vote")
      I.name = join({op, join(words)}),
      I.values = {value(ops.at(0), kind), predicate(ops.at(1)), ops[1][0] == '!'};
    else if (op == "redux" || op == "match") I.name = join({op, join(words)}), values("b32", 0, 2);
    else if (op == "elect")
      I.name = op, I.values = {into(pair(ops.at(0))[0], "b32"), into(pair(ops[0])[1], "pred")};
    else if (op == "ldmatrix" || op == "stmatrix") {
      if (!among("m8n8", words) || kind != "b16") throw Unsupported{"a matrix of this shape"};
      bool load = op[0] == 'l';
      Words names = list(ops.at(!load));
      auto [slot, wide, offset] = address(ops.at(load));
      I.name = op,
      I.values = {slot, wide, offset, i64(names.size()), among("trans", words), SHARED};
      for (auto& n : names) I.values.push_back(value(n, "b32"));
      narrow(SHARED, 16);
    } else if (op == "mma") {
      std::erase(words, "row"), std::erase(words, "col");
      I.name = join({op, join(words)}), values("b32");
    } else if (op == "wgmma") wgmma_(I, words, ops);
    else plain(I, op, words, ops, kind);
  }
  void statement(const string& text, i32 line) {
    if (text.empty() || text[0] == '.') return declare(text);
    Decoded I{};
    I.pred = -1, I.target = -1, I.line = line, I.source = where, I.text = join(split(text), " ");
    try {
      string rest = text;
      if (rest[0] == '@') {
        size_t end = rest.find_first_of(" \t\n");
        string guard = rest.substr(1, end - 1);
        I.negated = guard[0] == '!', I.pred = find(strip(guard, "! ")).first,
        rest = strip(rest.substr(end));
      }
      size_t end = std::min(rest.find_first_of(" \t\n"), rest.size());
      Words parts = split(rest.substr(0, end), ".:"), ops;
      for (size_t i = end; (i = rest.find_first_not_of(", \t\n", i)) != string::npos;) {
        size_t stop = rest[i] == '{'   ? rest.find('}', i) + 1
                      : rest[i] == '[' ? rest.find(']', i) + 1
                                       : std::min(rest.find_first_of(",{[", i), rest.size());
        ops.push_back(strip(rest.substr(i, stop - i))), i = stop;
      }
      instruction(I, parts.at(0), Words(parts.begin() + 1, parts.end()), ops);
      if (!table.count(I.name)) throw Unsupported{"no handler " + I.name};
    } catch (const std::out_of_range&) {
      throw Unsupported{"line " + std::to_string(line) + ": `" + I.text + "`: too few operands"};
    } catch (const Unsupported& e) {
      throw Unsupported{"line " + std::to_string(line) + ": `" + I.text + "`: " + e.why};
    }
    code.push_back(std::move(I));
  }
  void decode(string text) {
    for (size_t i = 0; (i = text.find("/*", i)) != string::npos;)
      for (size_t end = std::min(text.find("*/", i) + 2, text.size()); i < end; i++)
        if (text[i] != '\n') text[i] = ' ';
    for (size_t i = 0; (i = text.find("//", i)) != string::npos;)
      for (; i < text.size() && text[i] != '\n'; i++) text[i] = ' ';
    size_t at = header(text);
    i32 line = 1 + std::count(text.begin(), text.begin() + at, '\n');
    auto word = [](char c) { return isalnum(c) || c == '_' || c == '$'; };
    while (scopes.size() > 1) {
      for (; at < text.size() && isspace(text[at]); at++) line += text[at] == '\n';
      if (at >= text.size()) throw Unsupported{"a body without its end"};
      size_t name = at, end;
      while (name < text.size() && word(text[name])) name++;
      if (text[at] == '{') scopes.push_back({}), end = at + 1;
      else if (text[at] == '}') scopes.pop_back(), end = at + 1;
      else if (starts(text.substr(at, 5), ".loc ") || starts(text.substr(at, 5), ".loc\t") ||
               starts(text.substr(at, 8), ".pragma ") || starts(text.substr(at, 5), ".file")) {
        end = std::min(text.find('\n', at), text.size());
        if (text[at + 1] == 'l') location(text.substr(at, end - at));
      } else if (name > at && text[name] == ':' && text[name + 1] != ':')
        labels[text.substr(at, name - at)] = code.size(), end = name + 1;
      else
        end = std::min(text.find(';', at), text.size()),
        statement(strip(text.substr(at, end - at)), line), end++;
      line += std::count(text.begin() + at, text.begin() + std::min(end, text.size()), '\n'),
          at = end;
    }
    Decoded last{};
    last.name = "exit", last.text = "end of the kernel", last.line = line, last.source = where,
    last.flow = EXIT, last.pred = last.target = -1;
    code.push_back(last);
    for (size_t i = 0; (i = text.find(".file", i)) != string::npos; i += 5) {
      Words parts = split(text.substr(i, text.find('\n', i) - i), "\"");
      Words head = split(parts[0]);
      if (head.size() > 1 && parts.size() > 1)
        files[head[1]] = parts[1].substr(parts[1].find_last_of('/') + 1);
    }
    finish();
  }
  void finish() {  // the executor's form, and the description of what it is
    auto& p = program;
    for (auto& [name, slot] : global_slots)
      p.global_slots.push_back({p.globals[name].data(), slot});
    std::vector<size_t> begins;
    for (auto& I : code)
      begins.push_back(p.operands.size()),
          p.operands.insert(p.operands.end(), I.values.begin(), I.values.end());
    for (size_t i = 0; i < code.size(); i++) {
      Decoded& I = code[i];
      if (I.flow == BRANCH && !labels.count(I.label)) throw Unsupported{"the label " + I.label};
      p.code.push_back({table.at(I.name), p.operands.data() + begins[i], I.pred, I.negated, I.flow,
                        I.flow == BRANCH ? labels[I.label] : -1, i32(code.size()), u32(i)});
    }
    find_joins(p.code);
    auto quoted = [](const string& s) {
      string out = "\"";
      for (char c : s) {
        if (c == '"' || c == '\\') out += '\\';
        out += c;
      }
      return out + "\"";
    };
    auto line = [&](const string& f, const string& l) {
      return (files.count(f) ? files[f] : f) + ":" + l;
    };
    string& d = p.description;
    d = "{\"name\":" + quoted(p.name) + ",\"threads\":" + std::to_string(p.threads) +
        ",\"shared\":" + std::to_string(p.shared) +
        ",\"granule\":" + std::to_string(p.global_granule);
    d += ",\"parameters\":[";
    for (size_t i = 0; i < sizes.size(); i++) d += (i ? "," : "") + std::to_string(sizes[i]);
    d += "],\"globals\":[";
    for (auto& [name, data] : p.globals)
      d += (d.back() == '[' ? "[" : ",[") + std::to_string(u64(data.data())) + "," +
           std::to_string(data.size()) + "]";
    d += "],\"sources\":[";
    for (auto& s : sources)
      d += (d.back() == '[' ? "" : ",") +
           quoted(s[0].empty() ? ""
                               : line(s[0], s[1]) + (s[2].empty() ? "" : " < " + line(s[2], s[3])));
    d += "],\"code\":[";
    for (auto& I : code)
      d += (d.back() == '[' ? "[" : ",[") + quoted(I.name) + "," + quoted(I.text) + "," +
           std::to_string(I.line) + "," + std::to_string(I.source) + "," +
           std::to_string(I.values.empty() ? -1 : I.values[0]) + "]";
    d += "]}";
  }
};

extern "C" {
// A program from PTX; null where it is not understood. `said` gets its description (JSON) or the
// reason
void* ptx_decode(const char* text, const char** said) {
  static std::once_flag once;
  static thread_local string why;
  std::call_once(once, fill_table);
  auto* p = new Program;
  try {
    Decoder(*p).decode(text);
    *said = p->description.c_str();
    return p;
  } catch (const Unsupported& e) { why = e.why; }
  delete p;
  *said = why.c_str();
  return nullptr;
}
int ptx_launch(void* program, Launch* launch) {
  Launch& l = *launch;
  const Program& p = *static_cast<Program*>(program);
  u32 ctas = l.grid[0] * l.grid[1] * l.grid[2];
  std::vector<u32> order(ctas);
  std::mt19937_64 random(l.seed);
  for (u32 i = 0; i < ctas; i++) order[i] = i;
  if (l.random) std::shuffle(order.begin(), order.end(), random);
  std::atomic<u32> next{0};
  std::atomic<bool> stop{false};
  std::mutex sum;
  auto work = [&](u64 seed) {
    Machine k(l, p);
    std::mt19937_64 mine(seed);
    size_t stride = (k.image.size() + 63) / 64 * 64;
    u8* regs = static_cast<u8*>(aligned_alloc(64, stride * l.warps));
    Block& b = k.block;
    b.shared.resize(l.shared), b.coarse.resize(l.shared / 16 + 2),
        b.fine.resize(16 / p.shared_granule * (l.shared / 16 + 2)), b.warps.resize(l.warps);
    b.shadow = {b.coarse.data(), b.fine.data(), u32(p.shared_granule), SHARED_BASE};
    for (int v = 0; v < l.warps; v++) {
      Warp& w = k.block.warps[v];
      w.block = &k.block, w.machine = &k, w.regs = regs + v * stride;
    }
    for (u32 i; !stop && (i = next++) < ctas;) {
      run_cta(k, order[i], mine);
      if (k.fatal) stop = true;
    }
    free(regs);
    std::lock_guard<std::mutex> guard(sum);
    for (size_t i = 0; i < p.code.size(); i++)
      l.executed[i] += k.executed[i], l.lanes[i] += k.lanes[i], l.units[i] += k.units[i],
          l.ideal[i] += k.ideal[i];
    l.read_bytes += k.read_bytes, l.written_bytes += k.written_bytes, l.barriers += k.barriers;
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < l.threads; t++) pool.emplace_back(work, l.seed + t);
  work(l.seed);
  for (auto& t : pool) t.join();
  return stop;
}
}
