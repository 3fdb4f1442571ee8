// Copies whole KV blocks within one cache tensor, in the order given: a later move sees what an earlier one wrote.
#include <stdint.h>
#include <string.h>

extern "C" void mxn_copy_blocks(char* cache, int64_t block_bytes, const int64_t* moves, long count) {
    for (long i = 0; i < count; i++) {
        int64_t source = moves[2 * i], target = moves[2 * i + 1];
        if (source != target) memcpy(cache + target * block_bytes, cache + source * block_bytes, block_bytes);
    }
}
