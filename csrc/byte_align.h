// Alignment rules 1 to 6 over a batch of responses: which of a source's candidates counts for which target token, and the
// merged mass. The oracle is profuser/alignment/reference.py, which also explains the rules.
//
// What a candidate counts for in its context is found out by the target's tokenizer, outside: `align` looks it up, collects
// what it does not know yet, and is called again after `learn`. Between the two only `intern` writes, so sequences align in
// threads over one read-only cache.
#pragma once

#include "align.h"

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace profuser {

// What a candidate counts for when it is not a target token; as in profuser/alignment/vocab_map.py.
constexpr std::int32_t kTail = -1, kDropped = -2, kEnd = -3;

// Throws std::invalid_argument.
[[noreturn]] void refuse(const std::string& message);

// The order is that of SKIP_REASONS in profuser/alignment/types.py.
enum SkipReason : std::uint8_t { kAligned = 0, kNoPrefixRange = 1, kLowReliability = 2, kEmpty = 3, kNoSourcePosition = 4 };

// The bytes of every token of a vocabulary; a control token has none and is not text.
class Vocabulary {
  public:
    // offsets: size + 1 of them into bytes; text: per token whether it is text.
    Vocabulary(std::string bytes, std::vector<std::int64_t> offsets, std::vector<std::uint8_t> text);

    std::int32_t size() const { return static_cast<std::int32_t>(text_.size()); }
    bool is_text(std::int32_t id) const { return id >= 0 && id < size() && text_[id]; }
    std::string_view piece(std::int32_t id) const {
        return std::string_view(bytes_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
    }

  private:
    std::string bytes_;
    std::vector<std::int64_t> offsets_;
    std::vector<std::uint8_t> text_;
};

struct Settings {
    std::int32_t top_k;
    float min_reliability;
    bool same_tokens;           // both tokenizers give every text the same ids
    std::int32_t target_end;    // -1: none
    std::string target_closing, source_closing;
    std::vector<std::uint8_t> source_ends;    // by source id
    std::vector<std::int32_t> table;          // by source id: what it counts for at the beginning of a pre-token
    std::vector<std::uint8_t> opens, closes;  // by source and by target id
    std::vector<std::uint8_t> lookahead;      // by source id, into kLookaheads
    std::vector<std::int32_t> exact;          // target ids: the token of exactly its bytes
};

// One response as both sides see it; the arrays belong to the caller.
struct Sequence {
    std::string_view response;
    // Target: the conversation's tokens up to the response's end, of which the response's are [start, size).
    const std::int32_t* target_ids;
    std::size_t target_size, start;
    Spans target;                          // of the response's tokens
    const std::int32_t* prefix_start;      // target.size + 1
    std::int32_t target_end;               // id of the end of turn after the response; -1: cut
    // Source: its tokens of the response and its end of turn.
    const std::int32_t* source_ids;
    Spans source;
    const std::int32_t* top_ids;  // (source.size, k), -1 = padding
    const float* top_logprobs;
    std::size_t k;
    const float* own_logprobs;
    // Prefix ranges, by (row, strip).
    std::size_t ranges;
    const std::int32_t *range_rows, *range_strip;
    const float* range_logmass;
    const std::int32_t* range_ids;  // (ranges, range_k), -1 = padding
    const float* range_logprobs;
    std::size_t range_k;

    std::size_t positions() const { return target.size + (target_end >= 0); }
};

// Per position; entries position by position.
struct Output {
    std::uint8_t* kind;
    std::int32_t* source_position;
    std::int64_t* counts;
    float *tail, *reliability;
    std::uint8_t* skip_reason;
    std::vector<std::int32_t> ids;
    std::vector<float> logprobs;
};

class ByteAligner {
  public:
    ByteAligner(Vocabulary target, Vocabulary source, Settings settings);

    // Aligns every sequence. What could not be looked up counts as tail and is asked for by the next `wanted`.
    // Throws std::invalid_argument with rule, value and fix for input that contradicts itself.
    void align(const std::vector<Sequence>& batch, std::vector<Output>& out, unsigned threads);

    // The texts whose first tokens decide what `align` did not know; `learn` takes their ids (CSR), in this order.
    const std::vector<std::string>& wanted() const { return texts_; }
    void learn(const std::int32_t* ids, const std::int64_t* offsets);

    std::size_t cached() const { return cached_; }
    void clear();

  private:
    // In place of a candidate: none; any of the source's end tokens; any that opens (1 where the prefix stays before it).
    static constexpr std::int32_t kFree = -1, kAnyEnd = -2, kClosed = -3;
    // What a source's token is, apart from any context.
    enum class Role : std::uint8_t { kNone, kText, kOpens, kEnd };  // kOpens: text that begins a new pre-token
    struct Candidate {
        std::int32_t table = kTail;  // what it counts for at the beginning of a pre-token
        Role role = Role::kNone;
    };
    // What candidates count for behind one prefix; the prefix stands in its key.
    class Context {
      public:
        const std::int32_t* find(std::int32_t candidate) const {
            if (slots_.empty()) return nullptr;
            const std::size_t mask = slots_.size() - 1;
            for (std::size_t i = slot_of(candidate, mask);; i = (i + 1) & mask) {
                if (slots_[i].first == candidate) return &slots_[i].second;
                if (slots_[i].first == kFree) return nullptr;
            }
        }
        void insert(std::int32_t candidate, std::int32_t counts_for);

      private:
        static std::size_t slot_of(std::int32_t candidate, std::size_t mask) {
            return (static_cast<std::uint32_t>(candidate) * 2654435769U >> 7) & mask;
        }
        std::vector<std::pair<std::int32_t, std::int32_t>> slots_;  // open addressing: candidate (kFree: none), counts for
        std::size_t used_ = 0;
    };
    struct Key {
        std::size_t prefix;          // number of the target's tokens from the start of the current pre-token
        std::string_view extension;  // bytes between the target's position and the candidate
        std::size_t strip;           // bytes of the candidate that stand before the target's position
    };
    struct Pending {
        const std::string* key;
        Context* context;
        std::int32_t candidate;
        std::size_t prefix_bytes, size;  // of the text: of its prefix, and without look-ahead
    };
    struct Missing {
        std::string key;
        std::vector<std::int32_t> candidates;
    };
    class Worker;

    // One pass; whether something was not known.
    bool run(const std::vector<Sequence>& batch, std::vector<Output>& out, unsigned threads);
    void intern(const Missing& missing);
    static void write_key(std::string& key, const std::int32_t* prefix, const Key& parts);
    static Key read_key(const std::string& key, std::vector<std::int32_t>& prefix);

    Vocabulary target_, source_;
    Settings settings_;
    std::unordered_map<std::string_view, std::int32_t> exact_;  // into target_'s bytes
    std::vector<Candidate> candidates_;                         // by source id
    std::unordered_map<std::string, Context> contexts_;         // by key; nodes stay where they are
    std::size_t cached_ = 0;  // candidates
    std::vector<std::string> texts_;
    std::vector<Pending> pending_;
    std::vector<std::int32_t> prefix_;  // scratch
};

}  // namespace profuser
