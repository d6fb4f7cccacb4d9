"""Lowers what the Triton drivers launch to Triton's IR, for many geometries and options, in seconds and without a GPU.

Triton's interpreter knows no types. Some errors are therefore found only by a compiler: a value that changes its type in a
loop, a shape that fits for one geometry only, or a None or 1 that has become a constant. Here the drivers run on meta
tensors, and Triton's JIT specialises each launch as it would on a GPU. A hook in place of its compiler lowers every variant
once.

This is a program. It needs a process of its own, because Triton's interpreter and compiler cannot share one.

    python tests/lowered_launches.py [EVERY]     # JSON: kernel -> variants, and what did not compile: message -> cases

With EVERY only each EVERY-th variant of a kernel is lowered, from the first on.

Dimension letters: N rows, D hidden, V vocabulary, S sources, K kept entries, R ranges.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from itertools import cycle, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

N, D, S, R = 3, 16, 2, 2
# Vocabularies at and near the widths of blocks, and those of real models.
LOSS_VOCABULARIES = (
    2, 16, 17, 83, 128, 1024, 4096, 8192, 16384, 24576, 32000, 32768, 49152, 65536, 128256, 131072, 151936, 262144,
)  # fmt: skip
TOPK_VOCABULARIES = (1, 16, 83, 2048, 2500, 4096, 128256, 262144)
ENTRIES = (1, 10, 64, 128)


class Launches:
    """Stands in for a driver of Triton, as a GPU that compiles and never runs, and for a hook, which lowers each launch."""

    def __init__(self, every: int = 1):
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self.every = every
        self.target = GPUTarget("cuda", 90, 32)
        self.backend: Any = make_backend(self.target)
        self.case = ""
        self.seen: set = set()
        self.variants: Counter[str] = Counter()
        self.failures: defaultdict[str, list[str]] = defaultdict(list)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def lower(self, *, fn, compile, **unused) -> bool:
        """The JIT's `jit_cache_hook`. It returns true, so that the JIT neither compiles any further nor launches."""
        from triton._C.libtriton import ir
        from triton.compiler import ASTSource

        variant = (fn.name, str(compile["key"]))
        if variant in self.seen:
            return True
        self.seen.add(variant)
        self.variants[fn.name] += 1
        if (self.variants[fn.name] - 1) % self.every:
            return True
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        options = self.backend.parse_options({"num_warps": compile["num_warps"]})
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions, modules = self.backend.get_codegen_implementation(options), self.backend.get_module_map()
        try:
            source.make_ir(self.target, options, functions, modules, context)
        except Exception as error:  # any error of the compiler is a finding
            while error.__cause__:  # the innermost one tells the reason; there is one more for each function around it
                error = error.__cause__
            message = (str(error).strip() or repr(error)).splitlines()[-1]
            self.failures[f"{fn.name}: {message}"].append(self.case)
        return True


def launch_fused_loss(
    V, K=10, T=1.0, grad=True, dtype="bfloat16", labels="int64", ids="int32", logprobs="float16", given=None, tail="bucket",
    bias=None, softcap=None, scale=1.0, source_stride=None, mixed=False, of_row=None, **family,
):  # fmt: skip
    """Launches the loss in two chunks, so that `begin` is 0 in one and not in the other. K = 0 is a loss without a source."""
    import torch

    from profuser.kernels.fused_loss_triton import fused_loss_triton
    from profuser.kernels.fused_loss_types import Operands, Options, Winner

    def empty(*shape, dtype="float32"):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    operands = Operands(
        hidden=empty(N, D, dtype=dtype),
        weight=empty(V, D, dtype=dtype),
        labels=empty(N, dtype=labels),
        ce_weight=empty(N),
        kd_weight=empty(N),
        bias=bias and empty(V, dtype=bias),
        temperature_of_row=of_row and empty(N, dtype=of_row),
    )
    if K:
        strides = (source_stride or N * K, K, 1)
        operands = operands._replace(
            source_ids=empty(0, dtype=ids).as_strided((S, N, K), strides),
            source_logprobs=empty(0, dtype=logprobs).as_strided((S, N, K), strides),
            source_tail=given and empty(S, N, dtype=given),
        )
    options = Options(
        temperature=T,
        tail=tail,
        softcap=softcap,
        logit_scale=scale,
        **family,
        grad_hidden=grad,
        grad_weight=grad,
        grad_bias=grad and bias is not None,
        chunk_size=2,
    )
    chosen = empty(N, dtype="int64") if K and not mixed else None
    winner = Winner(empty(1, dtype="int64"), chosen, empty(S, N) if mixed else None)
    fused_loss_triton(operands, options, winner)


def launch_source_topk(
    V, k, T=1.0, labels="int64", logits="float32", ranges=None, padded=True, bias=None, softcap=None, scale=1.0,
    vocab_map=None, maps=None,
):  # fmt: skip
    """`ranges`, `vocab_map` and `maps` are dtypes: of ranges, of a map of the vocabulary, and of maps of the ranges."""
    import torch

    from profuser.kernels import source_topk_triton_merge
    from profuser.kernels.source_topk_triton import topk_rows

    def empty(*shape, dtype="float32"):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    z = empty(N, -(-V // 16) * 16 if padded else V, dtype=logits)
    asked_for = None
    if ranges:
        rows, lo, hi, order = (empty(size, dtype=ranges) for size in (R, R, R, V))
        asked_for = rows, lo, hi, order
        if maps:
            asked_for += empty(R, dtype=maps), empty(V, dtype=maps)
    # Meta tensors have no values to read. Both ranges are of the whole vocabulary, and the last one has a map.
    numbers = [(0, 0, V, -1), (1, 0, V, 0)]
    with patch.object(source_topk_triton_merge, "numbers_of", lambda *columns: numbers):
        topk_rows(
            lambda rows: z[rows],
            empty(N, dtype=labels),
            k,
            V,
            T,
            N,
            vocab_map and empty(V, dtype=vocab_map),
            asked_for,
            bias and empty(V, dtype=bias),
            softcap,
            scale,
        )


def launch_everything(launches: Launches) -> None:
    from profuser.kernels import fused_loss_triton, source_topk_triton, source_topk_triton_merge
    from profuser.kernels.divergences import DIVERGENCES
    from profuser.kernels.tails import TAILS

    for driver in (fused_loss_triton, source_topk_triton, source_topk_triton_merge):
        launches.variants.update(dict.fromkeys((name for name in vars(driver) if name.endswith("_kernel")), 0))

    def launch(function, **options):
        launches.case = f"{function.__name__.removeprefix('launch_')} {options}"
        function(**options)

    everything = {"T": 2.0, "bias": "bfloat16", "softcap": 30.0, "scale": 0.5}

    def losses(V):
        launch(launch_fused_loss, V=V)
        launch(launch_fused_loss, V=V, T=2.0)
        launch(launch_fused_loss, V=V, dtype="float32", **everything)
        launch(launch_fused_loss, V=V, K=0, dtype="float16")
        launch(launch_fused_loss, V=V, grad=False, **everything)

    for V in LOSS_VOCABULARIES:
        losses(V)
    # The same blocks as those of `small_blocks` in conftest.py.
    with patch.object(fused_loss_triton, "dense_config", lambda *args: (64, 1)):
        for V in (17, 83, 128):
            losses(V)

    # The loss's other options, at small V.
    kinds = list(product(("int64", "int32"), ("int32", "int64"), ("float16", "float32", "bfloat16", "float64")))
    settled = cycle(dict(zip(("labels", "ids", "logprobs"), kind)) for kind in kinds)
    for K, given, tail in product(ENTRIES, (None, "float32", "float64"), TAILS):
        launch(launch_fused_loss, V=256, K=K, given=given, tail=tail, **next(settled))
    for divergence, tail, mixed in product(DIVERGENCES, TAILS, (True, False)):
        launch(launch_fused_loss, V=83, divergence=divergence, divergence_beta=0.3, tail=tail, mixed=mixed)
        launch(
            launch_fused_loss, V=83, divergence=divergence, divergence_beta=0.3, tail=tail, mixed=mixed, **everything
        )
    for smoothing, z_loss, K in product((0.0, 0.1), (0.0, 1e-4), (0, 10)):
        launch(launch_fused_loss, V=83, K=K, label_smoothing=smoothing, z_loss=z_loss, **everything)
    for of_row, K in product(("float32", "float64"), (0, 10)):
        launch(launch_fused_loss, V=83, K=K, of_row=of_row)
        launch(launch_fused_loss, V=83, K=K, of_row=of_row, mixed=K > 0, **everything)
    for V, K in product((17, 83, 128), (0, 10)):
        launch(launch_fused_loss, V=V, K=K, entropies=True)
        launch(launch_fused_loss, V=V, K=K, entropies=True, mixed=K > 0, **everything)
    for labels, ids, logprobs in kinds:
        launch(launch_fused_loss, V=83, labels=labels, ids=ids, logprobs=logprobs)
    launch(launch_fused_loss, V=83, source_stride=1 << 32)
    for labels, grad in product(("int32", "int64"), (True, False)):
        launch(launch_fused_loss, V=83, K=0, labels=labels, grad=grad)
        launch(launch_fused_loss, V=83, K=0, labels=labels, grad=grad, **everything)
    for name, value in everything.items():
        launch(launch_fused_loss, V=83, **{name: value})
    launch(launch_fused_loss, V=83, bias="float32")

    for V in TOPK_VOCABULARIES:
        launch(launch_source_topk, V=V, k=1)
        launch(launch_source_topk, V=V, k=min(V, 10), padded=False, logits="bfloat16", labels="int32", T=0.7)
        launch(launch_source_topk, V=V, k=min(V, 128), **everything)
        launch(launch_source_topk, V=V, k=min(V, 10), ranges="int32", vocab_map="int64", maps="int32")
    for k in (1, 2, 3, 10, 64, 128):
        launch(launch_source_topk, V=2500, k=k, ranges="int64")
        launch(launch_source_topk, V=2500, k=k, vocab_map="int32")
        launch(launch_source_topk, V=2500, k=k, ranges="int64", vocab_map="int64")
        launch(launch_source_topk, V=2500, k=k, ranges="int64", maps="int64")
    for maps in ({"vocab_map": "int64"}, {"maps": "int64"}, {"vocab_map": "uint8", "maps": "uint8"}):
        for name, value in everything.items():
            launch(launch_source_topk, V=83, k=2, ranges="int32", **maps, **{name: value})
        launch(launch_source_topk, V=1, k=1, ranges="int64", padded=False, labels="int32", **maps, **everything)
        launch(launch_source_topk, V=83, k=2, ranges="uint8", logits="float16", bias="float32", **maps)
    launch(launch_source_topk, V=1, k=1, padded=False, ranges="int32", **everything)
    for name, value in everything.items():
        launch(launch_source_topk, V=83, k=2, ranges="int32", **{name: value})
    launch(launch_source_topk, V=83, k=2, ranges="uint8", logits="float16", bias="float32")
    # Whole numbers are special: 1 becomes a constant, and the compiler is told of a multiple of 16.
    for value in (1, 2, 16):
        launch(launch_source_topk, V=83, k=1, T=value, softcap=value, scale=value, ranges="int64")
        merged = {"ranges": "int64", "maps": "int64", "vocab_map": "int64"}
        launch(launch_source_topk, V=83, k=1, T=value, softcap=value, scale=value, **merged)


def main() -> None:
    import triton.knobs

    launches: Any = Launches(*map(int, sys.argv[1:]))  # Triton sees a DriverBase, and a JITHook
    triton.runtime.driver.set_active(launches)
    triton.knobs.runtime.jit_cache_hook = launches.lower
    launch_everything(launches)
    json.dump({"variants": launches.variants, "failures": launches.failures}, sys.stdout)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
