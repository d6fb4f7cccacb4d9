"""Compiles the Triton kernels ahead of time, as they are shipped, and reports what the compiler made of them.

This is a program that compiles for one target. It needs a process of its own, because Triton's interpreter and compiler
cannot share one.

    python tests/compiled_kernels.py sm_90 [EVERY]      # JSON: kernel -> registers, spills, loops …

With EVERY only each EVERY-th kernel is compiled, from the first on.

To check the kernels of another file, add them to `kernels`.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPE = re.compile(r"\*?(i|fp|bf)\d+")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ACCESS = re.compile(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b")


@dataclass(kw_only=True, slots=True)
class Kernel:
    function: Any  # a triton.jit function
    arguments: dict
    """For each argument its type ("*bf16", "i32") if it is given at run time, or else its compile-time value, text included."""
    warps: int = 4
    streams: bool = False
    """Whether its loops must load and store 16 bytes at a time, without a barrier."""
    loops_over_sources: bool = False
    """Whether there are loops over sources too, which read numbers of their slots and stream nothing."""
    multiples_of_16: tuple[str, ...] = ()
    """Integers that are always multiples of 16. At run time the compiler is told so; it assumes it of pointers anyway."""


def kernels(warp_size: int) -> dict[str, Kernel]:
    return fused_loss_kernels(warp_size) | source_topk_kernels()


def fused_loss_kernels(warp_size: int) -> dict[str, Kernel]:
    import triton

    from profuser.kernels import fused_loss_triton as driver
    from profuser.kernels import fused_loss_triton_kernels as source

    def padded(V):
        return -(-V // driver.PAD) * driver.PAD

    def prep(K, **changes):
        block, compare, warps = driver.prep_config(max(K, 1))
        strides = {f"stride_{name}": "i64" for name in ("ids_s", "ids_n", "ids_k", "tail_s", "tail_n")}
        strides |= {f"stride_logprobs_{axis}": "i64" for axis in "snk"}
        pointers = {
            "labels_ptr": "*i64", "winner_ptr": "*i64", "ids_ptr": "*i32", "logprobs_ptr": "*fp16", "tail_ptr": "*fp32",
            "gold_slot_ptr": "*i32", "lifted_ids_ptr": "*i32", "p_ptr": "*fp32", "t_ptr": "*fp32",
            "source_mass_ptr": "*fp32",
        }  # fmt: skip
        sizes = {"S": "i32", "V": "i32", "K": K, "BUCKET": True, "BLOCK_K": block, "BLOCK_COMPARE": compare}
        sizes |= {"ENDLESS": False, "ABSENT_TAIL": 1.0}
        return Kernel(function=source._prep_kernel, arguments=pointers | strides | sizes | changes, warps=warps)

    def slots(function, K, pointers, **options):
        sizes = {"V_PADDED": padded(32000), "SLOTS": K + 1}
        sizes["BLOCK"] = min(driver.SLOT_BLOCK, triton.next_power_of_2(K + 1))
        return Kernel(function=function, arguments=pointers | {"begin": "i32"} | sizes | options, warps=1)

    def gather(K, bias=None, **options):
        pointers = {"logits_ptr": "*fp32", "bias_ptr": bias, "lifted_ids_ptr": "*i32", "lifted_z_ptr": "*fp32"}
        return slots(source._gather_kernel, K, pointers, **({"SCALE": 1.0, "SOFTCAP": None} | options))

    def scatter(K):
        pointers = {"grad_ptr": "*bf16", "lifted_ids_ptr": "*i32", "lifted_grad_ptr": "*fp32"}
        return slots(source._scatter_kernel, K, pointers)

    def dense(V, K=10, dtype="bf16", **changes):
        block, warps = driver.dense_config(V, changes.get("W", 1), warp_size)
        floats = ("lifted_z", "lifted_grad", "p", "t", "ce_weight", "kd_weight", "loss", "ce", "kd")
        arguments = {f"{name}_ptr": "*fp32" for name in ("logits", *floats, "target_mass")} | {
            "grad_ptr": f"*{dtype}", "bias_ptr": None, "gold_slot_ptr": "*i32", "lifted_ids_ptr": "*i32",
            "begin": "i32", "temperature": "fp32", "V": "i32", "V_PADDED": padded(V), "SLOTS": K + 1, "TEMPERED": False,
            "temperature_ptr": None,
            "source_weight_ptr": None, "W": 1, "DIVERGENCE": "forward_kl", "BETA": 0.5, "LOG_P_SHARE": 0.0,
            "LOG_Q_SHARE": 0.0, "CONDITIONAL": False, "Z_LOSS": 0.0, "SMOOTHING": 0.0, "EVEN_APART": False,
            "SCALE": 1.0, "SOFTCAP": None, "BLOCK_V": block, "BLOCK_SLOTS": triton.next_power_of_2(K + 1),
        }  # fmt: skip
        arguments |= changes
        over_sources = arguments["source_weight_ptr"] is not None
        return Kernel(
            function=source._dense_kernel, arguments=arguments, warps=warps, streams=padded(V) > block,
            loops_over_sources=over_sources,
        )  # fmt: skip

    def entropy(V, K=10, **changes):
        pointers = {"logits_ptr": "*fp32", "bias_ptr": None, "lifted_z_ptr": "*fp32", "gold_slot_ptr": "*i32"}
        pointers |= {"target_entropy_ptr": "*fp32"}
        fixed = {"begin": "i32", "V_PADDED": padded(V), "SLOTS": K + 1, "SCALE": 1.0, "SOFTCAP": None}
        fixed |= {"BLOCK_V": driver.ENTROPY_BLOCK, "BLOCK_SLOTS": triton.next_power_of_2(K + 1)}
        return Kernel(function=source._entropy_kernel, arguments=pointers | fixed | changes, warps=8)

    source_pointers = ("winner_ptr", "ids_ptr", "logprobs_ptr", "tail_ptr", "p_ptr", "t_ptr")
    everything = {"TEMPERED": True, "SCALE": 0.5, "SOFTCAP": 30.0, "bias_ptr": "*bf16"}
    jsd = {"DIVERGENCE": "jsd", "LOG_P_SHARE": math.log(0.5), "LOG_Q_SHARE": math.log(0.5)}
    mixed = {"source_weight_ptr": "*fp32", "W": 3}
    extras = {"Z_LOSS": 1e-4, "SMOOTHING": 0.1}
    return {
        "prep K=10": prep(10, tail_ptr=None),
        "prep K=128, tail": prep(128),
        "prep, no source": prep(0, **dict.fromkeys(source_pointers)),
        "gather K=10": gather(10),
        "gather K=128, softcap, bias": gather(128, bias="*bf16", SCALE=0.5, SOFTCAP=30.0),
        "scatter K=128": scatter(128),
        "dense V=1024": dense(1024),
        "dense V=32000": dense(32000),
        "dense V=32000, fp32": dense(32000, dtype="fp32"),
        "dense V=32003, all options": dense(32003, **everything),
        # This vocabulary consists of whole blocks, without a masked one behind them.
        "dense V=32768": dense(32768),
        "dense V=49152, all options": dense(49152, **everything),
        "dense V=131072, no source": dense(131072, K=0, p_ptr=None, t_ptr=None),
        "dense V=151936": dense(151936),
        "dense V=151936, T": dense(151936, TEMPERED=True),
        "dense V=151936, K=128, all options": dense(151936, K=128, **everything),
        "dense V=151936, JSD": dense(151936, **jsd),
        "dense V=151936, reverse KL, conditional": dense(151936, DIVERGENCE="reverse_kl", CONDITIONAL=True),
        "dense V=151936, three sources of K=10": dense(151936, K=30, **mixed),
        "dense V=151936, three sources of K=20, JSD, all options": dense(
            151936, K=60, **mixed, **jsd, **extras, **everything
        ),
        "dense V=151936, z-loss and smoothing": dense(151936, **extras),
        "dense V=151936, smoothing apart": dense(151936, SMOOTHING=0.1, EVEN_APART=True),
        "dense V=151936, no source": dense(151936, K=0, p_ptr=None, t_ptr=None),
        "dense V=151936, T of each row": dense(151936, temperature_ptr="*fp32", TEMPERED=True),
        "entropy V=32000": entropy(32000),
        "entropy V=151936, K=128, all options": entropy(151936, K=128, bias_ptr="*bf16", SCALE=0.5, SOFTCAP=30.0),
        "dense V=151936, forward only": dense(151936, grad_ptr=None, lifted_grad_ptr=None),
    }


def source_topk_kernels() -> dict[str, Kernel]:
    import triton

    from profuser.kernels import source_topk_triton_kernels as source
    from profuser.kernels import source_topk_triton_merge as merging

    everything = {"bias_ptr": "*bf16", "softcap": "fp32", "logit_scale": "fp32"}
    row = {"logits_ptr": "*fp32", "width": "i32", "bias_ptr": None, "row_max_ptr": "*fp32", "log_sum_ptr": "*fp32"}
    row |= {"temperature": "fp32", "softcap": None, "logit_scale": None}
    kept = {"ids_ptr": "*i32", "logprobs_ptr": "*fp32", "k": "i32"}
    no_ranges = dict.fromkeys(("which_ptr", "rows_ptr"))
    of_ranges = {"which_ptr": "*i32", "rows_ptr": "*i64"}
    chunk = {"first_row": "i32", "chunk_rows": "i32"}

    def sizes(V, k=10):
        supers = triton.cdiv(V, source.GROUP.value**2)
        return supers, supers * source.GROUP.value, max(2, triton.next_power_of_2(k))

    def reduce(V, padded=True, **changes):
        outputs = {f"{name}_ptr": "*fp32" for name in ("maxima", "lse", "ce")} | {"labels_ptr": "*i64"}
        fixed = {"V": V, "G": sizes(V)[1], "AT_ONE": True, "BLOCK_V": 2048}
        arguments = row | outputs | fixed | changes
        return Kernel(function=source._reduce_kernel, arguments=arguments, multiples_of_16=("width",) if padded else ())

    def select(V, k, **changes):
        supers, _, K = sizes(V, k)
        fixed = {"V": "i32", "G": "i32", "K": K, "BLOCK_S": max(K, triton.next_power_of_2(supers))}
        arguments = (
            row | kept | no_ranges | chunk | {"maxima_ptr": "*fp32", "segment_ids_ptr": None, "logmass_ptr": None}
        )
        return Kernel(
            function=source._select_kernel, arguments=arguments | fixed | changes, multiples_of_16=("width", "G")
        )

    def of_range(V, k, **changes):
        pointers = {f"{name}_ptr": "*i64" for name in ("rows", "lo", "hi", "order")} | {"logmass_ptr": "*fp32"}
        fixed = {"order_size": "i32", "V": V, "K": sizes(V, k)[2], "BLOCK": 1024}
        arguments = row | kept | pointers | chunk | fixed | changes
        return Kernel(function=source._range_kernel, arguments=arguments, multiples_of_16=("width",))

    def merge(V, **changes):
        pointers = {f"{name}_ptr": "*i32" for name in ("members", "begin", "count", "column")} | {"merged_ptr": "*fp32"}
        absent = dict.fromkeys(("labels_ptr", "lo_ptr", "hi_ptr", "positions_ptr"))
        fixed = {"n": "i32", "blocks": "i32", "S": "i32", "V": V, "LONG": merging.LONG, "BLOCK": merging.BLOCK}
        arguments = {name: value for name, value in row.items() if name != "log_sum_ptr"}
        arguments |= pointers | absent | no_ranges | chunk | fixed | changes
        return Kernel(function=source._merge_kernel, arguments=arguments, multiples_of_16=("width", "S"))

    def merged_reduce(V, **changes):
        pointers = {"merged_ptr": "*fp32", "segment_ids_ptr": "*i32", "maxima_ptr": "*fp32"}
        absent = dict.fromkeys(("labels_ptr", "occurs_ptr", "logmass_ptr"))
        fixed = {"n": "i32", "S": "i32", "G": "i32", "V": V, "BLOCK": 2048}
        arguments = row | pointers | absent | no_ranges | chunk | fixed | changes
        return Kernel(function=source._merged_reduce_kernel, arguments=arguments, multiples_of_16=("width", "S", "G"))

    own_map = of_ranges | {"labels_ptr": "*i64"}
    positions = of_ranges | {"lo_ptr": "*i64", "hi_ptr": "*i64", "positions_ptr": "*i32"}
    own_mass = own_map | {"occurs_ptr": "*i32", "logmass_ptr": "*fp32"}
    return {
        "reduce V=128256": reduce(128256),
        "reduce V=50257, T, all options": reduce(50257, AT_ONE=False, **everything),
        "reduce of ready-made logits, V=50257": reduce(50257, padded=False, logits_ptr="*bf16"),
        "select V=128256, k=64": select(128256, 64),
        "select V=262144, k=128, all options": select(262144, 128, **everything),
        "range V=128256, k=10": of_range(128256, 10),
        "range V=128256, k=128, all options": of_range(128256, 128, **everything),
        "merge of rows, V=128256": merge(128256),
        "merge of ranges, V=128256": merge(128256, **own_map),
        "merge of ranges, V=128256, all options": merge(128256, **own_map, **everything),
        "merge of ranges without a map of their own, all options": merge(50257, **positions, **everything),
        "reduce of merged rows": merged_reduce(128256),
        "reduce of merged ranges, all options": merged_reduce(128256, **own_mass, **everything),
        "select of merged ranges, k=10": select(128256, 10, segment_ids_ptr="*i32", logmass_ptr="*fp32", **of_ranges),
    }


def compile_kernel(kernel: Kernel, target):
    from triton import compile
    from triton.compiler import ASTSource

    names = kernel.function.arg_names
    assert set(names) == set(kernel.arguments), set(names) ^ set(kernel.arguments)
    types = {name: kernel.arguments[name] for name in names if TYPE.fullmatch(str(kernel.arguments[name]))}
    source = ASTSource(
        fn=kernel.function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in kernel.arguments.items() if name not in types},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in types.items()
            if kind.startswith("*") or name in kernel.multiples_of_16
        },
    )
    return compile(source, target=target, options={"num_warps": kernel.warps})


def loops(ptx: str) -> list[dict]:
    """For each loop the number of bytes of every access to global memory, and whether the loop has a barrier."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith("$L__BB")}
    found = []
    for number, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", line)
        if jump and (begin := labels[jump[1]]) < number:
            body = "\n".join(lines[begin:number])
            accesses = [int(count or 1) * int(bits) // 8 for _, count, bits in ACCESS.findall(body)]
            found.append({"access_bytes": accesses, "barrier": "bar.sync" in body})
    return found


def first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return found[1]


def nvidia_report(compiled, arch: str) -> dict:
    import triton

    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as directory:
        cubin, ptx = Path(directory) / "kernel.cubin", Path(directory) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        used = subprocess.run(
            [programs / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        full_arch = first(r"(?m)^\.target (\w+)", compiled.asm["ptx"])
        ptxas = programs / ("ptxas-blackwell" if int(arch.removeprefix("sm_")) >= 100 else "ptxas")
        command = [ptxas, "-v", f"-arch={full_arch}", ptx, "-o", Path(directory) / "out"]
        spilt = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    fields = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    report = {name: int(first(rf"\b{field}:(\d+)", used)) for name, field in fields.items()}
    report["spills"] = sum(int(count) for count in re.findall(r"(\d+) bytes spill", spilt))
    return report | {"loops": loops(compiled.asm["ptx"])}


def amd_report(compiled) -> dict:
    fields = {"registers": "vgpr_count", "spills": "vgpr_spill_count", "stack": "private_segment_fixed_size"}
    return {name: int(first(rf"\.{field}:\s+(\d+)", compiled.asm["amdgcn"])) for name, field in fields.items()}


def main(target: str, every: int = 1) -> None:
    from triton.backends.compiler import GPUTarget

    amd = target.startswith("gfx")
    warp_size = 64 if amd else 32
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    reports = {}
    for name, kernel in list(kernels(warp_size).items())[::every]:
        compiled = compile_kernel(kernel, gpu)
        reports[name] = amd_report(compiled) if amd else nvidia_report(compiled, target)
        reports[name] |= {"threads": kernel.warps * warp_size, "streams": kernel.streams}
        reports[name] |= {"loops_over_sources": kernel.loops_over_sources}
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1], *map(int, sys.argv[2:]))
