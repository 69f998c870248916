// Work on the threads that torch already has.
#pragma once

#include <cstdint>

namespace fqa {

using Work = void (*)(void* context, int64_t item, int worker);

// Calls work(context, item, worker) once for each item below `items`, on at most `threads` threads, of which the
// calling one is one; `worker`, below `threads`, tells them apart. Which thread takes which item is left to chance:
// results must not depend on it.
void parallel_for(int64_t items, int threads, Work work, void* context);

}  // namespace fqa
