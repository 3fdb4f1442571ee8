// One step being run: its memory, its list of stages, and the work of each. See step.cpp for the way of a step.
#pragma once
#include "step.h"

class Step {
   public:
    Step(const Decoder& decoder, const StepInput& in, Workspace& space, std::vector<Plan>& plans)
        : decoder(decoder), in(in), space(space), plans(plans), tokens(in.batch->num_tokens), width(decoder.hidden_size) {}

    // Finds memory and lists the work. False if there is not enough memory.
    bool prepare();
    void run();

   private:
    struct Stage {
        StageKind kind;
        void (Step::*work)(const Stage&, long item, int thread);
        long items;
        int layer = -1;
        // Of rows that are normalised, quantised or added up:
        int64_t rows = 0;
        const Norm* norm = nullptr;
        const float* from = nullptr;
        int from_width = 0;
        // Of products:
        const PackedWeight* const* weights = nullptr;
        int panels = 0;
        long groups = 0, row_blocks = 0;
        Target to{};
    };
    typedef void (Step::*Work)(const Stage&, long item, int thread);

    // The largest logit of a row among some panels. Not finite: the row holds NaN or infinity.
    struct Best {
        float logit;
        int32_t id;
    };

    const Decoder& decoder;
    const StepInput& in;
    Workspace& space;
    std::vector<Plan>& plans;
    const int64_t tokens;
    const int width;
    std::vector<int> plan_of;
    std::vector<Operands> operands;
    std::vector<Stage> stages;
    float *hidden, *aside, *qkv, *attended, *gated, *partials;  // hidden: the residual stream; aside: a sublayer's result before its norm
    Best* bests;                                                // [logit rows][groups of the head]
    Activations quantised;

    Operands operands_of(const Layer& l) const;
    Call call_of(int l) const { return {*decoder.layers[l].cache, *in.batch, operands[l]}; }
    Division head_division() const {
        return Division(in.num_logit_rows, decoder.head->num_panels(), decoder.head->depth(), space.threads());
    }
    size_t make_plans();
    size_t lay_out(char* base);

    Stage& add(StageKind kind, Work work, long items, int layer = -1);
    Stage& add_rows(StageKind kind, Work work, int64_t rows, const Norm* norm, const float* from, int from_width);
    Stage& add_product(StageKind kind, Work work, int64_t rows, const PackedWeight* const* weights, int count, const Target& to);
    void add_residual(StageKind kind, const Layer& y, const PackedWeight* const* weight, const Norm& norm);
    void list_stages();

    void embed(const Stage& stage, long item, int thread);
    void quantise_one(const Stage& stage, const float* x, int64_t row, int thread);
    void quantise(const Stage& stage, long item, int thread);
    void quantise_logit_rows(const Stage& stage, long item, int thread);
    void multiply_side_by_side(const Stage& stage, long item, int thread);
    void multiply_gated(const Stage& stage, long item, int thread);
    void rotate_and_write(const Stage& stage, long item, int thread);
    void attend(const Stage& stage, long item, int thread);
    void merge(const Stage& stage, long item, int thread);
    void settle(const Stage& stage, long item, int thread);
    void finish_logits(const Stage& stage, long item, int thread);
    void find_best(const Stage& stage, long item, int thread);
    void choose(const Stage& stage, long item, int thread);
};

inline int qkv_width(const Layer& l) {
    return l.num_heads * l.cache->key_dim + l.cache->num_kv_heads * (l.cache->key_dim + l.cache->value_dim);
}
