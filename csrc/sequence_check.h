// What a sequence must be before it can be aligned. What is wrong is refused with the rule, the value and the fix.
#pragma once

#include "byte_align.h"

namespace profuser {

// Refuses a sequence whose arrays contradict each other.
void check_arrays(const Sequence& q, const Vocabulary& target);

// Refuses tokens that do not hold the response's bytes, and writes the number of bytes that each has in front of the response or
// of its section. The ids from `first_number` on are numbers that were followed, and no tokens. `name` is the side, for messages.
void check_bytes(const Vocabulary& vocabulary, std::int32_t first_number, const std::int32_t* ids, Spans spans,
                 std::string_view response, const char* name, std::vector<std::int32_t>& clip);

// The bytes in quotes, for an error message.
std::string shown(std::string_view bytes);

}  // namespace profuser
