"""Does a whole run: prepares what is missing, fuses, saves, scores and reports."""

from __future__ import annotations

import contextlib
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from profuser.environment import peak_memory
from profuser.errors import ProfuserError
from profuser.evaluate.match import try_match
from profuser.evaluate.rewards import Rewards
from profuser.evaluate.scores import evaluate
from profuser.evaluate.terminal import closing_examples, score_table, worse_line
from profuser.owned_memory import OwnedMemory
from profuser.plan.plan import make_plan
from profuser.plan.text import beside
from profuser.prepare.announce import announce
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import Preparation
from profuser.prepare.sharing import takes_part
from profuser.progress import in_words, silenced
from profuser.recipe.parse import Run
from profuser.recipe.schema import Recipe
from profuser.report.page import write_report
from profuser.store.fresh import check_fresh, start_over
from profuser.store.sealed import is_intact
from profuser.store.store import Store
from profuser.train.checkpoint import newest_step
from profuser.train.checks import check_training
from profuser.train.export import save_fused
from profuser.train.hub import check_hub, upload
from profuser.train.loop import Trainer
from profuser.train.model_card import CARD, write_card
from profuser.train.parallel import launch, settled_precision, shards
from profuser.train.run_directory import RunDirectory
from profuser.train.run_record import EVALUATION, SCORES, check_data, read_measured, record_files
from profuser.train.target import whole_target
from profuser.train.zero import check_zero, is_asked_for


def train(run: Run, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Prepares, fuses, saves and scores one recipe.

    Under DDP every process calls it. All prepare the store; the main process alone writes the run's files and scores.

    Returns:
        The content of scores.json. It is empty without held-out data, and on all processes but the main one.
    """
    directory = RunDirectory(run)
    if accelerator is None:
        accelerator = launch(settled_precision(directory.precision()), deterministic=run.recipe.optim.deterministic)
    with contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(directory.held())
        return fuse(run, accelerator, held)


def fuse(run: Run, accelerator: Accelerator, held: contextlib.ExitStack) -> dict[str, Any]:
    """Does the work of `train` in a run directory that the main process holds. It adds to `held` the hold on the store, and
    the end of the trackers.
    """
    # Begin the run, or go on with one.
    recipe, directory, is_main = run.recipe, RunDirectory(run), accelerator.is_main_process
    memory = held.enter_context(OwnedMemory())
    if is_main:
        directory.begin(settled_precision(directory.precision()))
    accelerator.wait_for_everyone()

    # Prepare the store. It stays held, so that no other recipe makes another store of it while the target learns from it.
    with directory.timed("prepare", is_main):
        store = prepare_together(run, accelerator, held)
        accelerator.wait_for_everyone()
        if store is None:
            store = Store.open(run.store_dir)

    # Train the target.
    with directory.timed("train", is_main):
        rewards = Rewards.open(recipe, store, accelerator.device)
        trainer = Trainer(recipe, store, directory.path, accelerator, rewards)
        held.callback(trainer.trackers.close)  # last of all, because a tracker may wait for its network
        trainer.train()
        step = trainer.restore_exported()

    # Save the fused model, and score what was saved.
    scores: dict[str, Any] = {}
    whole = whole_target(trainer.fusion, recipe, trainer.saved_dtype, accelerator)
    if whole is not None and is_main:
        with directory.timed("evaluate"):
            model = save_fused(whole, trainer.chat.tokenizer, directory.path, recipe, trainer.saved_dtype)
            del trainer
            if recipe.data.location("heldout") is not None:
                scores = evaluate(run, store)
                write_card(directory.path, recipe, scores)
        directory.finish(model, step, store.data, peak_memory(memory))
    accelerator.wait_for_everyone()
    return scores


def prepare_together(run: Run, accelerator: Accelerator, held: contextlib.ExitStack) -> Store | None:
    """Prepares the store by all processes together, and holds it in `held`. The main process puts it in order and speaks for all.

    Returns:
        The complete store; None on a process that does not take part.
    """
    recipe, directory, is_main = run.recipe, RunDirectory(run), accelerator.is_main_process
    with contextlib.nullcontext() if is_main else silenced():
        with accelerator.main_process_first():
            if not takes_part(recipe, PartialState()):
                return None
            if is_main:
                check_launch(recipe, accelerator)
            preparation = Preparation.begin(Inputs.open(run), held)
            if is_main:
                if not preparation.store.complete:
                    directory.update(prepared=True)
                for example in preparation.inputs.rows.get("heldout", [])[:1]:
                    try_match(recipe.evaluation.match, example)
                announce("train", preparation, accelerator.num_processes, newest_step(directory.checkpoints))
        return preparation.run()


def train_and_report(run: Run) -> None:
    """Does what the command `train` does: fuses unless the run is complete, writes the report and prints the scores."""
    directory = RunDirectory(run)
    fresh = bool(run.options.get("fresh"))
    precision = run.recipe.optim.precision if fresh else directory.precision()
    accelerator = launch(settled_precision(precision), deterministic=run.recipe.optim.deterministic)
    is_main = accelerator.is_main_process
    if is_main:
        check_hub(run.recipe.hub)
    with contextlib.ExitStack() as held:
        # Find out whether there is anything to do. The main process decides it for all.
        complete = False
        if accelerator.is_main_process:
            if fresh:
                # Whatever is wrong is found before anything is moved.
                check_fresh(run, "run")
                inputs = check_unchanged(run)
                check_launch(run.recipe, accelerator)
                for example in inputs.rows.get("heldout", [])[:1]:
                    try_match(run.recipe.evaluation.match, example)
                start_over(run, "run")
            held.enter_context(directory.held())
            complete = directory.complete()

        # Train. A run that is complete is not trained again; it is scored again if its evaluation has changed.
        if broadcast_object_list([complete])[0]:
            if accelerator.is_main_process:
                inputs = check_unchanged(run)  # raises an error if the models or data are no longer those of the store
                check_data(directory.path, directory.read(), inputs.data_hashes)
                print(f"{directory.path} is complete already; --fresh starts over", flush=True)
                score_again(run)
        else:
            fuse(run, accelerator, held)

        # The report, and what a person wants to know in the terminal.
        if accelerator.is_main_process:
            print_report(run, None if complete else accelerator.num_processes)

    # DDP is freed before its process group. If it were the last to hold the group, it could wait for gloo's thread for ever.
    accelerator.free_memory()
    accelerator.end_training()

    if is_main and run.recipe.hub is not None:
        with directory.held():
            upload(directory, run.recipe.hub)


def check_launch(recipe: Recipe, accelerator: Accelerator) -> None:
    """Finds out before anything is prepared or moved whether the target can be trained as recipe and launcher say.

    It raises what `check_training` raises, and ConfigError for a DeepSpeed configuration that asks for something else than the recipe.
    """
    sharded = shards(recipe.optim, accelerator)
    if is_asked_for():
        check_zero(accelerator, recipe.optim)
    check_training(recipe, accelerator.device, sharded=sharded)


def print_report(run: Run, processes: int | None) -> None:
    """Writes the report of a complete run, and prints its scores and where everything is.

    `processes` says how many have just trained it, so that what it took is set beside the estimate; None where none has.
    """
    directory = RunDirectory(run)
    page, record = write_report(directory.path, run.store_dir), directory.read()
    if run.recipe.data.location("heldout") is not None:
        scores = read_measured(directory.path, record, SCORES)
        print(score_table(scores))
        print(closing_examples(read_measured(directory.path, record, EVALUATION), 3))
        if line := worse_line(scores):
            print(line)
    else:
        print("nothing was scored: the recipe has no data.heldout; give one, or set data.heldout_share: 0.05")
    if (run.store_dir / "manifest.json").exists() and (line := Store.open(run.store_dir, complete=False).handled()):
        print(line)
    took = {phase: in_words(seconds) for phase, seconds in record["seconds"].items()}
    if "prepare" in took and record.get("prepared") is False:
        took["prepare"] += " (the store was there already)"
    print(f"took {', '.join(f'{phase} {time}' for phase, time in took.items())}")
    if processes is not None:
        with contextlib.suppress(ProfuserError):  # a model that cannot be planned has been trained all the same
            print(beside(make_plan(run, processes=(processes,)), record, processes))
    of_step = f" (after step {record['exported_step']}, the best)" if run.recipe.optim.export == "best" else ""
    print(f"fused model: {directory.path}{of_step}\nreport: {page}")


def check_unchanged(run: Run) -> Inputs:
    """Opens the recipe's inputs and checks that its store, if there is one, was made from them.

    The store is only compared with them, and stays as it is.

    Raises:
        ConfigError, DataError: what Inputs.open and Inputs.changes raise.
    """
    inputs = Inputs.open(run)
    inputs.changes()
    return inputs


def score_again(run: Run) -> None:
    """Scores a complete run again if its scores are missing or damaged, or were made with other settings of `evaluation`."""
    directory, now = RunDirectory(run), run.recipe.to_dict()
    record = directory.read()
    names = (SCORES, EVALUATION) if run.recipe.data.location("heldout") is not None else ()
    scored = record["recipe"].get("evaluation") == now["evaluation"]
    if scored and all(is_intact(directory.path / name, record.get("files", {}).get(name)) for name in names):
        return
    if names:
        print("evaluation changed, or scores missing or damaged: scoring again", flush=True)
        scores = evaluate(run, Store.open(run.store_dir))
        record_files(directory.path, *names)
        if is_intact(directory.path / CARD, record.get("files", {}).get(CARD)):  # else somebody has edited it
            write_card(directory.path, run.recipe, scores)
            record_files(directory.path, CARD)
    directory.update(recipe=now)
