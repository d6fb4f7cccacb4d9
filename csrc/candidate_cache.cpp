// The cache of what candidates count for behind a prefix: its keys, the texts that the tokenizer is asked for, and what is
// learnt from their tokens. See byte_align.h.

#include "byte_align.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace profuser {

namespace {

constexpr std::int64_t kMostBytes = 65535;  // the largest number of bytes in a token; a key holds such numbers in 16 bits
constexpr std::string_view kDigitsOfTen = "0123456789";
constexpr std::string_view kLookaheads[] = {"", "x", " x"};  // must be LOOKAHEADS in profuser/alignment/vocab_map.py

// Whether Python's strict decoder accepts the bytes: it refuses overlong forms, surrogates, and anything beyond U+10FFFF.
bool is_utf8(std::string_view bytes) {
    const auto* p = reinterpret_cast<const unsigned char*>(bytes.data());
    const auto* const end = p + bytes.size();
    const auto continues = [&](std::ptrdiff_t n) { return end - p > n && (p[n] & 0xC0) == 0x80; };
    while (p < end) {
        if (p[0] < 0x80) {
            p += 1;
        } else if (p[0] >= 0xC2 && p[0] <= 0xDF && continues(1)) {
            p += 2;
        } else if ((p[0] & 0xF0) == 0xE0 && continues(1) && continues(2) && !(p[0] == 0xE0 && p[1] < 0xA0) &&
                   !(p[0] == 0xED && p[1] > 0x9F)) {
            p += 3;
        } else if (p[0] >= 0xF0 && p[0] <= 0xF4 && continues(1) && continues(2) && continues(3) &&
                   !(p[0] == 0xF0 && p[1] < 0x90) && !(p[0] == 0xF4 && p[1] > 0x8F)) {
            p += 4;
        } else {
            return false;
        }
    }
    return true;
}

// Whether the bytes are digits, with or without a space in front.
bool is_digits(std::string_view bytes) {
    if (!bytes.empty() && bytes[0] == ' ') bytes.remove_prefix(1);
    return !bytes.empty() && std::all_of(bytes.begin(), bytes.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

void refuse(const std::string& message) { throw std::invalid_argument(message); }

Vocabulary::Vocabulary(std::string bytes, std::vector<std::int64_t> offsets, std::vector<std::uint8_t> text)
    : bytes_(std::move(bytes)), offsets_(std::move(offsets)), text_(std::move(text)) {
    if (offsets_.size() != text_.size() + 1 || offsets_.front() != 0 || !std::is_sorted(offsets_.begin(), offsets_.end()) ||
        offsets_.back() != static_cast<std::int64_t>(bytes_.size())) {
        refuse("a vocabulary's offsets must ascend from 0 to its number of bytes, one more than its tokens, got " +
               std::to_string(offsets_.size()) + " for " + std::to_string(text_.size()) + " tokens");
    }
    for (std::size_t i = 0; i + 1 < offsets_.size(); ++i) {
        if (offsets_[i + 1] - offsets_[i] > kMostBytes) {
            refuse("a token must have at most " + std::to_string(kMostBytes) + " bytes, token " + std::to_string(i) + " has " +
                   std::to_string(offsets_[i + 1] - offsets_[i]));
        }
    }
}

void ByteAligner::Context::insert(std::int32_t candidate, std::int32_t counts_for) {
    // Double the table before more than half of its slots are used.
    if (2 * (used_ + 1) > slots_.size()) {
        auto old = std::move(slots_);
        slots_.assign(std::max<std::size_t>(16, 2 * old.size()), {kFree, kTail});
        used_ = 0;
        for (const auto& [known, value] : old) {
            if (known != kFree) insert(known, value);
        }
    }
    const std::size_t mask = slots_.size() - 1;
    std::size_t i = slot_of(candidate, mask);
    while (slots_[i].first != kFree && slots_[i].first != candidate) i = (i + 1) & mask;
    used_ += slots_[i].first == kFree;
    slots_[i] = {candidate, counts_for};
}

// A key is the prefix's tokens, then the extension, then the number of the extension's bytes and the strip. Most keys have at
// most two tokens, and such a short string needs no memory on the heap.
void ByteAligner::write_key(std::string& key, const std::int32_t* prefix, const Key& parts) {
    const std::uint16_t numbers[2] = {static_cast<std::uint16_t>(parts.extension.size()), static_cast<std::uint16_t>(parts.strip)};
    key.assign(reinterpret_cast<const char*>(prefix), parts.prefix * sizeof(*prefix));
    key.append(parts.extension);
    key.append(reinterpret_cast<const char*>(numbers), sizeof(numbers));
}

ByteAligner::Key ByteAligner::read_key(const std::string& key, std::vector<std::int32_t>& prefix) {
    std::uint16_t numbers[2];
    const std::size_t rest = key.size() - sizeof(numbers);
    std::memcpy(numbers, key.data() + rest, sizeof(numbers));
    prefix.resize((rest - numbers[0]) / sizeof(std::int32_t));
    // Not memcpy, to which the null pointer of an empty vector may not be given.
    std::copy_n(key.data(), rest - numbers[0], reinterpret_cast<char*>(prefix.data()));
    return {prefix.size(), std::string_view(key).substr(rest - numbers[0], numbers[0]), numbers[1]};
}

ByteAligner::ByteAligner(Vocabulary target, Vocabulary source, Settings settings)
    : target_(std::move(target)), source_(std::move(source)), settings_(std::move(settings)) {
    const auto source_size = static_cast<std::size_t>(source_.size()), target_size = static_cast<std::size_t>(target_.size());
    const Settings& s = settings_;
    if (s.source_ends.size() != source_size || s.table.size() != source_size || s.opens.size() != source_size ||
        s.lookahead.size() != source_size || s.onward.size() != source_size || s.closes.size() != target_size) {
        refuse("a candidate table must have one row per token of its vocabulary (" + std::to_string(source_size) + ", " +
               std::to_string(target_size) + "); build it again from these tokenizers");
    }
    for (const std::int32_t id : s.table) {
        if (id < kTail || id >= target_.size()) refuse("a candidate table must hold target ids or -1, got " + std::to_string(id));
    }
    for (const std::uint8_t which : s.lookahead) {
        if (which > 2) refuse("lookahead must be 0, 1 or 2, got " + std::to_string(which));
    }
    // Look-up tables: the exact tokens by their bytes, and what each source token is.
    for (const std::int32_t id : s.exact) {
        if (!target_.is_text(id)) refuse("exact must hold target ids of text, got " + std::to_string(id));
        exact_.emplace(target_.piece(id), id);
    }
    settings_.top_k = std::min(settings_.top_k, std::max(target_.size(), 1));
    candidates_.resize(source_size);
    for (std::int32_t id = 0; id < source_.size(); ++id) {
        if (s.source_ends[id]) {
            candidates_[id].role = Role::kEnd;
        } else if (source_.is_text(id) && !source_.piece(id).empty()) {
            const char last = source_.piece(id).back();
            if (id >= s.first_number) {
                candidates_[id].role = Role::kNumber;
            } else {
                candidates_[id] = {s.table[id], s.opens[id] ? Role::kOpens : Role::kText, last >= '0' && last <= '9',
                                   is_digits(source_.piece(id))};
            }
        }
    }
}

void ByteAligner::intern(const Missing& missing) {
    const auto node = contexts_.try_emplace(missing.key).first;
    const auto& key = node->first;
    Context& context = node->second;
    const Key parts = read_key(key, prefix_);
    std::string prefix;
    for (const std::int32_t id : prefix_) prefix += target_.piece(id);
    // The text of a candidate is the prefix, the extension, and the candidate's bytes. An end of turn has no bytes, and
    // candidates that begin a new pre-token are tried with one example.
    for (const std::int32_t candidate : missing.candidates) {
        if (context.find(candidate)) continue;
        ++cached_;
        const bool onward = candidate >= source_.size();
        std::string added(parts.extension);
        if (onward || candidate >= 0) added += source_.piece(onward ? candidate - source_.size() : candidate).substr(parts.strip);
        std::string text = prefix + added;
        if (onward) {
            // The candidate is tokenised once more with each digit behind it.
            context.insert(candidate, 0);
            if (!is_utf8(text)) continue;
            for (const char digit : kDigitsOfTen) {
                pending_.push_back({&key, &context, candidate, prefix.size(), text.size()});
                texts_.push_back(text + digit);
            }
            continue;
        }
        if (candidate == kClosed || candidate == kClosedByDigit) {
            const std::string example = text + (candidate == kClosed ? " x" : "1");
            context.insert(candidate, 0);
            if (!is_utf8(text)) continue;
            pending_.push_back({&key, &context, candidate, prefix.size(), text.size()});
            texts_.push_back(example);
            continue;
        }
        if (!is_utf8(text)) {
            // The candidate ends inside a character. That is no text to tokenise, so only a token of exactly these bytes
            // fits.
            const auto exact = exact_.find(added);
            context.insert(candidate, exact == exact_.end() ? kTail : exact->second);
            continue;
        }
        // Until the text's tokens are learnt, the candidate goes to the tail.
        pending_.push_back({&key, &context, candidate, prefix.size(), text.size()});
        if (candidate >= 0) text += kLookaheads[settings_.lookahead[candidate]];
        if (candidate == kCut) text += " x";
        texts_.push_back(std::move(text));
        context.insert(candidate, kTail);
    }
}

void ByteAligner::learn(const std::int32_t* ids, const std::int64_t* offsets) {
    for (std::size_t i = 0; i < pending_.size(); ++i) {
        const Pending& pending = pending_[i];
        read_key(*pending.key, prefix_);
        const std::int32_t* const found = ids + offsets[i];
        const std::size_t size = offsets[i + 1] - offsets[i], before = prefix_.size();
        // A candidate that changes the tokens of its prefix is dropped (rule 3).
        const bool stays = size >= before && std::equal(prefix_.begin(), prefix_.end(), found);
        if (pending.candidate == kClosed || pending.candidate == kClosedByDigit) {
            pending.context->insert(pending.candidate, stays);
            continue;
        }
        if (pending.candidate >= source_.size()) {
            const std::int32_t token = *pending.context->find(pending.candidate - source_.size());
            const bool changes = !stays || size == before || found[before] != token;
            pending.context->insert(pending.candidate, *pending.context->find(pending.candidate) + changes);
            continue;
        }
        if (!stays) {
            pending.context->insert(pending.candidate, kDropped);
            continue;
        }
        if (size == before || !target_.is_text(found[before])) continue;  // without a token of its own it stays in the tail
        const std::string_view piece = target_.piece(found[before]), text = texts_[i];
        // A token that is longer than the candidate reaches into the look-ahead, and one of other bytes was changed by the
        // normaliser. In both cases the candidate stays in the tail.
        if (pending.prefix_bytes + piece.size() <= pending.size && text.substr(pending.prefix_bytes, piece.size()) == piece) {
            pending.context->insert(pending.candidate, found[before]);
        }
    }
    texts_.clear();
    pending_.clear();
}

void ByteAligner::clear() {
    texts_.clear();
    pending_.clear();
    contexts_.clear();
    cached_ = 0;
}

}  // namespace profuser
