"""Learn small VAEs with one setting changed at a time, and keep their curves and scores.

    python -m train.prepare train/assets/learning_models.txt --root SWEETHOME --out DATA \\
        --resolution 32 --views 24 --size 128 --supersample 4
    python notebooks/learning.py DATA --runs RUNS           # all that is not in learning.json yet
    python notebooks/learning.py DATA --runs RUNS --only kl # of one question

SWEETHOME is the folder `raw` that `python -m train.prepare --fetch sweethome --out DIR` makes. Each
question is asked with two seeds, of the objects' order, noise and untrained weights alike:

    kl         Gaussians, with four weights of the KL divergence
    encoder    radiance fields and meshes: an encoder of their own, one that was trained for
               Gaussians and goes on learning, or the same, frozen. Meshes need a wider model, so
               theirs that goes on is of a wider Gaussian VAE (wide-gaussian)
    start      Gaussians whose untrained weights are as published, or the features' principal
               components; beside kl-1e-06, whose input layers and branches are scaled alone
    direct     Gaussians, and meshes on the frozen encoder, whose first fifth of all steps renders
               nothing (--direct); beside kl-1e-06 and encoder-mesh-frozen

Rows go to notebooks/results/learning.json, one after each run, so that a run which was stopped is
the only one that is lost: the same command goes on with it. Of the starts it draws a picture,
learning.png beside it.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # it runs where nothing was installed

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

import models  # noqa: E402
from kernels.bench.environment import environment  # noqa: E402
from models.files import write_whole  # noqa: E402
from train.data import Dataset  # noqa: E402
from train.run.trained import open_trained  # noqa: E402

RESULTS = ROOT / "notebooks" / "results" / "learning.json"
SEEDS = (0, 1)
POINTS = 60  # of a curve that are kept
# of all runs but those that ask about it
START_UP = "--model.start published --model.input-gain 3 --model.branch-gain 0 --lr 3e-3"
# sizes in world units follow the voxel's: half of the demo's at 16^3
COMMON = {
    "gaussian": "--model.scaling-bias 0.008 --weights.volume 1250 --steps 200 --micro-batch 2",
    "radiance": "--steps 150",
    "mesh": "--views 2 --warmup 5 --steps 30",
}
START = "kl-1e-06"  # whose encoder the others start from: the published weight
STARTS = {  # that the picture compares: experiment, what it is
    "start-published": "Xavier weights",
    "kl-1e-06": "input x 3, blocks begin at nothing",
    "start-principal": "that, and principal components",
    "start-principal-lr-6e-3": "that, at twice the learning rate",
}
# the sizes of the mesh demo
WIDE = "--model.channels 256 --model.heads 4 --model.mlp-ratio 2 --steps 100"


@dataclass(frozen=True)
class Experiment:
    """A run: its name without the seed, its script, its own flags, and how it uses an encoder."""

    name: str
    script: str
    flags: str = ""
    encoder: str | None = None  # flag that the shared encoder is given to: --encoder or --init
    start: str = START  # the experiment whose encoder that is


def experiments() -> list[Experiment]:
    """List the runs of all questions, those that others need first."""
    weights = (1e-6, 1e-5, 1e-4, 1e-3)
    found = [
        Experiment(f"kl-{weight:.0e}", "gaussian", f"--weights.kl {weight}") for weight in weights
    ]
    found += [
        Experiment("start-published", "gaussian", "--model.input-gain 1 --model.branch-gain 1"),
        Experiment("start-principal", "gaussian", "--model.start principal"),
        Experiment("start-principal-lr-6e-3", "gaussian", "--model.start principal --lr 6e-3"),
    ]
    found += [Experiment("direct-gaussian", "gaussian", "--weights.kl 1e-6 --direct 40")]
    found += [Experiment("wide-gaussian", "gaussian", WIDE)]
    for script, start in (("radiance", START), ("mesh", "wide-gaussian")):
        found += [
            Experiment(f"encoder-{script}-own", script),
            Experiment(f"encoder-{script}-warm", script, encoder="--init", start=start),
            Experiment(f"encoder-{script}-frozen", script, encoder="--encoder"),
        ]
    found += [Experiment("direct-mesh", "mesh", "--direct 6", encoder="--encoder")]
    return found


def flags(experiment: Experiment, seed: int, data: Path, runs: Path) -> list[str]:
    """Make the command line of a run."""
    words = [*START_UP.split(), *COMMON[experiment.script].split(), *experiment.flags.split()]
    words += ["--eval-objects", "24"]
    words += ["--data", str(data), "--resolution", "32", "--seed", str(seed)]
    if experiment.encoder:
        prefix = runs / f"{experiment.start}-s{seed}" / "checkpoints" / "encoder"
        words += [experiment.encoder, str(prefix)]
    return words


def learn(experiment: Experiment, seed: int, data: Path, runs: Path, more: list[str]) -> dict:
    """Run an experiment to its end, and return its row. CalledProcessError where it fails."""
    folder = runs / f"{experiment.name}-s{seed}"
    command = [sys.executable, "-m", f"train.{experiment.script}"]
    began = time.perf_counter()
    if (folder / "config.json").is_file():
        subprocess.run([*command, "--resume", str(folder)], check=True)
    else:
        own = [*flags(experiment, seed, data, runs), *more, "--out", str(folder)]
        subprocess.run([*command, *own], check=True)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "evaluation.json").read_text())
    row = {
        "script": experiment.script,
        "flags": " ".join([START_UP, COMMON[experiment.script], experiment.flags, *more]).strip(),
        "encoder": experiment.encoder,
        "seed": seed,
        "steps": log[-1]["step"],
        "seconds": log[-1]["seconds"],
        "wall": round(time.perf_counter() - began, 1),
        "scores": scores["psnr"],
        "curve": curve(log),
        "latents": latents(folder, data),
    }
    return row | {"surface": scores["surface"]} if "surface" in scores else row


def curve(log: list[dict]) -> list[dict]:
    """Thin a log: means of the loss, the PSNR and the KL divergence over stretches of steps."""
    width = max(len(log) // POINTS, 1)
    rows = []
    for first in range(0, len(log) - width + 1, width):
        part = log[first : first + width]
        row = {"step": part[-1]["step"], "seconds": part[-1]["seconds"]}
        for name in ("loss", "psnr", "kl"):
            values = [one[name] for one in part if one.get(name) is not None]
            if values:
                row[name] = round(sum(values) / len(values), 4)
        rows.append(row)
    return rows


@torch.no_grad()
def latents(run: Path, data: Path) -> dict:
    """Measure the posterior of every training object: moments of its means, its deviations."""
    trained = open_trained(run, torch.device("cpu"))
    dataset = Dataset([data], resolution=trained.resolution, features=trained.features)
    means = []
    logvars = []
    for index in range(len(dataset)):
        item = dataset.item(index, [0])
        coords = torch.nn.functional.pad(item.coords, (1, 0))
        voxels = models.SparseTensor(item.features, coords, 1)
        posterior = trained.encoder(voxels)
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
    mean = torch.cat(means)
    logvar = torch.cat(logvars)
    kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1)
    return {
        "mean": [round(x, 4) for x in mean.mean(0).tolist()],
        "std": [round(x, 4) for x in mean.std(0).tolist()],
        "sigma": [round(x, 4) for x in (0.5 * logvar).exp().mean(0).tolist()],
        "kl": [round(x, 4) for x in kl.mean(0).tolist()],
    }


def draw(runs: dict, file: Path) -> None:
    """Draw how fast Gaussians learn from each kind of untrained weights, if all were run."""
    if any(f"{name}-s{seed}" not in runs for name in STARTS for seed in SEEDS):
        return
    unseen = "held-out objects"
    figure, (curves, scores) = plt.subplots(
        1, 2, figsize=(9.5, 3), width_ratios=(2, 1), layout="constrained"
    )
    for place, (name, label) in enumerate(STARTS.items()):
        for seed in SEEDS:
            run = runs[f"{name}-s{seed}"]
            points = run["curve"]
            curves.plot(
                [point["step"] for point in points],
                smooth([point["psnr"] for point in points]),
                "-" if seed == 0 else "--",
                color=f"C{place}",
                label=None if seed else label,
            )
            inside = run["scores"]["trained"][unseen]["inside"]
            scores.plot(place, inside, "o" if seed == 0 else "s", color=f"C{place}")
    floor = run["scores"]["silhouette"][unseen]["inside"]
    scores.axhline(floor, color="grey", linewidth=1)
    scores.text(0, floor, "true silhouette, mean colour", fontsize=7, va="bottom")
    curves.set(xlabel="steps of 4 objects", ylabel="PSNR of training views, dB")
    curves.legend(fontsize=8)
    scores.set(ylabel="unseen objects, inside, dB", xticks=[], xlim=(-0.5, len(STARTS) - 0.5))
    for axis in (curves, scores):
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Make means of the last `width` values, of fewer at the beginning."""
    parts = (values[max(end - width, 0) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def main() -> None:
    """Run what is missing, and write the results after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="", help="of experiments whose name begins so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--flags", default="", help="more flags of every run, as one word")
    args = parser.parse_args()
    kept = json.loads(args.results.read_text()) if args.results.is_file() else {"runs": {}}
    for experiment in experiments():
        for seed in SEEDS:
            name = f"{experiment.name}-s{seed}"
            if name in kept["runs"] or not experiment.name.startswith(args.only):
                continue
            print(f"== {name}", flush=True)
            row = learn(experiment, seed, args.data, args.runs, args.flags.split())
            kept["runs"][name] = row | {"environment": environment(torch.device("cpu"))}
            write_whole(args.results, json.dumps(kept, indent=1) + "\n")
    draw(kept["runs"], args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
