"""The tails: what becomes of the probability mass that a source puts on tokens outside its kept entries.

With M the mass of the kept entries p, t the mass outside them and q_rest the target's mass outside them, each tail says
what p and t are, and whether the target's mass outside counts; README.md derives value and gradient from those. `reference.py`
has these formulas once more, on purpose.
"""

from typing import Final, Literal, NamedTuple, get_args

Tail = Literal["bucket", "renormalize", "conditional"]
TAILS: tuple[Tail, ...] = get_args(Tail)

BUCKET: Final = "bucket"
"""The mass outside is one more entry: t = 1 − M is matched against q_rest as a whole.

`source_tail` gives t where M does not tell it; p is then scaled to sum to 1 − t. Without a `source_tail`, t is a small
difference: the log-probabilities must be fp16 or wider, and M may exceed 1 by no more than rounding. A bucket of many
tokens has no temperature, so that entries at one temperature cannot be brought to another one.
"""

RENORMALIZE: Final = "renormalize"
"""The mass outside is divided out: p becomes p / M, and t is 0.

It takes no `source_tail`. Of log-probabilities only the differences within a row matter: any float dtype will do, and
dividing them by a temperature is exact.
"""

CONDITIONAL: Final = "conditional"
"""The mass outside is divided out on both sides: p becomes p / M, and q becomes q / (1 − q_rest).

Source and target are compared given that the token is one of the kept ids, which others call top-k KL. Nothing is said about
the target's mass outside, and no gradient reaches those logits. Otherwise it is as RENORMALIZE.
"""


class TailRule(NamedTuple):
    """How the tail of the sources of some rows is settled. A floor of 0 is none."""

    bucket: bool  # else the mass outside is divided out
    absent_tail: float  # of a source without an entry
    tail_floor: float  # the least mass of the bucket, and of all entries together
    entry_floor: float  # an entry of less mass belongs to the bucket
    vocabulary: int  # the number of all ids
