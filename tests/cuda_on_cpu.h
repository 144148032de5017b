// The few names of CUDA that the kernels of common.py use, for a C++ compiler.
//
// Each CUDA thread is a fiber; the fibers of a block take turns on one processor, blocks run one
// after another. What lets a warp exchange values waits until all 32 fibers have come to it, so
// that a warp is in step wherever the kernel relies on that; a warp that has parted there never
// goes on, and `run_grid` reports it. Between two meetings a fiber runs alone, the first one first
// or, if `backwards`, the last one: what is read before another fiber has written it differs.
#undef _FORTIFY_SOURCE  // it takes a jump to another fiber's stack for an error
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time: what is static is the block's
struct Index { unsigned x; };

struct Meeting {  // where `size` fibers wait for one another
    int size, arrived = 0;
    unsigned generation = 0;
    uint64_t values[32];
};
struct Fiber {
    ucontext_t start;
    jmp_buf place;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    Index thread;
    bool started, done;
};

static Fiber* current;
static jmp_buf scheduler;
static std::vector<Meeting> warps;
static Meeting block_meeting;
static Index blockIdx, blockDim, gridDim;
static long progress;
#define threadIdx (current->thread)

static void meet(Meeting& meeting) {
    unsigned generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        meeting.generation++;
        progress++;
    }
    while (meeting.generation == generation)
        if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}
static void __syncthreads() { meet(block_meeting); }

template <typename T>
static T from_lane(T value, int lane) {
    Meeting& warp = warps[threadIdx.x / 32];
    memcpy(&warp.values[threadIdx.x % 32], &value, sizeof value);
    meet(warp);
    T result;
    memcpy(&result, &warp.values[lane], sizeof result);
    meet(warp);  // nobody writes the next value before all have read this one
    return result;
}
template <typename T>
static T __shfl_sync(unsigned, T value, int lane) { return from_lane(value, lane & 31); }
template <typename T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
    return from_lane(value, (threadIdx.x % 32) ^ mask);
}
template <typename T>
static T __shfl_up_sync(unsigned, T value, int lanes) {
    int lane = threadIdx.x % 32;
    return from_lane(value, lane < lanes ? lane : lane - lanes);
}
static unsigned __ballot_sync(unsigned, bool vote) {
    unsigned result = 0;
    Meeting& warp = warps[threadIdx.x / 32];
    warp.values[threadIdx.x % 32] = vote;
    meet(warp);
    for (int lane = 0; lane < 32; lane++) result |= unsigned(warp.values[lane]) << lane;
    meet(warp);
    return result;
}
static bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote); }
static int __ffs(unsigned bits) { return __builtin_ffs(bits); }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static float __int_as_float(int value) {
    float result;
    memcpy(&result, &value, sizeof result);
    return result;
}
static float __double2float_ru(double value) {
    float nearest = value;
    return nearest < value ? nextafterf(nearest, INFINITY) : nearest;
}

static std::function<void()> kernel;
static void enter() {
    kernel();
    current->done = true;
    progress++;
    _longjmp(scheduler, 1);
}
static void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// 0, or 1 when fibers wait for one another for ever.
static int run_grid(unsigned blocks, unsigned threads, bool backwards, std::function<void()> body) {
    kernel = body;
    blockDim = {threads};
    gridDim = {blocks};
    std::vector<Fiber> fibers(threads);
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        warps.assign(threads / 32, Meeting{32});
        block_meeting = Meeting{int(threads)};
        for (unsigned i = 0; i < threads; i++) {
            Fiber& fiber = fibers[i];
            fiber.thread = {i};
            fiber.started = fiber.done = false;
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = fiber.stack.data();
            fiber.start.uc_stack.ss_size = fiber.stack.size();
            fiber.start.uc_link = nullptr;
            makecontext(&fiber.start, enter, 0);
        }
        for (unsigned left = threads; left;) {
            long before = progress;
            left = 0;
            for (unsigned i = 0; i < threads; i++) {
                Fiber& fiber = fibers[backwards ? threads - 1 - i : i];
                if (!fiber.done) resume(fiber);
                left += !fiber.done;
            }
            if (left && progress == before) return 1;
        }
    }
    return 0;
}
