"""The training loop of every decoder: `main` reads the flags, `fit` runs, `Run.step` is the one function that trains.

A step takes `batch_size` objects over all ranks, in micro-batches. What it draws (views, posterior noise, backgrounds)
depends only on the seed, the step and the object's place in the batch, so neither the number of ranks nor an
interruption changes it; where the rays of a radiance field start depends on the rank too. Loss terms are means over a
micro-batch, as published, averaged over micro-batches and ranks.
"""

import errno
import fcntl
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
from models import VAE, SparseTensor
from models.scene import Scene
from models.vae import load_weights
from train import checkpoint, floors, report
from train.config import PRECISIONS, Config, from_cli, write_config, write_whole
from train.data import Batch
from train.latents import Latents, load_encoder
from train.losses import GradClipper, Pictures, kl
from train.machine import Interrupt, Machine, machine, seed_all, seed_of, world_size
from train.objects import Objects
from train.optimizer import LossScale, Optimizer
from train.threads import computing

Build = Callable[[Config, int], VAE]  # (config, feature channels) -> an untrained VAE
Compare = type[Pictures]  # what compares scenes with a batch: Pictures, or a class with the same methods


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum(weight * term); ValueError where a term has no weight or a weight no term."""
    if terms.keys() != weights.keys():
        raise ValueError(
            f"loss terms without a weight: {sorted(terms.keys() - weights.keys())}; "
            f"weights without a term: {sorted(weights.keys() - terms.keys())}"
        )
    return sum(weights[name] * term for name, term in terms.items())


class Objective(nn.Module):
    """A batch -> its loss, its terms and its PSNR: the one forward pass that DDP sees."""

    def __init__(self, vae: VAE, compare: nn.Module, weights: Mapping[str, float]):
        super().__init__()
        self.vae, self.compare, self.weights = vae, compare, weights

    def forward(self, x: SparseTensor, noise: Tensor, batch: Batch, background: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`noise` [N, latent] and `background` [V, 3] are the step's random draws."""
        posterior, scenes = self.vae(x, noise)
        terms, psnr = self.compare(scenes, batch, background)
        if posterior is not None:
            terms["kl"] = kl(posterior.mean, posterior.logvar)
        loss = weighted(terms, self.weights)
        return loss, {"loss": loss, **terms, "psnr": psnr}


class Run:
    """What a training run holds on one rank. Raises ValueError or OSError for whatever it is told that cannot be."""

    def __init__(self, script: str, config: Config, build: Build, here: Machine, compare: Compare = Pictures):
        self.script, self.config, self.here, self.done = script, config, here, 0
        self.objects = Objects(config, here, compare.meshes)
        self._build = build
        self.vae = self.untrained()
        self.vae.use_graphs(config.cuda_graphs)
        if config.encoder:
            encoder, digest = load_encoder(config.encoder, self.objects.channels, config.resolution)
            type(self.vae)(encoder, self.vae.decoder)  # raises where their latents differ
        off = {"kl": "the encoder is frozen"} if config.encoder else {}
        weights = asdict(config.weights)
        if not config.lpips:
            off |= {name: "no weights given (--lpips FILE)" for name in weights if name.endswith("lpips")}
        self.weights = {name: weight for name, weight in weights.items() if name not in off}
        self.recipe = report.recipe(self.weights, off)
        self.compare = compare(config.lpips).to(here.device)
        objective = Objective(self.vae, self.compare, self.weights)
        self.objective = DistributedDataParallel(objective, broadcast_buffers=False) if here.world > 1 else objective
        self.clipper = GradClipper(config.max_norm)
        scale = LossScale() if config.precision == "fp16" else LossScale(0, 0, 0)
        self.optimizer = Optimizer(
            self.vae.named_parameters(), self.clipper, scale, config.weight_decay, config.ema, config.optimizer == "muon"
        )
        if config.resume:
            self.folder = Path(config.resume)
            self._load(checkpoint.newest(self.folder / "checkpoints"))
            if here.leads:
                self._continued(json.loads((self.folder / "config.json").read_text())["steps"])
        else:
            self.folder = Path(here.agree(_new_folder(script, config.out) if here.leads else None))
        if here.leads:
            write_config(config, script, self.folder / "config.json")
        self.latents = Latents(encoder.to(here.device), self.folder / "latents" / digest) if config.encoder else None

    def untrained(self) -> VAE:
        """The model that the run starts from, the same at every call."""
        seed_all(self.config.seed)
        vae = self._build(self.config, self.objects.channels)
        if self.config.encoder:
            vae = type(vae)(None, vae.decoder)
        vae.set_activation_dtype(PRECISIONS[self.config.precision])
        return vae.to(self.here.device)

    def _voxels(self, batch: Batch) -> SparseTensor:  # the model's input: features, or latents of a frozen encoder
        return self.latents(batch) if self.latents else SparseTensor(batch.features, batch.coords, batch.batch_size)

    @torch.no_grad()
    def decode(self, batch: Batch, vae: VAE | None = None) -> list[Scene]:
        """The scenes of posterior means, by another model of the same kind if one is given."""
        vae, x = vae or self.vae, self._voxels(batch)
        return vae.decoder(x if self.latents else vae.encoder(x).mode())

    @torch.no_grad()
    def sample(self) -> None:
        """Draw held-out views of a few objects, the true ones above the model's, to samples/step_NNNNNNNN.png."""
        self.vae.eval()
        batch = self.objects.gallery()
        title = f"train.{self.script}, step {self.done}: views never trained on (unseen: no view of that object was)"
        file = self.folder / "samples" / f"step_{self.done:08d}.png"
        report.picture(self.compare.show(self.decode(batch), batch), self.objects.captions(batch), title, file)

    def _draws(self, step: int, micro: int, x: SparseTensor, views: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Posterior noise [N, latent] and black or white backgrounds [V, 3] of a micro-batch."""
        first = (self.here.rank * self.config.micro_batches(self.here.world) + micro) * self.config.micro_batch
        noise, black_or_white = [], []
        for sample, voxels in enumerate(x.cache.counts):
            generator = torch.Generator().manual_seed(seed_of(self.config.seed, step, first + sample))
            noise.append(torch.randn(voxels, self.config.model.latent, generator=generator))
            black_or_white.append(torch.randint(2, (views.count(sample), 1), generator=generator).float().expand(-1, 3))
        return torch.cat(noise).to(self.here.device), torch.cat(black_or_white).to(self.here.device)

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Train one step on this rank's micro-batches; returns its row of the log, means over all ranks."""
        begin, device = time.perf_counter(), self.here.device
        seed_all(self.config.seed, self.done, self.here.rank)
        self.vae.train()
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            batch = batch.to(device, non_blocking=True)
            x = self._voxels(batch)
            noise, background = self._draws(self.done, micro, x, batch.view_scene)
            waits = self.here.world > 1 and micro + 1 < len(batches)  # gradients are exchanged after the last micro-batch
            with self.objective.no_sync() if waits else nullcontext():
                loss, values = self.objective(x, noise, batch, background)
                self.optimizer.backward(loss / len(batches))
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(batches)
        norm = self.optimizer.step(self.config.lr_at(self.done))
        self.done += 1
        voxels = float(sum(len(batch.coords) for batch in batches))
        means = self.here.mean(torch.stack([*totals.values(), torch.tensor(voxels, device=device)])).tolist()
        row = dict(zip(totals, means, strict=False))
        rate = means[-1] * self.here.world / (time.perf_counter() - begin)
        return {"step": self.done, **row, "grad_norm": norm, "skipped": self.optimizer.skipped, "voxels_per_second": rate}

    def save(self) -> Path:
        tensors = {f"model.{name}": t for name, t in self.vae.state_dict().items()} | self.optimizer.tensors()
        state = {"step": self.done, "optimizer": self.optimizer.state(), "clipper": self.clipper.state_dict()}
        state["sampler"] = self.objects.sampler.state_dict(self.done)
        return checkpoint.save(self.folder / "checkpoints", self.done, tensors, state)

    def _load(self, file: Path) -> None:
        tensors, state = checkpoint.load(file)
        load_weights(self.vae, checkpoint.group(tensors, "model"), str(file))
        try:
            self.optimizer.load(tensors, state["optimizer"])
            self.clipper.load_state_dict(state["clipper"])
            self.objects.sampler.load_state_dict(state["sampler"])
            self.done = state["step"]
        except KeyError as error:
            raise ValueError(f"{file} is not a checkpoint of a run: it lacks {error}") from error
        if self.config.steps < self.done:
            raise ValueError(f"--steps {self.config.steps} are fewer than the {self.done} that {self.folder} has done")

    def _continued(self, steps: int) -> None:
        """Say where another number of steps than before changes the learning rate."""
        before, now = replace(self.config, steps=steps).lr_at(self.done), self.config.lr_at(self.done)
        if before != now and self.done < self.config.steps:
            print(
                f"--steps {self.config.steps} instead of {steps} is another cosine: the learning rate after step {self.done} "
                f"is {now:.2g}, not {before:.2g}"
            )


def _new_folder(script: str, out: str | None) -> Path:
    """Make the run's folder: OUT, which must be new or empty, or the next free runs/SCRIPT-NNN."""
    folder = Path("runs" if out is None else out)
    if out is not None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty: choose another folder, or continue that run with --resume {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if out is None:
            folder = _numbered(folder, script)
        (folder / "log.jsonl").touch()
    except OSError as error:
        raise ValueError(f"run folder {folder} cannot be written: {error}") from error
    return folder


def _numbered(parent: Path, script: str) -> Path:
    """Make the next PARENT/SCRIPT-NNN: of runs that start at once, each gets its own."""
    taken = [int(m[1]) for p in parent.glob(f"{script}-*") if (m := re.fullmatch(rf"{script}-(\d+)", p.name))]
    for number in count(max(taken, default=0) + 1):
        folder = parent / f"{script}-{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder, until the end or the death of this process; ValueError where another process holds it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"run folder {folder} is in use by another process") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # file systems that know no locks
                raise
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where data workers still have it open


def fit(run: Run) -> None:
    """Train to the last step with a progress line, checkpoints and pictures, then conclude.

    Ctrl-C or SIGTERM end the run after the step under way: it saves, says how to continue and exits with 128 + the signal.
    """
    config, here, folder = run.config, run.here, run.folder
    if here.leads:
        loss, data = run.recipe, run.objects.summary()
        print(report.header(run.script, config, here, run.vae, loss, data, folder), flush=True)
    with (
        Interrupt() as interrupt,
        report.Log(folder / "log.jsonl", run.done) if here.leads else nullcontext() as log,
        report.Progress(run.done, config.steps, here.leads) as progress,
    ):
        begin = time.perf_counter() - (log.seconds if here.leads else 0)
        for batches in run.objects.steps():
            row = run.step(batches)
            stop = here.mean(torch.tensor(float(interrupt.received), device=here.device)).item() > 0
            last = run.done == config.steps or stop
            if here.leads:
                log.write(row | {"seconds": round(time.perf_counter() - begin, 3)})
                progress.update(row, run.optimizer.skipped)
                if last or run.done % config.save_every == 0:
                    run.save()  # before the pictures: what is wrong with one must not cost the steps
                if last or run.done % config.sample_every == 0:
                    run.sample()
                    report.curves(log.rows, run.weights, folder / "curves.png")
            if stop:
                break
    if run.done < config.steps:
        if here.leads:
            print(f"stopped at step {run.done}; continue with: python -m train.{run.script} --resume {folder}")
        raise SystemExit(128 + (interrupt.received or signal.SIGTERM))
    if here.leads:
        conclude(run)


def conclude(run: Run) -> floors.Scores:
    """Keep the trained models as pretrained files, score them beside the floors, print the table, write evaluation.json.

    What is kept and scored are the averaged weights, unless the untrained ones still weigh over 5 % in the average.
    """
    run.vae.eval()
    averaged = run.optimizer.remembers_start < 0.05
    with run.optimizer.averaged() if averaged else nullcontext():
        for part, model in run.vae.named_children():
            models.save_pretrained(model, run.folder / "checkpoints" / part)
        decoders = {"trained": run.decode, "untrained": partial(run.decode, vae=run.untrained().eval())}
        rgb = run.config.features == "rgb"
        scores = floors.compare(decoders, run.objects, run.config.resolution, rgb)
        more, table = run.compare.measure(decoders, run.objects)
    weights = "averaged" if averaged else "last"
    values = {name: {group: report.finite(asdict(s)) for group, s in row.items()} for name, row in scores.items()}
    content = {"step": run.done, "weights": weights, "protocol": floors.PROTOCOL, "psnr": values}
    if more:
        content["surface"] = {name: {g: report.finite(s) for g, s in row.items()} for name, row in more.items()}
    write_whole(run.folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
    tables = "\n".join([floors.table(scores), *([table] if table else [])])
    print(f"{tables}\n({weights} weights of step {run.done}; pictures and curves in {run.folder})")
    return scores


def main(
    script: str, presets: Mapping[str, Config], build: Build, argv: Sequence[str] | None = None, compare: Compare = Pictures
) -> None:
    """The command line of a training script.

    Wrong flags, data, folders and files end with a message and status 2, whenever they are met; a disk that is full, or fails,
    with a message and status 1; a second Ctrl-C with status 130. Where there is a checkpoint, the message says how to go on.
    """
    config = from_cli(script, presets, argv, world_size())
    run = None
    with ExitStack() as stack:
        try:
            here = stack.enter_context(machine(config.device, config.deterministic))
            threads = stack.enter_context(computing(config, here.device))
            here = replace(here, threads=threads)
            config = replace(config, threads=config.threads or threads.number)
            if here.leads and config.resume:
                stack.enter_context(locked(Path(config.resume)))  # before anything in it is read
            run = Run(script, config, build, here, compare)
            if here.leads and not config.resume:
                stack.enter_context(locked(run.folder))
            fit(run)
        except (ValueError, OSError, KeyboardInterrupt) as error:
            kept = run is not None and any((run.folder / "checkpoints").glob("step_*.safetensors"))
            hint = f"\ncontinue with: python -m train.{script} --resume {run.folder}" if kept else ""
            stopped = isinstance(error, KeyboardInterrupt)
            what = "interrupted" if stopped else f"error: {_reason(error)}"
            print(f"\npython -m train.{script}: {what}{hint}", file=sys.stderr)
            raise SystemExit(130 if stopped else 1 if run and isinstance(error, OSError) else 2) from error


def _reason(error: Exception) -> str:
    """What the error says, without the traceback that a data worker puts before it."""
    text = str(error)
    return text.strip().rpartition(f"\n{type(error).__name__}: ")[2] if text.startswith("Caught ") else text
