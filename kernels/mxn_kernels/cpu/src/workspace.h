// What one caller computes with: a team of threads, and scratch memory for each of them and for all.
//
// Every call lays out its arenas anew from the start, so nothing is carried from one operation to the next, and calls with the same
// workspace wait for each other (`Turn`). Arenas only grow.
#pragma once
#include <stddef.h>
#include <stdlib.h>
#include <vector>

#include "team.h"

constexpr int OUT_OF_MEMORY = -1;

struct alignas(CACHE_LINE) Arena {  // threads must not share cache lines
    char* base = nullptr;
    size_t capacity = 0;

    bool reserve(size_t bytes) {
        if (bytes <= capacity) return true;
        size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        char* fresh = (char*)aligned_alloc(4096, rounded);
        if (!fresh) return false;
        free(base);
        base = fresh;
        capacity = rounded;
        return true;
    }
};

// Hands out aligned pieces of an arena; with a null base it only counts, so a layout is written once for both.
struct Layout {
    char* base;
    size_t used = 0;

    template <class T> T* take(size_t count) {
        T* piece = (T*)(base ? base + used : nullptr);
        used += (count * sizeof(T) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
        return piece;
    }
};

struct Workspace {
    std::mutex mutex;
    Team team;
    Arena shared;
    std::vector<Arena> own;

    explicit Workspace(int threads) : team(threads), own(threads) {}
    ~Workspace() {
        free(shared.base);
        for (Arena& a : own) free(a.base);
    }
    int threads() const { return team.size(); }
};

// Held by every operation while it uses the workspace. After a fork the lock may belong to a thread that is not there any more.
struct Turn {
    std::unique_lock<std::mutex> lock;
    explicit Turn(Workspace* space) : lock(space->mutex, std::defer_lock) {
        if (!space->team.lost_threads()) lock.lock();
    }
};

// The part [first, last) of `total` that falls to `index` of `parts`.
struct Share {
    long first, last;
    Share(long total, int index, int parts) : first(total * index / parts), last(total * (index + 1) / parts) {}
};
