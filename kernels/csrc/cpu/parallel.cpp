#include "parallel.h"

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "api.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace fqa {
namespace {

struct Team {
    int64_t items;
    Work work;
    void* context;
    std::atomic<int64_t> next_item{0};
    std::atomic<int> next_worker{0};
};

void join(void* data) {
    Team& team = *static_cast<Team*>(data);
    const int worker = team.next_worker++;
    for (int64_t item; (item = team.next_item++) < team.items;) team.work(team.context, item, worker);
}

std::atomic<int64_t> home_process{-1};

using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// What `#pragma omp parallel` calls in the OpenMP runtime that torch has loaded (libgomp, and LLVM's and Intel's under
// the same name); null without one. A second runtime would be a second pool of threads that wait busily beside it.
OpenMpParallel torch_openmp() {
#if defined(__linux__)
    static const auto entry = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    // A forked child has no threads in its copy of the pool: it would wait for them for ever.
    return getpid() == home_process ? entry : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace

void parallel_for(int64_t items, int threads, Work work, void* context) {
    Team team{items, work, context};
    if (items <= 1 || threads <= 1) return join(&team);
    // All of torch's threads, or the runtime would end those left over and start them again for torch.
    if (const OpenMpParallel parallel = torch_openmp()) return parallel(join, &team, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    try {
        others.reserve(threads);
        while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(join, &team);
    } catch (const std::exception&) {  // no more threads, or no memory for them: those that there are do the work
    }
    join(&team);
    for (std::thread& other : others) other.join();
}

}  // namespace fqa

void fqa_set_home_process(int64_t id) { fqa::home_process = id; }
