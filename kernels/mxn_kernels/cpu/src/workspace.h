// Scratch memory of one caller: an arena for each thread and one that the threads of a call share.
//
// Every call lays out its arenas anew from the start, so nothing is carried from one operation to the next, and calls with the
// same workspace must not overlap. Arenas only grow.
#pragma once
#include <omp.h>
#include <stddef.h>
#include <stdlib.h>
#include <vector>

constexpr size_t CACHE_LINE = 64;
constexpr int OUT_OF_MEMORY = -1;

struct Arena {
    char* base = nullptr;
    size_t capacity = 0;
    char padding[CACHE_LINE - sizeof(char*) - sizeof(size_t)];  // threads grow their own arena: keep them off one cache line

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
    int threads;
    Arena shared;
    std::vector<Arena> own;

    explicit Workspace(int n) : threads(n), own(n) {}
    ~Workspace() {
        free(shared.base);
        for (Arena& a : own) free(a.base);
    }
};

// The part [first, last) of `total` that falls to `index` of `parts`.
struct Share {
    long first, last;
    Share(long total, int index, int parts) : first(total * index / parts), last(total * (index + 1) / parts) {}
};
