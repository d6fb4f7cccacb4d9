// Rules 1 to 8 of the alignment for a batch of responses: which target token each of a source's candidates counts for, and
// how much mass each target token gets. The oracle is profuser/alignment/reference.py, which also states the rules.
//
// What a candidate counts for in its context is found out by the target's tokenizer, outside of C++. `align` looks it up in
// a cache and collects what the cache does not hold yet. The caller has the missing texts tokenised, hands the tokens to
// `learn`, and calls `align` again. While sequences are aligned in threads, nobody writes to the cache; `intern` and `learn`
// write to it afterwards.
#pragma once

#include "align.h"

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace profuser {

// These stand in place of the target id that a candidate counts for. The numbers must be those in
// profuser/alignment/vocab_map.py.
constexpr std::int32_t kTail = -1, kDropped = -2, kEnd = -3;

// Throws std::invalid_argument, which Python gets as a ValueError.
[[noreturn]] void refuse(const std::string& message);

// These stand in place of a range's number of bytes. The numbers must be those in profuser/alignment/types.py.
constexpr std::int32_t kWhole = 0, kDigits = -1, kNumbers = -2;

// The order must be that of SKIP_REASONS in profuser/alignment/types.py.
enum SkipReason : std::uint8_t { kAligned = 0, kNoPrefixRange = 1, kLowReliability = 2, kEmpty = 3, kNoSourcePosition = 4 };

// The bytes of every token of a vocabulary. A control token has no bytes and is not text.
class Vocabulary {
  public:
    // bytes: the bytes of all tokens end to end. offsets: size + 1 offsets into bytes. text: whether each token is text.
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
    bool same_tokens;                            // whether both tokenizers give every text the same ids
    std::int32_t target_end;                     // the target's end of turn, -1 if it has none
    std::string target_closing, source_closing;  // the templates' bytes between a response and its end of turn
    std::int32_t first_number;                   // the source ids from this one on are numbers that were followed (rule 9)
    std::vector<std::uint8_t> source_ends;       // per source id, whether it is an end of turn
    std::vector<std::int32_t> table;             // per source id, what it counts for at the beginning of a pre-token
    std::vector<std::uint8_t> opens, closes;     // per source id and per target id, as in CandidateTable of vocab_map.py
    std::vector<std::uint8_t> lookahead;         // per source id, an index into kLookaheads
    bool merges_digits;                          // whether the target has tokens of several digits
    std::vector<std::uint8_t> onward;            // per source id, as in CandidateTable of vocab_map.py
    std::vector<std::int32_t> exact;             // the target ids that a candidate of exactly their bytes counts for
};

// One response as both sides see it. The arrays belong to the caller.
struct Sequence {
    std::string_view response;
    // Target: the conversation's tokens up to the end of the response, whose own tokens are [start, target_size).
    const std::int32_t* target_ids;
    std::size_t target_size, start;
    Spans target;                      // the spans of the response's tokens
    const std::int32_t* prefix_start;  // (target.size + 1,), the first token of each position's prefix
    std::int32_t target_end;           // the id of the end of turn after the response, -1 if the response was cut
    // Source: its tokens of the response, and then its end of turn if the response was not cut.
    const std::int32_t* source_ids;
    Spans source;
    const std::int32_t* top_ids;  // (source.size, k), -1 = padding
    const float* top_logprobs;
    std::size_t k;
    const float* own_logprobs;
    // Ranges of the vocabulary, sorted by (row, strip). In place of a number of bytes, strip may be kWhole, kDigits or kNumbers.
    std::size_t ranges;
    const std::int32_t *range_rows, *range_strip;
    const float* range_logmass;
    const std::int32_t* range_ids;  // (ranges, range_k) as the maps of merging.py spell what tokens count for, -1 = padding
    const float* range_logprobs;
    std::size_t range_k;

    std::size_t positions() const { return target.size + (target_end >= 0); }
};

// The results of one sequence: one number per position in each array, and the entries of all positions end to end.
struct Output {
    std::uint8_t* kind;
    std::int32_t* source_position;
    std::int64_t* counts;  // the number of entries of each position
    float *tail, *reliability;
    std::uint8_t* skip_reason;
    std::vector<std::int32_t> ids;
    std::vector<float> logprobs;
};

class ByteAligner {
  public:
    ByteAligner(Vocabulary target, Vocabulary source, Settings settings);

    // Aligns every sequence. A candidate that could not be looked up goes to the tail for now, and its text is in `wanted`
    // afterwards. Throws std::invalid_argument with rule, value and fix for input that contradicts itself.
    void align(const std::vector<Sequence>& batch, std::vector<Output>& out, unsigned threads);

    // The texts whose tokens `align` needs to know. `learn` takes the ids of these tokens (CSR), in the same order.
    const std::vector<std::string>& wanted() const { return texts_; }
    void learn(const std::int32_t* ids, const std::int64_t* offsets);

    // The number of candidates in the cache, and a way to forget them.
    std::size_t cached() const { return cached_; }
    void clear();

  private:
    // These stand in place of a candidate in a context. kFree marks a slot without a candidate. kAnyEnd stands for all of the
    // source's end tokens, which have no bytes. kCut stands for all candidates that end the target's token. kClosed and
    // kClosedByDigit stand for all that begin a new pre-token, with a space or with a digit; the value is 1 if the tokens of the
    // prefix stay as they are before such a candidate, else 0. The size of the source's vocabulary plus a candidate stands for
    // the number of digits with which the candidate counts for another token (rule 8).
    static constexpr std::int32_t kFree = -1, kAnyEnd = -2, kClosed = -3, kClosedByDigit = -4, kCut = -5;
    // What a source's token is, apart from any context. kOpens is text that begins a new pre-token. kNumber is a number that was
    // followed, and not a token.
    enum class Role : std::uint8_t { kNone, kText, kOpens, kEnd, kNumber };
    struct Candidate {
        std::int32_t table = kTail;  // what the token counts for at the beginning of a pre-token
        Role role = Role::kNone;
        bool ends_in_digit = false;  // a token of text that does
        bool is_digits = false;      // a token that consists of digits, with or without a space in front
    };
    // What candidates count for in one context, which is given by its key (see Key). It is a hash table.
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
        // Open addressing: pairs of a candidate, or kFree, and what it counts for.
        std::vector<std::pair<std::int32_t, std::int32_t>> slots_;
        std::size_t used_ = 0;
    };
    // Together with the tokens of the prefix, this decides what a candidate counts for.
    struct Key {
        std::size_t prefix;          // the number of the target's tokens from the start of the current pre-token
        std::string_view extension;  // the bytes between the target's position and the candidate
        std::size_t strip;           // the number of the candidate's bytes that stand before the target's position
    };
    // A candidate whose text is in texts_ and whose tokens are not known yet.
    struct Pending {
        const std::string* key;
        Context* context;
        std::int32_t candidate;
        std::size_t prefix_bytes, size;  // the number of bytes of the text's prefix, and of the text without look-ahead
    };
    // Candidates that a sequence met in a context and that were not in the cache.
    struct Missing {
        std::string key;
        std::vector<std::int32_t> candidates;
    };
    class Worker;

    // Aligns the batch once, and returns whether candidates were missing.
    bool run(const std::vector<Sequence>& batch, std::vector<Output>& out, unsigned threads);
    // Puts the missing candidates of a context into the cache, and the texts that have to be tokenised into texts_.
    void intern(const Missing& missing);
    static void write_key(std::string& key, const std::int32_t* prefix, const Key& parts);
    static Key read_key(const std::string& key, std::vector<std::int32_t>& prefix);

    Vocabulary target_, source_;
    Settings settings_;
    std::unordered_map<std::string_view, std::int32_t> exact_;  // the keys are views of target_'s bytes
    std::vector<Candidate> candidates_;                         // one per source id
    std::unordered_map<std::string, Context> contexts_;         // a node never moves, so Pending can point to it
    std::size_t cached_ = 0;                                    // the number of candidates in the cache
    std::vector<std::string> texts_;
    std::vector<Pending> pending_;
    std::vector<std::int32_t> prefix_;  // a buffer for read_key
};

}  // namespace profuser
