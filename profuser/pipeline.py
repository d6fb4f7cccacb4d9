"""A whole run: prepare what is missing, fuse, save, score, report."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from profuser.evaluate.scores import evaluate
from profuser.evaluate.tables import closing_examples, score_table
from profuser.prepare.announce import announce
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import Preparation
from profuser.progress import in_words
from profuser.recipe.parse import Run
from profuser.report.page import write_report
from profuser.store.files import read_json
from profuser.store.store import Store
from profuser.train.checkpoint import newest_step
from profuser.train.fused_model import save_fused
from profuser.train.loop import Trainer
from profuser.train.parallel import launch, settled_precision
from profuser.train.run_directory import RunDirectory


def train(run: Run, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Prepare, fuse, save and score one recipe; returns scores.json's content (empty without held-out data)."""
    recipe, directory = run.recipe, RunDirectory(run)
    precision = settled_precision(directory.precision())
    accelerator = accelerator or launch(precision)
    is_main = accelerator.is_main_process
    if is_main:
        directory.begin(precision)
    accelerator.wait_for_everyone()
    store: Store | None = None
    with directory.timed("prepare", is_main):
        if is_main:
            preparation = Preparation(Inputs.open(run))
            announce("train", preparation, accelerator.num_processes, newest_step(directory.checkpoints))
            store = preparation.run()
            del preparation
        accelerator.wait_for_everyone()
        if store is None:
            store = Store.open(run.store_dir)
    with directory.timed("train", is_main):
        trainer = Trainer(recipe, store, directory.path, accelerator)
        trainer.train()
    scores: dict[str, Any] = {}
    if is_main:
        with directory.timed("evaluate"):
            save_fused(trainer.fusion.model, trainer.chat.tokenizer, directory.path, recipe, trainer.saved_dtype)
            del trainer
            if recipe.data.heldout is not None:
                scores = evaluate(run, store)
        directory.finish()
    accelerator.wait_for_everyone()
    return scores


def train_and_report(run: Run) -> None:
    """What the command does: `train` unless the run is complete, its scores and examples in the terminal, the report."""
    directory = RunDirectory(run)
    fresh = bool(run.options.get("fresh"))
    accelerator = launch(settled_precision(run.recipe.optim.precision if fresh else directory.precision()))
    complete = False
    if accelerator.is_main_process:
        if fresh:
            check_unchanged(run)  # says what is wrong before anything is moved
            directory.set_aside()
        complete = directory.complete()
    if broadcast_object_list([complete])[0]:
        accelerator.print(f"{directory.path} is complete already; --fresh starts over")
        if accelerator.is_main_process:
            check_unchanged(run)  # says so where models or data are no longer those of the run
            score_again(run)
    else:
        train(run, accelerator)
    if accelerator.is_main_process:
        report = write_report(directory.path, run.store_dir)
        if run.recipe.data.heldout is not None:
            print(score_table(read_json(directory.path / "scores.json")))
            print(closing_examples(read_json(directory.path / "evaluation.json"), 3))
        if (run.store_dir / "manifest.json").exists() and (line := Store.open(run.store_dir, complete=False).handled()):
            print(line)
        seconds = directory.read()["seconds"]
        print(f"took {', '.join(f'{phase} {in_words(s)}' for phase, s in seconds.items())}")
        print(f"fused model: {directory.path}\nreport: {report}")
    accelerator.free_memory()  # DDP before its process group: as the last user it could wait for gloo's thread forever
    accelerator.end_training()


def check_unchanged(run: Run) -> None:
    """That the recipe's inputs can be opened and are those that its store, if there is one, was made from.

    Compares only: whatever the answer, the store stays as it is.
    """
    inputs = Inputs.open(run)
    if (run.store_dir / "manifest.json").exists():
        Store.open(run.store_dir, complete=False).changes(inputs.settings()).check(run.store_dir)


def score_again(run: Run) -> None:
    """Score a complete run that lacks scores, or has them by another evaluation than the recipe's now."""
    directory, now = RunDirectory(run), run.recipe.to_dict()
    record = directory.read()
    names = ("scores.json", "evaluation.json") if run.recipe.data.heldout is not None else ()
    scored = record["recipe"].get("evaluation") == now["evaluation"]
    if scored and all((directory.path / name).exists() for name in names):
        return
    if names:
        print("evaluation changed or scores missing: scoring again", flush=True)
        evaluate(run, Store.open(run.store_dir))
    directory.update(recipe=now)
