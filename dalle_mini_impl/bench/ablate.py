"""``python -m dalle_mini_impl.bench.ablate``: arms of one recipe, each trained for the same time, and judged.

An arm is the recipe with a few settings changed. Where a finished run of the same --data is given as --base, an arm
starts from all of it that its settings don't touch: pictures, tokenizer, VAE, id cache, CLIP. So arms about the
transformer differ in the transformer alone. Each runs in a process of its own, on its own share of the cores. Arms
that are in the results already are not repeated, so a stopped ablation goes on where it was; a result that was
measured with something else than the arm of its name has now is refused.

The plan is a TOML file with one list of settings an arm, as --set takes them:

    [arms]
    "as it is" = []
    "batch 32" = ["train.dalle.batch_size=32"]

An arm with a recipe of its own names it, beside the plan, and shares nothing with the base run:

    [recipes]
    "as it is" = "../shapes.toml"
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import typer

from dalle_mini_impl.bench.base_run import begin_from, check_base, shared_stages
from dalle_mini_impl.bench.plan import Settings, arm_folder, read_plan, read_recipes, read_results
from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.training.recipes import differences, in_words

JUDGED: dict[Stage, tuple[str, ...]] = {
    "vae": ("psnr", "perplexity"),
    "clip": ("text_to_image_recall_at_1",),
    "dalle": ("image_nll", "image_accuracy", "caption_gain", "text_nll", "read_nll"),
    "prior": ("nll", "cosine_drawn"),
    "distill": ("guidance_kl", "guidance_kl_before"),
    "vqgan": ("psnr", "rfd", "rfd_before"),
    "upscale": ("psnr", "psnr_resized"),
}
"""What the last evaluation of each stage that an arm trained is kept of."""


class CommandError(RuntimeError):
    """One of our commands has failed, says which and where its log is."""


def run_on(cores: Sequence[int], command: Sequence[str], log: Path) -> None:
    """Runs one of our commands on these cores; CommandError that names its log where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cores))] if shutil.which("taskset") else []
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            [*pinned, sys.executable, "-m", "dalle_mini_impl", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if done.returncode:
        raise CommandError(f"{command[0]} failed with exit status {done.returncode}; its last words are in {log}")


def measured(folder: Path) -> dict[str, float]:
    """Steps and last evaluation of each stage that a run trained itself."""
    values: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry.get("evaluation"):
            stage: Stage = entry["stage"]
            values[f"{stage}_steps"], values[f"{stage}_sec"] = entry["step"], entry["time_sec"]
            values |= {f"{stage}_{name}": entry[name] for name in JUDGED[stage] if name in entry}
    return values


def judging(data: str, folder: Path, prompts: int) -> dict[Path, list[str]]:
    """The commands that judge single samples of a run on such data, by the file that each writes beside the run.

    Empty for data that nobody has a judge for.
    """
    source, checkpoint = data.split(":")[0], ["--checkpoint", str(folder)]
    if source == "shapes":
        report = folder.with_name(f"{folder.name}.json")
        return {report: ["evaluate", *checkpoint, "--prompts", str(prompts), "--out", str(report)]}
    if source != "emoji":
        return {}
    drawn = ["rerank", "--curve", *checkpoint, "--num-prompts", str(prompts), "--candidates", "1"]
    outs = {kind: folder.with_name(f"{folder.name}-{kind}") for kind in ("emoji", "emoji-scenes")}
    return {out / "curve.json": [*drawn, "--prompts-from", kind, "--out", str(out)] for kind, out in outs.items()}


def judged(report: Path) -> dict[str, float]:
    """Shares of single samples that are right, and of `shapes` the VAE's ceilings, in a file of `judging`."""
    facts = json.loads(report.read_text(encoding="utf-8"))
    if "curves" in facts:
        return {f"single_{facts['prompts_from']}": facts["curves"]["oracle"][0]["mean"]}
    values: dict[str, float] = {}
    for pairs, shares in facts["pairs"].items():
        values |= {f"{name}_{pairs}": shares[name]["share"] for name in ("single", "ceiling")}
    return values


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as a Markdown table, a row an arm; columns that no arm has are left out."""
    columns = {
        "dalle_steps": ("steps", "{:.0f}"),
        "vae_psnr": ("VAE dB", "{:.2f}"),
        "vae_perplexity": ("perplexity", "{:.0f}"),
        "clip_text_to_image_recall_at_1": ("CLIP recall@1", "{:.1%}"),
        "dalle_image_nll": ("nats a token", "{:.3f}"),
        "dalle_caption_gain": ("caption gain", "{:.3f}"),
        "dalle_read_nll": ("read nats", "{:.3f}"),
        "single_seen": ("right, seen", "{:.1%}"),
        "single_unseen": ("right, unseen", "{:.1%}"),
        "single_emoji": ("right, names", "{:.1%}"),
        "single_emoji-scenes": ("right, scenes", "{:.1%}"),
    }
    shown = {key: column for key, column in columns.items() if any(key in result for result in results)}
    lines = [
        "| arm | settings | " + " | ".join(title for title, _ in shown.values()) + " |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for result in results:
        own = [Path(result["recipe"]).name] if "recipe" in result else []
        settings = " ".join(f"`{setting}`" for setting in (*own, *result["settings"])) or "–"
        cells = [form.format(result[key]) if key in result else "–" for key, (_, form) in shown.items()]
        lines.append(f"| {result['arm']} | {settings} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Ablation:
    """What all arms share.

    common: settings of all of them, those of the base run among them. prompts: of each kind that is judged.
    recipes: of the arms that don't change `config`, but have their own.
    """

    config: Path
    data: str
    out: Path
    base: Path | None = None
    budget: str | None = None
    jobs: int = 1
    prompts: int = 200
    common: Sequence[str] = ()
    recipes: Mapping[str, Path] = field(default_factory=dict)

    def run(self, arms: Mapping[str, Settings]) -> list[dict[str, Any]]:
        """Trains and judges every arm that isn't in results.jsonl; returns all results in the plan's order.

        Raises ValueError, before anything is run, where an arm's recipe is wrong, the base is of no use to it or its
        result was measured with something else, and CommandError where a command failed, once the other arms are done.
        """
        path = self.out / "results.jsonl"
        found = {result["arm"]: result for result in read_results(path)} if path.is_file() else {}
        for name, settings in arms.items():
            recipe = self.recipe(name, settings)
            if name in found:
                self.check_result(found[name], settings)
            elif self.base is not None:
                check_base(self.base, self.data, recipe, self.taken_over(name, settings))
        self.out.mkdir(parents=True, exist_ok=True)
        free: SimpleQueue[list[int]] = SimpleQueue()
        for cores in share_out(sorted(os.sched_getaffinity(0)), self.jobs):
            free.put(cores)

        def one(name: str) -> None:
            cores = free.get()
            try:
                found[name] = self.run_arm(name, arms[name], cores)
            finally:
                free.put(cores)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[name]) + "\n")
            typer.echo(table([found[name]]))

        with ThreadPoolExecutor(max_workers=self.jobs) as pool:
            for future in [pool.submit(one, name) for name in arms if name not in found]:
                future.result()
        return [found[name] for name in arms]

    def config_of(self, name: str) -> Path:
        """The recipe that an arm changes."""
        return self.recipes.get(name, self.config)

    def recipe(self, name: str, settings: Settings) -> Recipe:
        """The whole recipe of an arm; ValueError that names what is wrong with it."""
        return Recipe.from_toml(self.config_of(name), [*self.common, *settings])

    def taken_over(self, name: str, settings: Settings) -> list[Stage]:
        """The stages that an arm has of the base run."""
        return [] if self.base is None or name in self.recipes else shared_stages(settings)

    def measured_with(self, name: str, settings: Settings) -> dict[str, Any]:
        """All that an arm's result depends on, as JSON knows it, but for the budget and the machine."""
        return {
            "data": self.data,
            "base": str(self.base) if self.taken_over(name, settings) else None,
            "prompts": self.prompts,
            "recipe": self.recipe(name, settings).model_dump(mode="json", exclude={"name"}),
        }

    def check_result(self, result: Mapping[str, Any], settings: Settings) -> None:
        """Raises ValueError that names what differs where an earlier result is not of the arm as it is now."""
        name = result["arm"]
        ours = {"budget": self.budget, **self.measured_with(name, settings)}
        theirs = {"budget": result["budget"]}
        if "measured_with" in result:
            theirs |= result["measured_with"]
            recipe = Recipe.parse(theirs["recipe"], where=f"{self.out / 'results.jsonl'}, arm {name!r}")
            theirs["recipe"] = recipe.model_dump(mode="json", exclude={"name"})  # with settings that came later
        else:  # of an earlier version, which noted no more than this
            theirs |= {"settings": result["settings"], "own recipe": result.get("recipe")}
            ours |= {"settings": settings, "own recipe": str(self.recipes[name]) if name in self.recipes else None}
        changed = differences(theirs, {key: ours[key] for key in theirs})
        if changed:
            raise ValueError(
                f"arm {name!r} in {self.out / 'results.jsonl'} was measured with something else "
                f"({in_words(changed)}): choose another --out, or give the arm another name"
            )

    def run_arm(self, name: str, settings: Settings, cores: Sequence[int]) -> dict[str, Any]:
        """Trains one arm and has it judged."""
        folder = arm_folder(self.out, name)
        shutil.rmtree(folder, ignore_errors=True)  # of an ablation that was stopped
        if self.base is not None:
            begin_from(self.base, folder, self.taken_over(name, settings))
        log = self.out / f"{folder.name}.log"
        config = str(self.config_of(name))
        command = ["train", "--config", config, "--data", self.data, "--out", str(folder)]
        for setting in (*self.common, *settings):
            command += ["--set", setting]
        measured_with = self.measured_with(name, settings)  # before training: the recipe's file may change meanwhile
        run_on(cores, command if self.budget is None else [*command, "--budget", self.budget], log)
        own = {"recipe": config} if name in self.recipes else {}
        result = {
            "arm": name,
            **own,
            "settings": settings,
            "budget": self.budget,
            "cores": len(cores),
            "measured_with": measured_with,
            **measured(folder),
        }
        for report, judge in judging(self.data, folder, self.prompts).items() if self.prompts else ():
            run_on(cores, judge, log)
            result |= judged(report)
        return result


def share_out(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """An equal share of the cores for each job; ValueError where there are fewer cores than jobs."""
    share = len(cores) // jobs
    if share < 1:
        raise ValueError(f"{jobs} jobs on {len(cores)} cores: each needs one of its own to be compared")
    return [list(cores[job * share : (job + 1) * share]) for job in range(jobs)]


def main(
    plan: Annotated[Path, typer.Argument(help="TOML file of the arms.", exists=True, dir_okay=False)],
    config: Annotated[Path, typer.Option(help="The recipe that the arms change.")],
    data: Annotated[str, typer.Option(help="As train.py's; with --base the same as its.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs and of results.jsonl.")],
    base: Annotated[Path | None, typer.Option(help="A finished run to share stages with.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall-clock time of each arm's training, as 8m; default: the recipe's steps.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Arms at once; they share the cores out.")] = 1,
    prompts: Annotated[
        int, typer.Option(min=0, help="Of each kind that is judged, on shapes and emoji; 0 skips it.")
    ] = 200,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Settings of all arms.")] = None,
) -> None:
    """Train arms of a recipe for the same time each, and compare them."""
    try:
        ablation = Ablation(config, data, out, base, budget, jobs, prompts, set_ or [], read_recipes(plan))
        typer.echo(table(ablation.run(read_plan(plan))))
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except CommandError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
